"""The conditions of analysis.controls: what may stand in the place of a model's own thoughts, one function each.

Each condition is a function (clean, item numbers [B], place k from 0, thoughts h [B, D]) -> thoughts [B, D]. In the
formulas mu_t is the mean over items at a place, mu_i the mean over an item's places, mu the mean over all, s(h) the
standard deviation over the components of one thought. B items, K thoughts of each, D = width.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial

import mlx.core as mx
import numpy as np

from analysis.changes import Change

LEVELS = (0.1, 0.5, 1.0, 5.0, 10.0, 25.0, 50.0)  # of noise, in s(h)


@dataclass(frozen=True, eq=False)
class Clean:
    """The thoughts of an undisturbed run, and what the conditions take from them."""

    thoughts: np.ndarray  # [n, K, D]
    by_place: np.ndarray  # [K, D] mu_t; of these items, or of others (the training set)
    latent_row: np.ndarray  # [D] embedding of <|latent|>
    seed: int

    @cached_property
    def by_item(self) -> np.ndarray:
        """mu_i [n, D]."""
        return self.thoughts.mean(axis=1)

    @cached_property
    def mean(self) -> np.ndarray:
        """mu [D]."""
        return self.by_place.mean(axis=0)

    @cached_property
    def spread(self) -> float:
        """One standard deviation for all components of all thoughts."""
        return float(self.thoughts.std())

    def draw(self, items: np.ndarray, k: int, width: int) -> mx.array:
        """Standard normal numbers [B, D]: a function of seed, item and place, not of the batch."""
        rows = [np.random.default_rng((self.seed, item, k)).standard_normal(width) for item in items.tolist()]
        return mx.array(np.array(rows, dtype=np.float32))


Condition = Callable[[Clean, np.ndarray, int, mx.array], mx.array]


def own(clean: Clean, items: np.ndarray, k: int, h: mx.array) -> mx.array:
    return h


def zero(clean: Clean, items: np.ndarray, k: int, h: mx.array) -> mx.array:
    return mx.zeros_like(h)


def latent_row(clean: Clean, items: np.ndarray, k: int, h: mx.array) -> mx.array:
    return mx.broadcast_to(mx.array(clean.latent_row), h.shape)


def mean_by_place(clean: Clean, items: np.ndarray, k: int, h: mx.array) -> mx.array:
    return mx.broadcast_to(mx.array(clean.by_place[k]), h.shape)


def mean_by_item(clean: Clean, items: np.ndarray, k: int, h: mx.array) -> mx.array:
    return mx.array(clean.by_item[items])


def without_place(clean: Clean, items: np.ndarray, k: int, h: mx.array) -> mx.array:
    return h - mx.array(clean.by_place[k] - clean.mean)


def without_item(clean: Clean, items: np.ndarray, k: int, h: mx.array) -> mx.array:
    return h - mx.array(clean.by_item[items] - clean.mean)


def without_residual(clean: Clean, items: np.ndarray, k: int, h: mx.array) -> mx.array:
    return mx.array(clean.by_place[k] + clean.by_item[items] - clean.mean)


def residual_alone(clean: Clean, items: np.ndarray, k: int, h: mx.array) -> mx.array:
    return h - mx.array(clean.by_place[k] + clean.by_item[items] - 2 * clean.mean)


def random_of_that_size(clean: Clean, items: np.ndarray, k: int, h: mx.array) -> mx.array:
    r = clean.draw(items, k, h.shape[1])
    size = float(np.linalg.norm(clean.by_place[k] - clean.mean))
    return h + size * r / mx.linalg.norm(r, axis=1, keepdims=True)


def noise(clean: Clean, items: np.ndarray, k: int, h: mx.array, level: float) -> mx.array:
    return h + level * _spread(h) * clean.draw(items, k, h.shape[1])


def noise_only(clean: Clean, items: np.ndarray, k: int, h: mx.array) -> mx.array:
    return _spread(h) * clean.draw(items, k, h.shape[1])


def noise_of_one_size(clean: Clean, items: np.ndarray, k: int, h: mx.array) -> mx.array:
    return clean.spread * clean.draw(items, k, h.shape[1])


def _spread(h: mx.array) -> mx.array:
    """s(h) [B, 1]."""
    return mx.sqrt(mx.var(h, axis=1, keepdims=True))


CONDITIONS: dict[str, Condition] = {
    "zero": zero,
    "latent row": latent_row,
    "mean by place": mean_by_place,  # mu_t
    "mean by item": mean_by_item,  # mu_i
    "without place": without_place,  # h - mu_t + mu
    "without item": without_item,  # h - mu_i + mu
    "without residual": without_residual,  # mu_t + mu_i - mu
    "residual alone": residual_alone,  # h - mu_t - mu_i + 2 mu
    "random of that size": random_of_that_size,  # h + r, r as long as mu_t - mu
    **{f"noise {level:g}": partial(noise, level=level) for level in LEVELS},  # h + level s(h) eps
    "noise only": noise_only,  # s(h) eps
    "noise of one size": noise_of_one_size,  # s eps, s of all components of all thoughts
}


def by_place(n_thoughts: int) -> dict[str, Condition]:
    """Noise only in the first j, the last j, and each single place that is neither the first nor the last."""
    last = n_thoughts
    places = {f"first {j}": range(j) for j in range(1, last)} | {
        f"last {j}": range(last - j, last) for j in range(1, last)
    }
    places |= {f"place {j}": range(j - 1, j) for j in range(2, last)}
    return {f"noise only, {name}": partial(_in_places, places=tuple(chosen)) for name, chosen in places.items()}


def _in_places(clean: Clean, items: np.ndarray, k: int, h: mx.array, places: tuple[int, ...]) -> mx.array:
    return noise_only(clean, items, k, h) if k in places else h


def in_loop(conditions: dict[str, Condition], clean: Clean) -> dict[str, Change]:
    """Mode loop: a thought is changed where it is fed back, and later ones are computed from the changed one."""
    return {name: partial(condition, clean) for name, condition in conditions.items()}


def on_record(conditions: dict[str, Condition], clean: Clean) -> dict[str, Change]:
    """Mode patched: the thoughts of the clean run are changed, and those that the loop computes are not used."""
    return {name: partial(_recorded, condition, clean) for name, condition in conditions.items()}


def exchanged(clean: Clean, thoughts: np.ndarray) -> Change:
    """Mode patched: these thoughts [n, K, D] in place of the recorded ones."""
    return partial(_recorded, own, Clean(thoughts, clean.by_place, clean.latent_row, clean.seed))


def _recorded(condition: Condition, clean: Clean, items: np.ndarray, k: int, h: mx.array) -> mx.array:
    return condition(clean, items, k, mx.array(clean.thoughts[items, k]))


def draw_orders(n: int, n_thoughts: int, seed: tuple[int, ...]) -> np.ndarray:
    """For each item another order of its thoughts [n, K], never the order that they had. K must be 2 or more."""
    rng = np.random.default_rng(seed)
    orders = np.tile(np.arange(n_thoughts), (n, 1))
    while len(same := np.flatnonzero((orders == np.arange(n_thoughts)).all(axis=1))):
        orders[same] = rng.permuted(orders[same], axis=1)
    return orders


def draw_swaps(n: int, n_thoughts: int, seed: tuple[int, ...]) -> np.ndarray:
    """For each item its order with one pair of neighbors exchanged [n, K]."""
    first = np.random.default_rng(seed).integers(0, n_thoughts - 1, n)
    orders = np.tile(np.arange(n_thoughts), (n, 1))
    orders[np.arange(n), first] += 1
    orders[np.arange(n), first + 1] -= 1
    return orders


def draw_donors(answers: list[str], allowed: np.ndarray, seed: tuple[int, ...]) -> np.ndarray | None:
    """For each item another one that is allowed and has another answer [n]; None where an item has no such partner.

    allowed [n, n] bool: whether item i may get the thoughts of item j.
    """
    names = np.array(answers)
    candidates = [np.flatnonzero(row & (names != name)) for row, name in zip(allowed, names, strict=True)]
    if not all(map(len, candidates)):
        return None
    rng = np.random.default_rng(seed)
    return np.array([rng.choice(numbers) for numbers in candidates])


def variance_shares(thoughts: np.ndarray) -> tuple[float, float, float] | None:
    """The shares in % of place, item and residual in the variance of thoughts [n, K, D]; None where there is none."""
    thoughts = thoughts.astype(np.float64)  # the mean of equal thoughts is then exactly that thought
    mean, place, item = thoughts.mean(axis=(0, 1)), thoughts.mean(axis=0), thoughts.mean(axis=1)
    n, n_thoughts, _ = thoughts.shape
    residual = thoughts - place - item[:, None] + mean
    sums = np.array([n * ((place - mean) ** 2).sum(), n_thoughts * ((item - mean) ** 2).sum(), (residual**2).sum()])
    return tuple((100 * sums / sums.sum()).tolist()) if sums.sum() > 0 else None
