"""Generate questions of reachability in graphs from a seed: data/graph_*.json, in a few seconds.

    python preprocessing/graphs.py                       40,000 training items on trees and 45,000 on chains
    python preprocessing/graphs.py --nodes 9 --hops 4 --train 100000 --prefix graph_4hops

An item has two separate random trees with the same number of nodes. Node names are drawn anew for every item and the
edges are shuffled. The question lists the edges (parent, child), then a candidate from each tree, then the root that is
asked about: which candidate can be reached from it? The steps are the nodes of the path:

    {"question": "ec;id;lm;ka;kg;bh;nf;nk;il;gb;cj;ei;?bm:e", "steps": ["i", "l", "m"], "answer": "m", ...}

Both candidates are `hops` edges away from the root of their tree and the trees are drawn alike, so a guess is right
half of the time. Every item also holds its graph for analysis/: edges, root, target, distractor and the distractor's
root. The files graph_chains_* have two chains of one of several lengths in place of the trees: easy items to begin
with.

No question appears twice, neither within a file nor across the five. The vocabulary (config key `tokenizer`) makes
every node one token. The task is scaled down from arXiv 2505.12514; the paper on Coconut does not use it.
"""

import os
import sys

sys.path.insert(0, os.path.dirname(__file__))  # Python leaves it out where PYTHONSAFEPATH is set
from datafiles import DataError, argument_parser, listed, run, write_json

import random
import re
import string
from pathlib import Path

NAMES = string.ascii_letters
ATTEMPTS = 10_000  # trees or questions drawn in vain before the options are taken to be impossible


def draw_tree(rng, options):
    """Return the parent of each node of a random tree (node 0 is the root) and the nodes `hops` edges from the root.

    Every node hangs on an earlier one, all equally likely; trees whose root has too few children or that are not deep
    enough are drawn again.
    """
    for _ in range(ATTEMPTS):
        parents, depths = [None], [0]
        for node in range(1, options.nodes):
            parents.append(rng.randrange(node))
            depths.append(depths[parents[node]] + 1)
        deep = [node for node, depth in enumerate(depths) if depth == options.hops]
        if deep and parents.count(0) >= options.branching:
            return parents, deep
    raise DataError(
        f"--nodes {options.nodes} --hops {options.hops} --branching {options.branching}: none of {ATTEMPTS:,} random "
        "trees is that deep with so many children of the root; more --nodes are needed"
    )


def draw_chain(rng, n_nodes):
    """Return a chain in the form of draw_tree: its last node is the only candidate."""
    return [None, *range(n_nodes - 1)], [n_nodes - 1]


def make_item(rng, n_names, sides):
    """Make an item of two (parents, candidates); the first is the one that is asked about."""
    n_nodes = [len(parents) for parents, _ in sides]
    names = rng.sample(NAMES[:n_names], sum(n_nodes))
    names = [names[: n_nodes[0]], names[n_nodes[0] :]]
    edges = [
        own[parent] + own[node]
        for own, (parents, _) in zip(names, sides, strict=True)
        for node, parent in enumerate(parents)
        if parent is not None
    ]
    rng.shuffle(edges)
    ends = [rng.choice(candidates) for _, candidates in sides]
    target, distractor = names[0][ends[0]], names[1][ends[1]]
    root = names[0][0]
    first, second = rng.sample([target, distractor], 2)
    return {
        "question": "".join(edge + ";" for edge in edges) + f"?{first}{second}:{root}",
        "steps": path_to(ends[0], sides[0][0], names[0]),
        "answer": target,
        "edges": edges,
        "root": root,
        "target": target,
        "distractor": distractor,
        "distractor_root": names[1][0],
    }


def path_to(node, parents, names):
    """Return the names of the nodes from the root to a node, without the root."""
    path = []
    while parents[node] is not None:
        path.append(names[node])
        node = parents[node]
    return path[::-1]


def distinct(make, count, seen):
    """Yield `count` items with questions that are not in `seen` yet, and add them."""
    failures = 0
    while count:
        item = make()
        if item["question"] not in seen:
            seen.add(item["question"])
            count, failures = count - 1, 0
            yield item
        elif (failures := failures + 1) == ATTEMPTS:
            raise DataError("there are not as many different questions as wanted; choose larger graphs or fewer items")


def make_splits(options):
    """Return the items of each file; held-out items are drawn first, so they do not depend on the training sizes."""
    rng = random.Random(options.seed)
    n_names = 2 * options.nodes
    seen = set()

    def tree_item():
        return make_item(rng, n_names, [draw_tree(rng, options) for _ in range(2)])

    def chain_item():
        length = rng.choice(options.chain_nodes)
        return make_item(rng, n_names, [draw_chain(rng, length)] * 2)

    return {
        "valid": list(distinct(tree_item, options.valid, seen)),
        "test": list(distinct(tree_item, options.test, seen)),
        "chains_valid": list(distinct(chain_item, options.chains_valid, seen)),
        "train": list(distinct(tree_item, options.train, seen)),
        "chains_train": list(distinct(chain_item, options.chains_train, seen)),
    }


def option_problems(options):
    """List the problems of the options."""
    most = len(NAMES) // 2
    tests = [
        (2 <= options.nodes <= most, f"--nodes {options.nodes}: expected 2 to {most}"),
        (1 <= options.hops < options.nodes, f"--hops {options.hops}: expected 1 to --nodes - 1"),
        (options.branching >= 1, f"--branching {options.branching}: expected at least 1"),
        (
            all(2 <= length <= options.nodes for length in options.chain_nodes),
            f"--chain-nodes {' '.join(map(str, options.chain_nodes))}: expected 2 to --nodes ({options.nodes}) each",
        ),
        *(
            (getattr(options, name) >= 1, f"--{name.replace('_', '-')} {getattr(options, name)}: expected at least 1")
            for name in ("train", "valid", "test", "chains_train", "chains_valid")
        ),
        (re.fullmatch(r"[\w.-]+", options.prefix), f"--prefix {options.prefix!r}: expected a name without folders"),
    ]
    return [message for holds, message in tests if not holds]


def parse_args(arguments=None):
    parser = argument_parser(__doc__)
    parser.add_argument("--nodes", type=int, default=7, help="nodes of each tree (default 7)")
    parser.add_argument("--hops", type=int, default=3, help="edges from the root to a candidate (default 3)")
    parser.add_argument("--branching", type=int, default=2, help="least number of the root's children (default 2)")
    parser.add_argument(
        "--chain-nodes", type=int, nargs="+", default=[3, 4, 5, 7], help="lengths of the chains (default 3 4 5 7)"
    )
    parser.add_argument("--train", type=int, default=40_000, help="training items on trees (default 40,000)")
    parser.add_argument("--valid", type=int, default=500, help="validation items on trees (default 500)")
    parser.add_argument("--test", type=int, default=500, help="test items on trees (default 500)")
    parser.add_argument("--chains-train", type=int, default=45_000, help="training items on chains (default 45,000)")
    parser.add_argument("--chains-valid", type=int, default=200, help="validation items on chains (default 200)")
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same files (default 0)")
    parser.add_argument("--prefix", default="graph", help="first part of the file names (default graph)")
    parser.add_argument("--out", type=Path, default=Path("data"), help="folder to write to (default data)")
    options = parser.parse_args(arguments)
    if problems := option_problems(options):
        raise DataError(f"these options cannot work:\n{listed(problems)}")
    return options


def main(arguments=None):
    options = parse_args(arguments)
    for split, items in make_splits(options).items():
        path = options.out / f"{options.prefix}_{split}.json"
        print(f"{path}: {write_json(items, path):,} items, such as {items[0]['question']} = {items[0]['answer']}")
    path = options.out / f"{options.prefix}_vocabulary.json"
    print(f"{path}: {write_json(['###'], path)} word; all other characters are tokens of their own")


if __name__ == "__main__":
    run(main)
