"""The folders of a run directory: which one to resume from, whether it fits, which ones to keep."""

import fcntl
import re
import shutil
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from config import CHECKPOINT, FIELDS, STATE, Config
from parallel.streams import n_streams
from text.tokenizer import Tokenizer
from training.checkpoint import METADATA, Damaged, TrainState, find_damage, read_metadata, remove, remove_folder
from training.curves import merged_stage
from utils import UserError, human_size, read_records, warn

TEMPORARY = re.compile(r"^\..+\.\d+(\.old)?\.tmp$")  # as utils.replacing and checkpoint.py name them: .NAME.PID.tmp
# Keys that may change when a run is resumed; a change of any other would make it another run.
FREE_KEYS = {
    "project", "wandb", "save_path", "name", "num_epochs", "resume", "lr", "weight_decay", "batch_size_eval",
    "max_new_tokens", "save_only_improve", "save_interval_minutes", "keep_checkpoints", "token_cache", "only_eval",
    "debug", "grad_checkpoint",
}  # fmt: skip
CONTENT_KEYS = {"train_path", "val_path", "model_config_path"}  # compared by content where it was recorded
BATCH_KEYS = {"batch_size_training", "gradient_accumulation_steps"}


@dataclass(frozen=True)
class Saved:
    """One checkpoint or state found in a run directory; metadata is empty for files of other programs."""

    path: Path
    epochs_done: int
    metadata: dict

    @property
    def is_state(self) -> bool:
        """Whether it holds the optimizer and a place in the run."""
        return "position" in self.metadata

    @property
    def state(self) -> TrainState:
        """Where to resume: as recorded, or for a checkpoint the next epoch, with the best of the epochs before."""
        if self.is_state:
            return TrainState(**self.metadata["position"])
        accuracy = _logged_accuracies(self.path.parent) | recorded_accuracies(self.metadata)
        accuracy = {epoch: accuracy[epoch] for epoch in sorted(accuracy) if epoch <= self.epochs_done}
        best = max((epoch for epoch in accuracy if accuracy[epoch] > 0), key=accuracy.get, default=0)
        kept = {str(epoch): value for epoch, value in accuracy.items()}
        return TrainState(self.epochs_done, 0, accuracy.get(best, 0.0), best, accuracies=kept)

    def progress(self) -> tuple:
        """Sorts what was saved by the run's progress; at equal progress a state goes before a checkpoint."""
        place = self.metadata.get("position", {"epoch": 0, "step": 0})
        return self.epochs_done, self.is_state, place["epoch"], place["step"]


def find_saved(run_dir: Path) -> Saved | None:
    """The newest undamaged state or checkpoint of a run directory, None for a fresh run.

    Damaged ones are named in a warning and skipped; names of other programs are ignored. Raises UserError where there
    are some and all are damaged, because a new start would overwrite them, or where one cannot be read.
    """
    damaged = []
    for saved in sorted(_candidates(run_dir, damaged), key=Saved.progress, reverse=True):
        problem = find_damage(saved.path, saved.metadata)
        if problem is None:
            return saved
        _note_damage(f"{saved.path}: {problem}", damaged)
    if damaged:
        listed = "\n".join(f"  - {text}" for text in damaged)
        raise UserError(f"{run_dir}: every checkpoint is damaged\n{listed}\nMove the directory away to start a new run")
    return None


def recorded_accuracies(metadata: dict) -> dict[int, float]:
    """Validation accuracy by epochs done, as a saved folder holds it under its checksum; empty in old runs."""
    found = metadata.get("position", metadata).get("accuracies", {})
    return {int(epoch): value for epoch, value in found.items()}


def check_same_run(saved: Saved, config: Config, world_size: int = 1) -> list[str]:
    """Differences to the saved run's configuration that are harmless, as text.

    Raises UserError for a difference that would make it another run (method, data, model). Another number of processes
    is allowed if each step takes the same number of items, and another path if check_contents finds the same behind it.
    """
    before, now = saved.metadata.get("config", {}), config.to_dict()
    if before:  # keys that were added since then had their defaults' effect
        before = {name: before.get(name, FIELDS[name].default) for name in now}
    changed = {name: (old, now[name]) for name, old in before.items() if old != now[name]}
    free_keys = FREE_KEYS | (CONTENT_KEYS & saved.metadata.get("contents", {}).keys())
    if "tokenizer" in saved.metadata:
        free_keys = free_keys | {"tokenizer"}  # check_tokenizer compares the vocabularies
    size_before = saved.metadata.get("processes", 1)
    if before and size_before != world_size:
        _check_items_per_step(saved, (before, size_before), (now, world_size))
        free_keys = free_keys | BATCH_KEYS | {"processes"}
        changed["processes"] = size_before, world_size
    fatal = [f"{name}: was {old!r}, is {new!r}" for name, (old, new) in changed.items() if name not in free_keys]
    if fatal:
        listed = "\n".join(f"  - {text}" for text in fatal)
        raise UserError(
            f"{saved.path}: belongs to a run with another configuration\n{listed}\nGive the new run another `name`"
        )
    noted = {name: values for name, values in changed.items() if name not in ("save_path", "name", "resume")}
    return [f"{name}: was {old!r}, is {new!r}" for name, (old, new) in noted.items()] + _check_streams(saved)


def check_contents(saved: Saved, contents: dict[str, str], config: Config) -> None:
    """Raise UserError where a file of the run holds something else than when the state was saved.

    contents: digests by key (setup.content_digests). Old runs have not recorded theirs.
    """
    before = saved.metadata.get("contents", {})
    changed = [name for name in contents if before.get(name, contents[name]) != contents[name]]
    if changed:
        listed = "\n".join(f"  - {name}: {getattr(config, name)} holds something else now" for name in changed)
        raise UserError(
            f"{saved.path}: belongs to a run with other data\n{listed}\nBring the old content back, or give the new "
            f"run another `name` (with `load_model_path: {saved.path}` it starts from these weights)"
        )


def _check_streams(saved: Saved) -> list[str]:
    """A note where another number of CPU streams draws other dropout masks than before."""
    before = saved.metadata.get("streams", n_streams())
    if before == n_streams():
        return []
    note = f"streams: was {before}, is {n_streams()}; dropout and so the losses differ from those of a run that was not"
    return [f"{note} stopped (COCONUT_STREAMS={before} keeps them)"]


def _check_items_per_step(saved: Saved, before: tuple[dict, int], now: tuple[dict, int]) -> None:
    """before, now: (configuration, number of processes)."""
    old, new = (n * keys["batch_size_training"] * keys["gradient_accumulation_steps"] for keys, n in (before, now))
    if old != new:
        raise UserError(
            f"{saved.path}: {before[1]} processes took {old} items a step there (processes x batch_size_training x "
            f"gradient_accumulation_steps), here {now[1]} would take {new}; change these keys so that the product stays"
        )


def check_intact(folder: Path) -> None:
    """Raise UserError where a checkpoint of ours is not as it was written."""
    if problem := find_damage(folder, read_metadata(folder)):
        raise UserError(f"{folder}: {problem}; use another checkpoint")


def check_tokenizer(folder: Path, tokenizer: Tokenizer) -> None:
    """Raise UserError where a checkpoint was trained with another vocabulary than this one."""
    recorded = read_metadata(folder).get("tokenizer")
    if recorded and recorded["sha256"] != tokenizer.fingerprint:
        raise UserError(
            f"{folder}: trained with another vocabulary (from {recorded['source']}) than this run's (from "
            f"{tokenizer.source}); name the right one with `tokenizer:`"
        )


def check_form(folder: Path, config: Config) -> None:
    """Say where a checkpoint saw its sequences in another form; raise UserError where it would be evaluated so.

    The tensors are the same, so nothing else would show that thoughts are read where pauses were learned.
    """
    trained = read_metadata(folder).get("config")
    if not trained:
        return
    names = ["layout", "thought"] if trained["coconut"] and config.coconut else ["layout"]
    for name in names:
        before, now = trained.get(name, FIELDS[name].default), getattr(config, name)
        if before != now:
            fact = f"{folder}: trained with {name} `{before}`, this run has {name} `{now}`"
            if config.only_eval:
                raise UserError(f"{fact}; its answers would be those of another method. Set `{name}: {before}`")
            warn(f"{fact}; it starts from what was learned for another form")


def best_checkpoint(run_dir: Path) -> Path:
    """The checkpoint of a run directory with the best validation accuracy, among those of its last stage.

    Earlier stages answer with other numbers of thoughts, so their accuracy says nothing about the trained method.
    Stages past max_latent_stage count as one: the prompts are the same. The accuracies are those in the saved folders,
    which have checksums; for epochs that these do not hold (old runs), those in metrics.jsonl. Of equal ones the first
    counts, as in training. Without any, the newest.
    """
    saved = sorted(_candidates(run_dir, []), key=Saved.progress)
    found = [s for s in saved if s.metadata and not s.is_state]
    if not found:
        raise UserError(f"{run_dir}: holds no checkpoint yet; train it first, or name a checkpoint")
    accuracy = _logged_accuracies(run_dir)
    for one in saved:
        accuracy |= recorded_accuracies(one.metadata)

    def rank(s: Saved) -> tuple[float, float, int]:
        stage, epoch = merged_stage(s.metadata["stage"], s.metadata["config"]), s.epochs_done
        return (stage, accuracy[epoch], -epoch) if epoch in accuracy else (stage, -1.0, epoch)

    return max(found, key=rank).path


def best_evaluation(evaluations: list[dict], keys: dict | None) -> dict:
    """The record in metrics.jsonl of the checkpoint that best_checkpoint chooses: of equal ones the first.

    keys: the run's configuration; without one, stages past max_latent_stage do not count as one.
    """

    def rank(record: dict) -> tuple[float, float, int]:
        stage = merged_stage(record["stage"], keys) if keys else record["stage"]
        return stage, record["eval/acc"], -record["epoch"]

    return max(evaluations, key=rank)


def check_disk(config: Config, model_bytes: int, epochs_done: int) -> str:
    """What the run will write, as a line for the user; raises UserError where the disk cannot hold it.

    A state is the weights and AdamW's two moments; while a new one is written, the one before it is still there.
    """
    if config.debug or config.only_eval:
        return ""
    left = config.num_epochs - epochs_done
    n_checkpoints = left if config.keep_checkpoints == "all" else min(left, config.keep_checkpoints + 1)
    old_state = sum(f.stat().st_size for state in find_states(config.run_dir) for f in state.iterdir())
    need = model_bytes * (2 * 3 + n_checkpoints) - old_state
    existing = next(folder for folder in (config.run_dir, *config.run_dir.absolute().parents) if folder.exists())
    free = shutil.disk_usage(existing).free
    if need > free:
        raise UserError(
            f"{config.run_dir}: the run needs up to {human_size(need)} of disk for its state and {n_checkpoints} "
            f"checkpoints, and {human_size(free)} are free; free some, or set keep_checkpoints to a small number"
        )
    return f"disk:  up to {human_size(need)} wanted, {human_size(free)} free"


def holds_training(run_dir: Path) -> bool:
    """Whether a directory is that of a training run."""
    return any(CHECKPOINT.match(path.name) or STATE.match(path.name) for path in run_dir.iterdir())


def find_states(run_dir: Path) -> list[Path]:
    """The state folders of a run directory."""
    if not run_dir.is_dir():
        return []
    return [path for path in run_dir.iterdir() if STATE.match(path.name) and path.is_dir()]


def keep_only_state(path: Path) -> None:
    """Remove the other, older states of the run directory."""
    for other in find_states(path.parent):
        if other != path:
            remove_folder(other)


def prune(config: Config, best_epoch: int) -> None:
    """Remove checkpoints beyond the newest keep_checkpoints and the best."""
    if config.keep_checkpoints == "all":
        return
    ours = {int(m[1]): p for p in config.run_dir.iterdir() if (m := CHECKPOINT.match(p.name)) and p.is_dir()}
    newest = sorted(ours)[-config.keep_checkpoints :]
    for epochs_done, path in ours.items():
        if epochs_done not in newest and epochs_done != best_epoch:
            remove_folder(path)


def clean(run_dir: Path) -> None:
    """Remove the temporary files of a killed process."""
    for leftover in run_dir.iterdir():
        if TEMPORARY.match(leftover.name):
            remove(leftover)


@contextmanager
def locked(run_dir: Path):
    """Hold the run directory for this process; raises UserError where another process holds it.

    Some network file systems have no locks: there is a warning then, and no protection.
    """
    with open(run_dir / ".lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(
                f"{run_dir}: another process is working in this directory; wait for it or choose another `name`"
            ) from error
        except OSError as error:
            warn(f"{run_dir}: this file system has no locks ({error.strerror}); do not start the run a second time")
        yield


def _candidates(run_dir: Path, damaged: list[str]) -> list[Saved]:
    """Every folder and file that may be ours; those with damaged metadata are added to `damaged`.

    Raises UserError for a link to what is not there: its disk may not be mounted, so it is no damage.
    """
    found = []
    for path in run_dir.iterdir():
        checkpoint, state = CHECKPOINT.match(path.name), STATE.match(path.name)
        if not (checkpoint or state) or (state and path.is_file()):
            continue
        if path.is_symlink() and not path.exists():
            raise UserError(f"{path}: a link to what is not there. Nothing was changed: bring that back, or remove it")
        try:
            metadata = read_metadata(path)
        except Damaged as error:
            _note_damage(str(error), damaged)
            continue
        if path.is_dir() and not metadata:
            _note_damage(f"{path}: {METADATA} is missing", damaged)
            continue
        found.append(Saved(path, metadata.get("epoch", int(checkpoint[1]) if checkpoint else 0), metadata))
    return found


def _note_damage(text: str, damaged: list[str]) -> None:
    damaged.append(text)
    warn(f"{text}; going back to the one before it")


def _logged_accuracies(run_dir: Path) -> dict[int, float]:
    """Validation accuracy by epochs done, as metrics.jsonl has it; empty without that file."""
    path = run_dir / "metrics.jsonl"
    records = read_records(path) if path.is_file() else []
    return {r["epoch"]: r["eval/acc"] for r in records if "eval/acc" in r and "epoch" in r}
