"""What only a GPU can answer: is it right, and does it stay fast and within memory? Runs on any device.

    python benchmarks/gpu_check.py smoke        # the device, the error of a product, softmax of masked rows
    python benchmarks/gpu_check.py fidelity     # loss and gradients of mixed batches, this device against the CPU
    python benchmarks/gpu_check.py steps        # real optimizer steps at ProsQA's last stage: time, memory, cache

Prints JSON lines. Weights and tokens are random. --precision tf32 or bf16 computes in it, and the CPU in float32.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import workload
import ours

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from coconut import Coconut
from config import Config
from dataset import TrainingSequence, alike_micro_batches, collate
from models.gpt2 import GPT2, GPT2Config
from models.precision import compute_dtype, computing_in, training_in
from parallel.distributed import ALONE
from parallel.streams import on_gpu
from training.memory import BUSY
from training.step import TrainStep, new_optimizer

LATENTS = ((3, 1, 0, 3), (6, 6, 6, 6), (0, 0, 0, 0))  # of the rows of each batch that fidelity compares


def smoke(options: argparse.Namespace) -> None:
    """The device; the error of a product (1e-6 in float32, 3e-4 in TF32); NaN in attention over masked rows."""
    rng = np.random.default_rng(0)
    a, b = (rng.standard_normal((512, 512)).astype(np.float32) for _ in range(2))
    exact = a.astype(np.float64) @ b.astype(np.float64)
    error = np.abs(np.array(mx.array(a) @ mx.array(b)) - exact).max() / np.abs(exact).max()
    say(options, error_of_a_product=float(error), **ours.facts())
    q = mx.random.normal((1, 2, 8, 64))
    for dtype in (mx.float32, mx.bfloat16):
        mask = mx.arange(8)[:, None] > mx.arange(8)  # row 0 may attend to nothing
        out = mx.fast.scaled_dot_product_attention(*[q.astype(dtype)] * 3, scale=0.1, mask=mask)
        say(options, dtype=str(dtype), nan_where_all_is_masked=mx.isnan(out[:, :, 0]).any().item())


def fidelity(options: argparse.Namespace) -> None:
    """Differences from the CPU, which another process computes: of the loss, of the gradients (relative to each one's
    largest number), and of greedy answers.
    """
    found = mixed_batches(compute_dtype(options.precision == "bf16"))
    expected = computed_on_cpu()
    for number, latents in enumerate(LATENTS):
        of_this = {name: value for name, value in expected.items() if name.startswith(f"{number} ")}
        if of_this:
            compare(options, number, of_this, found)
        else:
            say(options, latents=latents, loss=float(found[f"{number} loss"]), note="the CPU took too long")


def computed_on_cpu(limit: float = 45) -> dict[str, np.ndarray]:
    """`mixed_batches` of another process on the CPU, in float32; empty where that takes more than so many seconds."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "cpu.npz")
        command = [sys.executable, __file__, "fidelity", "--save", str(path)]
        try:
            subprocess.run(command, env=os.environ | {"COCONUT_DEVICE": "cpu"}, check=True, timeout=limit)
        except subprocess.TimeoutExpired:
            return {}
        return dict(np.load(path))


def compare(options: argparse.Namespace, number: int, expected: dict, found: dict) -> None:
    """Print how far the results of one batch are from the CPU's."""
    loss, ids = expected.pop(f"{number} loss"), expected.pop(f"{number} ids")
    differences = {
        name: float(np.abs(found[name] - value).max() / max(np.abs(value).max(), 1e-12))
        for name, value in expected.items()
        if not name.endswith("c_attn.bias")  # a third of it is noise around 0
    }
    worst = max(differences, key=lambda name: differences[name])
    same = (ids == found[f"{number} ids"]).all(axis=1)
    say(options, latents=LATENTS[number], loss=float(loss), loss_difference=float(abs(found[f"{number} loss"] - loss)),
        worst=worst, gradient_difference=differences[worst], same_answers=f"{same.sum()} of {len(ids)}")  # fmt: skip


def mixed_batches(dtype: mx.Dtype) -> dict[str, np.ndarray]:
    """Loss, gradients and greedy answers of three batches of a small model, without dropout; weights are numpy's."""
    rates = dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), 0.0)
    rng = np.random.default_rng(0)
    model = Coconut(GPT2(GPT2Config(vocab_size=5000, n_embd=256, n_layer=4, n_head=4, **rates)))
    drawn = {name: 0.1 * rng.standard_normal(array.shape) for name, array in tree_flatten(model.parameters())}
    model.load_weights([(name, mx.array(array.astype(np.float32))) for name, array in drawn.items()])
    found = {}
    for number, n_latents in enumerate(LATENTS):
        rows = [sequence(rng, 5000, int(rng.integers(20, 120)), n, int(rng.integers(5, 30))) for n in n_latents]
        found |= {f"{number} {name}": value for name, value in results(model, rows, dtype).items()}
    return found


def results(model: Coconut, rows: list[TrainingSequence], dtype: mx.Dtype) -> dict[str, np.ndarray]:
    """Loss, gradient by name, and greedy answers."""

    def computed(batch) -> mx.array:
        with training_in(model, dtype):
            return model(batch)

    own = model.parameters()
    loss, gradient = nn.value_and_grad(model.train(), computed)(collate(rows, pad_id=0).to_mlx())
    model.update(own)
    mx.eval(loss, gradient)
    prompts = collate([row._replace(ids=row.ids[: row.n_unlabeled]) for row in rows], pad_id=0)
    with computing_in(model.eval(), dtype):
        ids = model.generate(prompts.to_mlx(), 8, eos_id=-1)
    gradients = {name: np.array(array) for name, array in tree_flatten(gradient)}
    return gradients | {"loss": np.array(loss), "ids": np.array([(i + [-1] * 8)[:8] for i in ids])}


def steps(options: argparse.Namespace) -> None:
    """Optimizer steps of 128 items that are as long and as unlike as ProsQA's, a line for every 20."""
    rng, config = np.random.default_rng(0), Config(
        save_path="", name="", val_path="", coconut=True, gradient_accumulation_steps=4,
        bf16=options.precision == "bf16",
    )  # fmt: skip
    model = ours.new_model(options)
    take_step, seconds, losses = TrainStep(model, new_optimizer(model, config), config), [], []
    for number in range(options.steps):
        lengths = rng.normal(350, 70, (4, options.batch)).clip(150, 660).astype(int)
        rows = [[sequence(rng, options.vocabulary, n, 6, rng.integers(8, 12)) for n in part] for part in lengths]
        batches = alike_micro_batches(rows, ALONE, 0, options.rows)
        started = time.perf_counter()
        losses.append(take_step(batches, 0, number, 1e-4).loss)
        seconds.append(time.perf_counter() - started)
        if number % 20 == 19 or number == options.steps - 1:
            last = seconds[-20:]
            say(options, step=number + 1, loss=losses[-1], median_seconds=statistics.median(last), least=min(last),
                most=max(last), cache_gb=mx.get_cache_memory() / 1e9, **ours.facts())  # fmt: skip


def sequence(rng, vocabulary: int, n_question: int, n_latents: int, n_rest: int) -> TrainingSequence:
    """A question, thoughts and labeled tokens, all random."""
    ids = rng.integers(0, vocabulary, n_question + n_latents + n_rest).astype(np.int32)
    return TrainingSequence(ids, int(n_question), n_latents, int(n_question) + n_latents)


def say(options: argparse.Namespace, **facts) -> None:
    """Print one line of JSON."""
    rounded = {name: float(f"{value:.4g}") if isinstance(value, float) else value for name, value in facts.items()}
    device = "GPU" if on_gpu() else "CPU"
    print(json.dumps({"check": options.check, "on": device, "precision": options.precision} | rounded), flush=True)


def main() -> None:
    parser = workload.parser(__doc__, batch=32)
    parser.add_argument("check", choices=("smoke", "fidelity", "steps"))
    parser.add_argument("--steps", type=int, default=200, help="optimizer steps (default: 200)")
    parser.add_argument("--rows", type=int, default=BUSY, help="of a micro-batch of a step (default: %(default)s)")
    parser.add_argument("--save", help=argparse.SUPPRESS)  # where fidelity's process on the CPU leaves its results
    options = parser.parse_args()
    ours.start_streams(options.threads, options.precision)
    if options.save:
        np.savez(options.save, **mixed_batches(mx.float32))
        return
    {"smoke": smoke, "fidelity": fidelity, "steps": steps}[options.check](options)


if __name__ == "__main__":
    main()
