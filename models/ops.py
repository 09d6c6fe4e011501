"""The operations that a training step spends its time in: cross-entropy, GELU, dropout and attention with dropout.

On a CPU they are written by hand, because it was measured: MLX's own are slower there, and its cross-entropy is
inexact. On a GPU the library's are taken where they are as exact. Shapes: B rows, H heads, T queries, S keys, Dh = the
width of a head, N labels, V = vocabulary.
"""

import math
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from parallel.streams import on_gpu

LOG2_E = math.log2(math.e)
GELU_SLOPE = 2 * math.sqrt(2 / math.pi)
QUERY_BLOCK = 128  # queries that attention computes at a time
LOWEST = float(np.finfo(np.float32).min)  # for what is masked; not -inf: a row that sees nothing gives no NaN
SUM_BLOCK = 256  # terms that a long float32 sum adds before it adds the sums


def exp(x: mx.array) -> mx.array:
    """e ** x, for CPUs: mx.power(2, x) takes 3 ns an element there and mx.exp 9."""
    return mx.power(2.0, x * LOG2_E)


def cross_entropy(logits: mx.array, labels: mx.array) -> mx.array:
    """Negative log-likelihood of each label: logits [N, V] float32, labels [N] in 0..V-1 -> [N]."""
    if on_gpu():
        labels = mx.stop_gradient(labels)  # mx.checkpoint differentiates with respect to every argument
        return nn.losses.cross_entropy(logits, labels)
    return _exact_cross_entropy(logits, labels)


@mx.custom_function
def _exact_cross_entropy(logits: mx.array, labels: mx.array) -> mx.array:
    # On a CPU nn.losses.cross_entropy adds a row's 50,260 terms one after the other and is wrong by 1e-4.
    # The backward pass recomputes the softmax, so the logits are the only [N, V] array that is kept.
    highest = logits.max(axis=-1, keepdims=True)  # [N, 1]
    return (highest[:, 0] + mx.log(_row_sums(exp(logits - highest)))) - _logit_of(logits, labels)


@_exact_cross_entropy.vjp
def _cross_entropy_vjp(primals, cotangent, losses):
    logits, labels = primals
    log_sum = losses + _logit_of(logits, labels)  # [N]
    gradient = exp(logits - log_sum[:, None]) * cotangent[:, None]  # [N, V]
    return gradient.at[mx.arange(len(labels)), labels].add(-cotangent), mx.zeros_like(labels)


def _logit_of(logits: mx.array, labels: mx.array) -> mx.array:
    return mx.take_along_axis(logits, labels[:, None], axis=-1)[:, 0]


def _row_sums(x: mx.array) -> mx.array:
    """Sum of each row of a contiguous [N, V] -> [N], by blocks and then over the blocks."""
    n_rows, n_columns = x.shape
    n_blocks = n_columns // SUM_BLOCK
    blocks = mx.as_strided(x, (n_rows, n_blocks, SUM_BLOCK), (n_columns, SUM_BLOCK, 1))
    return blocks.sum(axis=-1).sum(axis=-1) + x[:, n_blocks * SUM_BLOCK :].sum(axis=-1)


def gelu_new(x: mx.array) -> mx.array:
    """GPT-2's tanh approximation of GELU, element by element, computed in float32."""
    return _gelu(x) if on_gpu() else _gelu_and_gate(x)[0]


@mx.custom_function
def _gelu(x: mx.array) -> mx.array:
    # For GPUs: the backward pass computes the gate again, so x is the only array that is kept.
    wide = x.astype(mx.float32)
    return (wide * _gelu_gate(wide)).astype(x.dtype)


@_gelu.vjp
def _wide_gelu_vjp(x, cotangent, out):
    wide = _again([x], cotangent)[0].astype(mx.float32)
    return (cotangent.astype(mx.float32) * _gelu_slope(wide, _gelu_gate(wide))).astype(x.dtype)


def _again(arrays, cotangent: mx.array):
    """The arrays, where a backward pass computes something again: mx.compile would find it equal and keep the first."""
    return mx.depends(list(arrays), [cotangent])


def _gelu_gate(x: mx.array) -> mx.array:
    return mx.sigmoid(x * (GELU_SLOPE * (1 + 0.044715 * (x * x))))


def _gelu_slope(x: mx.array, gate: mx.array) -> mx.array:
    slope = GELU_SLOPE * (1 + (3 * 0.044715) * (x * x))
    return gate * (1 + x * (1 - gate) * slope)


@mx.custom_function
def _gelu_and_gate(x: mx.array):
    # x * sigmoid(2 u), the same function: one power (3 ns an element) in place of a tanh (15) and a cube by power.
    # The gate is an output so that the backward pass need not compute it again.
    gate = 1 / (1 + mx.power(2.0, x * (-LOG2_E * GELU_SLOPE * (1 + 0.044715 * (x * x)))))
    return x * gate, gate


@_gelu_and_gate.vjp
def _gelu_vjp(x, cotangents, outputs):
    return cotangents[0] * _gelu_slope(x, outputs[1])


class LayerNorm(nn.LayerNorm):
    """Layer normalization over the last axis, gain and bias optional (`folded_norms`)."""

    def __call__(self, x: mx.array) -> mx.array:
        if on_gpu():
            return super().__call__(x)
        normal = _normalized(x, mx.full((x.shape[-1], 1), 1 / x.shape[-1]), mx.array(self.eps))[0]
        return normal * self.weight + self.bias if "weight" in self else normal


@mx.custom_function
def _normalized(x: mx.array, mean: mx.array, eps: mx.array):
    # Products with the column `mean` take a third of the time of MLX's own means, and its norm is ten times slower.
    centered = x - x @ mean
    scale = mx.rsqrt((centered * centered) @ mean + eps)  # [..., 1]
    return centered * scale, scale


@_normalized.vjp
def _normalized_vjp(primals, cotangents, outputs):
    mean, (normal, scale), gradient = primals[1], outputs, cotangents[0]
    to_x = scale * (gradient - gradient @ mean - normal * ((gradient * normal) @ mean))
    return to_x, mx.zeros_like(mean), mx.zeros_like(primals[2])


def linear(x: mx.array, weight: mx.array, bias: mx.array) -> mx.array:
    """x [..., in] @ weight [in, out] + bias [out], in the weight's type."""
    if weight.dtype == bias.dtype:
        return mx.addmm(bias, x, weight) if on_gpu() else x @ weight + bias  # a CPU's addmm copies the bias slowly
    return (x.astype(weight.dtype) @ weight + bias).astype(weight.dtype)


@mx.custom_function
def linear_in_turn(x: mx.array, weight: mx.array, biases: mx.array):
    """`linear`, weight, biases: the passes of a step hand the parameters on to each other; x [B, T, in].

    So their gradients come back from pass to pass, and the product of each pass adds to them at once. Otherwise those
    of all passes are kept until they are added up. biases [B, out]: the bias for each row, whose gradients are added up
    at the end and not in each pass.
    """
    return linear(x, weight, biases[:1].squeeze(0)), weight, biases


@linear_in_turn.vjp
def _linear_vjp(primals, cotangents, outputs):
    x, weight, _ = primals
    to_out, to_weight, to_biases = cotangents
    rows, flat = x.reshape(-1, x.shape[-1]), to_out.reshape(-1, to_out.shape[-1])
    to_biases = to_biases + sum_of_columns(to_out)
    to_x, to_weight = to_out @ weight.T, mx.addmm(to_weight, rows.T, flat)
    if x.shape[1] > 1:  # MLX leaves these sums to the end, and keeps what they are computed from
        [to_x] = mx.depends([to_x], [to_weight, to_biases])
    return to_x, to_weight, to_biases


def sum_of_columns(x: mx.array) -> mx.array:
    """Float32 sums over the columns of each row, for GPUs: x [B, T, D] -> [B, D].

    As one sum over B * T it has too few parts for all of a GPU: 0.15 ms on an H200, of which this takes a fifth.
    """
    if x.shape[1] == 1:
        return x.squeeze(1).astype(mx.float32)
    return x.astype(mx.float32).sum(axis=1)  # a bfloat16 sum stops growing at 256 times its terms


def random_keys(n: int) -> list[mx.array]:
    """Draw n keys from MLX's random state."""
    key = mx.random.randint(-(2**31), 2**31 - 1, (2,)).view(mx.uint32)
    return list(mx.random.split(key, n))


def dropout_mask(key: mx.array, shape: tuple[int, ...], rate: float) -> mx.array:
    """bool of this shape, False with probability `rate` to the nearest 65,536th; the key itself if it is a mask.

    16 random bits decide each element; mx.random.bernoulli takes 32.
    """
    if key.dtype == mx.bool_:
        return key
    n = math.prod(shape)
    key = mx.stop_gradient(key)  # mx.checkpoint differentiates with respect to every argument of a block
    bits = mx.random.split(key, -(-n // 4)).reshape(-1).view(mx.uint16)
    return bits[:n].reshape(shape) >= round(rate * 65536)


class Dropout(nn.Module):
    """Dropout whose mask is a function of a key, so that a recomputation draws the same mask again."""

    def __init__(self, rate: float):
        super().__init__()
        self._rate = rate

    @property
    def rate(self) -> float:
        """The rate in effect: 0 after eval()."""
        return self._rate if self.training else 0.0

    def __call__(self, x: mx.array, key: mx.array | None) -> mx.array:
        if not self.rate:
            return x
        return _drop(x, dropout_mask(key, x.shape, self.rate)) * (1 / (1 - self.rate))


def _drop(x: mx.array, keep: mx.array) -> mx.array:
    """x where `keep` [bool, of its shape] is True, else 0. A product with a bool makes a float32 copy of it first."""
    return mx.where(keep, x, 0) if on_gpu() else x * keep


def attention(q: mx.array, k: mx.array, v: mx.array, mask: mx.array, dropout: Dropout, key: mx.array | None):
    """Scaled dot-product attention with dropout on its weights.

    q [B, H, T, Dh], k and v [B, H, S, Dh], mask bool [B, 1, T, S] and causal -> [B, H, T, Dh].
    """
    scale, rate = q.shape[-1] ** -0.5, dropout.rate
    if not rate and (q.shape[2] == 1 or on_gpu()):  # MLX's fused attention has no dropout and is slow on CPU
        return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask=mask)
    q, k, v = mx.contiguous(q * scale), mx.contiguous(k), mx.contiguous(v * (1 / (1 - rate)) if rate else v)
    n_queries, n_cached = q.shape[2], k.shape[2] - q.shape[2]
    starts = range(0, n_queries, QUERY_BLOCK)
    keys = mx.random.split(key, len(starts)) if rate else [None] * len(starts)
    out = []
    for start, block_key in zip(starts, keys, strict=True):
        end = min(start + QUERY_BLOCK, n_queries)
        seen = n_cached + end  # causal: queries in this block attend to keys up to `seen`
        shape = (*q.shape[:2], end - start, seen)
        keep = dropout_mask(block_key, shape, rate) if rate else None
        out.append(_attend(q[:, :, start:end], k[:, :, :seen], v[:, :, :seen], mask[:, :, start:end, :seen], keep)[0])
    return mx.concatenate(out, axis=2)


def attention_in_training(q, fresh, cache, mask: mx.array, dropout: Dropout, key: mx.array | None) -> mx.array:
    """Training on a GPU: `attention` to all columns of a TrainingCache, after writing this pass's into it.

    q [B, H, t, Dh] of the last t columns; fresh: this pass's keys and values, [B, H, T, Dh] each; mask bool
    [B, 1, t, W], W the first columns that the pass may see -> [B, H, t, Dh].

    The backward pass reads keys and values from the cache as the last pass has left it, so that no pass keeps its own:
    those of later passes have weight 0 in this one. Gradients of the buffers come back from pass to pass, as those of
    parameters do (`linear_in_turn`), through the cache's state.
    """
    q = _in_order(q)
    start, n_new, width = cache.n_columns, fresh[0].shape[2], mask.shape[-1]
    scale, rate = q.shape[-1] ** -0.5, dropout.rate
    keep = dropout_mask(key, (*q.shape[:3], width), rate) if rate else None

    def dropped(weights: mx.array) -> mx.array:  # [B, H, T, W]
        return weights if keep is None else _drop(weights * (1 / (1 - rate)), keep)

    @mx.custom_function
    def attend(q, fresh, state):
        cache.write(fresh)
        k, v = (buffer[:, :, :width] for buffer in cache.buffers)
        scores = (q @ k.swapaxes(-1, -2)).astype(mx.float32) * scale
        weights = mx.softmax(mx.where(mask, scores, LOWEST), axis=-1, precise=True)
        state = state or tuple(mx.broadcast_to(mx.zeros((), x.dtype), x.shape) for x in cache.buffers)
        return dropped(weights).astype(v.dtype) @ v, weights, state

    @attend.vjp
    def attend_vjp(primals, cotangents, outputs):
        q, _, state = primals
        gradient = _in_order(cotangents[0])  # [B, H, T, Dh]
        k, v = (buffer[:, :, :width] for buffer in cache.buffers)
        again = dropped(_again(outputs[1:2], gradient)[0])
        to_scores = _softmax_vjp(outputs, again, gradient, gradient @ v.swapaxes(-1, -2)) * scale
        pairs = (to_scores.astype(q.dtype), q), (again.astype(q.dtype), gradient)
        totals = [_plus_product(c[:, :, :width], *pair) for c, pair in zip(cotangents[2], pairs, strict=True)]
        [to_q] = mx.depends([pairs[0][0] @ k], totals)  # see _linear_vjp
        return to_q, tuple(total[:, :, start : start + n_new] for total in totals), tuple(totals) if state else ()

    found: Any = attend(q, fresh, cache.state)
    cache.advance(found[2], n_new)
    return found[0]


def _in_order(rows: mx.array) -> mx.array:
    """rows [B, H, T, Dh] as products want them, which copy anything else each time; one column is right as it is."""
    return rows if rows.shape[2] == 1 else mx.contiguous(rows)


def _plus_product(total: mx.array, weights: mx.array, rows: mx.array) -> mx.array:
    """total [B, H, W, Dh] + weights^T rows; weights [B, H, T, W], rows [B, H, T, Dh]."""
    if rows.shape[2] > 1:
        return mx.addmm(total, weights.swapaxes(-1, -2), rows)
    wide, weights, rows = (x.astype(mx.float32) for x in (total, weights.swapaxes(-1, -2), rows))
    return (wide + weights * rows).astype(total.dtype)  # one element-wise kernel


@mx.custom_function
def _attend(q, k, v, mask, keep):
    """(softmax(q k^T) * keep) v over one block -> ([B, H, T, Dh], weights [B, H, T, S]); keep None: nothing is dropped.

    The softmax is float32 for any input. A gradient of its own halves its time on CPU.
    """
    weights = _masked_softmax((q @ k.swapaxes(-1, -2)).astype(mx.float32), mask)  # [B, H, T, S]
    return _kept(weights, keep).astype(v.dtype) @ v, weights


@_attend.vjp
def _attend_vjp(primals, cotangents, outputs):
    q, k, v, mask, keep = primals
    gradient = mx.contiguous(cotangents[0])  # [B, H, T, Dh]
    dropped = _kept(outputs[1], keep)
    to_scores = _softmax_vjp(outputs, dropped, gradient, gradient @ v.swapaxes(-1, -2)).astype(gradient.dtype)
    to_k, to_v = to_scores.swapaxes(-1, -2) @ q, dropped.astype(gradient.dtype).swapaxes(-1, -2) @ gradient
    return to_scores @ k, to_k, to_v, mx.zeros_like(mask), None if keep is None else mx.zeros_like(keep)


def _kept(weights: mx.array, keep: mx.array | None) -> mx.array:
    return weights if keep is None else _drop(weights, keep)


def _masked_softmax(scores: mx.array, mask: mx.array) -> mx.array:
    scores = scores + mx.where(mask, 0, LOWEST)
    weights = exp(scores - scores.max(axis=-1, keepdims=True))
    return weights / (weights @ mx.ones((weights.shape[-1], 1)))  # faster than MLX's sums


def _softmax_vjp(outputs, dropped: mx.array, gradient: mx.array, to_weights: mx.array) -> mx.array:
    """Gradient of attention's scores [B, H, T, S] float32.

    outputs: attention's own output and its weights; dropped: the weights after dropout; gradient: of the output;
    to_weights: gradient of the dropped weights.
    """
    out, weights = outputs[:2]
    mean = (gradient.astype(mx.float32) * out).sum(axis=-1, keepdims=True)  # [B, H, T, 1]
    if dropped is weights:
        return weights * (to_weights - mean)
    return dropped * to_weights - weights * mean
