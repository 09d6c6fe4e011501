"""The control beside a model (analysis/beside.py): the same places of a second checkpoint, in every command."""

import json

import mlx.core as mx
import numpy as np
import pytest
from tiny_models import save_model

from analysis import attention, beside, controls, edges, frontier, thoughts, tree
from analysis.probing import open_checkpoint
from analysis.probing import thoughts as states_of
from utils import UserError

MODULES = (attention, controls, edges, frontier, thoughts, tree)
COMMANDS = {module.__name__.split(".")[1]: module for module in MODULES}


def item(root: str, listed: str, path: str) -> dict:
    """As preprocessing/graphs.py makes them, with as many edges as are listed."""
    question = f"{listed.replace(' ', ';')};?{path[-1]}h:{root}"
    asked = {"root": root, "target": path[-1], "distractor": "h", "distractor_root": "g"}
    return {"question": question, "steps": list(path), "answer": path[-1], "edges": listed.split(), **asked}


ITEMS = [item("i", "ie ec cm ed gh", "ecm"), item("a", "ab bc bd gh", "bd"), item("d", "da ab bc ac ae gh", "abc")]


@pytest.fixture
def saved(tmp_path):
    """saved(name, **keys): a random model in a checkpoint folder, and its items beside it, as data.json."""
    return lambda name="run", **keys: save_model(tmp_path, ITEMS, name, uniform_prob=0.3, **keys)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_shows_the_control_beside_the_model(name, saved, tmp_path, capsys):
    folder, control = saved(), saved("pause", thought="pause")
    words = [str(folder), str(tmp_path / "data.json"), "--out", str(tmp_path / "out")]
    assert COMMANDS[name].main(words) == 0
    alone = capsys.readouterr().out
    assert f"{folder}, 3 items" in alone and "Control" not in alone
    assert COMMANDS[name].main([*words, "--control", str(control)]) == 0
    printed = capsys.readouterr().out
    own, other = (printed.index(f"{path}, 3 items") for path in (folder, control))
    meaning = (
        f"Control: {control} (Pause as thought). What is found there too says nothing about the thoughts of {folder}."
    )
    assert own < other < printed.index(meaning)
    tables = [[line for line in part.splitlines() if line[:1] == "|"] for part in (printed[:other], printed[other:])]
    assert tables[0] != tables[1] and "nan" not in printed and "inf" not in printed
    settings, *lines = map(json.loads, (tmp_path / "out" / f"{name}.jsonl").read_text().splitlines())
    assert (settings["checkpoint"], settings["control"], settings["items"]) == (str(folder), str(control), 3)
    assert {line["checkpoint"] for line in lines} == {str(folder), str(control)}
    assert (tmp_path / "out" / f"{name}.png").read_bytes()[:4] == b"\x89PNG"


def test_a_picture_shows_both_below_one_another(saved, tmp_path, monkeypatch):
    drawn = []

    def draw(figure) -> list:
        drawn.append(figure)
        panel = figure.subplots()
        panel.set_ylim(0, 3 - len(drawn))
        return [panel]

    monkeypatch.setattr(frontier, "part", lambda held, item: beside.Part(4, 2, draw))
    folder, control = saved(), saved("pause", thought="pause")
    words = [str(folder), str(tmp_path / "data.json"), "--out", str(tmp_path / "out"), "--control", str(control)]
    assert frontier.main(words) == 0
    assert [figure.get_suptitle() for figure in drawn] == [f"{folder} (Coconut)", f"{control} (Pause as thought)"]
    upper, lower = (figure.bbox for figure in drawn)
    assert upper.y0 >= lower.y1 and upper.x0 == lower.x0
    assert [panel.get_ylim() for figure in drawn for panel in figure.axes] == [(0, 2), (0, 2)]


@pytest.mark.parametrize("layout", ["lines", "compact"])
def test_the_states_of_pauses_are_those_of_one_pass_over_each_prompt(saved, tmp_path, layout):
    """Prompts of several lengths together: their pauses stand in several columns."""
    probe = open_checkpoint(str(saved("pause", thought="pause", layout=layout)))
    data = probe.data(str(tmp_path / "data.json"))
    examples = [data.tokens[i] for i in range(3)]
    assert len({len(example.question) for example in examples}) > 1
    model, latent = probe.model.transformer, probe.curriculum.tokenizer.latent_id
    for example, found in zip(examples, states_of(probe, examples, 3), strict=True):
        ids = probe.curriculum.prompt(example, 3).ids
        cache = model.make_cache(mx.ones((1, len(ids)), dtype=mx.bool_), mx.zeros(1, dtype=mx.int32))
        expected = np.array(model(model.embed(mx.array(ids)[None]), cache))[0, np.flatnonzero(ids == latent) - 1]
        np.testing.assert_allclose(found, expected, atol=1e-5)
    for found in thoughts.layer_states(probe, examples, 3)[-1:]:
        np.testing.assert_allclose(found, states_of(probe, examples, 3), atol=1e-5)


def test_edges_of_pauses_do_not_depend_on_the_items_beside(saved, tmp_path):
    probe = open_checkpoint(str(saved("pause", thought="pause")))
    data = probe.data(str(tmp_path / "data.json"))
    together = edges.measure(probe, data, 3)
    alone = [one for i in range(3) for one in alone_in_its_batch(probe, data, i)]
    assert [(one.index, one.step) for one in together] == [(one.index, one.step) for one in alone]
    for one, other in zip(together, alone, strict=True):
        assert list(one.weights.values()) == pytest.approx(list(other.weights.values()), abs=1e-5)
        assert 0 < sum(one.weights.values()) <= 2 + 1e-5  # of two heads, whose attention is 1 each


def alone_in_its_batch(probe, data, i: int) -> list[edges.Looked]:
    graphs = edges.read_graphs(data.path)
    return [one for n in range(3) for one in edges._looked(probe, data, graphs, range(i, i + 1), n)]


@pytest.mark.parametrize("name", [name for name in COMMANDS if name != "controls"])
def test_a_control_with_other_places_is_refused(name, saved, tmp_path, capsys):
    folder, control = saved(), saved("cot", cot=True)
    words = [str(folder), str(tmp_path / "data.json"), "--out", str(tmp_path / "out"), "--control", str(control)]
    assert COMMANDS[name].main(words) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith(f"error: --control {control}: 0 thoughts or pauses, expected 3 as in {folder}")
    assert not (tmp_path / "out").exists()


def test_a_control_that_leaves_out_other_items_is_refused(saved, tmp_path, monkeypatch):
    options = beside.control_parser("x", "").parse_args([str(saved()), str(tmp_path / "data.json")])
    options.control = str(saved("pause", thought="pause"))
    probe = open_checkpoint(options.checkpoint)
    first, second = beside.open_subjects(options, probe)
    assert first.indices == second.indices == [0, 1, 2]
    monkeypatch.setattr(beside.Probe, "data", lambda self, path: first.data if self is probe else Dropped(first.data))
    with pytest.raises(UserError, match="the two models leave out different items"):
        beside.open_subjects(options, probe)


class Dropped:
    """Data without its second item."""

    def __init__(self, data):
        self.path, self.indices = data.path, np.delete(data.indices, 1)

    def __len__(self):
        return len(self.indices)
