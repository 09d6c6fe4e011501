"""Any GPT-2 or Coconut weights file as tensors under Hugging Face's names, in its layout, as float32."""

import json
import pickle
import re
import zipfile
from pathlib import Path

import mlx.core as mx

from utils import UserError, warn

PREFIX = re.compile(r"^(base_causallm\.)?(transformer\.)?")
MASK_BUFFER = re.compile(r"^h\.\d+\.attn\.(bias|masked_bias)$")  # not c_attn.bias, which is a parameter
TRANSPOSED = re.compile(r"^h\.\d+\.(attn\.c_attn|attn\.c_proj|mlp\.c_fc|mlp\.c_proj)\.weight$")

Tensors = dict[str, mx.array]


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
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, ValueError) as error:
        raise UserError(
            f"{path}: PyTorch cannot open it safely as weights ({' '.join(str(error).split()):.200})"
        ) from error
    if not isinstance(state, dict) or not all(isinstance(t, torch.Tensor) for t in state.values()):
        raise UserError(f"{path}: expected a state dict of tensors, as the official code saves it")
    return {name: mx.array(tensor.detach().float().numpy()) for name, tensor in state.items()}
