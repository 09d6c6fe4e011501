"""The trainer's decisions that need no training: the learning rate's warm-up and when a new optimizer is made."""

from types import SimpleNamespace

import pytest

from training.checkpoint import TrainState
from training.trainer import Trainer


def trainer_at(epoch: int, step: int = 0, **keys) -> Trainer:
    """A trainer at a place of a run with two steps an epoch and stages of two epochs."""
    trainer = object.__new__(Trainer)
    trainer.config = SimpleNamespace(**{"lr": 0.1, "warmup_steps": 4, "resume": 0, "reset_optimizer": False, **keys})
    trainer.curriculum = SimpleNamespace(stage=lambda epoch: epoch // 2)
    trainer.run = SimpleNamespace(steps_per_epoch=2)
    trainer.state = TrainState(epoch=epoch, step=step)
    return trainer


@pytest.mark.parametrize(("resume", "epoch", "rates"), [
    (0, 0, [0.025, 0.05]), (0, 1, [0.075, 0.1]), (0, 3, [0.1, 0.1]), (3, 3, [0.025, 0.05]), (3, 4, [0.075, 0.1]),
    (5, 3, [0.025, 0.05]),  # a run directory is resumed, whatever `resume` says
])  # fmt: skip
def test_the_learning_rate_rises_from_the_first_epoch_that_is_trained(resume, epoch, rates):
    found = [trainer_at(epoch, step, resume=resume)._learning_rate() for step in range(2)]
    assert found == pytest.approx(rates)


def test_without_warm_up_the_learning_rate_is_lr():
    assert trainer_at(0, warmup_steps=0)._learning_rate() == 0.1


@pytest.mark.parametrize(("reset", "epochs"), [(True, [0, 1, 2, 3, 4]), (False, []), ("stage", [2, 4])])
def test_a_new_optimizer_is_made(reset, epochs):
    assert [epoch for epoch in range(5) if trainer_at(epoch, reset_optimizer=reset)._resets_optimizer()] == epochs
