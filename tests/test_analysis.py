"""Looking into a trained model: graphs, thoughts and their pictures, by hand-made cases and against definitions."""

import json
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from analysis import frontier, sweep
from analysis.changes import answer, mcnemar
from analysis.graphs import GROUPS, Graph, read_graphs
from analysis.probing import Probe, all_thoughts, logits, open_checkpoint, require_thoughts, thoughts
from coconut import Coconut
from config import Config
from dataset import Curriculum, Data, prompt_batches
from models.gpt2 import GPT2, GPT2Config
from scripts import ask
from startup import blas  # noqa: F401  before mlx
from text.tokenizer import load_tokenizer
from training.checkpoint import describe_run, save_checkpoint
from training.evaluation import Evaluator
from utils import UserError

PROPERTY = settings(derandomize=True, deadline=None, database=None, max_examples=150)

# i -> e, i -> d; e -> c; c -> m (the target); and apart from them g -> h
EDGES = [("i", "e"), ("g", "h"), ("e", "c"), ("i", "d"), ("c", "m")]
GRAPH = Graph(EDGES, "i", "m")

# Graphs


def test_the_groups_of_a_graph():
    assert GRAPH.groups(1) == {
        "not reachable": ["g", "h"], "nearer": ["i"], "frontier": ["e", "d"],
        "on the path": ["e"], "off the path": ["d"], "farther": ["c", "m"],
    }  # fmt: skip
    assert GRAPH.groups(3)["frontier"] == GRAPH.groups(3)["on the path"] == ["m"]
    assert GRAPH.groups(4)["frontier"] == []


@st.composite
def graphs(draw) -> Graph:
    edges = draw(st.lists(st.tuples(st.sampled_from("abcdefg"), st.sampled_from("abcdefg")), min_size=1, max_size=14))
    nodes = sorted({node for edge in edges for node in edge})
    return Graph(edges, draw(st.sampled_from(nodes)), draw(st.sampled_from(nodes)))


@PROPERTY
@given(graphs(), st.integers(0, 7))
def test_groups_are_disjoint_and_cover_every_node(graph, distance):
    groups = graph.groups(distance)
    parts = [groups[name] for name in ("not reachable", "nearer", "frontier", "farther")]
    assert sorted(node for part in parts for node in part) == sorted(graph.nodes)
    assert sorted(groups["on the path"] + groups["off the path"]) == sorted(groups["frontier"])
    assert graph.groups(0)["frontier"] == [graph.root]


def walks(graph: Graph, length: int) -> set[tuple[str, ...]]:
    """All walks of so many edges from the root."""
    found = {(graph.root,)}
    for _ in range(length):
        found = {(*walk, child) for walk in found for parent, child in graph.edges if parent == walk[-1]}
    return found


@PROPERTY
@given(graphs())
def test_distances_and_paths_are_those_of_all_walks(graph):
    ends = [{walk[-1] for walk in walks(graph, length)} for length in range(4)]
    distances = graph.distances(graph.root)
    for length, reached in enumerate(ends):
        first = reached - set().union(*ends[:length])
        assert {node for node, distance in distances.items() if distance == length} == first
    if distances.get(graph.target, 9) < 4:
        shortest = [walk for walk in walks(graph, distances[graph.target]) if walk[-1] == graph.target]
        assert graph.path_nodes() == {node for walk in shortest for node in walk}
    if graph.target not in distances:
        assert graph.path_nodes() == set()


def test_items_of_both_generators_are_read(tmp_path):
    letters = {"edges": ["ie", "gh", "ec", "id", "cm"], "root": "i", "target": "m"}
    names = list("ieghcdm")
    numbers = [[names.index(parent), names.index(child)] for parent, child in EDGES]
    indices = {"edges": numbers, "root": 0, "target": 6, "idx_to_symbol": names}
    (tmp_path / "data.json").write_text(json.dumps([letters, indices]))
    assert read_graphs(str(tmp_path / "data.json")) == [GRAPH, GRAPH]
    assert read_graphs(str(tmp_path / "data.json"), 1) == [GRAPH]


@pytest.mark.parametrize(("content", "words"), [
    ('[{"question": "q", "steps": [], "answer": "a"}]', "item 0: holds no graph (edges, root, target missing)"),
    ('[{"edges": [[0, 9]], "root": 0, "target": 0, "idx_to_symbol": ["a"]}]', "item 0: its graph cannot be read"),
    ('["a"]', "item 0: holds no graph"),
    ('{"a": 1}', "expected a JSON list of items, found dict"),
    ("[", "cannot read a JSON list"),
])  # fmt: skip
def test_data_without_graphs_is_refused_with_its_item(tmp_path, content, words):
    (tmp_path / "data.json").write_text(content)
    with pytest.raises(UserError, match=r"data\.json") as caught:
        read_graphs(str(tmp_path / "data.json"))
    assert words in str(caught.value)


# Thoughts


def graph_item(names: str = "ieghcdm") -> dict:
    """GRAPH with other names, as an item of preprocessing/graphs.py."""
    name = dict(zip("ieghcdm", names, strict=True))
    edges = [name[parent] + name[child] for parent, child in EDGES]
    steps = [name[node] for node in "ecm"]
    question = "".join(edge + ";" for edge in edges) + f"?{steps[-1]}{name['h']}:{name['i']}"
    asked = {"root": name["i"], "target": steps[-1], "distractor": name["h"], "distractor_root": name["g"]}
    return {"question": question, "steps": steps, "answer": steps[-1], "edges": edges, **asked}


@pytest.fixture
def saved(tmp_path):
    """saved(**keys): a random model in a checkpoint folder, with its vocabulary and two items beside it."""
    (tmp_path / "words.json").write_text('["###"]')
    (tmp_path / "data.json").write_text(json.dumps([graph_item(), graph_item("abcdefg")]))

    def save(**keys):
        paths = {"val_path": str(tmp_path / "data.json"), "tokenizer": str(tmp_path / "words.json")}
        method = {} if {"cot", "no_cot"} & set(keys) else {"coconut": True}
        config = Config(**{
            "save_path": str(tmp_path), "name": "run", "layout": "compact", "max_latent_stage": 3, **paths,
            **method, "max_new_tokens": 4, **keys,
        })  # fmt: skip
        (tmp_path / "run").mkdir(exist_ok=True)
        curriculum = Curriculum(config, load_tokenizer(config.tokenizer, None))
        mx.random.seed(5)
        shape = {"n_positions": 64, "n_embd": 16, "n_layer": 2, "n_head": 2, "initializer_range": 0.4}
        model = Coconut(GPT2(GPT2Config(vocab_size=curriculum.tokenizer.vocab_size, **shape)))
        return save_checkpoint(model, describe_run(curriculum, 5, 4))

    return save


def test_a_checkpoint_opens_as_what_it_was_trained_as(saved):
    folder = saved(c_thought=2)
    for path in (folder, folder.parent):  # the checkpoint, and its run
        probe = open_checkpoint(str(path))
        assert (probe.n_thoughts, probe.curriculum.method.name) == (6, "coconut")
        assert probe.curriculum.config.layout == "compact"


def test_what_is_not_a_checkpoint_is_refused(saved, tmp_path):
    folder = saved()
    with pytest.raises(UserError, match=r"model.safetensors: expected a checkpoint folder"):
        open_checkpoint(str(folder / "model.safetensors"))
    with pytest.raises(UserError, match="expected a checkpoint folder"):
        open_checkpoint(str(tmp_path / "nothing"))
    (folder / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(UserError, match=r"model.safetensors has 7 bytes"):
        open_checkpoint(str(folder))


def test_a_moved_vocabulary_can_be_named(saved, tmp_path):
    folder = saved()
    (folder / "words.json").write_text('["###"]')
    (tmp_path / "words.json").rename(tmp_path / "moved.json")
    assert open_checkpoint(str(folder)).n_thoughts == 3  # a file of that name in the checkpoint
    (folder / "words.json").rename(folder.parent / "words.json")
    assert open_checkpoint(str(folder)).n_thoughts == 3  # and beside it
    (folder.parent / "words.json").unlink()
    with pytest.raises(UserError, match=r"words.json"):
        open_checkpoint(str(folder))
    assert open_checkpoint(str(folder), str(tmp_path / "moved.json")).n_thoughts == 3
    (tmp_path / "other.json").write_text('["##"]')
    with pytest.raises(UserError, match="another vocabulary"):
        open_checkpoint(str(folder), str(tmp_path / "other.json"))


@pytest.mark.parametrize("keys", [{"cot": True}, {"thought": "pause"}, {"max_latent_stage": 0}])
def test_a_model_without_thoughts_is_refused(saved, keys):
    folder = saved(**keys)
    with pytest.raises(UserError, match="feeds back no thoughts; a Coconut checkpoint is needed"):
        require_thoughts(open_checkpoint(str(folder)), str(folder))


def test_a_thought_does_not_depend_on_those_behind_it_nor_on_its_batch(saved):
    probe = open_checkpoint(str(saved()))
    data = probe.data(probe.curriculum.config.val_path)
    examples = [data.tokens[0], data.tokens[1]]
    few, many = all_thoughts(probe, examples, 2), all_thoughts(probe, examples, 5)
    assert few.shape == (2, 2, 16) and many.shape == (2, 5, 16)
    np.testing.assert_allclose(few, many[:, :2], atol=1e-5)
    np.testing.assert_allclose(thoughts(probe, examples[1:], 5), many[1:], atol=1e-5)
    assert np.abs(many[:, 0] - many[:, 1]).max() > 0.1


def test_thoughts_are_what_the_loop_feeds_back(saved):
    """Step by step without a cache: the hidden state before each latent becomes the next input."""
    probe = open_checkpoint(str(saved()))
    example = probe.data(probe.curriculum.config.val_path).tokens[0]
    gpt2 = probe.model.transformer
    columns = gpt2.embed(mx.array(example.question)[None])
    expected = []
    for _ in range(3):
        everything, nothing = mx.ones(columns.shape[:2], dtype=mx.bool_), mx.zeros(1, dtype=mx.int32)
        expected.append(gpt2(columns, gpt2.make_cache(everything, nothing))[:, -1:])
        columns = mx.concatenate([columns, expected[-1]], axis=1)
    np.testing.assert_allclose(thoughts(probe, [example], 3), mx.concatenate(expected, axis=1), atol=1e-5)


def hand_made(products: dict[str, float], number: int = 1, c_thought: int = 1) -> frontier.Held:
    """A thought with the given products, as the rows of an orthogonal embedding would give them."""
    row = np.zeros(256)
    for node, product in products.items():
        row[ord(node)] = product
    tokenizer = SimpleNamespace(encode=lambda text: list(text.encode()))
    curriculum = SimpleNamespace(tokenizer=tokenizer, thoughts_per_step=c_thought)
    return frontier.hold(7, GRAPH, number, row, Probe(None, curriculum))


def test_a_thought_that_is_the_sum_of_its_frontier_holds_it_alone():
    held = hand_made({"e": 1.0, "d": 1.0})
    assert held.recall == 1.0
    assert {node for node, product in held.products.items() if product} == {"e", "d"}
    groups = frontier.by_group([held])[1]
    assert groups["frontier"] == [1.0, 1.0] and groups["on the path"] == [1.0]
    assert set(groups["not reachable"] + groups["nearer"] + groups["farther"]) == {0.0}
    assert frontier.by_distance([held])[1] == {0: [0.0], 1: [1.0, 1.0], -1: [0.0, 0.0], 2: [0.0], 3: [0.0]}


def test_recall_is_the_share_of_the_frontier_on_top():
    assert hand_made({"e": 1.0, "g": 0.5}).recall == 0.5
    assert hand_made({"g": 1.0, "h": 0.5}).recall == 0.0
    assert hand_made({"e": 1.0}, number=5).recall is None  # nothing is 5 edges away


def test_two_thoughts_for_each_step_have_the_same_frontier():
    assert [hand_made({}, number, c_thought=2).distance for number in (1, 2, 3, 4)] == [1, 1, 2, 2]


def test_the_table_has_means_counts_and_recall():
    held = [hand_made({"e": 2.0, "d": 4.0, "g": 1.0, "h": 0.0}), hand_made({"e": 1.0, "g": 3.0, "h": 2.0})]
    row = " ".join(frontier.table(held)[2].split())
    assert row == "| 1 | 1.50 (4) | 0.00 (2) | 1.75 (4) | 1.50 (2) | 2.00 (2) | 0.00 (4) | 0.50 (2) |"


def test_a_node_of_several_tokens_is_refused():
    tokenizer = SimpleNamespace(encode=lambda text: [1, 2])
    with pytest.raises(UserError, match="node 'lempus' is 2 tokens"):
        frontier.token_of("lempus", Probe(None, SimpleNamespace(tokenizer=tokenizer)))


def test_products_are_logits(saved):
    probe = open_checkpoint(str(saved()))
    states = np.random.default_rng(0).normal(size=(2, 3, 16)).astype(np.float32)
    expected = states @ np.array(probe.model.transformer.wte.weight).T
    np.testing.assert_allclose(logits(probe, states), expected, rtol=1e-4, atol=1e-4)


# The commands


def test_the_frontier_command(saved, tmp_path, capsys):
    folder, out = saved(), tmp_path / "out"
    assert frontier.main([str(folder), str(tmp_path / "data.json"), "--out", str(out), "--item", "1"]) == 0
    lines = [json.loads(line) for line in (out / "frontier.jsonl").read_text().splitlines()]
    assert lines[0]["checkpoint"] == str(folder)
    assert [(line["idx"], line["thought"]) for line in lines[1:]] == [(i, k) for i in (0, 1) for k in (1, 2, 3)]
    assert (out / "frontier.png").read_bytes()[:4] == b"\x89PNG"
    assert capsys.readouterr().out.count("\n| ") >= 3
    probe = open_checkpoint(str(folder))
    example = probe.data(str(tmp_path / "data.json")).tokens[1]
    expected = logits(probe, thoughts(probe, [example], 3))[0, 1, ord("c")]
    assert lines[5]["products"]["c"] == pytest.approx(float(expected), abs=1e-3)


@pytest.mark.parametrize(("words", "message"), [
    (["--item", "2"], "--item 2: not among the 2 items"),
    (["--items", "0"], "--items 0: expected at least 1"),
    (["--items", "1", "--item", "1"], "--item 1: not among the 1 items"),
])  # fmt: skip
def test_mistakes_are_one_line_and_nothing_is_written(saved, tmp_path, capsys, words, message):
    command = [str(saved()), str(tmp_path / "data.json"), "--out", str(tmp_path / "out"), *words]
    assert frontier.main(command) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error
    assert not (tmp_path / "out").exists()


def test_the_groups_of_the_table_are_those_of_the_graphs():
    lines = frontier.table([hand_made({}, number=5)])
    assert " ".join(lines[2].split()) == "| 5 | 0.00 (2) | 0.00 (5) | none | none | none | none | none |"
    assert [cell.strip() for cell in lines[0].split("|")][2:8] == list(GROUPS)


def test_ask_answers_as_an_evaluation_does(saved, capsys, monkeypatch):
    folder = saved()
    probe = open_checkpoint(str(folder))
    data = Data(probe.curriculum.config.val_path, probe.curriculum, 64, 0)
    expected = [p["answer"] for p in Evaluator(probe.model, data, probe.curriculum).answers(3).predictions]
    assert len(list(prompt_batches(data.tokens, probe.curriculum, 3))) == 1
    for example, right in zip(data.examples, expected, strict=True):
        assert ask.main([str(folder), example.question]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert [line.split(":")[0] for line in lines if line.startswith("thought")] == [
            f"thought {k}" for k in (1, 2, 3)
        ]
        assert lines[-1] == f"answer: {right or '(none)'}"
    questions = iter([example.question for example in data.examples] + [""])
    monkeypatch.setattr("builtins.input", lambda prompt: next(questions))
    assert ask.main([str(folder), "--thoughts", "1"]) == 0
    assert capsys.readouterr().out.count("thought 1:") == 2


def test_ask_decodes_a_planted_thought(saved):
    """A thought of 100 times a row of an orthogonal embedding is that row's token."""
    probe = open_checkpoint(str(saved()))
    row = np.zeros(probe.curriculum.tokenizer.vocab_size)
    row[ord("k")] = 100.0
    assert ask.decoded(row, probe).startswith("'k' 1.00  ")


def test_a_question_that_is_too_long_is_one_line(saved, capsys):
    assert ask.main([str(saved()), "ab;" * 30]) == 2
    assert "the question and 3 thoughts take 93 of 64 positions" in capsys.readouterr().err


# Changed thoughts


@pytest.fixture
def probe(saved):
    return open_checkpoint(str(saved()))


def test_the_models_own_thoughts_are_the_ordinary_evaluation(probe):
    data = probe.data(probe.curriculum.config.val_path)
    found = answer(probe, data, 2, 3)
    expected = Evaluator(probe.model, data, probe.curriculum).answers(3).predictions
    assert found.answers == [p["answer"] for p in expected]
    assert found.correct.tolist() == [p["correct"] for p in expected]


@pytest.mark.parametrize(("pairs", "p"), [
    ((5, 5), 1.0), ((0, 0), 1.0), ((10, 0), 2 / 2**10), ((8, 1), 2 * 10 / 2**9), ((1, 8), 2 * 10 / 2**9),
])  # fmt: skip
def test_mcnemar_is_the_binomial_tail(pairs, p):
    one = np.array([True] * pairs[0] + [False] * pairs[1] + [True] * 7)
    other = np.array([False] * pairs[0] + [True] * pairs[1] + [True] * 7)
    assert mcnemar(one, other) == pytest.approx(p)


def test_the_sweep_command(saved, tmp_path, capsys):
    folder, out = saved(), tmp_path / "out"
    assert sweep.main([str(folder), str(tmp_path / "data.json"), "--thoughts", "0", "2", "--out", str(out)]) == 0
    printed = capsys.readouterr()
    assert [line.split("|")[1].strip() for line in printed.out.splitlines() if line.startswith("|")][2:5] == [
        "0",
        "2",
        "3",
    ]
    assert "uniform_prob 0" in printed.err
    lines = [json.loads(line) for line in (out / "sweep.jsonl").read_text().splitlines()]
    assert [(line["idx"], line["thoughts"]) for line in lines[1:]] == [(i, k) for k in (0, 2, 3) for i in (0, 1)]
    assert (out / "sweep.png").read_bytes()[:4] == b"\x89PNG"
    assert sweep.main([str(folder), str(tmp_path / "data.json"), "--thoughts", "-1"]) == 2
