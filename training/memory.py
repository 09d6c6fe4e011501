"""Memory of a GPU: what MLX may keep of it, and how many rows a micro-batch has."""

import os
import sys
from bisect import bisect_right
from pathlib import Path
from typing import NamedTuple

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from config import Config
from dataset import COLUMNS_MULTIPLE, Curriculum
from models.gpt2 import GPT2, GPT2Config
from models.lora import LoraModel
from models.mlx_lm import LanguageConfig, LanguageModel
from models.precision import compute_dtype
from parallel.streams import on_gpu
from text.tokens import TokenDataset
from training.step import LARGEST_UPDATE
from utils import human_size, say, warn

# What a training step of GPT-2 keeps of each column in a layer, in units of 4 bytes * n_embd, found by counting what
# MLX's CUDA library allocates (docs/performance.md): in float32, in bfloat16, and with activations computed again,
# which takes the last number once more for the layer in progress.
KEPT, KEPT_BF16, KEPT_RECOMPUTED, RECOMPUTED = 18.5, 13.5, 4.5, 5
# The same of a model of mlx-lm, in numbers of the type that it computes in. Multiples of the model's width (in bfloat16
# more, because norms take float32), of all heads' and of the inner width, and for each pass of the keys' width.
WIDTH, WIDTH_BF16, HEADS, INNER, KEYS = 6, 8, 5, 5, 1.2
SCORES, SCORES_BF16 = 40, 24  # bytes of each score of attention, of one layer: the backward pass computes them again
LOGITS, LOGITS_LANGUAGE, LOGITS_ADAPTERS = 3, 4, 6  # float32 numbers of each, of GPT-2, mlx-lm's models, with LoRA
IN_PROGRESS, RECOMPUTING = 2, 5  # layers whose backward pass holds as much again
# Float32 numbers of each trained parameter that are held: in AdamW's update, by those that it updates at once beside
# that, and in a backward pass.
UPDATE, AT_ONCE, TRAINED = 4, 4, 5
BEHIND = 2  # times the activations that a GPU may hold: its arrays stay until the operations behind them have run
BUSY = 64  # rows that keep a large GPU busy; with fewer it waits for the host: as many kernels for any number

Transformer = GPT2 | LanguageModel


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


class StepSize(NamedTuple):
    """Bytes that a training step takes."""

    expected: int  # on a GPU that is done with every operation at once
    most: int  # on one that is behind its host


def step_size(model: Transformer, config: Config, n_items: int, n_columns: int, n_labels: int, n_latents: int):
    """The StepSize of micro-batches of n_items rows of n_columns, n_latents of them thoughts, with n_labels labels."""
    shape = model.config
    if isinstance(shape, GPT2Config):
        item, logits = _gpt2_item(shape, config, n_columns), LOGITS
    else:
        item = _language_item(shape, config, n_columns, n_latents)
        logits = LOGITS_ADAPTERS if isinstance(model, LoraModel) else LOGITS_LANGUAGE
    activations = n_items * item + 4 * logits * n_labels * shape.vocab_size
    trained, at_once, frozen = _parameter_bytes(model, config)
    update = UPDATE * trained + AT_ONCE * at_once
    expected = max(update, TRAINED * trained + activations) + frozen
    return StepSize(int(expected), int(max(update, TRAINED * trained) + frozen + BEHIND * activations))


def _parameter_bytes(model: Transformer, config: Config) -> tuple[int, int, int]:
    """(those that train, once, in float32; those updated at once; frozen ones, with the copy that is computed in)."""
    trained = {name: array.nbytes for name, array in tree_flatten(model.trainable_parameters())}
    at_once = min(sum(trained.values()), max(LARGEST_UPDATE, *trained.values()))
    frozen = [array for name, array in tree_flatten(model.parameters()) if name not in trained]
    dtype = compute_dtype(config.bf16)
    cast = [array.size for array in frozen if mx.issubdtype(array.dtype, mx.floating) and array.dtype != dtype]
    return sum(trained.values()), at_once, sum(array.nbytes for array in frozen) + dtype.size * sum(cast)


def _gpt2_item(shape: GPT2Config, config: Config, n_columns: int) -> float:
    """Bytes that a row of a micro-batch takes in all layers of GPT-2."""
    hidden, weights = 4 * n_columns * shape.n_embd, shape.n_head * n_columns**2  # bytes, numbers: of an item in a layer
    if config.grad_checkpoint:
        return (KEPT_RECOMPUTED * shape.n_layer + RECOMPUTED) * hidden + 65 * weights
    return shape.n_layer * ((KEPT_BF16 if config.bf16 else KEPT) * hidden + 5 * weights)  # float32 and bool


def _language_item(shape: LanguageConfig, config: Config, n_columns: int, n_latents: int) -> float:
    """The same of a model of mlx-lm. Each pass of the thought loop keeps the keys and values of all columns so far,
    but where activations are computed again.
    """
    column, keys = n_columns * (2 if config.bf16 else 4), shape.n_kv_head * shape.head_dim
    width = (WIDTH_BF16 if config.bf16 else WIDTH) * shape.n_embd
    layer = column * (width + HEADS * shape.n_head * shape.head_dim + INNER * shape.n_inner)
    scores = (SCORES_BF16 if config.bf16 else SCORES) * shape.n_head * n_columns**2
    if config.grad_checkpoint:
        return shape.n_layer * column * 2 * (shape.n_embd + 2 * keys) + RECOMPUTING * layer + scores
    return (shape.n_layer + IN_PROGRESS) * (layer + column * KEYS * (1 + n_latents) * keys) + scores


def rows_at_once(model: Transformer, config: Config, data: TokenDataset, curriculum: Curriculum) -> int:
    """How many rows a micro-batch has on a GPU: as many as its memory holds, up to BUSY or batch_size_training.

    The optimizer step is the same however its items are cut into micro-batches.
    """
    most = min(max(BUSY, config.batch_size_training), config.batch_size_training * config.gradient_accumulation_steps)

    def size(n_rows: int) -> int:
        return longest_step(model, config, data, curriculum, n_rows)[0].most

    return max(1, bisect_right(range(1, most + 1), gpu_memory(), key=size))  # a size looks at all items: few of them


def longest_step(
    model: Transformer, config: Config, data: TokenDataset, curriculum: Curriculum, n_rows: int
) -> tuple[StepSize, int]:
    """(size, columns) of a step whose micro-batch has so many of the longest items."""
    lengths, multiple = curriculum.longest(data), COLUMNS_MULTIPLE[1]
    n_columns = (-(-int(lengths.max()) // multiple) + 1) * multiple
    n_labels = n_rows * float(np.mean(lengths - data.question_lengths))
    n_latents = min(config.max_latent_stage * curriculum.thoughts_per_step, n_columns)
    return step_size(model, config, n_rows, n_columns, int(n_labels), n_latents), n_columns


def say_memory(model: Transformer, config: Config, data: TokenDataset, curriculum: Curriculum, n_rows: int) -> None:
    """Say how much memory the longest items take in training, and warn where the GPU has less.

    Before the first step, because Metal ends the process where memory ends.
    """
    size, n_columns = longest_step(model, config, data, curriculum, n_rows)
    needed, given = human_size(size.expected), human_size(gpu_memory())
    say(f"memory: about {needed} of {given}, for micro-batches of {n_rows} of the longest items ({n_columns} columns)")
    if size.most > gpu_memory():
        possible = not (config.grad_checkpoint or config.lora_dropout)  # the two do not go together
        warn(f"one item may not fit into this GPU's memory{'; try grad_checkpoint: True' if possible else ''}")


def say_kernels() -> None:
    """Say that the first steps will be slow where MLX has no compiled CUDA kernels yet (startup/settings.py)."""
    folder = os.environ.get("MLX_PTX_CACHE_DIR")
    if folder and not any(Path(folder).glob("*.ptx")):
        say(f"kernels: MLX compiles them in the first steps, once for a machine, for 2 to 3 minutes; kept in {folder}")
