"""Recorded layers and attention, and the command that shows it: against definitions, on a tiny random model."""

import json
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from analysis import attention, edges
from analysis.attention import KINDS, PLACES, attention_map, masses
from analysis.edges import GROUPS, edge_groups, edge_tokens
from analysis.graphs import Graph
from analysis.probing import Probe, facts
from analysis.recording import record, require_gpt2
from coconut import Coconut
from config import Config
from dataset import Curriculum, collate
from models.gpt2 import GPT2, GPT2Config
from startup import blas  # noqa: F401  before mlx
from text.tokenizer import load_tokenizer
from text.tokens import TokenExample
from training.checkpoint import describe_run, save_checkpoint
from utils import UserError

PROPERTY = settings(derandomize=True, deadline=None, database=None, max_examples=150)


@st.composite
def graphs(draw) -> Graph:
    edges = draw(st.lists(st.tuples(st.sampled_from("abcdef"), st.sampled_from("abcdef")), min_size=1, max_size=12))
    nodes = sorted({node for edge in edges for node in edge})
    return Graph(edges, draw(st.sampled_from(nodes)), draw(st.sampled_from(nodes)))


@pytest.fixture
def model():
    """A random GPT-2 of 3 layers and 2 heads."""
    mx.random.seed(3)
    shape = {"n_positions": 64, "n_embd": 16, "n_layer": 3, "n_head": 2, "initializer_range": 0.4}
    return Coconut(GPT2(GPT2Config(vocab_size=261, **shape))).eval()


@pytest.fixture
def curriculum(tmp_path):
    """curriculum(layout): Coconut with a vocabulary of bytes."""
    (tmp_path / "words.json").write_text('["###"]')

    def make(layout: str = "lines") -> Curriculum:
        paths = {"val_path": "none", "tokenizer": str(tmp_path / "words.json")}
        config = Config(**{"save_path": str(tmp_path), "name": "run", "coconut": True, "layout": layout, **paths})
        return Curriculum(config, load_tokenizer(config.tokenizer, None))

    return make


def asked(curriculum, question: str) -> TokenExample:
    """A question, in tokens."""
    return TokenExample(np.array(curriculum.tokenizer.encode(question), np.int32), [], np.array([1]))


def prompts(curriculum, questions, n_latents: int):
    """A batch of prompts."""
    tokens = curriculum.tokenizer
    examples = [asked(curriculum, question) for question in questions]
    return collate([curriculum.prompt(e, n_latents) for e in examples], tokens.eos_id).to_mlx()


@pytest.mark.parametrize("n_latents", [0, 1, 3])
def test_recording_changes_nothing_and_weights_are_a_distribution(model, curriculum, n_latents):
    batch = prompts(curriculum(), ["abcd", "ab;cd;?e"], n_latents)
    recorded = record(model, batch)
    hidden, _ = model.think(batch)
    assert np.array_equal(recorded.hidden, hidden)
    assert np.array_equal(model.transformer.ln_f(recorded.outputs[-1]), hidden)
    real = np.array(batch.attention_mask)  # [B, T]
    for weights in map(np.array, recorded.weights):
        weights = weights * real[:, None, :, None]  # what padding attends to is of no interest
        np.testing.assert_allclose(weights.sum(axis=-1), np.broadcast_to(real[:, None], weights.shape[:3]), atol=1e-5)
        assert not np.triu(weights, 1).any()  # nothing ahead
        assert not (weights * ~real[:, None, None]).any()  # nothing on padding


def test_recorded_weights_give_the_blocks_own_output(model, curriculum):
    """Weights times values, put through the rest of the block by hand, are what the fused path put out."""
    batch = prompts(curriculum(), ["abcd", "ab;cd;?e"], 3)
    recorded = record(model, batch)
    real = np.array(batch.attention_mask)
    for i, block in list(enumerate(model.transformer.h))[1:]:
        x = recorded.outputs[i - 1]
        v = mx.split(block.attn.c_attn(block.ln_1(x)), 3, axis=-1)[2]
        v = v.reshape(*v.shape[:2], 2, -1).transpose(0, 2, 1, 3)
        mixed = (recorded.weights[i] @ v).transpose(0, 2, 1, 3).reshape(x.shape)
        middle = x + block.attn.c_proj(mixed)
        out = middle + block.mlp(block.ln_2(middle), None)
        np.testing.assert_allclose(np.array(out)[real], np.array(recorded.outputs[i])[real], atol=1e-5)


def look_everywhere(model) -> None:
    """Queries of zero: every place attends to all places up to itself alike."""
    for block in model.transformer.h:
        block.attn.c_attn.weight = mx.concatenate([mx.zeros((16, 16)), block.attn.c_attn.weight[:, 16:]], axis=1)
        block.attn.c_attn.bias = mx.concatenate([mx.zeros(16), block.attn.c_attn.bias[16:]])


def test_queries_of_zero_attend_to_every_column_alike(model, curriculum):
    look_everywhere(model)
    batch = prompts(curriculum("compact"), ["abcdefg"], 2)  # 7 tokens and one column of padding before them
    recorded = record(model, batch)
    first = int(batch.left_padding[0])
    for weights in map(np.array, recorded.weights):
        for t in range(9):
            np.testing.assert_allclose(weights[0, :, first + t, first : first + t + 1], 1 / (t + 1), atol=1e-6)


def test_a_base_of_another_kind_is_refused(model):
    require_gpt2(model, "name")
    other = SimpleNamespace(transformer=SimpleNamespace(config=SimpleNamespace(model_type="llama")))
    with pytest.raises(UserError, match=r"runs/x: layers and attention are recorded for GPT-2 alone.*base is llama"):
        require_gpt2(other, "runs/x")


# The set and the map of one item


def data_of(curriculum, questions) -> SimpleNamespace:
    """What `masses` reads of a data set."""
    return SimpleNamespace(tokens=[asked(curriculum, question) for question in questions])


QUESTIONS = ["ab;cd;?bd:a", "ef;?f:e"]


@pytest.mark.parametrize("layout", ["lines", "compact"])
@pytest.mark.parametrize("n_thoughts", [0, 1, 3])
def test_attention_of_a_place_is_shared_among_the_kinds(model, curriculum, layout, n_thoughts):
    own = curriculum(layout)
    found = masses(Probe(model, own), data_of(own, QUESTIONS), 2, n_thoughts)
    assert list(found) == list(PLACES)
    for place, values in found.items():
        assert values.shape == (2, 3, 5)
        np.testing.assert_allclose(values.sum(axis=-1), 1, atol=1e-5)
        thoughts = values[..., KINDS.index("thoughts")]
        # In the compact layout the last thought is itself the place that predicts the first token.
        seen = n_thoughts - (layout == "compact" and place == "first token")
        assert (thoughts > 0).all() if seen > 0 else not thoughts.any()
        assert values[..., KINDS.index("start marker")].any() == (layout == "lines")


def test_where_every_place_is_seen_alike_shares_are_counts(model, curriculum):
    look_everywhere(model)
    own = curriculum()
    found = masses(Probe(model, own), data_of(own, QUESTIONS), 2, 3)
    for i, question in enumerate(QUESTIONS):
        counts = {"first token": [len(question), 1, 3, 0, 1], "answer": [len(question), 1, 3, 1, 1]}
        for place, expected in counts.items():
            np.testing.assert_allclose(found[place][i], [np.array(expected) / sum(expected)] * 3, atol=1e-6)


def test_the_facts_of_a_question(curriculum):
    own = curriculum()
    probe = Probe(None, own)
    graph = facts(probe, asked(own, "ab;cd;?bd:a"))
    assert graph == [("ab;", [0, 1, 2]), ("cd;", [3, 4, 5]), ("?bd:a", [6, 7, 8, 9, 10])]
    prose = facts(probe, asked(own, "Max is 2.5. Is he old?\n"))
    assert [text for text, _ in prose] == ["Max is 2.5.", " Is he old?\n"]
    assert [place for _, places in prose for place in places] == list(range(23))
    assert facts(probe, asked(own, "no mark")) == [("no mark", list(range(7)))]


@pytest.mark.parametrize("layout", ["lines", "compact"])
def test_a_map_has_a_row_for_each_place_behind_the_question(model, curriculum, layout, monkeypatch):
    own = curriculum(layout)
    monkeypatch.setattr(model, "generate", lambda batch, limit, eos_id: [own.tokenizer.encode("xyz")])
    example = asked(own, "ab;?b:a")
    one = attention_map(Probe(model, own), example, 2)
    marked = layout == "lines"
    markers = (["start"] * marked, ["end"] * marked)
    assert one.columns == ["ab;", "?b:a", *markers[0], "thought 1", "thought 2", *markers[1], "answer", "self"]
    assert one.rows == ["thought 1", "thought 2", *markers[1], "'x'", "'y'", "'z'"]
    np.testing.assert_allclose(one.weights.sum(axis=-1), 1, atol=1e-5)
    assert not one.weights[:, 0, one.columns.index("thought 1")].any()  # its own place is the column `self`
    assert not one.weights[:, 2 + marked, -2].any() and one.weights[:, 3 + marked, -2].all()
    whole = attention_map(Probe(model, own), example, 2, "sum")
    heads = [attention_map(Probe(model, own), example, 2, head).weights for head in (0, 1)]
    np.testing.assert_allclose(whole.weights, heads[0] + heads[1], atol=1e-6)
    np.testing.assert_allclose(whole.weights, 2 * one.weights, atol=1e-6)
    assert np.abs(heads[0] - heads[1]).max() > 0.01


def test_an_answer_longer_than_the_model_is_shown_as_far_as_it_has_positions(model, curriculum, monkeypatch):
    own = curriculum()
    monkeypatch.setattr(model, "generate", lambda batch, limit, eos_id: [[ord("x")] * 100])
    shown = attention_map(Probe(model, own), asked(own, "ab;?b:a"), 2)
    assert len(shown.rows) == 64 - len("ab;?b:a") - 1 and shown.weights.shape[1] == len(shown.rows)


# Edges

# a -> b, a -> c, b -> d (the target), c -> e; apart from them f -> g
GRAPH = Graph([("a", "b"), ("f", "g"), ("a", "c"), ("b", "d"), ("c", "e")], "a", "d")
LISTED = "ab;fg;ac;bd;ce;?dg:a"


def test_edges_are_grouped_by_their_source():
    assert edge_groups(GRAPH, 0, [0, 1, 2, 3, 4]) == {
        "not reachable": [1, 3, 4], "reachable": [0, 2], "frontier": [0, 2], "optimal": [0],
        "reachable only": [], "frontier only": [2],
    }  # fmt: skip
    assert edge_groups(GRAPH, 1, [0, 1, 2, 3, 4]) == {
        "not reachable": [1], "reachable": [0, 2, 3, 4], "frontier": [3, 4], "optimal": [3],
        "reachable only": [0, 2], "frontier only": [4],
    }  # fmt: skip


@PROPERTY
@given(graphs(), st.integers(0, 4))
def test_groups_of_edges_are_nested_and_cover_all(graph, n):
    groups = {name: set(edges) for name, edges in edge_groups(graph, n, list(range(len(graph.edges)))).items()}
    assert groups["optimal"] <= groups["frontier"] <= groups["reachable"]
    parts = [groups[name] for name in ("not reachable", "reachable only", "frontier only", "optimal")]
    assert sorted(edge for part in parts for edge in part) == list(range(len(graph.edges)))
    if n == 0:
        assert groups["frontier"] == groups["reachable"]
        assert {graph.edges[edge][0] for edge in groups["frontier"]} <= {graph.root}


def test_the_tokens_of_an_edge_are_source_target_and_separator(curriculum):
    own = curriculum()
    probe = Probe(None, own)
    found = edge_tokens(probe, asked(own, LISTED), GRAPH, "item 0")
    assert found == {0: [0, 1, 2], 1: [3, 4, 5], 2: [6, 7, 8], 3: [9, 10, 11], 4: [12, 13, 14]}
    symbolic = edge_tokens(probe, asked(own, "a>b;f>g;a>c;b>d;c>e?a:d/g"), GRAPH, "item 0")
    assert symbolic == {0: [0, 2, 3], 1: [4, 6, 7], 2: [8, 10, 11], 3: [12, 14, 15]}  # no separator behind the last
    for wrong in ("ab;fg;ac;bx;ce;?dg:a", "Every a is a b. Every f is a g.", "ab;?d:a"):
        with pytest.raises(UserError, match="item 0"):
            edge_tokens(probe, asked(own, wrong), GRAPH, "item 0")


@pytest.mark.parametrize("layout", ["lines", "compact"])
def test_where_every_place_is_seen_alike_an_edge_has_its_share_of_tokens(model, curriculum, layout, monkeypatch):
    """Three of the tokens so far, times two heads; thought n + 1 is computed n tokens behind the question."""
    look_everywhere(model)
    own, other = curriculum(layout), "fg;ab;ac;?g:a"
    monkeypatch.setattr(
        edges, "read_graphs", lambda path: [GRAPH, Graph([("f", "g"), ("a", "b"), ("a", "c")], "a", "g")]
    )
    data = SimpleNamespace(tokens=[asked(own, LISTED), asked(own, other)], indices=np.array([0, 1]), path="data")
    for n in range(3):
        found = list(edges._looked(Probe(model, own), data, edges.read_graphs(""), range(2), n))
        for one, question in zip(found, (LISTED, other), strict=True):
            seen = len(question) + (layout == "lines") + n
            assert one.step == n + 1 and list(one.weights.values()) == pytest.approx(
                [2 * 3 / seen] * question.count(";")
            )
            np.testing.assert_allclose(one.gathered, one.even, atol=1e-6)
            assert one.even[:2] == [2 / 3, 2 / 6]


def test_means_of_edges_by_hand():
    groups = {**{group: [] for group in GROUPS}, "reachable": [0, 1], "frontier": [1]}
    looked = [
        edges.Looked(0, 1, {0: 0.5, 1: 1.0}, groups, [0.2, 0.4], [0.1, 0.1]),
        edges.Looked(1, 1, {0: 3.5, 1: 1.0}, groups, [0.2, 0.4], [0.1, 0.1]),
    ]
    assert edges.sums_of(looked, "reachable") == ([1.5, 4.5], [2, 2])
    row = [cell.strip() for cell in edges.table(looked)[2].split("|")]
    assert row[2] == "none" and row[3].startswith("1.5 (0.75 to 2.25) of 4") and row[4] == "1 (1 to 1) of 2"
    assert "0.3 (0.3 to 0.3) of 4; spread evenly it were 0.1" in edges.gathered(looked)
    assert looked[0].record()["sum"]["reachable"] == 1.5 and looked[0].record()["n"]["frontier"] == 1


# The commands


TWO = [
    {"question": "ab;cd;?bd:a", "steps": ["b"], "answer": "b"},
    {"question": "ef;?f:e", "steps": ["f"], "answer": "f"},
]


@pytest.fixture
def saved(model, tmp_path):
    """saved(items=TWO, **keys): the model in a checkpoint folder, with its vocabulary and the items beside it."""
    (tmp_path / "words.json").write_text('["###"]')
    (tmp_path / "run").mkdir()

    def save(items=TWO, **keys):
        (tmp_path / "data.json").write_text(json.dumps(items))
        paths = {"val_path": str(tmp_path / "data.json"), "tokenizer": str(tmp_path / "words.json")}
        keys = {"coconut": True, "layout": "compact", "max_latent_stage": 2, "c_thought": 1, **keys}
        config = Config(**{"save_path": str(tmp_path), "name": "run", "max_new_tokens": 4, **paths, **keys})
        return save_checkpoint(model, describe_run(Curriculum(config, load_tokenizer(config.tokenizer, None)), 5, 3))

    return save


@pytest.mark.parametrize("keys", [{}, {"thought": "pause"}, {"coconut": False, "cot": True}])
def test_the_command_takes_every_method(saved, tmp_path, capsys, keys):
    folder, out = saved(**keys), tmp_path / "out"
    command = [str(folder), str(tmp_path / "data.json"), "--out", str(out), "--item", "1", "--head", "1"]
    assert attention.main(command) == 0
    assert ("thoughts" in capsys.readouterr().out) == ("cot" not in keys)
    lines = [json.loads(line) for line in (out / "attention.jsonl").read_text().splitlines()]
    assert lines[0]["heads in the map"] == 1 and lines[0]["thoughts"] == (0 if "cot" in keys else 2)
    assert {line["map"] for line in lines if "map" in line} == {1}
    assert len([line for line in lines if "idx" in line]) == 2 * 2 * 3  # places, items, layers
    assert (out / "attention.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(("words", "message"), [
    (["--item", "2"], "--item 2: not among the 2 items"),
    (["--items", "0"], "--items 0: expected at least 1"),
    (["--head", "2"], "--head 2: expected 0 to 1"),
])  # fmt: skip
def test_mistakes_are_one_line_and_nothing_is_written(saved, tmp_path, capsys, words, message):
    command = [str(saved()), str(tmp_path / "data.json"), "--out", str(tmp_path / "out"), *words]
    assert attention.main(command) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_command_edges(saved, tmp_path, capsys):
    item = {"question": LISTED, "steps": ["b", "d"], "answer": "d", "edges": GRAPH.edges, "root": "a", "target": "d"}
    folder, out = saved(items=[item]), tmp_path / "out"
    assert edges.main([str(folder), str(tmp_path / "data.json"), "--out", str(out)]) == 0
    assert "spread evenly" in capsys.readouterr().out
    lines = [json.loads(line) for line in (out / "edges.jsonl").read_text().splitlines()]
    assert [line["n"]["frontier"] for line in lines[1:]] == [2, 2] and lines[1]["n"]["not reachable"] == 3
    assert (out / "edges.png").read_bytes()[:4] == b"\x89PNG"
    assert edges.main([str(folder), str(tmp_path / "data.json"), "--items", "0"]) == 2
