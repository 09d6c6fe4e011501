"""Answer questions with other thoughts than the model's own: how many, and which.

A condition is a function (item numbers [B], place k from 0, thoughts [B, D]) -> thoughts [B, D] that stands between the
model and what is fed back. The thought loop itself (coconut.py) is unchanged.
"""

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from analysis.probing import BATCH, Probe
from coconut import Coconut
from dataset import Data, collate
from training.evaluation import read_answer, wilson
from utils import Progress

Change = Callable[[np.ndarray, int, mx.array], mx.array]


class Changed:
    """A language model whose first n_thoughts passes end in a changed hidden state; the loop feeds that one back."""

    def __init__(self, transformer, n_thoughts: int, change: Callable[[int, mx.array], mx.array]):
        self._transformer, self._n_thoughts, self._change, self._passes = transformer, n_thoughts, change, 0

    def __getattr__(self, name: str):
        return getattr(self._transformer, name)

    def __call__(self, embeddings: mx.array, cache: list, first: int = 0) -> mx.array:
        hidden = self._transformer(embeddings, cache, first)  # [B, T - first, D]
        k, self._passes = self._passes, self._passes + 1
        if k >= self._n_thoughts:
            return hidden
        return mx.concatenate([hidden[:, :-1], self._change(k, hidden[:, -1])[:, None]], axis=1)


class Answers(NamedTuple):
    """What a model answered to some items under one condition."""

    texts: list[str]  # what it wrote, in the order of the items
    correct: np.ndarray  # [n] bool

    @property
    def answers(self) -> list[str]:
        return [read_answer(text) for text in self.texts]

    def accuracy(self) -> str:
        """The share of right answers with its 95 % interval."""
        low, high = wilson(int(self.correct.sum()), len(self.correct))
        return f"{self.correct.mean():.3f} ({low:.3f} to {high:.3f})"


def answer(probe: Probe, data: Data, count: int, n_thoughts: int, change: Change | None = None) -> Answers:
    """Answer the first `count` items greedily after exactly n_thoughts thoughts, changed by `change`."""
    curriculum, texts = probe.curriculum, []
    starts = Progress(range(0, count, BATCH), desc=f"Answers, {n_thoughts} thoughts", unit=" batches", leave=False)
    for start in starts:
        items = np.arange(start, min(start + BATCH, count))
        prompts = [curriculum.prompt(data.tokens[i], n_thoughts) for i in items]
        if change:  # a pause is an ordinary token; to change it, the loop has to fill its place
            prompts = [prompt._replace(n_latents=n_thoughts) for prompt in prompts]
        batch = collate(prompts, curriculum.tokenizer.eos_id).to_mlx()
        model = Coconut(_between(probe.model.transformer, n_thoughts, items, change)) if change else probe.model
        outputs = model.generate(batch, curriculum.config.answer_limit, curriculum.tokenizer.eos_id)
        texts += [curriculum.tokenizer.decode(ids) for ids in outputs]
    expected = [read_answer(example.answer) for example in data.examples[:count]]
    correct = np.array([read_answer(text) == right for text, right in zip(texts, expected, strict=True)])
    return Answers(texts, correct)


def _between(transformer, n_thoughts: int, items: np.ndarray, change: Change) -> Changed:
    return Changed(transformer, n_thoughts, lambda k, thought: change(items, k, thought))


def records(data: Data, found: dict, label: str) -> Iterator[dict]:
    """One record for each {condition: Answers} and item; label: the name under which the condition is recorded."""
    for condition, a in found.items():
        for index, text, said, right in zip(data.indices, a.texts, a.answers, a.correct, strict=False):
            yield {"idx": int(index), label: condition, "text": text, "answer": said, "correct": bool(right)}


def mcnemar(one: np.ndarray, other: np.ndarray) -> float:
    """Exact two-sided McNemar p of two conditions on the same items; one, other [n] bool: right or wrong."""
    only_one, only_other = int((one & ~other).sum()), int((other & ~one).sum())
    n = only_one + only_other
    tail = sum(math.comb(n, i) for i in range(min(only_one, only_other) + 1)) / 2**n
    return min(1.0, 2 * tail)
