"""Force a number of thoughts and see what the model writes: `python -m analysis.sweep CHECKPOINT DATA`

    python -m analysis.sweep pretrained/graph-coconut pretrained/graph_test.json --beside pretrained/graph-cot

Every number of thoughts is tried on the same items (section 5.1 of the paper). A model that was trained without mixing
stages (key uniform_prob) has seen few numbers of thoughts, so the others say little about it.

Where the items hold a graph, each text is one of the paper's six classes (analysis/classes.py has the rules): Correct
Path, Longer Path, Hallucination, Wrong Target, and for an answer without a path Correct Label or Incorrect Label. They
are also counted apart for items with more steps than thoughts stand for (k < steps) and for the others (k >= steps),
which leave no step to write. A contradiction is a right path with a wrong answer, or the reverse; its path decides.

Prints tables with 95 % intervals and the exact McNemar p against the trained number, and writes sweep.jsonl (settings
in the first line, then one line for each item and number) and sweep.png.
"""

from startup import settings, signals

if __name__ == "__main__":
    signals.at_once()  # before the slow imports
    settings.own_pictures()

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field

from startup import blas  # noqa: F401  before mlx

import numpy as np

from analysis.changes import Answers, answer, mcnemar, records
from analysis.classes import CLASSES, Verdict, find_form, judge
from analysis.graphs import find_graphs
from analysis.intervals import share
from analysis.pictures import draw_bars, draw_stacks, save_figure
from analysis.probing import (
    Probe,
    analysis_parser,
    open_checkpoint,
    open_thinking,
    require_room,
    warn_if_unmixed,
    write_records,
)
from dataset import Data
from parallel.streams import use_streams
from utils import UserError, exit_status, markdown_table, say


@dataclass
class Forced:
    """What one model wrote to all items after so many thoughts."""

    n_done: int  # steps that the thoughts stand for
    answers: Answers
    verdicts: list[Verdict] = field(default_factory=list)  # empty without graphs

    def counts(self, chosen: np.ndarray) -> dict[str, int]:
        """The number of chosen items [n] bool in each class."""
        names = [verdict.name for verdict, is_chosen in zip(self.verdicts, chosen, strict=True) if is_chosen]
        return {name: names.count(name) for name in CLASSES}


def main(arguments: list[str]) -> int:
    """Run the command line; returns the exit status."""
    return exit_status(lambda: sweep(parse_args(arguments)))


def parse_args(arguments: list[str]) -> argparse.Namespace:
    parser = analysis_parser("analysis.sweep", __doc__)
    parser.add_argument("--thoughts", type=int, nargs="+", default=list(range(7)), help="default: 0 to 6")
    beside = "checkpoints to compare with, such as CoT and No-CoT, each with the thoughts it was trained with"
    parser.add_argument("--beside", nargs="+", default=[], metavar="CHECKPOINT", help=beside)
    options = parser.parse_args(arguments)
    if min(options.thoughts) < 0 or (options.items is not None and options.items < 1):
        raise UserError("--thoughts: expected 0 or more; --items: expected at least 1")
    return options


def sweep(options: argparse.Namespace) -> None:
    """Ask all items with each number of thoughts, print the tables, and write the lines and the picture."""
    use_streams("1")
    probe = open_thinking(options)
    warn_if_unmixed(probe, options.checkpoint)
    data = probe.data(options.data)
    others = open_others(options.beside, data)
    count = min(len(data), options.items or len(data))
    numbers = sorted({*options.thoughts, probe.n_thoughts})
    require_room(probe, data, numbers[-1])
    found = {str(k): force(probe, data, count, k) for k in numbers}
    found |= {name: force(other, own, count, other.n_thoughts) for name, (other, own) in others.items()}
    has_classes = classify(found, data, probe.curriculum.layout.separator)
    say("\n".join(table(found, str(probe.n_thoughts))))
    if has_classes:
        say("\n".join(["", *class_table(found, data), "", *share_table(found, data)]))
    settings = {"command": "sweep", "checkpoint": options.checkpoint, "data": options.data, "items": count}
    write_records(options.out / "sweep.jsonl", {**settings, "beside": options.beside}, lines(data, found))
    with save_figure(options.out / "sweep.png", figsize=(11 if has_classes else 6, 4)) as figure:
        draw(figure, found, f"thoughts (trained: {probe.n_thoughts})", has_classes)
    say(f"written: {options.out / 'sweep.jsonl'}, {options.out / 'sweep.png'}")


def open_others(paths: list[str], data: Data) -> dict[str, tuple[Probe, Data]]:
    """{title of the method, or the path where two have the same: model, items} of other checkpoints.

    Raises UserError where a checkpoint cannot be asked the same items as the first one.
    """
    found: dict[str, tuple[Probe, Data]] = {}
    for path in paths:
        probe = open_checkpoint(path)
        own = probe.data(data.path)
        if own.indices.tolist() != data.indices.tolist():
            raise UserError(f"--beside {path}: leaves out other items of {data.path} as too long than the first model")
        require_room(probe, own, probe.n_thoughts)
        title = probe.curriculum.method.title
        found[path if title in found else title] = probe, own
    return found


def force(probe: Probe, data: Data, count: int, n_thoughts: int) -> Forced:
    """Answer the first `count` items after exactly n_thoughts thoughts."""
    per_step = probe.curriculum.thoughts_per_step
    return Forced(n_thoughts // per_step if per_step else 0, answer(probe, data, count, n_thoughts))


def classify(found: dict[str, Forced], data: Data, separator: str) -> bool:
    """Fill in the classes of all texts; returns whether the data's items hold graphs whose paths can be read."""
    graphs = find_graphs(data.path)
    if graphs is None:
        return False
    graphs = [graphs[index] for index in data.indices]
    form = find_form([example.steps for example in data.examples], graphs, separator)
    if form is None:
        say(f"{data.path}: its steps are no path in a form that can be read, so there are no classes")
        return False
    for forced in found.values():
        answered = zip(forced.answers.texts, forced.answers.correct.tolist(), graphs, strict=False)
        forced.verdicts = [judge(text, graph, form, forced.n_done, right) for text, right, graph in answered]
    return True


def lines(data: Data, found: dict[str, Forced]) -> Iterator[dict]:
    """A line of sweep.jsonl for each condition and item."""
    for name, forced in found.items():
        asked = {int(name) if name.isdecimal() else name: forced.answers}
        for number, record in enumerate(records(data, asked, "thoughts")):
            if forced.verdicts:
                verdict = forced.verdicts[number]
                record |= {"class": verdict.name, "agrees": verdict.agrees, "aligned": verdict.aligned}
            yield record


def table(found: dict[str, Forced], trained: str) -> list[str]:
    """The accuracy of the stated answers, a Markdown row for each condition."""
    rows, usual = [], found[trained].answers.correct
    for name, forced in found.items():
        a = forced.answers
        p = "" if name == trained else f"{mcnemar(a.correct, usual):.3g}"
        rows.append([name, a.accuracy(), str(len(a.correct)), p])
    return markdown_table(["thoughts", "accuracy (95 % interval)", "items", f"p against {trained}"], rows)


def groups(found: dict[str, Forced], data: Data) -> Iterator[tuple[list[str], Forced, np.ndarray]]:
    """(first cells, condition, its items [n] bool) of each row: all items, and by whether steps are left."""
    for name, forced in found.items():
        n_steps = data.tokens.n_steps[: len(forced.verdicts)]
        is_left = forced.n_done < n_steps
        parts = {"k < steps": is_left, "k >= steps": ~is_left}
        if all(chosen.any() for chosen in parts.values()):
            parts = {"all": np.ones(len(n_steps), dtype=bool), **parts}
        for part, chosen in parts.items():
            if chosen.any():
                yield [name, part, str(chosen.sum())], forced, chosen


def class_table(found: dict[str, Forced], data: Data) -> list[str]:
    """The number of items in each class, and of contradictions between path and answer."""
    rows = []
    for cells, forced, chosen in groups(found, data):
        contradictions = sum(v.contradicts for v, is_chosen in zip(forced.verdicts, chosen, strict=True) if is_chosen)
        rows.append([*cells, *map(str, forced.counts(chosen).values()), str(contradictions)])
    return markdown_table(["thoughts", "which", "items", *CLASSES, "contradictions"], rows)


def share_table(found: dict[str, Forced], data: Data) -> list[str]:
    """The same as shares with 95 % intervals, without classes that never occur, and the accuracy of the answers."""
    occurring = [name for name in CLASSES if any(v.name == name for forced in found.values() for v in forced.verdicts)]
    rows = []
    for cells, forced, chosen in groups(found, data):
        counts = forced.counts(chosen) | {"right": int(forced.answers.correct[chosen].sum())}
        rows.append([*cells, *(share(counts[name], int(chosen.sum())) for name in [*occurring, "right"])])
    return markdown_table(["thoughts", "which", "items", *occurring, "answer right"], rows)


def draw(figure, found: dict[str, Forced], label: str, has_classes: bool) -> None:
    """Bars of accuracy by condition; with graphs, beside bars of the classes."""
    *left, right = figure.subplots(1, 1 + has_classes, squeeze=False)[0]
    found = {name.replace(" ", "\n"): forced for name, forced in found.items()}
    for panel in left:
        draw_stacks(panel, {name: f.counts(np.ones(len(f.verdicts), dtype=bool)) for name, f in found.items()}, label)
    scores = {name: (int(f.answers.correct.sum()), len(f.answers.correct)) for name, f in found.items()}
    draw_bars(right, scores, label)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
