"""Small helpers for every room: errors, console output, safe stops, files that are never half-written."""

import errno
import json
import os
import signal
import sys
import zlib
from collections.abc import Callable
from contextlib import contextmanager, suppress
from pathlib import Path

from tqdm import tqdm

from startup import cache_folder, owner_problem, signals  # noqa: F401  for rooms that do not import startup


class UserError(Exception):
    """A mistake that the user can correct. Commands print the text, without a traceback, and exit with status 2."""


class RunError(Exception):
    """A failure in a correctly configured run. Commands print the text, without a traceback, and exit with status 1."""


class Stopped(Exception):
    """The user or the system asked the run to stop. `signal` is the number of the signal."""

    def __init__(self, signal: int):
        super().__init__(f"stopped by signal {signal}")
        self.signal = signal


def silence() -> None:
    """Turn off `say`, `warn`, Progress and the signal handler's messages: of several processes only one prints."""
    signals.silent = True


def say(text: str = "") -> None:
    """Print a line to stdout; a progress bar on the screen stays intact."""
    if not signals.silent:
        tqdm.write(text, file=sys.stdout)
        sys.stdout.flush()


def warn(text: str) -> None:
    """Print a warning to stderr; a progress bar on the screen stays intact."""
    if not signals.silent:
        tqdm.write(f"warning: {text}", file=sys.stderr)


def exit_status(action: Callable[[], int | None]) -> int:
    """The exit status of a command: what `action` returns, or that of its error, whose message is printed."""
    try:
        status = action() or 0
        sys.stdout.flush()
        return status
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        return signals.reader_left()
    except (RunError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def command_parser(module: str, docstring: str):
    """An argument parser for `python -m module`, whose --help shows the docstring as it is written."""
    import argparse  # a training run does without

    return argparse.ArgumentParser(
        prog=f"python -m {module}", description=docstring, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def markdown_table(head: list[str], rows: list[list[str]]) -> list[str]:
    """The lines of a Markdown table with aligned columns."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    lines = [head, ["-" * width for width in widths], *rows]
    return [f"| {' | '.join(cell.ljust(width) for cell, width in zip(line, widths, strict=True))} |" for line in lines]


class StopSignals:
    """A context in which the signals that stop a run only set a flag; `check` raises Stopped at the next safe point.

    A second signal gets the handler from before the context: in run.py it ends the process (startup/signals.py).
    """

    def __init__(self):
        self.requested: int | None = None
        self._previous = {}

    def __enter__(self) -> "StopSignals":
        for number in signals.STOP:
            if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:  # nohup ignores it
                self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *exception) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def check(self) -> None:
        """Raise Stopped if a signal has arrived."""
        if self.requested:
            raise Stopped(self.requested)

    def checked(self, items):
        """Yield the items, and call `check` before each."""
        for item in items:
            self.check()
            yield item

    def _note(self, number, frame) -> None:
        if self.requested and number == signal.SIGXCPU:
            return  # the kernel repeats it in every second of CPU time, and a step may take longer
        if self.requested:
            self.__exit__()
            signal.raise_signal(number)
        self.requested = number
        signals.announce("stopping after this step; Ctrl-C again stops immediately")


def can_redraw() -> bool:
    """Whether stderr can show a progress bar: a terminal that can move its cursor."""
    return sys.stderr.isatty() and os.environ.get("TERM") != "dumb"


class Progress(tqdm):
    """A tqdm bar on a terminal; elsewhere the same numbers as one plain line every 30 seconds and one at the end.

    The bar has no colors, so it complies with NO_COLOR.
    """

    NARROW = "{desc}: {percentage:.0f}% [{elapsed}<{remaining}{postfix}]"  # what fits into 80 columns
    PLAIN = "{desc}: {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}{postfix}]"

    def __init__(self, *args, **kwargs):
        self.plain = not can_redraw()
        columns, rows = (0, 0) if self.plain else os.get_terminal_size(sys.stderr.fileno())
        if self.plain:
            kwargs.update(mininterval=30, bar_format=self.PLAIN)
        elif columns < 110:  # 0 columns and rows where nobody has set a size, and tqdm would show nothing
            kwargs.update(bar_format=self.NARROW, ncols=columns or 80, nrows=rows or 24)
        super().__init__(*args, dynamic_ncols=columns > 0, disable=signals.silent, **kwargs)
        if self.plain and not self.disable:
            self._decr_instances(self)  # otherwise say and warn would move the cursor to clear and redraw it

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
    """Yield a temporary path in the same folder. On success sync it to disk and rename it to `path`, else remove it.

    Readers of `path` see either the old file or the complete new one, even after a power failure.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    signals.unfinished.add(str(temporary))
    try:
        yield temporary
        sync(temporary)
        os.replace(temporary, path)
        sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)
        signals.unfinished.discard(str(temporary))


def read_file(path: Path, limit: int = 1 << 26) -> bytes:
    """Read a whole regular file of at most `limit` bytes (64 MiB).

    Raises OSError, also for a device or a pipe, which may have no end, and for a larger file.
    """
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    with open(path, "rb") as file:
        if os.fstat(file.fileno()).st_size > limit:
            raise OSError(errno.EFBIG, f"larger than {human_size(limit)}", str(path))
        return file.read()


def read_json(path: Path):
    """Read a JSON file. Raises OSError as read_file does, and ValueError for what is not JSON."""
    content = read_file(path)
    try:
        return json.loads(content)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def write_text(path: Path, text: str) -> None:
    """Replace the contents of `path` by `text` (UTF-8; names of files that are none are escaped) atomically."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


def write_json_lines(path: Path, records) -> None:
    """Replace the contents of `path` by one JSON object per line atomically."""
    write_text(path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))


def read_records(path: Path) -> list[dict]:
    """Read one JSON object per line, as in metrics.jsonl. Raises OSError if the file cannot be read.

    Lines that are not JSON objects are skipped: a power failure can truncate one, and other programs may add some.
    """
    records = []
    for line in path.read_bytes().splitlines():
        with suppress(ValueError):
            records.append(json.loads(line))
    return [record for record in records if isinstance(record, dict)]


def sync(path: Path) -> None:
    """Force the contents of a file or directory to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def crc32(path: Path) -> int:
    """Compute the checksum of a whole file. It detects damage, not tampering."""
    value = 0
    with open(path, "rb") as file:
        while chunk := file.read(1 << 22):
            value = zlib.crc32(chunk, value)
    return value


def human_time(seconds: float) -> str:
    """A duration in a unit that fits."""
    if seconds < 120:
        return f"{seconds:.0f} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 7200 else f"{seconds / 3600:.1f} hours"


def memory_size() -> int:
    """Bytes of this machine's memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def human_size(n_bytes: float) -> str:
    """Format a number of bytes for people, e.g. `1.5 GB` (powers of ten)."""
    for unit in ("bytes", "kB", "MB"):
        if abs(n_bytes) < 1000:
            return f"{n_bytes:.3g} {unit}"
        n_bytes /= 1000
    return f"{n_bytes:,.1f} GB"
