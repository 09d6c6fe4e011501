"""Which edges a thought looks at while it is computed: `python -m analysis.edges CHECKPOINT DATA`

    python -m analysis.edges pretrained/graph-coconut pretrained/graph_test.json

After n thoughts the last place computes thought n + 1. The weight of an edge is the attention of that place in the last
layer, summed over the heads and over the tokens of the edge (source, target and the separator behind it), as in arXiv
2505.12514. Edges are grouped by their source: not reachable from the root within n edges; reachable; frontier (the end
of a walk of exactly n edges); optimal (frontier, and the target is the next node of a shortest path). These groups are
nested, each holds the next, so the table has their differences too: reachable only, and frontier only. Means are over
edges; their intervals draw items again, because edges of one item share one sum.

It also prints how much the separator of an edge looks at its own source and target in the first layer: whether that
layer gathers edges (2505.12514, section 4). --control looks at a second checkpoint in the same way: in a model with
pauses, at the places in which Coconut computes its thoughts.

This is a command of its own, and not part of analysis.frontier, because it looks at the edges of the question while
thoughts are made, with a run for each number of thoughts; frontier looks at nodes in finished thoughts. Writes
edges.jsonl (settings in the first line, then one line for each item and step) and edges.png.
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

from analysis.beside import Part, control_parser, open_places, save, say_reports
from analysis.graphs import Graph, read_graphs
from analysis.intervals import bootstrap, mean
from analysis.pictures import draw_lines
from analysis.probing import Probe, facts, open_thinking, prompt_batch
from analysis.recording import record, require_gpt2
from dataset import Data
from text.tokens import TokenExample
from utils import Progress, UserError, exit_status, markdown_table

BATCH = 50  # prompts at a time
NESTED = ("not reachable", "reachable", "frontier", "optimal")
GROUPS = (*NESTED, "reachable only", "frontier only")  # the last two are what the next group leaves of the one before
BETWEEN = ">"  # stands between source and target in preprocessing/prosqa.py's wording; belongs to neither


class Looked(NamedTuple):
    """Where the place that computes one thought of one item looks."""

    index: int  # of the item in the file
    step: int  # the thought that is computed, from 1
    weights: dict[int, float]  # number of the edge in the graph -> attention
    groups: dict[str, list[int]]  # numbers of the edges in each group
    gathered: list[float]  # first layer: of each edge's separator on its own source and target, mean over heads
    even: list[float]  # the same, where each separator looked at all places up to itself alike

    def record(self) -> dict:
        """A line of edges.jsonl: n and sum by group."""
        sums = {name: round(sum(self.weights[e] for e in edges), 5) for name, edges in self.groups.items()}
        counts = {name: len(edges) for name, edges in self.groups.items()}
        return {"idx": self.index, "step": self.step, "n": counts, "sum": sums}


def edge_groups(graph: Graph, n: int, edges: list[int]) -> dict[str, list[int]]:
    """The numbers of edges by GROUPS, seen from a place that has n thoughts before it."""
    ends = graph.walk_ends(n)
    frontier, reached = ends[-1], set().union(*ends)
    path, depths = graph.path_nodes(), graph.distances(graph.root)
    found: dict[str, list[int]] = {group: [] for group in GROUPS}
    for number in edges:
        source, target = graph.edges[number]
        optimal = source in frontier and target in path and depths[target] == n + 1
        belongs = (source not in reached, source in reached, source in frontier, optimal)
        for group, inside in zip(NESTED, belongs, strict=True):
            found[group] += [number] * inside
        found["reachable only"] += [number] * (belongs[1] and not belongs[2])
        found["frontier only"] += [number] * (belongs[2] and not optimal)
    return found


def edge_tokens(probe: Probe, example: TokenExample, graph: Graph, where: str) -> dict[int, list[int]]:
    """{number of an edge: the places of its source, target and separator}, in the order of the question.

    An edge without a separator behind it (the last one in preprocessing/prosqa.py's wording) is left out, as in
    2505.12514. Raises UserError where the question does not begin with the item's edges.
    """
    found, tokenizer = {}, probe.curriculum.tokenizer
    for number, ((text, places), edge) in enumerate(zip(facts(probe, example), graph.edges, strict=False)):
        if text.rstrip(";").split("?")[0] not in ("".join(edge), BETWEEN.join(edge)):
            raise UserError(f"{where}: expected edge {''.join(edge)!r} or {BETWEEN.join(edge)!r}, found {text!r:.40}")
        if text.endswith(";"):
            found[number] = [place for place in places if tokenizer.spell(int(example.question[place])) != BETWEEN]
    if len(found) < len(graph.edges) - 1:
        raise UserError(f"{where}: its question does not list its {len(graph.edges)} edges with a `;` behind each")
    return found


def measure(probe: Probe, data: Data, count: int) -> list[Looked]:
    """Every thought of the first `count` items."""
    graphs, found = read_graphs(data.path), []
    for n in range(probe.n_thoughts):
        for start in Progress(range(0, count, BATCH), desc=f"Thought {n + 1}", unit=" batches", leave=False):
            items = range(start, min(start + BATCH, count))
            found += list(_looked(probe, data, graphs, items, n))
    return sorted(found)


def _looked(probe: Probe, data: Data, graphs: list[Graph], items: range, n: int) -> Iterator[Looked]:
    """The places of some items that have n thoughts before them."""
    batch = prompt_batch(probe, [data.tokens[i] for i in items], n)
    weights = record(probe.model, batch).weights
    rows = mx.arange(len(items))
    # The last latent computes thought n + 1; thought 1 the start marker, or without special tokens the question's end.
    thinking = batch.last_column - probe.curriculum.special_tokens  # in front of the end marker
    last = np.array(weights[-1][rows, :, thinking].sum(axis=1))  # [B, T], heads summed
    first = np.array(weights[0].mean(axis=1))  # [B, T, T]
    for row, i in enumerate(items):
        index, padding = int(data.indices[i]), int(batch.left_padding[row])
        tokens = edge_tokens(probe, data.tokens[i], graphs[index], f"{data.path}: item {index}")
        own = {edge: [padding + place for place in places] for edge, places in tokens.items()}
        sums = {edge: float(last[row, places].sum()) for edge, places in own.items()}
        gathered = [float(first[row, places[-1], places[:-1]].sum()) for places in own.values()]
        even = [(len(places) - 1) / (places[-1] + 1) for places in tokens.values()]
        step = n // probe.curriculum.thoughts_per_step
        yield Looked(index, n + 1, sums, edge_groups(graphs[index], step, list(own)), gathered, even)


def by_step(looked: list[Looked]) -> dict[int, list[Looked]]:
    """{step: that step of every item}."""
    found: dict[int, list[Looked]] = {}
    for one in looked:
        found.setdefault(one.step, []).append(one)
    return dict(sorted(found.items()))


def sums_of(looked: list[Looked], group: str) -> tuple[list[float], list[int]]:
    """For each item the sum over a group's edges, and how many they are."""
    edges = [one.groups[group] for one in looked]
    return [sum(one.weights[e] for e in own) for one, own in zip(looked, edges, strict=True)], list(map(len, edges))


def table(looked: list[Looked]) -> list[str]:
    """A Markdown row for each step."""
    rows = [[str(step), *(mean(*sums_of(those, group)) for group in GROUPS)] for step, those in by_step(looked).items()]
    return markdown_table(["thought", *GROUPS], rows)


def gathered(looked: list[Looked]) -> str:
    """The attention of separators on their own edge in the first layer; it does not depend on thoughts."""
    first = by_step(looked)[1]
    counts = [len(one.gathered) for one in first]
    found, even = mean([sum(one.gathered) for one in first], counts), mean([sum(one.even) for one in first], counts)
    return f"first layer, an edge's separator on its own source and target: {found}; spread evenly it were {even}"


def draw(figure, looked: list[Looked]) -> list:
    """The nested groups and the disjoint ones: mean by step with its interval."""
    panels = figure.subplots(1, 2, sharey=True)
    disjoint = ("not reachable", "reachable only", "frontier only", "optimal")
    for panel, groups, title in zip(panels, (NESTED, disjoint), ("nested groups", "disjoint groups"), strict=True):
        lines: dict[str, dict[int, np.ndarray]] = {group: {} for group in groups}
        for step, those in by_step(looked).items():
            for group in groups:
                sums, counts = sums_of(those, group)
                if sum(counts):
                    lines[group][step] = np.array(bootstrap(np.array(sums), np.array(counts)))[[1, 0, 2]]
        draw_lines(panel, {group: points for group, points in lines.items() if points}, "attention to an edge")
        panel.set(title=title, ylim=(0, None))
        panel.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    return list(panels)


def main(arguments: list[str]) -> int:
    """Run the command line; returns the exit status."""
    return exit_status(lambda: run(parse_args(arguments)))


def parse_args(arguments: list[str]) -> argparse.Namespace:
    options = control_parser("analysis.edges", __doc__).parse_args(arguments)
    if options.items is not None and options.items < 1:
        raise UserError(f"--items {options.items}: expected at least 1")
    return options


def run(options: argparse.Namespace) -> None:
    """Measure, print the table, and write the lines and the picture."""
    subjects = open_places(options, open_thinking(options))
    for one in subjects:
        require_gpt2(one.probe.model, one.path)
    found = [measure(one.probe, one.data, one.count) for one in subjects]
    say_reports(subjects, ([*table(looked), gathered(looked)] for looked in found))
    lines = [[one.record() for one in looked] for looked in found]
    parts = [Part(10, 3.4, partial(draw, looked=looked)) for looked in found]
    save(subjects, options.out / "edges", {}, lines, parts)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
