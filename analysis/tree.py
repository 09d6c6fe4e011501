"""How a model weighs the nodes of its search tree: `python -m analysis.tree CHECKPOINT DATA`

    python -m analysis.tree pretrained/graph-coconut pretrained/graph_test.json --item 3

After k thoughts the model is made to go on with a written step (`Every` in ProsQA's sentences, nothing in data whose
steps begin with a name). The value of a node is the probability of its name there, the product over the name's tokens
(section 5.3 of the paper, figures 7 to 9). Candidates are the nodes that such a step would name first: those as many
edges away from the root as steps are done. A node is right if the target can be reached from it. The probability of the
lead (`Every`) is printed apart: where it is near 0, the values describe a text that the model would not write.

The height of a node is its distance to a leaf. The paper's text and caption disagree about which, and neither gives its
figure; --height search (default) is the longest path along edges that lead one edge farther from the root, which does.

Prints means with bootstrap intervals, over all items and without those that have one candidate, and means by height
with the number of nodes; writes tree.jsonl (settings in the first line, then one line for each item and k) and tree.png
(the tree of one item, values by percentile, values by height). --control looks at a second checkpoint in the same way.
"""

from startup import settings, signals

if __name__ == "__main__":
    signals.at_once()  # before the slow imports
    settings.own_pictures()

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from startup import blas  # noqa: F401  before mlx

import mlx.core as mx
import numpy as np

from analysis.beside import Part, Subject, control_parser, open_places, require_item, save, say_reports
from analysis.classes import TextForm, find_form
from analysis.graphs import HEIGHTS, Graph, read_graphs
from analysis.intervals import bootstrap, mean, share
from analysis.pictures import draw_lines, draw_shares, draw_tree
from analysis.probing import Probe, open_thinking, require_room, warn_if_unmixed
from coconut import Batch
from dataset import Data, TrainingSequence, collate
from parallel.streams import use_streams
from utils import Progress, UserError, exit_status, markdown_table

TOP = 3
BATCH = 25  # prompts at a time: each candidate has a copy of its prompt's cache, 27 MB on ProsQA with GPT-2


@dataclass(frozen=True)
class Valued:
    """The candidates of one item after some thoughts."""

    index: int  # of the item in the file
    n_thoughts: int
    lead: float  # probability of the step's first words
    values: dict[str, float]  # {candidate: value}
    graph: Graph

    @cached_property
    def right(self) -> set[str]:
        """The candidates that lead to the target."""
        return set(self.graph.distances_to_target()) & set(self.values)

    @cached_property
    def sorted(self) -> list[float]:
        """The TOP largest values, the largest first, zeros where there are fewer candidates."""
        return (sorted(self.values.values(), reverse=True) + [0.0] * TOP)[:TOP]

    @property
    def best_is_right(self) -> bool:
        return max(self.values, key=self.values.__getitem__) in self.right

    @property
    def entropy(self) -> float:
        """Of the normalized values, as a share of that of equal ones; 0 for one candidate."""
        p = np.array(list(self.values.values())) / max(sum(self.values.values()), 1e-45)
        return float(-(p * np.log(np.maximum(p, 1e-45))).sum() / np.log(len(p))) if len(p) > 1 else 0.0

    def record(self) -> dict:
        """A line of tree.jsonl."""
        heights = {kind: self.graph.heights(kind) for kind in HEIGHTS}
        candidates = {
            node: {"value": round(value, 6), "right": node in self.right}
            | {f"height_{kind}": own[node] for kind, own in heights.items()}
            for node, value in self.values.items()
        }
        return {"idx": self.index, "thoughts": self.n_thoughts, "p_lead": round(self.lead, 6), "nodes": candidates}


def name_probabilities(
    probe: Probe, prompts: list[TrainingSequence], n_lead: int, names: list[list[list[int]]]
) -> tuple[np.ndarray, list[np.ndarray]]:
    """(probability of the last n_lead tokens of each prompt [B], for each prompt those of its names behind it).

    names: for each prompt some names as token ids. Every prompt is computed once; the tokens of its names go through
    copies of its cache.
    """
    batch = collate(prompts, probe.curriculum.tokenizer.eos_id).to_mlx()
    hidden, cache = probe.model.think(batch)  # [B, T, D]
    rows, items = mx.arange(len(prompts)), [i for i, own in enumerate(names) for _ in own]
    tokens, lengths = _padded([ids for own in names for ids in own])  # [R, L], [R]
    first = _log_shares(probe, hidden[rows, batch.last_column])  # [B, vocabulary]
    total = first[mx.array(items), tokens[:, 0]]  # [R]
    for place, shares in enumerate(_behind(probe, batch, cache, mx.array(items), tokens), 1):
        own = shares[mx.arange(len(items)), tokens[:, place]]
        total = total + mx.where(lengths > place, own, 0.0)
    found = np.split(np.exp(np.array(total, dtype=np.float64)), np.cumsum([len(own) for own in names])[:-1])
    return _lead(probe, batch, hidden, n_lead), found


def _behind(probe: Probe, batch: Batch, cache: list, items: mx.array, tokens: mx.array) -> Iterator[mx.array]:
    """Log-probabilities [R, vocabulary] after 1, 2, ... tokens of each name [R, L] behind its item's prompt."""
    columns, transformer = cache[0].columns, probe.model.transformer
    columns.end_prompt(batch.last_column - batch.left_padding + 1)
    columns.select(items)
    for layer in cache:
        layer.select(items)
    for place in range(tokens.shape[1] - 1):
        columns.append_token()
        yield _log_shares(probe, transformer(transformer.embed(tokens[:, place : place + 1]), cache)[:, 0])


def _lead(probe: Probe, batch: Batch, hidden: mx.array, n_lead: int) -> np.ndarray:
    """Probability of the last n_lead tokens of each row [B]."""
    rows, total = mx.arange(len(hidden)), mx.zeros(len(hidden))
    for back in range(n_lead):
        column = batch.last_column - back
        total = total + _log_shares(probe, hidden[rows, column - 1])[rows, batch.input_ids[rows, column]]
    return np.exp(np.array(total, dtype=np.float64))


def _log_shares(probe: Probe, states: mx.array) -> mx.array:
    """Log-probabilities of the next token [B, vocabulary] behind states [B, D]."""
    logits = probe.model.transformer.logits(states).astype(mx.float32)
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)


def _padded(names: list[list[int]]) -> tuple[mx.array, mx.array]:
    """Token ids [R, L], zeros behind a name's end, and lengths [R]."""
    lengths = np.array([len(ids) for ids in names])
    tokens = np.zeros((len(names), lengths.max()), np.int32)
    for row, ids in zip(tokens, names, strict=True):
        row[: len(ids)] = ids
    return mx.array(tokens), mx.array(lengths)


def evaluate(probe: Probe, data: Data, graphs: list[Graph], form: TextForm, n_thoughts: int) -> list[Valued]:
    """The values of every item's candidates after n_thoughts thoughts; items without a candidate are left out.

    graphs: those of the first items of the data.
    """
    curriculum, encode = probe.curriculum, probe.curriculum.tokenizer.encode
    depth = n_thoughts // curriculum.thoughts_per_step + form.first_depth
    lead = np.array(encode(form.lead), np.int32)
    candidates = [[n for n, d in graph.distances(graph.root).items() if d == depth] for graph in graphs]
    asked = [i for i, own in enumerate(candidates) if own]
    found = []
    bar = Progress(range(0, len(asked), BATCH), desc=f"Values, {n_thoughts} thoughts", unit=" batches", leave=False)
    for chosen in (asked[start : start + BATCH] for start in bar):
        prompts = [curriculum.prompt(data.tokens[i], n_thoughts) for i in chosen]
        prompts = [prompt._replace(ids=np.concatenate([prompt.ids, lead])) for prompt in prompts]
        names = [[encode(form.before_name + node) for node in candidates[i]] for i in chosen]
        leads, values = name_probabilities(probe, prompts, len(lead), names)
        for i, p, own in zip(chosen, leads.tolist(), values, strict=True):
            by_node = dict(zip(candidates[i], own.tolist(), strict=True))
            found.append(Valued(int(data.indices[i]), n_thoughts, p, by_node, graphs[i]))
    return found


def table(found: dict[int, list[Valued]]) -> list[str]:
    """Means with intervals, a Markdown row for each number of thoughts: all items, and those with a choice."""
    rows = []
    for k, own in found.items():
        several = [v for v in own if len(v.values) > 1]
        for name, items in {"all": own, "2 or more": several if len(several) < len(own) else []}.items():
            if not items:
                continue
            numbers = [
                [v.lead for v in items], [sum(v.values.values()) for v in items],
                [sum(v.values[node] for node in v.right) for v in items],
                *([v.sorted[place] for v in items] for place in range(TOP)),
                [v.sorted[0] - v.sorted[1] for v in items], [v.entropy for v in items],
            ]  # fmt: skip
            right = share(sum(v.best_is_right for v in items), len(items))
            rows.append([str(k), name, *(mean(values).rpartition(" of ")[0] for values in numbers), right])
    head = ["p of the lead", "all candidates", "right ones", "1st", "2nd", "3rd", "1st - 2nd", "entropy"]
    return markdown_table(["thoughts", "candidates", *head, "1st is right"], rows)


def height_table(found: dict[int, list[Valued]], kind: str) -> list[str]:
    """The mean value of right and wrong nodes of each height, a Markdown row for each number of thoughts and height."""
    rows = []
    for k, own in found.items():
        groups = by_height(own, kind)
        for height in sorted({height for cells in groups.values() for height in cells}):
            cells = [groups[name].get(height, np.zeros((2, len(own)))) for name in groups]
            rows.append([str(k), str(height), *(mean(sums, counts.astype(int)) for sums, counts in cells)])
    return markdown_table(["thoughts", f"height ({kind})", "right nodes", "wrong nodes"], rows)


def part(found: dict[int, list[Valued]], options: argparse.Namespace) -> Part:
    """The picture: the tree of one item, and below it a column for each number of thoughts."""
    shown = {k: v for k, own in found.items() for v in own if v.index == options.item}
    depths = [depth for v in shown.values() for depth in v.graph.distances(v.graph.root).values()]
    columns, rows = max(depths, default=0) + 1, max(map(depths.count, depths), default=0) / max(len(shown), 1)
    height = 7.4 + 0.4 * rows

    def draw(figure) -> list:
        above, below = figure.subfigures(2, 1, height_ratios=[height - 6.6, 6.6])
        if shown:
            draw_item(above.subplots(), shown)
        percentiles, heights = below.subplots(2, len(found), squeeze=False)
        for column, (k, own) in enumerate(found.items()):
            draw_shares(percentiles[column], curves(own))
            percentiles[column].set_title(f"{k} thought{'s' * (k != 1)}", fontsize=10)
            draw_lines(heights[column], _spreads(by_height(own, options.height)), "mean value")
            heights[column].set(xlabel=f"height ({options.height})", ylim=(0, None))
            heights[column].legend(frameon=False, fontsize=8)
        return list(heights)

    return Part(max(3.6 * len(found), 1.5 * columns), height, draw)


def draw_item(panel, shown: dict[int, Valued]) -> None:
    """The tree of one item; each number of thoughts has given the values of one depth."""
    graph, values, heads = next(iter(shown.values())).graph, {}, {}
    for k, valued in shown.items():
        values |= valued.values
        heads[graph.distances(graph.root)[next(iter(valued.values))]] = f"{k} thought{'s' * (k != 1)}"
    draw_tree(panel, graph, values, heads)
    panel.set_title(f"item {next(iter(shown.values())).index}: {graph.root} to {graph.target}", fontsize=10)


def curves(found: list[Valued]) -> dict[str, np.ndarray]:
    """{name: sums of the 1, 2 and 3 largest values of every item, each sorted on its own} (paper, figure 8)."""
    sums = np.cumsum([v.sorted for v in found], axis=1)  # [items, TOP]
    names = ["top 1", *(f"top 1 to {n}" for n in range(2, TOP + 1))]
    return {name: np.sort(column) for name, column in zip(names, sums.T, strict=True)}


def by_height(found: list[Valued], kind: str) -> dict[str, dict[int, np.ndarray]]:
    """{right or wrong: {height: [2, items], the sum of each item's values and how many they are}} (paper, figure 9)."""
    groups: dict[str, dict[int, np.ndarray]] = {"right": {}, "wrong": {}}
    for item, v in enumerate(found):
        heights = v.graph.heights(kind)
        for node, value in v.values.items():
            cells = groups["right" if node in v.right else "wrong"]
            cells.setdefault(heights[node], np.zeros((2, len(found))))[:, item] += value, 1
    return groups


def _spreads(groups: dict[str, dict[int, np.ndarray]]) -> dict[str, dict[int, np.ndarray]]:
    """{name, with its number of nodes: {height: [low, mean, high]}}."""
    found = {}
    for name, cells in groups.items():
        means = {height: bootstrap(*cells[height]) for height in sorted(cells)}
        n = int(sum(counts.sum() for _, counts in cells.values()))
        found[f"{name} ({n:,} nodes)"] = {h: np.array([low, middle, high]) for h, (middle, low, high) in means.items()}
    return {name: points for name, points in found.items() if points}


def main(arguments: list[str]) -> int:
    """Run the command line; returns the exit status."""
    return exit_status(lambda: tree(parse_args(arguments)))


def parse_args(arguments: list[str]) -> argparse.Namespace:
    parser = control_parser("analysis.tree", __doc__)
    parser.add_argument("--thoughts", type=int, nargs="+", help="default: all with candidates, up to the trained one")
    parser.add_argument("--item", type=int, default=0, help="the item whose tree is drawn (default 0)")
    parser.add_argument("--height", choices=HEIGHTS, default=HEIGHTS[0], help=f"default {HEIGHTS[0]}")
    options = parser.parse_args(arguments)
    if min(options.thoughts or [0]) < 0 or (options.items is not None and options.items < 1):
        raise UserError("--thoughts: expected 0 or more; --items: expected at least 1")
    return options


def tree(options: argparse.Namespace) -> None:
    """Value the candidates after each number of thoughts, print the table, and write the lines and the picture."""
    use_streams("1")
    probe = open_thinking(options)
    warn_if_unmixed(probe, options.checkpoint)
    subjects = open_places(options, probe)
    require_item(subjects, options.item)
    found = [measure(one, options) for one in subjects]
    say_reports(subjects, ([*table(own), "", *height_table(own, options.height)] for own in found))
    lines = [[v.record() for values in own.values() for v in values] for own in found]
    save(subjects, options.out / "tree", {"height": options.height}, lines, [part(own, options) for own in found])


def measure(subject: Subject, options: argparse.Namespace) -> dict[int, list[Valued]]:
    """{number of thoughts: the values of every item}, for those after which items have candidates."""
    _, probe, data, count = subject
    graphs = read_graphs(data.path)
    graphs = [graphs[index] for index in subject.indices]
    form = find_form([e.steps for e in data.examples[:count]], graphs, probe.curriculum.layout.separator)
    if form is None:
        raise UserError(f"{data.path}: its steps are no paths in a form that can be read, so nodes have no values")
    per_step = probe.curriculum.thoughts_per_step
    steps = range(1 - form.first_depth, probe.n_thoughts // per_step + 1 - form.first_depth)
    numbers = sorted(set(options.thoughts or [step * per_step for step in steps]))
    if numbers[0] // per_step + form.first_depth < 1:
        raise UserError(
            f"--thoughts {numbers[0]}: the first step of its {form.name} begins with the root; expected more"
        )
    require_room(probe, data, numbers[-1], n_more=20)
    found = {k: own for k in numbers if (own := evaluate(probe, data, graphs, form, k))}
    if not found:
        raise UserError(f"--thoughts {numbers}: no item has a node that far away from its root")
    return found


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
