"""What a process sets up before its slow imports: signal handlers, the BLAS, environment variables.

Only entry points import this room for its effects. The environment is written here and nowhere else.
"""

import os
from pathlib import Path


def cache_folder() -> Path:
    """The user's folder for what can be made again: coconut-mlx in $XDG_CACHE_HOME or ~/.cache.

    Raises RuntimeError for a user without a home directory.
    """
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "coconut-mlx").expanduser()
