"""The token cache: keyed, checked, and never in a run's way."""

import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import token_cache
from token_cache import cached, load, store

ROOT = Path(__file__).parents[1]
SMALL = {"starts": np.array([0, 2, 5]), "tokens": np.array([7, 50259, 3, 2, 1], dtype=np.int32)}


@pytest.fixture(autouse=True)
def keep_everything(monkeypatch):
    monkeypatch.setattr(token_cache, "WORTH_KEEPING", 0)


class Maker:
    """Makes SMALL and counts how often."""

    calls = 0

    def __call__(self):
        self.calls += 1
        return SMALL


def same(found) -> bool:
    """Whether these are SMALL's arrays: names, order, types and values."""
    equal = all(
        f.dtype == s.dtype and np.array_equal(f, s) for f, s in zip(found.values(), SMALL.values(), strict=True)
    )
    return list(found) == list(SMALL) and equal


def test_arrays_are_made_once_for_each_key(tmp_path, capsys):
    make = Maker()
    assert all(same(cached(str(tmp_path / "new" / "folder"), key, make)) for key in ("a", "a", "b", "a"))
    assert make.calls == 2
    assert sorted(file.name for file in (tmp_path / "new" / "folder").iterdir()) == ["a.tokens", "b.tokens"]
    assert capsys.readouterr().err == ""


def test_empty_and_many_arrays_come_back(tmp_path):
    arrays = {"a": np.arange(1000), "b": np.array([], dtype=np.int64), "c": np.arange(3, dtype=np.int32)}
    store(tmp_path / "x", arrays)
    found = load(tmp_path / "x")
    assert all(np.array_equal(found[name], arrays[name]) and found[name].dtype == arrays[name].dtype for name in "abc")
    with pytest.raises(ValueError, match="read-only"):
        found["a"][0] = 1


def test_small_arrays_are_not_worth_a_file(tmp_path, monkeypatch):
    monkeypatch.setattr(token_cache, "WORTH_KEEPING", 1 << 20)
    assert same(cached(str(tmp_path), "a", Maker()))
    assert not list(tmp_path.iterdir())


def test_a_fault_of_the_maker_is_raised_and_nothing_kept(tmp_path):
    with pytest.raises(ZeroDivisionError):
        cached(str(tmp_path), "a", lambda: 1 / 0)
    assert not list(tmp_path.iterdir())


# Where it lies


def test_the_default_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    cached(None, "a", Maker())
    assert (tmp_path / ".cache" / "coconut-mlx" / "tokens" / "a.tokens").is_file()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))
    cached(None, "a", Maker())
    assert (tmp_path / "other" / "coconut-mlx" / "tokens" / "a.tokens").is_file()
    cached("~/own", "a", Maker())
    assert (tmp_path / "own" / "a.tokens").is_file()


def test_a_user_without_a_home_gets_one_warning(monkeypatch, capsys):
    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(token_cache, "default_folder", no_home)
    assert same(cached(None, "a", Maker()))
    assert capsys.readouterr().err == "warning: cache of tokens: Could not determine home directory.\n"


# Damage


def test_every_damaged_byte_is_noticed(tmp_path):
    path = tmp_path / "x"
    store(path, SMALL)
    content = path.read_bytes()
    for place in range(len(content)):
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        with pytest.raises(OSError, match="is damaged"):
            load(path)


def test_every_shortened_file_is_noticed(tmp_path):
    path = tmp_path / "x"
    store(path, SMALL)
    content = path.read_bytes()
    for length in (*range(40), *range(480, len(content))):
        path.write_bytes(content[:length])
        with pytest.raises(OSError, match="is damaged"):
            load(path)


def test_a_damaged_file_is_made_again(tmp_path, capsys):
    make = Maker()
    cached(str(tmp_path), "a", make)
    (tmp_path / "a.tokens").write_bytes(b"something else")
    assert same(cached(str(tmp_path), "a", make))
    assert (
        capsys.readouterr().err == f"warning: cache of tokens: {tmp_path}/a.tokens is damaged (its checksum is wrong)\n"
    )
    assert same(cached(str(tmp_path), "a", make))
    assert make.calls == 2


def test_it_may_be_deleted_at_any_time(tmp_path):
    cached(str(tmp_path), "a", Maker())
    found = cached(str(tmp_path), "a", Maker())
    (tmp_path / "a.tokens").unlink()
    assert same(found)  # still mapped
    make = Maker()
    assert same(cached(str(tmp_path), "a", make))
    assert make.calls == 1


# A disk that does not take it


def test_a_folder_that_cannot_be_made_gives_one_warning(tmp_path, capsys):
    (tmp_path / "file").write_text("in the way")
    assert same(cached(str(tmp_path / "file" / "tokens"), "a", Maker()))
    error = capsys.readouterr().err
    assert error.startswith("warning: cache of tokens: not kept for the next run: ")
    assert error.count("\n") == 1


def test_a_full_disk_gives_one_warning_and_leaves_nothing(tmp_path, capsys):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))  # bytes; writing more is an OSError, as on a full disk
    try:
        found = cached(str(tmp_path), "a", Maker())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert same(found)
    error = capsys.readouterr().err
    assert error.startswith("warning: cache of tokens: not kept for the next run: ")
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


# Other processes

CHILD = """
import os, signal, sys
import numpy as np
import token_cache
token_cache.WORTH_KEEPING = 0
def make():
    print("ready", flush=True)
    sys.stdin.readline()
    return {"tokens": np.arange(300_000)}
if len(sys.argv) > 2:
    os.replace = lambda *names: os.kill(os.getpid(), signal.SIGKILL)  # killed when all is written but the name
found = token_cache.cached(sys.argv[1], "a", make)
assert found["tokens"].sum() == sum(range(300_000))
"""


def child(*arguments) -> subprocess.Popen:
    command = [sys.executable, "-c", CHILD, *map(str, arguments)]
    return subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def test_two_runs_at_once_do_not_meet(tmp_path):
    children = [child(tmp_path) for _ in range(3)]
    for process in children:
        assert process.stdout.readline() == b"ready\n"  # none has found anything
    for process in children:
        process.stdin.write(b"\n")
        process.stdin.flush()
    for process in children:
        _, error = process.communicate(timeout=60)
        assert (process.returncode, error) == (0, b"")
    assert [file.name for file in tmp_path.iterdir()] == ["a.tokens"]
    assert load(tmp_path / "a.tokens")["tokens"][-1] == 299_999


def test_a_killed_run_leaves_nothing_that_is_read(tmp_path):
    process = child(tmp_path, "kill")
    process.communicate(b"\n", timeout=60)
    assert process.returncode == -signal.SIGKILL
    [leftover] = tmp_path.iterdir()
    assert leftover.suffix == ".tmp"

    make = Maker()
    assert same(cached(str(tmp_path), "a", make))
    assert make.calls == 1
    assert leftover.exists()  # another run may be writing it
    long_ago = time.time() - 2 * token_cache.STALE
    os.utime(leftover, (long_ago, long_ago))
    cached(str(tmp_path), "b", make)
    assert not leftover.exists()
