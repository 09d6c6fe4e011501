"""The six classes of a text about a graph, by hand-made texts and properties, and the command that counts them."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from analysis import sweep
from analysis.changes import Answers
from analysis.classes import CLASSES, FORMS, find_form, judge, stated_node
from analysis.graphs import Graph, find_graphs
from analysis.probing import open_checkpoint
from tests.tiny_models import generated, save_model
from training.evaluation import Evaluator

PROPERTY = settings(derandomize=True, deadline=None, database=None, max_examples=150)
SENTENCES, ARROWS, NODES = FORMS

# Alex -> dumpus -> fompus (the target), and the longer way Alex -> gerpus -> hilpus -> fompus; dumpus -> impus; apart
# from them Bob -> jelpus.
EDGES = [
    ("Alex", "dumpus"), ("dumpus", "fompus"), ("Alex", "gerpus"), ("gerpus", "hilpus"), ("hilpus", "fompus"),
    ("dumpus", "impus"), ("Bob", "jelpus"),
]  # fmt: skip
GRAPH = Graph(EDGES, "Alex", "fompus")
ANSWER = "### Alex is a fompus."
RIGHT = f"Alex is a dumpus.\nEvery dumpus is a fompus.\n{ANSWER}"
LONGER = f"Alex is a gerpus.\nEvery gerpus is a hilpus.\nEvery hilpus is a fompus.\n{ANSWER}"


def name_of(text: str, n_done: int = 0, is_right: bool = True) -> str:
    return judge(text, GRAPH, SENTENCES, n_done, is_right).name


@pytest.mark.parametrize(("text", "n_done", "expected"), [
    (RIGHT, 0, "Correct Path"),
    (RIGHT.replace("is a", "is an"), 0, "Correct Path"),
    (RIGHT.replace("\n", "\n\n"), 0, "Correct Path"),  # empty lines are dropped
    (f"Every dumpus is a fompus.\n{ANSWER}", 1, "Correct Path"),
    (f"Every dumpus is a fompus.\n{ANSWER}", 2, "Correct Path"),  # `aligned` is not demanded
    (LONGER, 0, "Longer Path"),
    ("Every gerpus is a hilpus.\nEvery hilpus is a fompus.\n" + ANSWER, 1, "Longer Path"),
    (RIGHT, 1, "Correct Path"),  # begins at the root again
    ("Alex is a dumpus.\nEvery dumpus is a fompus.", 0, "Correct Path"),  # no ###
    ("Alex is a dumpus.\nEvery dumpus is a impus.\n### Alex is a impus.", 0, "Wrong Target"),
    (f"Alex is a dumpus.\n{ANSWER}", 0, "Wrong Target"),  # stops on the way
    (f"Alex is a dumpus.\nEvery gerpus is a hilpus.\n{ANSWER}", 0, "Hallucination"),  # broken chain
    (f"Alex is a dumpus.\nAlex is a dumpus.\n{ANSWER}", 0, "Hallucination"),  # repeated line
    (f"Alex is a fompus.\n{ANSWER}", 0, "Hallucination"),  # no such edge
    (f"Every dumpus is a fompus.\n{ANSWER}", 0, "Hallucination"),  # does not begin at the root
    (f"Bob is a jelpus.\n{ANSWER}", 1, "Hallucination"),  # Bob is not the root
    (f"dumpus is a fompus.\n{ANSWER}", 1, "Hallucination"),  # neither is dumpus
    (f"Every Bob is a jelpus.\n{ANSWER}", 1, "Hallucination"),  # which does not reach Bob
    (f"Alex is a dumpus\nEvery dumpus is a fompus.\n{ANSWER}", 0, "Hallucination"),  # a line in another form
    (f"so: Alex is a dumpus.\nEvery dumpus is a fompus.\n{ANSWER}", 0, "Hallucination"),
])  # fmt: skip
def test_the_class_of_a_text(text, n_done, expected):
    assert name_of(text, n_done) == name_of(text, n_done, is_right=False) == expected


@pytest.mark.parametrize("text", ["", ANSWER, "\n\n" + ANSWER, "###"])
def test_a_text_without_a_path_is_a_label(text):
    assert name_of(text, is_right=True) == "Correct Label"
    assert name_of(text, is_right=False) == "Incorrect Label"
    verdict = judge(text, GRAPH, SENTENCES, 2, True)
    assert (verdict.agrees, verdict.aligned, verdict.contradicts) == (None, None, False)


def test_what_is_recorded_beside_the_class():
    verdict = judge(RIGHT, GRAPH, SENTENCES, 0, True)
    assert verdict[1:] == (True, True, False)
    assert judge(RIGHT, GRAPH, SENTENCES, 1, True).aligned is False
    assert judge(f"Every dumpus is a fompus.\n{ANSWER}", GRAPH, SENTENCES, 1, True).aligned
    assert not judge(RIGHT.replace(ANSWER, "### Alex is a jelpus."), GRAPH, SENTENCES, 0, False).agrees
    assert judge("Alex is a dumpus.\n### Alex is a dumpus.", GRAPH, SENTENCES, 0, False).agrees
    assert not judge("Alex is a dumpus.", GRAPH, SENTENCES, 0, False).agrees  # states nothing
    assert judge("nonsense\n" + ANSWER, GRAPH, SENTENCES, 0, False)[1:] == (None, None, False)


@pytest.mark.parametrize(("text", "is_right", "contradicts"), [
    (RIGHT, True, False), (RIGHT, False, True), (LONGER, False, True),
    ("Alex is a dumpus.\n" + ANSWER, True, True), ("Alex is a dumpus.\n" + ANSWER, False, False),
    ("nonsense\n" + ANSWER, True, False), ("Alex is a fompus.\n" + ANSWER, True, False), (ANSWER, False, False),
])  # fmt: skip
def test_a_contradiction_is_a_path_and_an_answer_that_disagree(text, is_right, contradicts):
    assert judge(text, GRAPH, SENTENCES, 0, is_right).contradicts == contradicts


def test_the_node_that_an_answer_states():
    assert [stated_node(text) for text in (RIGHT, "ilm###m", "a>b\n### b", "m", "###")] == [
        "fompus", "m", "b", None, None,
    ]  # fmt: skip


def test_the_nearest_parent_is_one_that_the_root_reaches():
    graph = Graph([("z", "x"), ("y", "x"), ("a", "x"), ("e", "z"), ("z", "y")], "e", "x")
    assert [graph.nearest_parent(node) for node in "xyea"] == ["z", "z", None, None]


def test_paths_of_letters():
    """`ilm` begins at the root; after thoughts, at the parent of its first letter."""
    graph = Graph([("e", "i"), ("i", "l"), ("l", "m"), ("e", "c"), ("a", "b")], "e", "m")
    names = {
        ("ilm###m", 0): "Correct Path", ("lm###m", 1): "Correct Path", ("m###m", 2): "Correct Path",
        ("lm###m", 0): "Hallucination", ("im###m", 0): "Hallucination", ("il###m", 0): "Wrong Target",
        ("b###m", 1): "Hallucination", ("e###m", 1): "Hallucination", ("###m", 3): "Correct Label",
    }  # fmt: skip
    assert {(text, k): judge(text, graph, NODES, k, True).name for text, k in names} == names
    assert [judge(text, graph, NODES, 1, True).aligned for text in ("lm###m", "m###m", "ilm###m")] == [
        True,
        False,
        False,
    ]
    arrows = {
        ("e>ii>ll>m###m", 0): "Correct Path",
        ("l>m\n### m", 2): "Correct Path",
        ("e>i>l###l", 0): "Hallucination",
    }
    assert {(text, k): judge(text, graph, ARROWS, k, True).name for text, k in arrows} == arrows


@pytest.mark.parametrize(("options", "form", "separator"), [
    ((), SENTENCES, "\n"), (("--symbolic", "--nodes", "12"), ARROWS, ""),
    (("--symbolic", "--nodes", "12"), ARROWS, "\n"),
])  # fmt: skip
def test_the_rest_of_every_items_own_chain_is_a_correct_path(tmp_path, options, form, separator):
    items = json.loads(generated(*options))
    (tmp_path / "data.json").write_text(json.dumps(items))
    graphs = find_graphs(str(tmp_path / "data.json"))
    assert find_form([item["steps"] for item in items], graphs, separator) is form
    for item, graph in zip(items, graphs, strict=True):
        for k in range(len(item["steps"])):
            text = "".join(step + separator for step in item["steps"][k:]) + f"### {item['answer']}"
            assert judge(text, graph, form, k, True) == ("Correct Path", True, True, False)
        label = f"### {item['answer']}"
        assert judge(label, graph, form, len(item["steps"]), True).name == "Correct Label"


def sentence(edge: tuple[str, str]) -> str:
    return f"{edge[0]} is a {edge[1]}." if edge[0] == "Alex" else f"Every {edge[0]} is a {edge[1]}."


TEXTS = st.lists(st.sampled_from([*map(sentence, EDGES), "Alex is a impus.", "Alex"]), max_size=4).map("\n".join)
NAMES = sorted({name for edge in EDGES for name in edge})


@PROPERTY
@given(TEXTS, st.integers(0, 3), st.booleans(), st.permutations(NAMES))
def test_every_text_has_one_class_and_other_names_do_not_change_it(text, n_done, is_right, others):
    text += "\n" + ANSWER
    verdict = judge(text, GRAPH, SENTENCES, n_done, is_right)
    assert verdict.name in CLASSES
    renamed = dict(zip(NAMES, others, strict=True))
    graph = Graph([(renamed[a], renamed[b]) for a, b in EDGES], renamed["Alex"], renamed["fompus"])
    words = [line.rstrip(".").split(" ") for line in text.split("\n")]
    lines = [" ".join(renamed.get(word, word) for word in line) for line in words]
    text = "\n".join(line + "." if " is a " in line else line for line in lines)
    assert judge(text, graph, SENTENCES, n_done, is_right) == verdict


def test_counts_cover_all_items_and_groups_are_apart():
    texts = [RIGHT, LONGER, ANSWER, "x"]
    verdicts = [judge(text, GRAPH, SENTENCES, 0, True) for text in texts]
    forced = sweep.Forced(2, Answers(texts, np.array([True] * 4)), verdicts)
    data = type("Data", (), {"tokens": type("Tokens", (), {"n_steps": np.array([3, 2, 1, 3, 9])})})
    rows = list(sweep.groups({"2": forced}, data))
    assert [(cells, chosen.tolist()) for cells, _, chosen in rows] == [
        (["2", "all", "4"], [True] * 4),
        (["2", "k < steps", "2"], [True, False, False, True]),
        (["2", "k >= steps", "2"], [False, True, True, False]),
    ]
    for _, _, chosen in rows:
        assert sum(forced.counts(chosen).values()) == chosen.sum()
    assert forced.counts(rows[1][2]) == dict.fromkeys(CLASSES, 0) | {"Correct Path": 1, "Hallucination": 1}
    shares = sweep.share_table({"2": forced}, data)
    assert "Wrong Target" not in shares[0] and "0.250 (0.046 to 0.699)" in shares[2]


# The command


@pytest.fixture
def items() -> list[dict]:
    return json.loads(generated())[:4]


def test_the_command_classifies_prosqa(tmp_path, capsys, items):
    coconut = save_model(tmp_path, items, uniform_prob=0.3)
    cot = save_model(tmp_path, items, "cot-run", cot=True)
    words = [str(coconut), str(tmp_path / "data.json"), "--thoughts", "0", "1", "--out", str(tmp_path / "out")]
    assert sweep.main([*words, "--beside", str(cot), str(cot.parent)]) == 0
    printed = capsys.readouterr()
    assert "uniform_prob" not in printed.err
    tables = [line.split("|")[1:-1] for line in printed.out.splitlines() if line.startswith("|")]
    conditions = ["0", "1", "3", "CoT", str(cot.parent)]
    first = [row[0].strip() for row in tables]
    assert first[2:7] == conditions and [cell.strip() for cell in tables[7]][3:9] == list(CLASSES)
    settings, *lines = map(json.loads, (tmp_path / "out" / "sweep.jsonl").read_text().splitlines())
    assert settings["items"] == 4 and settings["beside"] == [str(cot), str(cot.parent)]
    assert [(line["thoughts"], line["idx"]) for line in lines] == [
        (name, i) for name in (0, 1, 3, "CoT", str(cot.parent)) for i in range(4)
    ]
    assert {"class", "agrees", "aligned", "text", "correct"} <= set(lines[0])
    assert {line["class"] for line in lines} <= set(CLASSES)
    assert (tmp_path / "out" / "sweep.png").read_bytes()[:4] == b"\x89PNG"


def test_the_trained_number_reproduces_the_evaluation(tmp_path, items):
    """Token for token: what sweep records for it is what run.py writes into predictions_*.jsonl."""
    folder = save_model(tmp_path, items)
    assert sweep.main([str(folder), str(tmp_path / "data.json"), "--thoughts", "3", "--out", str(tmp_path)]) == 0
    lines = [json.loads(line) for line in (tmp_path / "sweep.jsonl").read_text().splitlines()[1:]]
    probe = open_checkpoint(str(folder))
    expected = Evaluator(probe.model, probe.data(str(tmp_path / "data.json")), probe.curriculum).answers(3).predictions
    decode = probe.curriculum.tokenizer.decode
    assert [line["text"] for line in lines] == [decode(p["output_ids"]) for p in expected]
    assert all(line["text"] for line in lines)
    assert [line["correct"] for line in lines] == [p["correct"] for p in expected]


def test_two_thoughts_for_each_step_stand_for_half_as_many_steps(tmp_path, items):
    probe = open_checkpoint(str(save_model(tmp_path, items, c_thought=2)))
    data = probe.data(str(tmp_path / "data.json"))
    assert [sweep.force(probe, data, 1, n_thoughts).n_done for n_thoughts in (0, 1, 4, 5)] == [0, 0, 2, 2]


@pytest.mark.parametrize("change", [{"edges": None}, {"steps": ["think"]}])
def test_data_without_paths_has_accuracies_alone(tmp_path, capsys, items, change):
    items = [{key: value for key, value in {**item, **change}.items() if value is not None} for item in items]
    folder = save_model(tmp_path, items)
    assert sweep.main([str(folder), str(tmp_path / "data.json"), "--thoughts", "0", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert ("in a form that can be read" in printed) == ("steps" in change)
    assert "Hallucination" not in printed and sum(line.startswith("|") for line in printed.splitlines()) == 4
    lines = [json.loads(line) for line in (tmp_path / "sweep.jsonl").read_text().splitlines()[1:]]
    assert "correct" in lines[0] and "class" not in lines[0]


def test_a_later_item_without_a_graph_is_an_error(tmp_path, capsys, items):
    del items[2]["edges"]
    folder = save_model(tmp_path, items)
    assert sweep.main([str(folder), str(tmp_path / "data.json"), "--thoughts", "0", "--out", str(tmp_path / "o")]) == 2
    assert "item 2: holds no graph (edges missing)" in capsys.readouterr().err and not (tmp_path / "o").exists()


def test_more_thoughts_than_positions_are_an_error(tmp_path, capsys, items):
    folder = save_model(tmp_path, items)
    assert sweep.main([str(folder), str(tmp_path / "data.json"), "--thoughts", "2000", "--out", str(tmp_path)]) == 2
    assert "with 2000 thoughts takes" in capsys.readouterr().err


def test_a_checkpoint_beside_that_leaves_out_other_items_is_an_error(tmp_path, capsys, items, monkeypatch):
    folder = save_model(tmp_path, items)
    data = open_checkpoint(str(folder)).data(str(tmp_path / "data.json"))
    data.indices = data.indices[1:]
    with pytest.raises(sweep.UserError, match="leaves out other items"):
        sweep.open_others([str(folder)], data)
