"""Any model of mlx-lm as Coconut's base: the same four methods as GPT-2's, over mlx-lm's own code.

Nothing of mlx-lm is copied. Two of a model's modules get a subclass that returns floating-point input as it is: with
that the trunk takes embeddings in the place of token ids, and the whole model, given hidden states, is its own output
layer with all scales and caps. Those that hold norms, biases and embeddings get one for bfloat16 (models/sums.py).
Shapes: B rows, T columns of this pass, D = width of the model.
"""

import importlib
import json
import resource
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from models.cache import LayerCache, make_cache
from models.recompute import repeat_dropout, run_and_recompute
from models.rope import check_rope, flat_rope
from models.sums import subclass, take_float32, trained_type
from utils import UserError, warn

# Types whose definitions and whose equality with transformers tests/test_mlx_lm.py holds; others are tried, with a
# warning, where self_check passes. Not the first Gemma: mlx-lm computes its GELU exactly, transformers by tanh.
TESTED = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "phi3", "smollm3", "olmo2")
EMBEDDINGS = (nn.Embedding, nn.QuantizedEmbedding)


@dataclass(frozen=True)
class LanguageConfig:
    """A config.json of Hugging Face, of any model type but gpt2, and the files that a checkpoint takes with it."""

    values: dict
    texts: dict[str, str] = field(default_factory=dict)  # {name: text} of the tokenizer's files

    @classmethod
    def from_dict(cls, values: dict) -> "LanguageConfig":
        """Raises ValueError where the keys are missing that every model of mlx-lm has."""
        needed = ("model_type", "vocab_size", "hidden_size", "num_hidden_layers", "max_position_embeddings")
        missing = [name for name in needed if name not in values]
        if missing:
            raise ValueError(f"{', '.join(missing)} missing; a language model of text alone is expected")
        wrong = [name for name in needed[1:] if type(values[name]) is not int or values[name] < 1]
        if wrong:
            raise ValueError(f"{wrong[0]}: expected a positive whole number, found {values[wrong[0]]!r:.60}")
        if any(values.get(name) for name in ("attention_dropout", "resid_pdrop", "embd_pdrop")):
            warn(f"{values['model_type']}: its config.json asks for dropout, which mlx-lm's models do not have")
        return cls(flat_rope(values))

    @property
    def model_type(self) -> str:
        return self.values["model_type"]

    @property
    def vocab_size(self) -> int:
        return self.values["vocab_size"]

    @property
    def n_positions(self) -> int:
        return self.values["max_position_embeddings"]

    @property
    def n_layer(self) -> int:
        return self.values["num_hidden_layers"]

    @property
    def n_embd(self) -> int:
        return self.values["hidden_size"]

    @property
    def n_head(self) -> int:
        return self._size("num_attention_heads", max(1, self.n_embd // 64))

    @property
    def n_kv_head(self) -> int:
        """Heads of keys and values."""
        return self._size("num_key_value_heads", self.n_head)

    @property
    def head_dim(self) -> int:
        """Width of a head."""
        return self._size("head_dim", self.n_embd // self.n_head)

    @property
    def n_inner(self) -> int:
        """Width between the feed-forward layers."""
        return self._size("intermediate_size", 4 * self.n_embd)

    def _size(self, name: str, default: int) -> int:
        """A size of the layers, the largest where each has its own; the default where it goes by another name."""
        found = self.values.get(name)
        sizes = [size for size in (found if isinstance(found, list) else [found]) if isinstance(size, int) and size > 0]
        return max(sizes, default=default)

    @property
    def quantization(self) -> dict | None:
        """How the weights are quantized: {"bits", "group_size"}; None where they are not."""
        return self.values.get("quantization")

    def to_dict(self, end_of_text: int) -> dict:
        """The content of a config.json that `transformers` opens; its generate stops at end_of_text."""
        changed = {"eos_token_id": end_of_text, "torch_dtype": "float32"}
        return {name: value for name, value in self.values.items() if name != "dtype"} | changed


class LanguageModel(nn.Module):
    """A model of mlx-lm between token embeddings and hidden states, with a cache that knows positions."""

    def __init__(self, lm: nn.Module, config: LanguageConfig):
        super().__init__()
        self.lm, self.config = lm, config
        self._table = _token_embedding(lm.model)  # its name: a second reference would count as a second module
        self._run = type(lm.model).__call__
        self._recomputes = False
        self._float32 = take_float32(lm)
        for module in (lm.model, self.embedding):
            _pass_floats(module)

    @property
    def embedding(self) -> nn.Module:
        """The table of token embeddings."""
        return self.lm.model[self._table]

    def embed(self, ids: mx.array) -> mx.array:
        """Token embeddings without scale or positions, in the layers' type: ids [B, T] -> [B, T, D]."""
        return self.embedding(ids).astype(trained_type(self.lm.layers))

    def make_cache(self, attention_mask: mx.array, left_padding: mx.array) -> list[LayerCache]:
        """An empty cache for each layer; attention_mask [B, S] bool of all columns to come, left_padding [B] int."""
        return make_cache(len(self.lm.layers), attention_mask, left_padding)

    def __call__(self, embeddings: mx.array, cache: list[LayerCache], first: int = 0) -> mx.array:
        """Run one pass behind the cache's columns, embeddings [B, T, D].

        Returns the states after the last norm [B, T - first, D], of the columns from `first` on.
        """
        # A slice, because Gemma 3 scales its input in place, which would change the caller's array.
        return self._run(self.lm.model, embeddings[...], cache=cache)[:, first:]

    @property
    def head(self) -> nn.Module:
        """The module that holds the output layer's parameters."""
        return self.lm.lm_head if "lm_head" in self.lm else self.embedding

    def keeps_float32(self, name: str) -> bool:
        """Whether a parameter stays float32 where products are computed in bfloat16; its gradient is a long sum."""
        return name.partition(".lm.")[2] in self._float32

    def logits(self, hidden: mx.array) -> mx.array:
        """The model's own output layer: [..., D] -> [..., vocabulary]."""
        return self.lm(hidden)

    def saved_tensors(self) -> dict[str, dict[str, mx.array]]:
        """{file name: its tensors}, under Hugging Face's names."""
        return {"model.safetensors": dict(tree_flatten(self.lm.parameters()))}

    def saved_texts(self, end_of_text: int) -> dict[str, str]:
        """{file name: its text}: config.json and the tokenizer's files, so that a checkpoint needs no other folder."""
        return self.config.texts | {"config.json": json.dumps(self.config.to_dict(end_of_text), indent=1)}

    @property
    def grad_checkpoint(self) -> bool:
        """Whether training keeps no activations inside a layer and computes them again in the backward pass."""
        return self._recomputes

    @grad_checkpoint.setter
    def grad_checkpoint(self, wanted: bool) -> None:
        if wanted and not self._recomputes:
            for layer in self.lm.layers:
                _recompute(layer)
        self._recomputes = wanted


def build(values: dict) -> nn.Module:
    """A model of mlx-lm with fresh weights for a config.json.

    Raises UserError where mlx-lm is missing or does not know the model type.
    """
    with _keeping_file_limit():
        try:
            names = importlib.import_module("mlx_lm.utils").MODEL_REMAPPING
        except ImportError as error:
            raise UserError(
                f"model_type {values['model_type']}: `pip install -r requirements-llm.txt` to use other models than "
                f"GPT-2 ({error})"
            ) from error
    name = names.get(values["model_type"], values["model_type"])
    try:
        module = importlib.import_module(f"mlx_lm.models.{name}")
    except ImportError as error:
        raise UserError(f"model_type {values['model_type']}: the installed mlx-lm has no such model") from error
    try:
        lm = module.Model(module.ModelArgs.from_dict(values))
    except Exception as error:  # a wrong value fails anywhere in mlx-lm
        raise UserError(f"model_type {name}: mlx-lm cannot build it from its config.json ({error!r:.200})") from error
    if not hasattr(lm, "layers") or not callable(getattr(lm, "model", None)):
        raise UserError(f"model_type {name}: its model in mlx-lm has no layers or no trunk that can be used alone")
    check_rope(lm, values)
    if name == "gemma2":
        for layer in lm.layers:
            _widen_mask(layer.self_attn)
    return lm


@contextmanager
def _keeping_file_limit():
    """mlx_lm.utils sets the limit of open files when it is imported, to fewer than many machines have."""
    original = resource.setrlimit
    resource.setrlimit = lambda *_: None
    try:
        yield
    finally:
        resource.setrlimit = original


def _token_embedding(trunk: nn.Module) -> str:
    found = [name for name, module in trunk.children().items() if isinstance(module, EMBEDDINGS)]
    if len(found) != 1:
        raise UserError(f"{type(trunk).__name__} of mlx-lm has {len(found)} token embeddings; one is expected")
    return found[0]


def _pass_floats(module: nn.Module) -> None:
    own = type(module).__call__

    def call(self, x, *arguments, **named):
        return x if mx.issubdtype(x.dtype, mx.floating) else own(self, x, *arguments, **named)

    subclass(module, __call__=call)


def _widen_mask(attention: nn.Module) -> None:
    """mlx-lm's Gemma 2 has an axis for groups of heads, and would take a mask's rows for groups."""
    own = type(attention).__call__

    def call(self, x, mask=None, cache=None):
        wide = mask[:, :, None] if self.repeats > 1 and mask is not None and mask.ndim == 4 else mask  # [B, 1, 1, T, S]
        return own(self, x, wide, cache)

    subclass(attention, __call__=call)


def _recompute(layer: nn.Module) -> None:
    """Let a layer keep no activations in training."""
    own = type(layer).__call__

    def call(self, x, mask=None, cache=None):
        if not self.training:
            return own(self, x, mask, cache=cache)

        def run(twin: nn.Module, x: mx.array, cache: LayerCache, keys: list) -> mx.array:
            repeat_dropout(twin, keys)
            return own(twin, x, mask, cache=cache)

        return run_and_recompute(run, self, x, cache, [])

    subclass(layer, __call__=call)


def self_check(model: LanguageModel, source: Path) -> None:
    """Compare the model with itself on eight tokens: in parts, beside padding, behind padding, and its output layer.

    Raises UserError that names what differs; such a model would train on wrong numbers without any error.
    """
    if model.config.model_type not in TESTED:
        warn(f"{source}: model type {model.config.model_type} is not among the tested ones ({', '.join(TESTED)})")
    model.eval()
    problems = [name for name, check in CHECKS.items() if not _passes(check, model)]
    if problems:
        raise UserError(
            f"{source}: mlx-lm's {model.config.model_type} cannot be the base of Coconut: {'; '.join(problems)}. "
            "See docs/extending.md for what a base must do"
        )


def _passes(check: Callable, model: LanguageModel) -> bool:
    try:
        return check(model)
    except Exception:
        return False


def _sample(model: LanguageModel) -> mx.array:
    """Eight token ids [1, 8]."""
    return (mx.arange(8)[None] * 7 + 3) % model.config.vocab_size


def _states(model: LanguageModel, ids: mx.array, left: int = 0, parts: tuple[int, ...] = ()) -> mx.array:
    """Hidden states [1, 8, D] of ids behind `left` columns of padding, in passes that end at `parts`.

    With padding a second, longer row stands below, because some of mlx-lm's models are right for one row alone.
    """
    embeddings, padding = model.embed(ids), mx.array([0])
    if left:
        first = mx.concatenate([model.embed(ids[:, :left]), embeddings], axis=1)
        embeddings = mx.concatenate([first, first[:, ::-1]], axis=0)  # [2, left + 8, D]
        padding = mx.array([left, 0])
    bounds = [0, *parts, embeddings.shape[1]]
    cache = model.make_cache(mx.arange(bounds[-1])[None] >= padding[:, None], padding)
    passes = [model(embeddings[:, a:b], cache) for a, b in pairwise(bounds)]
    return mx.concatenate(passes, axis=1)[:1, left:]


def _in_parts(model: LanguageModel) -> bool:
    ids = _sample(model)
    return _close(_states(model, ids, parts=(3, 4)), _states(model, ids))


def _beside_padding(model: LanguageModel) -> bool:
    ids = _sample(model)
    return _close(_states(model, ids, left=3, parts=(5,)), _states(model, ids))


def _behind_padding(model: LanguageModel) -> bool:
    """Decode the last three tokens behind two columns of padding on the right, beside a row without padding."""
    ids = _sample(model)
    prompts = mx.concatenate([mx.concatenate([ids[:, :5], ids[:, :2]], axis=1), ids[:, :7]], axis=0)  # [2, 7]
    lengths = mx.array([5, 7])
    cache = model.make_cache(mx.arange(7)[None] < lengths[:, None], mx.array([0, 0]))
    found = [model(model.embed(prompts), cache)[:1, :5]]
    cache[0].columns.end_prompt(lengths)
    for column in range(5, 8):
        cache[0].columns.append_token()
        token = mx.repeat(ids[:, column : column + 1], 2, axis=0)
        found.append(model(model.embed(token), cache)[:1])
    return _close(mx.concatenate(found, axis=1), _states(model, ids))


def _own_head(model: LanguageModel) -> bool:
    ids = _sample(model)
    return _close(model.logits(_states(model, ids)), model.lm(ids))


def _finite_gradient(model: LanguageModel) -> bool:
    ids = _sample(model)
    mask = mx.arange(8)[None] >= 3

    def total(embeddings):
        states = model(embeddings, model.make_cache(mask, mx.array([3])))
        return states[:, 3:].astype(mx.float32).sum()

    return mx.isfinite(mx.grad(total)(model.embed(ids))).all().item()


def _close(one: mx.array, other: mx.array) -> bool:
    """Whether two results are equal but for rounding in their type."""
    tolerance = 1e-3 if one.dtype == mx.float32 else 5e-2
    one, other = one.astype(mx.float32), other.astype(mx.float32)
    return (mx.abs(one - other).max() <= tolerance * (1e-6 + mx.abs(other).max())).item()


CHECKS: dict[str, Callable[[LanguageModel], bool]] = {
    "its states change when a sequence is computed in parts": _in_parts,
    "its states change beside padding on the left": _beside_padding,
    "its states change behind padding on the right": _behind_padding,
    "its output layer cannot be used alone": _own_head,
    "its gradient beside padding is not finite": _finite_gradient,
}
