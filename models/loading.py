"""Which model a run starts from, and building it: weights that fit, special-token rows.

Precedence of the source: a checkpoint of the run directory > load_model_path > model_id > fresh weights of
model_config_path's size. A tensor that is missing, left over, of another shape or not finite is an error that names it.
"""

import re
from dataclasses import dataclass, replace
from pathlib import Path

import mlx.core as mx
from mlx.utils import tree_flatten

from config import Config
from models.gpt2 import GPT2, GPT2Config
from models.weights import Tensors, canonical, holds_special_tokens, holds_weights, nanogpt_shape, read_tensors
from text.reader import raise_if_any
from text.tokenizer import Tokenizer
from utils import UserError, human_size, memory_size, read_json, say, warn

HUB_FILES = [
    "config.json", "*.safetensors", "*.safetensors.index.json", "vocab.json", "merges.txt", "tokenizer.json",
    "tokenizer_config.json",
]  # fmt: skip
TORCH_FILES = ["pytorch_model*.bin", "pytorch_model.bin.index.json"]  # fetched only where there is no safetensors file
EMBEDDING = "transformer.wte.weight"
PREFIX = "transformer."  # of every parameter's name in Hugging Face's GPT2LMHeadModel files


@dataclass(frozen=True)
class Source:
    """Where a model comes from: its weights (None: fresh ones), its shape, and the folder that may hold a tokenizer."""

    weights: Path | None
    gpt2: GPT2Config
    folder: Path | None

    def __str__(self) -> str:
        return str(self.weights) if self.weights else "fresh random weights"


def find_source(config: Config, checkpoint: Path | None = None) -> Source:
    """Decide what to load, without loading it. Raises UserError where a named thing is not there."""
    named = checkpoint or (Path(config.load_model_path) if config.load_model_path else None)
    if named is not None and not named.exists():
        raise UserError(f"load_model_path: {named} does not exist")
    if config.model_config_path and not Path(config.model_config_path).exists():
        raise UserError(f"model_config_path: {config.model_config_path} does not exist")
    beside = named if named is None or named.is_dir() else named.parent
    shape = next((f for f in (beside, config.model_config_path) if f and _config_file(Path(f)).is_file()), None)
    own = nanogpt_shape(named) if named else None
    folder = None
    if config.model_id and (named is None or not (shape or own)):
        folder = _model_folder(config)
    shape = shape or config.model_config_path or folder
    if not (shape or own):
        raise UserError(f"{named}: no config.json beside it says the model's size; name one with model_config_path")
    gpt2 = _read_gpt2_config(_config_file(Path(shape))) if shape else _gpt2_config(own, named)
    if own and own["n_head"] != gpt2.n_head:  # the only size that no tensor shows
        raise UserError(f"{named}: its model_args say n_head {own['n_head']}, {shape} says {gpt2.n_head}")
    return Source(named or folder, gpt2, folder or beside)


def load_gpt2(source: Source, config: Config, tokenizer: Tokenizer) -> GPT2:
    """Build the model and fill it. Special tokens that the weights lack start from `<<` where the method uses them.

    Raises UserError that lists every tensor that does not fit.
    """
    if source.weights is None:
        return _fresh_gpt2(source.gpt2, config, tokenizer)
    tensors = read_tensors(source.weights)
    trained = holds_special_tokens(tensors, source.weights)
    tensors = canonical(tensors, source.weights)
    n_rows = source.gpt2.vocab_size
    if EMBEDDING in tensors:
        tensors[EMBEDDING] = _with_special_tokens(tensors[EMBEDDING], config, tokenizer, source, trained)
        n_rows = tensors[EMBEDDING].shape[0]
    shape = replace(source.gpt2, vocab_size=n_rows)
    _check_memory(shape, source)
    model = GPT2(shape)
    _check_fit(tensors, model, source.weights)
    model.load_weights([(name.removeprefix(PREFIX), tensor) for name, tensor in tensors.items()], strict=True)
    mx.eval(model.parameters())
    return model


def _fresh_gpt2(shape: GPT2Config, config: Config, tokenizer: Tokenizer) -> GPT2:
    std = shape.initializer_range if config.initializer_range is None else config.initializer_range
    if not std:
        raise UserError("initializer_range: 0 makes every weight 0, which never trains; GPT-2's is 0.02")
    shape = replace(shape, vocab_size=tokenizer.vocab_size, initializer_range=std)
    _check_memory(shape, "a fresh model")
    mx.random.seed(config.seed)
    model = GPT2(shape)
    if config.embedding_range is not None:
        model.wte.weight = mx.random.normal(model.wte.weight.shape) * config.embedding_range
    if config.sinusoidal_positions is not None:
        model.wpe.weight = config.sinusoidal_positions * sinusoids(*model.wpe.weight.shape)
    return model


def _check_memory(shape: GPT2Config, what: object) -> None:
    """Raise UserError for a model that cannot fit: AdamW needs three times as much, but an evaluation does not."""
    n_bytes = 4 * shape.n_parameters
    if n_bytes > memory_size():
        raise UserError(
            f"{what}: {shape.n_layer:,} layers, {shape.n_embd:,} wide, {shape.n_positions:,} positions: the weights "
            f"would take {human_size(n_bytes)}, this machine has {human_size(memory_size())} of memory"
        )


def sinusoids(n_positions: int, width: int) -> mx.array:
    """Sines of falling frequency in the even columns, cosines in the odd ones (arXiv 1706.03762, section 3.5).

    Returns [n_positions, width], values from -1 to 1.
    """
    frequencies = 10_000.0 ** (-mx.arange(0, width, 2) / width)
    angles = mx.arange(n_positions)[:, None] * frequencies  # [n_positions, ceil(width / 2)]
    return mx.stack([mx.sin(angles), mx.cos(angles)], axis=-1).reshape(n_positions, -1)[:, :width]


def _config_file(path: Path) -> Path:
    return path / "config.json" if path.is_dir() else path


def _read_gpt2_config(path: Path) -> GPT2Config:
    try:
        return _gpt2_config(read_json(path), path)
    except OSError as error:
        raise UserError(f"{path}: cannot read the model's configuration ({error.strerror})") from error
    except ValueError as error:
        raise UserError(f"{path}: not GPT-2's config.json: {error!s:.300}") from error


def _gpt2_config(values: dict, path: Path) -> GPT2Config:
    try:
        return GPT2Config.from_dict(values)
    except (ValueError, TypeError) as error:
        raise UserError(f"{path}: not GPT-2's config.json: {error!s:.300}") from error


def _model_folder(config: Config) -> Path:
    """The local folder of model_id, fetched into huggingface_hub's cache where it is a repository's name."""
    if Path(config.model_id).is_dir():
        return Path(config.model_id)
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", config.model_id):
        raise UserError(f"model_id: {config.model_id} is neither a folder nor a Hugging Face repository id")
    cached = _cached_folder(config)
    if cached and any((cached / name).is_file() for name in ("vocab.json", "tokenizer.json")):
        return cached  # complete: then nothing is asked of the network
    try:
        return _fetched_folder(config)
    except Exception as error:  # proxies, tokens and addresses that are wrong raise what their libraries like
        reason = f"{type(error).__name__}: {' '.join(str(error).split()):.300}"
        if cached:
            warn(f"model_id: {config.model_id} is taken from Hugging Face's cache; the Hub was not reached ({reason})")
            return cached
        raise UserError(
            f"model_id: {config.model_id} is not a local folder, not in Hugging Face's cache, and could not be fetched "
            f"({reason}). Check the name, the network, and the variables HF_ENDPOINT, HF_TOKEN and those of a proxy, "
            "or name a folder with config.json and model.safetensors"
        ) from error


def _cached_folder(config: Config) -> Path | None:
    """The model's folder in huggingface_hub's cache, where it has a configuration and all weights."""
    from huggingface_hub import snapshot_download  # slow to import, and most runs name a local folder or checkpoint
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(config.model_id, revision=config.model_revision, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError):
        return None
    return folder if (folder / "config.json").is_file() and holds_weights(folder) else None


def _fetched_folder(config: Config) -> Path:
    from huggingface_hub import snapshot_download

    for patterns in (HUB_FILES, TORCH_FILES):
        folder = Path(snapshot_download(config.model_id, revision=config.model_revision, allow_patterns=patterns))
        if holds_weights(folder):
            break
    return folder


def _with_special_tokens(
    embedding: mx.array, config: Config, tokenizer: Tokenizer, source: Source, trained: bool | None
) -> mx.array:
    """The token embedding [rows, D] with a row for every token the method uses (official run.py).

    trained: what holds_special_tokens says. Where nothing says it, rows for exactly our tokens count as trained, and
    any other number of rows as padding, which the official code cuts off (resize_token_embeddings) before it fills
    the rows of the special tokens. In a vocabulary without `<<`, rows for exactly our tokens stay as they are.
    """
    if embedding.ndim != 2:
        raise UserError(f"{source}: transformer.wte.weight has shape {embedding.shape}, expected [vocabulary, n_embd]")
    rows, without, complete = embedding.shape[0], tokenizer.eos_id + 1, tokenizer.vocab_size
    if rows < without:
        raise UserError(
            f"{source}: its vocabulary has {rows:,} rows; the tokenizer ({tokenizer.source}) needs {without:,}, or "
            f"{complete:,} with the three special tokens. Is it another tokenizer's model?"
        )
    has_prototype = tokenizer.prototype_id is not None
    exact = rows == complete and (trained is None or not has_prototype)
    if not config.method.special_tokens or (trained and rows >= complete) or exact:
        return embedding
    if not has_prototype:
        raise UserError(
            f"{source}: has no rows for the three special tokens, and the vocabulary has no `<<` to start them from"
        )
    ignored = f"; the other {rows - without:,} rows of {rows:,} are left out, as padding" if rows > without else ""
    say(f"the three special tokens start from the embedding of `<<`{ignored}")
    row = embedding[tokenizer.prototype_id][None]
    return mx.concatenate([embedding[:without], row, row, row], axis=0)


def _check_fit(tensors: Tensors, model: GPT2, path: Path) -> None:
    expected = {PREFIX + name: parameter for name, parameter in tree_flatten(model.parameters())}
    problems = [f"{name} is missing" for name in expected if name not in tensors]
    problems += [f"{name} is not a parameter of GPT-2" for name in tensors if name not in expected]
    for name, tensor in tensors.items():
        if name not in expected:
            continue
        if tensor.shape != expected[name].shape:
            problems.append(f"{name} has shape {tensor.shape}, expected {expected[name].shape}")
        elif not mx.isfinite(tensor).all().item():
            problems.append(f"{name} holds values that are not finite")
    raise_if_any(problems, f"{path}: the weights do not fit the model, ")
