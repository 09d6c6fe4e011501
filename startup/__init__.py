"""What a process sets up before its slow imports: signal handlers, the BLAS, environment variables.

Only entry points import this room for its effects. The environment is written here and nowhere else.
"""

import os
import stat
from pathlib import Path


def cache_folder() -> Path:
    """The user's folder for what can be made again: coconut-mlx in $XDG_CACHE_HOME or ~/.cache.

    Raises RuntimeError for a user without a home directory.
    """
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "coconut-mlx").expanduser()


def owner_problem(path: Path) -> str | None:
    """Why nothing that is kept at `path` may be trusted, None where it may: whoever can write to it decides what it is.

    Raises OSError where there is nothing.
    """
    found = path.stat()
    if found.st_uid not in (os.geteuid(), 0):
        return f"{path} belongs to another user"
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return f"{path} can be written by others (chmod go-w makes it safe)"
    return None
