"""Pictures of runs, from their metrics.jsonl: `python plot.py RUN [RUN ...] [-o FILE]`.

With one run: its losses and accuracy over the epochs, as run.py keeps them in curves.png beside the metrics. With
several: the runs compared. RUN is a run's directory (or its metrics.jsonl); FILE ends in .png, .pdf or .svg and is
curves.png in the directory of a single run, comparison.png here for several.
"""

import stopping

if __name__ == "__main__":
    stopping.at_once()  # before the slow imports

import argparse
import json
import logging
import sys
from dataclasses import dataclass, field
from pathlib import Path

from utils import UserError, replacing, warn

# Okabe and Ito's colours, told apart with every kind of colour vision; each has a marker of its own besides.
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]
MARKERS = ["o", "s", "^", "D", "v", "P", "X"]
GREY = "#595959"
INSTALL = "pip install matplotlib"
FORMATS = (".png", ".pdf", ".svg")
BINS = 200  # points of a training curve: each is the mean of the steps in its stretch


@dataclass
class Curves:
    """What a run has logged, over epochs: 1.0 is the end of the first."""

    name: str
    training: list[tuple[float, float]] = field(default_factory=list)  # (epochs, loss), a point for each stretch
    losses: list[tuple[int, float]] = field(default_factory=list)  # (epoch, validation loss)
    accuracies: list[tuple[int, float]] = field(default_factory=list)  # (epoch, validation accuracy)
    stages: list[tuple[int, int]] = field(default_factory=list)  # (stage, the epoch before its first one)

    @property
    def n_epochs(self) -> float:
        """How far the curves go."""
        return max(epoch for points in (self.training, self.losses) for epoch, _ in points)


def keep_curves(run_dir: Path) -> None:
    """Draw curves.png anew from the run's metrics; what stands in the way costs one warning, never the run."""
    global _told
    try:
        draw([read_curves(run_dir)], run_dir / "curves.png")
    except (UserError, OSError) as error:
        if not _told:
            warn(f"curves.png is not drawn: {error}")
        _told = True


_told = False


def read_curves(run: Path, name: str | None = None) -> Curves:
    """Read a run's metrics.jsonl; lines that are no records are passed over. Raises UserError where nothing is left."""
    path = run / "metrics.jsonl" if run.is_dir() else run
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise UserError(f"{path}: cannot read the metrics ({error.strerror}); is {run} a run's directory?") from error
    records = [record for record in map(_parse, lines) if record]
    curves = Curves(name or path.resolve().parent.name)
    evaluations = [record for record in records if "eval/acc" in record]
    curves.losses = [(record["epoch"], record["eval/loss"]) for record in evaluations]
    curves.accuracies = [(record["epoch"], record["eval/acc"]) for record in evaluations]
    curves.training = _stretches([record for record in records if "train/step" in record])
    curves.stages = _stages(records)
    if not (curves.losses or curves.training):
        raise UserError(f"{path}: holds no losses yet")
    return curves


def draw(runs: list[Curves], path: Path, title: str | None = None) -> None:
    """Write the picture of one run or of several; raises UserError where matplotlib is missing, OSError from disk."""
    figure = make_figure(runs, title)
    with replacing(path) as temporary:
        figure.savefig(temporary, format=path.suffix[1:], dpi=150, metadata=None if path.suffix == ".png" else {})


def make_figure(runs: list[Curves], title: str | None = None):
    """Accuracy above, loss below, over epochs; training losses are drawn where there is only one run."""
    figure, (above, below) = _panels()
    for run, colour, marker in zip(runs, _cycle(COLOURS, runs), _cycle(MARKERS, runs), strict=True):
        style = {"color": colour, "marker": marker, "markersize": 5, "linewidth": 1.8, "clip_on": False, "zorder": 3}
        label = run.name if len(runs) > 1 else "validation"
        above.plot(*_columns(run.accuracies), label=label, **style)
        below.plot(*_columns(run.losses), label=label, **style)
        if len(runs) == 1:
            below.plot(*_columns(run.training), label="training", color=COLOURS[1], linewidth=1, alpha=0.8, zorder=2)
    above.set(ylabel="accuracy", ylim=(0, 1))
    below.set(ylabel="loss per labelled token", xlabel="epoch", xlim=(0, max(run.n_epochs for run in runs)))
    _scale(below, [loss for run in runs for _, loss in run.losses + (run.training if len(runs) == 1 else [])])
    _mark_stages(above, below, runs)
    if len(runs) > 1:  # below the panels, where it covers no line
        figure.legend(
            *above.get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False, fontsize=9
        )
    else:
        below.legend(frameon=False, fontsize=9)
    figure.suptitle(title or (runs[0].name if len(runs) == 1 else ""), fontsize=11)
    return figure


def _panels():
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # its notes on caches and fonts are not ours to show
    try:
        from matplotlib.figure import Figure  # slow to import; without pyplot there is no display and no global state
    except ImportError as error:
        raise UserError(f"matplotlib is not installed; `{INSTALL}` brings it") from error
    figure = Figure(figsize=(7, 5), layout="constrained")
    axes = figure.subplots(2, 1, sharex=True)
    for panel in axes:
        panel.grid(axis="y", color="#dddddd", linewidth=0.6)
        panel.spines[["top", "right"]].set_visible(False)
        panel.tick_params(labelsize=9)
    axes[1].xaxis.get_major_locator().set_params(integer=True)
    return figure, axes


def _mark_stages(above, below, runs: list[Curves]) -> None:
    """A line where a stage begins, and its number above; taken from the run that goes through most stages."""
    stages = max((run.stages for run in runs), key=len)
    if len(stages) < 2:
        return
    ends = [begin for _, begin in stages[1:]] + [max(run.n_epochs for run in runs)]
    for (stage, begin), end in zip(stages, ends, strict=True):
        for panel in (above, below) if begin else ():
            panel.axvline(begin, color=GREY, linewidth=0.8, linestyle=(0, (4, 3)), zorder=1)
        text = f"stage {stage}" if len(stages) <= 8 else str(stage)
        above.annotate(
            text, ((begin + end) / 2, 1), (0, 4), xycoords=("data", "axes fraction"), textcoords="offset points",
            ha="center", va="bottom", fontsize=9, color=GREY,
        )  # fmt: skip


def _scale(panel, values: list[float]) -> None:
    """Losses that differ by more than 20 times are drawn on a logarithmic scale."""
    positive = [value for value in values if value > 0]
    if positive and len(positive) == len(values) and max(positive) > 20 * min(positive):
        panel.set_yscale("log")
    else:
        panel.set_ylim(bottom=0)


def _parse(line: bytes) -> dict | None:
    """A record of metrics.jsonl, None for a torn or foreign line."""
    wanted = {"eval/acc", "eval/loss", "epoch", "stage"}, {"train/step", "train/epoch", "train/loss", "stage"}
    try:
        record = json.loads(line)
        return record if any(names <= record.keys() for names in wanted) else None
    except (ValueError, AttributeError):
        return None


def _stretches(records: list[dict]) -> list[tuple[float, float]]:
    """Training losses as means over stretches of equal length, each at its middle."""
    if not records:
        return []
    last = records[-1]
    complete = [r for r in records if r["train/epoch"] < last["train/epoch"]]
    end = complete[-1] if complete else last
    steps_per_epoch = (end["train/step"] + 1) / end["train/epoch"]
    size = -(-len(records) // BINS)
    groups = [records[i : i + size] for i in range(0, len(records), size)]
    return [
        (
            sum(r["train/step"] + 1 for r in group) / len(group) / steps_per_epoch,
            sum(r["train/loss"] for r in group) / len(group),
        )
        for group in groups
    ]


def _stages(records: list[dict]) -> list[tuple[int, int]]:
    """Each stage with the epoch, counted from 0, in which it begins."""
    begins: dict[int, int] = {}
    for record in records:
        epoch = int(record.get("train/epoch", record.get("epoch", 1)))
        begins[record["stage"]] = min(epoch - 1, begins.get(record["stage"], epoch - 1))
    return sorted(begins.items())


def _columns(points: list[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [y for _, y in points]


def _cycle(values: list[str], runs: list[Curves]) -> list[str]:
    return [values[i % len(values)] for i in range(len(runs))]


def main(arguments: list[str]) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="plot.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", metavar="RUN", type=Path, nargs="+", help="a run's directory")
    parser.add_argument("-o", "--output", metavar="FILE", type=Path, help="where to write the picture")
    options = parser.parse_args(arguments)
    try:
        path = options.output or (_beside(options.runs[0]) if len(options.runs) == 1 else Path("comparison.png"))
        if path.suffix not in FORMATS:
            raise UserError(f"{path}: expected a name that ends in {', '.join(FORMATS)}")
        draw([read_curves(run) for run in options.runs], path)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(path)
    return 0


def _beside(run: Path) -> Path:
    return (run if run.is_dir() else run.parent) / "curves.png"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
