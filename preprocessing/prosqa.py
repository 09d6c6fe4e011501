"""Generate ProsQA-like problems, from a seed: data/prosqa_generated_{train,valid,test}.json.

    python preprocessing/prosqa.py                                        the official sizes, wording and difficulty
    python preprocessing/prosqa.py --mean-parents 2.5                     a denser graph, more ways to go wrong
    python preprocessing/prosqa.py --nodes 12 --symbolic                  one letter a node, for small models
    python preprocessing/prosqa.py --nodes 48 --mean-parents 1.3 --depth-weight 10 --min-hops 7 --max-hops 8
                                                                          longer chains (a minute)

A question has at most about 570 of GPT-2's tokens officially, 820 in the denser and 860 in the longer kind (of 1,024).

This is not the official data (preprocessing/prosqa.bash downloads that): scores on it are not the paper's. The recipe
was measured on 800 official problems; the algorithm printed in the paper differs from what they show.

A problem is a directed graph that grows from two roots, A and B. Some leaf below one root alone is the target, some
leaf below the other alone is the distractor, and the question is which of the two the root "is".
"""

from datafiles import DataError, listed, run, write_json

import argparse
import hashlib
import itertools
import math
import random
import re
import shlex
import sys
import time
from collections import namedtuple
from pathlib import Path

PEOPLE = [
    "Alex",
    "Bob",
    "Carol",
    "Davis",
    "Eva",
    "Fae",
    "Gabriel",
    "Jack",
    "Max",
    "Oliver",
    "Polly",
    "Rex",
    "Sally",
    "Sam",
    "Stella",
    "Tom",
    "Wren",
]
CONCEPTS = [
    "bompus",
    "boompus",
    "brimpus",
    "chorpus",
    "dumpus",
    "felpus",
    "fompus",
    "gerpus",
    "gorpus",
    "grimpus",
    "gwompus",
    "hilpus",
    "impus",
    "jelpus",
    "jompus",
    "kerpus",
    "lempus",
    "lorpus",
    "numpus",
    "quimpus",
    "rempus",
    "rompus",
    "rorpus",
    "scrompus",
    "shumpus",
    "sterpus",
    "storpus",
    "terpus",
    "timpus",
    "tumpus",
    "vumpus",
    "worpus",
    "wumpus",
    "yerpus",
    "yimpus",
    "yumpus",
    "zhorpus",
    "zumpus",
]
LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"

A, B = 1, 2  # bits of a node's side set: the roots it can be reached from
POOL_A, POOL_B = 0.35, 0.815  # below the first: parents from side A alone; below the second: from B alone; else any
MAX_TRIES = 20_000  # rejected graphs in a row before giving up

Wording = namedtuple("Wording", "person concept between question answer")
ENGLISH = Wording("{} is a {}.", "Every {} is a {}.", " ", " Is {} a {} or {}?", "{} is a {}.")
SYMBOLIC = Wording("{}>{}", "{}>{}", ";", "?{}:{}/{}", "{1}")  # a>b;a>c;d>e?a:b/e with answer b

Graph = namedtuple("Graph", "parents sides")  # node -> its parents in the order drawn, node -> side set


# ---- the graph ----------------------------------------------------------------------------------------------------


def poisson(rng, mean):
    """A Poisson draw by Knuth's method: count the uniform factors that keep a product above exp(-mean)."""
    count, product, floor = 0, rng.random(), math.exp(-mean)
    while product > floor:
        count += 1
        product *= rng.random()
    return count


def draw_distinct(rng, pool, weights, count):
    """Up to count members of pool, one after the other, each in proportion to its weight among those left."""
    pool, weights = list(pool), list(weights)
    drawn = []
    for _ in range(min(count, len(pool))):
        index = rng.choices(range(len(pool)), weights)[0]
        drawn.append(pool.pop(index))
        weights.pop(index)
    return drawn


def grow(rng, nodes, mean_parents, depth_weight):
    """A graph in which every parent comes before its children; nodes 0 and 1 are the roots A and B."""
    parents, sides, depth = [[], []], [A, B], [0, 0]
    for node in range(2, nodes):
        count, side = poisson(rng, mean_parents), rng.random()
        only = A if side < POOL_A else B if side < POOL_B else None
        pool = [v for v in range(node) if only is None or sides[v] == only]
        drawn = draw_distinct(rng, pool, [depth_weight * depth[v] + 1 for v in pool], count)
        parents.append(drawn)
        union = 0
        for parent in drawn:
            union |= sides[parent]
        sides.append(union)
        depth.append(1 + min(depth[p] for p in drawn) if drawn else 0)
    return drop_isolated(Graph(parents, sides))


def drop_isolated(graph):
    """Without the nodes that have neither parents nor children (the roots stay), renumbered."""
    used = {parent for drawn in graph.parents for parent in drawn}
    kept = [v for v, drawn in enumerate(graph.parents) if v < 2 or drawn or v in used]
    number = {v: i for i, v in enumerate(kept)}
    return Graph([[number[p] for p in graph.parents[v]] for v in kept], [graph.sides[v] for v in kept])


def shortest_paths(graph, root):
    """For every node its distance from root (None where unreachable) and its number of shortest paths.

    Breadth-first distances in one sweep: parents come before children.
    """
    distance, ways = [], []
    for node, drawn in enumerate(graph.parents):
        reached = [p for p in drawn if distance[p] is not None]
        nearest = min((distance[p] for p in reached), default=None)
        distance.append(0 if node == root else None if nearest is None else nearest + 1)
        ways.append(1 if node == root else sum(ways[p] for p in reached if distance[p] == nearest))
    return distance, ways


def draw_path(rng, graph, root, target):
    """One of the shortest paths from root to target, each as likely as the others."""
    distance, ways = shortest_paths(graph, root)
    path = [target]
    while path[-1] != root:
        closer = [p for p in graph.parents[path[-1]] if distance[p] == distance[path[-1]] - 1]
        path.append(rng.choices(closer, [ways[p] for p in closer])[0])
    return path[::-1]


def draw_question(rng, graph, min_hops, max_hops):
    """(root, target, distractor), or None where the graph has none at a wanted distance."""
    has_children = {parent for drawn in graph.parents for parent in drawn}
    childless = [v for v in range(2, len(graph.parents)) if v not in has_children]
    leaves = [[v for v in childless if graph.sides[v] == side] for side in (A, B)]
    if not leaves[0] or not leaves[1]:
        return None
    distances = [shortest_paths(graph, root)[0] for root in (0, 1)]
    farthest = max(distances[root][leaf] for root in (0, 1) for leaf in leaves[root])
    if not min_hops <= farthest <= max_hops:
        return None
    candidates = [(root, leaf) for root in (0, 1) for leaf in leaves[root] if distances[root][leaf] == farthest]
    root, target = rng.choice(candidates)
    return root, target, rng.choice(leaves[1 - root])


# ---- words --------------------------------------------------------------------------------------------------------


def invented_concepts(count):
    """Concept names beyond the official 38, for larger graphs: always the same ones in the same order."""
    onsets = [
        "b",
        "br",
        "ch",
        "d",
        "f",
        "g",
        "gr",
        "h",
        "j",
        "k",
        "l",
        "m",
        "n",
        "p",
        "pr",
        "r",
        "s",
        "sh",
        "st",
        "t",
        "tr",
        "v",
        "w",
        "y",
        "z",
        "zh",
    ]
    words = (onset + vowel + coda + "pus" for coda in "lnrm" for vowel in "aeiou" for onset in onsets)
    return list(itertools.islice((word for word in words if word not in CONCEPTS), max(0, count)))


def draw_names(rng, graph, options):
    """A name for every node: people for those without parents, concepts for the others; None if people run out."""
    if options.symbolic:
        return rng.sample(options.symbols, len(graph.parents))
    starts = [v for v, drawn in enumerate(graph.parents) if not drawn]
    if len(starts) > len(options.people):
        return None
    people = dict(zip(starts, rng.sample(options.people, len(starts)), strict=True))
    concepts = iter(rng.sample(options.concepts, len(graph.parents) - len(starts)))
    return [people[v] if v in people else next(concepts) for v in range(len(graph.parents))]


def make_item(rng, options):
    """One problem with the official keys in the official order, or None if the drawn graph gives none."""
    graph = grow(rng, options.nodes, options.mean_parents, options.depth_weight)
    question = draw_question(rng, graph, options.min_hops, options.max_hops)
    names = question and draw_names(rng, graph, options)
    if not names:
        return None
    root, target, distractor = question
    words = SYMBOLIC if options.symbolic else ENGLISH

    def fact(edge):
        return (words.concept if graph.parents[edge[0]] else words.person).format(*(names[v] for v in edge))

    edges = [[parent, node] for node, drawn in enumerate(graph.parents) for parent in drawn]
    path = draw_path(rng, graph, root, target)
    facts = rng.sample([fact(edge) for edge in edges], len(edges))
    choices = rng.sample([names[target], names[distractor]], 2)
    return {
        "question": words.between.join(facts) + words.question.format(names[root], *choices),
        "answer": words.answer.format(names[root], names[target]),
        "steps": [fact(edge) for edge in itertools.pairwise(path)],
        "idx_to_symbol": names,
        "edges": edges,
        "root": root,
        "target": target,
        "neg_target": distractor,
    }


def make_items(rng, count, options, seen, split):
    """count problems whose questions are not in seen, to which they are added."""
    items, tries, told = [], 0, time.monotonic()
    while len(items) < count:
        item = make_item(rng, options)
        if item and item["question"] not in seen:
            seen.add(item["question"])
            items.append(item)
            tries = 0
        tries += 1
        if time.monotonic() - told > 5:
            told = time.monotonic()
            print(f"{split}: {len(items):,} of {count:,} problems", file=sys.stderr)
        if tries > MAX_TRIES:
            raise DataError(
                f"these options hardly ever give a new problem: {len(items):,} of {count:,} made, then {MAX_TRIES:,} "
                f"graphs in a row without one.\n  {hint(options)}"
            )
    return items


def hint(options):
    return (
        f"Now: --nodes {options.nodes} --mean-parents {options.mean_parents:g} --depth-weight {options.depth_weight:g} "
        f"--min-hops {options.min_hops} --max-hops {options.max_hops}. For longer chains raise --nodes or "
        "--depth-weight; for more different problems raise --nodes or --max-hops; for denser graphs give more --people."
    )


def make_splits(options):
    """{split: items}. Splits share no question; test and valid do not change with the number of training items."""
    splits, seen = {}, set()
    for split in ("test", "valid", "train"):
        rng = random.Random(f"prosqa {options.seed} {split}")
        splits[split] = make_items(rng, getattr(options, split), options, seen, split)
    return splits


# ---- command ------------------------------------------------------------------------------------------------------


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--seed", type=int, default=0, help="the same seed and options give the same bytes (default 0)")
    add("--train", type=int, default=17_886, help="number of training items (default 17886, as officially)")
    add("--valid", type=int, default=300, help="number of validation items (default 300)")
    add("--test", type=int, default=500, help="number of test items (default 500); 0 writes no file")
    add("--nodes", type=int, default=28, help="nodes a graph grows to, before isolated ones go (default 28)")
    add("--mean-parents", type=float, default=1.5, help="mean number of parents drawn for a node (default 1.5)")
    add("--depth-weight", type=float, default=1.5, help="how much deep nodes are preferred as parents (default 1.5)")
    add("--min-hops", type=int, default=3, help="fewest steps of an answer (default 3)")
    add("--max-hops", type=int, default=6, help="most steps of an answer (default 6)")
    add("--people", type=Path, metavar="FILE", help="names of the starting points, one a line (default: the official)")
    add(
        "--concepts",
        type=Path,
        metavar="FILE",
        help="names of the others, one a line (default: the official, and "
        "invented ones of their kind for more than 40 nodes)",
    )
    add(
        "--symbolic",
        action="store_true",
        help="compact wording, a>b;a>c;d>e?a:b/e with answer b: a letter a node up to 52 nodes, else a number",
    )
    add("--out", type=Path, default=Path("data"), metavar="DIR", help="where to write (default data)")
    add("--prefix", default="prosqa_generated", help="files are PREFIX_train.json and so on (default prosqa_generated)")
    options = parser.parse_args(argv)
    options.given = dict(vars(options))
    add_names(options)
    return options


def read_names(path, problems):
    """The words of a file, one a line."""
    try:
        words = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        problems.append(f"{path}: cannot be read as utf-8 text ({getattr(error, 'strerror', None) or error})")
        return []
    bad = [word for word in words if not re.fullmatch(r"[\w'-]+", word)]  # . ? , # would break facts and answers
    if bad:
        problems.append(f"{path}: one word a line, of letters, digits, - and '; found {bad[0]!r}")
    doubled = sorted({word for word in words if words.count(word) > 1})
    if doubled:
        problems.append(f"{path}: {doubled[0]!r} occurs twice; two nodes could have one name")
    return words


def add_names(options):
    """Complete the options with the lists of names; refuse what cannot work, all of it in one message."""
    problems = number_problems(options)
    symbols = LETTERS if options.nodes <= len(LETTERS) else [str(i) for i in range(options.nodes)]
    options.symbols = list(symbols[: options.nodes])
    if options.symbolic and (options.people or options.concepts):
        problems.append("--symbolic has its own names: leave out --people and --concepts")
    own = bool(options.concepts)
    people = read_names(options.people, problems) if options.people else PEOPLE
    concepts = read_names(options.concepts, problems) if own else CONCEPTS + invented_concepts(options.nodes - 40)
    if not options.symbolic and not problems:
        if len(people) < 2:
            problems.append(f"--people: at least 2 names are needed, found {len(people)}")
        if len(concepts) < options.nodes - 2:
            problems.append(
                f"{'--concepts' if own else '--nodes'}: {options.nodes} nodes may need {options.nodes - 2} "
                f"concept names, there are {len(concepts)}"
            )
        if set(people) & set(concepts):
            problems.append(f"--people and --concepts share {min(set(people) & set(concepts))!r}")
    if problems:
        raise DataError(f"these options cannot work:\n{listed(problems)}")
    options.people, options.concepts = people, concepts


def number_problems(options):
    """The numbers among the options that no graph can satisfy, in words."""
    sizes, least = (options.train, options.valid, options.test), options.min_hops + 3
    hops, parents, weight = f"{options.min_hops} and {options.max_hops}", options.mean_parents, options.depth_weight
    tests = [
        (min(sizes) >= 0 and max(sizes) > 0, "--train, --valid, --test: none below 0 and at least one above"),
        (1 <= options.min_hops <= options.max_hops, f"expected 1 <= --min-hops <= --max-hops, found {hops}"),
        # both roots, the chain below one, a leaf below the other
        (options.nodes >= least, f"--nodes {options.nodes}: {options.min_hops} hops need at least {least}"),
        (options.nodes <= 500, f"--nodes {options.nodes}: at most 500"),
        (0 < parents <= 20, f"--mean-parents {parents:g}: expected above 0, at most 20"),
        (0 <= weight <= 1000, f"--depth-weight {weight:g}: expected 0 to 1000"),
        (re.fullmatch(r"[\w.-]+", options.prefix), f"--prefix {options.prefix!r}: a name without folders is needed"),
        (options.prefix != "prosqa", "--prefix prosqa: the official files have that name; generated ones need another"),
    ]
    return [message for holds, message in tests if not holds]


README = """# {prefix}_*.json: generated data, not the official ProsQA

Made by preprocessing/prosqa.py from a recipe that imitates the official files' statistics. Scores on these files are
not the paper's and cannot be compared with them; `bash preprocessing/prosqa.bash` downloads the official files.

Made with:

    python preprocessing/prosqa.py {command}

| file | items | sha256 |
|---|---|---|
{files}
"""


def as_command(given):
    """Options as words of a command line that gives the same data again."""
    words = []
    for name, value in given.items():
        if value is not None and value is not False:
            words += ["--" + name.replace("_", "-")] + ([] if value is True else [str(value)])
    return shlex.join(words)


def write_readme(options, paths):
    """Say beside the data where they come from, and how to make them again."""
    files = [f"| {path.name} | {count:,} | {hashlib.sha256(path.read_bytes()).hexdigest()} |" for path, count in paths]
    text = README.format(prefix=options.prefix, command=as_command(options.given), files="\n".join(files))
    readme = options.out / f"{options.prefix}_README.md"
    readme.write_text(text, encoding="utf-8")
    return readme


def main():
    options = parse_args()
    splits = make_splits(options)
    paths = []
    for split in ("train", "valid", "test"):
        if splits[split]:
            path = options.out / f"{options.prefix}_{split}.json"
            paths.append((path, write_json(splits[split], path)))
            print(f"{path}: {len(splits[split]):,} generated items")
    print(f"{write_readme(options, paths)}: how they were made. Scores on generated data are not the paper's.")


if __name__ == "__main__":
    run(main)
