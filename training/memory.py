"""Memory of a GPU: what MLX may keep of it, and how many rows a micro-batch has."""

import os
import sys
from bisect import bisect_right
from pathlib import Path

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
SHARE = 0.5  # of the memory that an estimate may take: a GPU's arrays stay until the operations behind them have run
BUSY = (
    64  # rows that keep a large GPU busy; with fewer it waits for the host, which starts 6,000 kernels for any number
)


def gpu_memory() -> int:
    """Bytes that MLX may use: all of an NVIDIA card, what macOS recommends of an Apple GPU's."""
    info = mx.device_info()
    return int(info.get("max_recommended_working_set_size") or info["total_memory"])


def limit_memory() -> None:
    """Let MLX keep freed buffers in a part of a GPU's memory; on macOS also keep the model's memory wired.

    MLX would keep all that it has ever used. A buffer is used again only for one of its size, so batches of many shapes
    would fill the memory, on a Mac until it swaps. An NVIDIA card that is full is slow for the rest of the run, because
    MLX then gives back all that it keeps, each time; so it may use four fifths, kept buffers included. Wired memory
    needs macOS 15; before that MLX ignores the call.
    """
    if not on_gpu():
        return
    if sys.platform == "darwin":
        mx.set_cache_limit(gpu_memory() // 2)
        mx.set_wired_limit(gpu_memory())
    else:
        mx.set_cache_limit(gpu_memory() * 3 // 10)
        mx.set_memory_limit(gpu_memory() * 4 // 5)


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


def rows_at_once(shape: GPT2Config, config: Config, data: TokenDataset, curriculum: Curriculum) -> int:
    """How many rows a micro-batch has on a GPU: as many as its memory holds, up to BUSY or batch_size_training.

    The optimizer step is the same however its items are cut into micro-batches.
    """
    most = min(max(BUSY, config.batch_size_training), config.batch_size_training * config.gradient_accumulation_steps)
    sizes = [longest_step(shape, config, data, curriculum, n)[0] for n in range(1, most + 1)]
    return max(1, bisect_right(sizes, SHARE * gpu_memory()))


def longest_step(
    shape: GPT2Config, config: Config, data: TokenDataset, curriculum: Curriculum, n_rows: int
) -> tuple[int, int]:
    """(bytes, columns) of a step whose micro-batch has so many of the longest items."""
    lengths, multiple = curriculum.longest(data), COLUMNS_MULTIPLE[1]
    n_columns = (-(-int(lengths.max()) // multiple) + 1) * multiple
    n_labels = n_rows * float(np.mean(lengths - data.question_lengths))
    return step_bytes(shape, config, n_rows, n_columns, int(n_labels)), n_columns


def say_memory(shape: GPT2Config, config: Config, data: TokenDataset, curriculum: Curriculum, n_rows: int) -> None:
    """Say how much memory the longest items take in training, and warn where the GPU has less.

    Before the first step, because Metal ends the process where memory ends.
    """
    size, n_columns = longest_step(shape, config, data, curriculum, n_rows)
    needed, given = human_size(size), human_size(gpu_memory())
    say(f"memory: about {needed} of {given}, for micro-batches of {n_rows} of the longest items ({n_columns} columns)")
    if size > SHARE * gpu_memory():
        remedy = "" if config.grad_checkpoint else "; try grad_checkpoint: True"
        warn(f"one item may not fit into this GPU's memory{remedy}")


def say_kernels() -> None:
    """Say that the first steps will be slow where MLX has no compiled CUDA kernels yet (startup/settings.py)."""
    folder = os.environ.get("MLX_PTX_CACHE_DIR")
    if folder and not any(Path(folder).glob("*.ptx")):
        say(f"kernels: MLX compiles them in the first steps, once for a machine, for 2 to 3 minutes; kept in {folder}")
