"""LoRA (arXiv 2106.09685) and QLoRA (2305.14314) for models of mlx-lm: only adapters and three rows train.

The base stays as it was, bit for bit. The special tokens get rows of their own beside the frozen tables: a table of
128,000 rows is not trained for three, a quantized one cannot grow, and mlx-lm reopens adapters alone. Adapters are
mlx-lm's own layers with a dropout that can be repeated, saved in its format. There is no official number for LoRA.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from config import Config
from models.mlx_lm import LanguageConfig, LanguageModel
from models.recompute import RepeatedDropout
from models.sums import subclass
from utils import UserError, read_json

ADAPTERS, ADAPTER_CONFIG, ROWS = "adapters.safetensors", "adapter_config.json", "special_tokens.safetensors"
ROW = "special_rows"
LEAVES = ("lora_a", "lora_b", ROW)


@dataclass(frozen=True)
class Lora:
    """What an adapter_config.json says: the adapters' form, and the base that they belong to."""

    rank: int
    alpha: float
    dropout: float = 0.0
    keys: tuple[str, ...] | None = None  # linear layers of a block, as `self_attn.q_proj`; None: all
    quantize: int | None = None  # bits of the base
    model_id: str | None = None
    model_revision: str | None = None
    digest: int | None = None  # CRC-32 of the base's tensors

    @classmethod
    def from_config(cls, config: Config) -> "Lora":
        keys = tuple(name.strip() for name in config.lora_keys.split(",")) if config.lora_keys else None
        form = (config.lora_rank, config.lora_alpha, config.lora_dropout, keys, config.quantize)
        return cls(*form, config.model_id, config.model_revision)

    @classmethod
    def read(cls, folder: Path) -> "Lora | None":
        """Of a checkpoint with adapters; None for any other. Raises UserError for adapters of another program."""
        path = folder / ADAPTER_CONFIG
        if not path.is_file():
            return None
        try:
            values = read_json(path)["coconut"]
            return cls(**values | {"keys": tuple(values["keys"]) if values["keys"] else None})
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}: not the adapters of a Coconut run ({error!r:.200})") from error

    def to_dict(self, n_layers: int) -> dict:
        """The content of adapter_config.json: mlx-lm's keys, and ours under `coconut`."""
        form: dict = {"rank": self.rank, "scale": self.alpha / self.rank, "dropout": self.dropout}
        if self.keys:
            form["keys"] = list(self.keys)
        return {"fine_tune_type": "lora", "num_layers": n_layers, "lora_parameters": form, "coconut": vars(self)}

    def form(self) -> tuple:
        """What must be equal for two sets of adapters to fit each other."""
        return self.rank, self.alpha, self.keys, self.quantize


class LoraModel(LanguageModel):
    """A frozen model of mlx-lm with adapters and, where `rows` is given, rows for the three special tokens.

    rows: (number of token ids before the special ones, id of the token whose rows they start from).
    """

    def __init__(self, lm: nn.Module, config: LanguageConfig, lora: Lora, rows: tuple[int, int] | None):
        super().__init__(lm, config)
        from mlx_lm.tuner.utils import linear_to_lora_layers

        self.lora, self.n_tokens = lora, rows[0] if rows else None
        lm.freeze()
        form = lora.to_dict(config.n_layer)["lora_parameters"]
        linear_to_lora_layers(lm, config.n_layer, form | {"keys": set(lora.keys)} if lora.keys else dict(form))
        for module in lm.modules():
            if "lora_a" in module:
                module.dropout = RepeatedDropout(lora.dropout)
        if not self._tensors():
            raise UserError(f"lora_keys: no layer of {config.model_type} has such a name: {', '.join(lora.keys or ())}")
        if rows:
            _add_rows(self.embedding, *rows)
            if "lm_head" in lm:
                _add_head_rows(lm.lm_head, *rows)

    def keeps_float32(self, name: str) -> bool:
        """Whether a parameter stays float32 where products are computed in bfloat16: the special tokens' rows.

        Their gradient is a sum over all these tokens. The adapters' are products, which are added up in float32 inside,
        and the rest is frozen.
        """
        return name.endswith(ROW)

    def saved_tensors(self) -> dict[str, dict[str, mx.array]]:
        """{file name: its tensors}: the adapters as mlx-lm writes them, and the special tokens' rows."""
        tensors = self._tensors()
        rows = {name: tensor for name, tensor in tensors.items() if name.endswith(ROW)}
        files = {ADAPTERS: {name: tensor for name, tensor in tensors.items() if name not in rows}}
        return files | ({ROWS: rows} if rows else {})

    def saved_texts(self, end_of_text: int) -> dict[str, str]:
        """{file name: its text}: the base's config.json and tokenizer, and what the adapters are."""
        values = self.config.values | {"eos_token_id": end_of_text}
        own = {"config.json": json.dumps(values, indent=1), ADAPTER_CONFIG: self._adapter_config()}
        return self.config.texts | own

    def fused(self) -> dict[str, mx.array]:
        """The base with the adapters added to its weights and the rows to its tables, under Hugging Face's names."""
        modules = dict(self.lm.named_modules())
        adapted = {name for name, module in modules.items() if hasattr(module, "fuse")}
        tensors = {}
        for name, module in modules.items():
            if name.rpartition(".")[0] in adapted:
                continue  # the layer inside, which `fuse` reads
            plain = module.fuse(dequantize=True) if name in adapted else module
            own = _dense_arrays(plain, self.n_tokens)
            tensors |= {f"{name}.{key}": array.astype(mx.float32) for key, array in own.items()}
        return tensors

    def peft_tensors(self) -> dict[str, mx.array]:
        """The adapters as the library PEFT names and lays them out; the special tokens' rows have no place there."""
        adapters = self.saved_tensors()[ADAPTERS]
        names = {"lora_a": "lora_A.weight", "lora_b": "lora_B.weight"}
        return {
            f"base_model.model.{path}.{names[leaf]}": mx.contiguous(tensor.T)
            for (path, leaf), tensor in ((name.rsplit(".", 1), tensor) for name, tensor in adapters.items())
        }

    def peft_config(self) -> dict:
        """The content of PEFT's adapter_config.json."""
        layers = {name.rsplit(".", 2)[-2] for name in self.saved_tensors()[ADAPTERS]}
        return {
            "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": self.lora.model_id,
            "r": self.lora.rank, "lora_alpha": self.lora.alpha, "lora_dropout": self.lora.dropout, "bias": "none",
            "target_modules": sorted(layers),
        }  # fmt: skip

    def load_adapters(self, tensors: dict[str, mx.array], path: Path) -> None:
        """Take saved adapters and rows. Raises UserError where they are not those of this model."""
        expected = {name: tensor.shape for name, tensor in self._tensors().items()}
        found = {name: tensor.shape for name, tensor in tensors.items()}
        if found != expected:
            wrong = sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))
            raise UserError(f"{path}: its adapters do not fit the base: {', '.join(wrong[:5])}")
        self.lm.load_weights(list(tensors.items()), strict=False)

    def _adapter_config(self) -> str:
        return json.dumps(self.lora.to_dict(self.config.n_layer), indent=1)

    def _tensors(self) -> dict[str, mx.array]:
        """All that trains, under mlx-lm's names."""
        found = dict(tree_flatten(self.lm.trainable_parameters()))
        return {name: tensor for name, tensor in found.items() if name.rsplit(".", 1)[-1] in LEAVES}


def _dense_arrays(module: nn.Module, n_tokens: int | None) -> dict[str, mx.array]:
    """A module's own parameters, without quantization, and with the rows of special tokens in their table."""
    arrays = {name: a for name, a in module.items() if isinstance(a, mx.array) and not name.startswith("_")}
    if "scales" in arrays:
        form = {"group_size": module.group_size, "bits": module.bits}
        arrays["weight"] = mx.dequantize(arrays["weight"], arrays.pop("scales"), arrays.pop("biases"), **form)
    if ROW in arrays:
        arrays["weight"] = mx.concatenate([arrays["weight"][:n_tokens], arrays.pop(ROW)], axis=0)
    return arrays


def _add_rows(embedding: nn.Module, n_tokens: int, prototype: int) -> None:
    """Let the ids n_tokens to n_tokens + 2 have rows of their own, in the input and in a tied output layer."""
    kind: Any = type(embedding)
    own, own_head = kind.__call__, kind.as_linear
    embedding[ROW] = mx.repeat(own(embedding, mx.array([prototype])).astype(mx.float32), 3, axis=0)  # [3, D]

    def call(self, x):
        if mx.issubdtype(x.dtype, mx.floating):
            return x
        x = x.astype(mx.int32)
        special = self[ROW][mx.clip(x - n_tokens, 0, 2)]  # [..., D]
        return mx.where((x >= n_tokens)[..., None], special, own(self, mx.minimum(x, n_tokens - 1)))

    def head(self, x):
        return _joined(own_head(self, x), x, self[ROW], n_tokens)

    subclass(embedding, __call__=call, as_linear=head)


def _add_head_rows(head: nn.Module, n_tokens: int, prototype: int) -> None:
    """The same for an output layer with a table of its own."""
    if "bias" in head:
        raise UserError("lora_rank: an output layer with a bias is not supported")
    own = type(head).__call__
    row = head.weight[prototype]
    if isinstance(head, nn.QuantizedLinear):
        weight, scales, biases = (part[prototype][None] for part in (head.weight, head.scales, head.biases))
        row = mx.dequantize(weight, scales, biases, group_size=head.group_size, bits=head.bits)[0]
    head[ROW] = mx.repeat(row[None].astype(mx.float32), 3, axis=0)  # [3, D]

    def call(self, x):
        return _joined(own(self, x), x, self[ROW], n_tokens)

    subclass(head, __call__=call)


def _joined(logits: mx.array, x: mx.array, rows: mx.array, n_tokens: int) -> mx.array:
    """Logits of the ordinary tokens, without the padding of the table, and those of the special ones."""
    return mx.concatenate([logits[..., :n_tokens], x @ rows.astype(x.dtype).T], axis=-1)
