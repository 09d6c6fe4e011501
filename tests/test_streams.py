"""streams acts once per process, so each test looks at processes of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def run(code: str, **environment) -> str:
    kept = {key: value for key, value in os.environ.items() if key not in ("COCONUT_STREAMS", "MLX_BFS_MAX_WIDTH")}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=kept | environment, cwd=ROOT, text=True, capture_output=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


COUNT = "import streams; print(len(streams.streams()), len(set(map(str, streams.streams()))))"


def test_two_streams_where_there_are_two_cores():
    n = min(2, len(os.sched_getaffinity(0))) if hasattr(os, "sched_getaffinity") else 2
    assert run(COUNT) == f"{n} {n}\n"


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no way to take cores away here")
def test_one_stream_on_one_core():
    one = "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))}); "
    assert run(one + COUNT) == "1 1\n"


def test_the_user_sets_the_number():
    assert run(COUNT, COCONUT_STREAMS="3") == "3 3\n"


@pytest.mark.parametrize("value", ["0", "two", "-1", "1000"])
def test_a_bad_number_is_one_clear_error(value):
    code = "import streams, utils\ntry: streams.streams()\nexcept utils.UserError as error: print(error)"
    assert run(code, COCONUT_STREAMS=value) == f"COCONUT_STREAMS: expected a number from 1 to 64, found {value!r}\n"


def test_results_are_those_of_one_stream():
    code = (
        "import streams, mlx.core as mx\n"
        "results = streams.spread(lambda n: mx.arange(6.0) * n, range(5)); mx.eval(results)\n"
        "print([r.tolist() == [n * i for i in range(6)] for n, r in enumerate(results)])"
    )
    assert run(code, COCONUT_STREAMS="2") == "[True, True, True, True, True]\n"


def test_one_stream_keeps_mlx_s_order():
    code = "import os, streams; streams.use_one(); print(len(streams.streams()), os.environ['MLX_BFS_MAX_WIDTH'])"
    assert run(code) == "1 20\n"
    assert run(code, MLX_BFS_MAX_WIDTH="7") == "1 7\n"
