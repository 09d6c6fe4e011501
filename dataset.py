"""Examples -> curriculum -> token sequences -> batches. Everything here is numpy; the model gets MLX arrays at the end.

The curriculum is a function from (example, stage) to a sequence, written after the official dataset.py.
"""

from bisect import bisect_left
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np

from coconut import Batch
from config import Config
from examples import SHOWN, Example, open_source
from processes import ALONE, Processes
from token_data import TokenDataset, TokenExample, tokenise, tokenise_cached
from tokenizer import Tokenizer
from utils import UserError, warn

LABELS_MULTIPLE = 64  # labelled tokens of a batch are rounded up to this, so that shapes repeat


class Data:
    """A data set as tokens and, for evaluation, as text, checked against the model's number of positions.

    path: the config's train_path or val_path (see examples.py); debug_limit: the most examples where `debug` is set;
    keep_texts: whether `examples` is filled, and not only `tokens`. Texts cost 1 GB on GSM8K's training set and reading
    them costs 5 s, so training goes without, from the token cache. Raises UserError for anything wrong with the data.
    """

    def __init__(
        self,
        path: str,
        config: Config,
        tokenizer: Tokenizer,
        n_positions: int,
        debug_limit: int,
        keep_texts: bool = True,
    ):
        self.path = path
        self.examples: list[Example] = []
        source = open_source(path)
        if keep_texts or config.debug:
            self.examples = source.examples(debug_limit if config.debug else None)
            self.tokens = tokenise(self.examples, tokenizer, Path(path).name)
        else:
            self.tokens = tokenise_cached(source, tokenizer, config.token_cache)
        self.indices = np.arange(len(self.tokens))  # [n] each example's place in the file
        self._leave_out(too_long(self.tokens, config, n_positions, path))

    def __len__(self) -> int:
        return len(self.tokens)

    def _leave_out(self, dropped: np.ndarray) -> None:
        if not len(dropped):
            return
        self.indices = np.delete(self.indices, dropped)
        self.tokens = self.tokens.select(self.indices)
        if self.examples:
            self.examples = [self.examples[i] for i in self.indices]


def warn_of_shared_questions(train: Data, valid: Data) -> None:
    """Warn where validation questions are in the training set too: answers to them may be memory."""
    shared = valid.indices[valid.tokens.same_questions(train.tokens)]
    if len(shared):
        warn(
            f"{valid.path}: {len(shared):,} of {len(valid):,} questions are in {train.path} too ({_listed(shared)}): "
            "accuracy on them may be memory and not reasoning"
        )


class Sequence(NamedTuple):
    """One row of a batch before padding: its latents follow the first `latent_start` ids."""

    ids: np.ndarray
    latent_start: int
    n_latents: int
    n_unlabelled: int

    @property
    def n_labelled(self) -> int:
        """Tokens that count in the loss."""
        return len(self.ids) - self.n_unlabelled


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
    data: TokenDataset,
    config: Config,
    tokenizer: Tokenizer,
    epoch: int,
    skip: int = 0,
    n_parts: int = 1,
    processes: Processes = ALONE,
) -> Iterator[list[Batch]]:
    """The epoch's micro-batches, shuffled as a function of seed and epoch alone; the first `skip` left out.

    N processes share micro-batches of N * batch_size_training items. Each comes in up to n_parts parts (see in_parts),
    and this gives the parts that one process works on (see own_parts).
    """
    order = np.random.default_rng((config.seed, epoch)).permutation(len(data))
    stages = item_stages(data.n_steps, epoch, config)
    size = config.batch_size_training * processes.size
    for start in range(skip * size, len(order), size):
        chosen = order[start : start + size]
        sequences = [training_sequence(data[i], int(stages[i]), config, tokenizer) for i in chosen]
        yield own_parts(sequences, processes, n_parts, tokenizer.eos_id)


def loss_batches(
    data: TokenDataset, config: Config, tokenizer: Tokenizer, epoch: int, processes: Processes = ALONE
) -> Iterator[Batch]:
    """The validation set in file order, as training sequences of the epoch's stage (official dataset_loss_val).

    Several processes take turns with whole batches, here and in prompt_batches.
    """
    stages = item_stages(data.n_steps, epoch, config)
    size = config.batch_size_training
    for start in processes.own(range(0, len(data), size)):
        chosen = range(start, min(start + size, len(data)))
        yield collate([training_sequence(data[i], int(stages[i]), config, tokenizer) for i in chosen], tokenizer.eos_id)


def count_batches(n_items: int, config: Config, n_processes: int = 1) -> int:
    """Micro-batches of an epoch over n_items."""
    return -(-n_items // (config.batch_size_training * n_processes))


def prompt_batches(
    data: TokenDataset, config: Config, tokenizer: Tokenizer, stage: int, processes: Processes = ALONE
) -> Iterator[tuple[list[int], Batch]]:
    """(item indices, prompts) of the whole set, prompts of like length together."""
    order = np.argsort(data.question_lengths, kind="stable")
    for start in processes.own(range(0, len(order), config.batch_size_eval)):
        chosen = order[start : start + config.batch_size_eval].tolist()
        yield chosen, collate([prompt_sequence(data[i], stage, config, tokenizer) for i in chosen], tokenizer.eos_id)


def own_parts(sequences: list[Sequence], processes: Processes, n_parts: int, pad_id: int) -> list[Batch]:
    """This process's rows of a micro-batch, in parts.

    Losses times shares, over the parts of all processes, add up to the mean over all labelled tokens. A process that is
    left without a row works on one that counts nothing, so that it takes the same steps as the others.
    """
    own = processes.own(sequences)
    weight = sum(s.n_labelled for s in own) / sum(s.n_labelled for s in sequences)
    return [part._replace(share=part.share * weight) for part in in_parts(own or sequences[:1], n_parts, pad_id)]


def in_parts(sequences: list[Sequence], n_parts: int, pad_id: int) -> list[Batch]:
    """A micro-batch in up to n_parts batches, rows of like length together: less padding, and as much work in each.

    Their losses times their shares add up to the mean over the micro-batch's labelled tokens.
    """
    ordered = sorted(sequences, key=lambda s: len(s.ids))
    n_labelled = sum(s.n_labelled for s in ordered)
    bounds = _bounds([len(s.ids) for s in ordered], n_parts)
    return [
        collate(part, pad_id)._replace(share=sum(s.n_labelled for s in part) / n_labelled)
        for part in (ordered[start:end] for start, end in pairwise(bounds))
    ]


def _bounds(lengths: list[int], n_parts: int) -> list[int]:
    """Where to cut rows of rising length, [0, ..., number of rows], so that the largest part is as small as can be.

    A part is as large as its rows times its longest row.
    """
    longest = lengths[-1]
    sizes = range(longest, len(lengths) * longest + 1)
    return _cut(lengths, sizes[bisect_left(sizes, True, key=lambda size: len(_cut(lengths, size)) <= n_parts + 1)])


def _cut(lengths: list[int], size: int) -> list[int]:
    """Cut off parts of at most a size, from the longest rows down."""
    bounds = [len(lengths)]
    while bounds[0]:
        bounds.insert(0, max(0, bounds[0] - size // lengths[bounds[0] - 1]))
    return bounds


def collate(sequences: list[Sequence], pad_id: int, multiple: int = 8) -> Batch:
    """Lay sequences out as the official MyCollator does, lengths rounded up to `multiple` so that shapes repeat.

    Rows with latents are shifted right until their first latents stand in one column, others start in column 0.
    """
    lengths = np.array([len(s.ids) for s in sequences])
    n_latents = np.array([s.n_latents for s in sequences])
    starts = np.array([s.latent_start for s in sequences])
    first = _round_up(int(starts[n_latents > 0].max(initial=0)), multiple)
    shifts = np.where(n_latents > 0, first - starts, 0)
    ends = shifts + lengths
    length = _round_up(int(ends.max()), multiple)

    places = np.arange(length) - shifts[:, None]  # [B, T] each column's place in its row's sequence
    real = (places >= 0) & (places < lengths[:, None])
    ids = np.full(real.shape, pad_id, dtype=np.int32)
    ids[real] = np.concatenate([s.ids for s in sequences])
    labelled = real & (places >= np.array([[s.n_unlabelled] for s in sequences]))
    targets = ids[labelled]
    extra = _round_up(len(targets), LABELS_MULTIPLE) - len(targets)
    return Batch(
        ids=ids,
        positions=np.where(real, places, 0).astype(np.int32),
        real=real,
        latents=np.arange(n_latents.max()) < n_latents[:, None],
        first_latent=first if n_latents.any() else length,
        predict=np.pad(np.flatnonzero(labelled) - 1, (0, extra)).astype(np.int32),  # a token is predicted one before
        targets=np.pad(targets, (0, extra)),
        weights=np.pad(np.ones(len(targets), dtype=np.float32), (0, extra)),
        last=(ends - 1).astype(np.int32),
    )


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def longest(data: TokenDataset, config: Config) -> np.ndarray:
    """The most positions each example takes in any epoch of the run [n]; its prompts are never longer."""
    epochs = [config.resume] if config.only_eval else range(config.resume, config.num_epochs)
    scheduled = {config.stage(epoch) for epoch in epochs}
    steps = range(int(data.n_steps.max()) + 1)
    drawn = set(steps) if config.uniform_prob else set()
    lengths = np.zeros(len(data), dtype=np.int64)
    for stage in scheduled | drawn:
        table = np.array([training_counts(stage, n_steps, config) for n_steps in steps])
        dropped, n_latents = table[data.n_steps].T
        reached = (stage in scheduled) | (data.n_steps >= stage)  # a drawn stage is one of 0..number of steps
        lengths = np.maximum(lengths, np.where(reached, data.lengths_from(dropped) + n_latents, 0))
    return data.question_lengths + lengths + 2 * config.coconut


def too_long(data: TokenDataset, config: Config, n_positions: int, path: str) -> np.ndarray:
    """Indices of the examples that take more positions than the model has.

    Raises UserError where there are some and the config does not say drop_too_long, or where no other is left.
    """
    lengths = longest(data, config)
    found = np.flatnonzero(lengths > n_positions)
    if not len(found):
        return found
    shown = _listed([f"{i} ({lengths[i]:,} tokens)" for i in found[: SHOWN + 1]])
    fact = f"{len(found):,} of {len(data):,} items are longer than the model's {n_positions:,} positions: {shown}"
    if not config.drop_too_long:
        raise UserError(f"{path}: {fact}. `drop_too_long: True` leaves them out, in training and in evaluation")
    if len(found) == len(data):
        raise UserError(f"{path}: {fact}; none would be left")
    left = f"{len(data) - len(found):,}"
    warn(f"{path}: LEFT OUT, because too long: {fact}. What is said of this set is about the other {left}")
    return found


def _listed(items) -> str:
    """Up to ten items, as "items 3, 5, ..."."""
    more = ", ..." if len(items) > SHOWN else ""
    return f"item{'s' * (len(items) > 1)} {', '.join(map(str, items[:SHOWN]))}{more}"


def describe_batch(parts: list[Batch], tokenizer: Tokenizer) -> str:
    """Every token of a micro-batch with its id and label, one a line (the official data_table)."""
    return "\n".join(line for batch in parts for line in _described(batch, tokenizer)) + "\n"


def _described(batch: Batch, tokenizer: Tokenizer) -> list[str]:
    labels = np.full(batch.ids.size, -100)
    labelled = batch.weights > 0
    labels[batch.predict[labelled] + 1] = batch.targets[labelled]
    lines = []
    for ids, row_labels in zip(batch.ids, labels.reshape(batch.ids.shape), strict=True):
        lines += [
            f"{i} {label} {tokenizer.spell(i)!r}" for i, label in zip(ids.tolist(), row_labels.tolist(), strict=True)
        ]
        lines.append("=" * 40)
    return lines
