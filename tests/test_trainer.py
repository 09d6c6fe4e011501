"""The trainer's decisions that need no training: the learning rate's warm-up and when a new optimizer is made."""

from types import SimpleNamespace

import pytest

from config import Config
from dataset import Curriculum
from training.checkpoint import TrainState
from training.trainer import Trainer


def trainer_at(epoch: int, step: int = 0, **keys) -> Trainer:
    """A trainer at a place of a run with two steps an epoch and stages of two epochs."""
    trainer = object.__new__(Trainer)
    trainer.config = SimpleNamespace(**{"lr": 0.1, "warmup_steps": 4, "resume": 0, "reset_optimizer": False, **keys})
    trainer.curriculum = SimpleNamespace(step_stage=lambda epoch, *_: epoch // 2)
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


def test_single_tokens_make_a_new_optimizer_in_mid_epoch_until_nothing_is_left():
    """Two tokens an epoch of four steps: one more is due at steps 2, 4, 6 and 8, and all of five tokens at 10."""
    config = Config(
        save_path="", name="", val_path="", no_thoughts=True, curriculum="tokens", tokens_per_epoch=2,
        remove_all_from=5, reset_optimizer="stage",
    )  # fmt: skip
    found = []
    for place in range(24):
        trainer = trainer_at(place // 4, place % 4)
        trainer.config, trainer.curriculum = config, Curriculum(config, None)
        trainer.run = SimpleNamespace(steps_per_epoch=4)
        found += [place] * trainer._resets_optimizer()
    assert found == [2, 4, 6, 8, 10]


def test_the_best_of_an_icot_run_has_no_written_chain():
    """An early epoch answers with most of its chain in words, so its accuracy is another method's."""
    config = Config(save_path="", name="", val_path="", no_thoughts=True, curriculum="tokens", remove_all_from=2)
    trainer = trainer_at(0)
    trainer.config, trainer.curriculum = config, Curriculum(config, None)
    trainer.group = SimpleNamespace(is_main=False)
    best = []
    for accuracy in (0.9, 0.8, 0.5, 0.6):
        trainer._finish_epoch(accuracy)
        best.append((trainer.state.best_epoch, trainer.state.best_accuracy))
    assert best == [(0, 0.0), (0, 0.0), (3, 0.5), (4, 0.6)]
