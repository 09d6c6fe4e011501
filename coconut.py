"""Coconut (arXiv 2412.06769): a language model whose last hidden state is fed back as the next input embedding.

All methods run through this one forward pass: chain of thought, no chain of thought and no thoughts are Coconut with
zero latents. Shapes: B rows, T columns, K latents of the longest row, N labeled tokens, D = width of the model.
"""

from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx.nn.utils import checkpoint

from models.gpt2 import GPT2
from models.mlx_lm import LanguageModel
from models.ops import cross_entropy
from parallel.streams import even_slices, map_streams

LARGEST_LOGITS = 1 << 28  # numbers that are kept at once: 1 GiB, which GPT-2 reaches with 5,300 labeled tokens


class Batch(NamedTuple):
    """Token sequences padded so that every row's first latent is in one column (official MyCollator).

    The collator computes positions and masks, so the forward pass never indexes on token values. Arrays are numpy's as
    the collator makes them, or MLX's after `to_mlx`.
    """

    input_ids: mx.array  # [B, T] int
    attention_mask: mx.array  # [B, T] bool, False on padding
    left_padding: mx.array  # [B] int, columns of padding before the row's first token
    latent_mask: mx.array  # [B, K] bool, whether the row has a latent in column first_latent + k
    first_latent: int  # column of the first latent, T where there is none
    first_read: int  # no hidden state before this column is fed back, predicts a label or a prompt's next token
    label_positions: mx.array  # [N] int, row * T + column of the hidden state that predicts a labeled token
    labels: mx.array  # [N] int, the labeled tokens
    label_mask: mx.array  # [N] float, weight of each label, 0 on entries that only round N up (dataset.collate labels)
    last_column: mx.array  # [B] int, column of the row's last token

    def to_mlx(self) -> "Batch":
        """The batch with MLX arrays."""
        return Batch(*(value if isinstance(value, int) else mx.array(value) for value in self))

    def prompts(self, rows: slice) -> "Batch":
        """Some rows of a batch of prompts, which has no labels."""
        names = ("input_ids", "attention_mask", "left_padding", "latent_mask", "last_column")
        return self._replace(**{name: getattr(self, name)[rows] for name in names})


class Coconut(nn.Module):
    """The thought loop around a language model. It adds no parameter: parameters() has Hugging Face's GPT-2 names."""

    def __init__(self, transformer: GPT2 | LanguageModel):
        super().__init__()
        self.transformer = transformer

    def think(self, batch: Batch, first: int = 0):
        """Fill in the thoughts and run the whole batch -> (hidden states of columns `first` to T, cache).

        first: batch.first_read at most, where the earlier ones are not looked at; [B, T - first, D].

        A thought is the hidden state after the final layer norm at the position before its latent (section 3 of the
        paper; official coconut.py). One pass runs up to the first latent, one column for each further latent, and one
        over the rest; rows with fewer latents keep their ordinary tokens.
        """
        embeddings = self.transformer.embed(batch.input_ids)  # [B, T, D]
        cache = self.transformer.make_cache(batch.attention_mask, batch.left_padding)
        ends = range(batch.first_latent, batch.first_latent + batch.latent_mask.shape[1])
        hidden, start = [], 0
        for inputs in mx.split(embeddings, list(ends), axis=1):  # one more than there are latents
            if hidden:
                is_latent = batch.latent_mask[:, len(hidden) - 1, None, None]  # [B, 1, 1]
                thought = mx.where(is_latent, hidden[-1][:, -1:], inputs[:, :1])  # [B, 1, D]
                inputs = mx.concatenate([thought, inputs[:, 1:]], axis=1)
            hidden.append(self.transformer(inputs, cache, max(0, first - start)))
            start += inputs.shape[1]
        return mx.concatenate(hidden, axis=1), cache

    def __call__(self, batch: Batch) -> mx.array:
        """Mean cross-entropy over the batch's labeled tokens, weighted by label_mask (scalar).

        Logits are computed for those tokens alone.
        """
        length, first = batch.input_ids.shape[1], batch.first_read
        hidden, _ = self.think(batch, first)  # [B, T - first, D]
        # Aranges and not numbers: see LayerCache.offset.
        rows = batch.label_positions // mx.arange(length, length + 1)
        places = batch.label_positions - (rows + 1) * mx.arange(first, first + 1)
        labeled = hidden.reshape(-1, hidden.shape[-1])[places]  # [N, D]
        return (self._losses(labeled, batch.labels) * batch.label_mask).sum() / batch.label_mask.sum()

    def _losses(self, hidden: mx.array, labels: mx.array) -> mx.array:
        """Cross-entropy of each label: hidden [N, D], labels [N] -> [N].

        With a large vocabulary the logits are computed in parts, and again in the backward pass, and not kept.
        """

        def losses_of(hidden, labels):
            return cross_entropy(self.transformer.logits(hidden).astype(mx.float32), labels)

        size = max(1, LARGEST_LOGITS // self.transformer.config.vocab_size)
        if len(labels) <= size:
            return losses_of(hidden, labels)
        recomputed = checkpoint(self.transformer.head, losses_of)
        parts = [slice(start, start + size) for start in range(0, len(labels), size)]
        return mx.concatenate([recomputed(hidden[part], labels[part]) for part in parts])

    def generate(self, batch: Batch, max_new_tokens: int, eos_id: int) -> list[list[int]]:
        """Greedy continuation of a batch of prompts: for each row its new ids, without the end token.

        A row ends at `eos_id` (also as the very first token), after max_new_tokens, or at the model's last position.
        Each token costs one column through the cache. Once half of the rows have ended, they are removed from the
        batch. The rows are split over the CPU streams.
        """
        decoders = map_streams(
            lambda rows: _Decoder(self, batch.prompts(rows), eos_id), even_slices(len(batch.input_ids))
        )
        live = list(decoders)
        mx.async_eval([decoder.arrays() for decoder in live])
        for n_left in reversed(range(max_new_tokens)):
            tokens = [decoder.token for decoder in live]
            if n_left:  # the device computes the next token while this one is read
                for decoder in live:
                    decoder.advance()
                mx.async_eval([decoder.arrays() for decoder in live])
            for decoder, token in zip(live, tokens, strict=True):
                decoder.read(token.tolist())
            live = [decoder for decoder in live if decoder.rows]
            if not live:
                break
        return [ids for decoder in decoders for ids in decoder.outputs]

    def argmax(self, hidden: mx.array) -> mx.array:
        """The most likely next token: hidden states [B, D] -> ids [B]."""
        return mx.argmax(self.transformer.logits(hidden), axis=-1)


class _Decoder:
    """The rows decoded on one stream: their outputs, and the cache and last token of the rows that go on."""

    def __init__(self, model: Coconut, batch: Batch, eos_id: int):
        self.model, self.eos_id = model, eos_id
        self.stream = mx.default_stream(mx.default_device())
        hidden, self.cache = model.think(batch, batch.first_read)
        self.columns = self.cache[0].columns
        self.rows = list(range(len(batch.input_ids)))  # rows of the batch that are still in the arrays
        self.token = model.argmax(hidden[mx.arange(len(self.rows)), batch.last_column - batch.first_read])
        next_position = batch.last_column - batch.left_padding + 1
        self.columns.end_prompt(next_position)
        self.n_free = (model.transformer.config.n_positions - next_position).tolist()  # positions left, by row
        self.outputs: list[list[int]] = [[] for _ in self.rows]
        self.finished = [False] * len(self.rows)

    def arrays(self) -> list:
        """What the next token is computed from."""
        return [self.token, [layer.state for layer in self.cache], self.columns.attention_mask, self.columns.padding]

    def advance(self) -> None:
        """Feed the current tokens; the next ones are computed when `arrays` are evaluated."""
        with mx.stream(self.stream):
            self.columns.append_token()
            hidden = self.model.transformer(self.model.transformer.embed(self.token[:, None]), self.cache)  # [B, 1, D]
            self.token = self.model.argmax(hidden[:, 0])

    def read(self, tokens: list[int]) -> None:
        """Take one token for each row in the arrays; drop the rows that have ended once they are half of them."""
        for row, token in zip(self.rows, tokens, strict=True):
            if not self.finished[row]:
                if token != self.eos_id:
                    self.outputs[row].append(token)
                # One token more than there are positions left: the last one is never fed.
                self.finished[row] = token == self.eos_id or len(self.outputs[row]) > self.n_free[row]
        going_on = [i for i, row in enumerate(self.rows) if not self.finished[row]]
        if len(going_on) <= len(self.rows) // 2:
            self._keep(going_on)

    def _keep(self, indices: list[int]) -> None:
        self.rows = [self.rows[i] for i in indices]
        with mx.stream(self.stream):
            index = mx.array(indices, dtype=mx.int32)
            self.token = self.token[index]
            self.columns.select(index)
            for layer in self.cache:
                layer.select(index)
