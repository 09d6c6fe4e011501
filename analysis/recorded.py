"""What a run's directory has recorded: metrics, configuration, checkpoints, predictions."""

import json
import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from config import CHECKPOINT, FIELDS, Config, load_config
from training.checkpoint import read_metadata
from training.curves import EVALUATION, TRAINING
from training.resume import best_evaluation
from training.trainer import predictions_path
from utils import UserError, read_records

# What the page reads of a record in metrics.jsonl and of a prediction
NUMBERS = ("eval/acc", "eval/loss", "train/loss", "train/lr", "train/seconds")
WHOLE_NUMBERS = {"epoch": 0, "stage": 0, "train/epoch": 1, "train/step": 0}  # and the least value
PREDICTION = {
    "idx": int, "question": str, "expected_answer": str, "answer": str, "correct": bool, "cot": str, "output_ids": list,
    "n_tokens": int,
}  # fmt: skip


@dataclass(frozen=True)
class RecordedRun:
    """What the directory of a run holds, as far as the page shows it."""

    folder: Path
    records: list[dict]  # the lines of metrics.jsonl
    n_unreadable: int  # lines of it that are no records
    own_config: Config | None  # that of config.yaml; older evaluations have none

    @cached_property
    def evaluations(self) -> list[dict]:
        """The records of evaluations, oldest first."""
        return [record for record in self.records if record.keys() >= EVALUATION]

    @cached_property
    def steps(self) -> list[dict]:
        """The records of optimizer steps."""
        return [record for record in self.records if record.keys() >= TRAINING]

    @cached_property
    def checkpoints(self) -> dict[int, Path]:
        """{epochs done: folder} of the checkpoints that are left."""
        found = {int(m[1]): path for path in self.folder.iterdir() if (m := CHECKPOINT.match(path.name))}
        return {epoch: found[epoch] for epoch in sorted(found) if found[epoch].is_dir()}

    @property
    def was_trained(self) -> bool:
        """Whether this is a training run, not an evaluation."""
        return bool(self.steps or self.checkpoints)

    @cached_property
    def best(self) -> dict | None:
        """The best evaluation of the last stage; of an evaluation the newest, as the best is chosen on the test set."""
        return self._best_of(self.evaluations)

    @cached_property
    def shown(self) -> dict | None:
        """The evaluation whose predictions are shown: the best one whose checkpoint is left, else the best."""
        kept = [record for record in self.evaluations if record["epoch"] in self.checkpoints]
        return self._best_of(kept or self.evaluations)

    @cached_property
    def checkpoint(self) -> Path | None:
        """The model behind the shown predictions; None where it is gone, or its folder is not one of this code."""
        if self.was_trained:
            return self.checkpoints.get(self.shown["epoch"]) if self.shown else None
        named = self.shown and self.shown.get("checkpoint")
        return Path(named) if named and read_metadata(Path(named)) else None

    @cached_property
    def metadata(self) -> dict:
        """What the checkpoint says about itself; empty without one."""
        return read_metadata(self.checkpoint)

    @cached_property
    def config(self) -> Config | None:
        """The run's configuration, else the one that its checkpoint was trained with."""
        recorded = {name: value for name, value in self.metadata.get("config", {}).items() if name in FIELDS}
        return self.own_config or (Config(**recorded) if recorded else None)

    @property
    def title(self) -> str:
        """The method's name."""
        return self.config.method.title if self.config else "Unknown method"

    def predictions_of(self, record: dict) -> Path:
        """The file of an evaluation's predictions, which may be gone."""
        names = [name for name in record if "/" not in name and name not in ("acc_interval", "epoch")]
        about = {name: record[name] for name in names} if "checkpoint" in record else {}
        return predictions_path(self.folder, record["epoch"], about)

    def n_items(self, record: dict) -> int | None:
        """How many items an evaluation answered; None where its predictions are gone."""
        path = self.predictions_of(record)
        return path.read_bytes().count(b"\n") if path.is_file() else None

    def _best_of(self, evaluations: list[dict]) -> dict | None:
        if not evaluations:
            return None
        keys = self.own_config.to_dict() if self.own_config else None
        return best_evaluation(evaluations, keys) if self.was_trained else evaluations[-1]


def read_run(folder: Path) -> RecordedRun:
    """Read a run's directory. Raises UserError where it is none, or its metrics hold nothing or are damaged."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such directory; name the directory of a run, which holds metrics.jsonl")
    path, config = folder / "metrics.jsonl", folder / "config.yaml"
    if not path.is_file():
        raise UserError(f"{folder}: holds no metrics.jsonl; name the directory of a run (save_path/name)")
    records = read_records(path)
    for record in records:
        check_record(path, record)
    n_lines = sum(bool(line.strip()) for line in path.read_bytes().splitlines())
    own_config = load_config(str(config)) if config.is_file() else None
    run = RecordedRun(folder, records, n_lines - len(records), own_config)
    if not (run.evaluations or run.steps):
        raise UserError(f"{path}: holds no losses yet, or is damaged; there is nothing to report")
    return run


def check_record(path: Path, record: dict) -> None:
    """Raise UserError where a value that the page computes with is not the number it should be."""
    least = dict.fromkeys(NUMBERS, -math.inf) | WHOLE_NUMBERS
    wrong = [name for name in least if name in record and not is_number(record[name], least[name])]
    interval = record.get("acc_interval", [0, 1])
    if not (isinstance(interval, list) and len(interval) == 2 and all(map(is_number, interval))):
        wrong.append("acc_interval")
    if wrong:
        name = wrong[0]
        raise UserError(f"{path}: damaged; {name}: expected a number, found {record[name]!r:.50}")


def is_number(value: object, least: float = -math.inf) -> bool:
    """Whether a value of JSON is a finite number, and not below `least`."""
    return isinstance(value, (int, float)) and math.isfinite(value) and value >= least


def read_predictions(path: Path, record: dict) -> list[dict]:
    """The judged answers of an evaluation. Raises UserError where a line is damaged or its accuracy is another."""
    found = [read_prediction(path, n, line) for n, line in enumerate(path.read_bytes().splitlines(), 1)]
    n_right = sum(p["correct"] for p in found)
    if not found or abs(n_right / len(found) - record["eval/acc"]) > 1e-6:
        raise UserError(
            f"{path}: damaged, or of another run; {n_right} of {len(found)} answers are right, metrics.jsonl has the "
            f"accuracy {record['eval/acc']}. Move the file away to make the page without predictions"
        )
    return found


def read_prediction(path: Path, number: int, line: bytes) -> dict:
    """One line. Raises UserError where it is not a prediction."""
    try:
        found = json.loads(line)
        wrong = [name for name, kind in PREDICTION.items() if not isinstance(found[name], kind)]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        wrong = [repr(error)]
    if wrong or found["n_tokens"] < len(found["output_ids"]):
        raise UserError(
            f"{path}, line {number}: damaged, expected a prediction ({', '.join(wrong) or 'n_tokens':.100}). Move the "
            "file away to make the page without predictions"
        )
    return found


def read_settings(path: Path) -> dict:
    """The first line of an analysis command's records. Raises UserError where it is damaged."""
    try:
        with open(path, "rb") as file:
            found = json.loads(file.readline(1 << 20))
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise UserError(f"{path}: damaged; expected the command's settings in the first line. Make it again")
    return found
