"""Record what each block of a GPT-2 puts out and what it attends to, from outside: the model itself is unchanged.

Shapes: B rows, T columns of a batch, L layers, H heads, D = width, Dh = D / H, S columns seen so far.
"""

import copy
from typing import NamedTuple

import mlx.core as mx

from coconut import Batch, Coconut
from models.cache import LayerCache
from models.gpt2 import GPT2, Attention, Block
from utils import UserError


class Recorded(NamedTuple):
    """One run over a batch. The arrays are lazy, so only what is looked at is computed."""

    hidden: mx.array  # [B, T, D] after the final layer norm
    outputs: list[mx.array]  # of each layer [B, T, D], before the final layer norm
    weights: list[mx.array]  # attention of each layer [B, H, T, T]: query, key; a query's weights sum to 1


class Watched:
    """A block that keeps what it puts out, and its attention weights, of every pass."""

    def __init__(self, block: Block):
        self._block = block
        self.outputs: list[mx.array] = []
        self.weights: list[mx.array] = []

    def __call__(self, x: mx.array, mask: mx.array, cache: LayerCache, keys: list) -> mx.array:
        self.outputs.append(self._block(x, mask, cache, keys))
        self.weights.append(attention_weights(self._block.attn, self._block.ln_1(x), mask, cache))
        return self.outputs[-1]


def require_gpt2(model: Coconut, what: str) -> None:
    """Raise UserError where the base is a model of mlx-lm: its layers are not this project's, and differ by type."""
    if not isinstance(model.transformer, GPT2):
        kind = model.transformer.config.model_type
        raise UserError(f"{what}: layers and attention are recorded for GPT-2 alone; this checkpoint's base is {kind}")


def record(model: Coconut, batch: Batch) -> Recorded:
    """Fill in the thoughts of a batch and keep what every block did."""
    watched = copy.copy(model.transformer)  # shares all weights
    watched.h = blocks = [Watched(block) for block in model.transformer.h]
    hidden, _ = Coconut(watched).think(batch)
    length = hidden.shape[1]
    outputs = [mx.concatenate(block.outputs, axis=1) for block in blocks]
    weights = [mx.concatenate([_padded(part, length) for part in block.weights], axis=2) for block in blocks]
    return Recorded(hidden, outputs, weights)


def attention_weights(layer: Attention, x: mx.array, mask: mx.array, cache: LayerCache) -> mx.array:
    """softmax(q k^T / sqrt(Dh)) of a pass, [B, H, T, S] float32.

    x [B, T, D] and mask bool [B, 1, T, S] as the layer got them; cache: its keys, those of this pass included. The
    layer's own attention does not return its weights, on a GPU it does not even have them.
    """
    B, T, D = x.shape
    q = layer.c_attn(x)[..., :D].reshape(B, T, layer.n_head, -1).transpose(0, 2, 1, 3)  # [B, H, T, Dh]
    scores = (q * q.shape[-1] ** -0.5) @ cache.state[0].swapaxes(-1, -2)  # [B, H, T, S]
    lowest = mx.finfo(mx.float32).min  # not -inf: a row that may attend to nothing gives no NaN
    return mx.softmax(mx.where(mask, scores.astype(mx.float32), lowest), axis=-1)


def _padded(weights: mx.array, length: int) -> mx.array:
    """The weights of a pass with zeros for the columns behind it, [B, H, T, length]."""
    return mx.pad(weights, [(0, 0), (0, 0), (0, 0), (0, length - weights.shape[-1])])
