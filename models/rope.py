"""Rotary positions: the settings of a config.json in the form that mlx-lm reads, and whether it has read them.

A model that ignores them computes other numbers without an error: mlx-lm's Llama does not read `rope_parameters`, where
transformers 5 writes the base and the scaling.
"""

import math

import mlx.core as mx
import mlx.nn as nn

from utils import UserError

KNOWN = ("default", "linear", "llama3")  # rope types whose frequencies are computed here


def flat_rope(values: dict) -> dict:
    """The values of a config.json with those of `rope_parameters` as rope_theta and rope_scaling too."""
    found = values.get("rope_parameters")
    if not isinstance(found, dict):
        return values
    if "full_attention" in found:  # one set for each kind of layer, as Gemma 3 has it
        local = found.get("sliding_attention", {})
        values = values | {"rope_local_base_freq": local.get("rope_theta", values.get("rope_local_base_freq"))}
        found = found["full_attention"]
    kind = found.get("rope_type", "default")
    flat = {name: found[name] for name in ("rope_theta", "partial_rotary_factor") if name in found}
    scaling = None if kind == "default" else {name: value for name, value in found.items() if name != "rope_theta"}
    return values | flat | {"rope_scaling": scaling}


def check_rope(lm: nn.Module, values: dict) -> None:
    """Compare the rotation of every attention layer with the config.json's.

    Raises UserError where it differs. Types other than KNOWN are mlx-lm's affair, but a dynamic one, which depends on
    the length of the input, is refused.
    """
    scaling = values.get("rope_scaling") or {}
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "dynamic":
        raise UserError("rope_scaling: dynamic; thoughts need positions that do not depend on the sequence's length")
    if kind not in KNOWN or not values.get("rope_theta"):
        return
    allowed = [values["rope_theta"], values.get("rope_local_base_freq")]
    for name, module in lm.named_modules():
        dims = getattr(module, "dims", None)
        if name.rsplit(".", 1)[-1] != "rope" or not isinstance(dims, int):
            continue
        found = _frequencies(module, dims)
        expected = [_expected(theta, dims, kind, scaling) for theta in allowed if theta]
        expected += [_expected(theta, dims, "default", {}) for theta in allowed[1:] if theta]
        if not any(mx.allclose(found, one, rtol=1e-3, atol=1e-6).item() for one in expected):
            raise UserError(
                f"{name}: mlx-lm rotates by other frequencies than config.json says (rope_theta {allowed[0]}, "
                f"{kind}): the model would compute other numbers than it was trained with"
            )


def _frequencies(rope: nn.Module, dims: int) -> mx.array:
    """Radians a position, of each pair of components [dims / 2], read off the rotation of unit vectors."""
    half = dims // 2
    unit = mx.eye(dims)[None, None, :half] if not getattr(rope, "traditional", False) else mx.eye(dims)[None, None, ::2]
    # One column at a time, because columns have positions of their own.
    turned = mx.concatenate([rope(unit[:, :, i : i + 1], offset=1) for i in range(half)], axis=2)[0, 0]
    if getattr(rope, "traditional", False):
        index = 2 * mx.arange(half)
        cos, sin = turned[mx.arange(half), index], turned[mx.arange(half), index + 1]
    else:
        cos, sin = turned[mx.arange(half), mx.arange(half)], turned[mx.arange(half), mx.arange(half) + half]
    return mx.arctan2(sin, cos)


def _expected(theta: float, dims: int, kind: str, scaling: dict) -> mx.array:
    """The frequencies [dims / 2] as transformers computes them (modeling_rope_utils)."""
    frequencies = theta ** (-mx.arange(0, dims, 2) / dims)
    if kind == "linear":
        return frequencies / scaling["factor"]
    if kind == "default":
        return frequencies
    length = scaling["original_max_position_embeddings"]
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = length * frequencies / (2 * math.pi)  # in the original context
    share = mx.clip((turns - low) / (high - low), 0, 1)  # 1: as it was, 0: slowed by the factor
    return frequencies * (share + (1 - share) / scaling["factor"])
