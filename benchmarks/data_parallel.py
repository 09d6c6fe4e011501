"""How long a training step takes in one process and in two of one thread each, at the same global batch.

    python benchmarks/data_parallel.py                # GPT-2 124M, GSM's lengths, 8 examples a step
    python benchmarks/data_parallel.py --batch 32

Random weights and tokens, dropout on, forward, backward, the sum over processes and AdamW, as run.py does them. One
JSON line on stdout, with medians over the runs; progress on stderr. sum_share: of a step, the part spent in summing
gradients; wait_share: in waiting for the slower process. The third case is what one process does with two cores by
itself (streams.py).
"""

import argparse
import itertools
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time

import workload

CASES = {"one_process": (1, 1), "two_processes": (2, 1), "one_process_two_streams": (1, 2)}  # processes, streams


def serve(options: argparse.Namespace) -> None:
    """One process of a case; process 0 prints the medians."""
    import cpu_blas
    import mlx.core as mx

    from coconut import Coconut
    from config import Config
    from dataset import Sequence, own_parts
    from gpt2 import GPT2, GPT2Config
    from processes import join
    from streams import streams
    from train import new_optimizer, training_steps

    processes = join()
    processes.start()
    mx.random.seed(0)
    shape = GPT2Config(
        vocab_size=options.vocabulary, n_layer=options.layers, n_embd=options.width, n_head=options.heads
    )
    model = Coconut(GPT2(shape))
    config = Config(save_path="", name="", val_path="", coconut=True)
    optimizer = new_optimizer(model, config)
    rows = [Sequence(*row) for row in workload.rows(options)]
    batches = itertools.repeat(own_parts(rows, processes, len(streams()), pad_id=0))
    times = {"sum": [], "gather": []}
    for name, kept in times.items():
        setattr(processes, name, timed(getattr(processes, name), kept))
    steps = training_steps(model, optimizer, batches, config, 0, 10**6, 0, processes)
    mx.eval(model.parameters(), optimizer.state)
    seconds = []
    for _ in range(1 + options.runs):
        started = time.perf_counter()
        loss = next(steps).loss
        seconds.append(time.perf_counter() - started)
    figures = {"seconds": seconds, "sum_seconds": times["sum"], "wait_seconds": times["gather"]}
    result = {name: round(statistics.median(values[1:]), 4) for name, values in figures.items()}
    result |= {"loss": loss, "blas": cpu_blas.describe(), "peak_rss_gb": round(workload.peak_rss(), 3)}
    if processes.is_main:
        print(json.dumps(result), flush=True)
    processes.leave(0, "")


def timed(function, kept: list[float]):
    """The function, whose times are kept."""

    def call(*arguments):
        started = time.perf_counter()
        result = function(*arguments)
        kept.append(time.perf_counter() - started)
        return result

    return call


def measure(name: str, n_processes: int, n_streams: int, arguments: list[str]) -> dict:
    """Run one case: the figures of its process 0."""
    threads = {"OPENBLAS_NUM_THREADS": "1", "COCONUT_STREAMS": str(n_streams)}
    with tempfile.NamedTemporaryFile("w", suffix=".json") as hostfile:
        json.dump([[f"127.0.0.1:{port}"] for port in free_ports(n_processes)], hostfile)
        hostfile.flush()
        command = [sys.executable, __file__, *arguments, "--worker"]
        group = []
        for rank in range(n_processes):
            environment = os.environ | threads | {"MLX_RANK": str(rank), "MLX_HOSTFILE": hostfile.name}
            out = sys.stderr if rank else subprocess.PIPE
            group.append(subprocess.Popen(command, env=environment, stdout=out, text=True))
        answer = group[0].communicate()[0]
        if any(process.wait() for process in group):
            raise SystemExit(f"error: {name} failed")
    figures = json.loads(answer.splitlines()[-1])
    for part in ("sum", "wait"):
        figures[f"{part}_share"] = round(figures[f"{part}_seconds"] / figures["seconds"], 4)
    workload.say(f"{name}: {figures['seconds']} s a step, load {os.getloadavg()[0]:.1f}")
    return figures


def free_ports(n: int) -> list[int]:
    """Ports that nobody listens at."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(n)]
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=workload.PRESETS, default="gsm", help="lengths (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=8, help="examples of a step, in all (default: 8)")
    parser.add_argument("--latents", type=int, help="thoughts; the question is lengthened to keep the tokens")
    parser.add_argument("--length", type=int, help="tokens of the question (default: the preset's)")
    parser.add_argument("--runs", type=int, default=5, help="measured steps of each case, after a first (default: 5)")
    for name, default in (("layers", 12), ("width", 768), ("heads", 12), ("vocabulary", 50_260)):
        parser.add_argument(f"--{name}", type=int, default=default, help="of the model (default: GPT-2 124M's)")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        serve(options)
        return
    cases = {name: measure(name, *case, sys.argv[1:]) for name, case in CASES.items()}
    one, two = cases["one_process"]["seconds"], cases["two_processes"]["seconds"]
    result = {"benchmark": "data_parallel", "preset": options.preset, "batch": options.batch}
    options.threads = 1
    print(json.dumps(result | {"speedup": round(one / two, 3)} | cases | workload.machine(options)))


if __name__ == "__main__":
    main()
