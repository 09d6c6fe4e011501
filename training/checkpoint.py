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
from dataclasses import asdict, dataclass
from importlib import metadata as packages
from pathlib import Path

import mlx.core as mx
from mlx.utils import tree_flatten, tree_unflatten

from coconut import Coconut
from dataset import Curriculum
from text.tokenizer import SPECIAL_TOKENS
from utils import UserError, crc32, sync, write_text

METADATA = "coconut.json"
RECORDED_PACKAGES = ("mlx", "numpy", "tiktoken")


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


def describe_run(curriculum: Curriculum, epochs_done: int, stage: int, world_size: int = 1) -> dict:
    """The metadata that every saved folder records."""
    tokenizer, config = curriculum.tokenizer, curriculum.config
    return {
        "epoch": epochs_done,
        "stage": stage,
        "method": config.method.name,
        "c_thought": curriculum.thoughts_per_step,
        "tokenizer": {"source": tokenizer.source, "sha256": tokenizer.fingerprint, "vocab_size": tokenizer.vocab_size},
        "versions": {"python": platform.python_version()}
        | {name: packages.version(name) for name in RECORDED_PACKAGES},
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
    arrays = mx.load(str(path / "optimizer.safetensors"))
    mx.eval(arrays)
    learning_rate = optimizer.state["learning_rate"]
    optimizer.state = tree_unflatten(list(arrays.items()))
    optimizer.state["learning_rate"] = learning_rate


def read_metadata(path: Path | None) -> dict:
    """The metadata of a folder of ours; empty for weights from elsewhere. Raises UserError where it is damaged."""
    if not path or not (path / METADATA).is_file():
        return {}
    try:
        metadata = json.loads((path / METADATA).read_bytes())
        seal = metadata["crc32"]
        _seal(metadata)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: {METADATA} is unreadable ({error!r:.100})") from error
    if metadata["crc32"] != seal:
        raise UserError(f"{path}: {METADATA} is damaged (its checksum is wrong)")
    return metadata


def find_damage(path: Path, metadata: dict) -> str | None:
    """What is wrong with a folder's files; None where they are as they were written."""
    for name, expected in metadata.get("files", {}).items():
        file = path / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != expected["bytes"]:
            return f"{name} has {file.stat().st_size} bytes, {expected['bytes']} were written"
        if crc32(file) != expected["crc32"]:
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
    shutil.rmtree(renamed)


def _run_dir(metadata: dict) -> Path:
    return Path(metadata["config"]["save_path"]) / metadata["config"]["name"]


def _write_model(folder: Path, model: Coconut, metadata: dict) -> None:
    header = {"format": "pt"} | {name: str(metadata[name]) for name in ("epoch", "stage", "method")}
    write_tensors(folder / "model.safetensors", dict(tree_flatten(model.parameters())), header)
    end_of_text = metadata["tokenizer"]["vocab_size"] - len(SPECIAL_TOKENS)  # the special tokens follow the vocabulary
    write_text(folder / "config.json", json.dumps(model.transformer.config.to_dict(end_of_text), indent=1))


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
