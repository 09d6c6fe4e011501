"""Examples -> curriculum -> token sequences -> batches. Everything here is numpy; the model gets MLX arrays at the end.

The curriculum is a function from (example, stage) to a sequence, written after the official dataset.py.
"""

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np

from coconut import Batch
from config import Config
from examples import Example, read_examples
from tokenizer import Tokenizer
from utils import Progress, UserError

LABELS_MULTIPLE = 64  # labelled tokens of a batch are rounded up to this, so that shapes repeat
CHUNK = 4096  # examples tokenised at a time


class TokenExample(NamedTuple):
    """One example as token ids: views into the data set's one array."""

    question: np.ndarray
    steps: list[np.ndarray]
    answer: np.ndarray


class TokenDataset:
    """All examples as one flat array of token ids.

    tokens [n_tokens] int32; starts [n_pieces + 1] where each piece begins; firsts [n + 1] the index of each example's
    first piece. An example's pieces are its question, its steps and its answer.
    """

    def __init__(self, tokens: np.ndarray, starts: np.ndarray, firsts: np.ndarray):
        self.tokens, self.starts, self.firsts = tokens, starts, firsts

    def __len__(self) -> int:
        return len(self.firsts) - 1

    def __getitem__(self, index: int) -> TokenExample:
        first, end = self.firsts[index], self.firsts[index + 1]
        question, *steps, answer = (self.tokens[a:b] for a, b in self._bounds(first, end))
        return TokenExample(question, steps, answer)

    def _bounds(self, first: int, end: int):
        bounds = self.starts[first : end + 1].tolist()
        return pairwise(bounds)

    @property
    def n_steps(self) -> np.ndarray:
        """Number of steps of every example [n]."""
        return np.diff(self.firsts) - 2

    def lengths_without(self, n_skipped: int) -> np.ndarray:
        """Tokens of question, steps behind the first n_skipped, and answer of every example [n]."""
        question_end, answer = self.firsts[:-1] + 1, self.firsts[1:] - 1
        kept_from = np.minimum(question_end + n_skipped, answer)
        question = self.starts[question_end] - self.starts[self.firsts[:-1]]
        return question + self.starts[self.firsts[1:]] - self.starts[kept_from]

    def select(self, indices: np.ndarray) -> "TokenDataset":
        """The data set of these examples alone."""
        chosen = [[self.tokens[a:b] for a, b in self._bounds(self.firsts[i], self.firsts[i + 1])] for i in indices]
        return _assemble(chosen)


class Data:
    """A data set as text and as tokens, checked against the model's number of positions."""

    def __init__(self, path: str, config: Config, tokenizer: Tokenizer, n_positions: int, debug_limit: int):
        self.examples: list[Example] = read_examples(path, debug_limit if config.debug else None)
        self.tokens: TokenDataset = tokenise(self.examples, tokenizer, Path(path).name)
        check_lengths(self.tokens, config, n_positions, path)

    def __len__(self) -> int:
        return len(self.tokens)


def tokenise(examples: list[Example], tokenizer: Tokenizer, name: str) -> TokenDataset:
    """Token ids of every example, by the official get_dataset: a newline ends question and steps, `### ` opens the
    answer, end of text closes it."""
    pieces = []
    with Progress(total=len(examples), desc=f"Tokenising {name}", unit=" items", leave=False) as bar:
        for start in range(0, len(examples), CHUNK):
            chunk = examples[start : start + CHUNK]
            texts = [
                text for e in chunk for text in (e.question + "\n", *(s + "\n" for s in e.steps), "### " + e.answer)
            ]
            encoded = iter(tokenizer.encode_batch(texts))
            for example in chunk:
                own = [next(encoded) for _ in range(len(example.steps) + 2)]
                own[-1].append(tokenizer.eos_id)
                pieces.append(own)
            bar.update(len(chunk))
    return _assemble(pieces)


def _assemble(pieces: list[list]) -> TokenDataset:
    firsts = np.cumsum([0] + [len(own) for own in pieces])
    starts = np.cumsum([0] + [len(piece) for own in pieces for piece in own])
    tokens = np.fromiter((t for own in pieces for piece in own for t in piece), dtype=np.int32, count=starts[-1])
    return TokenDataset(tokens, starts, firsts)


class Sequence(NamedTuple):
    """One row of a batch before padding: its latents follow the first `latent_start` ids."""

    ids: np.ndarray
    latent_start: int
    n_latents: int
    n_unlabelled: int


def training_counts(stage: int, n_steps: int, config: Config) -> tuple[int, int]:
    """(steps dropped, latents put in) of one training item (official get_cot_latent_dataset).

    Up to max_latent_stage the number of latents follows the stage alone, whatever pad_latent_to_max says: official.
    """
    if config.no_cot:
        return n_steps, 0
    if stage <= config.max_latent_stage:
        return min(stage, n_steps), stage * config.thoughts_per_step
    replaced = config.max_latent_stage if config.pad_latent_to_max else min(n_steps, config.max_latent_stage)
    return n_steps, replaced * config.thoughts_per_step


def prompt_latents(stage: int, n_steps: int, config: Config) -> int:
    """Latents of an evaluation prompt (official get_question_latent_dataset)."""
    most = config.max_latent_stage if config.pad_latent_to_max else min(config.max_latent_stage, n_steps)
    return min(stage, most) * config.thoughts_per_step


def training_sequence(example: TokenExample, stage: int, config: Config, tokenizer: Tokenizer) -> Sequence:
    """Question, thoughts, remaining steps and answer at a stage; labels start behind the thoughts."""
    dropped, n_latents = training_counts(stage, len(example.steps), config)
    opening = _thoughts(n_latents, config, tokenizer)
    ids = np.concatenate([example.question, opening, *example.steps[dropped:], example.answer])
    return Sequence(ids, len(example.question) + 1, n_latents, len(example.question) + len(opening))


def prompt_sequence(example: TokenExample, stage: int, config: Config, tokenizer: Tokenizer) -> Sequence:
    """Question and thoughts at a stage; nothing labelled."""
    n_latents = prompt_latents(stage, len(example.steps), config)
    ids = np.concatenate([example.question, _thoughts(n_latents, config, tokenizer)])
    return Sequence(ids, len(example.question) + 1, n_latents, len(ids))


def _thoughts(n_latents: int, config: Config, tokenizer: Tokenizer) -> np.ndarray:
    """Start marker, latents and end marker for coconut (also with no latents), nothing for the other methods."""
    ids = [tokenizer.start_id, *[tokenizer.latent_id] * n_latents, tokenizer.end_id] if config.coconut else []
    return np.array(ids, dtype=np.int32)


def item_stages(n_steps: np.ndarray, epoch: int, config: Config) -> np.ndarray:
    """Each item's stage in an epoch [n]: the scheduled one, or with uniform_prob one of 0..its number of steps."""
    rng = np.random.default_rng((config.seed, epoch, 1))
    drawn = rng.random(len(n_steps)) < config.uniform_prob
    return np.where(drawn, rng.integers(0, n_steps + 1), config.stage(epoch))


def training_batches(
    data: TokenDataset, config: Config, tokenizer: Tokenizer, epoch: int, skip: int = 0
) -> Iterator[Batch]:
    """The epoch's micro-batches, shuffled as a function of seed and epoch alone; the first `skip` left out."""
    order = np.random.default_rng((config.seed, epoch)).permutation(len(data))
    return _labelled_batches(data, order, config, tokenizer, epoch, skip)


def loss_batches(data: TokenDataset, config: Config, tokenizer: Tokenizer, epoch: int) -> Iterator[Batch]:
    """The validation set in file order, as training sequences of the epoch's stage (official dataset_loss_val)."""
    return _labelled_batches(data, np.arange(len(data)), config, tokenizer, epoch, 0)


def _labelled_batches(data, order, config, tokenizer, epoch, skip) -> Iterator[Batch]:
    stages = item_stages(data.n_steps, epoch, config)
    size = config.batch_size_training
    for start in range(skip * size, len(order), size):
        chosen = order[start : start + size]
        yield collate([training_sequence(data[i], int(stages[i]), config, tokenizer) for i in chosen], tokenizer.eos_id)


def count_batches(n_items: int, config: Config) -> int:
    """Micro-batches of an epoch over n_items."""
    return -(-n_items // config.batch_size_training)


def prompt_batches(
    data: TokenDataset, config: Config, tokenizer: Tokenizer, stage: int
) -> Iterator[tuple[list[int], Batch]]:
    """(item indices, prompts) of the whole set, prompts of like length together."""
    order = np.argsort(data.starts[data.firsts[:-1] + 1] - data.starts[data.firsts[:-1]], kind="stable")
    for start in range(0, len(order), config.batch_size_eval):
        chosen = order[start : start + config.batch_size_eval].tolist()
        yield chosen, collate([prompt_sequence(data[i], stage, config, tokenizer) for i in chosen], tokenizer.eos_id)


def collate(sequences: list[Sequence], pad_id: int, multiple: int = 8) -> Batch:
    """Lay sequences out as the official MyCollator does, lengths rounded up to `multiple` so that shapes repeat.

    Rows with latents are shifted right until their first latents stand in one column, others start in column 0.
    """
    first = max((s.latent_start for s in sequences if s.n_latents), default=0)
    first = _round_up(first, multiple)
    shifts = [first - s.latent_start if s.n_latents else 0 for s in sequences]
    ends = [shift + len(s.ids) for shift, s in zip(shifts, sequences, strict=True)]
    rows, length = len(sequences), _round_up(max(ends), multiple)
    n_latents = max(s.n_latents for s in sequences)
    ids = np.full((rows, length), pad_id, dtype=np.int32)
    positions = np.zeros((rows, length), dtype=np.int32)
    real = np.zeros((rows, length), dtype=bool)
    for row, (s, shift, end) in enumerate(zip(sequences, shifts, ends, strict=True)):
        ids[row, shift:end] = s.ids
        positions[row, shift:end] = np.arange(len(s.ids))
        real[row, shift:end] = True
    predict, targets, weights = _labels(sequences, shifts, length)
    return Batch(
        ids=ids,
        positions=positions,
        real=real,
        latents=np.arange(n_latents) < np.array([[s.n_latents] for s in sequences]),
        first_latent=first if n_latents else length,
        predict=predict,
        targets=targets,
        weights=weights,
        last=np.array(ends, dtype=np.int32) - 1,
    )


def _labels(sequences: list[Sequence], shifts: list[int], length: int):
    """Where each labelled token is predicted (one column before it), the tokens, and weights 0 for the rounding."""
    predict = [
        np.arange(s.n_unlabelled, len(s.ids)) + (row * length + shift - 1)
        for row, (s, shift) in enumerate(zip(sequences, shifts, strict=True))
    ]
    targets = np.concatenate([s.ids[s.n_unlabelled :] for s in sequences])
    extra = _round_up(len(targets), LABELS_MULTIPLE) - len(targets)
    return (
        np.pad(np.concatenate(predict), (0, extra)).astype(np.int32),
        np.pad(targets, (0, extra)),
        np.pad(np.ones(len(targets), dtype=np.float32), (0, extra)),
    )


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def longest(data: TokenDataset, config: Config, prompts_only: bool = False) -> np.ndarray:
    """The most positions each example takes in any epoch of the run [n]."""
    epochs = range(config.resume, config.num_epochs)
    stages = {config.stage(epoch) for epoch in epochs} or {config.stage(config.resume)}
    if config.uniform_prob:
        stages |= set(range(int(data.n_steps.max()) + 1))
    lengths = np.zeros(len(data), dtype=np.int64)
    for stage in stages:
        for n_steps in np.unique(data.n_steps):
            rows = data.n_steps == n_steps
            dropped, n_latents = training_counts(stage, int(n_steps), config)
            if prompts_only:
                dropped, n_latents = int(n_steps), prompt_latents(stage, int(n_steps), config)
            total = data.lengths_without(dropped)[rows] + n_latents + 2 * config.coconut
            lengths[rows] = np.maximum(lengths[rows], total)
    return lengths


def check_lengths(data: TokenDataset, config: Config, n_positions: int, path: str) -> None:
    """Raise UserError where an example takes more positions than the model has."""
    lengths = longest(data, config)
    too_long = np.flatnonzero(lengths > n_positions)
    if len(too_long):
        shown = ", ".join(f"item {i} ({lengths[i]} tokens)" for i in too_long[:10])
        raise UserError(
            f"{path}: {len(too_long)} of {len(data)} items are longer than the model's {n_positions} positions: {shown}"
            + (", ..." if len(too_long) > 10 else "")
        )


def describe_batch(batch: Batch, tokenizer: Tokenizer) -> str:
    """Every token of a batch with its id and label, one a line (the official data_table)."""
    labels = np.full(batch.ids.size, -100)
    labelled = batch.weights > 0
    labels[batch.predict[labelled] + 1] = batch.targets[labelled]
    lines = []
    for ids, row_labels in zip(batch.ids, labels.reshape(batch.ids.shape), strict=True):
        lines += [
            f"{i} {label} {tokenizer.spell(i)!r}" for i, label in zip(ids.tolist(), row_labels.tolist(), strict=True)
        ]
        lines.append("=" * 40)
    return "\n".join(lines) + "\n"
