"""Run the demo on several seeds: `python -m scripts.demo_seeds [--seeds 10] [--jobs 2]`.

Runs scripts.demo once per seed, --jobs of them at a time; finished runs are not repeated. Prints the last accuracy of
every run, then mean, sample standard deviation, minimum and maximum for each method, and on how many seeds Coconut's
accuracy was above 0.95 and at least 0.5 above No-CoT's. The output of each demo goes into a log file beside its runs.
Ten seeds took 40 minutes on two CPU cores with --jobs 2.
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

ROOT = Path(__file__).resolve().parents[1]


def main(arguments: list[str]) -> int:
    """Run the command line; returns the exit status, 1 if a demo failed."""
    options = parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(options.jobs) as pool:
        statuses = list(pool.map(lambda seed: run_demo(seed, options), range(options.seeds)))
    if any(statuses):
        return 1
    name = "quick" if options.quick else "seed"
    results = {
        method: [read_result(method, options.out / f"{name}_{seed}" / method) for seed in range(options.seeds)]
        for method in options.methods
    }
    print("", *by_seed(results), "", *summary(results), "", verdict(results), sep="\n")
    return 0


def parse_args(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.demo_seeds", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=10, help="seeds 0 to SEEDS - 1 (default 10)")
    parser.add_argument("--jobs", type=int, default=1, help="seeds at a time (default 1)")
    parser.add_argument("--methods", nargs="+", choices=TITLES, default=list(TITLES), help="default: all four")
    parser.add_argument("--quick", action="store_true", help="run the quick demo, to try this script")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "demo", help="folder of the runs")
    options = parser.parse_args(arguments)
    if options.seeds < 1 or options.jobs < 1:
        parser.error("--seeds and --jobs: expected at least 1")
    options.out = options.out.resolve()
    return options


def run_demo(seed: int, options: argparse.Namespace) -> int:
    """Run the demo with one seed in a process; returns its exit status."""
    log = options.out / f"demo_{seed}.log"
    words = ["--seed", str(seed), "--out", str(options.out), "--methods", *options.methods]
    words += ["--quick"] if options.quick else []
    with open(log, "w", encoding="utf-8") as file:
        command = [sys.executable, "-m", "scripts.demo", *words]
        status = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, check=False, cwd=ROOT).returncode
    print(f"seed {seed}: {f'failed with status {status}, see {log}' if status else 'done'}", flush=True)
    return status


def by_seed(results: dict[str, list[Result]]) -> list[str]:
    """Return a table of accuracies with one line per seed."""
    lines = [f"| seed | {' | '.join(results)} |", "|---" * (len(results) + 1) + "|"]
    for seed, row in enumerate(zip(*results.values(), strict=True)):
        lines.append(f"| {seed} | {' | '.join(f'{result.accuracy:.3f}' for result in row)} |")
    return lines


def summary(results: dict[str, list[Result]]) -> list[str]:
    """Return a table of mean and spread over the seeds with one line per method."""
    lines = ["| method | seeds | mean | standard deviation | minimum | maximum | training, s |", "|---" * 7 + "|"]
    for method, runs in results.items():
        accuracies = [run.accuracy for run in runs]
        spread = f"{statistics.stdev(accuracies):.3f}" if len(runs) > 1 else "-"
        lines.append(
            f"| {method} | {len(runs)} | {statistics.mean(accuracies):.3f} | {spread} | {min(accuracies):.3f} "
            f"| {max(accuracies):.3f} | {statistics.mean(run.seconds for run in runs):.0f} |"
        )
    return lines


def verdict(results: dict[str, list[Result]]) -> str:
    """State on how many seeds Coconut learned what No-CoT cannot."""
    if not {"coconut", "no_cot"} <= results.keys():
        return "no verdict: it needs the methods coconut and no_cot"
    pairs = list(zip(results["coconut"], results["no_cot"], strict=True))
    passed = sum(ours.accuracy > 0.95 and round(ours.accuracy - base.accuracy, 6) >= 0.5 for ours, base in pairs)
    return f"Coconut above 0.95 and at least 0.5 above No-CoT: on {passed} of {len(pairs)} seeds"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
