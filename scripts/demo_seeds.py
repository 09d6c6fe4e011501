"""Run the demo on several seeds: `python -m scripts.demo_seeds [--seeds 10] [--jobs 2]`

Runs scripts.demo once per seed, --jobs of them at a time; finished runs are not repeated. Prints the last accuracy of
every run, then mean, sample standard deviation, minimum and maximum for each method, and how Coconut compares with the
others. The output of each demo goes into a log file beside its runs.
"""

from startup import signals

if __name__ == "__main__":
    signals.at_once()  # before the slow imports

import argparse
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from scripts.demo import TITLES, Result, read_result
from utils import RunError, UserError, command_parser, exit_status, markdown_table, say

ROOT = Path(__file__).resolve().parents[1]


def main(arguments: list[str]) -> int:
    """Run the command line; returns the exit status."""
    return exit_status(lambda: run_seeds(parse_args(arguments)))


def parse_args(arguments: list[str]) -> argparse.Namespace:
    parser = command_parser("scripts.demo_seeds", __doc__)
    parser.add_argument("--seeds", type=int, default=10, help="seeds 0 to SEEDS - 1 (default 10)")
    parser.add_argument("--jobs", type=int, default=1, help="seeds at a time (default 1)")
    parser.add_argument("--methods", nargs="+", choices=TITLES, default=list(TITLES), help="default: all five")
    parser.add_argument("--quick", action="store_true", help="run the quick demo, to try this script")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "demo", help="folder of the runs")
    options = parser.parse_args(arguments)
    if options.seeds < 1 or options.jobs < 1:
        raise UserError("--seeds and --jobs: expected at least 1")
    options.out = options.out.resolve()
    return options


def run_seeds(options: argparse.Namespace) -> None:
    """Run all demos, then print the tables. Raises RunError where one failed."""
    options.out.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(options.jobs) as pool:
        failed = [
            seed for seed, ok in enumerate(pool.map(lambda s: run_demo(s, options), range(options.seeds))) if not ok
        ]
    if failed:
        raise RunError(f"seeds {', '.join(map(str, failed))} failed; see the log files in {options.out}")
    name = "quick" if options.quick else "seed"
    folders = [options.out / f"{name}_{seed}" for seed in range(options.seeds)]
    results = {
        method: [read_result(method, folder / f"graph-{method.replace('_', '-')}") for folder in folders]
        for method in options.methods
    }
    say("\n".join(["", *by_seed(results), "", *summary(results), "", *verdict(results)]))


def run_demo(seed: int, options: argparse.Namespace) -> bool:
    """Run the demo with one seed in a process; returns whether it succeeded."""
    log = options.out / f"demo_{seed}.log"
    words = ["--seed", str(seed), "--out", str(options.out), "--methods", *options.methods]
    words += ["--quick"] if options.quick else []
    with open(log, "w", encoding="utf-8") as file:
        command = [sys.executable, "-m", "scripts.demo", *words]
        status = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, check=False, cwd=ROOT).returncode
    say(f"seed {seed}: {f'failed with status {status}, see {log}' if status else 'done'}")
    return status == 0


def by_seed(results: dict[str, list[Result]]) -> list[str]:
    """Return a table of accuracies with one line per seed."""
    rows = [
        [str(seed), *(f"{result.accuracy:.3f}" for result in row)]
        for seed, row in enumerate(zip(*results.values(), strict=True))
    ]
    return markdown_table(["seed", *(TITLES[method] for method in results)], rows)


def summary(results: dict[str, list[Result]]) -> list[str]:
    """Return a table of mean and spread over the seeds with one line per method."""
    rows = []
    for method, runs in results.items():
        accuracies = [run.accuracy for run in runs]
        spread = f"{statistics.stdev(accuracies):.3f}" if len(runs) > 1 else "-"
        mean, *extremes = (f"{n:.3f}" for n in (statistics.mean(accuracies), min(accuracies), max(accuracies)))
        seconds = statistics.mean(run.seconds for run in runs)
        rows.append([TITLES[method], str(len(runs)), mean, spread, *extremes, f"{seconds:.0f}"])
    head = ["method", "seeds", "mean", "standard deviation", "minimum", "maximum", "training, s"]
    return markdown_table(head, rows)


def verdict(results: dict[str, list[Result]]) -> list[str]:
    """State on how many seeds Coconut is above 0.9, and by how much it is above each other method."""
    if "coconut" not in results:
        return ["no verdict: it needs the method coconut"]
    ours = [result.accuracy for result in results["coconut"]]
    lines = [f"Coconut is above 0.9 on {sum(accuracy > 0.9 for accuracy in ours)} of {len(ours)} seeds"]
    for method, runs in results.items():
        if method != "coconut":
            gaps = [one - other.accuracy for one, other in zip(ours, runs, strict=True)]
            lines.append(f"above {TITLES[method]}: {statistics.mean(gaps):.3f} on average, at least {min(gaps):.3f}")
    return lines


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
