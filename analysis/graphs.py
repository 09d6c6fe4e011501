"""The graph of an item: nodes, distances, and groups of nodes by distance. No MLX here.

Items of preprocessing/graphs.py and of ProsQA (preprocessing/prosqa.py, and the official files) hold their graph beside
question, steps and answer.
"""

import json
from collections import deque
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import NamedTuple

from utils import UserError

GROUPS = ("not reachable", "nearer", "frontier", "on the path", "off the path", "farther")
HEIGHTS = ("search", "shortest", "longest")
KEYS = ("edges", "root", "target")


class Graph(NamedTuple):
    """A directed graph by the names of its nodes, and what is asked about it."""

    edges: list[tuple[str, str]]  # (from, to)
    root: str
    target: str

    @property
    def nodes(self) -> list[str]:
        """All nodes, in the order of their first edge."""
        return list(dict.fromkeys(node for edge in self.edges for node in edge))

    @property
    def children(self) -> dict[str, list[str]]:
        """The children of each node that has some."""
        found: dict[str, list[str]] = {}
        for parent, child in self.edges:
            found.setdefault(parent, []).append(child)
        return found

    def distances(self, start: str) -> dict[str, int]:
        """Edges from `start` to each node that can be reached from it (breadth-first)."""
        children = self.children
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

    def distances_to_target(self) -> dict[str, int]:
        """Edges to the target from each node that leads to it."""
        return Graph([(child, parent) for parent, child in self.edges], self.target, self.root).distances(self.target)

    def heights(self, kind: str) -> dict[str, int]:
        """Edges from each node down to a leaf, by a kind of HEIGHTS: along the shortest path or along the longest one.

        `search`: along the longest path whose every edge leads one edge farther away from the root, which is the height
        in the tree that a breadth-first search sees. Raises UserError for a graph with a cycle.
        """
        children, choose = self.children, min if kind == "shortest" else max
        if kind == "search":
            ahead = self.distances(self.root)
            down = [(a, b) for a, b in self.edges if a in ahead and ahead[b] == ahead[a] + 1]
            children = Graph(down, self.root, self.target).children
        found = dict.fromkeys(self.nodes, 0)
        try:
            for node in TopologicalSorter(children).static_order():  # children first
                found[node] = 1 + choose(found[child] for child in children[node]) if node in children else 0
        except CycleError as error:
            raise UserError(f"the graph of {self.root} has a cycle ({error.args[1]}), so no heights") from error
        return found

    def nearest_parent(self, node: str) -> str | None:
        """The parent of a node that is nearest to the root; None where no parent can be reached from there."""
        ahead = self.distances(self.root)
        parents = [parent for parent, child in self.edges if child == node and parent in ahead]
        return min(parents, key=ahead.__getitem__, default=None)

    def path_nodes(self) -> set[str]:
        """Nodes on some shortest path from the root to the target."""
        ahead, behind = self.distances(self.root), self.distances_to_target()
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


def find_graphs(path: str) -> list[Graph] | None:
    """The graphs of a data set; None where its first item holds none, or where it is another file than a JSON list.

    Raises UserError for a later item that holds none.
    """
    try:
        items = json.loads(Path(path).read_bytes())
    except (OSError, ValueError):  # JSON Lines, gzipped, or of the package datasets: other readers open it
        return None
    holds_one = isinstance(items, list) and items and isinstance(items[0], dict) and set(KEYS) <= set(items[0])
    return read_graphs(path) if holds_one else None


def _graph_of(item: dict, where: str) -> Graph:
    missing = [key for key in KEYS if not isinstance(item, dict) or key not in item]
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
