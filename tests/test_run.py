"""What a run does and leaves behind, through the command line: training, resuming, evaluating, stopping."""

import errno
import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import replace

import mlx.core as mx
import pytest
from conftest import ROOT, pictures, tiny_item

from coconut import Coconut
from config import FIELDS, load_config
from models import gpt2
from models.recompute import run_and_recompute
from startup import blas  # noqa: F401  before mlx
from text import tokens
from training import checkpoint as ckpt
from training import evaluation, resume, setup, step, trainer
from utils import Stopped

pytestmark = pytest.mark.usefixtures("on_cpu")  # bits are compared
TRAIN_KEYS = {"train/epoch", "train/step", "train/loss", "train/lr", "train/grad_norm", "epoch", "stage"}
EVAL_KEYS = {"eval/loss", "eval/acc", "eval/cot_em", "eval/n_tokens", "eval/seconds_per_example", "epoch", "stage"}
EVAL_KEYS |= {"train/seconds", "acc_interval"}
THOUGHTS = {"method": "coconut", "c_thought": 1, "max_latent_stage": 2, "pad_latent_to_max": True}
ABOUT_KEYS = {"checkpoint", "data", "data_sha256", "stage", *THOUGHTS}  # of every record of an evaluation
PREDICTION_KEYS = {
    "idx", "question", "expected_answer", "answer", "correct", "cot", "cot_match", "output_ids", "n_tokens",
}  # fmt: skip


def names(folder) -> set[str]:
    """What a user sees in a folder; the place in a state's name is left out."""
    return {re.sub(r"^state_\d+_\d+$", "state", path.name) for path in folder.iterdir() if path.name[0] != "."}


def contents(folder) -> dict:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def jsonl(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def without(keys: set[str], records: list[dict]) -> list[dict]:
    return [{key: value for key, value in record.items() if key not in keys} for record in records]


def without_time(records: list[dict]) -> list[dict]:
    return [{key: value for key, value in record.items() if "seconds" not in key} for record in records]


@pytest.fixture(scope="module")
def finished(shared_tiny, call_main):
    """A coconut run of three epochs in three stages: (its Tiny, what it printed)."""
    with pictures():
        outcome = call_main(shared_tiny.config(num_epochs=3, gradient_accumulation_steps=2))
    assert outcome.status == 0, outcome.err
    return shared_tiny, outcome


@pytest.fixture
def evaluate(finished, call_main, tmp_path):
    """Evaluate the finished run's checkpoint_{n} with only_eval: evaluate(n, **keys) -> (outcome, folder)."""
    tiny, _ = finished

    def call(number, status=0, **keys):
        keys = {"only_eval": True, "load_model_path": tiny.runs / "tiny" / f"checkpoint_{number}", **keys}
        outcome = call_main(tiny.config("eval.yaml", save_path=tmp_path, name="evaluated", **keys))
        assert outcome.status == status, outcome.err
        return outcome, tmp_path / "evaluated"

    return call


# A training run


def test_a_run_leaves_its_config_metrics_predictions_and_checkpoints(finished):
    tiny, _ = finished
    predictions, checkpoints = {f"predictions_{i}.jsonl" for i in (1, 2, 3)}, {f"checkpoint_{i}" for i in (1, 2, 3)}
    expected = {"config.yaml", "metrics.jsonl", "first_batch.txt", "curves.png", "state", *predictions, *checkpoints}
    assert names(tiny.runs / "tiny") == expected


def test_the_resolved_config_loads_again_and_is_equal(finished):
    tiny, _ = finished
    written = tiny.runs / "tiny" / "config.yaml"
    config = load_config(str(written))
    assert config == load_config(str(tiny.folder / "tiny.yaml"))
    assert all(f"\n{name}: " in "\n" + written.read_text() for name in FIELDS)


def test_metrics_hold_every_step_and_every_epoch(finished):
    """8 items in micro-batches of 4, two of them to a step: one step an epoch. One stage an epoch."""
    records = finished[0].records()
    training, evaluation = [r for r in records if "train/loss" in r], [r for r in records if "eval/loss" in r]
    assert all(set(r) == TRAIN_KEYS for r in training)
    assert all(set(r) == EVAL_KEYS for r in evaluation)
    assert len(training) + len(evaluation) == len(records)
    assert [(r["train/epoch"], r["train/step"], r["epoch"], r["stage"]) for r in training] == [
        (1, 0, 1, 0),
        (2, 1, 2, 1),
        (3, 2, 3, 2),
    ]
    assert [(r["epoch"], r["stage"]) for r in evaluation] == [(1, 0), (2, 1), (3, 2)]
    assert training[-1]["train/loss"] < training[0]["train/loss"]
    assert all(r["eval/n_tokens"] > 0 and r["eval/seconds_per_example"] > 0 for r in evaluation)


def test_an_evaluation_shows_samples_and_what_is_left(finished):
    tiny, outcome = finished
    predictions = jsonl(tiny.runs / "tiny" / "predictions_3.jsonl")
    lines = outcome.out.splitlines()
    last = max(number for number, line in enumerate(lines) if line.startswith("epoch 3, stage 2:"))
    for line, prediction in zip(lines[last + 1 : last + 5], predictions, strict=True):
        verdict = "right" if prediction["correct"] else f"expected {prediction['expected_answer']!r}"
        assert line.startswith(f"  {prediction['question']}: ") and line.endswith(f"({verdict})")
    assert [bool(re.search(r"2 epochs left, about \d+ seconds", line)) for line in lines].count(True) == 1
    assert [bool(re.search(r"1 epoch left, about \d+ seconds", line)) for line in lines].count(True) == 1


@pytest.mark.parametrize("place", ["validation", "mid-epoch"])
def test_what_is_left_counts_the_time_before_a_restart_too(place, tiny, call_main, monkeypatch):
    """The epoch in progress had taken ten hours when the run was stopped; two epochs are left behind it."""

    take_step = step.TrainStep.__call__

    def stopped(*_):
        raise Stopped(signal.SIGTERM)

    def stopped_at_the_second(self, micro_batches, epoch, number, rate):
        return stopped() if number else take_step(self, micro_batches, epoch, number, rate)

    keys = {"num_epochs": 3, "save_interval_minutes": 1e-9}  # after every step
    with monkeypatch.context() as patch:
        if place == "validation":
            patch.setattr(trainer.Evaluator, "loss", stopped)
        else:
            patch.setattr(step.TrainStep, "__call__", stopped_at_the_second)
        assert call_main(tiny.config(**keys)).status == 128 + signal.SIGTERM
    state = max(resume.find_states(tiny.runs / "tiny"))
    position = ckpt.TrainState(**ckpt.read_metadata(state)["position"])
    assert position.step == (2 if place == "validation" else 1)
    ckpt.update_state(state, replace(position, train_seconds=36000.0))
    outcome = call_main(tiny.config(**keys))
    assert outcome.status == 0, outcome.err
    left = re.findall(r"epochs? left, about (.*) at this one's speed", outcome.out)
    assert left[0] == "20.0 hours" and re.fullmatch(r"\d seconds", left[1])


def test_predictions_hold_every_item_in_order(finished):
    tiny, _ = finished
    items = json.loads(tiny.valid.read_text())
    for epoch, stage in ((1, 0), (2, 1), (3, 2)):
        predictions = jsonl(tiny.runs / "tiny" / f"predictions_{epoch}.jsonl")
        assert [p["idx"] for p in predictions] == list(range(len(items)))
        for prediction, item in zip(predictions, items, strict=True):
            assert set(prediction) == PREDICTION_KEYS
            assert (prediction["question"], prediction["expected_answer"]) == (item["question"], item["answer"])
            assert prediction["correct"] == (prediction["answer"] == item["answer"])
            assert prediction["n_tokens"] == len(prediction["output_ids"]) + stage  # thoughts count, as in the paper
            assert len(prediction["output_ids"]) <= 8


def test_metrics_summarise_the_predictions(finished):
    tiny, _ = finished
    for record in [r for r in tiny.records() if "eval/acc" in r]:
        predictions = jsonl(tiny.runs / "tiny" / f"predictions_{record['epoch']}.jsonl")
        for key, field in (("eval/acc", "correct"), ("eval/cot_em", "cot_match"), ("eval/n_tokens", "n_tokens")):
            assert record[key] == pytest.approx(sum(p[field] for p in predictions) / len(predictions))


def test_checkpoints_say_where_they_come_from(finished):
    tiny, _ = finished
    for number in (1, 2, 3):
        folder = tiny.runs / "tiny" / f"checkpoint_{number}"
        assert names(folder) == {"model.safetensors", "config.json", "coconut.json"}
        record = ckpt.read_metadata(folder)
        assert (record["epoch"], record["stage"], record["method"]) == (number, number - 1, "coconut")
        assert {"python", "mlx", "numpy"} <= set(record["versions"])
        assert record["config"]["num_epochs"] == 3


def test_the_first_batch_is_there_to_read(finished):
    """One token a line: id, label, text. Labels are -100 or the id; the answer and its end are labeled."""
    tiny, _ = finished
    lines = (tiny.runs / "tiny" / "first_batch.txt").read_text(encoding="utf-8").splitlines()
    tokens = [line.split(" ", 2) for line in lines if not line.startswith("=")]
    assert len(tokens) >= 4 * 30
    assert all(label in ("-100", identity) for identity, label, _ in tokens)
    labeled = [text for _, label, text in tokens if label != "-100"]
    assert labeled.count("'<|endoftext|>'") == 4
    assert labeled.count("'###'") == 4
    assert "'<|latent|>'" not in labeled


def test_the_screen_tells_what_runs_and_how_it_went(finished):
    _, outcome = finished
    for text in (
        "coconut",
        "3 epochs",
        "8 training items",
        "2 layers, 16 wide",
        "fresh random weights",
        "checkpoint_3",
    ):
        assert text in outcome.out
    for text in ("Epoch 3/3, stage 2", "loss=", " tok/s, "):
        assert text in outcome.err


def test_from_the_shell(tiny, run_cli):
    """A real process, with a relative save_path and overrides."""
    outcome = run_cli(tiny.config(save_path="out"), "num_epochs=1", "name=shell", cwd=tiny.folder)
    assert outcome.status == 0, outcome.err
    assert "checkpoint_1" in names(tiny.folder / "out" / "shell")


@pytest.mark.parametrize("method", ["cot", "no_cot", "no_thoughts"])
def test_the_other_methods_run_too(method, tiny, call_main):
    outcome = call_main(tiny.config(coconut=False, num_epochs=3, **{method: True}))
    assert outcome.status == 0, outcome.err
    stages = [r["stage"] for r in tiny.records() if "eval/loss" in r]
    assert stages == ([0, 1, 2] if method == "no_thoughts" else [0, 0, 0])
    assert all(p["n_tokens"] == len(p["output_ids"]) for p in jsonl(tiny.runs / "tiny" / "predictions_3.jsonl"))


def test_debug_limits_the_data_and_keeps_no_checkpoints(tiny, call_main):
    valid = tiny.write("many.json", [tiny_item(a, 2, 1) for a in range(1, 40)])
    with pictures():
        outcome = call_main(tiny.config(debug=True, num_epochs=1, val_path=valid))
    assert outcome.status == 0, outcome.err
    written = {"config.yaml", "metrics.jsonl", "first_batch.txt", "curves.png", "predictions_1.jsonl"}
    assert names(tiny.runs / "tiny") == written
    assert len(jsonl(tiny.runs / "tiny" / "predictions_1.jsonl")) == 32


def test_debug_under_the_name_of_a_run_leaves_that_run_alone(tiny, call_main):
    """It neither goes on from the run's state nor touches its metrics, configuration and predictions."""
    assert call_main(tiny.config(num_epochs=1)).status == 0
    folder = tiny.runs / "tiny"
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    outcome = call_main(tiny.config(num_epochs=3, debug=True, lr=1e-4))
    assert outcome.status == 0, outcome.err
    assert {path: path.read_bytes() for path in before} == before
    assert names(folder) == {path.relative_to(folder).parts[0] for path in before if path.name != ".lock"} - {
        "state_0_2"
    } | {"state", "debug"}
    assert "going on from" not in outcome.out


@pytest.mark.parametrize("keys", [{}, {"only_eval": True}])
def test_debug_under_the_name_of_an_evaluation_leaves_that_alone(keys, finished, evaluate, call_main):
    _, folder = evaluate(3)
    before = {path: path.read_bytes() for path in folder.iterdir()}
    weights = finished[0].runs / "tiny" / "checkpoint_3"
    common = {"save_path": folder.parent, "name": folder.name, "load_model_path": weights, "num_epochs": 1}
    outcome = call_main(finished[0].config("debug.yaml", debug=True, **common, **keys))
    assert outcome.status == 0, outcome.err
    assert {path: path.read_bytes() for path in before} == before
    assert {path.name for path in folder.iterdir()} == {path.name for path in before} | {"debug"}
    assert (folder / "debug" / "metrics.jsonl").is_file()


def test_training_under_the_name_of_an_evaluation_is_refused(finished, evaluate, call_main):
    """It would begin metrics.jsonl anew and overwrite predictions."""
    _, folder = evaluate(3)
    before = {path: path.read_bytes() for path in folder.iterdir()}
    outcome = call_main(finished[0].config("train.yaml", save_path=folder.parent, name=folder.name, num_epochs=1))
    assert outcome.status == 2 and "holds the results of an evaluation" in outcome.err
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


def test_save_only_improve_keeps_the_epochs_of_a_new_best_accuracy(tiny, call_main):
    """One answer for all, learnt in a few epochs: accuracy rises from 0 and then stays."""
    data = tiny.write("same.json", [{**tiny_item(a, 1, 0), "answer": "7"} for a in range(1, 9)])
    keys = {"coconut": False, "no_cot": True, "train_path": data, "val_path": data, "num_epochs": 20, "lr": 1e-2}
    outcome = call_main(tiny.config(save_only_improve=True, **keys))
    assert outcome.status == 0, outcome.err
    accuracies = [(r["epoch"], r["eval/acc"]) for r in tiny.records() if "eval/acc" in r]
    improved, best = set(), 0.0
    for epoch, accuracy in accuracies:
        if accuracy > best:
            improved.add(f"checkpoint_{epoch}")
            best = accuracy
    assert accuracies[0][1] == 0
    assert best == 1
    assert {name for name in names(tiny.runs / "tiny") if name.startswith("checkpoint")} == improved


# Resuming


def test_a_run_without_checkpoints_starts_over_and_writes_its_metrics_anew(tiny, call_main):
    for _ in range(2):
        assert call_main(tiny.config(debug=True, num_epochs=1)).status == 0
    assert [r["train/step"] for r in tiny.records() if "train/loss" in r] == [0, 1]
    assert [r["epoch"] for r in tiny.records() if "eval/loss" in r] == [1]


def test_a_run_under_the_name_of_a_debug_run_leaves_nothing_of_that(tiny, call_main):
    assert call_main(tiny.config(debug=True, num_epochs=3, lr=5e-3)).status == 0
    assert call_main(tiny.config(num_epochs=1)).status == 0
    assert call_main(tiny.config(num_epochs=1, name="fresh")).status == 0
    folder, fresh = tiny.runs / "tiny", tiny.runs / "fresh"
    assert names(folder) == names(fresh) and "predictions_1.jsonl" in names(folder)
    assert (folder / "predictions_1.jsonl").read_bytes() == (fresh / "predictions_1.jsonl").read_bytes()
    assert without_time(tiny.records()) == without_time(tiny.records("fresh"))


def test_a_resumed_run_equals_an_uninterrupted_one(finished, tiny, call_main):
    """Two epochs, then the same command with three: the same weights bit by bit, the same records."""
    keys = {"gradient_accumulation_steps": 2, "train_path": finished[0].train, "val_path": finished[0].valid}
    keys |= {"tokenizer": finished[0].words, "model_config_path": finished[0].model}
    assert call_main(tiny.config(num_epochs=2, **keys)).status == 0
    with pictures():
        outcome = call_main(tiny.config(num_epochs=3, **keys))
    assert outcome.status == 0, outcome.err
    assert "epoch 3" in outcome.out
    assert "num_epochs: was 2, is 3" in outcome.out
    ours, whole = tiny.runs / "tiny", finished[0].runs / "tiny"
    assert names(ours) == names(whole)
    for pattern in ("checkpoint_3/model.safetensors", "state_*/optimizer.safetensors", "predictions_3.jsonl"):
        [one], [other] = ours.glob(pattern), whole.glob(pattern)
        assert one.read_bytes() == other.read_bytes(), pattern
    assert without_time(tiny.records()) == without_time(finished[0].records())


def test_a_finished_run_started_again_changes_nothing(finished, call_main):
    tiny, _ = finished
    before = {p: p.read_bytes() for p in (tiny.runs / "tiny").rglob("*") if p.is_file()}
    outcome = call_main(tiny.folder / "tiny.yaml")
    assert outcome.status == 0, outcome.err
    assert "all 3 epochs are done" in outcome.out
    assert {p: p.read_bytes() for p in (tiny.runs / "tiny").rglob("*") if p.is_file()} == before


def test_resume_skips_epochs_in_a_fresh_directory(tiny, call_main):
    """The official use: epochs before `resume` were another run's (a CoT model), the stage is counted from 0."""
    assert call_main(tiny.config(resume=2, num_epochs=3)).status == 0
    assert [(r["epoch"], r["stage"]) for r in tiny.records() if "eval/loss" in r] == [(3, 2)]
    assert "checkpoint_3" in names(tiny.runs / "tiny")
    assert "checkpoint_1" not in names(tiny.runs / "tiny")


def test_resuming_with_another_method_is_refused(finished, call_main):
    tiny, _ = finished
    before = names(tiny.runs / "tiny")
    outcome = call_main(tiny.config("other.yaml", coconut=False, cot=True, num_epochs=4, gradient_accumulation_steps=2))
    assert outcome.status == 2
    assert "coconut: was True, is False" in outcome.err
    assert "cot: was False, is True" in outcome.err
    assert names(tiny.runs / "tiny") == before


def test_a_key_that_is_younger_than_the_run_counts_as_its_default(finished, call_main):
    """The recorded configuration lacks it, as those of older versions do."""
    tiny, _ = finished
    shutil.copytree(tiny.runs, tiny.folder / "older")
    for file in (tiny.folder / "older" / "tiny").glob("*/coconut.json"):
        metadata = json.loads(file.read_text())
        del metadata["config"]["thought"]
        ckpt._seal(metadata)
        file.write_text(json.dumps(metadata))
    outcome = call_main(tiny.config("other.yaml", save_path=tiny.folder / "older", thought="pause", num_epochs=4))
    assert outcome.status == 2 and "thought: was 'hidden', is 'pause'" in outcome.err


def test_the_second_of_two_starts_leaves_the_directory_of_the_first_one(tiny, call_main, monkeypatch):
    """Both saw that there was none; the first one holds it by the time that the second one tries to."""
    real = resume.locked

    @contextmanager
    def locked_by_another(directory):
        with open(directory / ".lock", "w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            with real(directory):
                yield

    monkeypatch.setattr(resume, "locked", locked_by_another)
    outcome = call_main(tiny.config(num_epochs=1))
    assert outcome.status == 2 and "another process" in outcome.err
    assert (tiny.runs / "tiny" / ".lock").exists()


def test_an_evaluation_holds_its_directory_too(finished, call_main):
    """It makes the directory before it loads anything, so that of two at a time one is refused."""
    tiny, _ = finished
    folder = tiny.folder / "held"
    (folder / "tiny").mkdir(parents=True)
    weights = tiny.runs / "tiny" / "checkpoint_3"
    with resume.locked(folder / "tiny"):
        outcome = call_main(tiny.config("held.yaml", only_eval=True, load_model_path=weights, save_path=folder))
    assert outcome.status == 2 and "another process" in outcome.err
    assert names(folder / "tiny") == set()


@pytest.mark.parametrize(("number", "hinted"), [(errno.ENOSPC, True), (errno.EDQUOT, True), (errno.EIO, False)])
def test_a_full_disk_or_quota_says_to_make_room(tiny, call_main, monkeypatch, number, hinted):
    def failing(path):
        raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr(ckpt, "sync", failing)
    outcome = call_main(tiny.config())
    assert outcome.status == 1 and f"error: [Errno {number}]" in outcome.err
    assert ("make room and run the same command again" in outcome.err) == hinted
    assert not resume.holds_training(tiny.runs / "tiny") and not list(tiny.runs.glob("tiny/.state*"))


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EIO])
def test_a_file_system_without_locks_is_no_other_process(tiny, call_main, monkeypatch, number):
    def flock(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.flock", flock)
    outcome = call_main(tiny.config(num_epochs=1))
    assert outcome.status == 0 and "another process" not in outcome.err
    assert f"this file system has no locks ({os.strerror(number)}); do not start" in outcome.err


def test_an_empty_directory_and_stray_files_do_not_disturb(tiny, call_main):
    """A killed process's temporary files are removed."""
    folder = tiny.runs / "tiny"
    folder.mkdir(parents=True)
    for stray in ("checkpoint_12.pt", "notes.txt", "checkpoint_best", "checkpoint_", "state_x", ".config.yaml.7.tmp"):
        (folder / stray).write_text("mine")
    outcome = call_main(tiny.config(num_epochs=1))
    assert outcome.status == 0, outcome.err
    assert {"checkpoint_1", "notes.txt", "checkpoint_12.pt"} <= names(folder)
    assert (folder / "checkpoint_12.pt").read_text() == "mine"
    assert not list(folder.glob(".*.tmp"))


# only_eval


def test_only_eval_prints_everything_and_writes_three_files(evaluate):
    outcome, folder = evaluate(3, resume=2)
    [line] = [line for line in outcome.out.splitlines() if "accuracy" in line]
    pattern = r"epoch 2, stage 2: loss \d+\.\d+, accuracy [0-4]/4 = \d\.\d+ \(95 % interval 0\.\d+ to \d\.\d+\), "
    pattern += r"CoT match \d\.\d+, latents 2, \d+\.\d tokens and \d+\.\d+ s per example"
    assert re.fullmatch(pattern, line)
    assert names(folder) == {"config.yaml", "metrics.jsonl", "predictions_2.jsonl"}
    [record] = jsonl(folder / "metrics.jsonl")
    assert set(record) == EVAL_KEYS | ABOUT_KEYS
    assert "warning" not in outcome.err
    assert "resume: 2" in outcome.out


def test_only_eval_repeats_the_trainings_evaluation(finished, evaluate):
    """checkpoint_3 was trained and judged in epoch index 2."""
    _, folder = evaluate(3, resume=2)
    trained = finished[0].runs / "tiny"
    assert without(ABOUT_KEYS, jsonl(folder / "predictions_2.jsonl")) == jsonl(trained / "predictions_3.jsonl")
    [record], [expected] = jsonl(folder / "metrics.jsonl"), [r for r in finished[0].records() if r["epoch"] == 3][1:]
    assert record["eval/loss"] == pytest.approx(expected["eval/loss"], rel=1e-6)
    assert (record["eval/acc"], record["stage"]) == (expected["eval/acc"], expected["stage"])


def test_only_eval_without_resume_repeats_every_checkpoints_own_evaluation(finished, call_main, tmp_path):
    """Stage and thoughts are those in the checkpoint's metadata, whatever the configuration says of thoughts."""
    tiny, _ = finished
    for number in (1, 2, 3):
        keys = {"only_eval": True, "load_model_path": tiny.runs / "tiny" / f"checkpoint_{number}", "name": str(number)}
        keys |= {"max_latent_stage": 1, "epochs_per_stage": 4, "c_thought": 2, "save_path": tmp_path}
        outcome = call_main(tiny.config("eval.yaml", **keys))
        assert outcome.status == 0, outcome.err
        assert f"eval:  stage {number - 1}, method coconut, c_thought 1, max_latent_stage 2" in outcome.out
        assert "as the checkpoint was trained" in outcome.out
        assert "note: c_thought: 1, as" in outcome.out and "not 2; with `resume` given" in outcome.out
        [record] = jsonl(tmp_path / str(number) / "metrics.jsonl")
        [expected] = [r for r in finished[0].records() if r["epoch"] == number and "eval/loss" in r]
        assert record["eval/loss"] == pytest.approx(expected["eval/loss"], rel=1e-6)
        assert record.items() >= THOUGHTS.items()
        found = jsonl(tmp_path / str(number) / f"predictions_{number}.jsonl")
        assert without(ABOUT_KEYS, found) == jsonl(tiny.runs / "tiny" / f"predictions_{number}.jsonl")


def test_only_eval_without_resume_repeats_the_loss_of_a_method_without_thoughts_too(tiny, call_main):
    """Its stages drop steps, up to max_latent_stage."""
    assert call_main(tiny.config(coconut=False, no_thoughts=True, num_epochs=3)).status == 0
    [expected] = [r for r in tiny.records() if r["epoch"] == 3 and "eval/loss" in r]
    keys = {"only_eval": True, "load_model_path": tiny.runs / "tiny" / "checkpoint_3", "max_latent_stage": 1}
    outcome = call_main(tiny.config("eval.yaml", name="again", coconut=False, no_thoughts=True, **keys))
    assert outcome.status == 0, outcome.err
    [record] = tiny.records("again")
    assert (record["stage"], record["eval/loss"]) == (2, pytest.approx(expected["eval/loss"], rel=1e-6))


@pytest.mark.parametrize(("metadata", "epoch"), [
    ({"epoch": 3}, 2), ({"epoch": 0}, 0),
    ({"epoch": 3, "position": {"epoch": 3, "step": 5}}, 3),  # in the middle of the fourth epoch
    ({"epoch": 3, "position": {"epoch": 2, "step": 9}}, 2),  # the third is trained, not yet validated
    ({"epoch": 3, "position": {"epoch": 3, "step": 0}}, 2),
])  # fmt: skip
def test_the_epoch_that_weights_were_trained_in_last(metadata, epoch):
    assert ckpt.trained_epoch(metadata) == epoch


def test_the_resume_of_a_training_run_is_not_that_of_its_evaluation(finished, call_main, tmp_path):
    """`run.py RUN/config.yaml only_eval=True load_model_path=RUN`: the file's `resume: 0` skipped no epochs."""
    run = finished[0].runs / "tiny"
    keys = ["only_eval=True", f"load_model_path={run}/checkpoint_2", f"save_path={tmp_path}"]
    assert "stage 1," in call_main(run / "config.yaml", *keys).out
    assert "stage 0," in call_main(run / "config.yaml", *keys, "resume=0").out


def test_the_config_of_an_evaluation_repeats_it(finished, call_main, tmp_path):
    """The stage stays the checkpoint's: a `resume` in the file would name the predictions after itself."""
    run = finished[0].runs / "tiny"
    keys = ["only_eval=True", f"load_model_path={run}/checkpoint_2", f"save_path={tmp_path}", "max_latent_stage=1"]
    assert call_main(run / "config.yaml", *keys).status == 0
    assert call_main(tmp_path / "tiny" / "config.yaml").status == 0
    assert names(tmp_path / "tiny") == {"config.yaml", "metrics.jsonl", "predictions_2.jsonl"}
    first, second = ({**r, "eval/seconds_per_example": 0} for r in jsonl(tmp_path / "tiny" / "metrics.jsonl"))
    assert first == second


def test_an_evaluation_leaves_a_run_that_has_only_begun_alone(finished, call_main, tmp_path):
    """Nothing is saved before the first epoch ends, or save_interval_minutes are over."""
    run, begun = finished[0].runs / "tiny", tmp_path / "tiny"
    begun.mkdir()
    for name in ("config.yaml", "first_batch.txt"):
        (begun / name).write_text("mine")
    keys = ["only_eval=True", f"load_model_path={run}/checkpoint_2", f"save_path={tmp_path}"]
    assert call_main(run / "config.yaml", *keys).status == 0
    assert names(begun) == {"config.yaml", "first_batch.txt", "only_eval"}
    assert (begun / "config.yaml").read_text() == "mine"


@pytest.mark.parametrize("change", [
    {"c_thought": 2}, {"max_latent_stage": 3}, {"pad_latent_to_max": False}, {"coconut": False, "cot": True}
])  # fmt: skip
@pytest.mark.parametrize("file", ["", "model.safetensors"])
def test_only_eval_with_other_thoughts_than_trained_says_so(change, file, finished, evaluate):
    """Also where a file inside the checkpoint is named."""
    path = finished[0].runs / "tiny" / "checkpoint_3" / file
    outcome, _ = evaluate(3, resume=2, load_model_path=path, **change)
    name = "method" if "cot" in change else next(iter(change))
    assert re.search(rf"^warning: .* was trained with {name}: ", outcome.err, flags=re.MULTILINE)


def test_only_eval_of_a_link_to_a_checkpoints_file_knows_how_it_was_trained(finished, evaluate, tmp_path):
    link = tmp_path / "best.safetensors"
    link.symlink_to(finished[0].runs / "tiny" / "checkpoint_3" / "model.safetensors")
    outcome, _ = evaluate(3, load_model_path=link)
    assert "eval:  stage 2, method coconut" in outcome.out and "as the checkpoint was trained" in outcome.out
    outcome, _ = evaluate(3, resume=2, load_model_path=link, c_thought=2)
    assert "was trained with c_thought: 1" in outcome.err


def test_weights_out_of_their_folder_know_their_vocabulary(finished, tmp_path, call_main):
    """Another one of as many tokens or one less fits their rows, and the special tokens would be the wrong ones."""
    bare, other = tmp_path / "bare.safetensors", tmp_path / "other.json"
    shutil.copy(finished[0].runs / "tiny" / "checkpoint_3" / "model.safetensors", bare)
    words = json.loads(finished[0].words.read_text())
    keys = ["name=bare", f"save_path={tmp_path}", f"load_model_path={bare}", "num_epochs=1"]
    config = finished[0].config("bare.yaml")
    assert call_main(config, *keys).status == 0
    for fewer in (words[:-1], [*words[:-1], "another"]):
        other.write_text(json.dumps(fewer))
        outcome = call_main(config, *keys, "name=other", f"tokenizer={other}")
        assert outcome.status == 2
        assert f"{bare}: trained with another vocabulary than this run's (from {other})" in outcome.err
    assert not (tmp_path / "other").exists()


def test_an_evaluation_with_other_thoughts_does_not_overwrite_the_first(evaluate):
    for n in (1, 2):
        _, folder = evaluate(3, resume=2, c_thought=n)
    thoughts = {path.name: jsonl(path)[0]["c_thought"] for path in folder.glob("predictions_*.jsonl")}
    assert thoughts == {"predictions_2.jsonl": 1, "predictions_2_2.jsonl": 2}


def test_a_second_evaluation_does_not_overwrite_the_first(finished, evaluate):
    """Other data, and another checkpoint; the same evaluation again has one file."""
    tiny, _ = finished
    for keys in ({}, {"val_path": tiny.train}, {}):
        _, folder = evaluate(3, resume=2, **keys)
    evaluate(2, resume=2)
    firsts = {path.name: jsonl(path)[0] for path in folder.glob("predictions_*.jsonl")}
    assert firsts.keys() == {"predictions_2.jsonl", "predictions_2_2.jsonl", "predictions_2_3.jsonl"}
    expected = [("checkpoint_3", tiny.valid), ("checkpoint_3", tiny.train), ("checkpoint_2", tiny.valid)]
    for found, (checkpoint, data) in zip(sorted(firsts.items()), expected, strict=True):
        assert (found[1]["checkpoint"].split("/")[-1], found[1]["data"]) == (checkpoint, str(data)), found[0]
    described = [(r["checkpoint"].split("/")[-1], r["data"]) for r in jsonl(folder / "metrics.jsonl")]
    assert described == [(name, str(data)) for name, data in (expected[0], expected[1], expected[0], expected[2])]


def test_only_eval_at_another_stage_than_trained_says_so(evaluate):
    outcome, _ = evaluate(3, resume=1)
    assert re.search(r"^warning: .*trained at stage 2.*at stage 1$", outcome.err, flags=re.MULTILINE)
    assert "latents 1," in outcome.out


def test_only_eval_counts_different_latents(evaluate):
    """Items with 0 to 3 steps, without padding to the maximum: 0 to 2 thoughts."""
    outcome, _ = evaluate(3, resume=2, pad_latent_to_max=False)
    assert "latents 0 to 2," in outcome.out


def test_the_batch_size_of_evaluation_does_not_matter(evaluate):
    _, folder = evaluate(3, resume=2, batch_size_eval=1)
    one = (folder / "predictions_2.jsonl").read_bytes()
    evaluate(3, resume=2, batch_size_eval=3)
    assert (folder / "predictions_2.jsonl").read_bytes() == one


@pytest.mark.parametrize(("keys", "words"), [
    ({"thought": "pause"}, "trained with thought `hidden`, this run has thought `pause`"),
    ({"layout": "compact"}, "trained with layout `lines`, this run has layout `compact`"),
])  # fmt: skip
def test_an_evaluation_in_another_form_than_trained_is_refused(evaluate, keys, words):
    """The tensors fit and the answers look plausible; only the metadata can tell."""
    outcome, folder = evaluate(3, status=2, resume=2, **keys)
    assert words in outcome.err and "Set `" in outcome.err
    assert not folder.exists() or "predictions_2.jsonl" not in names(folder)


def test_a_pause_run_counts_its_pauses_apart_and_is_not_evaluated_as_thoughts(tiny, call_main):
    outcome = call_main(tiny.config(thought="pause", num_epochs=3))
    assert outcome.status == 0, outcome.err
    assert re.findall(r"CoT match \S+ (\w+ \d+)", outcome.out) == ["pauses 0", "pauses 1", "pauses 2"]
    predictions = jsonl(tiny.runs / "tiny" / "predictions_3.jsonl")
    assert all(p["n_tokens"] == len(p["output_ids"]) for p in predictions)  # as in the paper's table
    keys = {"only_eval": True, "load_model_path": tiny.runs / "tiny" / "checkpoint_3", "resume": 2}
    outcome = call_main(tiny.config("hidden.yaml", name="again", **keys))
    assert outcome.status == 2 and "trained with thought `pause`, this run has thought `hidden`" in outcome.err
    outcome = call_main(tiny.config("hidden.yaml", name="onwards", load_model_path=keys["load_model_path"]))
    assert outcome.status == 0 and "warning: " in outcome.err and "trained with thought `pause`" in outcome.err


ICOT = {
    "coconut": False, "no_thoughts": True, "curriculum": "tokens", "tokens_per_epoch": 12, "remove_all_from": None,
    "reset_optimizer": "stage", "c_thought": ..., "max_latent_stage": ...,
}  # fmt: skip


def test_an_icot_run_logs_what_is_due_and_is_planned_in_few_lines(tiny, call_main):
    """27 tokens in the longest chain, 2 steps an epoch: 0, 6, 12, 18, 24 and then everything."""
    config = tiny.config(**ICOT, num_epochs=4)
    planned = call_main(config, "--dry-run")
    assert planned.status == 0, planned.err
    assert [line for line in planned.out.splitlines() if line.startswith("  epoch")] == [
        "  epochs 1 to 3: 0 to 27 tokens of each chain removed, 6 steps",
        "  epoch 4: the whole chain removed, 2 steps",
    ]
    with pictures():
        outcome = call_main(config)
    assert outcome.status == 0, outcome.err
    records = tiny.records()
    assert [r["stage"] for r in records if "train/loss" in r] == [0, 6, 12, 18, 24, 27, 27, 27]
    assert [r["stage"] for r in records if "eval/loss" in r] == [11, 23, 27, 27]
    assert (tiny.runs / "tiny" / "curves.png").is_file()
    metadata = json.loads((tiny.runs / "tiny" / "checkpoint_4" / "coconut.json").read_text())
    assert (metadata["method"], metadata["thought"], metadata["curriculum"]) == ("no_thoughts", "hidden", "tokens")


def test_the_best_checkpoint_of_an_icot_run_is_one_without_a_written_chain(tiny, call_main):
    assert call_main(tiny.config(**ICOT, num_epochs=4)).status == 0
    metrics = tiny.runs / "tiny" / "metrics.jsonl"
    records = [r | {"eval/acc": 1.0} if r.get("stage") == 11 and "eval/acc" in r else r for r in tiny.records()]
    metrics.write_text("".join(json.dumps(record) + "\n" for record in records))
    keys = {"only_eval": True, "name": "best", "load_model_path": tiny.runs / "tiny"}
    outcome = call_main(tiny.config("best.yaml", **{**ICOT, **keys}))
    assert outcome.status == 0 and re.search("taking checkpoint_[34], the best", outcome.out), outcome.out + outcome.err


# Planning and stopping


def test_a_dry_run_checks_everything_and_writes_nothing(tiny, call_main):
    outcome = call_main(tiny.config(num_epochs=3), "--dry-run")
    assert outcome.status == 0, outcome.err
    assert "2 optimizer steps an epoch, of 4 items each" in outcome.out
    assert "nothing was written" in outcome.out
    assert call_main(tiny.config(train_path=tiny.folder / "nowhere.json"), "--dry-run").status == 2
    assert not tiny.runs.exists()


def test_a_dry_run_times_the_first_stage_and_the_most_expensive_one(tiny, call_main):
    """And the evaluations: greedy decoding costs more than training where batches are small."""
    outcome = call_main(tiny.config(num_epochs=4), "--dry-run")
    assert outcome.status == 0, outcome.err
    assert re.search(r"^time:  \d+\.\d\d s a step at stage 0 and \d+\.\d\d s a step at stage 2, so", outcome.out, re.M)
    assert re.search(r"^ +and up to \d+ seconds of evaluation \(\d+ seconds each,", outcome.out, re.M)
    assert re.search(r"^memory: ", outcome.out, re.M)
    only = call_main(tiny.config(num_epochs=1), "--dry-run").out
    assert "s a step at stage 0, so" in only


def test_a_dry_run_of_a_billion_epochs_has_a_line_for_each_stage_that_differs(tiny, call_main):
    """All past max_latent_stage are alike; num_epochs may be any number, so nothing may go through the epochs."""
    outcome = call_main(tiny.config(num_epochs=10**9, keep_checkpoints=1), "--dry-run")
    assert outcome.status == 0, outcome.err
    assert re.findall(r"^  (epochs? .*?),", outcome.out, re.MULTILINE) == [
        "epoch 1: stage 0", "epoch 2: stage 1", "epoch 3: stage 2", "epochs 4 to 1000000000: stages 3 to 999999999"
    ]  # fmt: skip


def test_a_dry_run_writes_no_token_cache(tiny, call_main, monkeypatch):
    monkeypatch.setattr(tokens, "MIN_CACHED_BYTES", 0)
    cache = tiny.folder / "cache"
    assert call_main(tiny.config(num_epochs=1, token_cache=cache), "--dry-run").status == 0
    assert not cache.exists()
    assert call_main(tiny.config(num_epochs=1, token_cache=cache)).status == 0
    assert len(list(cache.iterdir())) == 1


def test_a_dry_run_of_an_evaluation_says_what_it_would_do(finished, call_main, tmp_path):
    tiny, _ = finished
    keys = {"only_eval": True, "load_model_path": tiny.runs / "tiny" / "checkpoint_2", "save_path": tmp_path}
    outcome = call_main(tiny.config("eval.yaml", **keys), "--dry-run")
    assert outcome.status == 0, outcome.err
    assert "eval:  stage 1, method coconut" in outcome.out and "time:  up to" in outcome.out
    assert list(tmp_path.iterdir()) == []


def test_a_run_without_thoughts_is_warned_of(tiny, call_main):
    """At the start and in a dry run."""
    for words in (["--dry-run"], []):
        outcome = call_main(tiny.config(num_epochs=1, max_latent_stage=0), *words)
        assert "warning: coconut: this run trains no thought: c_thought is 1, max_latent_stage 0" in outcome.err
    outcome = call_main(tiny.config(name="none", num_epochs=2, c_thought=0), "--dry-run")
    assert "warning: coconut: this run trains no thought: c_thought is 0" in outcome.err
    assert "trains no thought" not in call_main(tiny.config(name="b"), "--dry-run").err


def test_a_warm_up_longer_than_the_run_is_warned_of(tiny, call_main):
    """Two steps an epoch: the epochs that `resume` skips are not the run's, those before a restart are."""
    for keys, words, steps, rate in (
        ({"warmup_steps": 8, "num_epochs": 1}, [], 2, 0.00025),
        ({"warmup_steps": 8, "num_epochs": 3}, [], 6, 0.00075),  # resumed
        ({"warmup_steps": 8, "num_epochs": 5, "resume": 3, "name": "b"}, ["--dry-run"], 4, 0.0005),
    ):
        outcome = call_main(tiny.config(**keys), *words)
        assert outcome.status == 0, outcome.err
        expected = f"warning: warmup_steps: the run has {steps} optimizer steps, 8 are to warm up; the learning rate"
        assert f"{expected} ends at {rate} and never reaches lr (0.001)" in outcome.err
        assert outcome.err.count("warmup_steps") == 1
    outcome = call_main(tiny.config(warmup_steps=8, num_epochs=4, name="b"), "--dry-run")
    assert outcome.status == 0 and "warmup_steps" not in outcome.err


def test_a_dry_run_leaves_a_finished_run_alone(finished, call_main):
    tiny, _ = finished
    before = {p: p.read_bytes() for p in (tiny.runs / "tiny").rglob("*") if p.is_file()}
    assert call_main(tiny.folder / "tiny.yaml", "num_epochs=5", "--dry-run").status == 0
    assert {p: p.read_bytes() for p in (tiny.runs / "tiny").rglob("*") if p.is_file()} == before


def test_a_loss_that_is_not_finite_stops_the_run_and_leaves_what_was_saved(tiny, call_main):
    """A learning rate of 1e30 spoils the weights in epoch 2's first step; its second finds an infinite or NaN loss."""
    assert call_main(tiny.config(num_epochs=1)).status == 0
    folder = tiny.runs / "tiny"
    weights = (folder / "checkpoint_1" / "model.safetensors").read_bytes()
    outcome = call_main(tiny.config(num_epochs=2, lr=1e30))
    assert outcome.status == 1
    assert "Traceback" not in outcome.err
    assert "epoch 2, step 1" in outcome.err
    assert any(word in outcome.err for word in ("loss is nan", "loss is inf"))
    assert "checkpoint_2" not in names(folder)
    assert (folder / "checkpoint_1" / "model.safetensors").read_bytes() == weights
    assert call_main(tiny.config(num_epochs=2)).status == 0, "with a sane learning rate it goes on"
    assert "checkpoint_2" in names(folder)


@pytest.mark.parametrize("lr", [1e30, 1e300])
def test_what_an_epochs_last_step_spoils_is_not_saved(lr, tiny, call_main):
    """One step an epoch: its loss is still good, and no later one shows that the weights are spoiled."""
    keys = {"batch_size_training": 8, "reset_optimizer": True}
    assert call_main(tiny.config(num_epochs=1, **keys)).status == 0
    folder, records = tiny.runs / "tiny", tiny.records()
    before = names(folder)
    outcome = call_main(tiny.config(num_epochs=2, lr=lr, **keys))
    assert outcome.status == 1
    assert "after epoch 2, step 0" in outcome.err and "a lower learning rate" in outcome.err
    assert "Traceback" not in outcome.err
    assert names(folder) == before and (folder / "state_0_1").is_dir()
    assert "NaN" not in (folder / "metrics.jsonl").read_text() and tiny.records()[:-1] == records
    assert call_main(tiny.config(num_epochs=2, **keys)).status == 0, "with a sane learning rate it goes on"
    assert [r["epoch"] for r in tiny.records() if "eval/loss" in r] == [1, 2]


def test_weights_that_no_loss_shows_to_be_spoiled_are_not_saved(tiny, call_main, monkeypatch):
    """A position that no item reaches yet."""
    assert call_main(tiny.config(num_epochs=1)).status == 0
    before = names(tiny.runs / "tiny")
    take_step = step.TrainStep.__call__

    def spoil(self, *words):
        positions = self.model.transformer.wpe
        positions.weight = mx.concatenate([positions.weight[:-1], mx.full((1, 16), mx.inf)])
        return take_step(self, *words)

    monkeypatch.setattr(step.TrainStep, "__call__", spoil)
    outcome = call_main(tiny.config(num_epochs=2))
    assert outcome.status == 1 and "the weights or the optimizer's moments are not finite after epoch 2" in outcome.err
    assert names(tiny.runs / "tiny") == before


@pytest.fixture
def last_item_spoiled(tiny, monkeypatch):
    """A context in which steps spoil positions that only the test's last validation item reaches.

    The loss before every save is that of the first validation batch, which does not hold this item.
    """
    items = [tiny_item(a, 2, 1) for a in range(1, 9)]
    tiny.valid = tiny.write("valid.json", [*items, tiny_item(9, 2, 9)])
    take_step = step.TrainStep.__call__

    @contextmanager
    def spoiling():
        def spoil(self, *words):
            result = take_step(self, *words)
            positions = self.model.transformer.wpe
            far = mx.broadcast_to(mx.array([3.4e38] + [-3.4e38] * 15), (48, 16))  # not infinite, but less their mean
            positions.weight = mx.concatenate([positions.weight[:80], far])
            return result

        with monkeypatch.context() as patch:
            patch.setattr(step.TrainStep, "__call__", spoil)
            yield

    return spoiling


def test_a_loss_that_only_the_whole_validation_set_shows_leaves_the_last_good_state(tiny, last_item_spoiled, call_main):
    """The same command then resumes from there; the spoiled weights are in no folder."""
    with last_item_spoiled():
        assert call_main(tiny.config(num_epochs=1)).status == 1
        assert not resume.holds_training(tiny.runs / "tiny")
    assert call_main(tiny.config(num_epochs=1)).status == 0
    before, good = names(tiny.runs / "tiny"), contents(tiny.runs / "tiny" / "state_0_2")
    with last_item_spoiled():
        outcome = call_main(tiny.config(num_epochs=2))
    assert outcome.status == 1 and "Traceback" not in outcome.err
    assert re.search(r"error: the validation loss of .*valid.json is (nan|inf) after epoch 2", outcome.err)
    assert "resumes from there" in outcome.err
    assert names(tiny.runs / "tiny") == before and contents(tiny.runs / "tiny" / "state_0_2") == good
    outcome = call_main(tiny.config(num_epochs=2, lr=1e-4))
    assert outcome.status == 0 and "state_0_2: epoch 2, step 0" in outcome.out
    assert [r["epoch"] for r in tiny.records() if "eval/loss" in r] == [1, 2]
    assert [path.name for path in resume.find_states(tiny.runs / "tiny")] == ["state_1_2"]


def test_a_state_of_the_middle_of_an_epoch_that_may_be_spoiled_is_named(tiny, last_item_spoiled, call_main):
    """It is tried on the first validation batch alone; without it the run starts from the state before."""
    with last_item_spoiled():
        outcome = call_main(tiny.config(num_epochs=1, save_interval_minutes=1e-9))
    assert outcome.status == 1
    [left] = resume.find_states(tiny.runs / "tiny")
    assert left.name == "state_0_1"
    assert outcome.err.endswith("If it stops here again, remove state_0_1, from the middle of this epoch\n")
    assert call_main(tiny.config(num_epochs=1, save_interval_minutes=1e-9, lr=1e-6)).err.count("remove state_0_1") == 1
    shutil.rmtree(left)
    assert call_main(tiny.config(num_epochs=1, save_interval_minutes=1e-9)).status == 0


def test_a_run_stopped_before_its_validation_loss_keeps_the_state_before_too(
    tiny, last_item_spoiled, call_main, monkeypatch
):
    """It goes on with the validation; where the loss then is not finite, the run is back at the older state."""
    assert call_main(tiny.config(num_epochs=1)).status == 0
    with last_item_spoiled(), monkeypatch.context() as patch:

        def stopped(self, epoch):
            raise Stopped(signal.SIGTERM)

        patch.setattr(trainer.Evaluator, "loss", stopped)
        assert call_main(tiny.config(num_epochs=2)).status == 128 + signal.SIGTERM
    steps = [r["train/step"] for r in tiny.records() if "train/step" in r]
    outcome = call_main(tiny.config(num_epochs=2))
    assert outcome.status == 1 and "state_1_2: epoch 2, step 2" in outcome.out, "no step is taken again"
    assert steps == [r["train/step"] for r in tiny.records() if "train/step" in r] == [0, 1, 2, 3]
    assert [path.name for path in resume.find_states(tiny.runs / "tiny")] == ["state_0_2"]
    assert "checkpoint_2" not in names(tiny.runs / "tiny")


def test_a_gradient_that_is_not_finite_is_not_logged(tiny, call_main, monkeypatch):
    """Its norm is too large for float32, and the loss is not."""
    monkeypatch.setattr(step, "gradient_norm", lambda gradient: mx.array(mx.inf))
    outcome = call_main(tiny.config(num_epochs=1))
    assert outcome.status == 1 and "the gradient is inf in epoch 1, step 0" in outcome.err
    assert tiny.records() == []


def test_an_evaluation_that_is_not_finite_is_not_logged(finished, tiny, call_main):
    """Finite weights that are too large: no NaN in metrics.jsonl."""
    tensors = mx.load(str(finished[0].runs / "tiny" / "checkpoint_1" / "model.safetensors"))
    tensors["transformer.ln_f.weight"] *= 1e38
    mx.save_safetensors(str(tiny.folder / "large.safetensors"), tensors)
    keys = {"only_eval": True, "load_model_path": tiny.folder / "large.safetensors"}
    for folder_was_there in (False, True):
        outcome = call_main(tiny.config(**keys))
        assert outcome.status == 1
        assert re.search(r"error: the validation loss of .*valid.json is (nan|inf)", outcome.err)
        assert not folder_was_there or {path.name for path in (tiny.runs / "tiny").iterdir()} == {".lock"}
        assert folder_was_there or not tiny.runs.exists()
        (tiny.runs / "tiny").mkdir(parents=True, exist_ok=True)


def test_an_evaluation_that_is_stopped_leaves_nothing(finished, tiny, call_main, monkeypatch):
    def stop(*_):
        raise Stopped(2)

    monkeypatch.setattr(evaluation.Evaluator, "answers", stop)
    keys = {"only_eval": True, "load_model_path": finished[0].runs / "tiny" / "checkpoint_3"}
    assert call_main(tiny.config(**keys)).status == 130
    assert not tiny.runs.exists()


def test_an_error_in_decoding_is_not_a_wrong_answer(tiny, call_main, monkeypatch):
    """A bug shows itself; it is not counted as an answer that missed."""

    def broken(*_):
        raise RuntimeError("a bug in decoding")

    monkeypatch.setattr(Coconut, "generate", broken)
    with pytest.raises(RuntimeError, match="a bug in decoding"):
        call_main(tiny.config(num_epochs=1))


def test_help_lists_every_key(run_cli):
    outcome = run_cli("--help")
    assert (outcome.status, outcome.err) == (0, "")
    assert all(f"\n  {name}  (" in outcome.out for name in FIELDS)


def test_no_arguments_show_how_to_call(run_cli):
    outcome = run_cli()
    assert outcome.status == 2
    assert "usage: python run.py CONFIG [key=value ...]" in outcome.err
    assert "Traceback" not in outcome.err


def test_help_into_a_closed_pipe_is_no_traceback():
    """`python run.py --help | head -3`"""
    command = f"'{sys.executable}' '{ROOT / 'run.py'}' --help | true"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=60, check=False)
    assert "Traceback" not in done.stderr


# Memory and precision


@pytest.mark.parametrize("streams", ["1", "2"])
def test_recomputation_trains_the_same(streams, shared_tiny, call_main, monkeypatch, tmp_path):
    """grad_checkpoint, dropout on: bit for bit the losses of a run without it, on as many streams as are asked for."""
    monkeypatch.setenv("COCONUT_STREAMS", streams)
    recomputed = []

    def noted(call, block, *others):
        recomputed.append(block)
        return run_and_recompute(call, block, *others)

    monkeypatch.setattr(gpt2, "run_and_recompute", noted)
    losses = []
    for name, again in (("plain", False), ("again", True)):
        assert not recomputed
        outcome = call_main(shared_tiny.config(save_path=tmp_path, name=name, num_epochs=2, grad_checkpoint=again))
        assert outcome.status == 0, outcome.err
        records = jsonl(tmp_path / name / "metrics.jsonl")
        losses.append([record["train/loss"] for record in records if "train/loss" in record])
        assert f"{streams} stream" in outcome.out
    assert recomputed
    assert losses[0] == losses[1] and len(losses[0]) > 2


def test_a_start_that_may_not_read_something_leaves_no_directory(shared_tiny, call_main, monkeypatch, tmp_path):
    def load(config, group):
        raise PermissionError(13, "Permission denied", "model")

    monkeypatch.setattr(setup, "load", load)
    outcome = call_main(shared_tiny.config(save_path=tmp_path / "runs"))
    assert outcome.status == 1 and "Permission denied: 'model'" in outcome.err
    assert not (tmp_path / "runs").exists()


def test_bf16_on_cpu_is_float32_with_a_word(shared_tiny, call_main, tmp_path):
    outcome = call_main(shared_tiny.config(save_path=tmp_path, bf16=True, num_epochs=1))
    assert outcome.status == 0 and "bf16 is many times slower on CPU; float32 is used" in outcome.err


def test_a_run_in_bfloat16(shared_tiny, call_main, monkeypatch, tmp_path):
    """What a GPU does, done on CPU: another loss than float32's but near, float32 in the checkpoint."""
    losses = []
    for number, dtype in enumerate((mx.float32, mx.bfloat16)):
        for module in (step, trainer):
            monkeypatch.setattr(module, "compute_dtype", lambda _, dtype=dtype: dtype)
        outcome = call_main(shared_tiny.config(save_path=tmp_path, name=str(number), bf16=True, num_epochs=1))
        assert outcome.status == 0, outcome.err
        records = jsonl(tmp_path / str(number) / "metrics.jsonl")
        losses.append([record[key] for record in records for key in ("train/loss", "eval/loss") if key in record])
        saved = mx.load(str(tmp_path / str(number) / "checkpoint_1" / "model.safetensors"))
        assert {array.dtype for array in saved.values()} == {mx.float32}
    assert losses[0] != losses[1] and losses[1] == pytest.approx(losses[0], rel=0.02)
