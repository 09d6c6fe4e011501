"""Draw the losses and accuracies in metrics.jsonl over epochs: one run, or several runs compared."""

import logging
import math
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import cycle, pairwise
from pathlib import Path

import yaml

from utils import RunError, UserError, read_records, replacing, warn

# Okabe and Ito's colors, which people with any color vision can distinguish; each also gets its own marker.
COLORS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]
MARKERS = ["o", "s", "^", "D", "v", "P", "X"]
GRAY = "#595959"
INSTALL = "pip install matplotlib"
FORMATS = (".png", ".pdf", ".svg")
SIZE = (7, 5)  # of a picture, in inches
MARGIN = 0.8  # of a picture's width: what the panels leave for their labels
MANY = 30  # a curve with this many points or more gets small markers
BINS = 200  # at most this many points in a training curve; each is the mean of several steps
# The keys that a record needs to be drawn
EVALUATION = {"eval/acc", "eval/loss", "epoch", "stage"}
TRAINING = {"train/step", "train/epoch", "train/loss", "stage"}

_warned = False  # whether keep_curves has printed its warning


@dataclass(frozen=True)
class Curves:
    """The metrics of a run over epochs: 1.0 is the end of the first epoch."""

    name: str
    training: list[tuple[float, float]]  # (epochs, mean loss)
    losses: list[tuple[int, float]]  # (epoch, validation loss)
    accuracies: list[tuple[int, float]]  # (epoch, validation accuracy)
    stages: list[tuple[str, int]]  # (stage, epochs done when it begins)

    @property
    def n_epochs(self) -> float:
        """The end of the curves."""
        return max(epoch for points in (self.training, self.losses) for epoch, _ in points)

    @property
    def span(self) -> tuple[float, float]:
        """The limits of the axis: whole epochs if the run trained, else the evaluations with space on both sides."""
        if self.training:
            return self.stages[0][1], self.n_epochs
        return self.losses[0][0] - 0.5, self.n_epochs + 0.5


def keep_curves(run_dir: Path) -> None:
    """Draw curves.png from the run's metrics. If that fails, warn once and let the run continue."""
    global _warned
    try:
        draw([read_curves(run_dir)], run_dir / "curves.png")
    except (UserError, RunError, OSError) as error:
        if not _warned:
            warn(f"curves.png is not drawn: {error}")
        _warned = True


def read_curves(run: Path, name: str | None = None) -> Curves:
    """Read the metrics of a run's directory (or a metrics.jsonl); records without losses are skipped.

    name: the run's name in the picture, by default that of its directory. Raises UserError if the file cannot be read
    or holds no losses.
    """
    path = run / "metrics.jsonl" if run.is_dir() else run
    try:
        records = read_records(path)
    except OSError as error:
        raise UserError(f"{path}: cannot read the metrics ({error.strerror}); is {run} a run's directory?") from error
    evaluations = _one_per_epoch([record for record in records if record.keys() >= EVALUATION])
    steps = [record for record in records if record.keys() >= TRAINING]
    if not (evaluations or steps):
        raise UserError(f"{path}: holds no losses yet")
    return Curves(
        name=name or path.resolve().parent.name,
        training=_bin_means(steps),
        losses=[(record["epoch"], record["eval/loss"]) for record in evaluations],
        accuracies=[(record["epoch"], record["eval/acc"]) for record in evaluations],
        stages=_stages(evaluations + steps, _read_keys(path.with_name("config.yaml"))) if steps else [],
    )


def _one_per_epoch(evaluations: list[dict]) -> list[dict]:
    """The evaluations in the order of their epochs, of each the last; with only_eval, those of the data seen last."""
    own = [record for record in evaluations if record.get("data") == evaluations[-1].get("data")]
    by_epoch = {record["epoch"]: record for record in own}
    return [by_epoch[epoch] for epoch in sorted(by_epoch)]


def draw(runs: list[Curves], path: Path, title: str | None = None) -> None:
    """Write the picture of one or several runs; the suffix of `path` (FORMATS) selects the format.

    Raises UserError if matplotlib is not installed, OSError if the file cannot be written, and RunError if matplotlib
    fails.
    """
    with drawing(path), replacing(path) as temporary:
        figure = make_figure(runs, title)
        figure.savefig(temporary, format=path.suffix[1:], dpi=150, metadata=None if path.suffix == ".png" else {})


@contextmanager
def drawing(path: Path):
    """Draw with matplotlib's own defaults; raise RunError in the place of what it raises, which may be anything."""
    try:
        with _default_style():
            yield
    except (UserError, OSError):
        raise
    except Exception as error:
        raise RunError(f"{path}: matplotlib cannot draw it ({' '.join(repr(error).split()):.200})") from error


def _default_style():
    """A matplotlibrc in the current folder comes before the one that startup/settings.py names."""
    try:
        from matplotlib import rc_context, rcParamsDefault
    except ImportError:
        return nullcontext()  # new_figure says so
    return rc_context({name: value for name, value in rcParamsDefault.items() if "backend" not in name})


def make_figure(runs: list[Curves], title: str | None = None, size: tuple[float, float] = SIZE):
    """Draw accuracy above and loss below, over epochs. Training losses are drawn only for a single run.

    size: of the picture, in inches. Returns a matplotlib Figure.
    """
    is_single = len(runs) == 1
    figure, (above, below) = _panels(size)
    for run, color, marker in zip(runs, cycle(COLORS), cycle(MARKERS), strict=False):
        style = {"color": color, "marker": marker, "linewidth": 1.8, "zorder": 3}
        style["clip_on"] = not run.losses  # a line without points has no extent: not clipped, it spoils the layout
        style["markersize"] = 5 if len(run.losses) < MANY else 3
        label = "validation" if is_single else _plain(run.name)
        above.plot(*_columns(run.accuracies), label=label, **style)
        below.plot(*_columns(run.losses), label=label, **style)
    if is_single and runs[0].training:
        below.plot(*_columns(runs[0].training), label="training", color=COLORS[1], linewidth=1, alpha=0.8, zorder=2)
    above.set(ylabel="accuracy", ylim=(0, 1))
    starts, ends = zip(*(run.span for run in runs), strict=True)
    below.set(ylabel="loss per labeled token", xlabel="epoch", xlim=(min(starts), max(ends)))
    _scale(below, [loss for run in runs for _, loss in run.losses + (run.training if is_single else [])])
    _mark_stages(above, below, _common_stages(runs), max(ends))
    _add_legend(figure, below)
    figure.suptitle(_plain(title or (runs[0].name if is_single else "")), fontsize=11)
    return figure


def _add_legend(figure, panel) -> None:
    """Put the legend below the panels, in as many columns as fit."""
    handles, labels = panel.get_legend_handles_labels()
    widths = sorted((6 + len(label) for label in labels), reverse=True)  # in characters
    columns = next((n for n in (4, 3, 2) if sum(widths[:n]) <= 90), 1)
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False, fontsize=9)


def new_figure(size: tuple[float, float]):
    """An empty matplotlib Figure of a size in inches. Raises UserError without matplotlib."""
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # hides its notes on caches and fonts
    try:
        from matplotlib.figure import Figure  # slow to import; unlike pyplot it needs no display and no global state
    except ImportError as error:
        raise UserError(f"matplotlib is not installed; install it with `{INSTALL}`") from error
    return Figure(figsize=size, layout="constrained")


def _panels(size: tuple[float, float]):
    figure = new_figure(size)
    axes = figure.subplots(2, 1, sharex=True)
    for panel in axes:
        panel.grid(axis="y", color="#dddddd", linewidth=0.6)
        panel.spines[["top", "right"]].set_visible(False)
        panel.tick_params(labelsize=9)
    axes[1].xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    return figure, axes


def _common_stages(runs: list[Curves]) -> list[tuple[str, int]]:
    """Return the stages of the runs that have several; [] if the runs change stage at different epochs."""
    plans = [run.stages for run in runs if len(run.stages) > 1]
    longest = max(plans, key=len, default=[])
    return longest if all(plan == longest[: len(plan)] for plan in plans) else []


def _mark_stages(above, below, stages: list[tuple[str, int]], last: float) -> None:
    """Draw a line where each stage begins, and write its number above it if there is enough space."""
    if not stages:
        return
    begins = [begin for _, begin in stages]
    inches = above.figure.get_figwidth() - MARGIN
    widths = [inches * (end - begin) / (last - begins[0]) for begin, end in pairwise([*begins, last])]
    word = "stage " if min(widths) > 0.65 else ""  # inches
    style = {"textcoords": "offset points", "va": "bottom", "fontsize": 9, "color": GRAY}
    if not word:
        above.annotate("stage", (0, 1), (-4, 4), xycoords="axes fraction", ha="right", **style)
    for (stage, begin), width in zip(stages, widths, strict=True):
        for panel in (above, below) if begin > begins[0] else ():
            panel.axvline(begin, color=GRAY, linewidth=0.8, linestyle=(0, (4, 3)), zorder=1)
        if width > 0.09 * len(word + stage):
            middle = begin + width / inches * (last - begins[0]) / 2
            above.annotate(word + stage, (middle, 1), (0, 4), xycoords=("data", "axes fraction"), ha="center", **style)


def _scale(panel, values: list[float]) -> None:
    """Use a logarithmic scale if the losses differ by a factor of more than 20."""
    positive = [value for value in values if value > 0]
    if positive and len(positive) == len(values) and max(positive) > 20 * min(positive):
        panel.set_yscale("log")
    else:
        panel.set_ylim(bottom=0)


def _bin_means(records: list[dict]) -> list[tuple[float, float]]:
    """Average the training losses over at most BINS groups of equal size; each point is at its group's middle."""
    if not records:
        return []
    last = records[-1]
    complete = [r for r in records if r["train/epoch"] < last["train/epoch"]]
    end = complete[-1] if complete else last  # the last epoch may be unfinished
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


def merged_stage(stage: float, keys: dict) -> float:
    """A recorded stage, those past max_latent_stage as one, because they train and answer alike.

    keys: the run's configuration; without one, as for a foreign log, the stage itself.
    """
    if keys.get("curriculum") == "tokens":
        return stage  # tokens due, at most those of the longest chain
    return min(stage, keys.get("max_latent_stage", math.inf) + 1)


def _read_keys(config: Path) -> dict:
    """The keys of the run's config.yaml; none where there is no such file, or another one."""
    try:
        keys = yaml.safe_load(config.read_bytes())
    except (OSError, yaml.YAMLError):
        return {}
    return keys if isinstance(keys, dict) and isinstance(keys.get("max_latent_stage"), int) else {}


def _stages(records: list[dict], keys: dict) -> list[tuple[str, int]]:
    """Return each stage with the number of epochs done when it begins; those past max_latent_stage are one, `4+`."""
    begins: dict[float, int] = {}
    for record in records:
        epoch = int(record.get("train/epoch", record.get("epoch", 1)))
        stage = merged_stage(record["stage"], keys)
        begins[stage] = min(epoch - 1, begins.get(stage, epoch - 1))
    past = merged_stage(math.inf, keys)
    return [(f"{stage}+" if stage == past else str(stage), begin) for stage, begin in sorted(begins.items())]


def _plain(name: str) -> str:
    """Escape a name for matplotlib, where `$` starts a formula and a leading underscore hides a label.

    A file's name that the locale cannot spell is read as UTF-8: matplotlib draws text alone.
    """
    name = name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    return (" " + name if name.startswith("_") else name).replace("$", r"\$")


def _columns(points: list[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [y for _, y in points]
