"""What only a GPU can answer: is it right, and does it stay fast and within memory? Runs on any device.

    python benchmarks/gpu_check.py smoke        # the device, the error of a product, softmax of masked rows
    python benchmarks/gpu_check.py fidelity     # loss and gradients of mixed batches, this device against the CPU
    python benchmarks/gpu_check.py steps        # real optimizer steps at ProsQA's last stage: time, memory, cache

Prints JSON lines. Weights and tokens are random. --precision tf32 or bf16 computes in it, and the CPU in float32.
"""

import argparse
import json
import statistics
import time

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
from models.precision import compute_dtype, computing_in
from parallel.distributed import ALONE
from parallel.streams import on_gpu
from training.step import TrainStep, new_optimizer


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
    """The largest difference of loss, gradients (relative to each one's largest number) and decoded tokens."""
    device, rng = mx.default_device(), np.random.default_rng(0)
    rates = dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), 0.0)
    mx.random.seed(0)
    model = Coconut(GPT2(GPT2Config(vocab_size=5000, n_embd=256, n_layer=4, n_head=4, initializer_range=0.1, **rates)))
    mx.eval(model.parameters())
    for n_latents in ((3, 1, 0, 3), (6, 6, 6, 6), (0, 0, 0, 0)):
        rows = [sequence(rng, 5000, rng.integers(20, 120), n, rng.integers(5, 30)) for n in n_latents]
        prompts = [row._replace(ids=row.ids[: row.n_unlabeled]) for row in rows]
        found = []
        for where, dtype in ((mx.cpu, mx.float32), (device, compute_dtype(options.precision == "bf16"))):
            mx.set_default_device(where)
            found.append(results(model, rows, prompts, dtype))
        mx.set_default_device(device)
        (loss, gradient, ids), (other_loss, other_gradient, other_ids) = found
        differences = {
            name: float(np.abs(other_gradient[name] - value).max() / max(np.abs(value).max(), 1e-12))
            for name, value in gradient.items()
            if not name.endswith("c_attn.bias")  # a third of it is noise around 0
        }
        worst = max(differences, key=differences.get)
        same = sum(a == b for a, b in zip(ids, other_ids, strict=True))
        say(options, latents=n_latents, loss=loss, loss_difference=abs(other_loss - loss), worst=worst,
            gradient_difference=differences[worst], same_answers=f"{same} of {len(ids)}")  # fmt: skip


def results(model: Coconut, rows: list, prompts: list, dtype: mx.Dtype) -> tuple[float, dict, list]:
    """Loss, gradient by name, and greedy answers on the default device."""
    batch, prompt_batch = collate(rows, pad_id=0).to_mlx(), collate(prompts, pad_id=0).to_mlx()

    def computed(batch) -> mx.array:
        with computing_in(model, dtype):
            return model(batch)

    own = model.parameters()
    loss, gradient = nn.value_and_grad(model.train(), computed)(batch)
    model.update(own)
    mx.eval(loss, gradient)
    with computing_in(model.eval(), dtype):
        ids = model.generate(prompt_batch, 8, eos_id=-1)
    return loss.item(), {name: np.array(array) for name, array in tree_flatten(gradient)}, ids


def steps(options: argparse.Namespace) -> None:
    """Optimizer steps of 4 micro-batches whose items are as long and as unlike as ProsQA's, a line for every 20."""
    rng, config = np.random.default_rng(0), Config(
        save_path="", name="", val_path="", coconut=True, gradient_accumulation_steps=4,
        bf16=options.precision == "bf16",
    )  # fmt: skip
    model = ours.new_model(options)
    take_step, seconds, losses = TrainStep(model, new_optimizer(model, config), config), [], []
    for number in range(options.steps):
        lengths = rng.normal(350, 70, (4, options.batch)).clip(150, 660).astype(int)
        rows = [[sequence(rng, options.vocabulary, n, 6, rng.integers(8, 12)) for n in part] for part in lengths]
        batches = alike_micro_batches(rows, ALONE, pad_id=0)
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
    options = parser.parse_args()
    ours.start_streams(options.threads, options.precision)
    {"smoke": smoke, "fidelity": fidelity, "steps": steps}[options.check](options)


if __name__ == "__main__":
    main()
