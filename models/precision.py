"""bfloat16 compute with float32 parameters."""

from collections.abc import Iterator
from contextlib import contextmanager

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map

from parallel.streams import on_gpu


def compute_dtype(bf16: bool) -> mx.Dtype:
    """bfloat16 where it is wanted and there is a GPU; on a CPU such products never reach the BLAS."""
    return mx.bfloat16 if bf16 and on_gpu() else mx.float32


@contextmanager
def computing_in(model: nn.Module, dtype: mx.Dtype) -> Iterator[None]:
    """Let the model compute in a dtype; its own parameters come back at the end, and gradients reach them."""
    parameters = model.parameters()
    model.update(tree_map(lambda array: array.astype(dtype) if _is_float(array) else array, parameters))
    try:
        yield
    finally:
        model.update(parameters)


def _is_float(array: mx.array) -> bool:
    """Quantized weights are whole numbers, and stay."""
    return mx.issubdtype(array.dtype, mx.floating)
