"""Where thoughts and answer look: `python -m analysis.attention CHECKPOINT DATA`

    python -m analysis.attention pretrained/graph-coconut pretrained/graph_test.json --item 3

For one item (--item) a map of each layer: rows are the thoughts, the end marker and the tokens of the model's own
answer; columns are the facts of the question (sentences, or edges that end in a semicolon; each the sum over its
tokens), the thoughts, the earlier tokens of the answer, and the row's own place. The mean over the heads is shown;
--head H shows one head and --sum the sum, as arXiv 2505.12514 does. The row of thought k is the place where it is fed
back, which computes thought k + 1; analysis.edges shows which edges that takes, for the whole set.

For the set it prints how much of its attention a place spends on the question, the thoughts and itself, by layer, as a
mean over heads and items. "first token" is the place that predicts the first token of the answer: the end marker, or
without special tokens the last thought. That token is mostly the mark ###, so "answer" is the place of ### behind the
prompt, which predicts the answer itself. Pauses count as thoughts. --control looks at a second checkpoint in the same
way. Writes attention.jsonl (settings in the first line, then the map's rows, then one line for each item, place and
layer) and attention.png.
"""

from startup import settings, signals

if __name__ == "__main__":
    signals.at_once()  # before the slow imports
    settings.own_pictures()

import argparse
import sys
from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

from startup import blas  # noqa: F401  before mlx

import mlx.core as mx
import numpy as np

from analysis.beside import Part, control_parser, open_places, require_item, save, say_reports
from analysis.intervals import bootstrap, mean
from analysis.pictures import draw_cells, draw_lines
from analysis.probing import Probe, facts, open_checkpoint, prompt_batch
from analysis.recording import record, require_gpt2
from coconut import Batch
from dataset import Data, collate
from text.tokens import TokenExample
from utils import Progress, UserError, exit_status, markdown_table

BATCH = 20  # prompts at a time: the weights of a layer take B * H * T * T numbers
PLACES = ("first token", "answer")  # what they predict
KINDS = ("question", "start marker", "thoughts", "behind them", "itself")


class Map(NamedTuple):
    """The attention of one item."""

    rows: list[str]
    columns: list[str]
    weights: np.ndarray  # [L, rows, columns]; a row's sum is 1, or the number of heads after --sum


def masses(probe: Probe, data: Data, count: int, n_thoughts: int) -> dict[str, np.ndarray]:
    """{place of PLACES: [n, L, 5]}: its attention on each of KINDS, mean over heads."""
    curriculum = probe.curriculum
    mark = np.array(curriculum.tokenizer.encode(curriculum.layout.answer_mark.strip()), np.int32)
    behind = {PLACES[0]: mark[:0], PLACES[1]: mark}
    found: dict[str, list[np.ndarray]] = {place: [] for place in PLACES}
    for start in Progress(range(0, count, BATCH), desc="Attention", unit=" batches", leave=False):
        examples = [data.tokens[i] for i in range(start, min(start + BATCH, count))]
        for place, ids in behind.items():
            found[place] += _masses(probe, examples, n_thoughts, ids)
    return {place: np.stack(rows) for place, rows in found.items()}


def _masses(probe: Probe, examples: list[TokenExample], n_thoughts: int, ids: np.ndarray) -> list[np.ndarray]:
    """For each example [L, 5] of the last place of its prompt with `ids` behind it."""
    batch = continued(probe, examples, n_thoughts, ids)
    rows = mx.arange(len(examples))
    weights = record(probe.model, batch).weights
    last = np.array(mx.stack([w[rows, :, batch.last_column].mean(axis=1) for w in weights], axis=1))  # [B, L, T]
    starts, ends = batch.left_padding.tolist(), (batch.last_column + 1).tolist()
    return [
        _by_kind(probe, example, n_thoughts, row[:, start:end])
        for example, row, start, end in zip(examples, last, starts, ends, strict=True)
    ]


def continued(probe: Probe, examples: list[TokenExample], n_thoughts: int, ids: np.ndarray) -> Batch:
    """The prompts of some questions with the same ids behind each."""
    prompts = [probe.curriculum.prompt(example, n_thoughts) for example in examples]
    longer = [prompt._replace(ids=np.concatenate([prompt.ids, ids])) for prompt in prompts]
    return collate(longer, probe.curriculum.tokenizer.eos_id).to_mlx()


def _by_kind(probe: Probe, example: TokenExample, n_thoughts: int, weights: np.ndarray) -> np.ndarray:
    """weights [L, t + 1] of a row's last token t over its tokens -> [L, 5]."""
    last = weights.shape[1] - 1
    question = len(example.question)
    first = question + probe.curriculum.special_tokens
    bounds = np.minimum([0, question, first, first + n_thoughts, last, last + 1], [last] * 5 + [last + 1])
    return np.stack([weights[:, a:b].sum(axis=1) for a, b in pairwise(bounds)], axis=1)


def attention_map(probe: Probe, example: TokenExample, n_thoughts: int, head: int | str = "mean") -> Map:
    """The map of one item after its own greedy answer; head: the number of one, or what to do with all: mean or sum."""
    curriculum = probe.curriculum
    eos_id, limit = curriculum.tokenizer.eos_id, curriculum.config.answer_limit
    answer = probe.model.generate(prompt_batch(probe, [example], n_thoughts), limit, eos_id)[0]
    columns = _columns(probe, example, n_thoughts)
    end = columns[-1][1][-1] + 1  # of the prompt
    answer = answer[: probe.model.transformer.config.n_positions - end]  # its last token may have no position
    batch = continued(probe, [example], n_thoughts, np.array(answer, np.int32))
    own = slice(int(batch.left_padding[0]), int(batch.last_column[0]) + 1)
    weights = mx.stack([w[0, :, own, own] for w in record(probe.model, batch).weights])  # [L, H, length, length]
    chosen = np.array(weights[:, head] if isinstance(head, int) else getattr(weights, head)(axis=1))
    first = len(example.question) + curriculum.special_tokens
    places = range(first, chosen.shape[1])  # thoughts, end marker, answer
    behind = [name for name, tokens in columns if tokens[0] >= first]
    return Map(
        [*behind, *(repr(curriculum.tokenizer.spell(token)) for token in answer)],
        [*(name for name, _ in columns), "answer", "self"],
        np.stack([_row(chosen, place, columns, end) for place in places], axis=1),
    )


def _columns(probe: Probe, example: TokenExample, n_thoughts: int) -> list[tuple[str, list[int]]]:
    """The columns of a map with the places of their tokens: facts, start marker, thoughts, end marker."""
    marked, place = probe.curriculum.special_tokens, len(example.question)
    names = ["start"] * marked + [f"thought {k + 1}" for k in range(n_thoughts)] + ["end"] * marked
    return [*facts(probe, example), *((name, [place + i]) for i, name in enumerate(names))]


def _row(weights: np.ndarray, row: int, columns: list[tuple[str, list[int]]], end: int) -> np.ndarray:
    """[L, columns + 2] of one row of weights [L, length, length]; end: where the prompt ends."""
    elsewhere = weights[:, row].copy()
    elsewhere[:, row] = 0
    sums = [elsewhere[:, places].sum(axis=1) for _, places in columns]
    return np.stack([*sums, elsewhere[:, end:].sum(axis=1), weights[:, row, row]], axis=1)


def table(found: dict[str, np.ndarray]) -> list[str]:
    """A Markdown row for each place and layer, and for all layers together; kinds that never occur are left out."""
    kinds = _kinds(found)
    rows = []
    for place, values in found.items():
        layers = [(str(i + 1), values[:, i]) for i in range(values.shape[1])] + [("all", values.mean(axis=1))]
        rows += [[place, name, *(mean(part[:, KINDS.index(kind)]) for kind in kinds)] for name, part in layers]
    return markdown_table(["predicts", "layer", *kinds], rows)


def _kinds(found: dict[str, np.ndarray]) -> list[str]:
    return [kind for i, kind in enumerate(KINDS) if any(values[..., i].any() for values in found.values())]


def records(data: Data, found: dict[str, np.ndarray], item: int, shown: Map) -> Iterator[dict]:
    """The lines of attention.jsonl behind the settings."""
    for layer, weights in enumerate(shown.weights, 1):
        for row, values in zip(shown.rows, weights, strict=True):
            rounded = [round(float(value), 5) for value in values]
            yield {"map": item, "layer": layer, "row": row, "columns": shown.columns, "weights": rounded}
    for place, items in found.items():
        for index, layers in zip(data.indices, items, strict=False):
            for layer, values in enumerate(layers, 1):
                kinds = {kind: round(float(value), 5) for kind, value in zip(KINDS, values, strict=True)}
                yield {"idx": int(index), "predicts": place, "layer": layer, **kinds}


def part(found: dict[str, np.ndarray], item: int, shown: Map) -> Part:
    """The picture: attention by layer, and below it the maps of the item."""
    n_layers, n_rows, n_columns = shown.weights.shape
    down, height = -(-n_layers // 2), 1.2 + 0.28 * n_rows

    def draw(figure) -> list:
        above, below = figure.subfigures(2, 1, height_ratios=[2.8, down * height])
        for panel, (place, values) in zip(above.subplots(1, 2), found.items(), strict=True):
            draw_masses(panel, values, _kinds(found))
            panel.set_title(f"attention of the place that predicts the {place} ({len(values):,} items)", fontsize=10)
        panels = below.subplots(down, 2, squeeze=False).flat
        for layer, (panel, weights) in enumerate(zip(panels, shown.weights, strict=False), 1):
            draw_map(panel, shown, weights)
            panel.set_title(f"item {item}, layer {layer}", fontsize=10)
        for panel in below.axes[n_layers:]:
            panel.set_axis_off()
        return []

    return Part(4.4 + 0.72 * n_columns, 2.8 + down * height, draw)


def draw_masses(panel, values: np.ndarray, kinds: list[str]) -> None:
    """Mean attention [n, L, 5] by layer with its interval, a line for each kind."""
    ones = np.ones(len(values))
    lines = {
        kind: {
            layer: np.array(bootstrap(values[:, layer - 1, KINDS.index(kind)], ones))[[1, 0, 2]]
            for layer in range(1, values.shape[1] + 1)
        }
        for kind in kinds
    }
    draw_lines(panel, lines, "mean attention")
    panel.set(xlabel="layer", ylim=(0, 1))
    panel.legend(frameon=False, fontsize=8)


def draw_map(panel, shown: Map, weights: np.ndarray) -> None:
    """The map of one layer; weights [rows, columns]."""
    texts = [[f"{w:.1f}" if w >= 0.05 else "" for w in row] for row in weights]
    names = [ascii(name)[1:-1] if len(name) <= 14 else f"{ascii(name)[1:12]}..." for name in shown.columns]
    draw_cells(panel, weights, texts, [ascii(name)[1:-1] for name in shown.rows], names)
    panel.tick_params(axis="x", rotation=90)


def main(arguments: list[str]) -> int:
    """Run the command line; returns the exit status."""
    return exit_status(lambda: run(parse_args(arguments)))


def parse_args(arguments: list[str]) -> argparse.Namespace:
    parser = control_parser("analysis.attention", __doc__)
    parser.add_argument("--item", type=int, default=0, help="the item whose maps are drawn (default 0)")
    heads = parser.add_mutually_exclusive_group()
    heads.add_argument("--head", type=int, help="show this head, from 0 (default: the mean over all)")
    heads.add_argument("--sum", action="store_true", help="show the sum over all heads")
    options = parser.parse_args(arguments)
    if options.items is not None and options.items < 1:
        raise UserError(f"--items {options.items}: expected at least 1")
    return options


def run(options: argparse.Namespace) -> None:
    """Measure, print the table, and write the lines and the picture."""
    subjects = open_places(options, open_checkpoint(options.checkpoint, options.tokenizer))
    for one in subjects:
        require_gpt2(one.probe.model, one.path)
    n_heads = min(one.probe.model.transformer.config.n_head for one in subjects)
    if options.head is not None and not 0 <= options.head < n_heads:
        raise UserError(f"--head {options.head}: expected 0 to {n_heads - 1}, the heads of this model")
    require_item(subjects, options.item)
    over_heads = options.head if options.head is not None else "sum" if options.sum else "mean"
    n_thoughts, place = subjects[0].probe.n_thoughts, subjects[0].indices.index(options.item)
    found = [masses(one.probe, one.data, one.count, n_thoughts) for one in subjects]
    shown = [attention_map(one.probe, one.data.tokens[place], n_thoughts, over_heads) for one in subjects]
    say_reports(subjects, map(table, found))
    told = {"heads in the map": over_heads, "thoughts": n_thoughts}
    both = list(zip(found, shown, strict=True))
    lines = [records(one.data, own, options.item, maps) for one, (own, maps) in zip(subjects, both, strict=True)]
    parts = [part(own, options.item, maps) for own, maps in both]
    save(subjects, options.out / "attention", told, lines, parts)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
