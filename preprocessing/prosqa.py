"""Generate problems like ProsQA's from a seed: data/prosqa_generated_{train,valid,test}.json.

    python preprocessing/prosqa.py                                        the official sizes, wording and difficulty
    python preprocessing/prosqa.py --mean-parents 2.5                     a denser graph with more wrong paths
    python preprocessing/prosqa.py --nodes 12 --symbolic                  one letter per node, for small models
    python preprocessing/prosqa.py --nodes 48 --mean-parents 1.3 --depth-weight 10 --min-hops 7 --max-hops 8
                                                                          longer chains (a minute)

The longest questions have about 570 GPT-2 tokens in the official kind, 820 in the denser and 860 in the longer kind;
the model's context has 1,024.

This is not the official data, which preprocessing/prosqa.bash downloads: scores on it are not the paper's. The recipe
was measured on 800 official problems; the algorithm printed in the paper gives other statistics.

A problem is a directed graph that grows from two roots, A and B. The target is a leaf that only one root reaches, the
distractor a leaf that only the other root reaches. The question asks which of the two the target's root "is".
"""

import os
import sys

sys.path.insert(0, os.path.dirname(__file__))  # Python leaves it out where PYTHONSAFEPATH is set
from datafiles import DataError, argument_parser, listed, replacing, run, write_json

import hashlib
import itertools
import math
import random
import re
import shlex
import time
from collections import namedtuple
from pathlib import Path

PEOPLE = "Alex Bob Carol Davis Eva Fae Gabriel Jack Max Oliver Polly Rex Sally Sam Stella Tom Wren".split()
CONCEPTS = """
    bompus boompus brimpus chorpus dumpus felpus fompus gerpus gorpus grimpus gwompus hilpus impus jelpus jompus
    kerpus lempus lorpus numpus quimpus rempus rompus rorpus scrompus shumpus sterpus storpus terpus timpus tumpus
    vumpus worpus wumpus yerpus yimpus yumpus zhorpus zumpus
""".split()
LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"

A, B = 1, 2  # bits of a node's side set: the roots that reach it
POOL_A, POOL_B = 0.35, 0.815  # a uniform draw below POOL_A: parents of side {A}; below POOL_B: of {B}; else any
MAX_TRIES = 20_000  # rejected graphs in a row before giving up

Wording = namedtuple("Wording", "person concept between question answer")
ENGLISH = Wording("{} is a {}.", "Every {} is a {}.", " ", " Is {} a {} or {}?", "{} is a {}.")
SYMBOLIC = Wording("{}>{}", "{}>{}", ";", "?{}:{}/{}", "{1}")  # a>b;a>c;d>e?a:b/e with answer b

Graph = namedtuple("Graph", "parents sides")  # per node: its parents in the order drawn; its side set


# ---- the graph ----------------------------------------------------------------------------------------------------


def poisson(rng, mean):
    """Draw from a Poisson distribution by Knuth's method: count the uniform factors of a product above exp(-mean)."""
    count, product, floor = 0, rng.random(), math.exp(-mean)
    while product > floor:
        count += 1
        product *= rng.random()
    return count


def draw_distinct(rng, pool, weights, count):
    """Draw up to count members of pool without replacement, each with probability proportional to its weight."""
    pool, weights = list(pool), list(weights)
    drawn = []
    for _ in range(min(count, len(pool))):
        index = rng.choices(range(len(pool)), weights)[0]
        drawn.append(pool.pop(index))
        weights.pop(index)
    return drawn


def grow(rng, nodes, mean_parents, depth_weight):
    """Grow a graph in which parents have lower numbers than their children. Nodes 0 and 1 are the roots A and B."""
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
    """Remove the nodes without parents and children, except the roots, and renumber the others."""
    used = {parent for drawn in graph.parents for parent in drawn}
    kept = [v for v, drawn in enumerate(graph.parents) if v < 2 or drawn or v in used]
    number = {v: i for i, v in enumerate(kept)}
    return Graph([[number[p] for p in graph.parents[v]] for v in kept], [graph.sides[v] for v in kept])


def shortest_paths(graph, root):
    """Return each node's distance from root (None if unreachable) and its number of shortest paths.

    One pass suffices, because parents have lower numbers than their children.
    """
    distance, ways = [], []
    for node, drawn in enumerate(graph.parents):
        reached = [p for p in drawn if distance[p] is not None]
        nearest = min((distance[p] for p in reached), default=None)
        distance.append(0 if node == root else None if nearest is None else nearest + 1)
        ways.append(1 if node == root else sum(ways[p] for p in reached if distance[p] == nearest))
    return distance, ways


def draw_path(rng, graph, root, target):
    """Draw one of the shortest paths from root to target, all with the same probability."""
    distance, ways = shortest_paths(graph, root)
    path = [target]
    while path[-1] != root:
        closer = [p for p in graph.parents[path[-1]] if distance[p] == distance[path[-1]] - 1]
        path.append(rng.choices(closer, [ways[p] for p in closer])[0])
    return path[::-1]


def draw_question(rng, graph, min_hops, max_hops):
    """Draw (root, target, distractor), or return None if the graph has none at an allowed distance."""
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
    """List concept names beyond the official 38, for larger graphs. The list is always the same."""
    onsets = "b br ch d f g gr h j k l m n p pr r s sh st t tr v w y z zh".split()
    words = (onset + vowel + coda + "pus" for coda in "lnrm" for vowel in "aeiou" for onset in onsets)
    return list(itertools.islice((word for word in words if word not in CONCEPTS), max(0, count)))


def draw_names(rng, graph, options):
    """Draw a person for each node without parents and a concept for each other; None if there are too few people."""
    if options.symbolic:
        return rng.sample(options.symbols, len(graph.parents))
    starts = [v for v, drawn in enumerate(graph.parents) if not drawn]
    if len(starts) > len(options.people):
        return None
    people = dict(zip(starts, rng.sample(options.people, len(starts)), strict=True))
    concepts = iter(rng.sample(options.concepts, len(graph.parents) - len(starts)))
    return [people[v] if v in people else next(concepts) for v in range(len(graph.parents))]


def make_item(rng, options):
    """Make one problem, with the official keys in the official order; None if the drawn graph gives none."""
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
    """Make count problems whose questions are not in seen, and add the questions to it."""
    items, tries, reported = [], 0, time.monotonic()
    while len(items) < count:
        item, tries = make_item(rng, options), tries + 1
        if item and item["question"] not in seen:
            seen.add(item["question"])
            items.append(item)
            tries = 0
        if time.monotonic() - reported > 5:
            reported = time.monotonic()
            print(f"{split}: {len(items):,} of {count:,} problems", file=sys.stderr)
        if tries == MAX_TRIES:
            made = f"{len(items):,} of {count:,} made, then none from {MAX_TRIES:,} graphs"
            raise DataError(f"these options hardly ever give a new problem: {made}.\n  {hint(options)}")
    return items


def hint(options):
    """Say which options to change where new problems are rare."""
    return (
        f"Now: --nodes {options.nodes} --mean-parents {options.mean_parents:g} --depth-weight {options.depth_weight:g} "
        f"--min-hops {options.min_hops} --max-hops {options.max_hops}. For longer chains raise --nodes or "
        "--depth-weight; for more different problems raise --nodes or --max-hops; for denser graphs give more --people."
    )


def make_splits(options):
    """Make {split: items}. Splits share no question. Test and valid do not depend on the number of training items."""
    splits, seen = {}, set()
    for split in ("test", "valid", "train"):
        rng = random.Random(f"prosqa {options.seed} {split}")
        splits[split] = make_items(rng, getattr(options, split), options, seen, split)
    return splits


# ---- command ------------------------------------------------------------------------------------------------------


def parse_args(argv=None):
    parser = argument_parser(__doc__)
    add = parser.add_argument
    add("--seed", type=int, default=0, help="the same seed and options give the same bytes (default 0)")
    add("--train", type=int, default=17_886, help="number of training items (default 17886, as officially)")
    add("--valid", type=int, default=300, help="number of validation items (default 300)")
    add("--test", type=int, default=500, help="number of test items (default 500); 0 writes no file")
    add("--nodes", type=int, default=28, help="nodes of a graph before isolated ones are removed (default 28)")
    add("--mean-parents", type=float, default=1.5, help="mean number of parents drawn per node (default 1.5)")
    add("--depth-weight", type=float, default=1.5, help="preference for deep nodes as parents (default 1.5)")
    add("--min-hops", type=int, default=3, help="fewest steps of an answer (default 3)")
    add("--max-hops", type=int, default=6, help="most steps of an answer (default 6)")
    add("--people", type=Path, metavar="FILE", help="names of nodes without parents, one per line (default: official)")
    concepts = "names of the other nodes, one per line (default: official, and invented ones for more than 40 nodes)"
    add("--concepts", type=Path, metavar="FILE", help=concepts)
    symbolic = "compact wording, a>b;a>c;d>e?a:b/e with answer b: one letter per node, numbers for more than 52 nodes"
    add("--symbolic", action="store_true", help=symbolic)
    add("--out", type=Path, default=Path("data"), metavar="DIR", help="folder to write to (default data)")
    add("--prefix", default="prosqa_generated", help="files are PREFIX_train.json etc. (default prosqa_generated)")
    options = parser.parse_args(argv)
    options.given = dict(vars(options))
    add_names(options)
    return options


def read_names(path, problems):
    """Read a file with one name per line. Problems are added to the list."""
    try:
        words = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        problems.append(f"{path}: cannot be read as UTF-8 text ({getattr(error, 'strerror', None) or error})")
        return []
    bad = [word for word in words if not re.fullmatch(r"[\w'-]+", word)]  # . ? , # would break facts and answers
    if bad:
        problems.append(f"{path}: expected one word per line, of letters, digits, - and '; found {bad[0]!r}")
    doubled = sorted({word for word in words if words.count(word) > 1})
    if doubled:
        problems.append(f"{path}: {doubled[0]!r} occurs twice; two nodes could get the same name")
    return words


def add_names(options):
    """Add the lists of names to the options. Raises a DataError that lists all problems of the options."""
    problems = number_problems(options)
    if options.symbolic and (options.people or options.concepts):
        problems.append("--symbolic has its own names: remove --people and --concepts")
    own = bool(options.concepts)
    people = read_names(options.people, problems) if options.people else PEOPLE
    concepts = read_names(options.concepts, problems) if own else CONCEPTS + invented_concepts(options.nodes - 40)
    if not options.symbolic and not problems:
        problems = name_problems(people, concepts, options.nodes, "--concepts" if own else "--nodes")
    if problems:
        raise DataError(f"these options cannot work:\n{listed(problems)}")
    options.people, options.concepts = people, concepts
    symbols = LETTERS if options.nodes <= len(LETTERS) else map(str, range(options.nodes))
    options.symbols = list(symbols)[: options.nodes]


def name_problems(people, concepts, nodes, option):
    """List the problems of the names; `option` is the one to change if there are too few concepts."""
    needed, shared = nodes - 2, set(people) & set(concepts)
    too_few = f"{option}: {nodes} nodes may need {needed} concept names, there are {len(concepts)}"
    tests = [
        (len(people) >= 2, f"--people: at least 2 names are needed, found {len(people)}"),
        (len(concepts) >= needed, too_few),
        (not shared, f"--people and --concepts share {min(shared, default=None)!r}"),
    ]
    return [message for holds, message in tests if not holds]


def number_problems(options):
    """List the problems of the numbers and the prefix among the options."""
    sizes, least = (options.train, options.valid, options.test), options.min_hops + 3
    hops, parents, weight = f"{options.min_hops} and {options.max_hops}", options.mean_parents, options.depth_weight
    tests = [
        (min(sizes) >= 0 and max(sizes) > 0, "--train, --valid, --test: none below 0 and at least one above"),
        (1 <= options.min_hops <= options.max_hops, f"expected 1 <= --min-hops <= --max-hops, found {hops}"),
        # both roots, a chain of min_hops nodes below one, a leaf below the other
        (options.nodes >= least, f"--nodes {options.nodes}: {options.min_hops} hops need at least {least}"),
        (options.nodes <= 500, f"--nodes {options.nodes}: at most 500"),
        (0 < parents <= 20, f"--mean-parents {parents:g}: expected above 0, at most 20"),
        (0 <= weight <= 1000, f"--depth-weight {weight:g}: expected 0 to 1000"),
        (re.fullmatch(r"[\w.-]+", options.prefix), f"--prefix {options.prefix!r}: expected a name without folders"),
        (options.prefix != "prosqa", "--prefix prosqa: the official files have that name; choose another"),
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
    """Format the options as a command line that generates the same data."""
    words = []
    for name, value in given.items():
        if value is not None and value is not False:
            words += ["--" + name.replace("_", "-")] + ([] if value is True else [str(value)])
    return shlex.join(words)


def write_readme(options, paths):
    """Write PREFIX_README.md, which says how the data were made and how to make them again."""
    files = [f"| {path.name} | {count:,} | {hashlib.sha256(path.read_bytes()).hexdigest()} |" for path, count in paths]
    text = README.format(prefix=options.prefix, command=as_command(options.given), files="\n".join(files))
    readme = options.out / f"{options.prefix}_README.md"
    with replacing(readme) as file:
        file.write(text)
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
