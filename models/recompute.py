"""Gradient checkpointing of one layer: its activations are computed again in the backward pass, and not kept."""

import copy
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map, tree_unflatten

from models.cache import LayerCache, State
from models.ops import Dropout, random_keys


def run_and_recompute(call: Callable, layer: nn.Module, x: mx.array, cache: LayerCache, keys: list) -> mx.array:
    """call(layer, x, cache, keys), x and its result [B, T, D]; the cache grows as it does without recomputation.

    Unlike mx.checkpoint it keeps no pass's keys and values either: the second run takes them from the cache as the
    last pass has left it. keys: random keys of the layer's dropouts, from which masks are drawn again.
    """
    start, twin = cache.n_columns, _twin(layer)
    names, parameters = zip(*tree_flatten(twin.trainable_parameters()), strict=True)

    def run(x: mx.array, state: State, parameters: tuple, cache: LayerCache, keys: list) -> tuple[mx.array, State]:
        twin.update(tree_unflatten(list(zip(names, parameters, strict=True))))
        cache.state = state
        return call(twin, x, cache, keys), cache.state

    @mx.custom_function
    def forward(x, state, parameters):
        return run(x, state, parameters, cache, keys)

    @forward.vjp
    def backward(primals, cotangents, outputs):
        x, _, parameters = primals
        state = cache.before(start).state
        n = 1 + len(state)
        # mx.compile would find the second run equal to the first one, and keep what that has computed.
        x, *keys_again = mx.depends([x, *keys], [cotangents[0]])

        def flat(*arrays):
            out, new_state = run(arrays[0], arrays[1:n], arrays[n:], cache.before(start), keys_again)
            return [out, *new_state]

        _, found = mx.vjp(flat, [x, *state, *parameters], [cotangents[0], *cotangents[1]])
        return found[0], tuple(found[1:n]), tuple(found[n:])

    found: Any = forward(x, cache.state, parameters)
    cache.state = found[1]
    return found[0]


class Keys:
    """The keys of a layer's dropouts in one pass, in their order: drawn at the first run, read at the second."""

    def __init__(self, keys: list):
        self._keys, self._place = keys, 0

    def next(self) -> mx.array:
        """The next key; a new one is added to the list."""
        if self._place == len(self._keys):
            self._keys += random_keys(1)
        self._place += 1
        return self._keys[self._place - 1]


class RepeatedDropout(Dropout):
    """Dropout in a layer that passes it no key, with the masks of its `keys`; without any, it draws new ones."""

    def __init__(self, rate: float):
        super().__init__(rate)
        self._keys: Keys | None = None

    def __call__(self, x: mx.array, key: mx.array | None = None) -> mx.array:
        if self.rate and key is None:
            key = self._keys.next() if self._keys else random_keys(1)[0]
        return super().__call__(x, key)


def repeat_dropout(layer: nn.Module, keys: list) -> None:
    """Let the dropouts of a layer, the twin of one pass, take their keys from this list, which the first run fills."""
    shared = Keys(keys)
    for module in layer.modules():
        if isinstance(module, RepeatedDropout):
            module._keys = shared


def _twin(module: nn.Module) -> nn.Module:
    """A module that computes the same now, also after the parameters of this one have been replaced."""
    twin = copy.copy(module)
    for name, child in module.children().items():
        twin[name] = tree_map(_twin, child, is_leaf=lambda node: isinstance(node, nn.Module))
    return twin
