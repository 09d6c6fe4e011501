"""The token cache: its keys, its checks, and that a problem with it never stops a run."""

import os
import pickle
import resource
import signal
import subprocess
import sys
import time
from itertools import product
from pathlib import Path

import numpy as np
import pytest

from text import tokens
from text.tokens import TokenDataset, cached, load, store

ROOT = Path(__file__).parents[1]
SMALL = TokenDataset(
    starts=np.array([0, 2, 5]),
    questions=np.array([0]),
    answers=np.array([1]),
    tokens=np.array([7, 50259, 3, 2, 1], dtype=np.int32),
)


@pytest.fixture(autouse=True)
def keep_everything(monkeypatch):
    monkeypatch.setattr(tokens, "MIN_CACHED_BYTES", 0)


class Maker:
    """Returns SMALL and counts its calls."""

    calls = 0

    def __call__(self):
        self.calls += 1
        return SMALL


def same(found: TokenDataset, expected: TokenDataset = SMALL) -> bool:
    """Whether two data sets have equal arrays of equal types."""
    pairs = zip(vars(found).values(), vars(expected).values(), strict=True)
    return all(f.dtype == e.dtype and np.array_equal(f, e) for f, e in pairs)


def test_a_data_set_is_made_once_for_each_key(tmp_path, capsys):
    make = Maker()
    assert all(same(cached(str(tmp_path / "new" / "folder"), key, make)) for key in ("a", "a", "b", "a"))
    assert make.calls == 2
    assert sorted(file.name for file in (tmp_path / "new" / "folder").iterdir()) == ["a.npz", "b.npz"]
    assert capsys.readouterr().err == ""


def test_empty_and_long_arrays_come_back(tmp_path):
    data = TokenDataset(np.arange(100_000), np.array([], dtype=np.int64), np.array([3]), np.arange(3, dtype=np.int32))
    store(tmp_path / "x", data)
    assert same(load(tmp_path / "x"), data)


def test_small_data_sets_are_not_stored(tmp_path, monkeypatch):
    monkeypatch.setattr(tokens, "MIN_CACHED_BYTES", 1 << 20)
    assert same(cached(str(tmp_path), "a", Maker()))
    assert not list(tmp_path.iterdir())


def test_an_exception_of_make_is_raised_and_nothing_stored(tmp_path):
    with pytest.raises(ZeroDivisionError):
        cached(str(tmp_path), "a", lambda: 1 / 0)
    assert not list(tmp_path.iterdir())


# The folder


def test_the_default_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    cached(None, "a", Maker())
    assert (tmp_path / ".cache" / "coconut-mlx" / "tokens" / "a.npz").is_file()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))
    cached(None, "a", Maker())
    assert (tmp_path / "other" / "coconut-mlx" / "tokens" / "a.npz").is_file()
    cached("~/own", "a", Maker())
    assert (tmp_path / "own" / "a.npz").is_file()
    monkeypatch.setenv("XDG_CACHE_HOME", "~/quoted")  # as an env file or a container sets it, which no shell reads
    monkeypatch.chdir(tmp_path)
    cached(None, "a", Maker())
    assert (tmp_path / "quoted" / "coconut-mlx" / "tokens" / "a.npz").is_file() and not (tmp_path / "~").exists()


def test_a_user_without_a_home_gets_one_warning(monkeypatch, capsys):
    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    assert same(cached(None, "a", Maker()))
    assert capsys.readouterr().err == "warning: token cache: Could not determine home directory.\n"


# Damage


def test_every_damaged_byte_is_noticed_or_harmless(tmp_path):
    """A zip file has bytes that no array depends on, such as dates; with those damaged, the arrays are correct."""
    path = tmp_path / "x"
    store(path, SMALL)
    content = path.read_bytes()
    for index, mask in product(range(len(content)), (1, 8, 64, 255)):
        path.write_bytes(content[:index] + bytes([content[index] ^ mask]) + content[index + 1 :])
        try:
            found = load(path)
        except OSError as error:
            assert f"{path} is damaged or unreadable (" in str(error)
        else:
            assert same(found)


def test_a_damaged_shape_is_noticed(tmp_path):
    """np.load alone stops where the shape says, before the end of the member, where zipfile compares the CRC-32."""
    path = tmp_path / "x"
    store(path, TokenDataset(SMALL.starts, SMALL.questions, SMALL.answers, np.arange(99_999, dtype=np.int32)))
    content = path.read_bytes()
    assert content.count(b"(99999,)") == 1
    path.write_bytes(content.replace(b"(99999,)", b"(11111,)"))
    with np.load(path) as archive:
        assert len(archive["tokens"]) == 11111
    with pytest.raises(OSError, match=r"is damaged or unreadable \(bad CRC-32 of tokens.npy\)"):
        load(path)


def test_every_shortened_file_is_noticed(tmp_path):
    path = tmp_path / "x"
    store(path, SMALL)
    content = path.read_bytes()
    for length in range(len(content)):
        path.write_bytes(content[:length])
        with pytest.raises(OSError, match="is damaged"):
            load(path)


FOREIGN = {
    "empty": b"",
    "text": b"something else",
    "a pickle": pickle.dumps([1]),
    "an empty zip": b"PK\x05\x06" + bytes(18),
    "the first format of this cache": b'{"starts": ["<i8", 3]}'.ljust(512) + bytes(28),
}


@pytest.mark.parametrize("content", FOREIGN.values(), ids=FOREIGN)
def test_a_foreign_file_is_noticed(content, tmp_path):
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(OSError, match="is damaged or unreadable"):
        load(tmp_path / "x")


def test_arrays_of_another_program_and_pickled_objects_are_refused(tmp_path):
    for name, arrays in {"x": {"tokens": SMALL.tokens}, "y": vars(SMALL) | {"tokens": np.array([{}])}}.items():
        with open(tmp_path / name, "wb") as file:
            np.savez(file, **arrays)
        with pytest.raises(OSError, match="is damaged or unreadable"):
            load(tmp_path / name)


def test_an_unreadable_file_gives_one_warning(tmp_path, capsys):
    (tmp_path / "a.npz").mkdir()
    assert same(cached(str(tmp_path), "a", Maker()))
    error = capsys.readouterr().err
    assert error.startswith(f"warning: token cache: {tmp_path}/a.npz is damaged or unreadable ([Errno 21] ")
    assert error.count("\n") == 1


def test_a_damaged_file_is_made_again(tmp_path, capsys):
    make = Maker()
    cached(str(tmp_path), "a", make)
    (tmp_path / "a.npz").write_bytes(b"something else")
    assert same(cached(str(tmp_path), "a", make))
    warning = f"warning: token cache: {tmp_path}/a.npz is damaged or unreadable (File is not a zip file)\n"
    assert capsys.readouterr().err == warning
    assert same(cached(str(tmp_path), "a", make))
    assert make.calls == 2


def test_a_file_may_be_deleted_at_any_time(tmp_path):
    cached(str(tmp_path), "a", Maker())
    found = cached(str(tmp_path), "a", Maker())
    (tmp_path / "a.npz").unlink()
    assert same(found)
    make = Maker()
    assert same(cached(str(tmp_path), "a", make))
    assert make.calls == 1


# Disks that cannot be written


def test_a_folder_that_cannot_be_made_gives_one_warning(tmp_path, capsys):
    (tmp_path / "file").write_text("in the way")
    assert same(cached(str(tmp_path / "file" / "tokens"), "a", Maker()))
    error = capsys.readouterr().err
    assert error.startswith("warning: token cache: not kept for the next run: ")
    assert error.count("\n") == 1


def test_a_full_disk_gives_one_warning_and_leaves_nothing(tmp_path, capsys):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))  # bytes; writing more raises OSError, like a full disk
    try:
        found = cached(str(tmp_path), "a", Maker())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert same(found)
    error = capsys.readouterr().err
    assert error.startswith("warning: token cache: not kept for the next run: ")
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


# In others' hands


@pytest.fixture
def planted(tmp_path):
    """A cache folder of the user with a file of other tokens under the key `a`."""
    folder = tmp_path / "tokens"
    store(folder / "a.npz", TokenDataset(SMALL.starts, SMALL.questions, SMALL.answers, SMALL.tokens + 1))
    return folder


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o702, 0o1777])
def test_a_folder_that_others_can_write_to_is_not_used(planted, mode, capsys):
    """They could put any tokens there. One warning with a remedy, and what is there is left alone."""
    planted.chmod(mode)
    before = (planted / "a.npz").read_bytes()
    assert same(cached(str(planted), "a", Maker()))
    assert capsys.readouterr().err == (
        f"warning: token cache: not kept for the next run: {planted} can be written by others (chmod go-w makes it "
        "safe)\n"
    )
    assert [path.name for path in planted.iterdir()] == ["a.npz"] and (planted / "a.npz").read_bytes() == before
    planted.chmod(mode & ~0o022)
    assert not same(cached(str(planted), "a", Maker())), "then the file is the user's word"


@pytest.mark.skipif(os.geteuid() != 0, reason="needs the right to give a folder away")
def test_a_folder_of_another_user_is_not_used(planted, capsys):
    os.chown(planted, 12345, -1)
    assert same(cached(str(planted), "a", Maker()))
    assert capsys.readouterr().err.endswith(f"{planted} belongs to another user\n")


def test_a_pipe_with_the_name_of_a_cache_file_is_not_read(planted):
    """Reading it would wait for ever. The file takes its place."""
    (planted / "a.npz").unlink()
    os.mkfifo(planted / "a.npz")
    assert same(cached(str(planted), "a", Maker()))
    assert (planted / "a.npz").is_file()


def test_a_file_that_others_can_write_to_is_made_again(planted, capsys):
    (planted / "a.npz").chmod(0o664)
    make = Maker()
    assert same(cached(str(planted), "a", make)) and same(cached(str(planted), "a", make))
    assert make.calls == 1 and capsys.readouterr().err == ""


def test_a_new_folder_and_its_files_are_written_by_the_user_alone(tmp_path):
    before = os.umask(0o002)  # as for most users of Linux
    try:
        cached(str(tmp_path / "tokens"), "a", Maker())
    finally:
        os.umask(before)
    modes = [path.stat().st_mode & 0o777 for path in (tmp_path / "tokens", tmp_path / "tokens" / "a.npz")]
    assert modes == [0o700, 0o644]


# Other processes

CHILD = """
import os, signal, sys
import numpy as np
from text import tokens
tokens.MIN_CACHED_BYTES = 0
def make():
    print("ready", flush=True)
    sys.stdin.readline()
    return tokens.TokenDataset(*[np.arange(300_000)] * 4)
if len(sys.argv) > 2:
    os.replace = lambda *names: os.kill(os.getpid(), signal.SIGKILL)  # killed before the complete file is renamed
found = tokens.cached(sys.argv[1], "a", make)
assert found.tokens.sum() == sum(range(300_000))
"""


def child(*arguments) -> subprocess.Popen:
    command = [sys.executable, "-c", CHILD, *map(str, arguments)]
    return subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def test_concurrent_runs_do_not_disturb_each_other(tmp_path):
    children = [child(tmp_path) for _ in range(3)]
    for process in children:
        assert process.stdout.readline() == b"ready\n"  # none found a file
    for process in children:
        process.stdin.write(b"\n")
        process.stdin.flush()
    for process in children:
        _, error = process.communicate(timeout=60)
        assert (process.returncode, error) == (0, b"")
    assert [file.name for file in tmp_path.iterdir()] == ["a.npz"]
    assert load(tmp_path / "a.npz").tokens[-1] == 299_999


def test_a_temporary_file_that_vanishes_is_no_problem(tmp_path, capsys):
    """Another run renames its file after this one listed it: here a link without a target."""
    (tmp_path / ".b.npz.1.tmp").symlink_to(tmp_path / "nowhere")
    cached(str(tmp_path), "a", Maker())
    assert (tmp_path / "a.npz").is_file()
    assert capsys.readouterr().err == ""


def test_a_file_of_a_killed_run_is_not_read_and_later_removed(tmp_path):
    process = child(tmp_path, "kill")
    process.communicate(b"\n", timeout=60)
    assert process.returncode == -signal.SIGKILL
    [leftover] = tmp_path.iterdir()
    assert leftover.suffix == ".tmp"

    make = Maker()
    assert same(cached(str(tmp_path), "a", make))
    assert make.calls == 1
    assert leftover.exists()  # another run may be writing it
    long_ago = time.time() - 2 * tokens.STALE_SECONDS
    os.utime(leftover, (long_ago, long_ago))
    cached(str(tmp_path), "b", make)
    assert not leftover.exists()
