"""ProsQA's generator: every problem is sound, splits are disjoint, statistics are the official ones, options work."""

import functools
import hashlib
import json
import os
import statistics
import subprocess
import sys
from collections import Counter, deque
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "preprocessing" / "prosqa.py"
KEYS = ["question", "answer", "steps", "idx_to_symbol", "edges", "root", "target", "neg_target"]
SMALL = ("--train", "40", "--valid", "10", "--test", "10")
PEOPLE = "Alex Bob Carol Davis Eva Fae Gabriel Jack Max Oliver Polly Rex Sally Sam Stella Tom Wren".split()

# statistic: (mean, standard deviation), from 800 official items. Some deviations, and both figures of the characters,
# are from the 300 official validation items. Characters replace GPT-2 tokens (mean 359.5), so that the test needs no
# tokenizer.
OFFICIAL = {
    "nodes": (22.81, 1.99),
    "edges": (36.00, 5.75),
    "steps": (3.771, 0.763),
    "shortest paths": (1.586, 0.866),
    "root is node 1": (0.636, 0.481),
    "people": (2.556, 0.728),
    "leaves": (7.367, 1.603),
    "question characters": (936.7, 146.6),
}
# The exact figures of the official validation file, which check measure() itself.
OFFICIAL_VALID = {
    "nodes": 22.82, "edges": 36.26, "steps": 3.7533, "shortest paths": 1.6133, "root is node 1": 0.65,
    "people": 2.5133, "leaves": 7.4233, "question characters": 936.73,
}  # fmt: skip


def generate(folder, *options):
    """Run the script as a user does."""
    return subprocess.run(
        [sys.executable, str(SCRIPT), *map(str, options)], cwd=folder, capture_output=True, text=True, timeout=120
    )


def made(folder, *options, prefix="prosqa_generated"):
    """Run the script, which must succeed; return {split: items}."""
    done = generate(folder, *options)
    assert done.returncode == 0, done.stderr
    files = {split: folder / "data" / f"{prefix}_{split}.json" for split in ("train", "valid", "test")}
    return {split: json.loads(path.read_text()) for split, path in files.items() if path.exists()}


@pytest.fixture(scope="session")
def sample(tmp_path_factory):
    """Generate 2,000 training, 300 validation and 100 test problems with the default options."""
    return made(tmp_path_factory.mktemp("prosqa"), "--train", 2000, "--valid", 300, "--test", 100)


# ---- an independent reading of a problem --------------------------------------------------------------------------


def children(item):
    following = {node: [] for node in range(len(item["idx_to_symbol"]))}
    for parent, node in item["edges"]:
        following[parent].append(node)
    return following


def breadth_first(item, root):
    """Return the distance from root and the number of shortest paths of each reachable node, by a queue."""
    following, distance, ways, queue = children(item), {root: 0}, Counter({root: 1}), deque([root])
    while queue:
        node = queue.popleft()
        for child in following[node]:
            if child not in distance:
                distance[child] = distance[node] + 1
                queue.append(child)
            if distance[child] == distance[node] + 1:
                ways[child] += ways[node]
    return distance, ways


def without(item, side):
    """Return the nodes without incoming edges (side 1) or without outgoing edges (side 0)."""
    return set(range(len(item["idx_to_symbol"]))) - {edge[side] for edge in item["edges"]}


def read_english(item):
    """Parse (facts, root, options, answer, steps) from the text alone."""
    *facts, query = item["question"][:-1].split(". ")
    words = query.split()
    assert words[0] == "Is" and words[2] == "a" and words[4] == "or" and item["question"].endswith("?")
    answer = item["answer"].rstrip(".").split()
    assert answer[1:3] == ["is", "a"] and answer[0] == words[1]
    return [fact + "." for fact in facts], words[1], {words[3], words[5]}, answer[3], item["steps"]


def read_symbolic(item):
    facts, query = item["question"].split("?")
    root, options = query.split(":")
    return facts.split(";"), root, set(options.split("/")), item["answer"], item["steps"]


def english_fact(item, parent, node):
    first = "{} is a {}." if parent in without(item, 1) else "Every {} is a {}."
    return first.format(item["idx_to_symbol"][parent], item["idx_to_symbol"][node])


def symbolic_fact(item, parent, node):
    return f"{item['idx_to_symbol'][parent]}>{item['idx_to_symbol'][node]}"


def check_item(item, hops, read=read_english, fact=english_fact):
    """Check that a problem is well formed and has one right answer."""
    assert list(item) == KEYS
    names, root, target, distractor = (item[key] for key in KEYS[3:4] + KEYS[5:])
    facts, asked, options, answered, steps = read(item)
    assert len(set(names)) == len(names)
    assert sorted(facts) == sorted(fact(item, *edge) for edge in item["edges"])  # one fact per edge, in the right words
    assert (asked, answered, options) == (names[root], names[target], {names[target], names[distractor]})
    assert len(options) == 2 and root in (0, 1)
    assert set(steps) <= set(facts)

    distance, _ = breadth_first(item, root)
    other, _ = breadth_first(item, 1 - root)
    assert distance[target] == len(steps) and hops[0] <= len(steps) <= hops[1]
    assert distractor not in distance and distractor in other and target not in other
    path = [root]
    for step in steps:  # the steps walk along edges, from the root to the target
        path.append(next(child for child in children(item)[path[-1]] if fact(item, path[-1], child) == step))
    assert path[-1] == target

    leaves = without(item, 0)
    assert target in leaves and distractor in leaves
    depths = [max(near[leaf] for leaf in leaves - {0, 1} if leaf in near and leaf not in far)
              for near, far in ((distance, other), (other, distance))]  # fmt: skip
    assert len(steps) == depths[0] >= depths[1]  # no leaf below one root alone is farther from it than the target


# ---- the problems -------------------------------------------------------------------------------------------------


def test_every_problem_is_sound(sample):
    for items in sample.values():
        for item in items:
            check_item(item, (3, 6))


def test_names_are_the_official_ones(sample):
    people, concepts = set(), set()
    for item in sample["train"]:
        starts = without(item, 1)
        people |= {item["idx_to_symbol"][node] for node in starts}
        concepts |= {name for node, name in enumerate(item["idx_to_symbol"]) if node not in starts}
    assert people == set(PEOPLE)
    assert len(concepts) == 38 and all(name.endswith("pus") for name in concepts)


def test_splits_have_the_asked_sizes_and_share_no_question(sample):
    assert {split: len(items) for split, items in sample.items()} == {"train": 2000, "valid": 300, "test": 100}
    questions = [item["question"] for items in sample.values() for item in items]
    assert len(set(questions)) == 2400


def test_tiny_graphs_repeat_themselves_but_no_question_does(tmp_path):
    # on 5 nodes there are few questions: without the check, hundreds of these would occur twice
    splits = made(tmp_path, "--symbolic", "--nodes", 5, "--min-hops", 1, "--max-hops", 2, *("--train", 600), *SMALL[2:])
    questions = [item["question"] for items in splits.values() for item in items]
    assert len(questions) == len(set(questions)) == 620


@functools.cache
def official_valid():
    folder = os.environ.get("COCONUT_DATA_DIR")
    return json.loads((Path(folder) / "prosqa_valid.json").read_text()) if folder else None


def measure(items):
    """Return {statistic: its values for all items}."""
    return {
        "nodes": [len(item["idx_to_symbol"]) for item in items],
        "edges": [len(item["edges"]) for item in items],
        "steps": [len(item["steps"]) for item in items],
        "shortest paths": [breadth_first(item, item["root"])[1][item["target"]] for item in items],
        "root is node 1": [item["root"] for item in items],
        "people": [len(without(item, 1)) for item in items],
        "leaves": [len(without(item, 0)) for item in items],
        "question characters": [len(item["question"]) for item in items],
    }


@pytest.mark.parametrize("split", ["valid", "train"])
def test_statistics_are_the_official_ones(sample, split):
    """Each mean within three standard errors of a mean over 300 items; pytest -s prints the table."""
    measured = {name: statistics.fmean(values) for name, values in measure(sample[split]).items()}
    far = []
    print(f"\n{split}, {len(sample[split]):,} items: official, generated, standard errors apart")
    for name, (mean, deviation) in OFFICIAL.items():
        off = (measured[name] - mean) / (deviation / 300**0.5)
        print(f"{name:20} {mean:9.3f} {measured[name]:9.3f} {off:10.2f}")
        far += [name] if abs(off) > 3 else []
    assert not far


def test_shares_of_three_to_six_steps(sample):
    """Official 40.8 / 43.8 / 13.1 / 2.4 %; three standard errors of a share among 300 are 8.6, 8.6, 5.8 and 2.7."""
    counts = Counter(len(item["steps"]) for item in sample["train"])
    for hops, share in {3: 0.408, 4: 0.438, 5: 0.131, 6: 0.024}.items():
        assert abs(counts[hops] / 2000 - share) < 3 * (share * (1 - share) / 300) ** 0.5


def test_shortest_path_is_drawn_evenly():
    """Three of four shortest paths share a node: a walk that picked every next node evenly would prefer the fourth."""
    sys.path.insert(0, str(SCRIPT.parent))
    try:
        import prosqa
    finally:
        sys.path.pop(0)
    import random

    # 0 -> 2, 3, 4 -> 5 -> 8 and 0 -> 6 -> 7 -> 8
    graph = prosqa.Graph([[], [], [0], [0], [0], [2, 3, 4], [0], [6], [5, 7]], [1, 2] + [1] * 7)
    rng = random.Random(0)
    seen = Counter(tuple(prosqa.draw_path(rng, graph, 0, 8)) for _ in range(4000))
    assert len(seen) == 4
    assert all(abs(count - 1000) < 110 for count in seen.values())  # 4 standard deviations


# ---- the official file, where it is available -----------------------------------------------------------------------


needs_data = pytest.mark.skipif(
    not os.environ.get("COCONUT_DATA_DIR"), reason="COCONUT_DATA_DIR names no folder with the official file"
)


@needs_data
def test_official_problems_pass_the_same_checks():
    for item in official_valid():
        check_item(item, (3, 6))


@needs_data
def test_official_figures_are_what_measure_gives():
    measured = {name: statistics.fmean(values) for name, values in measure(official_valid()).items()}
    assert measured == pytest.approx(OFFICIAL_VALID, rel=1e-4)


# ---- options ------------------------------------------------------------------------------------------------------


def digests(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted((folder / "data").iterdir())}


def test_same_seed_same_bytes_other_seed_other_bytes(tmp_path):
    folders = [tmp_path / name for name in "abc"]
    for folder, seed, hashing in zip(folders, (1, 1, 2), ("0", "7", "0"), strict=True):
        folder.mkdir()
        subprocess.run(
            [sys.executable, str(SCRIPT), "--seed", str(seed), *SMALL], cwd=folder, check=True, capture_output=True,
            env={**os.environ, "PYTHONHASHSEED": hashing},
        )  # fmt: skip
    first, second, third = map(digests, folders)
    assert first == second
    assert not set(first.values()) & set(third.values())


def test_bytes_do_not_change_between_versions(tmp_path):
    """A pinned sum: a change of the recipe or of Python's random numbers must fail a test."""
    made(tmp_path, *SMALL)
    assert digests(tmp_path)["prosqa_generated_valid.json"] == VALID_SUM


VALID_SUM = "7a8eab7c973dbd26801a597de257566958f8e1cf83bb91fdb5ca4b221479bb40"


def test_evaluation_splits_do_not_depend_on_the_number_of_training_items(tmp_path):
    few = made(tmp_path, "--train", 5, *SMALL[2:])
    many = made(tmp_path, "--train", 200, *SMALL[2:])
    assert few["valid"] == many["valid"] and few["test"] == many["test"]


@pytest.mark.parametrize("options", [
    ("--nodes", 48, "--mean-parents", 1.3, "--depth-weight", 10, "--min-hops", 7, "--max-hops", 8),
    ("--mean-parents", 2.5),
    ("--nodes", 8, "--min-hops", 1, "--max-hops", 2),
])  # fmt: skip
def test_harder_and_easier_sets_are_sound(tmp_path, options):
    hops = (options[-3], options[-1]) if "--max-hops" in options else (3, 6)
    splits = made(tmp_path, *SMALL, *options)
    for items in splits.values():
        for item in items:
            check_item(item, hops)
    mean_edges = statistics.fmean(len(item["edges"]) for item in splits["train"])
    assert (2.5 not in options) or mean_edges > 50  # officially 36


@pytest.mark.parametrize(("nodes", "symbol"), [(12, str.isalpha), (60, str.isdigit)])
def test_symbolic_sets_are_sound_and_compact(tmp_path, nodes, symbol):
    used = set()
    for items in made(tmp_path, *SMALL, "--symbolic", "--nodes", nodes).values():
        for item in items:
            check_item(item, (3, 6), read_symbolic, symbolic_fact)
            assert all(symbol(name) for name in item["idx_to_symbol"])
            used |= set(item["idx_to_symbol"])
            assert " " not in item["question"] and "#" not in item["answer"]
    assert len(used) == nodes  # no more symbols than nodes: a vocabulary stays small


def test_own_names(tmp_path):
    (tmp_path / "people.txt").write_text("Ada\nGrace\nEmmy\nÉmilie\nSofia\nMary\n", encoding="utf-8")
    (tmp_path / "things.txt").write_text("\n".join(f"thing-{i}" for i in range(26)) + "\n")
    splits = made(tmp_path, *SMALL, "--people", "people.txt", "--concepts", "things.txt")
    names = {name for item in splits["train"] for name in item["idx_to_symbol"]}
    assert names == {"Ada", "Grace", "Emmy", "Émilie", "Sofia", "Mary"} | {f"thing-{i}" for i in range(26)}
    for item in splits["train"]:
        check_item(item, (3, 6))


def test_large_graphs_get_invented_names(tmp_path):
    items = made(tmp_path, *SMALL, "--nodes", 90, "--max-hops", 12)["train"]
    assert max(len(item["idx_to_symbol"]) for item in items) > 55  # more than the official lists hold
    for item in items:
        check_item(item, (3, 12))


def test_readme_says_generated_and_gives_a_command_that_repeats(tmp_path):
    made(tmp_path, *SMALL, "--seed", 5, "--prefix", "easy", "--nodes", 20)
    before = digests(tmp_path)
    readme = (tmp_path / "data" / "easy_README.md").read_text()
    assert "generated data, not the official ProsQA" in readme and "not the paper's" in readme.replace("\n", " ")
    assert before["easy_train.json"] in readme
    command = next(line.split("prosqa.py", 1)[1] for line in readme.splitlines() if line.startswith("    python"))
    for path in (tmp_path / "data").iterdir():
        path.unlink()
    assert generate(tmp_path, *command.split()).returncode == 0
    assert digests(tmp_path) == before


def test_names_of_the_official_files_are_never_written(tmp_path):
    made(tmp_path, *SMALL)
    assert not list((tmp_path / "data").glob("prosqa_t*")) and not list((tmp_path / "data").glob("prosqa_v*"))
    assert not list((tmp_path / "data").glob(".*"))  # no temporary file is left


def test_a_split_of_zero_writes_no_file(tmp_path):
    assert set(made(tmp_path, "--train", 0, "--valid", 0, "--test", 7)) == {"test"}


@pytest.mark.parametrize(("options", "message"), [
    (("--min-hops", 5, "--max-hops", 4), "--min-hops <= --max-hops, found 5 and 4"),
    (("--min-hops", 0), "1 <= --min-hops"),
    (("--nodes", 5), "3 hops need at least 6"),
    (("--nodes", 501), "at most 500"),
    (("--train", -1), "none below 0"),
    (("--train", 0, "--valid", 0, "--test", 0), "at least one above"),
    (("--mean-parents", 0), "--mean-parents 0"),
    (("--mean-parents", "nan"), "--mean-parents nan"),
    (("--depth-weight", -1), "--depth-weight -1"),
    (("--prefix", "prosqa"), "the official files have that name"),
    (("--prefix", "a/b"), "without folders"),
    (("--people", "absent.txt"), "absent.txt: cannot be read"),
    (("--people", "one.txt"), "at least 2 names are needed, found 1"),
    (("--people", "double.txt"), "'Ada' occurs twice"),
    (("--people", "dotted.txt"), "found 'A.'"),
    (("--people", "concepts.txt", "--concepts", "concepts.txt"), "share"),
    (("--concepts", "one.txt"), "28 nodes may need 26 concept names, there are 1"),
    (("--symbolic", "--people", "two.txt"), "--symbolic has its own names"),
    (("--nodes", 11, "--min-hops", 8, "--max-hops", 8), "hardly ever give a new problem"),
    (("--seed", "x"), "invalid int value"),
])  # fmt: skip
def test_impossible_options_are_refused_with_one_message(tmp_path, options, message):
    texts = {"one": ["Ada"], "two": ["Ada", "Eva"], "double": ["Ada", "Bea", "Ada"], "dotted": ["A.", "B"],
             "concepts": [f"c{i}" for i in range(30)]}  # fmt: skip
    for name, lines in texts.items():
        (tmp_path / f"{name}.txt").write_text("\n".join(lines))
    done = generate(tmp_path, *options)
    assert done.returncode == 2
    assert message in done.stderr and "Traceback" not in done.stderr and done.stderr.count("error:") == 1
    assert not (tmp_path / "data").exists()


def test_wrong_options_are_reported_together(tmp_path):
    done = generate(tmp_path, "--min-hops", 9, "--nodes", 3, "--prefix", "prosqa")
    assert all(word in done.stderr for word in ("found 9 and 6", "--nodes 3", "--prefix prosqa"))


def test_data_that_cannot_be_written_is_one_message(tmp_path):
    (tmp_path / "data").write_text("a file where the folder should be")
    done = generate(tmp_path, *SMALL)
    assert done.returncode == 1 and "Traceback" not in done.stderr and "data" in done.stderr


def test_help():
    done = generate(ROOT, "--help")
    assert done.returncode == 0 and "not the paper's" in done.stdout.replace("\n", " ")
