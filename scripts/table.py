"""Print the paper's Table 1 for your own runs: `python -m scripts.table RUN [RUN ...]`

    python -m scripts.table runs/gsm-coconut runs/gsm-cot
    python -m scripts.table runs --csv
    python -m scripts.table runs -o table.md

RUN is a run's directory, its metrics.jsonl, or a folder that holds runs, directly or one level down. A row has the
accuracy of the best validation epoch of the run's last stage, with its 95 % interval (Wilson). Runs that differ by
their seed alone share a row: mean, sample standard deviation, and every seed's accuracy, because a mean hides seeds
that fail. Runs that are not finished say so in a note, and share a row only with runs that got equally far. An
evaluation (only_eval) is a row of its own.
"""

from startup import signals

if __name__ == "__main__":
    signals.at_once()  # before the slow imports

import argparse
import csv
import io
import json
import statistics
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from startup import blas  # noqa: F401  before mlx

from config import Config, load_config
from dataset import Curriculum
from training.curves import merged_stage
from training.resume import best_evaluation
from utils import UserError, command_parser, exit_status, markdown_table, read_records, say, write_text

HEAD = ["method", "data", "accuracy", "of each seed", "tokens", "s / example", "best epoch", "seeds", "runs", "note"]
# Beside the seed, what may differ between the runs of a row, because it cannot change results.
WITHOUT_EFFECT = {
    "project", "wandb", "save_path", "name", "token_cache", "grad_checkpoint", "save_interval_minutes",
    "keep_checkpoints", "save_only_improve",
}  # fmt: skip
EVALUATION = {"eval/acc", "epoch", "stage"}  # what a record needs to be a result


@dataclass(frozen=True)
class Result:
    """What one run adds to the table."""

    folder: Path
    config: Config | None  # None where there is no config.yaml
    record: dict  # of metrics.jsonl: the evaluation that counts; empty where there is none
    note: str  # why it is not the result of a finished run; empty where it is

    @property
    def row(self) -> str:
        """What the runs of one row have in common. An evaluation does not know how its checkpoint was trained."""
        if not self.config or self.config.only_eval:
            return str(self.folder)
        keys = {name: value for name, value in self.config.to_dict().items() if name not in {*WITHOUT_EFFECT, "seed"}}
        keys["load_model_path"] = Path(keys["load_model_path"] or "").name  # each seed starts from a folder of its own
        return json.dumps([keys, self.note], sort_keys=True)

    @property
    def seed(self) -> int | None:
        return self.config.seed if self.config else None

    @property
    def name(self) -> str:
        """The run's directory; for the evaluation inside a run's directory both names."""
        path = self.folder.resolve()
        return f"{path.parent.name}/{path.name}" if path.name == "only_eval" else path.name


def main(arguments: list[str]) -> int:
    """Run the command line; returns the exit status."""
    return exit_status(lambda: tabulate(parse_args(arguments)))


def parse_args(arguments: list[str]) -> argparse.Namespace:
    parser = command_parser("scripts.table", __doc__)
    parser.add_argument("runs", metavar="RUN", type=Path, nargs="+", help="a run's directory, or a folder of runs")
    parser.add_argument("--csv", action="store_true", help="comma-separated values with all digits instead of Markdown")
    parser.add_argument("-o", "--output", metavar="FILE", type=Path, help="write to FILE, which ends in .md or .csv")
    options = parser.parse_args(arguments)
    formats = [".csv"] if options.csv else [".md", ".csv"]
    if options.output and options.output.suffix not in formats:
        raise UserError(f"{options.output}: expected a name that ends in {' or '.join(formats)}")
    return options


def tabulate(options: argparse.Namespace) -> None:
    """Print or write the table. Raises UserError where there is nothing to show."""
    results = [read_run(folder) for folder in find_runs(options.runs)]
    if not any(result.record for result in results):
        raise UserError(f"{', '.join(map(str, options.runs))}: no run with an evaluation yet")
    groups: dict[str, list[Result]] = {}
    for result in results:
        groups.setdefault(result.row, []).append(result)
    rows = [summary(sorted(group, key=lambda result: result.seed or 0)) for group in groups.values()]
    is_csv = options.csv or (options.output and options.output.suffix == ".csv")
    write(as_csv(rows) if is_csv else as_markdown(rows), options.output)


def write(text: str, path: Path | None) -> None:
    """Write the table to a file, and print its path; without one print the table."""
    try:
        if path:
            write_text(path, text + "\n")
    except OSError as error:
        raise UserError(f"{path}: cannot write it ({error.strerror})") from error
    say(str(path) if path else text)


def find_runs(paths: list[Path]) -> list[Path]:
    """The folders with a metrics.jsonl, each once: those named, or else those up to two levels below.

    Each is followed by the only_eval/ inside it. Raises UserError for a path without any.
    """
    found: dict[Path, Path] = {}
    for path in paths:
        folder = path.parent if path.name == "metrics.jsonl" and path.is_file() else path
        if not folder.is_dir():
            raise UserError(f"{path}: no such folder; name a run's directory, or a folder that holds some")
        below = [file for pattern in ("*", "*/*") for file in sorted(folder.glob(f"{pattern}/metrics.jsonl"))]
        files = list(folder.glob("metrics.jsonl")) or below
        if not files:
            raise UserError(f"{path}: no metrics.jsonl in it or up to two levels below; name a run's directory")
        for run in files:
            for file in (run, *run.parent.glob("only_eval/metrics.jsonl")):
                found.setdefault(file.resolve(), file.parent)
    return list(found.values())


def read_run(folder: Path) -> Result:
    """The result of a run: its best epoch of the last stage, or the newest evaluation where nothing was trained."""
    records = read_metrics(folder / "metrics.jsonl")
    evaluations = [record for record in records if record.keys() >= EVALUATION]
    file = folder / "config.yaml"
    config = load_config(str(file)) if file.is_file() else None
    notes = [] if config else ["no config.yaml"]
    if not evaluations:
        return Result(folder, config, {}, ", ".join([*notes, "no evaluation yet"]))
    if any("train/loss" in record for record in records):
        record = best_evaluation(evaluations, config.to_dict() if config else None)
        notes += what_is_missing(evaluations, config) if config else []
    else:  # the best of several would be chosen on the test set
        record = evaluations[-1]
        notes += [f"newest of {len(evaluations)} evaluations"] if len(evaluations) > 1 else []
    return Result(folder, config, record, ", ".join(notes))


def read_metrics(path: Path) -> list[dict]:
    try:
        return read_records(path)
    except OSError as error:
        raise UserError(f"{path}: cannot read the metrics ({error.strerror})") from error


def what_is_missing(evaluations: list[dict], config: Config) -> list[str]:
    """What a training run has not reached yet, or never will: its last epoch, its last stage."""
    done = max(record["epoch"] for record in evaluations)
    epochs = [f"epoch {done} of {config.num_epochs}"] if done < config.num_epochs else []
    by_token = config.method.drops_steps == "by token"
    return epochs + (missing_tokens if by_token else missing_stages)(evaluations, config)


def missing_stages(evaluations: list[dict], config: Config) -> list[str]:
    """The last stage is that of the last epoch, and not below max_latent_stage where stages drop the steps."""
    planned, *reached = (
        merged_stage(stage, config.to_dict())
        for stage in (Curriculum(config, None).stage(config.num_epochs - 1), *(r["stage"] for r in evaluations))
    )
    last = max(planned, config.max_latent_stage if config.method.drops_steps == "by stage" else 0)
    return [f"stage {max(reached)} of {last}"] if max(reached) < last else []


def missing_tokens(evaluations: list[dict], config: Config) -> list[str]:
    """iCoT: all tokens are removed at remove_all_from, or where fewer are removed than are due, as no more are left."""
    curriculum, reached = Curriculum(config, None), max(record["stage"] for record in evaluations)
    is_capped = any(record["stage"] < curriculum.stage(record["epoch"] - 1) for record in evaluations)
    if is_capped or reached >= curriculum.last_removal:
        return []
    limit = f"of at most {config.remove_all_from}" if config.remove_all_from else "of unknown"
    return [f"stage {reached} {limit}: tokens may be left"]


def summary(group: list[Result]) -> dict:
    """The facts about the runs that share a row, in the order of their seeds; None and [] for what is not known."""
    config, records = group[0].config, [result.record for result in group if result.record]
    accuracies = [record["eval/acc"] for record in records]
    low, high = records[0].get("acc_interval", (None, None)) if len(records) == 1 else (None, None)
    seeds = Counter(result.seed for result in group if result.config)
    repeated = [f"seed {seed} in {n} runs" for seed, n in seeds.items() if n > 1]
    return {
        "method": config.method.title if config else None,
        "data": Path(config.val_path).name if config else None,
        "accuracy": statistics.mean(accuracies) if accuracies else None,
        "interval_low": low,
        "interval_high": high,
        "standard_deviation": statistics.stdev(accuracies) if len(accuracies) > 1 else None,
        "accuracies": accuracies,
        "tokens": mean_of(records, "eval/n_tokens"),
        "seconds_per_example": mean_of(records, "eval/seconds_per_example"),
        "epochs": [record["epoch"] for record in records],
        "n_seeds": len(seeds) or None,
        "seeds": [result.seed for result in group if result.config],
        "names": list(dict.fromkeys(result.name for result in group)),
        "runs": [str(result.folder) for result in group],
        "note": ", ".join([group[0].note] * bool(group[0].note) + repeated),
    }


def mean_of(records: list[dict], name: str) -> float | None:
    """The mean of a value that every record holds; logs of older versions may lack it."""
    values = [record[name] for record in records if name in record]
    return statistics.mean(values) if values and len(values) == len(records) else None


def as_markdown(rows: list[dict]) -> str:
    """The table with rounded numbers. Rows whose runs have the same names show the runs' paths instead."""
    names = Counter(name for row in rows for name in row["names"])
    cells = []
    for row in rows:
        is_clear = all(names[name] == 1 for name in row["names"])
        cells.append([*markdown_cells(row), ", ".join(row["names"] if is_clear else row["runs"]), row["note"]])
    return "\n".join(markdown_table(HEAD, cells))


def markdown_cells(facts: dict) -> list[str]:
    """The cells of one row up to the number of seeds."""
    accuracy = number(facts["accuracy"], ".3f")
    if facts["standard_deviation"] is not None:
        accuracy += f" ± {facts['standard_deviation']:.3f}"
    elif facts["interval_low"] is not None:
        accuracy += f" ({facts['interval_low']:.3f} to {facts['interval_high']:.3f})"
    return [
        facts["method"] or "?",
        facts["data"] or "?",
        accuracy,
        " ".join(f"{accuracy:.3f}" for accuracy in facts["accuracies"]),
        number(facts["tokens"], ".1f"),
        number(facts["seconds_per_example"], ".4f"),
        " ".join(map(str, facts["epochs"])),
        number(facts["n_seeds"], "d"),
    ]


def number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def as_csv(rows: list[dict]) -> str:
    """The facts with all digits as comma-separated values; numbers in a list are separated by spaces, names by `, `."""
    file = io.StringIO()
    writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    for row in rows:
        joined = {name: ", ".join(row[name]) for name in ("names", "runs")}
        writer.writerow({k: " ".join(map(str, v)) if isinstance(v, list) else v for k, v in (row | joined).items()})
    return file.getvalue().rstrip("\n")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
