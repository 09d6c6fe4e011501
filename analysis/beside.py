"""The control that stands beside a model: a second checkpoint, looked at in the same way on the same items.

A claim about thoughts needs one. A model with pauses has the same places, and nothing is fed back into them: what is
found there too says nothing about thoughts. All commands open, print, record and draw it as this file does.
"""

import argparse
from collections.abc import Callable, Iterable
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from analysis.pictures import save_figure
from analysis.probing import Probe, analysis_parser, open_checkpoint, write_records
from dataset import Data
from utils import UserError, say


class Subject(NamedTuple):
    """A checkpoint that a command looks at, with the data in its own layout and vocabulary."""

    path: str
    probe: Probe
    data: Data
    count: int  # the first so many items are looked at

    @property
    def indices(self) -> list[int]:
        """The items' numbers in the file."""
        return self.data.indices[: self.count].tolist()


class Part(NamedTuple):
    """What a picture shows of one subject."""

    width: float  # inches
    height: float
    draw: Callable[[Any], list]  # on a figure; returns the panels whose vertical scale is that of all subjects


def control_parser(module: str, docstring: str) -> argparse.ArgumentParser:
    """A parser with what every analysis command with a control takes."""
    parser = analysis_parser(module, docstring)
    words = "a second checkpoint, such as one with pauses, which is looked at in the same way on the same items"
    parser.add_argument("--control", metavar="CHECKPOINT", help=words)
    return parser


def open_subjects(options: argparse.Namespace, probe: Probe) -> list[Subject]:
    """The model, and behind it the control that --control names.

    Raises UserError where the two leave out different items of the data.
    """
    found = [(options.checkpoint, probe, probe.data(options.data))]
    if options.control:
        control = open_checkpoint(options.control, options.tokenizer)
        found.append((options.control, control, control.data(options.data)))
    count = min(len(data) for _, _, data in found)
    count = min(count, options.items or count)
    subjects = [Subject(*one, count) for one in found]
    if any(one.indices != subjects[0].indices for one in subjects):
        raise UserError(f"{options.data}: the two models leave out different items, so they cannot be compared")
    return subjects


def open_places(options: argparse.Namespace, probe: Probe) -> list[Subject]:
    """The same for commands that look at places one by one: the control must have as many of them as the model."""
    subjects = open_subjects(options, probe)
    for one in subjects:
        if one.probe.n_thoughts != probe.n_thoughts:
            raise UserError(
                f"--control {one.path}: {one.probe.n_thoughts} thoughts or pauses, expected {probe.n_thoughts} as in "
                f"{options.checkpoint}; a model with pauses, for example (key `thought`)"
            )
    return subjects


def require_item(subjects: list[Subject], item: int) -> None:
    """Raise UserError where the item that is to be drawn is not looked at."""
    if item not in subjects[0].indices:
        raise UserError(f"--item {item}: not among the {subjects[0].count:,} items that were looked at")


def say_reports(subjects: list[Subject], reports: Iterable[list[str]]) -> None:
    """Print the lines about each subject below its name, and with a control what that means."""
    for one, lines in zip(subjects, reports, strict=True):
        say("\n".join(["", f"{one.path}, {one.count:,} items", "", *lines]))
    for control in subjects[1:]:
        title = control.probe.curriculum.method.title
        say(
            f"\nControl: {control.path} ({title}). What is found there too says nothing about the thoughts of "
            f"{subjects[0].path}."
        )


def save(subjects: list[Subject], file: Path, told: dict, records: Iterable[Iterable[dict]], parts: list[Part]) -> None:
    """Write FILE.jsonl, with each record's checkpoint in it, and FILE.png, the subjects below one another.

    told: the settings of the command beside the checkpoints, the data and the number of items.
    """
    first, *others = subjects
    told = {
        "command": file.name, "checkpoint": first.path, "control": others[0].path if others else None,
        "data": first.data.path, "items": first.count, **told,
    }  # fmt: skip
    named = ({"checkpoint": s.path, **line} for s, own in zip(subjects, records, strict=True) for line in own)
    write_records(file.with_suffix(".jsonl"), told, named)
    heights = [part.height + 0.3 * bool(others) for part in parts]
    with save_figure(file.with_suffix(".png"), (max(part.width for part in parts), sum(heights))) as figure:
        figures = figure.subfigures(len(parts), 1, squeeze=False, height_ratios=heights) if others else [[figure]]
        for one, own in zip(subjects, chain(*figures), strict=True):
            if others:
                own.suptitle(f"{one.path} ({one.probe.curriculum.method.title})", fontsize=10, fontweight="bold")
        drawn = [part.draw(own) for part, own in zip(parts, chain(*figures), strict=True)]
        for panels in zip(*drawn, strict=True):  # else a control of nothing would be magnified
            top = max(panel.get_ylim()[1] for panel in panels)
            for panel in panels:
                panel.set_ylim(top=top)
    say(f"written: {file.with_suffix('.jsonl')}, {file.with_suffix('.png')}")
