"""Environment variables that the project sets. A value that the user has set stays, but for matplotlib's."""

import os


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


def own_pictures() -> None:
    """Draw with matplotlib's own defaults: a notebook's backend or a matplotlibrc of the user could need a display,
    LaTeX or fonts that are not there. Call it before matplotlib is imported.
    """
    os.environ.update(MPLBACKEND="agg", MATPLOTLIBRC=os.devnull)
