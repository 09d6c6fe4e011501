"""Draw runs from their metrics.jsonl: `python -m scripts.plot RUN [RUN ...] [-o FILE]`.

One run: its losses and accuracy over the epochs, as run.py draws them in curves.png. Several runs: a comparison. RUN is
a run's directory (or its metrics.jsonl). FILE ends in .png, .pdf or .svg; by default it is curves.png in the directory
of a single run, and comparison.png in the current directory for several.
"""

from startup import settings, signals

if __name__ == "__main__":
    signals.at_once()  # before the slow imports
    settings.own_pictures()

import sys
from pathlib import Path

from training.curves import FORMATS, draw, read_curves
from utils import UserError, command_parser, exit_status, say


def main(arguments: list[str]) -> int:
    """Run the command line; returns the exit status."""
    parser = command_parser("scripts.plot", __doc__)
    parser.add_argument("runs", metavar="RUN", type=Path, nargs="+", help="a run's directory")
    parser.add_argument("-o", "--output", metavar="FILE", type=Path, help="where to write the picture")
    options = parser.parse_args(arguments)
    return exit_status(lambda: plot(options.runs, options.output or _default_output(options.runs)))


def plot(runs: list[Path], path: Path) -> None:
    """Draw the runs. Raises UserError for an unreadable run, another suffix, or a path that cannot be written."""
    if path.suffix not in FORMATS:
        raise UserError(f"{path}: expected a name that ends in {', '.join(FORMATS)}")
    try:
        draw([read_curves(run, name) for run, name in zip(runs, _names(runs), strict=True)], path)
    except OSError as error:
        raise UserError(f"{path}: cannot write it ({error.strerror})") from error
    say(str(path))


def _names(runs: list[Path]) -> list[str]:
    """Name the runs after their directories; runs with the same name get their paths as given."""
    names = [_directory(run).resolve().name for run in runs]
    return [str(run) if names.count(name) > 1 else name for run, name in zip(runs, names, strict=True)]


def _default_output(runs: list[Path]) -> Path:
    return _directory(runs[0]) / "curves.png" if len(runs) == 1 else Path("comparison.png")


def _directory(run: Path) -> Path:
    return run if run.is_dir() else run.parent


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
