"""What a run keeps on disk, and how it is taken up again.

    checkpoint_{epoch}/     a model after that many epochs, in a form that `transformers` opens as GPT2LMHeadModel
    state_{epoch}_{step}/   the same plus the optimiser and the place in the run: what an interrupted run goes on from

Both carry coconut.json: where they come from, and size and checksum of every file beside it. A folder is written under
a temporary name, synced and renamed, so a name in its final form is complete; only damage from outside can change it.
"""

import fcntl
import json
import os
import platform
import re
import shutil
import zlib
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path

import cpu_blas  # noqa: F401  must come before mlx
import mlx.core as mx
from mlx.utils import tree_flatten, tree_unflatten

from coconut import Coconut
from config import Config
from tokenizer import Tokenizer
from utils import UserError, crc32, human_size, sync, warn, write_text

CHECKPOINT = re.compile(r"^checkpoint_(\d+)(\.safetensors)?$")
STATE = re.compile(r"^state_(\d+)_(\d+)$")
RECORD = "coconut.json"
# Keys that may change when a run is taken up again; a change of any other would make it another run.
FREE_KEYS = {
    "project", "save_path", "name", "num_epochs", "resume", "lr", "weight_decay", "batch_size_eval", "max_new_tokens",
    "save_only_improve", "save_interval_minutes", "keep_checkpoints", "token_cache", "only_eval", "debug",
    "grad_checkpoint",
}  # fmt: skip


@dataclass
class Position:
    """The place in a run, at a boundary between optimiser steps."""

    epoch: int = 0  # the epoch in progress, counted from 0
    step: int = 0  # optimiser steps taken in it
    best_accuracy: float = 0.0
    best_epoch: int = 0  # epochs done when it was reached
    train_seconds: float = 0.0  # what the epoch in progress has taken so far
    metrics_bytes: int = 0  # size of metrics.jsonl at this point, and its checksum, to notice damage
    metrics_crc32: int = 0


@dataclass(frozen=True)
class Saved:
    """One checkpoint or state found in a run directory; record is empty for files of other programs."""

    path: Path
    epochs_done: int
    record: dict

    @property
    def position(self) -> Position:
        """Where to go on: as recorded, or for a mere checkpoint the next epoch, with the best of metrics.jsonl."""
        if "position" in self.record:
            return Position(**self.record["position"])
        accuracy = _accuracies(self.path.parent / "metrics.jsonl")
        done = [epoch for epoch in sorted(accuracy) if epoch <= self.epochs_done and accuracy[epoch] > 0]
        best = max(done, key=accuracy.get, default=0)
        return Position(self.epochs_done, 0, accuracy.get(best, 0.0), best)

    def age(self) -> tuple:
        """Sorts what was saved by the progress of the run; at equal progress a state goes before a checkpoint."""
        position = self.record.get("position", {"epoch": 0, "step": 0})
        return self.epochs_done, "position" in self.record, position["epoch"], position["step"]

    def problem(self) -> str | None:
        """What is wrong with the files, None where they are as they were written."""
        for name, expected in self.record.get("files", {}).items():
            file = self.path / name
            if not file.is_file():
                return f"{name} is missing"
            if file.stat().st_size != expected["bytes"]:
                return f"{name} has {file.stat().st_size} bytes, {expected['bytes']} were written"
            if crc32(file) != expected["crc32"]:
                return f"{name} is damaged (its checksum is wrong)"
        return None


def describe_run(config: Config, tokenizer: Tokenizer, epochs_done: int, stage: int, n_processes: int = 1) -> dict:
    """The facts every saved folder records about itself."""
    packages = ("mlx", "numpy", "tiktoken")
    return {
        "epoch": epochs_done,
        "stage": stage,
        "method": config.method,
        "c_thought": config.thoughts_per_step,
        "tokenizer": {"source": tokenizer.source, "sha256": tokenizer.fingerprint, "vocab_size": tokenizer.vocab_size},
        "versions": {"python": platform.python_version()} | {name: metadata.version(name) for name in packages},
        "config": config.to_dict(),
        "processes": n_processes,
    }


def save_checkpoint(model: Coconut, record: dict) -> Path:
    """Write checkpoint_{epoch}/: weights and record, nothing for resuming."""
    path = _run_dir(record) / f"checkpoint_{record['epoch']}"
    with _new_folder(path) as folder:
        _write_model(folder, model, record)
        _write_record(folder, record)
    return path


def save_state(model: Coconut, optimizer, position: Position, record: dict) -> None:
    """Write state_{epoch}_{step}/ and, once it is safe on disk, remove the older ones."""
    path = _run_dir(record) / f"state_{position.epoch}_{position.step}"
    with _new_folder(path) as folder:
        _write_model(folder, model, record)
        write_tensors(folder / "optimizer.safetensors", dict(tree_flatten(optimizer.state)))
        _write_record(folder, record | {"position": asdict(position)})
    keep_only_state(path)


def keep_only_state(path: Path) -> None:
    """Remove the other states of the run directory, older ones that a newer one has made superfluous."""
    for other in _states(path.parent):
        if other != path:
            _remove(other)


def move_state(run_dir: Path, position: Position) -> None:
    """Record a new position in the saved state, whose weights and optimiser are still right."""
    (path,) = _states(run_dir)
    record = _read_record(path)
    record["position"] = asdict(position)
    _seal(record)
    write_text(path / RECORD, json.dumps(record, indent=1))


def prune(config: Config, position: Position) -> None:
    """Remove checkpoints beyond the newest keep_checkpoints and the best."""
    if config.keep_checkpoints == "all":
        return
    ours = {int(m[1]): p for p in config.run_dir.iterdir() if (m := CHECKPOINT.match(p.name)) and p.is_dir()}
    newest = sorted(ours)[-config.keep_checkpoints :]
    for epochs_done, path in ours.items():
        if epochs_done not in newest and epochs_done != position.best_epoch:
            _remove(path)


def best_checkpoint(run_dir: Path) -> Path:
    """The checkpoint of a run directory with the best validation accuracy, among those of its last stage.

    Earlier stages answer with other numbers of thoughts, so their accuracy says nothing about the trained method.
    Stages past max_latent_stage count as one: the prompts are the same. Without metrics.jsonl, the newest.
    """
    found = [s for s in _candidates(run_dir, []) if s.record and "position" not in s.record]
    if not found:
        raise UserError(f"{run_dir}: holds no checkpoint yet; train it first, or name a checkpoint")
    accuracy = _accuracies(run_dir / "metrics.jsonl")
    return max(found, key=lambda s: (_stage_group(s.record), accuracy.get(s.epochs_done, -1.0), s.epochs_done)).path


def check_disk(config: Config, model_bytes: int, epochs_done: int) -> str:
    """What the run will write, as a line for the user; raises UserError where the disk cannot hold it.

    A state is the weights and AdamW's two moments; while a new one is written, the one before it is still there.
    """
    if config.debug or config.only_eval:
        return ""
    left = config.num_epochs - epochs_done
    n_checkpoints = left if config.keep_checkpoints == "all" else min(left, config.keep_checkpoints + 1)
    old_state = sum(f.stat().st_size for state in _states(config.run_dir) for f in state.iterdir())
    need = model_bytes * (2 * 3 + n_checkpoints) - old_state
    free = shutil.disk_usage(_existing(config.run_dir)).free
    if need > free:
        raise UserError(
            f"{config.run_dir}: the run needs up to {human_size(need)} of disk for its state and {n_checkpoints} "
            f"checkpoints, and {human_size(free)} are free; free some, or set keep_checkpoints to a small number"
        )
    return f"disk:  up to {human_size(need)} wanted, {human_size(free)} free"


def holds_training(run_dir: Path) -> bool:
    """Whether a directory is that of a training run."""
    return any(CHECKPOINT.match(path.name) or STATE.match(path.name) for path in run_dir.iterdir())


def find_saved(run_dir: Path) -> Saved | None:
    """The newest undamaged state or checkpoint of a run directory, None for a fresh run.

    Damaged ones are named in a warning and passed over; names of other programs are left alone. Raises UserError
    where there are some and all are damaged: starting over would overwrite a night's work.
    """
    damaged = []
    for saved in sorted(_candidates(run_dir, damaged), key=Saved.age, reverse=True):
        problem = saved.problem()
        if problem is None:
            return saved
        damaged.append(f"{saved.path}: {problem}")
        warn(f"{damaged[-1]}; going back to the one before it")
    if damaged:
        listed = "\n".join(f"  - {text}" for text in damaged)
        raise UserError(f"{run_dir}: every checkpoint is damaged\n{listed}\nMove the directory away to start afresh")
    return None


def load_optimizer(saved: Saved, optimizer) -> bool:
    """Restore the optimiser of a state; False where the folder has none (a checkpoint)."""
    path = saved.path / "optimizer.safetensors"
    if "position" not in saved.record:
        return False
    arrays = mx.load(str(path))
    mx.eval(arrays)
    learning_rate = optimizer.state["learning_rate"]
    optimizer.state = tree_unflatten(list(arrays.items()))
    optimizer.state["learning_rate"] = learning_rate  # the config's, which may have been changed
    return True


def check_same_run(saved: Saved, config: Config, n_processes: int = 1) -> list[str]:
    """Differences to the saved run's configuration that are harmless, as text.

    Raises UserError for a difference that would make it another run (method, data, model). Another number of processes
    is none as long as a step takes the same items.
    """
    before, now = saved.record.get("config", {}), config.to_dict()
    changed = {name: (before[name], now[name]) for name in before if name in now and before[name] != now[name]}
    free_keys, n_before = FREE_KEYS, saved.record.get("processes", 1)
    if before and n_before != n_processes:
        old, new = (keys["batch_size_training"] * keys["gradient_accumulation_steps"] for keys in (before, now))
        if old * n_before != new * n_processes:
            raise UserError(
                f"{saved.path}: {n_before} processes took {old * n_before} items a step there (processes x "
                f"batch_size_training x gradient_accumulation_steps), here {n_processes} would take "
                f"{new * n_processes}; change these keys so that the product stays"
            )
        free_keys = FREE_KEYS | {"batch_size_training", "gradient_accumulation_steps", "processes"}
        changed["processes"] = n_before, n_processes
    fatal = [f"{name}: was {old!r}, is {new!r}" for name, (old, new) in changed.items() if name not in free_keys]
    if fatal:
        listed = "\n".join(f"  - {text}" for text in fatal)
        raise UserError(
            f"{saved.path}: belongs to a run with another configuration\n{listed}\nGive the new run another `name`"
        )
    free = {name: values for name, values in changed.items() if name not in ("save_path", "name", "resume")}
    return [f"{name}: was {old!r}, is {new!r}" for name, (old, new) in free.items()]


def check_intact(folder: Path) -> None:
    """Raise UserError where a checkpoint of ours is not as it was written."""
    if problem := Saved(folder, 0, read_record(folder)).problem():
        raise UserError(f"{folder}: {problem}; use another checkpoint")


def check_tokenizer(folder: Path, tokenizer: Tokenizer) -> None:
    """Raise UserError where a checkpoint was trained with another vocabulary than this one."""
    recorded = read_record(folder).get("tokenizer")
    if recorded and recorded["sha256"] != tokenizer.fingerprint:
        raise UserError(
            f"{folder}: trained with another vocabulary (from {recorded['source']}) than this run's (from "
            f"{tokenizer.source}); name the right one with `tokenizer:`"
        )


def read_record(path: Path | None) -> dict:
    """What a checkpoint of ours says of itself; empty for weights from elsewhere."""
    return _read_record(path) if path and (path / RECORD).is_file() else {}


def write_tensors(path: Path, tensors: dict[str, mx.array], header: dict[str, str] | None = None) -> None:
    """Write a safetensors file under exactly this name; raises OSError where it does not reach the disk whole."""
    with open(path, "wb") as file:
        mx.save_safetensors(file, dict(sorted(tensors.items())), header or {})


def clean(run_dir: Path) -> None:
    """Remove what a killed process left half-written."""
    for leftover in run_dir.rglob(".*.tmp"):
        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()


@contextmanager
def locked(run_dir: Path):
    """Hold the run directory for this process; raises UserError where another has it."""
    with open(run_dir / ".lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(
                f"{run_dir}: another process is at work in this directory; wait for it or choose another `name`"
            ) from error
        yield


def _candidates(run_dir: Path, damaged: list[str]) -> list[Saved]:
    found = []
    for path in run_dir.iterdir():
        checkpoint, state = CHECKPOINT.match(path.name), STATE.match(path.name)
        if not (checkpoint or state):
            continue
        try:
            record = read_record(path)
        except UserError as error:
            damaged.append(str(error))
            warn(f"{error}; going back to the one before it")
            continue
        if path.is_dir() and not record:
            damaged.append(f"{path}: {RECORD} is missing")
            warn(f"{damaged[-1]}; going back to the one before it")
            continue
        found.append(Saved(path, record.get("epoch", int(checkpoint[1]) if checkpoint else 0), record))
    return found


def _run_dir(record: dict) -> Path:
    return Path(record["config"]["save_path"]) / record["config"]["name"]


def _states(run_dir: Path) -> list[Path]:
    return [path for path in run_dir.iterdir() if STATE.match(path.name)] if run_dir.is_dir() else []


def _existing(path: Path) -> Path:
    return next(folder for folder in (path, *path.absolute().parents) if folder.exists())


def _stage_group(record: dict) -> int:
    return min(record["stage"], record["config"]["max_latent_stage"] + 1)


def _accuracies(metrics: Path) -> dict[int, float]:
    """Validation accuracy by epochs done."""
    if not metrics.is_file():
        return {}
    found = {}
    for line in metrics.read_bytes().splitlines():
        with suppress(ValueError, KeyError, TypeError):  # a torn line says nothing
            record = json.loads(line)
            found[record["epoch"]] = record["eval/acc"]
    return found


def _remove(folder: Path) -> None:
    """Delete a folder so that a kill half-way leaves nothing under its name."""
    doomed = folder.with_name(f".{folder.name}.{os.getpid()}.old.tmp")
    os.rename(folder, doomed)
    shutil.rmtree(doomed)


def _write_model(folder: Path, model: Coconut, record: dict) -> None:
    header = {"format": "pt", "epoch": str(record["epoch"]), "stage": str(record["stage"]), "method": record["method"]}
    write_tensors(folder / "model.safetensors", dict(tree_flatten(model.parameters())), header)
    write_text(folder / "config.json", json.dumps(model.transformer.config.to_dict(), indent=1))


def _write_record(folder: Path, record: dict) -> None:
    files = {f.name: {"bytes": f.stat().st_size, "crc32": crc32(f)} for f in sorted(folder.iterdir())}
    record = record | {"files": files}
    _seal(record)
    (folder / RECORD).write_text(json.dumps(record, indent=1))


def _seal(record: dict) -> None:
    record.pop("crc32", None)
    record["crc32"] = zlib.crc32(json.dumps(record, sort_keys=True).encode())


def _read_record(folder: Path) -> dict:
    try:
        record = json.loads((folder / RECORD).read_bytes())
        seal = record["crc32"]
        _seal(record)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{folder}: {RECORD} is unreadable ({error!r:.100})") from error
    if record["crc32"] != seal:
        raise UserError(f"{folder}: {RECORD} is damaged (its checksum is wrong)")
    return record


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
            _remove(path)  # the same point reached again
        os.rename(temporary, path)
        sync(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
