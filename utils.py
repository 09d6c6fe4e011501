"""Small helpers that know nothing of the project: user errors, console output, safe files, the metric log."""

import json
import os
import signal
import sys
import zlib
from contextlib import contextmanager
from pathlib import Path

from tqdm import tqdm

import stopping


class UserError(Exception):
    """A mistake the user can mend; its text is the whole message, and run.py exits with status 2."""


class RunError(Exception):
    """Something went wrong in a run that was well configured; run.py prints the text and exits with status 1."""


class Stopped(Exception):
    """The user or the system asked the run to stop; `signal` is the number of the signal that did."""

    def __init__(self, signal: int):
        super().__init__(f"stopped by signal {signal}")
        self.signal = signal


def silence() -> None:
    """From now on `say`, `warn` and Progress print nothing, nor does a signal: of several processes, one talks."""
    stopping.silent = True


def say(text: str = "") -> None:
    """Print a line for the user without tearing a progress bar that is on screen."""
    if not stopping.silent:
        tqdm.write(text, file=sys.stdout)
        sys.stdout.flush()


def warn(text: str) -> None:
    """Print a warning to stderr."""
    if not stopping.silent:
        tqdm.write(f"warning: {text}", file=sys.stderr)


class StopSignals:
    """While active, Ctrl-C and SIGTERM are noted, and `check` raises Stopped at the next safe point.

    A second signal does what it did before: under run.py it ends the process (stopping.py).
    """

    def __init__(self):
        self.requested: int | None = None
        self._previous = {}

    def __enter__(self) -> "StopSignals":
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *exception) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def check(self) -> None:
        """Raise Stopped if a signal has come."""
        if self.requested:
            raise Stopped(self.requested)

    def checked(self, items):
        """Iterate over items, checking before each."""
        for item in items:
            self.check()
            yield item

    def _note(self, number, frame) -> None:
        if self.requested:
            self.__exit__()
            signal.raise_signal(number)
        self.requested = number
        stopping.announce("stopping after this step; once more stops at once")


def can_redraw() -> bool:
    """Whether stderr shows a progress bar as one: a terminal that can move its cursor."""
    return sys.stderr.isatty() and os.environ.get("TERM") != "dumb"


class Progress(tqdm):
    """A tqdm bar on a terminal; elsewhere the same facts as one plain line every 30 seconds and one at the end.

    The bar has no colours, so that there is nothing to leave out for NO_COLOR.
    """

    PLAIN = "{desc}: {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}{postfix}]"

    def __init__(self, *args, **kwargs):
        self.plain = not can_redraw()
        if self.plain:
            kwargs.update(mininterval=30, bar_format=self.PLAIN)
        super().__init__(*args, dynamic_ncols=not self.plain, disable=stopping.silent, **kwargs)
        if self.plain and not self.disable:
            self._decr_instances(self)  # so that say and warn do not clear it with cursor movements and draw it again

    def display(self, msg=None, pos=None):
        if not self.plain:
            super().display(msg, pos)
        elif self.n:
            print(str(self), file=sys.stderr, flush=True)

    def close(self):
        if self.plain and not self.disable:
            if self.n != self.last_print_n:
                self.display()
            self.disable = True
        else:
            super().close()


@contextmanager
def replacing(path: Path):
    """Yield a temporary path beside `path`; on success it is synced to disk and renamed onto `path`, else removed.

    A reader of `path` therefore sees the old file or the whole new one, also after a power cut.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    stopping.unfinished.add(str(temporary))
    try:
        yield temporary
        sync(temporary)
        os.replace(temporary, path)
        sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)
        stopping.unfinished.discard(str(temporary))


def write_text(path: Path, text: str) -> None:
    """Replace the file `path` by `text` (UTF-8), atomically."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json_lines(path: Path, records) -> None:
    """Replace the file `path` by one JSON object a line, atomically."""
    write_text(path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))


def sync(path: Path) -> None:
    """Force a file's or directory's contents to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def crc32(path: Path) -> int:
    """Checksum of a whole file, to notice damage (not tampering)."""
    value = 0
    with open(path, "rb") as file:
        while chunk := file.read(1 << 22):
            value = zlib.crc32(chunk, value)
    return value


def human_size(n_bytes: float) -> str:
    """A size in memory or on disk for people, e.g. `1.5 GB` (powers of ten)."""
    for unit in ("bytes", "kB", "MB"):
        if abs(n_bytes) < 1000:
            return f"{n_bytes:.3g} {unit}"
        n_bytes /= 1000
    return f"{n_bytes:,.1f} GB"
