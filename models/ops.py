"""The operations that a training step spends its time in: cross-entropy, GELU, dropout and attention with dropout.

On a CPU they are written by hand, because it was measured: MLX's own are slower there, and its cross-entropy is
inexact. On a GPU the library's are taken where they are as exact. Shapes: B rows, H heads, T queries, S keys, Dh = the
width of a head, N labels, V = vocabulary.
"""

import math

import mlx.core as mx
import mlx.nn as nn

from parallel.streams import on_gpu

LOG2_E = math.log2(math.e)
GELU_SLOPE = 2 * math.sqrt(2 / math.pi)
QUERY_BLOCK = 128  # queries that attention computes at a time
SUM_BLOCK = 256  # terms that a long float32 sum adds before it adds the sums


def exp(x: mx.array) -> mx.array:
    """e ** x. On a CPU mx.power(2, x) takes 3 ns an element and mx.exp 9."""
    return mx.exp(x) if on_gpu() else mx.power(2.0, x * LOG2_E)


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


def linear(x: mx.array, weight: mx.array, bias: mx.array) -> mx.array:
    """x [..., in] @ weight [in, out] + bias [out], in the weight's type."""
    if weight.dtype == bias.dtype:
        return mx.addmm(bias, x, weight)
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


@mx.custom_function
def layer_norm(x: mx.array, weight: mx.array, bias: mx.array, eps: float) -> mx.array:
    """Layer norm of x [B, T, D], for training on GPUs: its gradients of weight and bias [D] are sums in two steps."""
    return mx.fast.layer_norm(x, weight, bias, eps)


@layer_norm.vjp
def _layer_norm_vjp(primals, cotangent, out):
    x, weight, _, eps = primals
    to_normal = [cotangent * weight]
    [normal], [to_x] = mx.vjp(lambda x: mx.fast.layer_norm(x, None, None, eps), _again([x], cotangent), to_normal)
    to_weight, to_bias = (sum_of_columns(g).sum(axis=0) for g in (cotangent * normal, cotangent))
    [to_x] = mx.depends([to_x], [to_weight, to_bias])  # see _linear_vjp
    return to_x, to_weight, to_bias, None


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
        keep = dropout_mask(block_key, shape, rate) if rate else mx.array(True)
        out.append(_attend(q[:, :, start:end], k[:, :, :seen], v[:, :, :seen], mask[:, :, start:end, :seen], keep)[0])
    return mx.concatenate(out, axis=2)


def attention_in_pieces(q: mx.array, pieces: tuple, mask: mx.array, dropout: Dropout, key: mx.array | None):
    """Training on a GPU: (`attention` over the pieces of a PiecewiseCache, those pieces for the next pass).

    The pieces are joined again in the backward pass, so that not every pass keeps a copy. The first one is handed on
    from pass to pass as parameters are (`linear_in_turn`).
    """
    rate, n_keys = dropout.rate, sum(piece.shape[3] for piece in pieces)
    keep = dropout_mask(key, (*q.shape[:3], n_keys), rate) if rate else mx.array(True)
    found = _attend_pieces(q * q.shape[-1] ** -0.5, pieces, mask, keep)
    return found[0] * (1 / (1 - rate)), (found[2], *pieces[1:])


@mx.custom_function
def _attend_pieces(q, pieces, mask, keep):
    return *_attend_forward(q, *_keys_and_values(pieces), mask, keep), pieces[0]


@_attend_pieces.vjp
def _attend_pieces_vjp(primals, cotangents, outputs):
    q, pieces, mask, keep = primals
    gradient, n = mx.contiguous(cotangents[0]), pieces[0].shape[3]  # [B, H, T, Dh]
    k, v = _keys_and_values(_again(pieces, gradient))
    to_scores, dropped = _softmax_vjp(outputs[:2], keep, gradient, gradient @ v.swapaxes(-1, -2))
    to_first, *to_later = _to_pieces(cotangents[2], [to_scores, dropped], [q, gradient], n)
    [to_q] = mx.depends([to_scores @ k], [to_first])  # see _linear_vjp
    return to_q, (to_first, *to_later), mx.zeros_like(mask), mx.zeros_like(keep)


def _to_pieces(so_far: mx.array, weights: list[mx.array], rows: list[mx.array], n: int) -> list[mx.array]:
    """Gradients of keys and values, [2, B, H, S, Dh] for each piece, of which the first has n columns.

    weights [B, H, T, S] and rows [B, H, T, Dh]: those of keys and those of values.
    """
    weights = [part.swapaxes(-1, -2) for part in weights]  # [B, H, S, T]
    if weights[0].shape[2] == n:
        return [so_far + mx.stack([w @ x for w, x in zip(weights, rows, strict=True)])]
    both, rows = mx.stack(weights), mx.stack(rows)  # small here: later passes have few queries
    return [mx.addmm(so_far, both[..., :n, :], rows), both[..., n:, :] @ rows]


def _keys_and_values(pieces) -> list[mx.array]:
    """Of all columns, [B, H, S, Dh] each."""
    joined = mx.concatenate(pieces, axis=3) if len(pieces) > 1 else pieces[0]
    return [part.squeeze(0) for part in mx.split(joined, 2)]


@mx.custom_function
def _attend(q, k, v, mask, keep):
    """(softmax(q k^T) * keep) v over one block -> ([B, H, T, Dh], weights [B, H, T, S]).

    The softmax is float32 for any input. A gradient of its own halves its time on CPU.
    """
    return _attend_forward(q, k, v, mask, keep)


def _attend_forward(q, k, v, mask, keep):
    weights = _masked_softmax((q @ k.swapaxes(-1, -2)).astype(mx.float32), mask)  # [B, H, T, S]
    return _drop(weights, keep).astype(v.dtype) @ v, weights


def _masked_softmax(scores: mx.array, mask: mx.array) -> mx.array:
    lowest = mx.finfo(mx.float32).min  # not -inf: a row that may attend to nothing gives no NaN
    if on_gpu():
        return mx.softmax(mx.where(mask, scores, lowest), axis=-1, precise=True)
    scores = scores + mx.where(mask, 0, lowest)
    weights = exp(scores - scores.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


@_attend.vjp
def _attend_vjp(primals, cotangents, outputs):
    q, k, v, mask, keep = primals
    gradient = mx.contiguous(cotangents[0])  # [B, H, T, Dh]
    to_scores, dropped = _softmax_vjp(outputs, keep, gradient, gradient @ v.swapaxes(-1, -2))
    to_k, to_v = to_scores.swapaxes(-1, -2) @ q, dropped.swapaxes(-1, -2) @ gradient  # [B, H, S, Dh]
    return to_scores @ k, to_k, to_v, mx.zeros_like(mask), mx.zeros_like(keep)


def _softmax_vjp(outputs, keep: mx.array, gradient: mx.array, to_weights: mx.array) -> tuple[mx.array, mx.array]:
    """(gradient of the scores, weights after dropout), [B, H, T, S] each in the gradient's type.

    outputs: attention's own output and its weights; gradient: of the output; to_weights: gradient of dropped weights.
    """
    out, weights = outputs
    dropped = _drop(_again([weights], gradient)[0] if on_gpu() else weights, keep)
    mean = (gradient.astype(mx.float32) * out).sum(axis=-1, keepdims=True)  # [B, H, T, 1]
    to_scores = dropped * to_weights - weights * mean
    return to_scores.astype(gradient.dtype), dropped.astype(gradient.dtype)
