"""GPT-2 in MLX, with the names and the weight layout of Hugging Face's files (Conv1D: [in, out]).

The thought loop calls four methods of it: `embed(ids)`, `make_cache(attention_mask, left_padding)`,
`__call__(embeddings, cache, first)` and `logits(hidden)`. Shapes: B rows, T columns of this pass, of which the last
t = T - first are wanted, S columns with the cache's, D = n_embd, H = n_head, Dh = D / H.
"""

import dataclasses
import difflib
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from models.cache import BufferedCache, LayerCache, TrainingCache, make_cache
from models.ops import (
    Dropout,
    LayerNorm,
    attention,
    attention_in_training,
    dropout_mask,
    gelu_new,
    linear,
    linear_in_turn,
    random_keys,
)
from models.recompute import run_and_recompute
from parallel.streams import on_gpu

# Of config.json. Other names of Hugging Face (transformers.GPT2Config.attribute_map, and n_ctx of older files).
ALIASES = {
    "hidden_size": "n_embd", "num_hidden_layers": "n_layer", "num_attention_heads": "n_head",
    "max_position_embeddings": "n_positions", "n_ctx": "n_positions",
}  # fmt: skip
MISNAMED = {  # names of other models that `transformers` ignores in a GPT-2's file
    "intermediate_size": "n_inner", "hidden_act": "activation_function", "block_size": "n_positions",
    "dropout": "embd_pdrop, attn_pdrop and resid_pdrop",
}  # fmt: skip
ACTIVATIONS = (  # names of one function in transformers
    "gelu_new", "gelu_pytorch_tanh", "gelu_python_tanh", "gelu_accurate", "gelu_fast",
)  # fmt: skip
FIXED = {
    "model_type": "gpt2", "scale_attn_weights": True, "tie_word_embeddings": True, "bias": True,
    "position_embedding_type": "absolute",
}  # fmt: skip
UNSUPPORTED = (
    "scale_attn_by_inverse_layer_idx", "reorder_and_upcast_attn", "add_cross_attention", "is_encoder_decoder",
    "pruned_heads", "quantization", "quantization_config", "rope_scaling", "rope_parameters", "sliding_window",
    "use_sliding_window", "num_key_value_heads", "multi_query",
)  # fmt: skip
LARGEST = {  # a typing error is refused before it fills the memory; GPT-2 XL has 48 layers, 1,600 wide
    "vocab_size": 10**7, "n_positions": 10**7, "n_embd": 10**6, "n_layer": 10**4, "n_head": 10**6, "n_inner": 10**7,
}  # fmt: skip

Keys = list[mx.array | None]  # keys, or masks, of a block's three dropouts; None where nothing is dropped


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
        """A config.json's content under its own names or their aliases.

        Raises ValueError for what this GPT-2 cannot do: nothing that changes the model is ignored.
        """
        if not isinstance(values, dict):
            raise ValueError(f"expected an object of names and values, found {type(values).__name__}")
        _check_fixed(values)
        values = _without_aliases(values)
        names = [f.name for f in dataclasses.fields(cls)]
        _check_spelling(values, names)
        config = cls(**{name: value for name, value in values.items() if name in names})
        _check_numbers(config)
        if config.n_embd % config.n_head:
            raise ValueError(f"n_embd {config.n_embd} is not a multiple of n_head {config.n_head}")
        if config.activation_function not in ACTIVATIONS:
            raise ValueError(f"activation_function: expected {ACTIVATIONS[0]}, found {config.activation_function!r}")
        return config

    def to_dict(self, end_of_text: int) -> dict:
        """The content of a config.json that `transformers` opens as GPT2LMHeadModel; its generate stops there."""
        ids = {"bos_token_id": end_of_text, "eos_token_id": end_of_text}  # GPT-2 has one token for both
        return {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]} | ids | dataclasses.asdict(self)

    @property
    def n_parameters(self) -> int:
        """Parameters of a model of this shape."""
        d, inner = self.n_embd, self.n_inner or 4 * self.n_embd
        block = 4 * d * (d + 1) + 2 * d * inner + inner + d + 4 * d  # attention, MLP, two layer norms
        return (self.vocab_size + self.n_positions + 2) * d + self.n_layer * block


def _check_fixed(values: dict) -> None:
    """Raise ValueError where a key has another value than the only one that this GPT-2 has."""
    for name, expected in FIXED.items():
        if values.get(name, expected) not in (expected, None):
            raise ValueError(f"{name}: expected {expected}, found {values[name]!s:.60}; this GPT-2 cannot do that")
    for name in UNSUPPORTED:
        if values.get(name):
            raise ValueError(f"{name}: not supported")


def _without_aliases(values: dict) -> dict:
    """The values with each alias under its own name.

    Raises ValueError where both are given: `transformers` takes the alias. n_ctx may stand beside an equal n_positions,
    as in GPT-2's own file.
    """
    result = {name: value for name, value in values.items() if name not in ALIASES}
    for alias, name in ALIASES.items():
        value = values.get(alias)
        if value is None or (alias == "n_ctx" and value == result.get(name)):
            continue
        if name in result:
            raise ValueError(f"{alias} {value!r:.60} and {name} {result[name]!r:.60} mean the same; keep {name}")
        result[name] = value
    return result


def _check_spelling(values: dict, names: list[str]) -> None:
    for key in values:
        close = MISNAMED.get(key) or next(iter(difflib.get_close_matches(key, names, n=1, cutoff=0.8)), None)
        if close and key not in names and values[key] is not None:
            raise ValueError(f"{key}: unknown key; did you mean {close}?")


def _check_numbers(config: GPT2Config) -> None:
    for name, most in LARGEST.items():
        value = getattr(config, name)
        if name == "n_inner" and value is None:
            continue
        if type(value) is not int or not 1 <= value <= most:
            raise ValueError(f"{name}: expected a positive whole number up to {most:,}, found {value!r:.60}")
    for name in ("embd_pdrop", "attn_pdrop", "resid_pdrop", "layer_norm_epsilon", "initializer_range"):
        value = getattr(config, name)
        if type(value) not in (int, float) or not 0 <= value < 1:
            raise ValueError(f"{name}: expected a number from 0 to below 1, found {value!r:.60}")
    if not config.layer_norm_epsilon:
        raise ValueError("layer_norm_epsilon: expected a number above 0; GPT-2's is 1e-5")


class Conv1D(nn.Module):
    """A linear layer whose weight is kept as [in, out], the layout of GPT-2's files."""

    def __init__(self, n_in: int, n_out: int):
        super().__init__()
        self.weight = mx.zeros((n_in, n_out))
        self.bias = mx.zeros((n_out,))

    def __call__(self, x: mx.array) -> mx.array:
        """x [..., in] -> [..., out] in the weight's type. The bias is float32, and its gradient a float32 sum."""
        if on_gpu() and self.training:
            biases = mx.broadcast_to(self.bias, (x.shape[0], self.bias.shape[-1]))  # which a first pass made of it
            parts = linear_in_turn(x.astype(self.weight.dtype), self.weight, biases)
            self.weight, self.bias = parts[1:]
            return parts[0]
        return linear(x, self.weight, self.bias)


class Attention(nn.Module):
    """Multi-head self-attention over this pass's columns and the cache's."""

    def __init__(self, config: GPT2Config):
        super().__init__()
        self.n_head = config.n_head
        self.c_attn = Conv1D(config.n_embd, 3 * config.n_embd)
        self.c_proj = Conv1D(config.n_embd, config.n_embd)
        self.attn_dropout = Dropout(config.attn_pdrop)
        self.resid_dropout = Dropout(config.resid_pdrop)

    def __call__(self, x: mx.array, mask: mx.array, cache: LayerCache, keys: Keys) -> mx.array:
        """x [B, T, D], mask bool [B, 1, t, S] for the last t columns -> [B, t, D]; the cache grows by T columns."""
        B, T, D = x.shape
        # Split along an axis of its own, so that the backward pass writes all gradients straight into one array.
        parts = mx.split(self.c_attn(x).reshape(B, T, 3, self.n_head, -1), 3, axis=2)  # q, k, v: [B, T, 1, H, Dh] each
        q, k, v = (_swap_heads_and_columns(part.squeeze(2)) for part in parts)
        q = q[:, :, -mask.shape[2] :]
        if isinstance(cache, TrainingCache):
            out = attention_in_training(q, (k, v), cache, mask, self.attn_dropout, keys[0])
        else:
            k, v = cache.update_and_fetch(k, v)  # [B, H, S, Dh]
            out = attention(q, k, v, mask, self.attn_dropout, keys[0])  # [B, H, t, Dh]
        out = _swap_heads_and_columns(out).reshape(B, -1, D)
        return self.resid_dropout(self.c_proj(out), keys[1])


def _swap_heads_and_columns(x: mx.array) -> mx.array:
    """[B, T, H, Dh] -> [B, H, T, Dh] or back. One column is not transposed: products would copy such an array."""
    B, one, other, Dh = x.shape
    return x.reshape(B, other, one, Dh) if 1 in (one, other) else x.transpose(0, 2, 1, 3)


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
        self.ln_1 = LayerNorm(config.n_embd, config.layer_norm_epsilon)
        self.attn = Attention(config)
        self.ln_2 = LayerNorm(config.n_embd, config.layer_norm_epsilon)
        self.mlp = MLP(config)

    def __call__(self, x: mx.array, mask: mx.array, cache: LayerCache, keys: Keys) -> mx.array:
        """x [B, T, D], mask bool [B, 1, t, S] -> the last t columns [B, t, D]; the cache grows by T columns."""
        x = x[:, -mask.shape[2] :] + self.attn(self.ln_1(x), mask, cache, keys[:2])
        return x + self.mlp(self.ln_2(x), keys[2])


class GPT2(nn.Module):
    """GPT-2 with its tied output layer; fresh weights are drawn from mx.random as GPT-2's were."""

    def __init__(self, config: GPT2Config):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.n_positions, config.n_embd)
        self.drop = Dropout(config.embd_pdrop)
        self.h = [Block(config) for _ in range(config.n_layer)]
        self.ln_f = LayerNorm(config.n_embd, config.layer_norm_epsilon)
        self.grad_checkpoint = False
        self._initialize()

    def embed(self, ids: mx.array) -> mx.array:
        """Token embeddings without positions: ids [B, T] -> [B, T, D]."""
        return self.wte(ids)

    def make_cache(self, attention_mask: mx.array, left_padding: mx.array) -> list[LayerCache]:
        """An empty cache for each block; attention_mask [B, S] bool of all columns to come, left_padding [B] int."""
        on_this = (TrainingCache if self.training else BufferedCache) if on_gpu() else LayerCache
        return make_cache(len(self.h), attention_mask, left_padding, on_this)

    def __call__(self, embeddings: mx.array, cache: list[LayerCache], first: int = 0) -> mx.array:
        """Run one pass behind the columns of the cache, which grows by T.

        embeddings [B, T, D] -> the hidden states AFTER the final layer norm of the columns from `first` on [B, t, D].
        For the earlier ones the last block computes nothing but keys and values.
        """
        T = embeddings.shape[1]
        positions = cache[0].offset[:, None] + mx.arange(T)  # [B, T]
        positions = mx.clip(positions, 0, self.config.n_positions - 1)  # padding, and rows whose answer has ended
        mask = cache[0].make_mask(T)
        n_keys = 1 + 3 * len(self.h)
        keys = random_keys(n_keys) if self.training else [None] * n_keys
        x = self.drop(embeddings + self.wpe(positions), keys.pop())
        if self.training and T == 1 and on_gpu():
            keys = self._masks_at_once(keys, mask.shape)

        masks = [mask] * (len(self.h) - 1) + [mask[:, :, first:]]

        def call(mask: mx.array, block: Block, x: mx.array, cache: LayerCache, keys: Keys) -> mx.array:
            return block(x, mask, cache, keys)

        for i, (block, layer_cache) in enumerate(zip(self.h, cache, strict=True)):
            run = partial(call, masks[i])
            if self.grad_checkpoint and self.training:
                run = partial(run_and_recompute, run)
            x = run(block, x, layer_cache, keys[3 * i : 3 * i + 3])
        return self.ln_f(x)

    @contextmanager
    def folded_norms(self) -> Iterator[None]:
        """Make the gains and biases of the blocks' norms a part of the products behind them, while a step is computed.

        (norm(x) * g + b) W + c is norm(x) (g W) + (b W + c). So the sums over all tokens that the gradients of g and b
        are need not be taken in each pass.
        """
        pairs = [pair for block in self.h for pair in ((block.ln_1, block.attn.c_attn), (block.ln_2, block.mlp.c_fc))]
        own = [(norm.pop("weight"), norm.pop("bias"), product.weight, product.bias) for norm, product in pairs]
        for (gain, bias, _, _), (_, product) in zip(own, pairs, strict=True):
            product.bias = product.bias + bias @ product.weight
            product.weight = gain[:, None] * product.weight
        try:
            yield
        finally:
            for (norm, product), parameters in zip(pairs, own, strict=True):
                norm.weight, norm.bias, product.weight, product.bias = parameters

    @property
    def head(self) -> nn.Module:
        """The module that holds the output layer's parameters."""
        return self.wte

    @staticmethod
    def keeps_float32(name: str) -> bool:
        """Whether a parameter stays float32 where products are computed in bfloat16: all but the blocks' matrices.

        MLX adds bfloat16 numbers in bfloat16 on a GPU, and such a sum stops growing at 256 times its terms. The
        gradients of biases, layer norms and embeddings are sums over all tokens.
        """
        return not name.endswith(("c_attn.weight", "c_fc.weight", "c_proj.weight"))

    def logits(self, hidden: mx.array) -> mx.array:
        """The product with the tied embedding: [..., D] -> [..., vocabulary]."""
        return self.wte.as_linear(hidden)

    def saved_tensors(self) -> dict[str, dict[str, mx.array]]:
        """{file name: its tensors}, under Hugging Face's names."""
        tensors = dict(tree_flatten({"transformer": self.parameters()}))
        return {"model.safetensors": tensors}

    def saved_texts(self, end_of_text: int) -> dict[str, str]:
        """{file name: its text}."""
        return {"config.json": json.dumps(self.config.to_dict(end_of_text), indent=1)}

    def _masks_at_once(self, keys: Keys, shape: tuple[int, ...]) -> Keys:
        """All masks that the blocks' dropouts need in one pass, of which `shape` is [B, 1, T, S], in place of keys.

        Passes of one column cost a GPU what their number of kernels costs: this is 4, not 72 and more.
        """
        (B, _, T, S), n, config = shape, len(self.h), self.config
        weights = mx.split(dropout_mask(keys[0], (n, B, config.n_head, T, S), config.attn_pdrop), n)
        residual = mx.split(dropout_mask(keys[1], (2 * n, B, T, config.n_embd), config.resid_pdrop), 2 * n)
        triples = zip(weights, residual[:n], residual[n:], strict=True)
        return [mask.squeeze(0) for triple in triples for mask in triple]

    def _initialize(self) -> None:
        """Normal weights of initializer_range; those that end a residual branch are smaller by sqrt(2 n_layer)."""
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
