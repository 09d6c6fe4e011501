"""Shares and means as they are printed: with what they are of, and their 95 % interval."""

import numpy as np

from training.evaluation import wilson

DRAWS = 1000  # of the bootstrap


def share(count: int, n: int) -> str:
    """A share with its Wilson interval and n; "none" where n is 0."""
    if not n:
        return "none"
    low, high = wilson(count, n)
    return f"{count / n:.3f} ({low:.3f} to {high:.3f}) of {n:,}"


def bootstrap(sums: np.ndarray, counts: np.ndarray) -> tuple[float, float, float]:
    """The mean of values that belong to items, and its interval: items are drawn again, with all their values.

    sums, counts [items]: the sum of each item's values and how many they are. Values of one item are not independent,
    so drawing single values would give too short an interval.
    """
    sums, counts = np.asarray(sums, dtype=np.float64), np.asarray(counts)
    drawn = np.random.default_rng(0).integers(0, len(sums), (DRAWS, len(sums)))
    totals = counts[drawn].sum(axis=1)
    means = sums[drawn].sum(axis=1)[totals > 0] / totals[totals > 0]
    low, high = np.percentile(means, [2.5, 97.5])
    return float(sums.sum() / counts.sum()), float(low), float(high)


def mean(values, counts=None) -> str:
    """The mean of one value an item, or of sums with their counts, with its interval and n; "none" without any."""
    counts = np.ones(len(values), dtype=int) if counts is None else np.asarray(counts)
    if not counts.sum():
        return "none"
    middle, low, high = bootstrap(values, counts)
    return f"{middle:.3g} ({low:.3g} to {high:.3g}) of {counts.sum():,}"
