"""Building another model than GPT-2: mlx-lm's, whole or with adapters."""

import re
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from config import Config
from models.fit import N_SPECIAL, check_fit, check_rows, needs_rows, with_rows
from models.lora import ADAPTERS, ROWS, Lora, LoraModel
from models.mlx_lm import LanguageConfig, LanguageModel, build, self_check
from models.source import Source, model_folder
from models.weights import Tensors, check_vocabulary, holds_special_tokens, read_tensors, unwrapped
from parallel.distributed import parameter_digest
from text.byte_tokenizer import FILES
from text.tokenizer import Tokenizer
from utils import UserError, human_size, memory_size, read_file

TABLES = re.compile(r"(embed_tokens|tok_embeddings|lm_head)\.weight$")  # a row for each token


def load_language_model(source: Source, config: Config, tokenizer: Tokenizer) -> LanguageModel:
    """Build the model of a config.json, with adapters where the run or its checkpoint has them, and fill it.

    Raises UserError where something does not fit, and where mlx-lm's model does not pass self_check.
    """
    if source.weights is None:
        raise UserError("model_config_path: fresh weights are made for GPT-2 alone; name weights with model_id")
    saved = Lora.read(source.weights)
    shape = replace(source.shape, texts=_tokenizer_files(Path(tokenizer.source)))
    if saved or config.lora_rank:
        model = _with_adapters(replace(source, shape=shape), saved, config, tokenizer)
    else:
        model = _whole(replace(source, shape=shape), config, tokenizer)
    rows = min(model.embedding.weight.shape[0], model.head.weight.shape[0])
    has_own_rows = isinstance(model, LoraModel) or not config.method.special_tokens  # so the tables need none for them
    check_rows(rows, tokenizer.vocab_size - N_SPECIAL * has_own_rows, tokenizer, source)
    mx.eval(model.parameters())
    self_check(model, source.weights)
    return model


def _whole(source: Source, config: Config, tokenizer: Tokenizer) -> LanguageModel:
    """The model with all its weights as float32, and rows for the special tokens where the method has them."""
    if source.shape.quantization:
        raise UserError(f"{source}: quantized weights cannot be trained; `lora_rank` trains adapters beside them")
    tensors = _read(source.weights)
    check_vocabulary(source.weights, tokenizer)
    trained = holds_special_tokens(tensors, source.weights)
    tables = [name for name in tensors if TABLES.search(name)]
    if tables and needs_rows(tables[0], tensors[tables[0]], config, tokenizer, source, trained):
        tensors |= {name: with_rows(tensors[name], tokenizer) for name in tables}
    rows = tensors[tables[0]].shape[0] if tables else source.shape.vocab_size
    shape = replace(source.shape, values=source.shape.values | {"vocab_size": rows})
    tensors = {name: tensor.astype(mx.float32) for name, tensor in tensors.items()}
    return LanguageModel(*_filled(tensors, shape, source.weights))


def _with_adapters(source: Source, saved: Lora | None, config: Config, tokenizer: Tokenizer) -> LoraModel:
    """The frozen base with adapters: fresh ones, or those of a checkpoint."""
    wanted = saved or Lora.from_config(config)
    if saved and config.lora_rank and saved.form() != Lora.from_config(config).form():
        raise UserError(
            f"{source}: its adapters have rank, alpha, keys and quantize {saved.form()}, the run's keys "
            f"say {Lora.from_config(config).form()}"
        )
    folder = source.weights
    if saved:
        base = {"model_id": config.model_id or saved.model_id, "model_revision": saved.model_revision}
        folder = model_folder(replace(config, **base))
    tensors = _read(folder)
    digest = parameter_digest(tensors)
    if saved and saved.digest != digest:
        raise UserError(f"{source}: its adapters belong to another base than {folder}; name the right one as model_id")
    lm, shape = _filled(tensors, source.shape, folder)
    if wanted.quantize and not shape.quantization:
        nn.quantize(lm, group_size=_group_size(lm), bits=wanted.quantize)
    mx.random.seed(config.seed)
    rows = (tokenizer.vocab_size - N_SPECIAL, _prototype(source, tokenizer)) if config.method.special_tokens else None
    model = LoraModel(lm, shape, replace(wanted, digest=digest), rows)
    if saved:
        files = [source.weights / name for name in (ADAPTERS, ROWS) if (source.weights / name).is_file()]
        model.load_adapters({k: v for file in files for k, v in read_tensors(file).items()}, source.weights)
    return model


def _prototype(source: Source, tokenizer: Tokenizer) -> int:
    if tokenizer.prototype_id is None:
        raise UserError(f"{source}: its vocabulary has no `<<` to start the three special tokens from")
    return tokenizer.prototype_id


def _group_size(lm: nn.Module) -> int:
    """64 weights to a scale, or 32 where a layer's width is no multiple of 64."""
    widths = [m.weight.shape[-1] for _, m in lm.named_modules() if hasattr(m, "to_quantized")]
    return 64 if all(width % 64 == 0 for width in widths) else 32


def _filled(tensors: Tensors, shape: LanguageConfig, path: Path) -> tuple[nn.Module, LanguageConfig]:
    """A model of mlx-lm with these tensors, and its configuration."""
    if "tie_word_embeddings" not in shape.values:  # transformers and mlx-lm have different defaults
        shape = replace(shape, values=shape.values | {"tie_word_embeddings": "lm_head.weight" not in tensors})
    lm = build(shape.values)
    if hasattr(lm, "sanitize"):
        tensors = lm.sanitize(tensors)
    if shape.quantization:
        form = {name: shape.quantization[name] for name in ("group_size", "bits")}
        nn.quantize(lm, **form, class_predicate=lambda name, m: f"{name}.scales" in tensors)
    check_fit(tensors, dict(tree_flatten(lm.parameters())), path)
    lm.load_weights(list(tensors.items()), strict=True)
    return lm, shape


def _read(path: Path) -> Tensors:
    n_bytes = sum(file.stat().st_size for file in ([path] if path.is_file() else path.glob("*.safetensors")))
    if n_bytes > memory_size():
        raise UserError(f"{path}: {human_size(n_bytes)} of weights, more than this machine's memory")
    return unwrapped(read_tensors(path), path)


def _tokenizer_files(folder: Path) -> dict[str, str]:
    """{name: text} of a tokenizer's files, which every checkpoint takes with it."""
    return {name: read_file(folder / name).decode() for name in FILES if (folder / name).is_file()}
