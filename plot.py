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
import math
import sys
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import yaml

from utils import UserError, replacing, warn

# Okabe and Ito's colours, told apart with every kind of colour vision; each has a marker of its own besides.
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]
MARKERS = ["o", "s", "^", "D", "v", "P", "X"]
GREY = "#595959"
INSTALL = "pip install matplotlib"
FORMATS = (".png", ".pdf", ".svg")
WIDTH = 6.2  # of a panel, in inches
MANY = 30  # points of a curve, from which on their markers are small
BINS = 200  # points of a training curve: each is the mean of the steps in its stretch


@dataclass
class Curves:
    """What a run has logged, over epochs: 1.0 is the end of the first."""

    name: str
    training: list[tuple[float, float]] = field(default_factory=list)  # (epochs, loss), a point for each stretch
    losses: list[tuple[int, float]] = field(default_factory=list)  # (epoch, validation loss)
    accuracies: list[tuple[int, float]] = field(default_factory=list)  # (epoch, validation accuracy)
    stages: list[tuple[str, int]] = field(default_factory=list)  # (stage, the epoch before its first one)

    @property
    def n_epochs(self) -> float:
        """How far the curves go."""
        return max(epoch for points in (self.training, self.losses) for epoch, _ in points)

    @property
    def span(self) -> tuple[float, float]:
        """What the axis shows: whole epochs where the run trained, else the evaluations with room around them."""
        if self.training:
            return self.stages[0][1], self.n_epochs
        return self.losses[0][0] - 0.5, self.n_epochs + 0.5


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
    curves.stages = _stages(records, _max_latent_stage(path.with_name("config.yaml")))
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
        style = {"color": colour, "marker": marker, "linewidth": 1.8, "clip_on": False, "zorder": 3}
        style["markersize"] = 5 if len(run.losses) < MANY else 3
        label = _plain(run.name) if len(runs) > 1 else "validation"
        above.plot(*_columns(run.accuracies), label=label, **style)
        below.plot(*_columns(run.losses), label=label, **style)
        if len(runs) == 1 and run.training:
            below.plot(*_columns(run.training), label="training", color=COLOURS[1], linewidth=1, alpha=0.8, zorder=2)
    above.set(ylabel="accuracy", ylim=(0, 1))
    starts, ends = zip(*(run.span for run in runs), strict=True)
    below.set(ylabel="loss per labelled token", xlabel="epoch", xlim=(min(starts), max(ends)))
    _scale(below, [loss for run in runs for _, loss in run.losses + (run.training if len(runs) == 1 else [])])
    _mark_stages(above, below, _common_stages(runs), max(ends))
    handles, labels = below.get_legend_handles_labels()
    widths = sorted((6 + len(label) for label in labels), reverse=True)
    columns = next((n for n in (4, 3, 2) if sum(widths[:n]) <= 90), 1)  # characters
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False, fontsize=9)
    figure.suptitle(_plain(title or (runs[0].name if len(runs) == 1 else "")), fontsize=11)
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
    axes[1].xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    return figure, axes


def _common_stages(runs: list[Curves]) -> list[tuple[str, int]]:
    """The stages of the runs that have several; none where they change at different epochs."""
    plans = [run.stages for run in runs if len(run.stages) > 1]
    longest = max(plans, key=len, default=[])
    return longest if all(plan == longest[: len(plan)] for plan in plans) else []


def _mark_stages(above, below, stages: list[tuple[str, int]], last: float) -> None:
    """A line where a stage begins, and its number above where there is room for it."""
    if not stages:
        return
    begins = [begin for _, begin in stages]
    widths = [WIDTH * (end - begin) / (last - begins[0]) for begin, end in pairwise([*begins, last])]
    word = "stage " if min(widths) > 0.65 else ""  # inches
    style = {"textcoords": "offset points", "va": "bottom", "fontsize": 9, "color": GREY}
    if not word:
        above.annotate("stage", (0, 1), (-4, 4), xycoords="axes fraction", ha="right", **style)
    for (stage, begin), width in zip(stages, widths, strict=True):
        for panel in (above, below) if begin > begins[0] else ():
            panel.axvline(begin, color=GREY, linewidth=0.8, linestyle=(0, (4, 3)), zorder=1)
        if width > 0.09 * len(word + stage):
            middle = begin + width / WIDTH * (last - begins[0]) / 2
            above.annotate(word + stage, (middle, 1), (0, 4), xycoords=("data", "axes fraction"), ha="center", **style)


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


def _max_latent_stage(config: Path) -> float:
    """What the run's config.yaml says; endless where there is none, as beside an evaluation or other programs' logs."""
    try:
        return yaml.safe_load(config.read_bytes())["max_latent_stage"]
    except (OSError, yaml.YAMLError, TypeError, KeyError):
        return math.inf


def _stages(records: list[dict], max_latent_stage: float) -> list[tuple[str, int]]:
    """Each stage with the epoch, counted from 0, in which it begins; those past max_latent_stage are one, as `4+`."""
    begins: dict[int, int] = {}
    for record in records:
        epoch = int(record.get("train/epoch", record.get("epoch", 1)))
        stage = min(record["stage"], max_latent_stage + 1)
        begins[stage] = min(epoch - 1, begins.get(stage, epoch - 1))
    return [(f"{stage}+" if stage > max_latent_stage else str(stage), begin) for stage, begin in sorted(begins.items())]


def _plain(name: str) -> str:
    """A name that matplotlib shows as it is: no formulas, and no leading underscore, which would hide it."""
    return (" " + name if name.startswith("_") else name).replace("$", r"\$")


def _names(runs: list[Path]) -> list[str]:
    """What to call the runs: by their directory; where two share that, by the path as it was given."""
    names = [(run if run.is_dir() else run.parent).resolve().name for run in runs]
    return [str(run) if names.count(name) > 1 else name for run, name in zip(runs, names, strict=True)]


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
        draw([read_curves(run, name) for run, name in zip(options.runs, _names(options.runs), strict=True)], path)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {path}: cannot write it ({error.strerror})", file=sys.stderr)
        return 2
    print(path)
    return 0


def _beside(run: Path) -> Path:
    return (run if run.is_dir() else run.parent) / "curves.png"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
