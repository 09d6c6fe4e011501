"""Shared by the benchmarks: command-line options, random batches, workers and statistics.

In train_step.py and generate.py each side of a comparison is a separate process (a worker), because two BLAS libraries
in one process may conflict. The command starts all workers and then asks each for one run in turn, A B A B. Imports
neither mlx nor torch.
"""

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


class Row(NamedTuple):
    """One example: its latents follow the first `latent_start` ids; labels begin at `n_unlabeled`."""

    ids: np.ndarray
    latent_start: int
    n_latents: int
    n_unlabeled: int


class Preset(NamedTuple):
    """Tokens of an example: of its question, its thoughts, and its remaining steps and answer."""

    question: int
    latents: int
    rest: int


PEERS = ("peer", "lean_peer")
PRESETS = {"prosqa": Preset(360, 6, 50), "gsm": Preset(57, 6, 30), "graph": Preset(40, 3, 3)}


def base_parser(description: str, preset: str, batch: int) -> argparse.ArgumentParser:
    """Make a parser with the options that all benchmarks have: the sizes of batch and model."""
    made = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, fromfile_prefix_chars="@"
    )
    made.add_argument("--preset", choices=PRESETS, default=preset, help="lengths (default: %(default)s)")
    made.add_argument("--batch", type=int, default=batch, help="examples in a batch (default: %(default)s)")
    made.add_argument(
        "--latents", type=int, help="thoughts; the question's length changes to keep the number of tokens"
    )
    made.add_argument("--length", type=int, help="tokens of the question (default: the preset's)")
    made.add_argument("--runs", type=int, default=5, help="measured runs of each side, after a warm-up (default: 5)")
    for name, default in (("layers", 12), ("width", 768), ("heads", 12), ("vocabulary", 50_260)):
        made.add_argument(f"--{name}", type=int, default=default, help="of the model (default: GPT-2 124M's)")
    made.add_argument("--inner", type=int, help="width between the feed-forward layers (default: 4 times --width)")
    made.add_argument("--dropout", type=float, default=0.1, help="all three rates (default: 0.1)")
    return made


def parser(description: str, batch: int) -> argparse.ArgumentParser:
    """Make a parser with the options of train_step.py and generate.py."""
    made = base_parser(description, "prosqa", batch)
    made.add_argument("--threads", type=int, default=1, help="our CPU streams, PyTorch's threads (default: 1)")
    made.add_argument("--peer", action="store_true", help="compare with the official algorithm in PyTorch (peer.py)")
    made.add_argument("--lean-peer", action="store_true", help="compare with the best of PyTorch (peer.py)")
    made.add_argument(
        "--precision", choices=("float32", "tf32", "bf16"), default="float32", help="of products on a GPU, on all sides"
    )
    made.add_argument("--own-blas", action="store_true", help="compare with the BLAS of MLX's wheel (COCONUT_BLAS=off)")
    made.add_argument("--worker", choices=("ours", *PEERS), help=argparse.SUPPRESS)
    return made


def rows(options: argparse.Namespace, labeled: bool = True, seed: int = 0) -> list[Row]:
    """Make a batch of random tokens: question, start, latents, end and, for training, labeled tokens."""
    preset = PRESETS[options.preset]
    n_latents = preset.latents if options.latents is None else options.latents
    question = (preset.question if options.length is None else options.length) + preset.latents - n_latents
    start, end, latent = (options.vocabulary - i for i in (3, 2, 1))
    rng = np.random.default_rng(seed)

    def row() -> Row:
        rest = rng.integers(0, start, preset.rest if labeled else 0)
        parts = rng.integers(0, start, question), [start], [latent] * n_latents, [end], rest
        return Row(np.concatenate(parts).astype(np.int32), question + 1, n_latents, question + n_latents + 2)

    return [row() for _ in range(options.batch)]


def count_tokens(batch: list[Row]) -> int:
    """Count the tokens, latents included."""
    return sum(len(row.ids) for row in batch)


def required_flops(options: argparse.Namespace, batch: list[Row]) -> float:
    """Count the floating-point operations of a step that computes all columns in all layers, as the peers do.

    6 x parameters without the embeddings x tokens, attention to the tokens that the causal mask allows, and the product
    with the vocabulary at labeled tokens.
    """
    width, layers = options.width, options.layers
    parameters = layers * (12 * width * width + 13 * width) + 2 * width
    pairs = sum(len(row.ids) * (len(row.ids) + 1) / 2 for row in batch)
    n_labeled = sum(len(row.ids) - row.n_unlabeled for row in batch)
    products = parameters * count_tokens(batch) + options.vocabulary * width * n_labeled
    return 6.0 * products + 12.0 * layers * width * pairs


def peak_rss() -> float:
    """Return the peak memory of this process in GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9


def serve(run: Callable[[], dict], finish: Callable[[], dict]) -> None:
    """Work as a worker: for each line on stdin, run and print the results as JSON; at its end, those of `finish`."""
    answers, sys.stdout = sys.stdout, sys.stderr  # other output must not mix with the answers
    print("{}", file=answers, flush=True)
    for _ in sys.stdin:
        started, cpu = time.perf_counter(), time.process_time()
        results = run()
        times = {"seconds": time.perf_counter() - started, "cpu_seconds": time.process_time() - cpu}
        print(json.dumps(times | results), file=answers, flush=True)
    print(json.dumps(finish() | {"peak_rss_gb": round(peak_rss(), 3)}), file=answers, flush=True)


class Worker:
    """One side of a comparison, in a separate process."""

    def __init__(self, side: str, script: str, arguments: list[str], threads: int, **environment: str):
        self.name, self.runs, self.facts = side, [], {}
        library_threads = {"OMP_NUM_THREADS": str(threads)} if side in PEERS else {"OPENBLAS_NUM_THREADS": "1"}
        environment = os.environ | library_threads | environment
        command = [sys.executable, script, *arguments, "--worker", side if side in PEERS else "ours"]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, env=environment, text=True)

    def _answer(self) -> dict:
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"error: the process of {self.name} ended with status {self.process.wait()}")
        return json.loads(line)

    def ready(self) -> None:
        """Wait until the process has its model."""
        self._answer()

    def run(self) -> dict:
        """Request one run; returns its results."""
        self.process.stdin.write("run\n")
        self.process.stdin.flush()
        return self._answer()

    def measure(self) -> None:
        """Run once and keep the results."""
        self.runs.append(self.run())
        results = " ".join(f"{name} {value:.3f}" for name, value in self.runs[-1].items())
        say(f"{self.name}: {results}; load {os.getloadavg()[0]:.1f}")

    def close(self) -> None:
        """End the process and keep the facts it reports."""
        self.process.stdin.close()
        self.facts = self._answer()
        self.process.wait()

    def median(self, name: str = "seconds") -> float:
        """Return the median of one result over the runs."""
        return statistics.median(run[name] for run in self.runs)


def compare(options: argparse.Namespace, script: str, arguments: list[str]) -> list[Worker]:
    """Measure our side and those it is compared with in turn; returns the workers, ours first."""
    workers = [Worker("ours", script, arguments, options.threads)]
    workers += [Worker(peer, script, arguments, options.threads) for peer in PEERS if getattr(options, peer)]
    if options.own_blas:
        workers.append(Worker("own_blas", script, arguments, options.threads, COCONUT_BLAS="off"))
    for worker in workers:
        worker.ready()
    for worker in workers:
        worker.run()  # warm-up: the first run is slower, because its memory comes from the system
    for _ in range(options.runs):
        for worker in workers:
            worker.measure()
    for worker in workers:
        worker.close()
    return workers


def ratios(ours: Worker, other: Worker) -> dict:
    """Return the ratio of the other's time to ours: of medians, the median over pairs, and of CPU seconds."""
    pairs = [b["seconds"] / a["seconds"] for a, b in zip(ours.runs, other.runs, strict=True)]
    return {
        f"{other.name}_seconds": round(other.median(), 4),
        f"{other.name}_peak_rss_gb": other.facts["peak_rss_gb"],
        f"ratio_to_{other.name}": round(other.median() / ours.median(), 3),
        f"ratio_to_{other.name}_of_pairs": round(statistics.median(pairs), 3),
        f"ratio_to_{other.name}_cpu": round(other.median("cpu_seconds") / ours.median("cpu_seconds"), 3),
    }


def machine(threads: int) -> dict:
    """Describe the machine and its load."""
    model = platform.processor()
    if Path("/proc/cpuinfo").exists():
        lines = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        model = lines[0].split(":")[1].strip() if lines else model
    load = round(os.getloadavg()[0], 2)
    return {"processor": model, "cores": os.cpu_count(), "threads": threads, "load": load}


def sweep_values(text: str, defaults: dict[str, list[int]]) -> tuple[str, list[int]]:
    """Parse `latents` or `latents=0,6` into the option's name and its values."""
    name, _, values = text.partition("=")
    if name not in defaults:
        raise SystemExit(f"error: --sweep {name}: choose from {', '.join(defaults)}")
    return name, [int(value) for value in values.split(",")] if values else defaults[name]


def sweep(make: argparse.ArgumentParser, arguments: list[str], name: str, values: list[int], measure) -> list[dict]:
    """Measure at each value of one option."""
    points = []
    for value in values:
        changed = [*arguments, f"--{name}", str(value)]
        say(f"{name} {value}")
        points.append({name: value} | measure(make.parse_args(changed), changed))
    return points


def command(
    name: str,
    make: argparse.ArgumentParser,
    serve_side: dict[str, Callable[[argparse.Namespace], None]],
    measure: Callable[[argparse.Namespace, list[str]], dict],
    defaults: dict[str, list[int]],
) -> None:
    """Run the command line: work as a worker, or print one JSON line for a measurement or a sweep.

    serve_side: the function of a worker for each side; defaults: the values of each option that can be swept.
    """
    options, arguments = make.parse_args(), sys.argv[1:]
    if options.worker:
        serve_side[options.worker](options)
    elif not options.sweep:
        print(json.dumps(measure(options, arguments)))
    else:
        swept, values = sweep_values(options.sweep, defaults)
        points = sweep(make, arguments, swept, values, measure)
        print(json.dumps({"benchmark": name, "sweep": swept, "points": points}))


def say(text: str) -> None:
    """Print progress to stderr; only the result goes to stdout."""
    print(text, file=sys.stderr, flush=True)
