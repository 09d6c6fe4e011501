"""CPU streams: how many, and what they compute. Their number counts for a process, so most tests start one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from parallel.streams import chunk_bounds, even_slices, use_streams
from utils import UserError

ROOT = Path(__file__).resolve().parents[1]


def run(code: str) -> str:
    head = "from startup import blas; import os; from parallel import streams; import mlx.core as mx\n"
    command = [sys.executable, "-c", head + code]
    done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(autouse=True)
def one_stream_again():
    yield
    use_streams("1")


COUNT = (
    "n = streams.use_streams()\n"
    "used = streams.map_streams(lambda _: str(mx.default_stream(mx.cpu)), range(9))\n"
    "print(n, streams.n_streams(), len(set(used)))"
)


def test_two_streams_where_there_are_two_cores():
    n = min(2, len(os.sched_getaffinity(0))) if hasattr(os, "sched_getaffinity") else 2
    assert run(COUNT) == f"{n} {n} {n}\n"


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no way to take cores away here")
def test_one_stream_on_one_core():
    assert run("os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n" + COUNT) == "1 1 1\n"


def test_the_user_sets_the_number():
    assert run(COUNT.replace("use_streams()", "use_streams('3')")) == "3 3 3\n"


def test_a_second_run_in_the_process_keeps_the_streams():
    """The demo trains several runs in one process, and may change their number between them."""
    code = "counts = []\nfor n in '2132': streams.use_streams(n); counts.append(streams.n_streams())\n"
    code += "print(counts, len(streams._streams))"
    assert run(code) == "[2, 1, 3, 2] 3\n"


@pytest.mark.parametrize("value", ["0", "two", "-1", "1000"])
def test_a_bad_number_is_one_clear_error(value):
    with pytest.raises(UserError, match=f"COCONUT_STREAMS: expected a number from 1 to 64, found '{value}'"):
        use_streams(value)


def test_results_are_those_of_one_stream():
    code = (
        "streams.use_streams('2')\n"
        "results = streams.map_streams(lambda n: mx.arange(6.0) * n, range(5)); mx.eval(results)\n"
        "print([r.tolist() == [n * i for i in range(6)] for n, r in enumerate(results)])"
    )
    assert run(code) == "[True, True, True, True, True]\n"


@pytest.mark.parametrize(("n_rows", "sizes"), [(1, [1]), (4, [2, 2]), (5, [3, 2])])
def test_rows_are_split_over_the_streams(n_rows, sizes):
    use_streams("2")
    assert [len(range(n_rows)[rows]) for rows in even_slices(n_rows)] == sizes


def test_chunks_are_cut_where_the_largest_is_smallest():
    assert chunk_bounds([4, 4, 4, 30], 2) == [0, 3, 4]
    assert chunk_bounds([3, 4, 5, 6], 6) == [0, 1, 2, 3, 4]
