"""Validation loss, greedy answers and their scores (official run.py, its loops over the validation set)."""

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import islice

import mlx.core as mx
import numpy as np

from coconut import Batch, Coconut
from dataset import Curriculum, Data, count_batches, loss_batches, prompt_batches
from parallel.distributed import ALONE, Group
from parallel.streams import map_streams, n_streams, on_gpu
from text.reader import Example
from utils import Progress

SHOWN = 60  # characters of a text among the samples


def wilson(count: int, n: int) -> tuple[float, float]:
    """95 % confidence interval of a share of `count` among n (Wilson)."""
    p, z = count / n, 1.959964
    center = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return max(0.0, center - half), min(1.0, center + half)


@dataclass(frozen=True)
class Evaluation:
    """The judged answers of a whole set, in file order, and the time that took."""

    predictions: list[dict]
    n_latents: list[int]  # latent places of each prompt
    latents: str  # what they are called
    seconds: float

    @property
    def n_correct(self) -> int:
        return sum(p["correct"] for p in self.predictions)

    @property
    def accuracy(self) -> float:
        return self.n_correct / len(self.predictions)

    @property
    def cot_match(self) -> float:
        return sum(p["cot_match"] for p in self.predictions) / len(self.predictions)

    @property
    def mean_tokens(self) -> float:
        """Tokens generated per answer, latents included and pauses not, as the paper counts them."""
        return sum(p["n_tokens"] for p in self.predictions) / len(self.predictions)

    @property
    def seconds_per_example(self) -> float:
        return self.seconds / len(self.predictions)

    def summary(self) -> str:
        """The result in one line."""
        low, high = self.interval()
        fewest, most = min(self.n_latents), max(self.n_latents)
        count = f"{most}" if fewest == most else f"{fewest} to {most}"
        return (
            f"accuracy {self.n_correct}/{len(self.predictions)} = {self.accuracy:.3f} (95 % interval {low:.3f} to "
            f"{high:.3f}), CoT match {self.cot_match:.3f}, {self.latents} {count}, {self.mean_tokens:.1f} tokens and "
            f"{self.seconds_per_example:.3f} s per example"
        )

    def samples(self, count: int = 5) -> list[str]:
        """The first answers, one a line (the official code prints five)."""
        lines = []
        for p in self.predictions[:count]:
            verdict = "right" if p["correct"] else f"expected {_short(p['expected_answer'])!r}"
            chain = f"wrote {_short(p['cot'])!r}, " if p["cot"] else ""
            lines.append(f"  {_short(p['question'])}: {chain}answered {_short(p['answer'])!r} ({verdict})")
        return lines

    def interval(self) -> tuple[float, float]:
        """95 % confidence interval of the accuracy."""
        return wilson(self.n_correct, len(self.predictions))


class Evaluator:
    """Evaluates a model on a validation set; each rank works on some of the batches, the results are the same on all.

    checked: wraps an iterable and may raise Stopped between two of its items (StopSignals.checked).
    """

    def __init__(
        self, model: Coconut, data: Data, curriculum: Curriculum, group: Group = ALONE, checked: Callable = iter
    ):
        self.model, self.data, self.curriculum, self.group, self.checked = model, data, curriculum, group, checked
        self.config, self.tokenizer = curriculum.config, curriculum.tokenizer

    def loss(self, epoch: int) -> float:
        """Cross-entropy per labeled token at the epoch's stage (the official code averages the batches' means)."""
        self.model.eval()
        total = count = 0.0
        n_own = len(self.group.shard(range(count_batches(len(self.data), self.config))))
        batches = self.checked(loss_batches(self.data.tokens, self.curriculum, epoch, self.group))
        batches = iter(Progress(batches, total=n_own, desc="Validation loss", unit=" batches", leave=False))
        while together := list(islice(batches, n_streams())):
            losses = map_streams(lambda batch: self.model(batch.to_mlx()), together)
            mx.eval(losses)
            for batch, loss in zip(together, losses, strict=True):
                n_labeled = float(batch.label_mask.sum())
                total += loss.item() * n_labeled
                count += n_labeled
        total, count = self.group.all_gather(np.array([total, count])).sum(axis=0).tolist()
        return total / count

    def answers(self, stage: int) -> Evaluation:
        """Answer every item greedily with the stage's thoughts, and score the answers."""
        self.model.eval()
        start = time.perf_counter()
        limit = self.config.answer_limit
        found = np.concatenate(
            [np.empty((0, 2 + limit), np.int32), *self._decode(self.checked(self._prompts(stage)), limit)]
        )
        rows = np.concatenate(self.group.all_gather_ragged(found))  # [n, 2 + limit]: index, thoughts, ids, then -1
        rows = rows[np.argsort(rows[:, 0])].tolist()
        predictions = [
            score(int(self.data.indices[i]), self.data.examples[i], [t for t in ids if t >= 0], n, self.curriculum)
            for i, n, *ids in rows
        ]
        n_latents = [self.curriculum.n_prompt_latents(stage, n) for n in self.data.tokens.n_steps.tolist()]
        return Evaluation(predictions, n_latents, self.config.method.latents, time.perf_counter() - start)

    def _prompts(self, stage: int) -> Iterable[tuple[list[int], Batch]]:
        return prompt_batches(self.data.tokens, self.curriculum, stage, self.group)

    def _decode(self, batches: Iterable[tuple[list[int], Batch]], limit: int) -> Iterable[np.ndarray]:
        """For each batch its rows of `answers`, [b, 2 + limit] int32."""
        size = self.config.batch_size_eval
        own = self.group.shard(range(0, len(self.data), size))
        n_own = sum(min(size, len(self.data) - first) for first in own)
        n_correct = n_done = 0
        with Progress(total=n_own, desc="Answers", unit=" items", leave=False) as bar:
            for indices, batch in batches:
                outputs = self.model.generate(batch.to_mlx(), limit, self.tokenizer.eos_id)
                if not on_gpu():  # which has a limit for freed buffers
                    mx.clear_cache()
                rows = np.full((len(indices), 2 + limit), -1, np.int32)
                rows[:, 0], rows[:, 1] = indices, batch.latent_mask.sum(axis=1)
                for row, index, ids in zip(rows, indices, outputs, strict=True):
                    row[2 : 2 + len(ids)] = ids
                    n_correct += is_correct(self.tokenizer.decode(ids), self.data.examples[index])
                yield rows
                n_done += len(indices)
                bar.set_postfix(accuracy=f"{n_correct / n_done:.3f}", refresh=False)
                bar.update(len(indices))


def score(index: int, example: Example, ids: list[int], n_latents: int, curriculum: Curriculum) -> dict:
    """Compare one answer with its reference: the record of predictions_*.jsonl.

    It is read from the generated tokens alone; the official code reads the whole text, question and latent tokens
    included, so that its chain of thought never matches for coconut.
    """
    text = curriculum.tokenizer.decode(ids)
    cot, expected_cot = text.split("#")[0].strip(), curriculum.layout.separator.join(example.steps).strip()
    return {
        "idx": index,
        "question": example.question,
        "expected_answer": read_answer(example.answer),
        "answer": read_answer(text),
        "correct": is_correct(text, example),
        "cot": cot,
        "cot_match": cot == expected_cot,
        "output_ids": ids,
        "n_tokens": len(ids) + n_latents,
    }


def _short(text: str) -> str:
    """A text in one line of at most SHOWN characters."""
    text = " ".join(text.split())
    return text if len(text) <= SHOWN else text[: SHOWN - 3] + "..."


def is_correct(text: str, example: Example) -> bool:
    """Whether a generated text ends in the example's answer."""
    return read_answer(text) == read_answer(example.answer)


def read_answer(text: str) -> str:
    """What stands behind the last `#`, without commas and surrounding space (official run.py)."""
    return text.split("#")[-1].replace(",", "").strip()
