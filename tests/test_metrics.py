"""wandb as one more sink: used where installed and logged in, never asked for, never fatal. (A stand-in for it.)"""

import json
import os
import struct
import subprocess
import sys
import types
from importlib.machinery import PathFinder

import pytest
from conftest import ROOT

from config import Config
from training import metrics


class FakeRun:
    """Remembers what it is given; fails from the second log on, if asked to."""

    def __init__(self, fails):
        self.logged, self.finished, self.fails, self.id = [], None, fails, "abc"

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
    module.login = lambda prompt: module.logged_in
    module.logged_in = True
    module.Table = lambda columns, data: (columns, data)

    def init(**keys):
        if module.fails_to_start:
            raise module.Error("no")
        module.keys = keys
        return module.run

    module.init = init
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.setattr(metrics, "find_spec", lambda name: types.SimpleNamespace(origin="wandb/__init__.py"))
    monkeypatch.setenv("WANDB_MODE", "offline")
    return module


def config(tmp_path, **keys):
    (tmp_path / "run").mkdir(exist_ok=True)
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


def test_it_is_never_asked_for(fake_wandb, tmp_path, monkeypatch, capsys):
    """Installed, but neither logged in nor offline; or not installed. One line says why."""
    monkeypatch.delenv("WANDB_MODE")
    for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    fake_wandb.login = None  # without a file or a variable that may hold a key, wandb is not even asked
    assert metrics.start_wandb(config(tmp_path)) is None
    assert capsys.readouterr().out == "wandb: off (not logged in: wandb login)\n"
    fake_wandb.login = lambda prompt: fake_wandb.logged_in
    (tmp_path / ".netrc").write_text("machine another.example login me password secret")
    assert metrics.start_wandb(config(tmp_path)) is fake_wandb.run, "wandb decides which host it logs in under"
    fake_wandb.logged_in = False
    assert metrics.start_wandb(config(tmp_path)) is None
    capsys.readouterr()
    monkeypatch.setattr(metrics, "find_spec", lambda name: None)
    assert metrics.start_wandb(config(tmp_path)) is None
    assert capsys.readouterr().out == "wandb: off (not installed: pip install wandb)\n"


@pytest.mark.parametrize(("variable", "key", "mode"), [
    ("", "off", "off"), ("", "offline", "offline"), ("", "online", "online"), ("offline", "off", "offline"),
    ("dryrun", "online", "offline"), ("disabled", "online", "off"), ("online", "auto", "online"),
])  # fmt: skip
def test_the_key_decides_unless_the_variable_does(variable, key, mode, fake_wandb, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", variable)
    assert metrics.wandb_mode(config(tmp_path, wandb=key))[0] == mode


@pytest.mark.parametrize("key", ["online", "offline", "auto"])
def test_wandb_disabled_switches_it_off(key, fake_wandb, tmp_path, monkeypatch, capsys):
    """As in wandb's older versions and in transformers; also where WANDB_MODE says otherwise."""
    monkeypatch.setenv("WANDB_DISABLED", "true")
    assert metrics.start_wandb(config(tmp_path, wandb=key)) is None
    assert capsys.readouterr().out == "wandb: off (WANDB_DISABLED)\n"
    monkeypatch.setenv("WANDB_DISABLED", "false")
    assert metrics.wandb_mode(config(tmp_path, wandb=key)) == ("offline", "WANDB_MODE")


def test_a_mode_that_wandb_does_not_know_is_named(fake_wandb, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WANDB_MODE", "of")
    assert metrics.wandb_mode(config(tmp_path, wandb="offline")) == ("offline", "the key wandb")
    assert "WANDB_MODE: expected one of online, offline, dryrun, disabled, found 'of'" in capsys.readouterr().err


def test_one_line_says_that_it_is_on_and_why(fake_wandb, tmp_path, capsys):
    assert metrics.start_wandb(config(tmp_path)) is fake_wandb.run
    assert capsys.readouterr().out == "wandb: offline, run abc (WANDB_MODE)\n"


def test_a_folder_named_wandb_is_not_the_package(tmp_path, monkeypatch, capsys):
    """wandb writes its runs into such a folder, and Python takes it for a package without content."""
    (tmp_path / "wandb").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    path = [str(tmp_path)]
    monkeypatch.setattr(metrics, "find_spec", lambda name: PathFinder.find_spec(name, path))
    monkeypatch.setenv("WANDB_MODE", "online")
    assert metrics.start_wandb(config(tmp_path)) is None
    assert capsys.readouterr().out == "wandb: off (not installed: pip install wandb)\n"


def test_a_resumed_run_continues_the_same_wandb_run(fake_wandb, tmp_path):
    metrics.start_wandb(config(tmp_path))
    assert fake_wandb.keys["id"] is None
    metrics.start_wandb(config(tmp_path))
    assert (fake_wandb.keys["id"], fake_wandb.keys["resume"]) == ("abc", "allow")


def test_wandb_itself_offline(tiny, tmp_path):
    """The real package, where it is installed: two parts of one run have one id, and its file holds the losses."""
    pytest.importorskip("wandb", reason="wandb is not installed")
    environment = os.environ | {"WANDB_MODE": "offline", "HOME": str(tmp_path)}
    for epochs in (1, 2):
        command = [sys.executable, str(ROOT / "run.py"), str(tiny.config(num_epochs=epochs))]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100, check=False)
        assert done.returncode == 0, done.stderr
        assert "wandb: offline, run " in done.stdout
    folder = tiny.runs / "tiny"
    identity = (folder / "wandb_id.txt").read_text().strip()
    files = sorted(folder.glob("wandb/offline-run-*/*.wandb"))
    assert len(files) == 2 and {path.stem for path in files} == {f"run-{identity}"}
    found = [value for path in files for value in logged_losses(path)]
    assert found == [record["train/loss"] for record in tiny.records() if "train/loss" in record]


def logged_losses(path) -> list[float]:
    """train/loss of every history record in a wandb run file."""
    from wandb.proto.wandb_internal_pb2 import Record

    losses = []
    for content in leveldb_records(path.read_bytes()):
        for item in Record.FromString(content).history.item:
            if item.key == "train/loss" or list(item.nested_key) == ["train/loss"]:
                losses.append(json.loads(item.value_json))
    return losses


def leveldb_records(content: bytes):
    """The records of a LevelDB log behind wandb's 7 bytes: blocks of 32 KiB, fragments of (CRC-32, length, type)."""
    place, record = 7, b""
    while place + 7 <= len(content):
        if (left := 32768 - place % 32768) < 7:
            place += left
            continue
        _, length, kind = struct.unpack_from("<IHB", content, place)
        record += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # a whole record, or the last fragment of one
            yield record
            record = b""


def test_what_wandb_refuses_is_one_warning(fake_wandb, tmp_path, monkeypatch, capsys):
    """Settings in the environment, and a .netrc that is not UTF-8."""

    def refuse(**keys):
        raise ValueError("tags: expected text")

    fake_wandb.init = fake_wandb.login = refuse
    assert metrics.start_wandb(config(tmp_path)) is None
    assert "wandb did not start (tags: expected text)" in capsys.readouterr().err
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    assert metrics.start_wandb(config(tmp_path)) is None
    assert "wandb cannot tell whether it is logged in (tags: expected text)" in capsys.readouterr().err


def test_a_refusal_of_several_lines_is_one_line(fake_wandb, tmp_path, capsys):
    def refuse(**keys):
        raise ValueError("1 validation error\n  tags: expected text\n")

    fake_wandb.init = refuse
    assert metrics.start_wandb(config(tmp_path)) is None
    assert "wandb did not start (1 validation error tags: expected text); metrics" in capsys.readouterr().err


@pytest.mark.parametrize("variable", ["WANDB_MODE", "WANDB_API_KEY"])
def test_a_wandb_that_does_not_import_is_one_warning(variable, tmp_path, monkeypatch, capsys):
    """Its dependencies may be of other versions than it needs."""
    (tmp_path / "wandb.py").write_text("raise TypeError('Descriptors cannot be created directly')")
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv(variable, {"WANDB_MODE": "offline", "WANDB_API_KEY": "0" * 40}[variable])
    assert metrics.start_wandb(config(tmp_path)) is None
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: wandb ") and "(Descriptors cannot be created directly)" in line


def test_what_it_raises_at_its_end_is_one_warning(fake_wandb, tmp_path, monkeypatch, capsys):
    def finish(exit_code):
        raise RuntimeError("the service is gone")

    monkeypatch.setattr(fake_wandb.run, "finish", finish)
    with metrics.MetricLog(tmp_path / "metrics.jsonl", metrics.start_wandb(config(tmp_path))) as log:
        log.log({"epoch": 1})
    assert "wandb did not end well (the service is gone); metrics.jsonl is complete" in capsys.readouterr().err
