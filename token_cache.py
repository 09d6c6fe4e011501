"""Flat arrays kept on disk between runs: written whole, checked when read, mapped into memory.

A cache may vanish at any time: everything here can be made again, so that no fault of the disk stops a run. A mapped
file stays readable after it was deleted (Linux, macOS).

File: a header of 512 bytes ({name: [dtype, length]} as JSON, padded with spaces), the arrays one after the other, and
the CRC-32 of all that in 4 bytes.
"""

import json
import os
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np

from utils import replacing, warn

HEADER = 512
WORTH_KEEPING = 1 << 20  # bytes: what is smaller (2,500 items of GSM8K, 0.2 s) would only litter the user's cache
STALE = 24 * 3600  # seconds after which a temporary file was left by a process that was killed

Arrays = dict[str, np.ndarray]


def cached(folder: str | None, key: str, make: Callable[[], Arrays]) -> Arrays:
    """The arrays stored under `key`, else those `make` gives, which are stored for next time.

    folder: where to keep them; None means coconut-mlx/tokens in $XDG_CACHE_HOME or ~/.cache. Arrays from the disk are
    read-only. What goes wrong with the cache is one warning; what goes wrong in `make` is raised.
    """
    faults = []
    path = None
    try:
        path = (Path(folder).expanduser() if folder else default_folder()) / f"{key}.tokens"
        if path.exists():
            return load(path)
    except (OSError, RuntimeError) as error:  # RuntimeError: no home directory
        faults.append(str(error))
    arrays = make()
    try:
        if path and sum(array.nbytes for array in arrays.values()) >= WORTH_KEEPING:
            store(path, arrays)
    except OSError as error:
        faults.append(f"not kept for the next run: {error}")
    if faults:
        warn(f"cache of tokens: {'; '.join(faults)}")
    return arrays


def default_folder() -> Path:
    """The user's cache for this project. Raises RuntimeError where the user has no home directory."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "coconut-mlx", "tokens")


def store(path: Path, arrays: Arrays) -> None:
    """Write one-dimensional arrays, those of wider items first. Raises OSError; `path` then is as it was."""
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_stale(path.parent)
    header = json.dumps({name: [array.dtype.str, len(array)] for name, array in arrays.items()})
    checksum = 0
    with replacing(path) as temporary, open(temporary, "wb") as file:
        for part in (header.encode().ljust(HEADER), *(np.ascontiguousarray(a).view(np.uint8) for a in arrays.values())):
            checksum = zlib.crc32(part, checksum)
            file.write(part)
        file.write(checksum.to_bytes(4, "little"))


def load(path: Path) -> Arrays:
    """The arrays of a file, mapped and read-only. Raises OSError where the file is damaged."""
    try:
        whole = np.asarray(np.memmap(path, np.uint8, "r"))
        if zlib.crc32(whole[:-4]) != int.from_bytes(whole[-4:].tobytes(), "little"):
            raise ValueError("its checksum is wrong")
        return _split(whole)
    except (ValueError, OverflowError) as error:  # also: an empty file cannot be mapped
        raise OSError(f"{path} is damaged ({error})") from error


def _split(whole: np.ndarray) -> Arrays:
    arrays, start = {}, HEADER
    for name, (dtype, length) in json.loads(whole[:HEADER].tobytes()).items():
        end = start + np.dtype(dtype).itemsize * length
        arrays[name] = whole[start:end].view(dtype)
        start = end
    return arrays


def _remove_stale(folder: Path) -> None:
    for leftover in folder.glob(".*.tmp"):
        if time.time() - leftover.stat().st_mtime > STALE:
            leftover.unlink(missing_ok=True)
