"""What a run would do, without doing it: `python run.py CONFIG --dry-run`."""

import time
from itertools import groupby, islice

import cpu_blas  # noqa: F401  must come before mlx
import mlx.core as mx

from coconut import Coconut
from config import Config
from dataset import Data, prompt_latents, training_batches, training_counts
from streams import streams
from processes import Processes
from tokenizer import Tokenizer
from train import new_optimizer, training_steps
from utils import human_size


def stage_lines(config: Config, data: Data, first_epoch: int, n_steps: int) -> list[str]:
    """One line for each stage of the curriculum: its epochs, thoughts and optimiser steps."""
    lines = []
    for stage, group in groupby(range(first_epoch, config.num_epochs), key=config.stage):
        epochs = [epoch + 1 for epoch in group]
        span = f"epoch {epochs[0]}" if len(epochs) == 1 else f"epochs {epochs[0]} to {epochs[-1]}"
        counts = sorted(set(data.tokens.n_steps.tolist()))
        trained = _range({training_counts(stage, n, config)[1] for n in counts})
        asked = _range({prompt_latents(stage, n, config) for n in counts})
        lines.append(
            f"  {span}: stage {stage}, {trained} thoughts in training and {asked} in evaluation, "
            f"{n_steps * len(epochs):,} steps"
        )
    return lines


def measured_step(
    config: Config, model: Coconut, tokenizer: Tokenizer, data: Data, epoch: int, n_steps: int, processes: Processes
) -> str:
    """Time and memory of one optimiser step at this epoch's stage (the second of two: the first warms up)."""
    mx.reset_peak_memory()
    group = 2 * config.gradient_accumulation_steps
    batches = training_batches(data.tokens, config, tokenizer, epoch, 0, len(streams()), processes)
    optimizer = new_optimizer(model, config)
    seconds, last = 0.0, time.perf_counter()
    for _ in training_steps(model, optimizer, islice(batches, group), config, epoch, n_steps, 0, processes):
        seconds, last = time.perf_counter() - last, time.perf_counter()
    total = seconds * n_steps * (config.num_epochs - epoch)
    stage, memory = config.stage(epoch), human_size(mx.get_peak_memory())
    return (
        f"time:  {seconds:.2f} s a step at stage {stage}, so about {_duration(total)} of training, without evaluation\n"
        f"memory: {memory} at its peak"
    )


def _range(counts: set[int]) -> str:
    return str(min(counts)) if len(counts) == 1 else f"{min(counts)} to {max(counts)}"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 7200 else f"{seconds / 3600:.1f} hours"
