"""Do the thoughts carry anything? Change them and count the answers: `python -m analysis.controls CHECKPOINT DATA`

    python -m analysis.controls pretrained/graph-coconut pretrained/graph_test.json

Every condition answers the same items. Mode `loop` changes a thought where it is fed back, so later thoughts are
computed from the changed ones; mode `patched` first collects the thoughts of a clean run, changes those, and feeds them
back as they are. `permute` and `transplant` exist in the mode `patched` alone.

    none         the model's own thoughts
    remove       no thoughts at all
    zero         a vector of zeros in each place
    mean         in each place its mean over the items
    latent row   the embedding of <|latent|> in each place, as in an untrained pause
    noise L      plus normal noise of L times the spread of the thought's own components
    permute      the item's own thoughts in another order
    transplant   all thoughts of another item that has another answer

Prints accuracy with its 95 % interval, the exact McNemar p against `none`, and the share of items whose answer changed
(flipped): accuracy alone hides changes. For transplant also how often the answer is the one of the item that gave the
thoughts. Writes controls.jsonl and controls.png.
"""

from startup import settings, signals

if __name__ == "__main__":
    signals.at_once()  # before the slow imports
    settings.own_pictures()

import argparse
import sys
from functools import partial

from startup import blas  # noqa: F401  before mlx

import mlx.core as mx
import numpy as np

from analysis.changes import Answers, Change, answer, mcnemar, records
from analysis.pictures import draw_bars, save_figure
from analysis.probing import Probe, all_thoughts, analysis_parser, open_thinking, write_records
from dataset import Data
from parallel.streams import use_streams
from training.evaluation import read_answer
from utils import UserError, exit_status, markdown_table, say

NOISE = (0.5, 1.0, 5.0, 25.0)


def main(arguments: list[str]) -> int:
    """Run the command line; returns the exit status."""
    return exit_status(lambda: control(parse_args(arguments)))


def parse_args(arguments: list[str]) -> argparse.Namespace:
    parser = analysis_parser("analysis.controls", __doc__)
    parser.add_argument("--mode", choices=("loop", "patched"), default="loop", help="default loop")
    parser.add_argument("--seed", type=int, default=0, help="seed of noise, orders and partners (default 0)")
    options = parser.parse_args(arguments)
    if options.seed < 0 or (options.items is not None and options.items < 2):
        raise UserError("--seed: expected 0 or more; --items: expected at least 2")
    return options


def control(options: argparse.Namespace) -> None:
    """Answer all items under each condition, print the table, and write the lines and the picture."""
    use_streams("1")
    probe = open_thinking(options)
    data = probe.data(options.data)
    count, k = min(len(data), options.items or len(data)), probe.n_thoughts
    clean = all_thoughts(probe, [data.tokens[i] for i in range(count)], k)  # [n, K, D]
    donors = draw_donors([read_answer(example.answer) for example in data.examples[:count]], options.seed)
    changes = conditions(probe, clean, donors, options)
    found = {"none": answer(probe, data, count, k), "remove": answer(probe, data, count, 0)}
    found |= {name: answer(probe, data, count, k, change) for name, change in changes.items()}
    say("\n".join(table(found, donors, data)))
    settings = {name: getattr(options, name) for name in ("checkpoint", "data", "mode", "seed")}
    settings = {"command": "controls", **settings, "items": count}
    write_records(options.out / "controls.jsonl", settings, records(data, found, "condition"))
    with save_figure(options.out / "controls.png", figsize=(9, 3.8)) as figure:
        panel = figure.subplots()
        draw_bars(panel, {name.replace(" ", "\n"): (int(a.correct.sum()), count) for name, a in found.items()}, "")
    say(f"written: {options.out / 'controls.jsonl'}, {options.out / 'controls.png'}")


def conditions(probe: Probe, clean: np.ndarray, donors: np.ndarray, options: argparse.Namespace) -> dict[str, Change]:
    """The changes by name; clean [n, K, D] are the thoughts of an undisturbed run."""
    n, n_thoughts, _ = clean.shape
    row = probe.model.transformer.embed(mx.array([probe.curriculum.tokenizer.latent_id]))[0]  # [D]
    means = mx.array(clean.mean(axis=0))  # [K, D]
    changes: dict[str, Change] = {
        "zero": lambda items, k, thought: mx.zeros_like(thought),
        "mean": lambda items, k, thought: mx.broadcast_to(means[k], thought.shape),
        "latent row": lambda items, k, thought: mx.broadcast_to(row, thought.shape),
        **{f"noise {level:g}": partial(noisy, level=level, seed=options.seed) for level in NOISE},
    }
    if options.mode == "loop":
        return changes
    changes = {name: partial(patched, change=change, clean=clean) for name, change in changes.items()}
    changes["transplant"] = partial(patched, change=None, clean=clean[donors])
    if n_thoughts > 1:
        orders = draw_orders(n, n_thoughts, options.seed)
        changes["permute"] = partial(patched, change=None, clean=np.take_along_axis(clean, orders[:, :, None], axis=1))
    return changes


def noisy(items: np.ndarray, k: int, thought: mx.array, level: float, seed: int) -> mx.array:
    """Each thought plus normal noise of `level` times the standard deviation of its own components.

    The noise is a function of seed, item and place, not of the batch.
    """
    draws = [np.random.default_rng((seed, item, k)).standard_normal(thought.shape[1]) for item in items.tolist()]
    spread = mx.sqrt(mx.var(thought, axis=1, keepdims=True))  # [B, 1]
    return thought + level * spread * mx.array(np.array(draws, dtype=np.float32))


def patched(items: np.ndarray, k: int, thought: mx.array, change: Change | None, clean: np.ndarray) -> mx.array:
    """The recorded thought, changed, in the place of the one that the loop has computed."""
    recorded = mx.array(clean[items, k])  # [B, D]
    return change(items, k, recorded) if change else recorded


def draw_orders(n: int, n_thoughts: int, seed: int) -> np.ndarray:
    """For each item another order of its thoughts [n, K], never the order that they had."""
    rng = np.random.default_rng((seed, 1))
    orders = np.array([rng.permutation(n_thoughts) for _ in range(n)])
    same = (orders == np.arange(n_thoughts)).all(axis=1)
    orders[same] = np.roll(np.arange(n_thoughts), 1)
    return orders


def draw_donors(answers: list[str], seed: int) -> np.ndarray:
    """For each item another one with another answer [n]. Raises UserError where all answers are the same."""
    rng, numbers = np.random.default_rng((seed, 2)), np.arange(len(answers))
    others = [numbers[[other != answer for other in answers]] for answer in answers]
    if not all(map(len, others)):
        raise UserError("transplant: all items have the same answer, so no thoughts can be exchanged")
    return np.array([rng.choice(candidates) for candidates in others])


def table(found: dict[str, Answers], donors: np.ndarray, data: Data) -> list[str]:
    """A Markdown row for each condition."""
    rows, clean = [], found["none"]
    theirs = [read_answer(data.examples[donor].answer) for donor in donors]
    for name, a in found.items():
        flipped = np.mean([one != other for one, other in zip(a.answers, clean.answers, strict=True)])
        p = "" if name == "none" else f"{mcnemar(a.correct, clean.correct):.3g}"
        taken = np.mean([one == other for one, other in zip(a.answers, theirs, strict=True)])
        donor = f"{taken:.3f}" if name == "transplant" else ""
        rows.append([name, a.accuracy(), str(len(a.correct)), p, f"{flipped:.3f}", donor])
    return markdown_table(
        ["thoughts", "accuracy (95 % interval)", "items", "p against none", "flipped", "donor's"], rows
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
