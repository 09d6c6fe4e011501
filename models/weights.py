"""Any GPT-2 or Coconut weights file as tensors under Hugging Face's names, in its layout, as float32."""

import re
import zipfile
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np

from methods import METHODS
from text.stand_ins import COMPRESSED, find_stand_in
from text.tokenizer import Tokenizer
from utils import UserError, human_size, memory_size, read_json, say, warn

WRAPPERS = re.compile(r"(?:^|(?<=\.))(module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
PREFIX = re.compile(r"^(model\.)?(base_causallm\.)?(transformer\.)?")
AROUND = re.compile(r"^(model\.)?base_causallm\.")  # the official Coconut around any model
MASK_BUFFER = re.compile(r"^h\.\d+\.attn\.(bias|masked_bias)$")  # not c_attn.bias, which is a parameter
TRANSPOSED = re.compile(r"^h\.\d+\.(attn\.c_attn|attn\.c_proj|mlp\.c_fc|mlp\.c_proj)\.weight$")
BIASED = re.compile(r"^(h\.\d+\..*|ln_f)\.weight$")  # the weights that a bias belongs to
COCONUT_NAMES = re.compile(r"(^|\.)base_causallm\.|^embedding\.weight$")  # the official Coconut's, the older port's
LEGACY_TORCH = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # torch.save before PyTorch 1.6: a pickled magic number
BOMB_BYTES, BOMB_RATIO = 1 << 30, 100  # an archive that unpacks to more than both is no archive of weights
FOREIGN = (  # first bytes of files of other kinds, what they are, and what to do with them
    (b"\x1f\x8b", "a gzip file", "unpack it with `gunzip FILE`"),
    *COMPRESSED,
    (b"GGUF", "a GGUF file", "use the safetensors files of the model it was made from"),
    (b"\x89HDF", "an HDF5 file (TensorFlow or Keras)", "use the model's safetensors or PyTorch files"),
)
STATE_KEYS = ("model", "state_dict", "model_state_dict", "module")  # nanoGPT, Lightning, PyTorch's examples, DeepSpeed
INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")

Tensors = dict[str, mx.array]


def read_tensors(path: Path) -> Tensors:
    """All tensors of a weights file or folder, evaluated; the format is told by content, never by name.

    Reads safetensors (sharded too), .npz, and files of torch.save through torch's weights_only loading: a state dict,
    or a dictionary that holds one, as nanoGPT, Lightning and DeepSpeed write it.
    """
    if path.is_dir():
        return {name: tensor for part in _parts(path) for name, tensor in read_tensors(part).items()}
    return {"torch": _read_torch, "npz": _read_npz, "safetensors": _read_safetensors}[_format(path)](path)


def load_safetensors(path: Path) -> Tensors:
    """All tensors of a safetensors file, evaluated: loading is lazy, and the file could change.

    MLX gets an open file, because it opens by names in UTF-8 only, and a name can be any bytes. Raises RuntimeError or
    ValueError for what it cannot read.
    """
    with open(path, "rb") as file:
        tensors = mx.load(file, format="safetensors")
        mx.eval(tensors)
    return tensors


def canonical(tensors: Tensors, path: Path) -> Tensors:
    """Tensors under Hugging Face's names (`transformer.h.0...`), in Conv1D layout [in, out], as float32.

    Drops what is no parameter of its own: mask buffers, the tied output layer, the alias of the embedding that the
    official Coconut and the older MLX port save. The layout is decided once, by the non-square c_attn.weight. Raises
    UserError for an output layer of its own, and for two tensors of one name.
    """
    bare = _bare_names(tensors, path)
    _check_tied(bare, path)
    first = bare.get("h.0.attn.c_attn.weight")
    is_linear = first is not None and first.ndim == 2 and first.shape[0] == 3 * first.shape[1]
    result = {}
    for name, tensor in bare.items():
        if MASK_BUFFER.match(name) or name in ("lm_head.weight", "embedding.weight"):
            continue
        if is_linear and TRANSPOSED.match(name):
            tensor = mx.contiguous(tensor.T)
        result[f"transformer.{name}"] = tensor.astype(mx.float32)
    return _with_biases(result, path)


def unwrapped(tensors: Tensors, path: Path) -> Tensors:
    """Tensors of another model than GPT-2 under the names that the wrappers around it were put before.

    Drops the alias of the embedding that the official Coconut saves. Raises UserError for two tensors of one name.
    """
    bare = _renamed(tensors, lambda name: AROUND.sub("", WRAPPERS.sub("", name), count=1), path)
    return {name: tensor for name, tensor in bare.items() if name != "embedding.weight"}


def holds_special_tokens(tensors: Tensors, path: Path) -> bool | None:
    """Whether a method with special tokens trained these weights (read_tensors(path)); None where nothing says so.

    The names of the official Coconut and of the older MLX port say it, and the header of our own safetensors files.
    """
    if any(COCONUT_NAMES.search(name) for name in tensors):
        return True
    method = METHODS.get(_header(path).get("method"))
    return method.special_tokens if method else None


def check_vocabulary(path: Path, tokenizer: Tokenizer) -> None:
    """Raise UserError where the header of our own file says that its model was trained with another vocabulary."""
    if _header(path).get("vocabulary", tokenizer.fingerprint) != tokenizer.fingerprint:
        raise UserError(
            f"{path}: trained with another vocabulary than this run's (from {tokenizer.source}); name the right one "
            "with `tokenizer:`"
        )


def _header(path: Path) -> dict[str, str]:
    """What a safetensors file, or the first of a folder, says of itself; empty for other files."""
    file = _parts(path)[0] if path.is_dir() else path
    if _format(file) != "safetensors":
        return {}
    with open(file, "rb") as opened:
        return mx.load(opened, format="safetensors", return_metadata=True)[1]


def holds_weights(folder: Path) -> bool:
    """Whether a folder has all of its weight files; read_tensors says what is missing."""
    try:
        return bool(_parts(folder))
    except UserError:
        return False


def nanogpt_shape(path: Path) -> dict | None:
    """The values of a config.json for a checkpoint of nanoGPT, from its model_args; None for any other file."""
    if not path.is_file() or _format(path) != "torch":
        return None
    arguments = _load_torch(path, mapped=True).get("model_args")
    if not isinstance(arguments, dict):
        return None
    names = {name: name for name in ("n_layer", "n_head", "n_embd", "vocab_size")} | {"block_size": "n_positions"}
    if missing := [name for name in names if name not in arguments]:
        raise UserError(f"{path}: its model_args lack {', '.join(missing)}, which say the model's size")
    rates = dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), arguments.get("dropout", 0.0))
    return {ours: arguments[name] for name, ours in names.items()} | rates


def to_mlx_layout(tensors: Tensors, method: str) -> Tensors:
    """Canonical tensors as the older MLX port (vincentamato/mlx-coconut) reads them: nn.Linear layout, its names."""
    prefix = "base_causallm." if method == "coconut" else ""
    result = {}
    for name, tensor in tensors.items():
        bare = name.removeprefix("transformer.")
        result[prefix + bare] = mx.contiguous(tensor.T) if TRANSPOSED.match(bare) else tensor
    return result


def _bare_names(tensors: Tensors, path: Path) -> Tensors:
    """Tensors without the prefixes of wrappers (DDP, FSDP, torch.compile) and of the models around GPT-2."""
    bare = _renamed(tensors, lambda name: PREFIX.sub("", WRAPPERS.sub("", name), count=1), path)
    if "wte.weight" not in bare and "lm_head.weight" in bare:  # safetensors.torch.save_model keeps one of tied tensors
        bare["wte.weight"] = bare["lm_head.weight"]
    return bare


def _renamed(tensors: Tensors, shorten: Callable[[str], str], path: Path) -> Tensors:
    bare: Tensors = {}
    for name, tensor in tensors.items():
        short = shorten(name)
        if short in bare and not _equal(bare[short], tensor):
            raise UserError(f"{path}: holds two different tensors for {short}; one of them is called {name}")
        bare[short] = tensor
    return bare


def _check_tied(bare: Tensors, path: Path) -> None:
    """Raise UserError for an output layer that differs from the embedding; warn of an alias that does."""
    embedding = bare.get("wte.weight")
    for name in ("lm_head.weight", "embedding.weight"):
        if embedding is None or name not in bare or _equal(bare[name], embedding):
            continue
        if name == "lm_head.weight":
            raise UserError(f"{path}: lm_head.weight differs from wte.weight; this GPT-2 uses one table for both")
        warn(f"{path}: {name} differs from the token embedding; GPT-2 ties the two, and the embedding is used")


def _equal(one: mx.array, other: mx.array) -> bool:
    return one.shape == other.shape and mx.array_equal(one, other).item()


def _with_biases(tensors: Tensors, path: Path) -> Tensors:
    """Zeros for the biases of a model that has none (nanoGPT's `bias: False`): it computes the same with them."""
    if any(name.endswith(".bias") for name in tensors):
        return tensors
    biases = {
        name.removesuffix("weight") + "bias": mx.zeros(tensor.shape[-1])
        for name, tensor in tensors.items()
        if BIASED.match(name.removeprefix("transformer.")) and tensor.ndim
    }
    if biases:
        say(f"{path}: has no biases; they start from zero, with which the model computes the same")
    return tensors | biases


def _parts(folder: Path) -> list[Path]:
    """The weight files of a folder: one file, or the shards that its index names."""
    for index in (folder / name for name in INDEXES):
        if index.is_file() and (index.name == INDEXES[0] or not (folder / "model.safetensors").is_file()):
            return _shards(index)
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (folder / name).is_file():
            return [folder / name]
    raise UserError(f"{folder}: holds no weights; expected model.safetensors (or shards with their index)")


def _shards(index: Path) -> list[Path]:
    try:
        names = sorted(set(read_json(index)["weight_map"].values()))
        missing = [name for name in names if not (index.parent / name).is_file()]
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise UserError(f"{index}: not an index of weight shards ({error!r:.200})") from error
    if missing:
        raise UserError(f"{index}: names files that are not there: {', '.join(missing)}")
    return [index.parent / name for name in names]


def _format(path: Path) -> str:
    """`safetensors`, `npz` or `torch`. Raises UserError for what is clearly none of them."""
    if path.exists() and not path.is_file():
        raise UserError(f"{path}: not a regular file; expected weights")
    try:
        with open(path, "rb") as file:
            head, size = file.read(64), path.stat().st_size
    except OSError as error:
        raise UserError(f"{path}: cannot read the weights ({error.strerror})") from error
    header_size = int.from_bytes(head[:8], "little")
    if head[8:9] == b"{" and 8 + header_size <= size:  # first, because the size can have the bytes of any other kind
        return "safetensors"
    if found := find_stand_in(head) or next((kind[1:] for kind in FOREIGN if head.startswith(kind[0])), None):
        raise UserError(f"{path}: {found[0]}, not weights; {found[1]}")
    if head.startswith(LEGACY_TORCH):
        return "torch"
    if head.startswith(b"\x80"):
        raise UserError(f"{path}: a pickle, which could run any code; save the weights as safetensors")
    return _archive_format(path) if head.startswith(b"PK") else "safetensors"


def _archive_format(path: Path) -> str:
    """Of a zip archive: numpy's .npz, or a file of torch.save."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except zipfile.BadZipFile as error:
        raise UserError(f"{path}: a damaged or cut-off file ({error})") from error
    unpacked, packed = sum(e.file_size for e in entries), sum(e.compress_size for e in entries)
    if unpacked > BOMB_BYTES and unpacked > BOMB_RATIO * packed:
        raise UserError(f"{path}: {human_size(packed)} that unpack to {human_size(unpacked)}; weights do not shrink so")
    if entries and all(entry.filename.endswith(".npy") for entry in entries):
        return "npz"
    if any(entry.filename.endswith("data.pkl") for entry in entries):
        return "torch"
    raise UserError(f"{path}: a zip archive that holds no weights")


def _read_safetensors(path: Path) -> Tensors:
    try:
        return load_safetensors(path)
    except (RuntimeError, ValueError) as error:
        raise _damaged(path, "safetensors", error) from error


def _read_npz(path: Path) -> Tensors:
    """numpy reads it and not MLX, which crashes where an array's header promises more than the file holds."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return {name: _from_numpy(arrays[name]) for name in arrays.files}
    except Exception as error:  # on damaged files zipfile, its decompressors and numpy raise a dozen types
        raise _damaged(path, "npz", error) from error


def _from_numpy(array: np.ndarray) -> mx.array:
    if array.dtype == "V2":  # what numpy makes of MLX's bfloat16
        return mx.array(array.view(np.uint16)).view(mx.bfloat16)
    return mx.array(array)


def _damaged(path: Path, kind: str, error: Exception) -> UserError:
    reason = " ".join(str(error).split())
    return UserError(f"{path}: not a readable {kind} file; damaged or cut off? ({reason:.200})")


def _load_torch(path: Path, mapped: bool = False) -> dict:
    """What torch.save wrote, or {} where it is no dictionary. mapped: without reading the tensors, where that works."""
    try:
        import torch  # only needed for files saved by PyTorch code

        if not hasattr(torch, "load"):
            raise ImportError("a folder or file named torch is taken for the package")
    except ImportError as error:
        raise UserError(f"{path}: saved by PyTorch; `pip install torch` to open it here") from error
    try:
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped and zipfile.is_zipfile(path))
    except Exception as error:  # damaged archives and pickles raise a dozen types
        # torch's reason comes behind advice to open it unsafely
        reason = " ".join(str(error).rpartition("WeightsUnpickler error: ")[2].split())
        raise UserError(f"{path}: PyTorch cannot open it safely as weights ({reason:.200})") from error
    return found if isinstance(found, dict) else {}


def _is_state_dict(found: object) -> bool:
    """Whether it is a dictionary that holds tensors alone."""
    return isinstance(found, dict) and bool(found) and all(hasattr(tensor, "numel") for tensor in found.values())


def _read_torch(path: Path) -> Tensors:
    found = _load_torch(path)
    if "model_args" in found:
        warn(f"{path}: nanoGPT's GELU is the exact one; here it is GPT-2's, which differs by up to 0.0005")
    state = next(filter(_is_state_dict, [*map(found.get, STATE_KEYS), found]), None)
    if state is None:
        raise UserError(
            f"{path}: expected a state dict of tensors, bare or under {', '.join(f'`{key}`' for key in STATE_KEYS)}"
        )
    n_bytes = 4 * sum(tensor.numel() for tensor in state.values())  # a view can be larger than its file
    if n_bytes > memory_size():
        raise UserError(f"{path}: its tensors take {human_size(n_bytes)}, more than this machine's memory")
    try:
        return {name: mx.array(tensor.detach().float().numpy()) for name, tensor in state.items()}
    except (RuntimeError, TypeError) as error:  # sparse, quantized, without data
        raise UserError(f"{path}: holds tensors that are not plain numbers ({error!s:.200})") from error
