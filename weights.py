"""Open any GPT-2 or Coconut weights and bring them to one form: Hugging Face's names and layout, float32.

Precedence of the source: a checkpoint of the run directory > load_model_path > model_id > fresh weights of
model_config_path's size. Nothing is ever guessed: a tensor that is missing, left over, mis-shaped or not finite is an
error that names it.
"""

import json
import re
import zipfile
from dataclasses import dataclass, replace
from pathlib import Path

import cpu_blas  # noqa: F401  must come before mlx
import mlx.core as mx
from mlx.utils import tree_flatten

from coconut import Coconut
from config import Config
from gpt2 import GPT2, GPT2Config
from tokenizer import Tokenizer
from utils import UserError, say, warn

HUB_FILES = ["config.json", "*.safetensors", "*.safetensors.index.json", "vocab.json", "merges.txt", "tokenizer.json"]
PREFIX = re.compile(r"^(base_causallm\.)?(transformer\.)?")
MASK_BUFFER = re.compile(r"^h\.\d+\.attn\.(bias|masked_bias)$")  # not c_attn.bias, which is a parameter
TRANSPOSED = re.compile(r"^h\.\d+\.(attn\.c_attn|attn\.c_proj|mlp\.c_fc|mlp\.c_proj)\.weight$")
SHOWN = 10

Tensors = dict[str, mx.array]


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
    folder = None
    if config.model_id and (named is None or shape is None):
        folder = _model_folder(config)
    if shape is None:
        shape = config.model_config_path or folder
    if shape is None:
        raise UserError(f"{named}: no config.json beside it says the model's size; name one with model_config_path")
    return Source(named or folder, _read_gpt2_config(_config_file(Path(shape))), folder or beside)


def load_model(source: Source, config: Config, tokenizer: Tokenizer) -> Coconut:
    """Build the model and fill it; markers that the weights lack get the embedding of `<<` where coconut needs them.

    Raises UserError that lists every tensor that does not fit.
    """
    if source.weights is None:
        mx.random.seed(config.seed)
        spread = config.initializer_range or source.gpt2.initializer_range
        return Coconut(GPT2(replace(source.gpt2, vocab_size=tokenizer.vocab_size, initializer_range=spread)))
    tensors = canonical(read_tensors(source.weights), source.weights)
    if "transformer.wte.weight" in tensors:
        tensors["transformer.wte.weight"] = _with_markers(tensors["transformer.wte.weight"], config, tokenizer, source)
        rows = tensors["transformer.wte.weight"].shape[0]
    else:
        rows = source.gpt2.vocab_size
    model = Coconut(GPT2(replace(source.gpt2, vocab_size=rows)))
    _check_fit(tensors, model, source.weights)
    model.load_weights(list(tensors.items()), strict=True)
    mx.eval(model.parameters())
    return model


def read_tensors(path: Path) -> Tensors:
    """All tensors of a weights file or folder, evaluated; the format is told by content, never by name.

    Reads safetensors (sharded too), .npz, and files of torch.save through torch's weights_only loading.
    """
    if path.is_dir():
        return {name: tensor for part in _parts(path) for name, tensor in read_tensors(part).items()}
    try:
        with open(path, "rb") as file:
            head = file.read(64)
    except OSError as error:
        raise UserError(f"{path}: cannot read the weights ({error.strerror})") from error
    if head.startswith(b"version https://git-lfs"):
        raise UserError(f"{path}: a Git LFS pointer, not the weights themselves; fetch them with `git lfs pull`")
    if head.lstrip()[:1] == b"<":
        raise UserError(f"{path}: a web page, not weights; download the file itself")
    if head.startswith(b"\x80"):
        raise UserError(f"{path}: a pickle, which could run any code; save the weights as safetensors")
    if head.startswith(b"PK"):
        return _read_archive(path)
    return _read_mlx(path, "safetensors")


def canonical(tensors: Tensors, path: Path) -> Tensors:
    """Tensors under Hugging Face's names (`transformer.h.0...`), in Conv1D layout [in, out], as float32.

    Drops what is no parameter of its own: mask buffers, the tied output layer, the alias of the embedding that the
    official Coconut and the older MLX port save. The layout is decided once, by the non-square c_attn.weight.
    """
    bare = {PREFIX.sub("", name, count=1): tensor for name, tensor in tensors.items()}
    first = bare.get("h.0.attn.c_attn.weight")
    is_linear = first is not None and first.ndim == 2 and first.shape[0] == 3 * first.shape[1]
    result = {}
    for name, tensor in bare.items():
        if MASK_BUFFER.match(name) or name in ("lm_head.weight", "embedding.weight"):
            _warn_if_untied(name, tensor, bare.get("wte.weight"), path)
            continue
        if is_linear and TRANSPOSED.match(name):
            tensor = mx.contiguous(tensor.T)
        result[f"transformer.{name}"] = tensor.astype(mx.float32)
    return result


def to_mlx_layout(tensors: Tensors, method: str) -> Tensors:
    """Canonical tensors as the older MLX port (vincentamato/mlx-coconut) reads them: nn.Linear layout, its names."""
    prefix = "base_causallm." if method == "coconut" else ""
    result = {}
    for name, tensor in tensors.items():
        bare = name.removeprefix("transformer.")
        result[prefix + bare] = mx.contiguous(tensor.T) if TRANSPOSED.match(bare) else tensor
    return result


def _warn_if_untied(name: str, tensor: mx.array, embedding: mx.array | None, path: Path) -> None:
    if not name.endswith(".weight") or embedding is None:
        return
    if tensor.shape != embedding.shape or not mx.array_equal(tensor, embedding).item():
        warn(f"{path}: {name} differs from the token embedding; GPT-2 ties the two, and the embedding is used")


def _config_file(path: Path) -> Path:
    return path / "config.json" if path.is_dir() else path if path.suffix == ".json" else Path("")


def _read_gpt2_config(path: Path) -> GPT2Config:
    try:
        return GPT2Config.from_dict(json.loads(path.read_bytes()))
    except OSError as error:
        raise UserError(f"{path}: cannot read the model's configuration ({error.strerror})") from error
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: not GPT-2's config.json: {error}") from error


def _model_folder(config: Config) -> Path:
    """The local folder of model_id, fetched into huggingface_hub's cache where it is a repository's name."""
    if Path(config.model_id).is_dir():
        return Path(config.model_id)
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", config.model_id):
        raise UserError(f"model_id: {config.model_id} is neither a folder nor a Hugging Face repository id")
    from huggingface_hub import snapshot_download  # slow to import, and most runs name a local folder or checkpoint
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(config.model_id, revision=config.model_revision, allow_patterns=HUB_FILES))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"model_id: {config.model_id} is not a local folder, not in Hugging Face's cache, and could not be fetched "
            f"({reason:.300}). Check the name and the network, or name a folder with config.json and model.safetensors"
        ) from error


def _parts(folder: Path) -> list[Path]:
    """The weight files of a folder: one file, or the shards that its index names."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise UserError(f"{index}: not an index of safetensors shards ({error!r})") from error
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise UserError(f"{index}: names files that are not there: {', '.join(missing)}")
        return [folder / name for name in names]
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (folder / name).is_file():
            return [folder / name]
    raise UserError(f"{folder}: holds no weights; expected model.safetensors (or shards with their index)")


def _read_archive(path: Path) -> Tensors:
    """A zip archive: numpy's .npz, or a file of torch.save."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except zipfile.BadZipFile as error:
        raise UserError(f"{path}: a damaged or cut-off file ({error})") from error
    if names and all(name.endswith(".npy") for name in names):
        return _read_mlx(path, "npz")
    if any(name.endswith("data.pkl") for name in names):
        return _read_torch(path)
    raise UserError(f"{path}: a zip archive that holds no weights")


def _read_mlx(path: Path, kind: str) -> Tensors:
    try:
        tensors = mx.load(str(path), format=kind)
        mx.eval(tensors)  # loading is lazy: read now, before the file can change
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"{path}: not a readable {kind} file; damaged or cut off? ({' '.join(str(error).split()):.200})"
        ) from error
    return tensors


def _read_torch(path: Path) -> Tensors:
    try:
        import torch  # only needed for files saved by the official PyTorch code
    except ImportError as error:
        raise UserError(f"{path}: saved by PyTorch; `pip install torch` to open it here") from error
    import pickle

    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, ValueError) as error:
        raise UserError(
            f"{path}: PyTorch cannot open it safely as weights ({' '.join(str(error).split()):.200})"
        ) from error
    if not isinstance(state, dict) or not all(isinstance(t, torch.Tensor) for t in state.values()):
        raise UserError(f"{path}: expected a state dict of tensors, as the official code saves it")
    return {name: mx.array(tensor.detach().float().numpy()) for name, tensor in state.items()}


def _with_markers(embedding: mx.array, config: Config, tokenizer: Tokenizer, source: Source) -> mx.array:
    """The token embedding with a row for every token the method uses (official run.py)."""
    if embedding.ndim != 2:
        raise UserError(f"{source}: transformer.wte.weight has shape {embedding.shape}, expected [vocabulary, n_embd]")
    rows, without, complete = embedding.shape[0], tokenizer.eos_id + 1, tokenizer.vocab_size
    if rows >= complete or (rows == without and not config.coconut):
        return embedding
    if rows != without:
        raise UserError(
            f"{source}: its vocabulary has {rows:,} rows; the tokenizer ({tokenizer.source}) needs {without:,}, or "
            f"{complete:,} with the three markers. Is it another tokenizer's model?"
        )
    if tokenizer.prototype_id is None:
        raise UserError(
            f"{source}: has no rows for the three markers, and the vocabulary has no `<<` to start them from"
        )
    say("the three markers start from the embedding of `<<`")
    row = embedding[tokenizer.prototype_id][None]
    return mx.concatenate([embedding, row, row, row], axis=0)


def _check_fit(tensors: Tensors, model: Coconut, path: Path) -> None:
    expected = dict(tree_flatten(model.parameters()))
    problems = [f"{name} is missing" for name in expected if name not in tensors]
    problems += [f"{name} is not a parameter of GPT-2" for name in tensors if name not in expected]
    for name, tensor in tensors.items():
        if name not in expected:
            continue
        if tensor.shape != expected[name].shape:
            problems.append(f"{name} has shape {tensor.shape}, expected {expected[name].shape}")
        elif not mx.isfinite(tensor).all().item():
            problems.append(f"{name} holds values that are not finite")
    if problems:
        shown = "\n".join(f"  - {problem}" for problem in problems[:SHOWN])
        rest = f"\n  ... and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
        raise UserError(f"{path}: the weights do not fit the model\n{shown}{rest}")
