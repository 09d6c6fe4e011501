"""The optimiser and the training step."""

import math
from collections.abc import Iterable, Iterator
from functools import partial, reduce
from itertools import count, islice
from typing import NamedTuple

import cpu_blas  # noqa: F401  must come before mlx
import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten, tree_map

from coconut import Batch, Coconut, compute_dtype, computing_in
from config import Config
from processes import ALONE, Processes
from streams import spread
from utils import RunError


class Step(NamedTuple):
    """What one optimiser step did."""

    number: int  # within the epoch, counted from 0
    loss: float  # mean of its micro-batches' means
    n_tokens: int  # real tokens it read


def new_optimizer(model: Coconut, config: Config) -> optim.AdamW:
    """torch.optim.AdamW's semantics: bias correction, weight decay on every parameter (official run.py)."""
    optimizer = optim.AdamW(
        config.lr, betas=[0.9, 0.999], eps=1e-8, weight_decay=config.weight_decay, bias_correction=True
    )
    optimizer.init(model.trainable_parameters())
    return optimizer


def training_steps(
    model: Coconut,
    optimizer: optim.AdamW,
    batches: Iterable[list[Batch]],
    config: Config,
    epoch: int,
    n_steps: int,
    first: int,
    processes: Processes = ALONE,
) -> Iterator[Step]:
    """Train on micro-batches, gradient_accumulation_steps of them to a step; yields after every optimiser step.

    batches: micro-batches in parts (see dataset.own_parts); n_steps: optimiser steps of a whole epoch; first: the one
    that `batches` begins with.

    Dropout is a function of seed, epoch, step and process, so that a run taken up at any step goes on as if never
    stopped. All processes take the same step: losses and gradients are summed before it.
    Raises RunError at the first loss that is not finite, before it touches the weights.
    """
    model.train()
    loss_and_gradient = nn.value_and_grad(model, partial(_share_of_loss, model, compute_dtype(config.bf16)))
    batches = iter(batches)
    for number in count(first):
        group = list(islice(batches, config.gradient_accumulation_steps))
        if not group:
            return
        mx.random.seed(_dropout_seed(config.seed, epoch, number, processes.rank))
        loss, gradient = _accumulate(loss_and_gradient, group, config.gradient_accumulation_steps)
        n_tokens = int(sum(part.real.sum() for parts in group for part in parts if part.share))
        loss, n_tokens = map(sum, zip(*processes.gather((loss, n_tokens)), strict=True))
        if not math.isfinite(loss):
            raise RunError(
                f"the loss is {loss} in epoch {epoch + 1}, step {number}: training stopped, checkpoints are untouched. "
                "A lower learning rate (lr) is the usual remedy"
            )
        gradient = processes.sum(gradient)
        if config.max_grad_norm is not None:
            gradient = clipped(gradient, config.max_grad_norm)
        if config.warmup_steps:
            epochs_before = max(0, epoch - config.resume)  # those that `resume` skips were another run's
            n_taken = epochs_before * n_steps + number
            optimizer.learning_rate = config.lr * min(1.0, (n_taken + 1) / config.warmup_steps)
        optimizer.update(model, gradient)
        mx.eval(model.parameters(), optimizer.state)
        yield Step(number, loss, n_tokens)


def _share_of_loss(model: Coconut, dtype: mx.Dtype, batch: Batch) -> mx.array:
    with computing_in(model, dtype):
        return model(batch) * batch.share


def clipped(gradient, max_norm: float):
    """The gradient scaled down to max_norm where its norm over all parameters is larger (torch's clip_grad_norm_)."""
    # summed row by row first: MLX adds a whole array naively on CPU, and float32 stops counting at 2**24
    squares = [mx.square(g).sum(axis=-1).sum() for _, g in tree_flatten(gradient)]
    scale = mx.minimum(1.0, max_norm / (mx.sqrt(sum(squares)) + 1e-6))
    return tree_map(lambda g: g * scale, gradient)


def _accumulate(loss_and_gradient, group: list[list[Batch]], n_accumulated: int):
    """Mean loss of the micro-batches and their summed gradient / n_accumulated.

    An incomplete last group is divided by the full count too, as the official run.py does. Each micro-batch is
    evaluated before the next is begun, so that memory holds the activations of one; its parts at once.
    """
    losses, total = [], None
    for parts in group:
        results = spread(lambda part: loss_and_gradient(part.to_mlx()), parts)
        gradients = [tree_map(lambda g: g / n_accumulated, g) if n_accumulated > 1 else g for _, g in results]
        total = reduce(lambda a, b: tree_map(mx.add, a, b), gradients if total is None else [total, *gradients])
        loss = sum(loss for loss, _ in results)
        mx.eval(loss, total)
        losses.append(loss.item())
    return sum(losses) / len(losses), total


def _dropout_seed(seed: int, epoch: int, step: int, rank: int) -> int:
    return int(np.random.SeedSequence((seed, epoch, step, rank)).generate_state(1, np.uint64)[0])
