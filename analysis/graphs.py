"""The graph of an item: nodes, distances, and groups of nodes by distance. No MLX here.

Items of preprocessing/graphs.py and of ProsQA (preprocessing/prosqa.py, and the official files) hold their graph beside
question, steps and answer.
"""

import json
from collections import deque
from pathlib import Path
from typing import NamedTuple

from utils import UserError

GROUPS = ("not reachable", "nearer", "frontier", "on the path", "off the path", "farther")


class Graph(NamedTuple):
    """A directed graph by the names of its nodes, and what is asked about it."""

    edges: list[tuple[str, str]]  # (from, to)
    root: str
    target: str

    @property
    def nodes(self) -> list[str]:
        """All nodes, in the order of their first edge."""
        return list(dict.fromkeys(node for edge in self.edges for node in edge))

    def distances(self, start: str) -> dict[str, int]:
        """Edges from `start` to each node that can be reached from it (breadth-first)."""
        children: dict[str, list[str]] = {}
        for parent, child in self.edges:
            children.setdefault(parent, []).append(child)
        found, queue = {start: 0}, deque([start])
        while queue:
            node = queue.popleft()
            for child in children.get(node, []):
                if child not in found:
                    found[child] = found[node] + 1
                    queue.append(child)
        return found

    def walk_ends(self, length: int) -> list[set[str]]:
        """The ends of all walks from the root of exactly 0, 1, ... `length` edges."""
        ends = [{self.root}]
        for _ in range(length):
            ends.append({child for parent, child in self.edges if parent in ends[-1]})
        return ends

    def path_nodes(self) -> set[str]:
        """Nodes on some shortest path from the root to the target."""
        ahead = self.distances(self.root)
        behind = Graph([(child, parent) for parent, child in self.edges], self.target, self.root).distances(self.target)
        length = ahead.get(self.target)
        return {node for node in ahead if node in behind and ahead[node] + behind[node] == length}

    def groups(self, distance: int) -> dict[str, list[str]]:
        """The nodes by where they stand, seen from a thought that should hold those `distance` edges from the root.

        The frontier is exactly that far away; it is split into the nodes on a shortest path to the target and the
        others.
        """
        ahead, path = self.distances(self.root), self.path_nodes()
        found: dict[str, list[str]] = {group: [] for group in GROUPS}
        for node in self.nodes:
            if node not in ahead:
                found["not reachable"].append(node)
            elif ahead[node] == distance:
                found["frontier"].append(node)
                found["on the path" if node in path else "off the path"].append(node)
            else:
                found["nearer" if ahead[node] < distance else "farther"].append(node)
        return found


def read_graphs(path: str, limit: int | None = None) -> list[Graph]:
    """The graphs of the first `limit` items of a JSON list. Raises UserError for an item that holds none."""
    try:
        items = json.loads(Path(path).read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot read a JSON list of items with graphs ({error})") from error
    if not isinstance(items, list):
        raise UserError(f"{path}: expected a JSON list of items, found {type(items).__name__}")
    return [_graph_of(item, f"{path}: item {index}") for index, item in enumerate(items[:limit])]


def _graph_of(item: dict, where: str) -> Graph:
    missing = [key for key in ("edges", "root", "target") if not isinstance(item, dict) or key not in item]
    if missing:
        raise UserError(
            f"{where}: holds no graph ({', '.join(missing)} missing); preprocessing/graphs.py and "
            "preprocessing/prosqa.py write items that do"
        )
    try:
        names = item.get("idx_to_symbol")
        if names is None:
            return Graph([(edge[0], edge[1]) for edge in item["edges"]], item["root"], item["target"])
        edges = [(names[parent], names[child]) for parent, child in item["edges"]]
        return Graph(edges, names[item["root"]], names[item["target"]])
    except (TypeError, ValueError, IndexError, KeyError) as error:
        raise UserError(f"{where}: its graph cannot be read ({error!r})") from error
