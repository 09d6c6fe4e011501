"""Validation loss, greedy answers and how they are judged (official run.py, its loops over the validation set)."""

import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice

import cpu_blas  # noqa: F401  must come before mlx
import mlx.core as mx

from coconut import Batch, Coconut
from config import Config
from examples import Example
from processes import ALONE, Processes
from streams import spread, streams
from tokenizer import Tokenizer
from utils import Progress


@dataclass(frozen=True)
class Evaluation:
    """The judged answers of a whole set, in file order, and the time they took."""

    predictions: list[dict]
    n_latents: list[int]
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
        """Tokens generated per answer, latents included, as the paper counts them."""
        return sum(p["n_tokens"] for p in self.predictions) / len(self.predictions)

    @property
    def seconds_per_example(self) -> float:
        return self.seconds / len(self.predictions)

    def summary(self) -> str:
        """The result in one line."""
        low, high = self.interval()
        fewest, most = min(self.n_latents), max(self.n_latents)
        latents = f"{most}" if fewest == most else f"{fewest} to {most}"
        return (
            f"accuracy {self.n_correct}/{len(self.predictions)} = {self.accuracy:.3f} (95 % interval {low:.3f} to "
            f"{high:.3f}), CoT match {self.cot_match:.3f}, latents {latents}, {self.mean_tokens:.1f} tokens and "
            f"{self.seconds_per_example:.3f} s per example"
        )

    def interval(self) -> tuple[float, float]:
        """95 % confidence interval of the accuracy (Wilson)."""
        n, p, z = len(self.predictions), self.accuracy, 1.959964
        centre = (p + z * z / (2 * n)) / (1 + z * z / n)
        half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
        return max(0.0, centre - half), min(1.0, centre + half)


def validation_loss(model: Coconut, batches: Iterable[Batch], n_batches: int, processes: Processes = ALONE) -> float:
    """Cross-entropy per labelled token over all batches (the official code averages the batches' means).

    Several processes have some of the n_batches each; the result is the same in all of them.
    """
    model.eval()
    total = count = 0.0
    n_own = len(processes.own(range(n_batches)))
    batches = iter(Progress(batches, total=n_own, desc="Validation loss", unit=" batches", leave=False))
    while together := list(islice(batches, len(streams()))):
        losses = spread(lambda batch: model(batch.to_mlx()), together)
        mx.eval(losses)
        for batch, loss in zip(together, losses, strict=True):
            n_labelled = float(batch.weights.sum())
            total += loss.item() * n_labelled
            count += n_labelled
    total, count = map(sum, zip(*processes.gather((total, count)), strict=True))
    return total / count


def evaluate(
    model: Coconut,
    examples: list[Example],
    places: Sequence[int],
    batches: Iterable[tuple[list[int], Batch]],
    config: Config,
    tokenizer: Tokenizer,
    processes: Processes = ALONE,
) -> Evaluation:
    """Answer every example greedily and judge it.

    places: each example's index in its file; batches: (indices into examples, their prompts), of which several
    processes have some each. The result is that of the whole set, in all of them.
    """
    model.eval()
    judged: dict[int, dict] = {}
    latents: dict[int, int] = {}
    n_correct, start = 0, time.perf_counter()
    own = processes.own(range(0, len(examples), config.batch_size_eval))
    n_own = sum(min(config.batch_size_eval, len(examples) - start) for start in own)
    with Progress(total=n_own, desc="Answers", unit=" items", leave=False) as bar:
        for indices, batch in batches:
            outputs = model.generate(batch.to_mlx(), config.answer_limit, tokenizer.eos_id)
            for index, ids, n_latents in zip(indices, outputs, batch.latents.sum(axis=1).tolist(), strict=True):
                judged[index] = judge(int(places[index]), examples[index], ids, n_latents, tokenizer)
                latents[index] = n_latents
                n_correct += judged[index]["correct"]
            mx.clear_cache()
            bar.set_postfix(accuracy=f"{n_correct / len(judged):.3f}", refresh=False)
            bar.update(len(indices))
    for others_judged, others_latents in processes.gather((judged, latents)):
        judged |= others_judged
        latents |= others_latents
    order = sorted(judged)
    return Evaluation([judged[i] for i in order], [latents[i] for i in order], time.perf_counter() - start)


def judge(index: int, example: Example, ids: list[int], n_latents: int, tokenizer: Tokenizer) -> dict:
    """Compare one answer with its reference: the record of predictions_*.jsonl.

    Read from the generated tokens alone; the official code reads the whole text, question and latent markers included,
    so that its chain of thought never matches for coconut.
    """
    text = tokenizer.decode(ids)
    answer, expected = read_answer(text), read_answer(example.answer)
    cot, expected_cot = text.split("#")[0].strip(), "\n".join(example.steps).strip()
    return {
        "idx": index,
        "question": example.question,
        "expected_answer": expected,
        "answer": answer,
        "correct": answer == expected,
        "cot": cot,
        "cot_match": cot == expected_cot,
        "output_ids": ids,
        "n_tokens": len(ids) + n_latents,
    }


def read_answer(text: str) -> str:
    """What stands behind the last `#`, without commas and surrounding space (official run.py)."""
    return text.split("#")[-1].replace(",", "").strip()
