"""Examples -> curriculum -> token sequences -> batches (official dataset.py). All arrays here are numpy's.

class Curriculum is the method's side of it: a function from (example, stage) to a token sequence. The functions below
it shuffle, split and pad those sequences.
"""

import math
from bisect import bisect_right
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np

from coconut import Batch
from config import Config
from parallel.distributed import ALONE, Group
from parallel.streams import chunk_bounds, n_streams, on_gpu
from text.reader import SHOWN, Example, open_source, warn_of_marked_steps
from text.tokenizer import Tokenizer
from text.tokens import LAYOUTS, TokenDataset, TokenExample, tokenize, tokenize_cached
from utils import UserError, warn

MOST_EXTRA_TOKENS = 100  # of iCoT's random extra removal
EVERYTHING = 2**31 - 1  # as a number of tokens: more than any chain has
# Columns and labeled tokens of a batch, and the columns that are read at its end, are rounded up to multiples: (on a
# CPU, on a GPU). A GPU keeps compiled functions, buffers and graphs for each shape: ProsQA has 11 to 24 in an epoch so,
# not 147. A CPU would only compute more padding: 56 columns of the graphs' 47.
COLUMNS_MULTIPLE = (1, 32)
LABELS_MULTIPLE = (1, 512)
READ_MULTIPLE = (1, 256)


class TrainingSequence(NamedTuple):
    """One row of a batch before padding; its latents follow the first `latent_start` ids."""

    ids: np.ndarray  # [length] int32
    latent_start: int
    n_latents: int
    n_unlabeled: int  # question, special tokens and latents

    @property
    def n_labeled(self) -> int:
        """Tokens that count in the loss."""
        return len(self.ids) - self.n_unlabeled


class Curriculum:
    """What the model is shown at each stage (section 3 of the paper; official dataset.py)."""

    def __init__(self, config: Config, tokenizer: Tokenizer):
        self.config, self.method, self.tokenizer = config, config.method, tokenizer
        self.layout = LAYOUTS[config.layout]
        self.last_removal = config.remove_all_from or EVERYTHING  # tokens due from which nothing of a chain is left
        self.thoughts_per_step = config.c_thought if self.method.thinks else 0  # official run.py: 0 for no_thoughts
        self.special_tokens = self.method.special_tokens and self.layout.special_tokens

    def limit_removal(self, data: TokenDataset) -> None:
        """Let the removal of single tokens end where the longest chain of the training data is gone."""
        self.last_removal = min(self.last_removal, int(data.chain_lengths.max()))

    def stage(self, epoch: int) -> int:
        """The scheduled stage of an epoch, counted from 0 (official run.py: always 0 for cot and no_cot).

        Where the chain goes away by tokens (iCoT) it is the number of tokens due at the epoch's end.
        """
        if self.method.drops_steps == "by token":
            return min(math.ceil(self.config.tokens_per_epoch * (epoch + 1)) - 1, self.last_removal)
        if self.method.drops_steps == "by stage":
            return epoch // self.config.epochs_per_stage
        return self._last_stage if self.method.drops_steps == "at once" and self.method.thinks else 0

    def step_stage(self, epoch: int, step: int, steps_per_epoch: int) -> int:
        """The stage of one optimizer step: its epoch's, or the number of tokens due at it (arXiv 2405.14838, 3)."""
        if self.method.drops_steps == "by token":
            place = epoch * steps_per_epoch + step
            return min(math.floor(self.config.tokens_per_epoch * place / steps_per_epoch), self.last_removal)
        return self.stage(epoch)

    def training_stages(self, data: TokenDataset, order: np.ndarray, epoch: int, items_per_step: int) -> np.ndarray:
        """Each item's stage [n] in an epoch whose items come in `order`, items_per_step of them in each step.

        Where the chain goes away by tokens, every item loses those that are due at its step and a random number more.
        """
        if self.method.drops_steps != "by token":
            return self.item_stages(data.n_steps, epoch)[order]
        steps_per_epoch = -(-len(order) // items_per_step)
        due = np.array([self.step_stage(epoch, step, steps_per_epoch) for step in range(steps_per_epoch)])
        due = np.repeat(due, items_per_step)[: len(order)]  # [n]
        extra = np.zeros(len(order), dtype=np.int64)
        if self.config.removal_smoothing is not None:
            rng = np.random.default_rng((self.config.seed, epoch, 2))
            stops = 1 - math.exp(-self.config.removal_smoothing)  # P(o) = stops * (1 - stops)^o
            extra = np.minimum(rng.geometric(stops, len(order)) - 1, MOST_EXTRA_TOKENS)
        return np.where(due < self.last_removal, due + extra, EVERYTHING)

    def item_stages(self, n_steps: np.ndarray, epoch: int) -> np.ndarray:
        """Each item's stage in an epoch [n]: the scheduled one, or with uniform_prob one of 0..its number of steps."""
        rng = np.random.default_rng((self.config.seed, epoch, 1))
        drawn = rng.random(len(n_steps)) < self.config.uniform_prob
        stage = self.stage(epoch)
        if self.method.drops_steps == "by token" and stage == self.last_removal:
            stage = EVERYTHING
        return np.where(drawn, rng.integers(0, n_steps + 1), stage)

    def training_counts(self, stage: int, n_steps: int) -> tuple[int, int]:
        """(steps dropped, latents put in) of one training item (official get_cot_latent_dataset).

        At stage s <= max_latent_stage, min(s, n_steps) steps are dropped and s * c_thought thoughts put in, also where
        the item has fewer steps and whatever pad_latent_to_max says: official. Later all steps are dropped. For prompts
        see n_prompt_latents.
        """
        if self.method.drops_steps == "by token":
            return 0, 0
        if stage >= self._last_stage or self.method.drops_steps == "at once":
            return n_steps, self._most_replaced(n_steps) * self.thoughts_per_step
        return min(stage, n_steps), stage * self.thoughts_per_step

    def n_prompt_latents(self, stage: int, n_steps: int) -> int:
        """Latents of an evaluation prompt (official get_question_latent_dataset)."""
        return min(stage, self._most_replaced(n_steps)) * self.thoughts_per_step

    def training(self, example: TokenExample, stage: int) -> TrainingSequence:
        """Question, thoughts, remaining steps and answer; labels begin behind the thoughts."""
        n_dropped, n_latents = self.training_counts(stage, len(example.steps))
        steps = example.steps[n_dropped:]
        if self.method.drops_steps == "by token":
            chain = np.concatenate([example.answer[:0], *steps])
            steps = [chain[stage:]]
        return self._sequence(example, n_latents, [*steps, example.answer])

    def prompt(self, example: TokenExample, n_latents: int) -> TrainingSequence:
        """Question and exactly n_latents thoughts; nothing is labeled."""
        return self._sequence(example, n_latents, [])

    def longest(self, data: TokenDataset) -> np.ndarray:
        """The most positions that each example takes in any epoch of the run [n]; its prompts are never longer."""
        config = self.config
        step_counts = range(int(data.n_steps.max()) + 1)
        scheduled = self._distinct_stages(step_counts[-1])
        drawn = set(step_counts) if config.uniform_prob else set()
        lengths = np.zeros(len(data), dtype=np.int64)
        for stage in scheduled | drawn:
            table = np.array([self.training_counts(stage, n_steps) for n_steps in step_counts])  # [steps + 1, 2]
            n_dropped, n_latents = table[data.n_steps].T
            reached = (stage in scheduled) | (data.n_steps >= stage)  # a drawn stage is one of 0..number of steps
            lengths = np.maximum(lengths, np.where(reached, data.lengths_from(n_dropped) + n_latents, 0))
        return data.question_lengths + lengths + len(self._thoughts(0))

    def spans(self, epochs: range, most_steps: int) -> Iterator[range]:
        """Consecutive epochs that train alike: those of one stage, and all of the stages that no longer differ.

        Where the chain goes away by tokens: those before, and those after the whole chain is gone. Bisection, because a
        run may have millions of epochs.
        """
        alike = self._last_stage if self.thoughts_per_step else min(self._last_stage, most_steps)  # from it on

        def likeness(epoch: int) -> int:  # it never falls
            if self.method.drops_steps == "by token":
                return self.step_stage(epoch, 0, 1) == self.last_removal
            return min(self.stage(epoch), alike)

        while epochs:
            end = bisect_right(epochs, likeness(epochs[0]), key=likeness)
            yield epochs[:end]
            epochs = epochs[end:]

    @property
    def _last_stage(self) -> int:
        """The first stage without written steps."""
        return self.config.max_latent_stage + 1

    def _distinct_stages(self, most_steps: int) -> set[int]:
        """Stages of the run, without those whose items are as long as, or shorter than, another's.

        All stages past max_latent_stage are alike, and of those with no step left the last has the most latents. So a
        run of millions of epochs costs no more than a short one.
        """
        config, past = self.config, self.config.max_latent_stage + 1
        first, last = (
            min(self.stage(epoch), past)
            for epoch in (config.resume, config.resume if config.only_eval else config.num_epochs - 1)
        )
        return {*range(first, min(last, most_steps) + 1), last, max(first, min(last, config.max_latent_stage))}

    def _most_replaced(self, n_steps: int) -> int:
        """Steps of an item that thoughts stand for in the last stages."""
        most = self.config.max_latent_stage
        return most if self.config.pad_latent_to_max else min(n_steps, most)

    def _thoughts(self, n_latents: int) -> np.ndarray:
        """The latents, between start and end token where method and layout have special tokens."""
        tokens = self.tokenizer
        ids = [tokens.latent_id] * n_latents
        return np.array([tokens.start_id, *ids, tokens.end_id] if self.special_tokens else ids, dtype=np.int32)

    def _sequence(self, example: TokenExample, n_latents: int, labeled: list[np.ndarray]) -> TrainingSequence:
        """Pauses are ordinary tokens: the row of `<|latent|>` is their learned vector, and nothing is fed back."""
        thoughts = self._thoughts(n_latents)
        ids = np.concatenate([example.question, thoughts, *labeled])
        n_fed_back = n_latents if self.method.thought == "hidden" else 0
        n_unlabeled = len(example.question) + len(thoughts)
        return TrainingSequence(ids, len(example.question) + self.special_tokens, n_fed_back, n_unlabeled)


class Data:
    """A data set as tokens and, for evaluation, as text, checked against the model's number of positions.

    path: the config's train_path or val_path (see text/reader.py); n_positions: the model's; debug_limit: the most
    examples where `debug` is set; keep_texts: whether `examples` is filled beside `tokens`. Texts cost 1 GB on GSM8K's
    training set and reading them 5 s, so training goes without, from the token cache. Raises UserError for anything
    wrong with the data.
    """

    def __init__(self, path: str, curriculum: Curriculum, n_positions: int, debug_limit: int, keep_texts: bool = True):
        config, tokenizer = curriculum.config, curriculum.tokenizer
        self.path = path
        self.examples: list[Example] = []
        source = open_source(path)
        if keep_texts or config.debug:
            self.examples = source.examples(debug_limit if config.debug else None)
            self.tokens = tokenize(self.examples, tokenizer, Path(path).name, config.layout)
        else:
            self.tokens = tokenize_cached(source, tokenizer, config.token_cache, config.layout)
        if keep_texts:  # of the validation set, whose chains are compared
            warn_of_marked_steps(path, self.examples)
        self.indices = np.arange(len(self.tokens))  # [n] each example's index in the file
        self._leave_out(too_long(self.tokens, curriculum, n_positions, path))

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
    shared = valid.indices[valid.tokens.shared_questions(train.tokens)]
    if len(shared):
        warn(
            f"{valid.path}: {len(shared):,} of {len(valid):,} questions are in {train.path} too ({_listed(shared)}): "
            "accuracy on them may be memory and not reasoning"
        )


def too_long(data: TokenDataset, curriculum: Curriculum, n_positions: int, path: str) -> np.ndarray:
    """Indices of the examples that take more positions than the model has.

    Raises UserError where there are some and the config does not say drop_too_long, or where no other is left.
    """
    lengths = curriculum.longest(data)
    found = np.flatnonzero(lengths > n_positions)
    if not len(found):
        return found
    shown = _listed([f"{i} ({lengths[i]:,} tokens)" for i in found[: SHOWN + 1]])
    fact = f"{len(found):,} of {len(data):,} items are longer than the model's {n_positions:,} positions: {shown}"
    if not curriculum.config.drop_too_long:
        raise UserError(f"{path}: {fact}. `drop_too_long: True` leaves them out, in training and in evaluation")
    if len(found) == len(data):
        raise UserError(f"{path}: {fact}; none would be left")
    left = f"{len(data) - len(found):,}"
    warn(f"{path}: LEFT OUT, because too long: {fact}. All results on this set are about the other {left}")
    return found


def _listed(items) -> str:
    """Up to ten items, as "items 3, 5, ..."."""
    more = ", ..." if len(items) > SHOWN else ""
    return f"item{'s' * (len(items) > 1)} {', '.join(map(str, items[:SHOWN]))}{more}"


class Chunk(NamedTuple):
    """A part of a micro-batch. Losses times loss_weight add up to the mean over the micro-batch's labeled tokens."""

    batch: Batch
    loss_weight: float


def training_steps(
    data: TokenDataset,
    curriculum: Curriculum,
    epoch: int,
    group: Group = ALONE,
    skip: int = 0,
    n_rows: int | None = None,
) -> Iterator[list[list[Chunk]]]:
    """This rank's optimizer steps of the epoch, the first `skip` left out: for each the chunks of its micro-batches.

    The order is a function of seed and epoch alone. All ranks together work on micro-batches of world_size *
    batch_size_training items, gradient_accumulation_steps of them a step; the last step of an epoch may be smaller.
    n_rows: of a micro-batch on a GPU, which cuts the same step otherwise; None: batch_size_training.
    """
    config, pad_id = curriculum.config, curriculum.tokenizer.eos_id
    order = np.random.default_rng((config.seed, epoch)).permutation(len(data))
    size = config.batch_size_training * group.world_size
    step_size = size * config.gradient_accumulation_steps
    stages = curriculum.training_stages(data, order, epoch, step_size)
    for start in range(skip * step_size, len(order), step_size):
        chosen = range(start, min(start + step_size, len(order)))
        rows = [curriculum.training(data[order[i]], int(stages[i])) for i in chosen]
        micro_batches = [rows[i : i + size] for i in range(0, len(rows), size)]
        if on_gpu():
            yield alike_micro_batches(micro_batches, group, pad_id, n_rows or config.batch_size_training)
        else:
            yield [micro_batch(part, group, pad_id) for part in micro_batches]


def count_batches(n_items: int, config: Config, group: Group = ALONE) -> int:
    """Micro-batches of an epoch over n_items."""
    return -(-n_items // (config.batch_size_training * group.world_size))


def loss_batches(data: TokenDataset, curriculum: Curriculum, epoch: int, group: Group = ALONE) -> Iterator[Batch]:
    """The validation set in file order, as training sequences of the epoch's stage (official dataset_loss_val).

    Every rank has whole batches of its own, here and in prompt_batches.
    """
    stages = curriculum.item_stages(data.n_steps, epoch)
    size = curriculum.config.batch_size_training
    for start in group.shard(range(0, len(data), size)):
        chosen = range(start, min(start + size, len(data)))
        sequences = [curriculum.training(data[i], int(stages[i])) for i in chosen]
        yield collate(sequences, curriculum.tokenizer.eos_id)


def prompt_batches(
    data: TokenDataset, curriculum: Curriculum, stage: int, group: Group = ALONE
) -> Iterator[tuple[list[int], Batch]]:
    """(item indices, prompts) of the whole set, prompts of like length together."""
    order = np.argsort(data.question_lengths, kind="stable")
    size = curriculum.config.batch_size_eval
    for start in group.shard(range(0, len(order), size)):
        chosen = order[start : start + size].tolist()
        n_latents = [curriculum.n_prompt_latents(stage, int(data.n_steps[i])) for i in chosen]
        prompts = [curriculum.prompt(data[i], n) for i, n in zip(chosen, n_latents, strict=True)]
        yield chosen, collate(prompts, curriculum.tokenizer.eos_id)


def micro_batch(sequences: list[TrainingSequence], group: Group, pad_id: int) -> list[Chunk]:
    """This rank's rows of a micro-batch, in a chunk for each CPU stream.

    A rank without a row gets one that counts nothing, so that it takes the same steps as the others.
    """
    own = group.shard(sequences)
    weight = sum(s.n_labeled for s in own) / sum(s.n_labeled for s in sequences)
    return [
        chunk._replace(loss_weight=chunk.loss_weight * weight)
        for chunk in chunks(own or sequences[:1], n_streams(), pad_id)
    ]


def alike_micro_batches(
    step: list[list[TrainingSequence]], group: Group, pad_id: int, n_rows: int
) -> list[list[Chunk]]:
    """This rank's rows of an optimizer step in micro-batches of up to n_rows, rows of like length together (for GPUs).

    On ProsQA it saves a sixth of the columns, which were padding. The step is the same up to rounding, because every
    label keeps the weight that it has in its own micro-batch.
    """
    own = [(row, 1 / sum(s.n_labeled for s in rows)) for rows in step for row in group.shard(rows)]
    own.sort(key=lambda pair: (pair[0].latent_start if pair[0].n_latents else 0, len(pair[0].ids)))
    n_parts = max(1, -(-len(own) // n_rows))
    bounds = [len(own) * k // n_parts for k in range(n_parts + 1)]
    parts = [own[start:end] or [(step[0][0], 0.0)] for start, end in pairwise(bounds)]
    return [[_weighted_chunk(part, pad_id)] for part in parts]


def _weighted_chunk(rows: list[tuple[TrainingSequence, float]], pad_id: int) -> Chunk:
    """One chunk of rows, each with the weight of one of its labels; weights of 0 count nothing."""
    batch = collate([row for row, _ in rows], pad_id)
    weights = np.repeat([weight for _, weight in rows], [row.n_labeled for row, _ in rows])
    total = float(weights.sum())
    if not total:
        return Chunk(batch, 0.0)
    label_mask = np.zeros_like(batch.label_mask)
    label_mask[: len(weights)] = weights
    return Chunk(batch._replace(label_mask=label_mask), total)


def chunks(sequences: list[TrainingSequence], n_chunks: int, pad_id: int) -> list[Chunk]:
    """Rows in up to n_chunks batches, rows of like length together: less padding, and as much work in each."""
    ordered = sorted(sequences, key=lambda s: len(s.ids))
    n_labeled = sum(s.n_labeled for s in ordered)
    bounds = chunk_bounds([len(s.ids) for s in ordered], n_chunks)
    parts = (ordered[start:end] for start, end in pairwise(bounds))
    return [Chunk(collate(part, pad_id), sum(s.n_labeled for s in part) / n_labeled) for part in parts]


def collate(sequences: list[TrainingSequence], pad_id: int, multiple: int | None = None) -> Batch:
    """Pad sequences as the official MyCollator does; lengths are rounded up to `multiple`, by default the device's.

    Rows with latents are shifted right until their first latents are in one column, others start in column 0.
    """
    multiple = multiple or COLUMNS_MULTIPLE[on_gpu()]
    lengths = np.array([len(s.ids) for s in sequences])
    n_latents = np.array([s.n_latents for s in sequences])
    starts = np.array([s.latent_start for s in sequences])
    first = _round_up(int(starts[n_latents > 0].max(initial=0)), multiple)
    left_padding = np.where(n_latents > 0, first - starts, 0)
    ends = left_padding + lengths
    length = _round_up(int(ends.max()), multiple)

    positions = np.arange(length) - left_padding[:, None]  # [B, T] each column's index in its row's sequence
    attention_mask = (positions >= 0) & (positions < lengths[:, None])
    input_ids = np.full(attention_mask.shape, pad_id, dtype=np.int32)
    input_ids[attention_mask] = np.concatenate([s.ids for s in sequences])
    labeled = attention_mask & (positions >= np.array([[s.n_unlabeled] for s in sequences]))
    labels = input_ids[labeled]
    extra = _round_up(len(labels), LABELS_MULTIPLE[on_gpu()]) - len(labels)
    places = np.flatnonzero(labeled) - 1  # one before the token
    first_latent = first if n_latents.any() else length
    first_read = min(first_latent - 1, int(np.min(places % length if len(places) else ends - 1)))
    if first_read < first_latent - 1:
        first_read = max(0, length - _round_up(length - first_read, READ_MULTIPLE[on_gpu()]))
    return Batch(
        input_ids=input_ids,
        attention_mask=attention_mask,
        left_padding=left_padding.astype(np.int32),
        latent_mask=np.arange(n_latents.max()) < n_latents[:, None],
        first_latent=first_latent,
        first_read=first_read,
        label_positions=np.pad(places, (0, extra), constant_values=first_read).astype(np.int32),
        labels=np.pad(labels, (0, extra)),
        label_mask=np.pad(np.ones(len(labels), dtype=np.float32), (0, extra)),
        last_column=(ends - 1).astype(np.int32),
    )


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def describe_batch(batches: list[Batch], tokenizer: Tokenizer) -> str:
    """Every token of some batches with its id and label, one a line (the official data_table)."""
    return "\n".join(line for batch in batches for line in _described(batch, tokenizer)) + "\n"


def _described(batch: Batch, tokenizer: Tokenizer) -> list[str]:
    labels = np.full(batch.input_ids.size, -100)
    counted = batch.label_mask > 0
    labels[batch.label_positions[counted] + 1] = batch.labels[counted]
    lines = []
    for ids, row_labels in zip(batch.input_ids, labels.reshape(batch.input_ids.shape), strict=True):
        pairs = zip(ids.tolist(), row_labels.tolist(), strict=True)
        lines += [f"{i} {label} {tokenizer.spell(i)!r}" for i, label in pairs]
        lines.append("=" * 40)
    return lines
