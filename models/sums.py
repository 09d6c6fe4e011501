"""Float32 sums in a model of mlx-lm whose products are computed in bfloat16.

MLX adds bfloat16 numbers in bfloat16 on a GPU, and such a sum stops growing at 256 times its terms. The gradients of
norms, biases and embeddings are sums over all tokens, so these parameters stay float32. But a float32 number beside a
bfloat16 one gives float32, and one norm would turn all that follows into float32. So the modules that hold them get a
subclass whose output is of its input's type; where all is float32 it computes the same bits as before.
"""

from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from models.ops import linear


def subclass(module: nn.Module, **methods: Callable) -> None:
    """Give one module a subclass of its class, with these methods; parameters stay as they are."""
    module.__class__ = type(type(module).__name__, (type(module),), methods)


def take_float32(lm: nn.Module) -> frozenset[str]:
    """Let the modules of a model have float32 norms, biases and embeddings beside bfloat16 matrices.

    Returns the names of these parameters. Others stay with the matrices: vectors of a module that holds modules, or
    matrices of another kind than nn.Linear's.
    """
    kept = set()
    for path, module in lm.named_modules():
        own = {name: array for name, array in tree_flatten(module.parameters()) if "." not in name}
        if isinstance(module, nn.Embedding):
            subclass(module, as_linear=_product_in_its_inputs_type)
        elif type(module).__call__ is nn.Linear.__call__ and "bias" in own:
            subclass(module, __call__=_linear)
            del own["weight"]
        elif not module.children() and all(array.ndim < 2 for array in own.values()):
            _return_input_type(module)
        else:
            continue
        kept |= {f"{path}.{name}" for name in own}
    return frozenset(kept)


def trained_type(layers: list[nn.Module]) -> mx.Dtype:
    """What the trained matrices of layers are at the moment: float32, or bfloat16 in `computing_in`."""
    arrays = (array for layer in layers for _, array in tree_flatten(layer.trainable_parameters()))
    return next(array.dtype for array in arrays if array.ndim > 1)


def _product_in_its_inputs_type(self, x: mx.array) -> mx.array:
    """A tied output layer: x [..., D] -> [..., vocabulary]."""
    return x @ self.weight.astype(x.dtype).T


def _linear(self, x: mx.array) -> mx.array:
    """x [..., in] -> [..., out] in the weight's type; the bias is added in its own."""
    return linear(x, self.weight.T, self.bias)


def _return_input_type(module: nn.Module) -> None:
    own = type(module).__call__

    def call(self, x, *arguments, **named):
        return own(self, x, *arguments, **named).astype(x.dtype)

    subclass(module, __call__=call)
