"""Do the thoughts carry anything? Change them and count the answers: `python -m analysis.controls CHECKPOINT DATA`

    python -m analysis.controls pretrained/graph-coconut pretrained/graph_test.json --mode patched

Every condition answers the same items. Mode `loop` changes a thought where it is fed back, so later thoughts are
computed from the changed ones; mode `patched` first collects the thoughts of a clean run, changes those, and feeds them
back as they are. The last two lines exist in the mode `patched` alone.

    none                 the model's own thoughts
    remove               no thoughts at all
    zero                 a vector of zeros in each place
    latent row           the embedding of <|latent|> in each place, as in an untrained pause
    mean by place, item  in each place its mean over the items, or the item's mean over its places
    without place, item, residual    the thought less that part of its variance; residual alone: less the other two
    random of that size  plus a random vector as long as the place's mean is from the mean of all
    noise L              plus normal noise of L times the spread of the thought's own components
    noise only, noise of one size    noise of the thought's own spread, or of one spread for all, without the thought
    permute, swap        the item's own thoughts in another order (10 draws), or with two neighbors exchanged
    transplant           all thoughts of another item that has another answer; any, one with as many steps, one without

Means are over the items of DATA; --means takes them from another set (the training set). --by-place puts noise alone
into the first, the last and each single place. --control answers the same items with a second checkpoint, such as
pauses: what holds for pauses too says nothing about thoughts. A pause is the same vector for every item, so there the
conditions change that vector.

Prints accuracy with its 95 % interval, the exact McNemar p against `none`, and the share of items whose answer changed
(flipped): accuracy alone hides changes. For transplants also how often the answer is the one of the item that gave the
thoughts. Ten orders of one item are not ten items: their interval draws items (bootstrap), and they get no p. Below the
table: the variance of the thoughts by place, item and residual. Writes controls.jsonl and controls.png.
"""

from startup import settings, signals

if __name__ == "__main__":
    signals.at_once()  # before the slow imports
    settings.own_pictures()

import argparse
import sys
from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

from startup import blas  # noqa: F401  before mlx

import mlx.core as mx
import numpy as np

from analysis.beside import Subject, control_parser, open_subjects, say_reports
from analysis.changes import Answers, Change, answer, mcnemar, records
from analysis.conditions import (
    CONDITIONS,
    Clean,
    by_place,
    draw_donors,
    draw_orders,
    draw_swaps,
    exchanged,
    in_loop,
    on_record,
    variance_shares,
)
from analysis.intervals import bootstrap
from analysis.pictures import draw_points, save_figure
from analysis.probing import Probe, all_thoughts, open_thinking, write_records
from dataset import Data
from parallel.streams import use_streams
from training.evaluation import read_answer, wilson
from utils import UserError, exit_status, markdown_table, say

ORDERS = 10  # draws of permute
MOST_FOR_MEANS = 2000  # items of --means


class Measured(NamedTuple):
    """What one model answered under every condition."""

    checkpoint: str
    found: dict[str, list[Answers]]  # one for each draw
    donors: dict[str, np.ndarray]  # of transplants: whose thoughts each item got [n]
    left_out: dict[str, str]  # condition -> why
    variance: tuple[float, float, float] | None


def main(arguments: list[str]) -> int:
    """Run the command line; returns the exit status."""
    return exit_status(lambda: control(parse_args(arguments)))


def parse_args(arguments: list[str]) -> argparse.Namespace:
    parser = control_parser("analysis.controls", __doc__)
    parser.add_argument("--mode", choices=("loop", "patched"), default="loop", help="default loop")
    parser.add_argument("--seed", type=int, default=0, help="seed of noise, orders and partners (default 0)")
    parser.add_argument("--means", help=f"the set whose first {MOST_FOR_MEANS:,} items give the means by place")
    parser.add_argument("--by-place", action="store_true", help="also noise in the first, last and single places")
    options = parser.parse_args(arguments)
    if options.seed < 0 or (options.items is not None and options.items < 2):
        raise UserError("--seed: expected 0 or more; --items: expected at least 2")
    return options


def control(options: argparse.Namespace) -> None:
    """Answer all items under each condition, print the tables, and write the lines and the picture."""
    use_streams("1")
    subjects = open_subjects(options, open_thinking(options))
    measured = [measure(one, options) for one in subjects]
    data, count = subjects[0].data, subjects[0].count
    say_reports(subjects, (report(one, data) for one in measured))
    if options.control:
        say(compare(*measured))
    settings = {name: getattr(options, name) for name in ("checkpoint", "control", "data", "mode", "seed", "means")}
    write_records(
        options.out / "controls.jsonl",
        {"command": "controls", **settings, "items": count},
        lines(measured, data, options.mode),
    )
    points = {
        one.checkpoint: {name: interval(flags(answers)) for name, answers in one.found.items()} for one in measured
    }
    with save_figure(options.out / "controls.png", figsize=(6.4, 1.2 + 0.24 * len(measured[0].found))) as figure:
        draw_points(figure.subplots(), points, f"accuracy, 95 % interval ({count:,} items, mode {options.mode})")
    say(f"written: {options.out / 'controls.jsonl'}, {options.out / 'controls.png'}")


def measure(subject: Subject, options: argparse.Namespace) -> Measured:
    """A subject's items under every condition that exists for its model."""
    path, probe, data, count = subject
    k = probe.n_thoughts
    found = {"none": [answer(probe, data, count, k)]}
    if not k:
        return Measured(path, found, {}, {"all but none": "it was trained without thoughts and pauses"}, None)
    found["remove"] = [answer(probe, data, count, 0)]
    clean = clean_run(probe, data, count, options)
    changes, donors, left_out = conditions(probe, clean, data, options)
    found |= {name: [answer(probe, data, count, k, change) for change in draws] for name, draws in changes.items()}
    return Measured(path, found, donors, left_out, variance_shares(clean.thoughts))


def clean_run(probe: Probe, data: Data, count: int, options: argparse.Namespace) -> Clean:
    """The thoughts of the model's own run; for a model with pauses the pause in every place."""
    row = np.array(probe.model.transformer.embed(mx.array([probe.curriculum.tokenizer.latent_id])).astype(mx.float32))[
        0
    ]
    thoughts = standing(probe, data, count, row)
    if options.means:
        others = probe.data(options.means)
        by_place = standing(probe, others, min(len(others), MOST_FOR_MEANS), row).mean(axis=0)
    else:
        by_place = thoughts.mean(axis=0)
    return Clean(thoughts, by_place, row, options.seed)


def standing(probe: Probe, data: Data, count: int, row: np.ndarray) -> np.ndarray:
    """What stands in the latent places of the first `count` items, [n, K, D]: thoughts, or the pause `row`."""
    if is_pause(probe):
        return np.broadcast_to(row, (count, probe.n_thoughts, len(row)))
    return all_thoughts(probe, [data.tokens[i] for i in range(count)], probe.n_thoughts)


def is_pause(probe: Probe) -> bool:
    return probe.curriculum.method.thought == "pause"


def conditions(
    probe: Probe, clean: Clean, data: Data, options: argparse.Namespace
) -> tuple[dict[str, list[Change]], dict[str, np.ndarray], dict[str, str]]:
    """({name: a change for each draw}, {transplant: donors}, {condition that is left out: why})."""
    n_thoughts = clean.thoughts.shape[1]
    plain = CONDITIONS | (by_place(n_thoughts) if options.by_place else {})
    # A pause takes nothing from the loop, so for pauses both modes change the same vector.
    apply = on_record if options.mode == "patched" or is_pause(probe) else in_loop
    changes = {name: [change] for name, change in apply(plain, clean).items()}
    if options.mode == "loop":
        return changes, {}, {}
    donors, left_out = partners(data, len(clean.thoughts), options.seed)
    changes |= {name: [exchanged(clean, clean.thoughts[chosen])] for name, chosen in donors.items()}
    if n_thoughts == 1:
        return changes, donors, {**left_out, "permute, swap": "there is one thought"}
    return changes | reordered(clean), donors, left_out


def reordered(clean: Clean) -> dict[str, list[Change]]:
    """permute and swap; two thoughts have only one other order."""
    n, n_thoughts, _ = clean.thoughts.shape
    orders = [draw_orders(n, n_thoughts, (clean.seed, 1, i)) for i in range(ORDERS if n_thoughts > 2 else 1)]
    take = partial(np.take_along_axis, clean.thoughts, axis=1)
    swaps = draw_swaps(n, n_thoughts, (clean.seed, 3))
    return {
        "permute": [exchanged(clean, take(indices=order[:, :, None])) for order in orders],
        "swap": [exchanged(clean, take(indices=swaps[:, :, None]))],
    }


def partners(data: Data, count: int, seed: int) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """({transplant: donors [n]}, {transplant that is left out: why})."""
    answers = [read_answer(example.answer) for example in data.examples[:count]]
    same = data.tokens.n_steps[:count, None] == data.tokens.n_steps[None, :count]
    kinds = {"transplant": same | ~same, "transplant, same steps": same, "transplant, other steps": ~same}
    donors, left_out = {}, {}
    for number, (name, allowed) in enumerate(kinds.items()):
        chosen = draw_donors(answers, allowed, (seed, 2, number))
        if chosen is None:
            left_out[name] = "an item has no such partner with another answer"
        else:
            donors[name] = chosen
    return donors, left_out


def flags(draws: list[Answers]) -> np.ndarray:
    """[draws, n] bool: which answers were right."""
    return np.stack([one.correct for one in draws])


def interval(hits: np.ndarray) -> tuple[float, float, float]:
    """(share, low, high) of hits [draws, n]: Wilson; for several draws of the same items the bootstrap over items."""
    if len(hits) > 1 and hits.any() and not hits.all():
        return bootstrap(hits.sum(axis=0), np.full(hits.shape[1], len(hits)))
    return (float(hits.mean()), *wilson(int(hits[0].sum()), hits.shape[1]))  # draws that all agree are one draw


def _shown(hits: np.ndarray) -> str:
    return "{:.3f} ({:.3f} to {:.3f})".format(*interval(hits))


def report(one: Measured, data: Data) -> list[str]:
    """A model's table with a Markdown row for each condition, what was left out, and the variance of its thoughts."""
    clean = one.found["none"][0]
    rows = [[name, *row(draws, clean, _answers_of(one.donors.get(name), data))] for name, draws in one.found.items()]
    rows[0][3] = ""
    head = ["thoughts", "accuracy (95 % interval)", "items", "p against none", "flipped", "donor's"]
    below = [f"left out: {name}, because {why}" for name, why in one.left_out.items()]
    if one.variance:
        below.append("variance of the thoughts: place {:.1f} %, item {:.1f} %, residual {:.1f} %".format(*one.variance))
    return [*markdown_table(head, rows), *below]


def _answers_of(donors: np.ndarray | None, data: Data) -> list[str] | None:
    return None if donors is None else [read_answer(data.examples[donor].answer) for donor in donors]


def row(draws: list[Answers], clean: Answers, theirs: list[str] | None) -> list[str]:
    """Accuracy, items, p, flipped, and for a transplant the share of the donors' answers `theirs`."""
    flipped = np.array([[a != b for a, b in zip(one.answers, clean.answers, strict=True)] for one in draws])
    items = str(flipped.shape[1]) + (f" x {len(draws)}" if len(draws) > 1 else "")
    p = f"{mcnemar(draws[0].correct, clean.correct):.3g}" if len(draws) == 1 else ""
    taken = [[a == b for a, b in zip(one.answers, theirs, strict=True)] for one in draws] if theirs else None
    return [_shown(flags(draws)), items, p, _shown(flipped), _shown(np.array(taken)) if taken else ""]


def compare(one: Measured, other: Measured) -> str:
    """The two models on the same items, each with its own thoughts."""
    p = mcnemar(one.found["none"][0].correct, other.found["none"][0].correct)
    return f"\n{one.checkpoint} against {other.checkpoint}, each with its own thoughts: p {p:.3g}"


def lines(measured: list[Measured], data: Data, mode: str) -> Iterator[dict]:
    """A line of controls.jsonl for each model, condition, draw and item."""
    for one in measured:
        for name, draws in one.found.items():
            for number, answers in enumerate(draws, 1):
                for line in records(data, {name: answers}, "condition"):
                    yield {
                        "checkpoint": one.checkpoint,
                        "mode": mode,
                        **line,
                        **({"draw": number} if len(draws) > 1 else {}),
                    }


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
