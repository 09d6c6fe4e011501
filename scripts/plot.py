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
from utils import UserError, command_parser, exit_status, say, warn


def main(arguments: list[str]) -> int:
    """Run the command line; returns the exit status."""
    parser = command_parser("scripts.plot", __doc__)
    parser.add_argument("runs", metavar="RUN", type=Path, nargs="+", help="a run's directory")
    parser.add_argument("-o", "--output", metavar="FILE", type=Path, help="where to write the picture")
    options = parser.parse_args(arguments)
    runs = _without_strangers(options.runs)
    return exit_status(lambda: plot(runs, options.output or _default_output(runs)))


def plot(runs: list[Path], path: Path) -> None:
    """Draw the runs. Raises UserError for an unreadable run, another suffix, or a path that cannot be written."""
    if path.suffix not in FORMATS:
        raise UserError(f"{path}: expected a name that ends in {', '.join(FORMATS)}")
    try:
        draw([read_curves(run, name) for run, name in zip(runs, _names(runs), strict=True)], path)
    except OSError as error:
        raise UserError(f"{path}: cannot write it ({error.strerror})") from error
    say(str(path))


def _without_strangers(paths: list[Path]) -> list[Path]:
    """The runs among several paths, as a shell's pattern names them: files and folders without metrics are left out."""
    strangers = [path for path in paths if path.exists() and not _is_run(path)]
    if not strangers or len(strangers) == len(paths):
        return paths
    warn(f"no run's directory, left out: {', '.join(map(str, strangers))}")
    return [path for path in paths if path not in strangers]


def _is_run(path: Path) -> bool:
    is_log = path.suffix == ".jsonl" and not path.name.startswith("predictions_")
    return (path / "metrics.jsonl").is_file() or (is_log and path.is_file())


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
