"""Ctrl-C and SIGTERM at any moment: no traceback and no half-written file. A command begins with

    import stopping

    if __name__ == "__main__":
        stopping.at_once()  # before the slow imports

The handler ends the process instead of raising KeyboardInterrupt, which would come up in a library's import, in a
destructor or at the interpreter's end, where Python prints a traceback or makes another error of it.
"""

import _signal as signal  # what `signal` wraps, there at once: that one imports enum, a few ms without our handler
import os

unfinished: set[str] = set()  # temporary files, to be removed when the process is stopped
silent = False  # of several processes, one talks (utils.silence)


def at_once() -> None:
    """From here on both signals end the process; what is ignored, as Ctrl-C is in a script's background, stays so."""
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _end)


def announce(text: str) -> None:
    """A line on stderr from inside a signal handler: past sys.stderr, which may be in the middle of a write."""
    if silent:
        return
    _try(os.write, 2, f"\n{text}\n".encode() if os.isatty(2) else f"{text}\n".encode())


def _end(number: int, frame) -> None:
    """Clean up and die of the signal itself, so that a shell's loop over commands ends too."""
    signal.signal(number, signal.SIG_IGN)
    for path in list(unfinished):
        _try(os.unlink, path)
    if number == signal.SIGINT:
        announce("interrupted")
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)


def _try(function, *arguments) -> None:
    """Call it; that a file is gone already, or that nobody listens any more, is no reason not to stop."""
    try:
        function(*arguments)
    except OSError:
        return
