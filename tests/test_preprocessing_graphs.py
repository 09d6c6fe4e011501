"""The generator of graphs: every item is sound and fair, splits are disjoint, options work."""

import json
import subprocess
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SMALL = ("--train", "300", "--valid", "60", "--test", "40", "--chains-train", "200", "--chains-valid", "50")
SPLITS = ("train", "valid", "test", "chains_train", "chains_valid")


def generate(folder, *options):
    """Run the script as a user does."""
    command = [sys.executable, ROOT / "preprocessing" / "graphs.py", "--out", folder, *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def made(folder, *options, prefix="graph") -> dict[str, list]:
    """Run the script, which must succeed, and read its items by split."""
    done = generate(folder, *options)
    assert done.returncode == 0, done.stderr
    return {split: json.loads((folder / f"{prefix}_{split}.json").read_text()) for split in SPLITS}


@pytest.fixture(scope="module")
def default(tmp_path_factory):
    return made(tmp_path_factory.mktemp("graphs"), *SMALL)


def depths(item: dict, root: str) -> dict[str, int]:
    """{node: edges from the root} of the nodes that can be reached."""
    found, level = {root: 0}, [root]
    while level:
        level = [child for parent, child in item["edges"] if parent in level]
        assert not set(level) & set(found), "a tree has one way to each node"
        found |= dict.fromkeys(level, max(found.values()) + 1)
    return found


def check_sound(item: dict, hops: int) -> tuple[dict, dict]:
    """Check one item against its question; returns the depths of both graphs."""
    edges, asked = item["question"].split("?")
    assert edges == "".join(edge + ";" for edge in item["edges"])
    candidates, root = asked.split(":")
    assert set(candidates) == {item["target"], item["distractor"]} and root == item["root"]
    own, other = depths(item, item["root"]), depths(item, item["distractor_root"])
    assert not set(own) & set(other)
    assert set(own) | set(other) == set("".join(item["edges"]))
    assert len(item["edges"]) == len(own) + len(other) - 2
    path = [item["root"], *item["steps"]]
    assert all(parent + child in item["edges"] for parent, child in pairwise(path))
    assert item["answer"] == item["steps"][-1] == item["target"]
    assert own[item["target"]] == other[item["distractor"]] == len(item["steps"]) == hops
    return own, other


def test_trees_are_sound(default):
    for item in [*default["train"], *default["valid"], *default["test"]]:
        for depth in check_sound(item, 3):
            assert len(depth) == 7 and Counter(depth.values())[1] >= 2


def test_chains_are_sound_and_of_all_lengths(default):
    lengths = Counter()
    for item in [*default["chains_train"], *default["chains_valid"]]:
        own, other = check_sound(item, len(item["steps"]))
        assert len(own) == len(other) == len(item["steps"]) + 1  # nothing but the path
        lengths[len(own)] += 1
    assert set(lengths) == {3, 4, 5, 7} and min(lengths.values()) > 30


def test_no_question_appears_twice(default):
    questions = [item["question"] for items in default.values() for item in items]
    assert len(set(questions)) == len(questions) == 650


def test_neither_order_nor_name_nor_place_gives_the_answer_away(default):
    """Each share is that of a fair coin, within five standard deviations (0.025 at 400 items)."""
    items = [*default["train"], *default["valid"], *default["test"]]
    first = sum(item["question"].split("?")[1][0] == item["target"] for item in items) / len(items)
    smaller = sum(item["target"] < item["distractor"] for item in items) / len(items)
    ends = [next(i for i, edge in enumerate(item["edges"]) if edge[1] == item["target"]) for item in items]
    others = [next(i for i, edge in enumerate(item["edges"]) if edge[1] == item["distractor"]) for item in items]
    later = sum(one > other for one, other in zip(ends, others, strict=True)) / len(items)
    assert all(0.375 < share < 0.625 for share in (first, smaller, later))


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(tmp_path):
    for name, seed in (("a", "5"), ("b", "5"), ("c", "6")):
        made(tmp_path / name, *SMALL, "--seed", seed)
    for split in SPLITS:
        a, b, c = ((tmp_path / name / f"graph_{split}.json").read_bytes() for name in "abc")
        assert a == b != c


def test_held_out_items_do_not_depend_on_the_size_of_the_training_sets(default, tmp_path):
    other = made(tmp_path, *SMALL, "--train", "20", "--chains-train", "20")
    assert all(other[split] == default[split] for split in ("valid", "test", "chains_valid"))


def test_other_sizes(tmp_path):
    options = ("--nodes", "20", "--hops", "4", "--branching", "3", "--chain-nodes", "6", "--prefix", "big")
    found = made(tmp_path, *SMALL, *options, prefix="big")
    for item in found["train"]:
        for depth in check_sound(item, 4):
            assert len(depth) == 20 and Counter(depth.values())[1] >= 3
    assert {len(item["steps"]) for item in found["chains_train"]} == {5}


@pytest.mark.parametrize(("options", "words"), [
    (["--nodes", "27"], "--nodes 27: expected 2 to 26"),
    (["--hops", "7"], "--hops 7: expected 1 to --nodes - 1"),
    (["--chain-nodes", "3", "9"], "--chain-nodes 3 9: expected 2 to --nodes (7) each"),
    (["--train", "0"], "--train 0: expected at least 1"),
    (["--prefix", "a/b"], "--prefix 'a/b'"),
    (["--branching", "6"], "more --nodes are needed"),
    (["--nodes", "2", "--hops", "1", "--branching", "1", "--chain-nodes", "2"], "not as many different questions"),
])  # fmt: skip
def test_impossible_options_are_named_and_nothing_is_written(tmp_path, options, words):
    done = generate(tmp_path / "out", *options)
    assert done.returncode == 2 and words in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()
