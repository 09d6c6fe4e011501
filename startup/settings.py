"""Environment variables that the project sets. A value that the user has set stays, but for matplotlib's."""

import os
import sys
from contextlib import suppress

from startup import cache_folder


def default(**variables: str) -> None:
    """Set environment variables that are not set yet."""
    for name, value in variables.items():
        os.environ.setdefault(name, value)


def lift_graph_width() -> None:
    """Let MLX work on several CPU streams at the same time; call it before the first evaluation.

    MLX starts operations breadth-first over the whole graph, so that every stream has work, but only while the graph
    is at most MLX_BFS_MAX_WIDTH (20) operations wide. In a wider graph it goes depth-first: it finishes one chunk
    before it starts the next, and the other streams wait. A wide order costs memory, because weight gradients come
    last and keep activations alive until then; with one stream it gains nothing.
    """
    default(MLX_BFS_MAX_WIDTH="1000000")


def exact_products() -> None:
    """Compute float32 products in float32 on a GPU, as PyTorch does; call it before the first product.

    MLX's own default on CUDA and on Apple's M5 is TF32, which keeps 10 bits of each factor: products are off by 3e-4
    instead of 1e-6. The key `tf32` leaves that default.
    """
    default(MLX_ENABLE_TF32="0")


def long_graphs() -> None:
    """Let MLX cut its CUDA graphs by their number of operations alone (Linux); call it before the first evaluation.

    It also cuts them after so many megabytes, so that every shape of a batch has graphs of its own: 140 were made anew
    in each step, at up to a millisecond each. Launching a graph takes the host 0.2 ms, so 200 operations share one;
    with more, a step takes more memory, because arrays that a graph no longer needs are free at its end.
    """
    if sys.platform == "linux":  # Metal has numbers of its own for each chip
        default(MLX_MAX_MB_PER_BUFFER="1000000", MLX_MAX_OPS_PER_BUFFER="200")


def no_graphs() -> None:
    """Let MLX start CUDA kernels one by one; call it before the first evaluation.

    For TF32, whose products cuBLAS computes with kernels that a graph cannot be updated with: on an H200 43 graphs were
    made anew in each step, which took a third of its time.
    """
    default(MLX_USE_CUDA_GRAPHS="0")


def own_kernels() -> None:
    """Keep the CUDA kernels that MLX compiles in the user's cache (Linux); call it before the first evaluation.

    MLX's own place for them is /tmp/mlx, which other users can write to and a cluster's job may lose. A model takes 60
    of them, 2 to 5 seconds each.
    """
    if sys.platform == "linux":
        with suppress(RuntimeError):  # the user has no home directory
            default(MLX_PTX_CACHE_DIR=str(cache_folder() / "kernels"))


def own_pictures() -> None:
    """Draw with matplotlib's own defaults: a notebook's backend or a matplotlibrc of the user could need a display,
    LaTeX or fonts that are not there. Call it before matplotlib is imported.
    """
    os.environ.update(MPLBACKEND="agg", MATPLOTLIBRC=os.devnull)
