"""GPT-2 in MLX, with the names and the weight layout of Hugging Face's files (Conv1D: [in, out]).

The model has three verbs, all that the thought loop needs: `embed(ids)`, `__call__(embeddings, positions, mask, cache)`
and `logits(hidden)`. Shapes: B rows, T columns of this pass, S columns with the cache's, D = n_embd, H heads.
"""

import dataclasses
import math
from dataclasses import dataclass

import cpu_blas  # noqa: F401  must come before mlx
import mlx.core as mx
import mlx.nn as nn
from mlx.nn.utils import checkpoint

Past = tuple[mx.array, mx.array] | None  # a block's keys and values, each [B, H, S, D / H]
Cache = list[Past]
Keys = list[mx.array | None]  # random keys of a block's three dropouts; None where nothing is dropped


@dataclass(frozen=True)
class GPT2Config:
    """The keys of Hugging Face's config.json that shape the model; defaults are GPT-2 small."""

    vocab_size: int = 50_257
    n_positions: int = 1024
    n_embd: int = 768
    n_layer: int = 12
    n_head: int = 12
    n_inner: int | None = None
    layer_norm_epsilon: float = 1e-5
    initializer_range: float = 0.02
    embd_pdrop: float = 0.1
    attn_pdrop: float = 0.1
    resid_pdrop: float = 0.1
    activation_function: str = "gelu_new"

    @classmethod
    def from_dict(cls, values: dict) -> "GPT2Config":
        """Take our keys out of a config.json's content; raises ValueError for what this GPT-2 cannot do."""
        names = {f.name for f in dataclasses.fields(cls)}
        config = cls(**{name: value for name, value in values.items() if name in names})
        if values.get("model_type", "gpt2") != "gpt2":
            raise ValueError(f"model_type: expected gpt2, found {values['model_type']}")
        _check_numbers(config)
        if config.n_embd % config.n_head:
            raise ValueError(f"n_embd {config.n_embd} is not a multiple of n_head {config.n_head}")
        if config.activation_function != "gelu_new":
            raise ValueError(f"activation_function: expected gelu_new, found {config.activation_function}")
        for name in ("scale_attn_by_inverse_layer_idx", "reorder_and_upcast_attn", "add_cross_attention"):
            if values.get(name):
                raise ValueError(f"{name}: not supported")
        return config

    def to_dict(self) -> dict:
        """The content of a config.json that `transformers` opens as GPT2LMHeadModel."""
        eos = min(self.vocab_size - 1, 50_256)
        fixed = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "bos_token_id": eos, "eos_token_id": eos}
        return fixed | dataclasses.asdict(self)


def _check_numbers(config: GPT2Config) -> None:
    for name in ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head", "n_inner"):
        value = getattr(config, name)
        if not (isinstance(value, int) and value >= 1) and not (name == "n_inner" and value is None):
            raise ValueError(f"{name}: expected a positive whole number, found {value!r}")
    for name in ("embd_pdrop", "attn_pdrop", "resid_pdrop", "layer_norm_epsilon", "initializer_range"):
        value = getattr(config, name)
        if not isinstance(value, (int, float)) or not 0 <= value < 1:
            raise ValueError(f"{name}: expected a number from 0 to below 1, found {value!r}")


class Conv1D(nn.Module):
    """A linear layer whose weight is kept as [in, out], the layout of GPT-2's files."""

    def __init__(self, n_in: int, n_out: int):
        super().__init__()
        self.weight = mx.zeros((n_in, n_out))
        self.bias = mx.zeros((n_out,))

    def __call__(self, x: mx.array) -> mx.array:
        return mx.addmm(self.bias, x, self.weight)


LOG2_E = math.log2(math.e)
GELU_SLOPE = 2 * math.sqrt(2 / math.pi)


def gelu_new(x: mx.array) -> mx.array:
    """GPT-2's tanh approximation of GELU, as x * sigmoid(2 u) = x / (1 + 2 ** (-2 u log2(e)))."""
    return _gelu_and_gate(x)[0]


@mx.custom_function
def _gelu_and_gate(x: mx.array):
    # mx.power takes 3 ns an element on CPU, mx.tanh 15, mx.exp 9; the gate is handed to the backward pass
    gate = 1 / (1 + mx.power(2.0, x * (-LOG2_E * GELU_SLOPE * (1 + 0.044715 * (x * x)))))
    return x * gate, gate


@_gelu_and_gate.vjp
def _gelu_vjp(x, cotangents, outputs):
    gate = outputs[1]
    slope = GELU_SLOPE * (1 + (3 * 0.044715) * (x * x))
    return cotangents[0] * (gate * (1 + x * (1 - gate) * slope))


def random_keys(n: int) -> list[mx.array]:
    """Draw n keys from MLX's random state."""
    key = mx.random.randint(-(2**31), 2**31 - 1, (2,)).view(mx.uint32)
    return list(mx.random.split(key, n))


def dropout_mask(key: mx.array, shape: tuple[int, ...], rate: float) -> mx.array:
    """Bool, False with probability `rate` to a 65,536th: mx.random.bernoulli takes 32 random bits for each, this 16."""
    n = math.prod(shape)
    key = mx.stop_gradient(key)  # mx.checkpoint differentiates by all that a block is given
    bits = mx.random.split(key, -(-n // 4)).reshape(-1).view(mx.uint16)
    return bits[:n].reshape(shape) >= round(rate * 65536)


class Dropout(nn.Module):
    """Dropout whose mask is a function of a key, so that a recomputation draws the same one again."""

    def __init__(self, rate: float):
        super().__init__()
        self._rate = rate

    @property
    def rate(self) -> float:
        """What is dropped now: nothing after eval()."""
        return self._rate if self.training else 0.0

    def __call__(self, x: mx.array, key: mx.array | None) -> mx.array:
        return x * dropout_mask(key, x.shape, self.rate) * (1 / (1 - self.rate)) if self.rate else x


QUERIES = 128  # of a block in attention


@mx.custom_function
def attend(q, k, v, mask, keep):
    """softmax(q k^T) where `mask`, times `keep`, times v: [B, H, T, .] and [B, H, S, .] -> ([B, H, T, .], weights).

    The softmax is float32 whatever the inputs are. With a gradient of its own this takes half of the time on CPU.
    """
    scores = (q @ k.swapaxes(-1, -2)).astype(mx.float32) + mx.where(mask, 0, mx.finfo(mx.float32).min)
    weights = mx.power(2.0, (scores - scores.max(axis=-1, keepdims=True)) * LOG2_E)
    weights = weights / weights.sum(axis=-1, keepdims=True)
    return (weights * keep).astype(v.dtype) @ v, weights


@attend.vjp
def _attend_vjp(primals, cotangents, outputs):
    q, k, v, mask, keep = primals
    out, weights = outputs
    gradient = cotangents[0]
    dropped = weights * keep
    mean = (gradient * out).sum(axis=-1, keepdims=True)
    to_scores = (dropped * (gradient @ v.swapaxes(-1, -2)) - weights * mean).astype(q.dtype)
    to_k, to_v = to_scores.swapaxes(-1, -2) @ q, dropped.astype(q.dtype).swapaxes(-1, -2) @ gradient
    return to_scores @ k, to_k, to_v, mx.zeros_like(mask), mx.zeros_like(keep)


class Attention(nn.Module):
    """Multi-head self-attention over this pass's columns and the cache's."""

    def __init__(self, config: GPT2Config):
        super().__init__()
        self.n_head = config.n_head
        self.c_attn = Conv1D(config.n_embd, 3 * config.n_embd)
        self.c_proj = Conv1D(config.n_embd, config.n_embd)
        self.attn_dropout = Dropout(config.attn_pdrop)
        self.resid_dropout = Dropout(config.resid_pdrop)

    def __call__(self, x: mx.array, mask: mx.array, past: Past, keys: Keys):
        """x [B, T, D], mask bool [B or 1, 1, T, S] -> (output [B, T, D], (keys, values) [B, H, S, D / H])."""
        B, T, D = x.shape
        parts = mx.split(self.c_attn(x), 3, axis=-1)
        q, k, v = (part.reshape(B, T, self.n_head, -1).transpose(0, 2, 1, 3) for part in parts)  # [B, H, T, D / H]
        if past is not None:
            k, v = mx.concatenate([past[0], k], axis=2), mx.concatenate([past[1], v], axis=2)
        out = self._attend(q, k, v, mask, keys[0]).transpose(0, 2, 1, 3).reshape(B, T, D)
        return self.resid_dropout(self.c_proj(out), keys[1]), (k, v)

    def _attend(self, q, k, v, mask, key):
        scale = q.shape[-1] ** -0.5
        rate = self.attn_dropout.rate
        if not rate and (q.shape[2] == 1 or mx.default_device() == mx.Device(mx.gpu)):
            return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask=mask)
        q, v = q * scale, v * (1 / (1 - rate))  # the fused form has no dropout, and is slow on CPU
        T, past = q.shape[2], k.shape[2] - q.shape[2]
        starts = range(0, T, QUERIES)
        keys = mx.random.split(key, len(starts)) if rate else [None] * len(starts)
        out = []
        for start, key in zip(starts, keys, strict=True):  # nobody looks ahead: a block needs the columns up to its end
            end = min(start + QUERIES, T)
            seen = past + end
            keep = dropout_mask(key, (*q.shape[:2], end - start, seen), rate) if rate else mx.array(True)
            block = q[:, :, start:end], k[:, :, :seen], v[:, :, :seen], mask[:, :, start:end, :seen]
            out.append(attend(*block, keep)[0])
        return mx.concatenate(out, axis=2)


class MLP(nn.Module):
    """The two feed-forward layers of a block."""

    def __init__(self, config: GPT2Config):
        super().__init__()
        inner = config.n_inner or 4 * config.n_embd
        self.c_fc = Conv1D(config.n_embd, inner)
        self.c_proj = Conv1D(inner, config.n_embd)
        self.dropout = Dropout(config.resid_pdrop)

    def __call__(self, x: mx.array, key: mx.array | None) -> mx.array:
        return self.dropout(self.c_proj(gelu_new(self.c_fc(x))), key)


class Block(nn.Module):
    """One pre-norm transformer block."""

    def __init__(self, config: GPT2Config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, config.layer_norm_epsilon)
        self.attn = Attention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, config.layer_norm_epsilon)
        self.mlp = MLP(config)

    def __call__(self, x: mx.array, mask: mx.array, past: Past, keys: Keys):
        out, kept = self.attn(self.ln_1(x), mask, past, keys[:2])
        x = x + out
        return x + self.mlp(self.ln_2(x), keys[2]), kept


class GPT2(nn.Module):
    """GPT-2 with its tied output layer; a fresh one is initialised as GPT-2 is (draws from mx.random)."""

    def __init__(self, config: GPT2Config):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.n_positions, config.n_embd)
        self.drop = Dropout(config.embd_pdrop)
        self.h = [Block(config) for _ in range(config.n_layer)]
        self.ln_f = nn.LayerNorm(config.n_embd, config.layer_norm_epsilon)
        self.grad_checkpoint = False
        self._initialise()

    def embed(self, ids: mx.array) -> mx.array:
        """Token embeddings without positions: ids [B, T] -> [B, T, D]."""
        return self.wte(ids)

    def __call__(self, embeddings: mx.array, positions: mx.array, mask: mx.array, cache: Cache | None = None):
        """Run one pass behind whatever the cache holds.

        embeddings [B, T, D], positions [B, T], mask bool [B or 1, 1, T, S], True where a column may be seen.
        Returns the hidden states AFTER the final layer norm [B, T, D] and the cache grown by T columns.
        """
        n_layer = len(self.h)
        keys = random_keys(1 + 3 * n_layer) if self.training else [None] * (1 + 3 * n_layer)
        x = self.drop(embeddings + self.wpe(positions), keys.pop())
        grown = []
        for i, (block, past) in enumerate(zip(self.h, cache or [None] * n_layer, strict=True)):
            run = checkpoint(block) if self.grad_checkpoint and self.training else block
            x, kept = run(x, mask, past, keys[3 * i : 3 * i + 3])
            grown.append(kept)
        return self.ln_f(x), grown

    def logits(self, hidden: mx.array) -> mx.array:
        """The product with the tied embedding: [..., D] -> [..., vocabulary]."""
        return self.wte.as_linear(hidden)

    def _initialise(self) -> None:
        """Normal weights of initializer_range; those that end a residual branch smaller by sqrt(2 n_layer)."""
        std = self.config.initializer_range
        layers = [self.wte, self.wpe]
        residual = []
        for block in self.h:
            layers += [block.attn.c_attn, block.mlp.c_fc]
            residual += [block.attn.c_proj, block.mlp.c_proj]
        for layer in layers:
            layer.weight = mx.random.normal(layer.weight.shape) * std
        for layer in residual:
            layer.weight = mx.random.normal(layer.weight.shape) * (std / math.sqrt(2 * self.config.n_layer))
