"""Handle Ctrl-C, SIGTERM and their like at any moment: no traceback and no half-written file. A command begins with

    from startup import signals

    if __name__ == "__main__":
        signals.at_once()  # before the slow imports

The handler ends the process. Python's own handler raises KeyboardInterrupt instead, which can surface inside a
library's import, in a destructor or during shutdown, where Python prints a traceback or raises another error.
"""

import _signal as signal  # the C module behind `signal`, which would import enum: a few ms without our handler
import os
import sys

unfinished: set[str] = set()  # temporary files that the handler removes
# A closed terminal sends SIGHUP; Slurm (SIGUSR1), Grid Engine (SIGUSR2) and a soft limit of CPU time (SIGXCPU) warn
# before a job's time ends. SIGQUIT is left alone: it is the user's way to a core dump.
STOP = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU)
silent = False  # True in all processes but one of a distributed run (utils.silence)


def at_once() -> None:
    """End the process at any of the STOP signals from now on, and let no output fail.

    A signal that is ignored stays ignored: shells start the background commands of a script without Ctrl-C.
    """
    _keep_output_open()
    for number in STOP:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _end)


def _keep_output_open() -> None:
    """Send what a closed stdin, stdout or stderr would get to /dev/null, and escape characters that a locale lacks.

    Otherwise the next file that is opened gets the number of the closed one, and what is printed lands in it.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number
    sys.stdout = sys.stdout or open(1, "w", closefd=False)  # noqa: SIM115  stays open to the end
    sys.stderr = sys.stderr or open(2, "w", closefd=False)  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a notebook's has no encoding of its own
            stream.reconfigure(errors="backslashreplace")


def reader_left() -> int:
    """The exit status of a command whose stdout nobody reads any more (`| head`): 141, as if SIGPIPE had ended it.

    SIGPIPE itself stays ignored, because a connection that breaks raises it too.
    """
    discard(sys.stdout)
    return 128 + signal.SIGPIPE


def discard(stream) -> None:
    """Let a stream write to /dev/null from now on: what is buffered would fail again at exit, which is status 120."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def announce(text: str) -> None:
    """Print a line to stderr from a signal handler, without sys.stderr, which may be in the middle of a write."""
    if silent:
        return
    _try(os.write, 2, f"\n{text}\n".encode() if os.isatty(2) else f"{text}\n".encode())


def _end(number: int, frame) -> None:
    """Remove temporary files and die of the signal itself, so that a shell loop over commands ends too."""
    signal.signal(number, signal.SIG_IGN)
    for path in list(unfinished):
        _try(os.unlink, path)
    if number == signal.SIGINT:
        announce("interrupted")
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)


def _try(function, *arguments) -> None:
    """Call the function; ignore OSError, because a missing file or a closed stderr must not keep the process alive."""
    try:
        function(*arguments)
    except OSError:
        return
