"""Memory of a GPU: what MLX may keep of it, and how many items of a micro-batch fit."""

import sys

import mlx.core as mx
import numpy as np

from config import Config
from dataset import COLUMNS_MULTIPLE, Curriculum
from models.gpt2 import GPT2Config
from parallel.streams import on_gpu
from text.tokens import TokenDataset
from utils import human_size, say, warn

# What a training step keeps of each column in a layer, in units of 4 bytes * n_embd, found by counting what MLX's CUDA
# library allocates (docs/performance.md): in float32, in bfloat16, and with activations computed again, which takes
# the last number once more for the layer in progress.
KEPT, KEPT_BF16, KEPT_RECOMPUTED, RECOMPUTED = 18.5, 13.5, 4.5, 20
SHARE = 0.75  # of the memory that a step may take: freed arrays stay while the operations behind them are waiting


def gpu_memory() -> int:
    """Bytes that MLX may use: all of an NVIDIA card, what macOS recommends of an Apple GPU's."""
    info = mx.device_info()
    return int(info.get("max_recommended_working_set_size") or info["total_memory"])


def limit_memory() -> None:
    """Let MLX keep freed buffers in a part of a GPU's memory; on macOS also keep the model's memory wired.

    MLX would keep all that it has ever used. A buffer is used again only for one of its size, so batches of many shapes
    would fill the memory, on a Mac until it swaps. A card of its own has nothing else to do with it, and with less than
    three quarters every step of ProsQA takes thousands of buffers anew. Wired memory needs macOS 15; before that MLX
    ignores the call.
    """
    if not on_gpu():
        return
    if sys.platform == "darwin":
        mx.set_cache_limit(gpu_memory() // 2)
        mx.set_wired_limit(gpu_memory())
    else:
        mx.set_cache_limit(gpu_memory() * 3 // 4)


def step_bytes(shape: GPT2Config, config: Config, n_items: int, n_columns: int, n_labels: int) -> int:
    """The most memory of a training step whose micro-batch has n_items rows of n_columns, n_labels of them labeled."""
    hidden, weights = 4 * n_columns * shape.n_embd, shape.n_head * n_columns**2  # bytes, numbers: of an item in a layer
    if config.grad_checkpoint:
        layers = (KEPT_RECOMPUTED * shape.n_layer + RECOMPUTED) * hidden + 29 * weights
    else:
        layers = shape.n_layer * ((KEPT_BF16 if config.bf16 else KEPT) * hidden + 5 * weights)  # float32 and bool
    logits = 3 * 4 * n_labels * shape.vocab_size
    parameters = 5 * 4 * shape.n_parameters  # with two moments, the gradient, and its sum over micro-batches
    return int(parameters + n_items * layers + logits)


def check_memory(shape: GPT2Config, config: Config, data: TokenDataset, curriculum: Curriculum) -> None:
    """Say how much memory the longest items take in training, and warn where the GPU has less.

    Before the first step, because Metal ends the process where memory ends.
    """
    lengths = curriculum.longest(data)
    n_columns = -(-int(lengths.max()) // COLUMNS_MULTIPLE[1]) * COLUMNS_MULTIPLE[1] + COLUMNS_MULTIPLE[1]
    n_labels = float(np.mean(lengths - data.question_lengths))
    sizes = [step_bytes(shape, config, n, n_columns, int(n * n_labels)) for n in range(config.batch_size_training + 1)]
    available = gpu_memory()
    needed, given = human_size(sizes[-1]), human_size(available)
    say(f"memory: about {needed} for the longest items ({n_columns} columns) of {given}")
    if sizes[-1] > SHARE * available:
        n_fitting = max([n for n, size in enumerate(sizes) if size <= SHARE * available], default=0)
        remedy = _remedy(config, n_fitting)
        warn(f"batch_size_training: {config.batch_size_training} may not fit into this GPU's memory; {remedy}")


def _remedy(config: Config, n_fitting: int) -> str:
    """Keys that make the same optimizer step in less memory."""
    if not n_fitting:
        return "not even one item does" + ("" if config.grad_checkpoint else "; try grad_checkpoint: True")
    n = 2 ** (n_fitting.bit_length() - 1)
    steps = -(-config.batch_size_training * config.gradient_accumulation_steps // n)
    return f"batch_size_training: {n} with gradient_accumulation_steps: {steps} does"
