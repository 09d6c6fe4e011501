"""Compare a training step in one process and in two processes of one thread each, at the same global batch.

    python benchmarks/data_parallel.py                # GPT-2 124M, GSM's lengths, 8 examples a step
    python benchmarks/data_parallel.py --batch 32

A step is forward, backward, the sum over processes and AdamW with dropout, as in run.py, on random weights and tokens.
Prints one JSON line to stdout, with medians over the runs, and progress to stderr. sum_share is the part of a step that
sums gradients; wait_share the part that waits for the slower process. The third case is one process with two CPU
streams (parallel/streams.py).
"""

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

import workload

CASES = {"one_process": (1, 1), "two_processes": (2, 1), "one_process_two_streams": (1, 2)}  # processes, streams


def serve(options: argparse.Namespace) -> None:
    """Work as one process of a case; process 0 prints the medians."""
    import ours

    import mlx.core as mx

    from config import Config
    from dataset import TrainingSequence, micro_batch
    from parallel.distributed import join
    from training.step import TrainStep, new_optimizer

    group = join(os.environ)
    ours.start_streams(options.worker)
    model = ours.new_model(options)
    config = Config(save_path="", name="", val_path="", coconut=True)
    optimizer = new_optimizer(model, config)
    sequences = [TrainingSequence(*row) for row in workload.rows(options)]
    batch = micro_batch(sequences, group, pad_id=0)
    times = {"all_sum": [], "all_gather": []}
    for name, seconds in times.items():
        setattr(group, name, timed(getattr(group, name), seconds))
    step = TrainStep(model, optimizer, config, group)
    mx.eval(model.parameters(), optimizer.state)
    seconds = []
    for number in range(1 + options.runs):
        started = time.perf_counter()
        loss = step([batch], 0, number, config.lr).loss
        seconds.append(time.perf_counter() - started)
    results = {"seconds": seconds, "sum_seconds": times["all_sum"], "wait_seconds": times["all_gather"]}
    medians = {name: round(statistics.median(values[1:]), 4) for name, values in results.items()}
    if group.is_main:
        print(json.dumps(medians | {"loss": loss, "peak_rss_gb": round(workload.peak_rss(), 3)} | ours.facts()))
    group.barrier()


def timed(function: Callable, seconds: list[float]) -> Callable:
    """Wrap the function so that it appends the duration of each call to `seconds`."""

    def call(*arguments):
        started = time.perf_counter()
        result = function(*arguments)
        seconds.append(time.perf_counter() - started)
        return result

    return call


def measure(name: str, n_processes: int, n_streams: int, arguments: list[str]) -> dict:
    """Run one case; returns the results of its process 0."""
    command = [sys.executable, __file__, *arguments, "--worker", str(n_streams)]
    with tempfile.NamedTemporaryFile("w", suffix=".json") as hostfile:
        json.dump([[f"127.0.0.1:{port}"] for port in free_ports(n_processes)], hostfile)
        hostfile.flush()
        processes = []
        for rank in range(n_processes):
            variables = {"OPENBLAS_NUM_THREADS": "1", "MLX_RANK": str(rank), "MLX_HOSTFILE": hostfile.name}
            out = sys.stderr if rank else subprocess.PIPE
            processes.append(subprocess.Popen(command, env=os.environ | variables, stdout=out, text=True))
        answer = processes[0].communicate()[0]
        if any(process.wait() for process in processes):
            raise SystemExit(f"error: {name} failed")
    results = json.loads(answer.splitlines()[-1])
    for part in ("sum", "wait"):
        results[f"{part}_share"] = round(results[f"{part}_seconds"] / results["seconds"], 4)
    workload.say(f"{name}: {results['seconds']} s a step, load {os.getloadavg()[0]:.1f}")
    return results


def free_ports(n: int) -> list[int]:
    """Find n free ports."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(n)]
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def main() -> None:
    parser = workload.base_parser(__doc__, "gsm", batch=8)
    parser.add_argument("--worker", metavar="N_STREAMS", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        serve(options)
        return
    cases = {name: measure(name, *case, sys.argv[1:]) for name, case in CASES.items()}
    one, two = cases["one_process"]["seconds"], cases["two_processes"]["seconds"]
    result = {"benchmark": "data_parallel", "preset": options.preset, "batch": options.batch}
    print(json.dumps(result | {"speedup": round(one / two, 3)} | cases | workload.machine(threads=1)))


if __name__ == "__main__":
    main()
