"""Measure how long a training step takes, and compare with PyTorch and with the processor's limit.

    python benchmarks/train_step.py                             # GPT-2 124M, ProsQA's lengths, 1 thread
    python benchmarks/train_step.py --preset gsm --batch 16 --peer
    python benchmarks/train_step.py @benchmarks/graph.args --peer  # the model and the lengths of args/graph_*.yaml
    python benchmarks/train_step.py --sweep latents             # also: batch, length; values: latents=0,6

A step is forward, backward and AdamW with dropout, as in run.py, on random weights and tokens. Prints one JSON line to
stdout, with medians over the runs, and progress to stderr. sgemm_share is the part of the step that the
products of all columns in all layers would take at a large one's speed, measured just before, on each of the cores.
"""

import argparse
import itertools
import time

import workload


def sgemm_rate(mx, width: int) -> float:
    """Measure the operations per second of a float32 product, the best of 5."""
    a, b = mx.ones((2048, width)), mx.ones((width, 4 * width))
    mx.eval(a, b)
    return max(2 * 2048 * width * 4 * width / _seconds(lambda: mx.eval(a @ b)) for _ in range(5))


def _seconds(run) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def serve_ours(options: argparse.Namespace) -> None:
    """Work as a worker that trains with this project's code."""
    import ours

    import mlx.core as mx

    from config import Config
    from dataset import TrainingSequence, micro_batch
    from parallel.distributed import ALONE
    from training.step import TrainStep, new_optimizer

    ours.start_streams(1 if options.grad_checkpoint else options.threads, options.precision)
    model = ours.new_model(options)
    model.transformer.grad_checkpoint = options.grad_checkpoint
    config = Config(save_path="", name="", val_path="", coconut=True, bf16=options.precision == "bf16")
    optimizer = new_optimizer(model, config)
    rows = workload.rows(options)
    flops = workload.required_flops(options, rows)
    batch = micro_batch([TrainingSequence(*row) for row in rows], ALONE, pad_id=0)
    step, numbers = TrainStep(model, optimizer, config), itertools.count()
    mx.eval(model.parameters(), optimizer.state)

    def run() -> dict:
        rate = sgemm_rate(mx, options.width)
        cpu, started = time.process_time(), time.perf_counter()
        loss = step([batch], 0, next(numbers), config.lr).loss
        seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
        share = flops / rate / seconds / options.threads
        return {"seconds": seconds, "cpu_seconds": cpu, "sgemm_gflops": rate / 1e9, "sgemm_share": share, "loss": loss}

    workload.serve(run, ours.facts)


def serve_peer(options: argparse.Namespace) -> None:
    """Work as a worker that trains with PyTorch."""
    import peer
    import torch

    torch.set_num_threads(options.threads)
    sizes = options.vocabulary, options.layers, options.width, options.heads, options.inner
    model = peer.new_model(*sizes, options.dropout)
    optimizer, batch = peer.new_optimizer(model), peer.collate(workload.rows(options), pad_id=0)
    loss = peer.lean_loss if options.worker == "lean_peer" else peer.loss

    def run() -> dict:
        with peer.precision(options.precision):
            return {"loss": peer.train_step(model, optimizer, batch, loss)}

    workload.serve(run, lambda: {"torch": torch.__version__})


def measure(options: argparse.Namespace, arguments: list[str]) -> dict:
    """Measure one configuration on all sides; returns the fields of the JSON line."""
    ours, *others = workload.compare(options, __file__, arguments)
    rows = workload.rows(options)
    result = {
        "benchmark": "train_step",
        "preset": options.preset,
        "batch": options.batch,
        "tokens": workload.count_tokens(rows),
        "latents": rows[0].n_latents,
        "precision": options.precision,
        "seconds": round(ours.median(), 4),
        "cpu_seconds": round(ours.median("cpu_seconds"), 4),
        "tokens_per_second": round(workload.count_tokens(rows) / ours.median(), 2),
        "sgemm_gflops": round(ours.median("sgemm_gflops"), 1),
        "sgemm_share": round(ours.median("sgemm_share"), 3),
        **ours.facts,
    }
    for other in others:
        result |= workload.ratios(ours, other)
    return result | workload.machine(options.threads)


def main() -> None:
    parser = workload.parser(__doc__, batch=4)
    parser.add_argument("--grad-checkpoint", action="store_true", help="recompute activations in the backward pass")
    parser.add_argument("--sweep", help="latents, batch or length, with =VALUES for values of your own")
    defaults = {"latents": [0, 1, 2, 4, 6, 8], "batch": [1, 2, 4, 8], "length": [57, 120, 240, 360]}
    workload.command(
        "train_step", parser, {"ours": serve_ours, "peer": serve_peer, "lean_peer": serve_peer}, measure, defaults
    )


if __name__ == "__main__":
    main()
