"""Coconut (arXiv 2412.06769): a GPT-2 whose last hidden state is fed back as the next input embedding.

All four methods run through this one forward: chain of thought, no chain of thought and no thoughts are Coconut with
zero latents. Shapes: B rows, T columns, K latents of the longest row, N labelled tokens, D = n_embd.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import cpu_blas  # noqa: F401  must come before mlx
import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map

from gpt2 import GPT2
from loss import cross_entropy
from streams import spread, streams


class Batch(NamedTuple):
    """Token sequences laid out so that every row's first latent stands in one column (official MyCollator).

    The collator knows where everything is; the model never looks for it. Labels are the `targets` at `predict`;
    `weights` is 0 on the entries that only round N up. A prompt has its last token in column `last`.
    """

    ids: mx.array  # [B, T] int
    positions: mx.array  # [B, T] int, 0 at a row's first real token
    real: mx.array  # [B, T] bool, False on padding
    latents: mx.array  # [B, K] bool, whether the row has a latent in column first_latent + k
    first_latent: int  # column of the first latent, T where there is none
    predict: mx.array  # [N] int, row * T + column of the hidden state that predicts a labelled token
    targets: mx.array  # [N] int, the labelled tokens
    weights: mx.array  # [N] float, 1 or 0
    last: mx.array  # [B] int, column of the row's last real token
    share: float = 1.0  # of a micro-batch's labelled tokens, the part in this batch

    def shared_out(self, n: int) -> list["Batch"]:
        """The rows of unlabelled prompts in up to n batches."""
        size = -(-len(self.last) // n)
        starts = range(0, len(self.last), size)
        names = ("ids", "positions", "real", "latents", "last")
        return [
            self._replace(**{name: getattr(self, name)[start : start + size] for name in names}) for start in starts
        ]

    def to_mlx(self) -> "Batch":
        """The batch with MLX arrays (the collator makes numpy ones, which may cross threads)."""
        return Batch(*(value if isinstance(value, (int, float)) else mx.array(value) for value in self))


class Coconut(nn.Module):
    """The thought loop around a GPT-2; adds no parameter, so that parameters() are Hugging Face's GPT-2 names."""

    def __init__(self, transformer: GPT2):
        super().__init__()
        self.transformer = transformer

    def think(self, batch: Batch):
        """Fill in the thoughts and run the whole batch: -> (hidden states [B, T, D], cache).

        A thought is the hidden state after the final layer norm at the position before its latent (section 3 of the
        paper; coconut.py of the official code). One pass runs up to the first latent, one position for each further
        latent, and one over the rest; rows with fewer latents keep their ordinary tokens.
        """
        embeddings = self.transformer.embed(batch.ids)
        n_latents, length = batch.latents.shape[1], batch.ids.shape[1]
        mask = visible(batch.real)
        hidden, cache, start = [], None, 0
        for end in [*range(batch.first_latent, batch.first_latent + n_latents), length]:
            inputs = embeddings[:, start:end]
            if hidden:
                is_latent = batch.latents[:, len(hidden) - 1, None, None]
                thought = mx.where(is_latent, hidden[-1][:, -1:], inputs[:, :1])
                inputs = mx.concatenate([thought, inputs[:, 1:]], axis=1)
            out, cache = self.transformer(inputs, batch.positions[:, start:end], mask[:, :, start:end, :end], cache)
            hidden.append(out)
            start = end
        return mx.concatenate(hidden, axis=1), cache

    def __call__(self, batch: Batch) -> mx.array:
        """Mean cross-entropy over the batch's labelled tokens (scalar); logits are computed at those alone."""
        hidden, _ = self.think(batch)
        logits = self.transformer.logits(hidden.reshape(-1, hidden.shape[-1])[batch.predict])  # [N, vocabulary]
        return (cross_entropy(logits.astype(mx.float32), batch.targets) * batch.weights).sum() / batch.weights.sum()

    def generate(self, batch: Batch, max_new_tokens: int, eos_id: int) -> list[list[int]]:
        """Greedy continuation of a batch of prompts: for each row its new ids, without the end token.

        A row ends at `eos_id` (also as the very first token), after max_new_tokens, or where the model has no further
        position. Each token costs one position through the cache; rows that ended are taken out of the batch. On CPU
        the rows are shared out over the streams.
        """
        decoders = spread(lambda part: _Decoder(self, part, eos_id), batch.shared_out(len(streams())))
        live = list(decoders)
        mx.async_eval([decoder.arrays() for decoder in live])
        for n_left in reversed(range(max_new_tokens)):
            tokens = [decoder.token for decoder in live]
            if n_left:  # one token ahead: computed while the current one is looked at
                for decoder in live:
                    decoder.advance()
                mx.async_eval([decoder.arrays() for decoder in live])
            for decoder, token in zip(live, tokens, strict=True):
                decoder.read(token.tolist())
            live = [decoder for decoder in live if decoder.rows]
            if not live:
                break
        return [ids for decoder in decoders for ids in decoder.outputs]

    def pick(self, hidden: mx.array) -> mx.array:
        """The most likely next token: hidden states [B, D] -> ids [B]."""
        return mx.argmax(self.transformer.logits(hidden), axis=-1)


def compute_dtype(bf16: bool) -> mx.Dtype:
    """bfloat16 where it is wanted and there is a GPU; on CPU such products never reach the BLAS."""
    return mx.bfloat16 if bf16 and mx.default_device() == mx.Device(mx.gpu) else mx.float32


@contextmanager
def computing_in(model: Coconut, dtype: mx.Dtype) -> Iterator[None]:
    """Let the model compute in a dtype; its own parameters come back at the end, and gradients reach them."""
    parameters = model.parameters()
    model.update(tree_map(lambda array: array.astype(dtype), parameters))
    try:
        yield
    finally:
        model.update(parameters)


class _Decoder:
    """The rows decoded on one stream: their outputs, and the cache, last token and position of the live ones."""

    def __init__(self, model: Coconut, batch: Batch, eos_id: int):
        self.model, self.real, self.eos_id = model, batch.real, eos_id
        self.stream = mx.default_stream(mx.default_device())
        hidden, self.cache = model.think(batch)
        self.rows = list(range(batch.ids.shape[0]))  # of the batch that are still in the arrays
        places = mx.arange(len(self.rows))
        self.token = model.pick(hidden[places, batch.last])
        self.positions = batch.positions[places, batch.last]
        self.free = (model.transformer.config.n_positions - 1 - self.positions).tolist()  # positions left, by row
        self.outputs: list[list[int]] = [[] for _ in self.rows]
        self.finished = [False] * len(self.rows)

    def arrays(self) -> list:
        """What the next token is computed from."""
        return [self.token, self.cache, self.real, self.positions]

    def advance(self) -> None:
        """Feed the current tokens; the next ones are computed when `arrays` are evaluated."""
        transformer = self.model.transformer
        with mx.stream(self.stream):
            self.positions = mx.minimum(self.positions + 1, transformer.config.n_positions - 1)  # ended rows run idly
            self.real = mx.concatenate([self.real, mx.ones((len(self.rows), 1), dtype=mx.bool_)], axis=1)
            embeddings = transformer.embed(self.token[:, None])
            hidden, self.cache = transformer(embeddings, self.positions[:, None], self.real[:, None, None], self.cache)
            self.token = self.model.pick(hidden[:, 0])

    def read(self, tokens: list[int]) -> None:
        """Take one token for each row in the arrays, and drop rows that ended once they are half of them."""
        for row, token in zip(self.rows, tokens, strict=True):
            if not self.finished[row]:
                if token != self.eos_id:
                    self.outputs[row].append(token)
                self.finished[row] = token == self.eos_id or len(self.outputs[row]) > self.free[row]
        alive = [i for i, row in enumerate(self.rows) if not self.finished[row]]
        if len(alive) <= len(self.rows) // 2:
            self._keep(alive)

    def _keep(self, alive: list[int]) -> None:
        self.rows = [self.rows[i] for i in alive]
        with mx.stream(self.stream):
            index = mx.array(alive, dtype=mx.int32)
            self.token, self.positions, self.real = self.token[index], self.positions[index], self.real[index]
            self.cache = [(keys[index], values[index]) for keys, values in self.cache]


def visible(real: mx.array) -> mx.array:
    """The attention mask: causal, and never onto padding. real [B, T] -> bool [B, 1, T, T]."""
    columns = mx.arange(real.shape[1])
    return (columns[:, None] >= columns[None])[None, None] & real[:, None, None]
