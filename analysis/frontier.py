"""Which nodes of its graph each thought holds: `python -m analysis.frontier CHECKPOINT DATA`

    python -m analysis.frontier pretrained/graph-coconut pretrained/graph_test.json

A thought is compared with the embedding of every node of the item's graph (inner product; for GPT-2 that is the node's
logit). If thoughts search breadth-first, thought k is close to all nodes k edges away from the root, its frontier, and
far from the others (arXiv 2505.12514). Prints a table, and writes frontier.jsonl (settings in the first line, then one
line for each item and thought) and frontier.png. --control looks at a second checkpoint in the same way: in a model
with pauses, at the states in the places where Coconut's thoughts are.
"""

from startup import settings, signals

if __name__ == "__main__":
    signals.at_once()  # before the slow imports
    settings.own_pictures()

import argparse
import sys
from collections import defaultdict
from dataclasses import dataclass
from functools import cached_property

from startup import blas  # noqa: F401  before mlx

import numpy as np

from analysis.beside import Part, control_parser, open_places, require_item, save, say_reports
from analysis.graphs import GROUPS, Graph, read_graphs
from analysis.pictures import draw_heat_map, draw_thought
from analysis.probing import Probe, all_thoughts, logits, open_thinking
from dataset import Data
from utils import UserError, exit_status, markdown_table

UNREACHABLE = -1  # as a distance from the root


@dataclass(frozen=True)
class Held:
    """What one thought of one item holds."""

    index: int  # of the item in the file
    thought: int  # from 1
    distance: int  # edges from the root to the thought's frontier
    products: dict[str, float]  # node -> inner product of the thought with its embedding
    graph: Graph

    @cached_property
    def groups(self) -> dict[str, list[str]]:
        """The nodes of each group of GROUPS."""
        return self.graph.groups(self.distance)

    @cached_property
    def depths(self) -> dict[str, int]:
        """Edges from the root to each node that can be reached."""
        return self.graph.distances(self.graph.root)

    @property
    def recall(self) -> float | None:
        """The share of the frontier among as many nodes with the largest products; None for an empty frontier."""
        frontier = self.groups["frontier"]
        largest = sorted(self.products, key=self.products.__getitem__, reverse=True)[: len(frontier)]
        return len(set(largest) & set(frontier)) / len(frontier) if frontier else None

    def record(self) -> dict:
        """A line of frontier.jsonl."""
        rounded = {node: round(value, 4) for node, value in self.products.items()}
        return {
            "idx": self.index, "thought": self.thought, "distance": self.distance, "products": rounded,
            "groups": self.groups, "depths": self.depths, "recall": self.recall,
        }  # fmt: skip


def measure(probe: Probe, data: Data, count: int) -> list[Held]:
    """Compare the thoughts of the first `count` items with the nodes of their graphs."""
    graphs, indices = read_graphs(data.path), data.indices[:count].tolist()
    states = all_thoughts(probe, [data.tokens[i] for i in range(count)], probe.n_thoughts)  # [n, K, D]
    products = logits(probe, states)  # [n, K, vocabulary]
    return [
        hold(index, graphs[index], number, row, probe)
        for index, rows in zip(indices, products, strict=True)
        for number, row in enumerate(rows, 1)
    ]


def hold(index: int, graph: Graph, number: int, row: np.ndarray, probe: Probe) -> Held:
    """One thought of one item; row [vocabulary] has its inner product with every token's embedding."""
    distance = (number - 1) // probe.curriculum.thoughts_per_step + 1
    products = {node: float(row[token_of(node, probe)]) for node in graph.nodes}
    return Held(index, number, distance, products, graph)


def token_of(node: str, probe: Probe) -> int:
    """The id of a node's name. Raises UserError where the vocabulary splits it: it then has no embedding of its own."""
    ids = probe.curriculum.tokenizer.encode(node)
    if len(ids) != 1:
        raise UserError(
            f"node {node!r} is {len(ids)} tokens; this analysis needs a vocabulary with a token for each node"
        )
    return ids[0]


def by_group(held: list[Held]) -> dict[int, dict[str, list[float]]]:
    """{thought: {group: the products of its nodes, all items together}}."""
    found: dict[int, dict[str, list[float]]] = {}
    for h in held:
        groups = found.setdefault(h.thought, {group: [] for group in GROUPS})
        for group, nodes in h.groups.items():
            groups[group] += [h.products[node] for node in nodes]
    return found


def by_distance(held: list[Held]) -> dict[int, dict[int, list[float]]]:
    """{thought: {distance from the root, or UNREACHABLE: the products of the nodes there}}."""
    found: dict[int, dict[int, list[float]]] = {}
    for h in held:
        distances = found.setdefault(h.thought, defaultdict(list))
        for node, product in h.products.items():
            distances[h.depths.get(node, UNREACHABLE)].append(product)
    return found


def frontiers(held: list[Held]) -> dict[int, int]:
    """{thought: edges from the root to its frontier}."""
    return {h.thought: h.distance for h in held}


def table(held: list[Held]) -> list[str]:
    """The mean product of each group and the recall of the frontier, a Markdown row for each thought."""
    rows = []
    for number, groups in by_group(held).items():
        found = [h.recall for h in held if h.thought == number and h.recall is not None]
        rows.append([str(number), *map(_mean, groups.values()), _mean(found)])
    return markdown_table(["thought", *GROUPS, "frontier found"], rows)


def _mean(values: list[float]) -> str:
    return f"{np.mean(values):.2f} ({len(values):,})" if values else "none"


def part(held: list[Held], item: int) -> Part:
    """The picture: the heat map of all items, and below it each thought on the graph of one item."""
    own = [h for h in held if h.index == item]
    graph = own[0].graph

    def draw(figure) -> list:
        above, below = figure.subfigures(2, 1, height_ratios=[1, 1.35])
        draw_heat_map(above.subplots(), by_distance(held), frontiers(held))
        below.suptitle(f"item {item}: {graph.root} to {graph.target}", fontsize=10)
        panels = below.subplots(1, len(own), squeeze=False)[0]
        largest = max(value for h in own for value in h.products.values())
        for panel, h in zip(panels, own, strict=True):
            draw_thought(panel, graph, h, largest)
        return []

    return Part(3.1 * max(3, len(own)), 6.6, draw)


def main(arguments: list[str]) -> int:
    """Run the command line; returns the exit status."""
    return exit_status(lambda: run(parse_args(arguments)))


def parse_args(arguments: list[str]) -> argparse.Namespace:
    parser = control_parser("analysis.frontier", __doc__)
    parser.add_argument("--item", type=int, default=0, help="the item whose graph is drawn (default 0)")
    options = parser.parse_args(arguments)
    if options.items is not None and options.items < 1:
        raise UserError(f"--items {options.items}: expected at least 1")
    return options


def run(options: argparse.Namespace) -> None:
    """Measure, print the table, and write the lines and the picture."""
    subjects = open_places(options, open_thinking(options))
    require_item(subjects, options.item)
    found = [measure(one.probe, one.data, one.count) for one in subjects]
    say_reports(subjects, map(table, found))
    lines = [[h.record() for h in held] for held in found]
    save(subjects, options.out / "frontier", {}, lines, [part(held, options.item) for held in found])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
