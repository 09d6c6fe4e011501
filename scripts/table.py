"""Print the paper's Table 1 for your own runs: `python -m scripts.table RUN [RUN ...]`

    python -m scripts.table runs/gsm-coconut runs/gsm-cot
    python -m scripts.table runs --csv > table.csv

RUN is a run's directory, or a folder that holds some, directly or one level down. A row has the accuracy of the best
validation epoch of the run's last stage, with its 95 % interval (Wilson). Runs that differ by their seed alone share a
row: mean, sample standard deviation, and every seed's accuracy, because a mean hides seeds that fail.
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
from dataclasses import dataclass
from pathlib import Path

from startup import blas  # noqa: F401  before mlx

from config import Config, load_config
from training.resume import FREE_KEYS, merged_stage
from utils import UserError, command_parser, exit_status, markdown_table, read_records, say, warn, write_text

HEAD = ["method", "data", "accuracy", "of each run", "tokens", "s / example", "best epoch", "note"]
# What may differ between the runs of a row: what cannot change results, the seed, and where a start was saved.
MAY_DIFFER = {*FREE_KEYS, "seed", "load_model_path"} - {"num_epochs", "resume", "lr", "weight_decay", "max_new_tokens"}


@dataclass(frozen=True)
class Result:
    """The best evaluation of one run's last stage."""

    config: Config
    record: dict  # of metrics.jsonl
    note: str

    @property
    def row(self) -> str:
        """What the runs of one row have in common."""
        keys = {name: value for name, value in self.config.to_dict().items() if name not in MAY_DIFFER}
        return json.dumps(keys, sort_keys=True)


def main(arguments: list[str]) -> int:
    """Run the command line; returns the exit status."""
    return exit_status(lambda: tabulate(parse_args(arguments)))


def parse_args(arguments: list[str]) -> argparse.Namespace:
    parser = command_parser("scripts.table", __doc__)
    parser.add_argument("runs", metavar="RUN", type=Path, nargs="+", help="a run's directory, or a folder of runs")
    parser.add_argument("--csv", action="store_true", help="comma-separated values with all digits instead of Markdown")
    parser.add_argument("-o", "--output", metavar="FILE", type=Path, help="write to a file instead of the screen")
    return parser.parse_args(arguments)


def tabulate(options: argparse.Namespace) -> None:
    """Print or write the table. Raises UserError where there is nothing to show."""
    results = [result for folder in find_runs(options.runs) if (result := read_run(folder))]
    if not results:
        raise UserError(f"{', '.join(map(str, options.runs))}: no run with an evaluation yet")
    groups: dict[str, list[Result]] = {}
    for result in results:
        groups.setdefault(result.row, []).append(result)
    rows = [summary(group) for group in groups.values()]
    text = as_csv(rows) if options.csv else "\n".join(markdown_table(HEAD, [markdown_row(row) for row in rows]))
    if options.output:
        write_text(options.output, text + "\n")
    else:
        say(text)


def find_runs(paths: list[Path]) -> list[Path]:
    """The folders with a metrics.jsonl: those named, and those up to two levels below a folder that is named."""
    found = []
    for path in paths:
        folder = path.parent if path.name == "metrics.jsonl" else path
        if not folder.is_dir():
            raise UserError(f"{path}: no such folder; name a run's directory, or a folder that holds some")
        own = [folder] if (folder / "metrics.jsonl").is_file() else []
        below = [file.parent for pattern in ("*", "*/*") for file in sorted(folder.glob(f"{pattern}/metrics.jsonl"))]
        found += own or [run for run in below if run.name != "only_eval"]
    return list(dict.fromkeys(found))


def read_run(folder: Path) -> Result | None:
    """The result of a run; None, with a warning, where it has no configuration or no evaluation."""
    evaluations = [record for record in read_records(folder / "metrics.jsonl") if "eval/acc" in record]
    file = folder / "config.yaml"
    if not evaluations or not file.is_file():
        warn(f"{folder}: left out, because it has no {'evaluation yet' if file.is_file() else 'config.yaml'}")
        return None
    config = load_config(str(file))
    keys = config.to_dict()
    last = max(merged_stage(record["stage"], keys) for record in evaluations)
    candidates = [record for record in evaluations if merged_stage(record["stage"], keys) == last]
    best = max(candidates, key=lambda record: record["eval/acc"])
    return Result(config, best, _note(config, evaluations[-1]["epoch"], last))


def _note(config: Config, epochs_done: int, last: int) -> str:
    """Why a result is not that of the whole curriculum; empty where it is."""
    notes = []
    if epochs_done < config.num_epochs:
        notes.append(f"epoch {epochs_done} of {config.num_epochs}")
    if config.method.drops_steps == "by stage" and last < config.max_latent_stage:
        notes.append(f"stage {last} of {config.max_latent_stage}")
    return ", ".join(notes)


def summary(group: list[Result]) -> dict:
    """The facts about the runs that share a row."""
    config, records = group[0].config, [result.record for result in group]
    accuracies = [record["eval/acc"] for record in records]
    low, high = records[0]["acc_interval"] if len(group) == 1 else (None, None)
    return {
        "method": config.method.title,
        "data": Path(config.val_path).name,
        "accuracy": statistics.mean(accuracies),
        "interval_low": low,
        "interval_high": high,
        "standard_deviation": statistics.stdev(accuracies) if len(group) > 1 else None,
        "accuracies": accuracies,
        "tokens": statistics.mean(record["eval/n_tokens"] for record in records),
        "seconds_per_example": statistics.mean(record["eval/seconds_per_example"] for record in records),
        "epochs": [record["epoch"] for record in records],
        "note": "; ".join(dict.fromkeys(result.note for result in group if result.note)),
    }


def markdown_row(facts: dict) -> list[str]:
    """The cells of one row, rounded."""
    spread = (
        f"± {facts['standard_deviation']:.3f}"
        if facts["standard_deviation"] is not None
        else (f"({facts['interval_low']:.3f} to {facts['interval_high']:.3f})")
    )
    return [
        facts["method"],
        facts["data"],
        f"{facts['accuracy']:.3f} {spread}",
        " ".join(f"{accuracy:.3f}" for accuracy in facts["accuracies"]),
        f"{facts['tokens']:.1f}",
        f"{facts['seconds_per_example']:.4f}",
        " ".join(map(str, facts["epochs"])),
        facts["note"],
    ]


def as_csv(rows: list[dict]) -> str:
    """The facts with all digits as comma-separated values; lists are separated by spaces, what is missing is empty."""
    file = io.StringIO()
    writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({k: " ".join(map(str, v)) if isinstance(v, list) else v for k, v in row.items()})
    return file.getvalue().rstrip("\n")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
