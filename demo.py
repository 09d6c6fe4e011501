"""The demo: four methods learn the same small task, then a table and a picture compare them. `python demo.py`

The task is a chain of arithmetic modulo 10 (preprocessing/chains.py), the model a GPT-2 of 2 layers, 64 wide, trained
from fresh weights through run.py with args/demo_*.yaml. Coconut's curriculum goes one stage far here: the first of the
three steps becomes a thought, the other two stay words (more stages are not reliable in minutes, see docs/LOG.md).
A run that is interrupted goes on where it was, one that is finished is not trained again.
"""

import stopping

if __name__ == "__main__":
    stopping.at_once()  # before the slow imports

import argparse
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # tiny products, and sums for any number of cores; before cpu_blas
os.environ.setdefault("COCONUT_STREAMS", "2")

import run as trainer
from config import Config, load_config
from plot import draw, read_curves
from utils import UserError, say, warn, write_text

ROOT = Path(__file__).resolve().parent
sys.path.append(str(ROOT / "preprocessing"))
import chains  # noqa: E402

TITLES = {"no_cot": "No-CoT", "cot": "CoT", "coconut": "Coconut", "no_thoughts": "Coconut without thoughts"}
DURATION = "3 to 7 minutes on two CPU cores"
QUICK_DURATION = "one to two minutes on two CPU cores"
# The quick version: an eighth of the data, so that epochs are short; too few steps to learn from.
QUICK_DATA = ["--prefix", "chains_quick", "--train", "2500", "--valid", "200"]
QUICK_KEYS = [
    "train_path=data/chains_quick_train.json",
    "val_path=data/chains_quick_valid.json",
    "tokenizer=data/chains_quick_vocabulary.json",
]


@dataclass(frozen=True)
class Result:
    """What a finished run has come to, from the last evaluation in its metrics."""

    title: str
    accuracy: float
    interval: tuple[float, float]
    n_tokens: float
    seconds_per_example: float
    n_epochs: int
    seconds: float  # of training, without the evaluations


def main(arguments: list[str]) -> int:
    """The command line; returns the exit status."""
    try:
        options = parse_args(arguments)
        return demonstrate(options)
    except (UserError, chains.DataError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def parse_args(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="demo.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help=f"see the machinery work, in {QUICK_DURATION}")
    parser.add_argument("--seed", type=int, default=0, help="seed of fresh weights and shuffling (default 0)")
    parser.add_argument("--methods", nargs="+", choices=TITLES, default=list(TITLES), help="only these")
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="folder of the runs (default runs/demo)")
    options = parser.parse_args(arguments)
    options.methods = list(dict.fromkeys(options.methods))
    if options.seed < 0:
        raise UserError(f"--seed {options.seed}: expected 0 or more")
    if options.out != parser.get_default("out"):
        options.out = options.out.resolve()
    return options


def demonstrate(options: argparse.Namespace) -> int:
    """The whole demo; returns the exit status, that of run.py where a run was stopped."""
    os.chdir(ROOT)  # the configs name their files from here
    folder = options.out / f"{'quick' if options.quick else 'seed'}_{options.seed}"
    commands = {method: command_of(method, folder, options) for method in options.methods}
    configs = {method: load_config(words[0], words[1:]) for method, words in commands.items()}
    for config in configs.values():
        trainer.output_directory(config)  # refuses a place that cannot be written to, before anything is said
    missing = [method for method in commands if not is_finished(configs[method])]
    introduce(options, folder, missing)
    if missing:
        chains.main(QUICK_DATA if options.quick else [])
    for method in missing:
        say(f"\n==== {TITLES[method]}: python run.py {' '.join(commands[method])}")
        if status := trainer.main(commands[method]):
            if status > 128:  # stopped by a signal; run.py has named its own command
                print("The demo's own command goes on from here, too, with all that is left.", file=sys.stderr)
            return status
    conclude(options, folder, configs)
    return 0


def command_of(method: str, folder: Path, options: argparse.Namespace) -> list[str]:
    """The words behind `python run.py` that train a method."""
    keys = [f"save_path={folder}", f"name={method}", f"seed={options.seed}"]
    return [f"args/demo_{method}.yaml", *keys, *(QUICK_KEYS if options.quick else [])]


def is_finished(config: Config) -> bool:
    """Whether the run directory holds the finished run of this very configuration.

    Raises UserError where it holds another one's: comparing that with new runs would mislead.
    """
    directory = config.run_dir
    if not (directory / "config.yaml").is_file():
        return False
    if (directory / "config.yaml").read_text(encoding="utf-8") != config.to_yaml():
        raise UserError(f"{directory} holds a run with other settings; move it away, or name another folder with --out")
    return (last_evaluation(directory) or {}).get("epoch") == config.num_epochs


def last_evaluation(directory: Path) -> dict | None:
    """The last evaluation in a run's metrics, None where there is none."""
    try:
        lines = (directory / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        return next((record for line in reversed(lines) if "eval/acc" in (record := json.loads(line))), None)
    except (FileNotFoundError, ValueError):
        return None


def introduce(options: argparse.Namespace, folder: Path, missing: list[str]) -> None:
    """Say first what comes, how long it takes, and where it is kept."""
    if not missing:
        say(f"Everything is trained already, in {folder}.")
        return
    n_done = len(options.methods) - len(missing)
    say("A small GPT-2 learns to work off chains such as 5 + 3 * 2 - 7, every value modulo 10 (chance: 0.1 right).")
    say(f"with:  {', '.join(TITLES[method] for method in options.methods)}, one after the other")
    say(f"time:  {QUICK_DURATION if options.quick else DURATION}" + (f"; {n_done} trained already" if n_done else ""))
    say("stop:  Ctrl-C at any time; the same command goes on from there")
    say(f"files: {folder} (the runs, table.txt, demo.png), data/chains_*.json\n")


def conclude(options: argparse.Namespace, folder: Path, configs: dict[str, Config]) -> None:
    """Print the table, draw the picture, and keep both in the folder."""
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
    """A finished run's figures."""
    lines = (directory / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    evaluations = [record for record in map(json.loads, lines) if "eval/acc" in record]
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
    """The comparison as a Markdown table with aligned columns, line by line."""
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
    """What one has to know to read the table."""
    config = load_config("args/demo_coconut.yaml")
    blind = chains.blind_guess(operations=3, modulus=10)
    quick = [
        "This is the quick version: it trains far too little to learn the task, and shows only that all parts work."
    ]
    return [
        *(quick if options.quick else []),
        "Guessing is right in 0.100 of all cases. Who looks at the operations alone and not at the number they start",
        f"from is right in {blind:.3f} at best: after `* 0` the answer is known. No-CoT gets little further.",
        "Coconut: the first of the three steps is a thought, the others are words; without thoughts it is left out.",
        f"A stage has {config.epochs_per_stage} epochs; stage 0, which is easy, begins at epoch {config.resume + 1}.",
        f"Tokens include thoughts. Seconds per example: in batches of {config.batch_size_eval}, on this machine.",
    ]


def next_steps(options: argparse.Namespace) -> list[str]:
    """Where to go from here."""
    python = Path(sys.executable)
    python = python.relative_to(ROOT) if python.is_relative_to(ROOT) else "python"
    if options.quick:
        return ["Next, the whole demo, where Coconut has the time to learn:", f"  {python} demo.py"]
    return [
        "Next, a run of your own (`run.py --help` lists every key), and the paper's (README.md):",
        f"  {python} run.py args/demo_coconut.yaml name=mine c_thought=2",
    ]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
