"""Chunks of a micro-batch side by side on a CPU: MLX gives each CPU stream a thread of its own."""

import os
from bisect import bisect_left
from collections.abc import Callable, Iterable
from itertools import cycle

import mlx.core as mx

from utils import UserError

_streams: list[mx.Stream] = []  # all that were made on the device in use: each keeps a thread
_n_used = 1


def on_gpu() -> bool:
    """Whether MLX computes on a GPU (Metal or CUDA), whichever its number is."""
    return mx.default_device().type == mx.gpu


def use_device(wanted: str | None) -> None:
    """Compute on the CPU of a machine with a GPU where `wanted` (COCONUT_DEVICE) is "cpu"; None leaves MLX's choice.

    Call it before `use_streams`. Raises UserError for another text, or for "gpu" where there is none.
    """
    if wanted not in (None, "cpu", "gpu"):
        raise UserError(f"COCONUT_DEVICE: expected cpu or gpu, found {wanted!r}")
    if wanted == "gpu" and not on_gpu():
        raise UserError("COCONUT_DEVICE: expected cpu, found 'gpu': this build of MLX finds no GPU here")
    if wanted == "cpu":
        mx.set_default_device(mx.cpu)


def use_streams(wanted: str | None = None) -> int:
    """Choose the streams that `map_streams` works on; returns how many.

    wanted: the user's number (COCONUT_STREAMS); None means two where there are two cores. A GPU has one: its own
    threads fill it. Call it before the first evaluation. Raises UserError for a number out of range.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    wanted = wanted or str(min(2, cores))
    if not wanted.isdecimal() or not 1 <= int(wanted) <= 64:
        raise UserError(f"COCONUT_STREAMS: expected a number from 1 to 64, found {wanted!r}")
    global _n_used
    _n_used = 1 if on_gpu() else int(wanted)
    device = mx.default_device()
    if not _streams or _streams[0].device != device:
        _streams[:] = [mx.default_stream(device)]
    _streams.extend(mx.new_stream(device) for _ in range(_n_used - len(_streams)))
    return _n_used


def n_streams() -> int:
    """How many streams there are to work on: 1 until `use_streams` says otherwise."""
    return _n_used


def map_streams(function: Callable, arguments: Iterable) -> list:
    """The function of each argument, built on the streams in turn; evaluate all results in one mx.eval."""
    streams = _streams[:_n_used] or [mx.default_stream(mx.default_device())]
    results = []
    for stream, argument in zip(cycle(streams), arguments, strict=False):
        with mx.stream(stream):
            results.append(function(argument))
    return results


def even_slices(n_rows: int) -> list[slice]:
    """Rows in as many slices of like size as there are streams, or fewer."""
    size = -(-n_rows // n_streams())
    return [slice(start, start + size) for start in range(0, n_rows, size)]


def chunk_bounds(lengths: list[int], n_chunks: int) -> list[int]:
    """Where to cut rows of rising length, [0, ..., number of rows], so that the largest chunk is as small as can be.

    A chunk's size is its rows times its longest row: the columns it takes once it is padded.
    """
    longest = lengths[-1]
    sizes = range(longest, len(lengths) * longest + 1)
    fits = bisect_left(sizes, True, key=lambda size: len(_bounds_of(lengths, size)) <= n_chunks + 1)
    return _bounds_of(lengths, sizes[fits])


def _bounds_of(lengths: list[int], size: int) -> list[int]:
    """Bounds of chunks of at most `size`, cut from the longest rows down."""
    bounds = [len(lengths)]
    while bounds[0]:
        bounds.insert(0, max(0, bounds[0] - size // lengths[bounds[0] - 1]))
    return bounds
