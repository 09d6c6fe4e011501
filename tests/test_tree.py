"""Values of nodes after thoughts (analysis/tree.py): definitions on hand-made graphs and tiny random models."""

import json

import mlx.core as mx
import numpy as np
import pytest
from tiny_models import generated, save_model

from analysis import tree
from analysis.classes import FORMS
from analysis.graphs import Graph
from analysis.probing import open_checkpoint
from analysis.tree import Valued, curves, evaluate, name_probabilities
from dataset import collate
from models.gpt2 import GPT2
from utils import UserError

SENTENCES = FORMS[0]

# The shape of the paper's example (section 5.3): four children of the root, two of them right, seven grandchildren.
EDGES = [
    "Alex lempus", "Alex zhorpus", "Alex grimpus", "Alex sterpus", "lempus gwompus", "lempus yumpus", "lempus rompus",
    "grimpus rorpus", "grimpus yimpus", "grimpus lorpus", "zhorpus scrompus", "rorpus bompus", "rorpus dumpus",
    "rorpus fompus", "dumpus fompus", "fompus bompus", "gwompus rorpus", "gwompus dumpus", "Tom gorpus",
]  # fmt: skip
EXAMPLE = Graph([tuple(edge.split()) for edge in EDGES], "Alex", "bompus")


def valued(values: dict[str, float], graph: Graph = EXAMPLE, index: int = 0) -> Valued:
    return Valued(index, 1, 1.0, values, graph)


def test_candidates_and_heights_of_the_papers_shape():
    ahead = EXAMPLE.distances("Alex")
    assert [n for n, d in ahead.items() if d == 1] == ["lempus", "zhorpus", "grimpus", "sterpus"]
    assert sum(d == 2 for d in ahead.values()) == 7
    children = valued(dict.fromkeys(["lempus", "zhorpus", "grimpus", "sterpus"], 0.1))
    assert children.right == {"lempus", "grimpus"}
    assert valued({node: 0.1 for node, d in ahead.items() if d == 2}).right == {"gwompus", "rorpus"}
    heights = {kind: EXAMPLE.heights(kind) for kind in ("search", "shortest", "longest")}
    nodes = ("lempus", "grimpus", "zhorpus", "sterpus")
    assert {kind: [own[node] for node in nodes] for kind, own in heights.items()} == {
        "search": [2, 2, 1, 0], "shortest": [1, 1, 1, 0], "longest": [5, 4, 1, 0],
    }  # fmt: skip


def test_a_graph_with_a_cycle_has_no_heights():
    with pytest.raises(UserError, match="cycle"):
        Graph([("a", "b"), ("b", "a")], "a", "b").heights("longest")


@pytest.fixture(scope="module")
def items() -> list[dict]:
    """Items of ProsQA's form, whose names are several tokens of the tiny vocabulary of bytes."""
    return json.loads(generated("--nodes", "10"))[:6]


@pytest.fixture(scope="module")
def probe(items, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tree")
    return open_checkpoint(str(save_model(folder, items, uniform_prob=0.3)))


@pytest.fixture(scope="module")
def data(probe):
    return probe.data(probe.curriculum.config.val_path)


def graph_of(item: dict) -> Graph:
    names = item["idx_to_symbol"]
    return Graph([(names[a], names[b]) for a, b in item["edges"]], names[item["root"]], names[item["target"]])


def teacher_forced(probe, ids: np.ndarray, prompt, n: int) -> float:
    """Probability of the last n of ids behind a prompt, by one pass over the whole."""
    batch = collate([prompt._replace(ids=ids)], probe.curriculum.tokenizer.eos_id).to_mlx()
    hidden, _ = probe.model.think(batch)
    logits = probe.model.transformer.logits(hidden[0])
    shares = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    first = int(batch.left_padding[0]) + len(ids) - n
    return float(np.exp(sum(shares[first + i - 1, int(ids[len(ids) - n + i])].item() for i in range(n))))


@pytest.mark.parametrize("n_thoughts", [0, 1, 3])
def test_values_are_those_of_one_pass_over_the_text(probe, data, items, n_thoughts):
    """Lead and names of several lengths, from a batch of prompts of several lengths."""
    encode = probe.curriculum.tokenizer.encode
    graphs = [graph_of(item) for item in items]
    lead = np.array(encode("Every"), np.int32)
    prompts = [probe.curriculum.prompt(data.tokens[i], n_thoughts) for i in range(len(items))]
    led = [p._replace(ids=np.concatenate([p.ids, lead])) for p in prompts]
    names = [[encode(" " + node) for node in graph.nodes] for graph in graphs]
    assert len({len(ids) for own in names for ids in own}) > 1
    leads, values = name_probabilities(probe, led, len(lead), names)
    for prompt, p_lead, own, found in zip(led, leads, names, values, strict=True):
        assert np.log(p_lead) == pytest.approx(np.log(teacher_forced(probe, prompt.ids, prompt, len(lead))), abs=1e-4)
        expected = [teacher_forced(probe, np.array([*prompt.ids, *ids], np.int32), prompt, len(ids)) for ids in own]
        assert np.log(found) == pytest.approx(np.log(expected), abs=1e-4)  # of bytes: far below 1
        assert sum(found) <= 1 + 1e-6  # no name begins another


def test_candidates_are_as_far_away_as_steps_are_done(probe, data, items):
    graphs = [graph_of(item) for item in items]
    for k in (1, 2):
        for found in evaluate(probe, data, graphs, SENTENCES, k):
            graph = graphs[found.index]
            ahead = graph.distances(graph.root)
            assert list(found.values) == [node for node, d in ahead.items() if d == k]


def test_a_model_that_copies_gives_its_node_the_value_1(probe, data, items, monkeypatch):
    """Hand-made logits: after `Every` and each letter the next one of one name."""
    graph = graph_of(items[0])
    node = next(n for n, d in graph.distances(graph.root).items() if d == 1)
    ids = probe.curriculum.tokenizer.encode(" " + node)
    calls = []

    def logits(self, states):
        calls.append(states.shape)
        place = len(calls) - 1
        table = mx.zeros((states.shape[0], self.config.vocab_size))
        if place < len(ids):
            table[:, ids[place]] = 1000.0
        return table

    monkeypatch.setattr(GPT2, "logits", logits)
    [found] = evaluate(probe, data, [graph], SENTENCES, 1)
    assert found.values.pop(node) == pytest.approx(1)
    assert all(value < 1e-6 for value in found.values.values())


def test_other_names_for_the_nodes_change_no_value(tmp_path):
    """Letters exchanged in the data, and their rows in the model."""
    items = json.loads(generated("--nodes", "8", "--symbolic"))[:4]
    folder = save_model(tmp_path, items, uniform_prob=0.3)
    other = str.maketrans("abcdefgh", "hgfedcba")
    renamed = [rename(item, other) for item in items]
    values = []
    for content, permute in ((items, False), (renamed, True)):
        (tmp_path / "data.json").write_text(json.dumps(content))
        probe = open_checkpoint(str(folder))
        if permute:
            table = probe.model.transformer.wte.weight
            order = np.arange(len(table))
            letters = [ord(c) for c in "abcdefgh"]
            order[letters] = [ord(chr(c).translate(other)) for c in letters]
            probe.model.transformer.wte.weight = table[mx.array(order)]
        data = probe.data(str(tmp_path / "data.json"))
        graphs = [graph_of(item) for item in content]
        values.append([list(v.values.values()) for v in evaluate(probe, data, graphs, FORMS[1], 1)])
    assert values[0] and all(one == pytest.approx(two, rel=1e-5, abs=0) for one, two in zip(*values, strict=True))


def rename(item: dict, other: dict) -> dict:
    texts = {key: item[key].translate(other) for key in ("question", "answer")}
    lists = {key: [text.translate(other) for text in item[key]] for key in ("steps", "idx_to_symbol")}
    return item | texts | lists


def test_curves_rise_and_stand_above_one_another():
    rng = np.random.default_rng(0)
    found = [valued(dict(zip("abcd", rng.dirichlet(np.ones(4)) * rng.random(), strict=True))) for _ in range(50)]
    one, two, three = curves(found).values()
    for curve in (one, two, three):
        assert (np.diff(curve) >= 0).all()
    assert (one <= two).all() and (two <= three).all()
    assert one.max() == pytest.approx(max(max(v.values.values()) for v in found))


def test_numbers_of_one_item_by_hand():
    v = valued({"lempus": 0.3, "zhorpus": 0.1, "grimpus": 0.4, "sterpus": 0.0})
    assert v.sorted == [0.4, 0.3, 0.1] and v.best_is_right
    p = np.array([0.3, 0.1, 0.4]) / 0.8
    assert v.entropy == pytest.approx(-(p * np.log(p)).sum() / np.log(4))
    assert valued({"lempus": 0.2}).entropy == 0 and valued({"lempus": 0.2}).sorted == [0.2, 0, 0]
    heights = tree.by_height([v], "search")
    assert heights["right"][2][:, 0] == pytest.approx([0.7, 2])
    assert {height: cells.tolist() for height, cells in heights["wrong"].items()} == {1: [[0.1], [1]], 0: [[0.0], [1]]}
    record = v.record()["nodes"]["grimpus"]
    assert record == {"value": 0.4, "right": True, "height_search": 2, "height_shortest": 1, "height_longest": 4}


def test_means_by_height_are_of_all_nodes_together_and_their_number_is_printed():
    """Of three right nodes of height 2, two in one item and one in the other; the others are wrong."""
    found = [valued({"lempus": 0.2, "grimpus": 0.4, "sterpus": 0.1}), valued({"lempus": 0.9, "zhorpus": 0.0}, index=1)]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in tree.height_table({1: found}, "search")[2:]]
    assert [row[:2] for row in rows] == [["1", "0"], ["1", "1"], ["1", "2"]]
    assert rows[2][2].startswith("0.5 (") and rows[2][2].endswith(" of 3") and rows[2][3] == "none"
    assert rows[0][2] == "none" and rows[0][3] == "0.1 (0.1 to 0.1) of 1"


def test_sentences_without_a_thought_begin_with_the_root_and_have_no_candidates(tmp_path, capsys, items):
    folder = save_model(tmp_path, items, uniform_prob=0.3)
    words = [str(folder), str(tmp_path / "data.json"), "--thoughts", "0", "1", "--out", str(tmp_path / "out")]
    assert tree.main(words) == 2
    assert "--thoughts 0: the first step" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_the_command(tmp_path, capsys, items):
    folder = save_model(tmp_path, items, uniform_prob=0.3)
    words = [str(folder), str(tmp_path / "data.json"), "--out", str(tmp_path / "out")]
    assert tree.main([*words, "--item", "2"]) == 0
    printed = capsys.readouterr()
    assert "uniform_prob" not in printed.err
    rows = [line.split("|")[1:-1] for line in printed.out.splitlines() if line.startswith("|")]
    assert {row[0].strip() for row in rows if len(row) > 4} - {"thoughts", "--------"} == {"1", "2", "3"}
    assert {row[0].strip() for row in rows if len(row) == 4} - {"thoughts", "--------"} == {"1", "2", "3"}
    settings, *lines = map(json.loads, (tmp_path / "out" / "tree.jsonl").read_text().splitlines())
    assert settings["items"] == 6 and {line["thoughts"] for line in lines} == {1, 2, 3}
    assert (tmp_path / "out" / "tree.png").read_bytes()[:4] == b"\x89PNG"
    assert tree.main([*words, "--item", "99"]) == 2
    assert "--item 99" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda item: [item.pop("edges")], "holds no graph"),
        (lambda item: item.update(steps=["so it is"] * len(item["steps"])), "no paths in a form"),
    ],
)
def test_data_without_readable_graphs_is_refused(change, message, tmp_path, capsys, items):
    spoiled = json.loads(json.dumps(items))
    for item in spoiled:
        change(item)
    folder = save_model(tmp_path, spoiled)
    assert tree.main([str(folder), str(tmp_path / "data.json"), "--out", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
