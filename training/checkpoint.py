"""One saved folder: a model in a form that `transformers` opens as GPT2LMHeadModel, and what it says about itself.

    checkpoint_{epoch}/     weights, config.json, coconut.json
    state_{epoch}_{step}/   the same plus the optimizer and the place in the run: what a stopped run resumes from

coconut.json holds where the folder comes from, and the size and checksum of every file beside it. A folder is written
under a temporary name, synced and renamed, so a folder with a final name is complete; only damage from outside changes
it.
"""

import json
import os
import platform
import shutil
import zlib
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib import metadata as packages
from pathlib import Path

import mlx.core as mx
from mlx.utils import tree_flatten, tree_unflatten

from coconut import Coconut
from dataset import Curriculum
from models.weights import load_safetensors
from utils import UserError, crc32, sync, write_text

METADATA = "coconut.json"
RECORDED_PACKAGES = ("mlx", "numpy", "tiktoken")


class Damaged(UserError):
    """A saved folder does not hold what was written into it."""


@dataclass
class TrainState:
    """The place in a run, between two optimizer steps."""

    epoch: int = 0  # the epoch in progress, counted from 0
    step: int = 0  # optimizer steps taken in it
    best_accuracy: float = 0.0
    best_epoch: int = 0  # epochs done when it was reached
    train_seconds: float = 0.0  # what the epoch in progress has taken so far
    metrics_bytes: int = 0  # size of metrics.jsonl at this point, and its checksum, to notice damage
    metrics_crc32: int = 0
    accuracies: dict[str, float] = field(default_factory=dict)  # of every validated epoch, by epochs done


def versions() -> dict[str, str]:
    """Of Python and the packages whose version can change a result."""
    return {"python": platform.python_version()} | {name: packages.version(name) for name in RECORDED_PACKAGES}


def describe_run(curriculum: Curriculum, epochs_done: int, stage: int, world_size: int = 1) -> dict:
    """The metadata that every saved folder records."""
    tokenizer, config = curriculum.tokenizer, curriculum.config
    return {
        "epoch": epochs_done,
        "stage": stage,
        "method": config.method.key,
        "thought": config.thought,
        "curriculum": config.curriculum,
        "c_thought": curriculum.thoughts_per_step,
        "tokenizer": {
            "source": tokenizer.source,
            "sha256": tokenizer.fingerprint,
            "vocab_size": tokenizer.vocab_size,
            "eos_id": tokenizer.eos_id,
        },
        "versions": versions(),
        "config": config.to_dict(),
        "processes": world_size,
    }


def save_checkpoint(model: Coconut, metadata: dict) -> Path:
    """Write checkpoint_{epoch}/: weights and metadata, nothing for resuming."""
    path = _run_dir(metadata) / f"checkpoint_{metadata['epoch']}"
    with _new_folder(path) as folder:
        _write_model(folder, model, metadata)
        _write_metadata(folder, metadata)
    return path


def save_state(model: Coconut, optimizer, state: TrainState, metadata: dict) -> Path:
    """Write state_{epoch}_{step}/; older states are left for the caller to remove."""
    path = _run_dir(metadata) / f"state_{state.epoch}_{state.step}"
    with _new_folder(path) as folder:
        _write_model(folder, model, metadata)
        write_tensors(folder / "optimizer.safetensors", dict(tree_flatten(optimizer.state)))
        _write_metadata(folder, metadata | {"position": asdict(state)})
    return path


def update_state(path: Path, state: TrainState) -> None:
    """Record a new place in a saved state, whose weights and optimizer are still right."""
    metadata = read_metadata(path)
    metadata["position"] = asdict(state)
    _seal(metadata)
    write_text(path / METADATA, json.dumps(metadata, indent=1))


def load_optimizer(path: Path, optimizer) -> None:
    """Restore the optimizer of a state; the learning rate stays the config's, which may have changed."""
    arrays = load_safetensors(path / "optimizer.safetensors")
    learning_rate = optimizer.state["learning_rate"]
    optimizer.state = tree_unflatten(list(arrays.items()))
    optimizer.state["learning_rate"] = learning_rate


def read_metadata(path: Path | None) -> dict:
    """The metadata of a folder of ours; empty for weights from elsewhere.

    Raises Damaged where the content is wrong, and UserError where it cannot be read.
    """
    if not path:
        return {}
    try:
        with _readable(path):
            content = (path / METADATA).read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return {}
    try:
        metadata = json.loads(content)
        seal = metadata["crc32"]
        _seal(metadata)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise Damaged(f"{path}: {METADATA} is damaged ({error!r:.100})") from error
    if metadata["crc32"] != seal:
        raise Damaged(f"{path}: {METADATA} is damaged (its checksum is wrong)")
    return metadata


def own_folder(weights: Path | None) -> Path | None:
    """The checkpoint of ours that these weights are, or whose file they are; None for weights from elsewhere."""
    if not weights or weights.is_dir():
        return weights if read_metadata(weights) else None
    for file in (weights, weights.resolve()):  # a link from elsewhere into the folder too
        if file.name in read_metadata(file.parent).get("files", {}):
            return file.parent
    return None


def trained_epoch(metadata: dict) -> int:
    """The epoch, counted from 0, that the weights of a folder were trained in last."""
    place = metadata.get("position", {"epoch": 0, "step": 0})
    in_progress = place["step"] > 0 and place["epoch"] == metadata["epoch"]
    return max(0, metadata["epoch"] - (not in_progress))


def find_damage(path: Path, metadata: dict) -> str | None:
    """What is wrong with a folder's files; None where they are as they were written.

    Raises UserError where a file cannot be read, which is no damage.
    """
    for name, expected in metadata.get("files", {}).items():
        try:
            with _readable(path):
                size, checksum = (path / name).stat().st_size, crc32(path / name)
        except FileNotFoundError:
            return f"{name} is missing"
        if size != expected["bytes"]:
            return f"{name} has {size} bytes, {expected['bytes']} were written"
        if checksum != expected["crc32"]:
            return f"{name} is damaged (its checksum is wrong)"
    return None


def write_tensors(path: Path, tensors: dict[str, mx.array], header: dict[str, str] | None = None) -> None:
    """Write a safetensors file under exactly this name; raises OSError where it does not reach the disk whole."""
    with open(path, "wb") as file:
        mx.save_safetensors(file, dict(sorted(tensors.items())), header or {})


def remove_folder(folder: Path) -> None:
    """Delete a folder; a kill in between leaves nothing under its name."""
    renamed = folder.with_name(f".{folder.name}.{os.getpid()}.old.tmp")
    os.rename(folder, renamed)
    remove(renamed)


def remove(path: Path) -> None:
    """Delete a file or a folder; of a link the link alone, because what it leads to is the user's."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


@contextmanager
def _readable(path: Path):
    """Turn the OSErrors of reading a folder's files (no permission, a failing disk) into UserError.

    They are no damage: a run that went back to an older state would then remove this one, which may be intact. That a
    file is not there is left to the caller.
    """
    try:
        yield
    except (FileNotFoundError, NotADirectoryError):
        raise
    except OSError as error:
        raise UserError(
            f"{path}: cannot read {error.filename or 'it'} ({error.strerror}). Nothing was changed: make it readable, "
            "or move the folder away to do without it"
        ) from error


def _run_dir(metadata: dict) -> Path:
    return Path(metadata["config"]["save_path"]) / metadata["config"]["name"]


def _write_model(folder: Path, model: Coconut, metadata: dict) -> None:
    header = {"format": "pt"} | {name: str(metadata[name]) for name in ("epoch", "stage", "method")}
    header["vocabulary"] = metadata["tokenizer"]["sha256"]
    for name, tensors in model.transformer.saved_tensors().items():
        write_tensors(folder / name, tensors, header)
    for name, text in model.transformer.saved_texts(metadata["tokenizer"]["eos_id"]).items():
        write_text(folder / name, text)


def _write_metadata(folder: Path, metadata: dict) -> None:
    files = {f.name: {"bytes": f.stat().st_size, "crc32": crc32(f)} for f in sorted(folder.iterdir())}
    metadata = metadata | {"files": files}
    _seal(metadata)
    (folder / METADATA).write_text(json.dumps(metadata, indent=1))


def _seal(metadata: dict) -> None:
    """Put the checksum of everything else into the metadata."""
    metadata.pop("crc32", None)
    metadata["crc32"] = zlib.crc32(json.dumps(metadata, sort_keys=True).encode())


@contextmanager
def _new_folder(path: Path):
    """Yield a temporary folder that becomes `path`, whole and synced, when the block succeeds."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        for file in temporary.iterdir():
            sync(file)
        sync(temporary)
        if path.exists():
            remove_folder(path)  # a resumed run has reached the same point again
        os.rename(temporary, path)
        sync(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
