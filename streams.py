"""Two parts of a batch at once on a CPU: MLX works on each CPU stream in a thread of its own.

MLX starts operations in an order that goes through the whole graph, but only up to a width of MLX_BFS_MAX_WIDTH; in a
wider one it finishes one part before it begins the next. So that bound is lifted here, before the first evaluation. It
costs memory (weight gradients are computed last, and hold on to activations until then): see `use_one`.
"""

import os
from collections.abc import Callable, Iterable
from functools import cache
from itertools import cycle

import cpu_blas  # noqa: F401  must come before mlx
import mlx.core as mx

from utils import UserError

WIDTH = "MLX_BFS_MAX_WIDTH"
MLX_DEFAULT_WIDTH = "20"

_lifted = os.environ.setdefault(WIDTH, "1000000") == "1000000"


def use_one() -> None:
    """Work on one stream and keep MLX's order, which needs less memory. Comes before the first evaluation."""
    os.environ["COCONUT_STREAMS"] = "1"
    if _lifted:
        os.environ[WIDTH] = MLX_DEFAULT_WIDTH


@cache
def streams() -> list[mx.Stream]:
    """The streams to work on: one on a GPU, else COCONUT_STREAMS, by default two where there are two cores."""
    device = mx.default_device()
    if device == mx.Device(mx.gpu):
        return [mx.default_stream(device)]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    wanted = os.environ.get("COCONUT_STREAMS") or str(min(2, cores))
    if not wanted.isdecimal() or not 1 <= int(wanted) <= 64:
        raise UserError(f"COCONUT_STREAMS: expected a number from 1 to 64, found {wanted!r}")
    return [mx.default_stream(device), *(mx.new_stream(device) for _ in range(int(wanted) - 1))]


def spread(function: Callable, arguments: Iterable) -> list:
    """The function of each argument, built on the streams in turn; evaluate all results in one mx.eval."""
    results = []
    for stream, argument in zip(cycle(streams()), arguments, strict=False):
        with mx.stream(stream):
            results.append(function(argument))
    return results
