"""The optimizer and one optimizer step."""

import math
from collections.abc import Callable
from functools import reduce
from itertools import accumulate
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten, tree_map, tree_unflatten

from coconut import Batch, Coconut
from config import Config
from dataset import Chunk
from models.precision import compute_dtype, training_in
from parallel.distributed import ALONE, Group
from parallel.streams import map_streams, on_gpu
from utils import RunError

MicroBatch = list[Chunk]
LARGEST_UPDATE = 1 << 30  # bytes of parameters that AdamW updates at once
SMALL_PARAMETER = 1 << 16  # elements; up to here copies take less time than operations of its own


class StepResult(NamedTuple):
    """What one optimizer step did, on all ranks together."""

    loss: float  # mean of its micro-batches' means
    n_tokens: int  # tokens it read, without padding
    gradient_norm: float  # over all parameters, before clipping


def new_optimizer(model: Coconut, config: Config) -> optim.AdamW:
    """AdamW as torch.optim.AdamW: bias correction, weight decay on every parameter (official run.py)."""
    optimizer = optim.AdamW(
        config.lr, betas=[0.9, 0.999], eps=1e-8, weight_decay=config.weight_decay, bias_correction=True
    )
    optimizer.init(model.trainable_parameters())
    return optimizer


class _Parameter(NamedTuple):
    """A parameter that AdamW is to update."""

    name: str
    value: mx.array
    gradient: mx.array
    moments: dict[str, mx.array]


class TrainStep:
    """One optimizer step on a group of micro-batches. All ranks take the same step: losses and gradients are summed."""

    def __init__(self, model: Coconut, optimizer: optim.Optimizer, config: Config, group: Group = ALONE):
        self.model, self.optimizer, self.config, self.group = model, optimizer, config, group
        dtype = compute_dtype(config.bf16)

        def weighted_loss(batch, loss_weight):
            with training_in(model, dtype):
                return model(batch) * loss_weight

        self._loss_and_gradient = nn.value_and_grad(model, weighted_loss)
        self._norm = gradient_norm
        if on_gpu():
            self._loss_and_gradient = compiled(model, self._loss_and_gradient)
            self._norm, self._updated = mx.compile(self._norm), mx.compile(self._updated)
        else:
            self._updated = joined(self._updated)

    def __call__(self, micro_batches: list[MicroBatch], epoch: int, number: int, learning_rate: float) -> StepResult:
        """Take step `number` of an epoch, both counted from 0.

        Dropout is a function of seed, epoch, step and rank, so a resumed run continues as if it had never stopped.
        Raises RunError at the first loss that is not finite, before it touches the weights.
        """
        self.model.train()
        mx.random.seed(dropout_seed(self.config.seed, epoch, number, self.group.rank))
        loss, gradient = self._accumulate(micro_batches)
        counted = [chunk for chunks in micro_batches for chunk in chunks if chunk.loss_weight]
        n_tokens, weight = sum(c.batch.attention_mask.sum() for c in counted), sum(c.loss_weight for c in counted)
        loss, n_tokens, weight = self.group.all_gather(np.array([loss, n_tokens, weight])).sum(axis=0).tolist()
        loss /= round(weight)  # the number of micro-batches that config asks for, however they were cut
        if not math.isfinite(loss):
            problem = diverged(f"the loss is {loss} in epoch {epoch + 1}, step {number}")
            self.group.agree(problem)  # all ranks come here, one prints it
        gradient = self.group.all_sum(gradient)
        return StepResult(loss, int(n_tokens), self._update(gradient, learning_rate))

    def _update(self, gradient, learning_rate: float) -> float:
        """Update parameters and optimizer; returns the norm of the gradient before clipping."""
        norm, waiting = self._norm(gradient), self._parameters(gradient)
        state = self.optimizer.state
        state["step"] = state["step"] + 1  # as optim.Optimizer.apply_gradients does
        self.optimizer.learning_rate = learning_rate
        numbers = {name: value for name, value in state.items() if isinstance(value, mx.array)}
        while waiting:
            group, parameters, gradients, moments = zip(*_take_group(waiting), strict=True)
            parameters, new_moments = self._updated(parameters, gradients, moments, numbers, norm)
            self.model.update(tree_unflatten(list(zip(group, parameters, strict=True))))
            for own, found in zip(moments, new_moments, strict=True):
                own.update(found)
            mx.eval(parameters, new_moments, numbers, norm)
        return norm.item()

    def _parameters(self, gradient) -> list[_Parameter]:
        """All that train, small ones first."""
        tree, gradients, moments = self.model.trainable_parameters(), dict(tree_flatten(gradient)), []
        self.optimizer.init(tree)  # a state that was loaded lacks the empty parts
        tree_map(lambda _, own: moments.append(own), tree, self.optimizer.state)  # in the order of tree_flatten
        named = zip(tree_flatten(tree), moments, strict=True)
        parameters = [_Parameter(name, value, gradients[name], own) for (name, value), own in named]
        return sorted(parameters, key=lambda parameter: not _is_small(parameter.value))

    def _updated(self, parameters, gradients, moments, numbers: dict[str, mx.array], norm: mx.array):
        """(parameters, moments) after AdamW's update of some; numbers: its step and learning rate."""
        if self.config.max_grad_norm is not None:
            gradients = clipped(gradients, norm, self.config.max_grad_norm)
        own, self.optimizer.state = self.optimizer.state, numbers
        moments = [dict(m) for m in moments]  # apply_single replaces the arrays in them
        new = [self.optimizer.apply_single(*one) for one in zip(gradients, parameters, moments, strict=True)]
        self.optimizer.state = own
        return new, moments

    def _accumulate(self, micro_batches: list[MicroBatch]):
        """Sum of the micro-batches' losses, and the sum of their gradients / gradient_accumulation_steps.

        A smaller last group is divided by the full count too, as the official run.py does. Each micro-batch has ended
        before the next is started, so that memory holds the activations of one; a GPU works on one while the next is
        built. The chunks of one are evaluated together.
        """
        n, start = self.config.gradient_accumulation_steps, mx.async_eval if on_gpu() else mx.eval
        losses, total = [], None
        for chunks in micro_batches:
            results = map_streams(
                lambda chunk: self._loss_and_gradient(chunk.batch.to_mlx(), chunk.loss_weight / n), chunks
            )
            gradients = [gradient for _, gradient in results]
            mx.eval(losses, total)
            total = reduce(lambda a, b: tree_map(mx.add, a, b), gradients if total is None else [total, *gradients])
            losses.append(sum(loss for loss, _ in results))
            start(losses[-1], total)
        return sum(loss.item() for loss in losses) * n, total


def _take_group(waiting: list[_Parameter]) -> list[_Parameter]:
    """Remove the first parameters from the list: LARGEST_UPDATE bytes or less, or one that is larger.

    MLX holds the old parameters and moments until the new ones are there, so a large model is updated in groups.
    """
    size, group = 0, []
    while waiting and (not group or size + waiting[0].value.nbytes <= LARGEST_UPDATE):
        group.append(waiting.pop(0))
        size += group[-1].value.nbytes
    return group


def joined(updated: Callable) -> Callable:
    """`TrainStep._updated` for a CPU: small parameters, which come first, are updated as one array.

    AdamW works element by element, so bits stay the same. It takes about a dozen operations for each array, and a model
    of small parameters waits for their number and not for their size.
    """

    def function(parameters, gradients, moments, *others):
        n = sum(map(_is_small, parameters))
        if n < 2:
            return updated(parameters, gradients, moments, *others)
        parts, names = parameters[:n], list(moments[0])  # in a state that was read each parameter has its own order
        joint = {name: _join([own[name] for own in moments[:n]]) for name in names}
        new, new_moments = updated(
            [_join(parts), *parameters[n:]], [_join(gradients[:n]), *gradients[n:]], [joint, *moments[n:]], *others
        )
        split = zip(*(_split(new_moments[0][name], parts) for name in names), strict=True)
        small = [dict(zip(names, arrays, strict=True)) for arrays in split]
        return [*_split(new[0], parts), *new[1:]], [*small, *new_moments[1:]]

    return function


def _is_small(parameter: mx.array) -> bool:
    """Whether a parameter is updated together with others, which have the same data type."""
    return parameter.size <= SMALL_PARAMETER and parameter.dtype == mx.float32


def _join(arrays) -> mx.array:
    """Their elements in one array."""
    return mx.concatenate([array.reshape(-1) for array in arrays])


def _split(joint: mx.array, parts) -> list[mx.array]:
    """Arrays of the shapes of `parts` from one with their elements."""
    ends = list(accumulate(part.size for part in parts))
    return [array.reshape(part.shape) for array, part in zip(mx.split(joint, ends[:-1]), parts, strict=True)]


def compiled(model: Coconut, loss_and_gradient: Callable) -> Callable:
    """A function of (batch, loss_weight) compiled by MLX, once for each shape of a batch.

    On a GPU a third fewer kernels, most of whose element-wise passes are one. The model's parameters and the random
    state are inputs, so the function stays right when they change.
    """

    def pure(parameters, batch, loss_weight):
        own = model.parameters()
        model.update(parameters)
        try:
            return loss_and_gradient(Batch(*batch), loss_weight)
        finally:
            model.update(own)

    function = mx.compile(pure, inputs=mx.random.state, outputs=mx.random.state)
    return lambda batch, loss_weight: function(model.parameters(), tuple(batch), mx.array(loss_weight))


def diverged(what: str) -> RunError:
    """The error for numbers that are not finite; they are neither saved nor logged."""
    return RunError(
        f"{what}. Training stopped, and what was saved before is intact: the same command with a lower learning rate "
        "(the key lr) resumes from there, or starts anew where nothing was saved"
    )


def is_finite(tree) -> bool:
    """Whether all numbers of a tree of arrays are finite."""
    return mx.stack([mx.isfinite(array).all() for _, array in tree_flatten(tree)]).all().item()


def gradient_norm(gradient) -> mx.array:
    """The Euclidean norm over all parameters (scalar)."""
    # Summed row by row first: on a CPU MLX adds a whole array term by term, and float32 stops counting at 2**24.
    squares = [mx.square(g).sum(axis=-1).sum() for _, g in tree_flatten(gradient)]
    return mx.sqrt(sum(squares))


def clipped(gradient, norm: mx.array, max_norm: float):
    """The gradient scaled down to max_norm where its norm is larger (torch's clip_grad_norm_)."""
    scale = mx.minimum(1.0, max_norm / (norm + 1e-6))
    return tree_map(lambda g: g * scale, gradient)


def dropout_seed(seed: int, epoch: int, step: int, rank: int) -> int:
    """A seed of MLX's random state for one step on one rank."""
    return int(np.random.SeedSequence((seed, epoch, step, rank)).generate_state(1, np.uint64)[0])
