"""wandb as one more sink: used where installed and logged in, never asked for, never fatal. (A stand-in for it.)"""

import json
import sys
import types

import pytest

import metrics
from config import Config


class FakeRun:
    """Remembers what it is given; fails from the second log on, if asked to."""

    def __init__(self, fails):
        self.logged, self.finished, self.fails = [], None, fails

    def log(self, values):
        if self.fails and self.logged:
            raise sys.modules["wandb"].Error("the service is gone")
        self.logged.append(values)

    def finish(self, exit_code):
        self.finished = exit_code


@pytest.fixture
def fake_wandb(monkeypatch):
    """Put a stand-in where `import wandb` finds it; returns its settings."""
    module = types.SimpleNamespace(fails_to_start=False, run=FakeRun(False), Error=type("Error", (Exception,), {}))
    module.Settings = lambda **keys: keys
    module.Table = lambda columns, data: (columns, data)

    def init(**keys):
        if module.fails_to_start:
            raise module.Error("no")
        module.keys = keys
        return module.run

    module.init = init
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.setattr(metrics, "find_spec", lambda name: object())
    monkeypatch.setenv("WANDB_MODE", "offline")
    return module


def config(tmp_path, **keys):
    return Config(save_path=str(tmp_path), name="run", val_path="x", cot=True, **keys)


def test_it_gets_the_official_keys_and_the_table(fake_wandb, tmp_path):
    with metrics.MetricLog(tmp_path / "metrics.jsonl", metrics.start_wandb(config(tmp_path, project="mine"))) as log:
        log.log({"train/loss": 1.5, "epoch": 1, "acc_interval": [0, 1]})
        log.log_text("data_table", 7, "text")
    assert fake_wandb.keys["project"] == "mine"
    assert fake_wandb.keys["name"] == "run"
    assert fake_wandb.run.logged == [{"train/loss": 1.5}, {"data_table": (["step", "text"], [[7, "text"]])}]
    assert fake_wandb.run.finished == 0


def test_its_failures_are_one_warning_and_the_file_goes_on(fake_wandb, tmp_path, capsys):
    fake_wandb.run = FakeRun(fails=True)
    with metrics.MetricLog(tmp_path / "metrics.jsonl", metrics.start_wandb(config(tmp_path))) as log:
        for step in range(4):
            log.log({"train/step": step})
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["train/step"] for line in lines] == [0, 1, 2, 3]
    assert capsys.readouterr().err.count("wandb stopped taking metrics") == 1
    fake_wandb.fails_to_start = True
    assert metrics.start_wandb(config(tmp_path)) is None
    assert "wandb did not start" in capsys.readouterr().err


@pytest.mark.parametrize("keys", [{"debug": True}, {"only_eval": True}])
def test_debug_and_evaluation_do_without(keys, fake_wandb, tmp_path):
    assert metrics.start_wandb(config(tmp_path, **keys)) is None


def test_it_is_never_asked_for(fake_wandb, tmp_path, monkeypatch):
    """Installed, but neither logged in nor offline; or not installed."""
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert metrics.start_wandb(config(tmp_path)) is None
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    assert metrics.start_wandb(config(tmp_path)) is fake_wandb.run
    monkeypatch.setattr(metrics, "find_spec", lambda name: None)
    assert metrics.start_wandb(config(tmp_path)) is None
