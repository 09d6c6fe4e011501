"""Train four methods on the same small task and compare them in a table and a picture: `python -m scripts.demo`

The task is chains of arithmetic modulo 10 (preprocessing/chains.py). The model is a GPT-2 of 2 layers, 64 wide, trained
from fresh weights by run.py with args/demo_*.yaml. Coconut's curriculum has one stage beyond the initial one here: the
first of the three steps becomes a thought, the other two stay words (more stages do not train reliably in minutes, see
docs/LOG.md). Started again, the demo resumes an interrupted run and does not repeat a finished one.
"""

from startup import settings, signals

if __name__ == "__main__":
    signals.at_once()  # before the slow imports
    # The products are too small to gain from more threads, and fixed numbers give the same sums on any machine.
    settings.default(OPENBLAS_NUM_THREADS="1", COCONUT_STREAMS="2")  # before startup.blas

import argparse
import os
import sys
from dataclasses import dataclass
from pathlib import Path

from startup import blas  # noqa: F401  before mlx

import run
from config import Config, load_config
from methods import METHODS
from training.curves import draw, read_curves
from training.setup import output_directory
from utils import UserError, read_records, say, warn, write_text

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "preprocessing"))
import chains

TITLES = {name: METHODS[name].title for name in ("no_cot", "cot", "coconut", "no_thoughts")}
DURATION = "3 to 7 minutes on two CPU cores"
QUICK_DURATION = "one to two minutes on two CPU cores"
# The quick version has an eighth of the data, so that epochs are short; too few steps to learn the task.
QUICK_DATA = ["--prefix", "chains_quick", "--train", "2500", "--valid", "200"]
QUICK_KEYS = [
    "train_path=data/chains_quick_train.json",
    "val_path=data/chains_quick_valid.json",
    "tokenizer=data/chains_quick_vocabulary.json",
]


@dataclass(frozen=True)
class Result:
    """The results of a finished run, from the last evaluation in its metrics."""

    title: str
    accuracy: float
    interval: tuple[float, float]  # 95 % interval of the accuracy
    n_tokens: float  # mean length of an answer, thoughts included
    seconds_per_example: float
    n_epochs: int
    seconds: float  # of training, without the evaluations


def main(arguments: list[str]) -> int:
    """Run the command line; returns the exit status."""
    try:
        return demonstrate(parse_args(arguments))
    except (UserError, chains.DataError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def parse_args(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.demo", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help=f"show that all parts work, in {QUICK_DURATION}")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights, shuffling and dropout (default 0)")
    parser.add_argument("--methods", nargs="+", choices=TITLES, default=list(TITLES), help="default: all four")
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="folder of the runs (default runs/demo)")
    options = parser.parse_args(arguments)
    options.methods = list(dict.fromkeys(options.methods))
    if options.seed < 0:
        raise UserError(f"--seed {options.seed}: expected 0 or more")
    if options.out != parser.get_default("out"):
        options.out = options.out.resolve()  # the demo changes to the repository's root
    return options


def demonstrate(options: argparse.Namespace) -> int:
    """Run the whole demo; returns the exit status, which is that of run.py if a run stops or fails."""
    os.chdir(ROOT)  # the configs name their files relative to it
    folder = options.out / f"{'quick' if options.quick else 'seed'}_{options.seed}"
    commands = {method: command_of(method, folder, options) for method in options.methods}
    configs = {method: load_config(words[0], words[1:]) for method, words in commands.items()}
    for config in configs.values():
        output_directory(config)  # raises UserError for an unusable folder, before anything is printed
    missing = {method: words for method, words in commands.items() if not is_finished(configs[method])}
    print_summary(options, folder, list(missing))
    if missing:
        chains.main(QUICK_DATA if options.quick else [])
    status = train(missing)
    if status == 0:
        print_results(options, folder, configs)
    return status


def command_of(method: str, folder: Path, options: argparse.Namespace) -> list[str]:
    """Return the arguments of run.py that train a method."""
    keys = [f"save_path={folder}", f"name={method}", f"seed={options.seed}"]
    return [f"args/demo_{method}.yaml", *keys, *(QUICK_KEYS if options.quick else [])]


def is_finished(config: Config) -> bool:
    """Whether the run directory holds a finished run with this configuration.

    Raises UserError if it holds a run with another one: comparing that with new runs would be misleading.
    """
    saved = config.run_dir / "config.yaml"
    if not saved.is_file():
        return False
    if load_config(str(saved), []) != config:
        raise UserError(
            f"{config.run_dir} holds a run with other settings; move it away, or name another folder with --out"
        )
    evaluations = read_evaluations(config.run_dir)
    return bool(evaluations) and evaluations[-1]["epoch"] == config.num_epochs


def read_evaluations(directory: Path) -> list[dict]:
    """Return the evaluations in a run's metrics.jsonl, oldest first; [] if there are none."""
    path = directory / "metrics.jsonl"
    return [record for record in read_records(path) if "eval/acc" in record] if path.is_file() else []


def print_summary(options: argparse.Namespace, folder: Path, missing: list[str]) -> None:
    """Print what the demo will do, how long it takes, and where it writes."""
    if not missing:
        say(f"All methods are already trained, in {folder}.")
        return
    n_done = len(options.methods) - len(missing)
    say("A small GPT-2 learns chains such as 5 + 3 * 2 - 7, computed from left to right modulo 10 (chance: 0.1 right).")
    say(f"with:  {', '.join(TITLES[method] for method in options.methods)}, one after another")
    say(f"time:  {QUICK_DURATION if options.quick else DURATION}" + (f"; {n_done} trained already" if n_done else ""))
    say("stop:  Ctrl-C at any time; the same command resumes")
    say(f"files: {folder} (the runs, table.txt, demo.png), data/chains_*.json\n")


def train(commands: dict[str, list[str]]) -> int:
    """Train one method after another; returns the exit status of the first run that stops or fails, else 0."""
    for method, words in commands.items():
        say(f"\n==== {TITLES[method]}: python run.py {' '.join(words)}")
        if status := run.main(words):
            if status > 128:  # stopped by a signal; run.py has printed how to resume this run
                print("The demo's command resumes from here too, and then trains the other methods.", file=sys.stderr)
            return status
    return 0


def print_results(options: argparse.Namespace, folder: Path, configs: dict[str, Config]) -> None:
    """Print the table, draw the picture, and write both into the folder."""
    results = [read_result(method, config.run_dir) for method, config in configs.items()]
    text = "\n".join([*table(results), "", *notes(options)])
    say(f"\n{text}\n")
    write_text(folder / "table.txt", text + "\n")
    say(f"table:   {folder / 'table.txt'}")
    picture = folder / "demo.png"
    try:
        draw([read_curves(config.run_dir, TITLES[method]) for method, config in configs.items()], picture)
        say(f"picture: {picture}")
    except (UserError, OSError) as error:
        warn(f"{picture} is not drawn: {error}")
    say("\n" + "\n".join(next_steps(options)))


def read_result(method: str, directory: Path) -> Result:
    """Read the results of a finished run."""
    evaluations = read_evaluations(directory)
    last = evaluations[-1]
    return Result(
        title=TITLES[method],
        accuracy=last["eval/acc"],
        interval=tuple(last["acc_interval"]),
        n_tokens=last["eval/n_tokens"],
        seconds_per_example=last["eval/seconds_per_example"],
        n_epochs=len(evaluations),
        seconds=sum(record["train/seconds"] for record in evaluations),
    )


def table(results: list[Result]) -> list[str]:
    """Return the lines of the comparison, a Markdown table with aligned columns."""
    head = ["method", "accuracy (95 % interval)", "tokens per answer", "seconds per example", "epochs", "training"]
    rows = [
        [
            r.title,
            f"{r.accuracy:.3f} ({r.interval[0]:.3f} to {r.interval[1]:.3f})",
            f"{r.n_tokens:.1f}",
            f"{r.seconds_per_example:.4f}",
            str(r.n_epochs),
            f"{r.seconds:.0f} s",
        ]
        for r in results
    ]
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    lines = [head, ["-" * width for width in widths], *rows]
    return [f"| {' | '.join(cell.ljust(width) for cell, width in zip(line, widths, strict=True))} |" for line in lines]


def notes(options: argparse.Namespace) -> list[str]:
    """Return the explanations below the table."""
    config = load_config("args/demo_coconut.yaml")
    blind = chains.blind_guess(operations=3, modulus=10)
    quick = "This is the quick version: it trains far too little to learn the task, and shows only that all parts work."
    return [
        *([quick] if options.quick else []),
        "Guessing is right 0.100 of the time. A model that uses the operations but not the first number can be right",
        f"{blind:.3f} of the time, because after `* 0` the answer is known. No-CoT does little better.",
        "Coconut: the first of the three steps is a thought, the others are words; without thoughts it is dropped.",
        f"A stage has {config.epochs_per_stage} epochs; stage 0, which is easy, begins at epoch {config.resume + 1}.",
        f"Tokens include thoughts. Seconds per example: in batches of {config.batch_size_eval}, on this machine.",
    ]


def next_steps(options: argparse.Namespace) -> list[str]:
    """Return suggestions for what to run next."""
    python = Path(sys.executable)
    python = python.relative_to(ROOT) if python.is_relative_to(ROOT) else "python"
    if options.quick:
        return [
            "Next, the whole demo, which trains long enough for Coconut to learn the task:",
            f"  {python} -m scripts.demo",
        ]
    return [
        "Next, a run of your own (`run.py --help` lists every key), and the paper's (README.md):",
        f"  {python} run.py args/demo_coconut.yaml name=mine c_thought=2",
    ]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
