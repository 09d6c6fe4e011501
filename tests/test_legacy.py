"""Run directories, checkpoints and YAML files from before the redesign still resume and load."""

import json
import shutil

import pytest
from conftest import FIXTURES


@pytest.fixture
def legacy(tmp_path, monkeypatch):
    """A copy of the stopped run, as the working directory: its configuration names files from there."""
    shutil.copytree(FIXTURES / "legacy_run", tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    return tmp_path / "copy"


def json_lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_a_stopped_run_resumes_to_the_numbers_of_the_old_code(legacy, call_main):
    outcome = call_main("legacy.yaml")
    assert outcome.status == 0, outcome.err
    assert "going on from runs/legacy/state_1_5: epoch 2, step 5" in outcome.out
    found, expected = (json_lines(legacy / name) for name in ("runs/legacy/metrics.jsonl", "whole_metrics.jsonl"))
    assert len(found) == len(expected) == 33
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.keys() - theirs.keys() <= {"train/lr", "train/grad_norm"}  # recorded since then
        for name in theirs.keys() - {"eval/seconds_per_example", "train/seconds"}:
            assert ours[name] == pytest.approx(theirs[name], rel=1e-5), name
    assert json_lines(legacy / "runs/legacy/predictions_3.jsonl") == json_lines(legacy / "whole_predictions_3.jsonl")


def test_a_checkpoint_of_the_old_code_is_evaluated_to_its_numbers(legacy, call_main):
    keys = ["only_eval=True", "name=again", "load_model_path=runs/legacy/checkpoint_1", "resume=0"]
    outcome = call_main("runs/legacy/config.yaml", *keys)
    assert outcome.status == 0, outcome.err
    [found] = json_lines(legacy / "runs/again/metrics.jsonl")
    expected = next(r for r in json_lines(legacy / "whole_metrics.jsonl") if r.get("eval/loss") and r["epoch"] == 1)
    assert found["eval/loss"] == pytest.approx(expected["eval/loss"], rel=1e-5)
    assert found["eval/acc"] == expected["eval/acc"]
