"""Force a number of thoughts and see how often the answer is right: `python -m analysis.sweep CHECKPOINT DATA`

    python -m analysis.sweep pretrained/graph-coconut pretrained/graph_test.json --thoughts 0 1 2 3 4 5 6

Every number of thoughts is tried on the same items (section 5.1 of the paper). A model that was trained without mixing
stages (key uniform_prob) has seen few numbers of thoughts, so the others say little about it. Prints a table with 95 %
intervals and the exact McNemar p against the trained number, and writes sweep.jsonl (settings in the first line, then
one line for each item and number) and sweep.png.
"""

from startup import settings, signals

if __name__ == "__main__":
    signals.at_once()  # before the slow imports
    settings.own_pictures()

import argparse
import sys

from startup import blas  # noqa: F401  before mlx

from analysis.changes import Answers, answer, mcnemar, records
from analysis.pictures import draw_bars, save_figure
from analysis.probing import analysis_parser, open_thinking, write_records
from parallel.streams import use_streams
from utils import UserError, exit_status, markdown_table, say, warn


def main(arguments: list[str]) -> int:
    """Run the command line; returns the exit status."""
    return exit_status(lambda: sweep(parse_args(arguments)))


def parse_args(arguments: list[str]) -> argparse.Namespace:
    parser = analysis_parser("analysis.sweep", __doc__)
    parser.add_argument("--thoughts", type=int, nargs="+", default=list(range(7)), help="default: 0 to 6")
    options = parser.parse_args(arguments)
    if min(options.thoughts) < 0 or (options.items is not None and options.items < 1):
        raise UserError("--thoughts: expected 0 or more; --items: expected at least 1")
    return options


def sweep(options: argparse.Namespace) -> None:
    """Ask all items with each number of thoughts, print the table, and write the lines and the picture."""
    use_streams("1")
    probe = open_thinking(options)
    if not probe.curriculum.config.uniform_prob:
        warn(f"{options.checkpoint} was trained with uniform_prob 0, so it has seen few numbers of thoughts")
    data = probe.data(options.data)
    count = min(len(data), options.items or len(data))
    numbers = sorted({*options.thoughts, probe.n_thoughts})
    found = {k: answer(probe, data, count, k) for k in numbers}
    say("\n".join(table(found, probe.n_thoughts)))
    settings = {"command": "sweep", "checkpoint": options.checkpoint, "data": options.data, "items": count}
    write_records(options.out / "sweep.jsonl", settings, records(data, found, "thoughts"))
    with save_figure(options.out / "sweep.png", figsize=(6, 3.6)) as figure:
        bars = {str(k): (int(a.correct.sum()), count) for k, a in found.items()}
        draw_bars(figure.subplots(), bars, f"thoughts (trained: {probe.n_thoughts})")
    say(f"written: {options.out / 'sweep.jsonl'}, {options.out / 'sweep.png'}")


def table(found: dict[int, Answers], trained: int) -> list[str]:
    """A Markdown row for each number of thoughts."""
    rows = [
        [
            str(k),
            a.accuracy(),
            str(len(a.correct)),
            "" if k == trained else f"{mcnemar(a.correct, found[trained].correct):.3g}",
        ]
        for k, a in found.items()
    ]
    return markdown_table(["thoughts", "accuracy (95 % interval)", "items", f"p against {trained}"], rows)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
