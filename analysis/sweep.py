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
import json
import sys
from pathlib import Path

from startup import blas  # noqa: F401  before mlx

from analysis.changes import Answers, answer, mcnemar
from analysis.pictures import draw_bars, save_figure
from analysis.probing import open_checkpoint, require_thoughts
from parallel.streams import use_streams
from utils import UserError, command_parser, exit_status, markdown_table, say, warn, write_text


def main(arguments: list[str]) -> int:
    """Run the command line; returns the exit status."""
    return exit_status(lambda: sweep(parse_args(arguments)))


def parse_args(arguments: list[str]) -> argparse.Namespace:
    parser = command_parser("analysis.sweep", __doc__)
    parser.add_argument("checkpoint", help="a checkpoint folder of a Coconut run, or the run's folder")
    parser.add_argument("data", help="a data set, as for val_path")
    parser.add_argument("--thoughts", type=int, nargs="+", default=list(range(7)), help="default: 0 to 6")
    parser.add_argument("--items", type=int, help="ask the first ITEMS items (default all)")
    parser.add_argument("--tokenizer", help="the vocabulary, where the one that the checkpoint names has moved")
    parser.add_argument("--out", type=Path, default=Path("runs/analysis"), help="folder to write to (runs/analysis)")
    options = parser.parse_args(arguments)
    if min(options.thoughts) < 0 or (options.items is not None and options.items < 1):
        raise UserError("--thoughts: expected 0 or more; --items: expected at least 1")
    return options


def sweep(options: argparse.Namespace) -> None:
    """Ask all items with each number of thoughts, print the table, and write the lines and the picture."""
    use_streams("1")
    probe = open_checkpoint(options.checkpoint, options.tokenizer)
    require_thoughts(probe, options.checkpoint)
    config = probe.curriculum.config
    if not config.uniform_prob:
        warn(f"{options.checkpoint} was trained with uniform_prob 0, so it has seen few numbers of thoughts")
    data = probe.data(options.data)
    count = min(len(data), options.items or len(data))
    numbers = sorted({*options.thoughts, probe.n_thoughts})
    found = {k: answer(probe, data, count, k) for k in numbers}
    say("\n".join(table(found, probe.n_thoughts)))
    settings = {"command": "sweep", "checkpoint": options.checkpoint, "data": options.data, "items": count}
    lines = [json.dumps(settings), *records(found, data)]
    options.out.mkdir(parents=True, exist_ok=True)
    write_text(options.out / "sweep.jsonl", "\n".join(lines) + "\n")
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


def records(found: dict[int, Answers], data) -> list[str]:
    """The lines of sweep.jsonl."""
    return [
        json.dumps({"idx": int(index), "thoughts": k, "text": text, "answer": said, "correct": bool(right)})
        for k, a in found.items()
        for index, text, said, right in zip(data.indices, a.texts, a.answers, a.correct, strict=False)
    ]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
