"""Where a model comes from: a checkpoint, a file, a folder or the Hub, and the shape that its config.json gives.

Precedence: a checkpoint of the run directory > load_model_path > model_id > fresh weights of model_config_path's size.
"""

import re
from dataclasses import dataclass
from pathlib import Path

from config import Config
from models.gpt2 import GPT2Config
from models.mlx_lm import LanguageConfig
from models.weights import holds_weights, nanogpt_shape
from utils import UserError, read_json, warn

HUB_FILES = [
    "config.json", "*.safetensors", "*.safetensors.index.json", "vocab.json", "merges.txt", "tokenizer.json",
    "tokenizer_config.json", "special_tokens_map.json",
]  # fmt: skip
TORCH_FILES = ["pytorch_model*.bin", "pytorch_model.bin.index.json"]  # fetched only where there is no safetensors file


@dataclass(frozen=True)
class Source:
    """Where a model comes from: its weights (None: fresh ones), its shape, and the folder that may hold a tokenizer."""

    weights: Path | None
    shape: GPT2Config | LanguageConfig
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
        folder = model_folder(config)
    shape = shape or config.model_config_path or folder
    if not (shape or own):
        raise UserError(f"{named}: no config.json beside it says the model's size; name one with model_config_path")
    found = _read_shape(_config_file(Path(shape))) if shape else _shape_of(own, named)
    if own and own["n_head"] != getattr(found, "n_head", None):  # the only size that no tensor shows
        raise UserError(f"{named}: its model_args say n_head {own['n_head']}, {shape} says {found.n_head}")
    return Source(named or folder, found, folder or beside)


def _config_file(path: Path) -> Path:
    return path / "config.json" if path.is_dir() else path


def _read_shape(path: Path) -> GPT2Config | LanguageConfig:
    try:
        return _shape_of(read_json(path), path)
    except OSError as error:
        raise UserError(f"{path}: cannot read the model's configuration ({error.strerror})") from error
    except ValueError as error:
        raise UserError(f"{path}: not GPT-2's config.json: {error!s:.300}") from error


def _shape_of(values: dict, path: Path) -> GPT2Config | LanguageConfig:
    """The configuration that a config.json's content is: GPT-2's where it names no other model type."""
    kind = values.get("model_type") if isinstance(values, dict) else None
    is_gpt2 = kind in (None, "gpt2") or not isinstance(kind, str)
    try:
        return GPT2Config.from_dict(values) if is_gpt2 else LanguageConfig.from_dict(values)
    except (ValueError, TypeError) as error:
        whose = "GPT-2's" if is_gpt2 else f"{kind}'s"
        raise UserError(f"{path}: not {whose} config.json: {error!s:.300}") from error


def model_folder(config: Config) -> Path:
    """The local folder of model_id, fetched into huggingface_hub's cache where it is a repository's name."""
    if Path(config.model_id).is_dir():
        return Path(config.model_id)
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", config.model_id):
        raise UserError(f"model_id: {config.model_id} is neither a folder nor a Hugging Face repository id")
    _check_hub()
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


def _check_hub() -> None:
    """Raise UserError where huggingface_hub cannot be loaded: it reads numbers from the environment, for example."""
    try:
        import huggingface_hub.constants  # noqa: F401
    except Exception as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split()):.300}"
        raise UserError(
            f"model_id: the package huggingface_hub cannot be loaded ({reason}); check the variables that "
            "begin with HF_"
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
