"""What a run computes in: float32, TF32 or bfloat16, always with float32 parameters."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map_with_path

from parallel.streams import on_gpu


def compute_dtype(bf16: bool) -> mx.Dtype:
    """bfloat16 where it is wanted and there is a GPU; on a CPU such products never reach the BLAS."""
    return mx.bfloat16 if bf16 and on_gpu() else mx.float32


def name_precision(bf16: bool) -> str:
    """What products are computed in: float32, TF32 or bfloat16. MLX reads MLX_ENABLE_TF32 at the first one."""
    if not on_gpu():
        return "float32"
    return "bfloat16" if bf16 else "float32" if os.environ.get("MLX_ENABLE_TF32") == "0" else "TF32"


@contextmanager
def computing_in(model: nn.Module, dtype: mx.Dtype) -> Iterator[None]:
    """Let the model compute in a dtype; its own parameters come back at the end, and gradients reach them.

    Quantized weights, whole numbers, stay. A language model with a method keeps_float32(name) says which others do.
    """
    parameters, keeps = model.parameters(), getattr(model.transformer, "keeps_float32", lambda name: False)

    def cast(name: str, array: mx.array) -> mx.array:
        return array.astype(dtype) if mx.issubdtype(array.dtype, mx.floating) and not keeps(name) else array

    model.update(tree_map_with_path(cast, parameters))
    try:
        yield
    finally:
        model.update(parameters)


@contextmanager
def training_in(model: nn.Module, dtype: mx.Dtype) -> Iterator[None]:
    """`computing_in` for a micro-batch of training: with folded_norms() where the language model has that method."""
    with getattr(model.transformer, "folded_norms", nullcontext)(), computing_in(model, dtype):
        yield
