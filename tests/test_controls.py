"""Changed thoughts: every condition against its formula, both modes, and the command, on a tiny random model."""

import json
from functools import partial
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest

from analysis import controls
from analysis.changes import Changed, answer
from analysis.conditions import (
    CONDITIONS,
    LEVELS,
    Clean,
    by_place,
    draw_donors,
    draw_orders,
    draw_swaps,
    exchanged,
    in_loop,
    noise,
    on_record,
    own,
    variance_shares,
)
from analysis.probing import all_thoughts, open_checkpoint
from coconut import Coconut
from config import Config
from dataset import Curriculum, collate
from models.gpt2 import GPT2, GPT2Config
from startup import blas  # noqa: F401  before mlx
from text.tokenizer import load_tokenizer
from training.checkpoint import describe_run, save_checkpoint
from training.evaluation import Evaluator


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """saved(**keys): a random model in a checkpoint folder, with its vocabulary and four items beside it."""
    root = tmp_path_factory.mktemp("controls")
    items = [{"question": f"{w}?", "steps": list(w), "answer": w[0]} for w in ("abc", "bcd", "cd", "de")]
    (root / "words.json").write_text('["###"]')
    (root / "data.json").write_text(json.dumps(items))
    paths = {"save_path": str(root), "val_path": str(root / "data.json"), "tokenizer": str(root / "words.json")}

    def save(name: str = "run", **keys):
        method = {} if {"cot", "no_cot"} & set(keys) else {"coconut": True}
        keys = {"name": name, "layout": "compact", "max_latent_stage": 3, "max_new_tokens": 4, **method, **keys}
        config = Config(**{**paths, **keys})
        (root / name).mkdir(exist_ok=True)
        curriculum = Curriculum(config, load_tokenizer(config.tokenizer, None))
        mx.random.seed(5)
        shape = {"n_positions": 64, "n_embd": 16, "n_layer": 2, "n_head": 2, "initializer_range": 0.4}
        model = Coconut(GPT2(GPT2Config(vocab_size=curriculum.tokenizer.vocab_size, **shape)))
        return save_checkpoint(model, describe_run(curriculum, 5, 4))

    return save


@pytest.fixture(scope="module")
def probe(saved):
    return open_checkpoint(str(saved()))


@pytest.fixture(scope="module")
def data(probe):
    return probe.data(probe.curriculum.config.val_path)


@pytest.fixture(scope="module")
def clean(probe, data) -> Clean:
    """The clean run of all four items."""
    return controls.clean_run(probe, data, 4, SimpleNamespace(means=None, seed=0))


ALL = np.arange(4)


def logits_with(probe, data, change, order=(0, 1, 2, 3)) -> np.ndarray:
    """Next-token logits behind the prompts of some items under a change, in the order of the items."""
    prompts = [probe.curriculum.prompt(data.tokens[i], 3)._replace(n_latents=3) for i in order]
    batch = collate(prompts, probe.curriculum.tokenizer.eos_id).to_mlx()
    model = probe.model
    if change:
        model = Coconut(Changed(model.transformer, 3, partial(change, np.array(order))))
    hidden, _ = model.think(batch)
    last = hidden[mx.arange(len(order)), batch.last_column]
    return np.array(probe.model.transformer.logits(last))[np.argsort(order)]


# What changes nothing


def test_the_models_own_thoughts_are_the_ordinary_evaluation(probe, data):
    found = answer(probe, data, 4, 3, partial(own, None))
    expected = Evaluator(probe.model, data, probe.curriculum).answers(3).predictions
    assert found.answers == [p["answer"] for p in expected]


def test_a_change_that_changes_nothing_changes_nothing(probe, data, clean):
    """Bit for bit: thoughts handed through, noise of level 0. Within 1e-5: recorded thoughts, in any order."""
    expected = logits_with(probe, data, None)
    for condition in (own, partial(noise, level=0.0)):
        assert np.array_equal(logits_with(probe, data, partial(condition, clean)), expected)
    itself = exchanged(clean, clean.thoughts)
    np.testing.assert_allclose(logits_with(probe, data, itself), expected, atol=1e-5)
    np.testing.assert_allclose(logits_with(probe, data, itself, order=(3, 1, 0, 2)), expected, atol=1e-5)


def test_the_identity_order_and_transplants_from_itself_are_the_recorded_thoughts(clean):
    order = np.tile(np.arange(3), (4, 1))
    permuted = exchanged(clean, np.take_along_axis(clean.thoughts, order[:, :, None], axis=1))
    transplanted = exchanged(clean, clean.thoughts[np.arange(4)])
    for k in range(3):
        for change in (permuted, transplanted):
            assert np.array_equal(change(ALL, k, mx.zeros((4, 16))), clean.thoughts[:, k])


# The conditions against their formulas


def under(name: str, clean: Clean, items=ALL, k: int = 1) -> np.ndarray:
    """What a condition makes of the recorded thoughts."""
    return np.array(CONDITIONS[name](clean, items, k, mx.array(clean.thoughts[items, k])))


def test_each_mean_and_part_is_its_formula(clean):
    h, mu = clean.thoughts[:, 1], clean.thoughts.mean(axis=(0, 1))
    mu_t, mu_i = clean.thoughts.mean(axis=0)[1], clean.thoughts.mean(axis=1)
    expected = {
        "zero": np.zeros_like(h), "mean by place": np.tile(mu_t, (4, 1)), "mean by item": mu_i,
        "without place": h - mu_t + mu, "without item": h - mu_i + mu, "without residual": mu_t + mu_i - mu,
        "residual alone": h - mu_t - mu_i + 2 * mu, "latent row": np.tile(clean.latent_row, (4, 1)),
    }  # fmt: skip
    for name, values in expected.items():
        np.testing.assert_allclose(under(name, clean), values, atol=1e-5, err_msg=name)
    assert np.abs(expected["without place"] - h).max() > 0.01


def test_the_parts_of_three_thoughts_by_hand():
    thoughts = np.array([[[1.0], [3.0]], [[2.0], [6.0]], [[3.0], [9.0]]], dtype=np.float32)  # mu 4; mu_t 2, 6
    clean = Clean(thoughts, thoughts.mean(axis=0), np.zeros(1), 0)  # mu_i 2, 4, 6
    items = np.arange(3)
    assert under("without place", clean, items).ravel().tolist() == [1, 4, 7]
    assert under("without item", clean, items).ravel().tolist() == [5, 6, 7]
    assert under("without residual", clean, items).ravel().tolist() == [4, 6, 8]
    assert under("residual alone", clean, items).ravel().tolist() == [3, 4, 5]
    # Squares: place 3 (4 + 4) = 24, item 2 (4 + 0 + 4) = 16, residual 1 + 0 + 1 + 1 + 0 + 1 = 4
    assert variance_shares(thoughts) == pytest.approx((100 * 24 / 44, 100 * 16 / 44, 100 * 4 / 44))


def test_the_shares_of_the_variance_sum_to_100_and_find_pure_parts(clean):
    assert sum(variance_shares(clean.thoughts)) == pytest.approx(100, abs=1e-3)
    rows = np.random.default_rng(0).normal(size=(5, 8))
    assert variance_shares(np.tile(rows, (4, 1, 1))) == pytest.approx((100, 0, 0))
    assert variance_shares(np.tile(rows[:, None], (1, 3, 1))) == pytest.approx((0, 100, 0))
    assert variance_shares(np.ones((4, 3, 2))) is None


def test_the_random_vector_has_the_size_of_the_places_part(clean):
    moved = under("random of that size", clean) - clean.thoughts[:, 1]
    size = np.linalg.norm(clean.by_place[1] - clean.by_place.mean(axis=0))
    np.testing.assert_allclose(np.linalg.norm(moved, axis=1), size, rtol=1e-4)
    assert np.abs(moved[0] - moved[1]).max() > 0.01


def test_noise_has_the_spread_of_the_thought_or_of_all(clean):
    h = clean.thoughts[:, 1]
    eps = under("noise only", clean) / h.std(axis=1, keepdims=True)
    for level in LEVELS:
        moved = under(f"noise {level:g}", clean) - h
        np.testing.assert_allclose(moved, level * h.std(axis=1, keepdims=True) * eps, rtol=1e-3, atol=1e-4 * level)
    np.testing.assert_allclose(under("noise of one size", clean), clean.thoughts.std() * eps, rtol=1e-4)
    assert 0.6 < eps.std() < 1.4


def test_noise_depends_on_seed_item_and_place_and_not_on_the_batch(clean):
    both = under("noise 5", clean)
    np.testing.assert_allclose(under("noise 5", clean, np.array([2, 1])), both[[2, 1]], atol=1e-5)
    other = Clean(clean.thoughts, clean.by_place, clean.latent_row, 6)
    assert np.abs(under("noise 5", other) - both).max() > 0.1
    first, second = (np.array(clean.draw(ALL, k, 16)) for k in (0, 1))
    assert np.abs(first - second).max() > 0.1


def test_noise_by_place_stands_in_its_places_alone(clean):
    conditions = by_place(4)
    assert {name.removeprefix("noise only, ") for name in conditions} == {
        "first 1", "first 2", "first 3", "last 1", "last 2", "last 3", "place 2", "place 3",
    }  # fmt: skip
    inside = {"first 2": [0, 1], "last 1": [3], "place 3": [2]}
    h = mx.array(clean.thoughts[:, 0])
    for name, places in inside.items():
        changed = [k for k in range(4) if conditions[f"noise only, {name}"](clean, ALL, k, h) is not h]
        assert changed == places


# The two modes


def test_zeros_are_what_hand_fed_zeros_give(probe, data, clean):
    gpt2, question = probe.model.transformer, data.tokens[1].question
    columns = mx.concatenate([gpt2.embed(mx.array(question)[None]), mx.zeros((1, 3, 16))], axis=1)
    cache = gpt2.make_cache(mx.ones(columns.shape[:2], dtype=mx.bool_), mx.zeros(1, dtype=mx.int32))
    expected = gpt2.logits(gpt2(columns, cache)[0, -1])
    change = in_loop(CONDITIONS, clean)["zero"]
    np.testing.assert_allclose(logits_with(probe, data, change)[1], expected, atol=1e-5)


@pytest.mark.parametrize("name", ["zero", "latent row", "mean by place", "mean by item", "without residual"])
def test_both_modes_agree_where_a_thought_is_replaced_by_something_else(probe, data, clean, name):
    found = logits_with(probe, data, in_loop(CONDITIONS, clean)[name])
    np.testing.assert_allclose(found, logits_with(probe, data, on_record(CONDITIONS, clean)[name]), atol=1e-5)
    assert np.abs(found - logits_with(probe, data, None)).max() > 0.01


def test_later_thoughts_follow_a_changed_one_in_the_loop_and_not_when_patched(probe, data, clean):
    seen = {}

    def first_to_zero(clean, items, k, h, mode):
        seen[mode, k] = np.array(h)
        return mx.zeros_like(h) if k == 0 else h

    for mode, apply in (("loop", in_loop), ("patched", on_record)):
        logits_with(probe, data, apply({"first": partial(first_to_zero, mode=mode)}, clean)["first"])
    assert np.abs(seen["loop", 1] - clean.thoughts[:, 1]).max() > 0.01
    np.testing.assert_allclose(seen["patched", 1], clean.thoughts[:, 1], atol=1e-6)


def test_huge_noise_reaches_the_model(probe, data, clean):
    found = logits_with(probe, data, partial(noise, clean, level=1e4))
    assert np.abs(found - logits_with(probe, data, None)).max() > 0.1


# Orders and partners


def test_orders_are_never_the_own_one():
    assert (draw_orders(200, 2, (0,)) == [1, 0]).all()
    orders = draw_orders(600, 3, (0,))
    assert (np.sort(orders, axis=1) == [0, 1, 2]).all() and not (orders == [0, 1, 2]).all(axis=1).any()
    counts = np.unique(orders, axis=0, return_counts=True)[1]
    assert len(counts) == 5 and counts.min() > 80  # each of the five others about 120 times
    assert not (orders == draw_orders(600, 3, (1,))).all()


def test_a_swap_exchanges_two_neighbors():
    swaps = draw_swaps(300, 4, (0,))
    assert {tuple(row) for row in swaps.tolist()} == {(1, 0, 2, 3), (0, 2, 1, 3), (0, 1, 3, 2)}


def test_donors_are_allowed_and_have_another_answer():
    answers, steps = list("abca") * 5, np.array([1, 1, 2, 2] * 5)
    same = steps[:, None] == steps
    for allowed in (same, ~same):
        donors = draw_donors(answers, allowed, (0,))
        assert all(answers[donor] != answers[i] and allowed[i, donor] for i, donor in enumerate(donors))
    assert draw_donors(["a", "a"], np.ones((2, 2), dtype=bool), (0,)) is None
    assert draw_donors(["a", "b"], np.eye(2, dtype=bool), (0,)) is None


def changes_of(probe, data, clean, mode: str):
    return controls.conditions(probe, clean, data, SimpleNamespace(mode=mode, by_place=False, seed=0))


def test_transplanted_thoughts_are_the_donors_and_permuted_ones_the_items_own(probe, data, clean):
    changes, donors, left_out = changes_of(probe, data, clean, "patched")
    assert list(changes)[-5:] == ["transplant", "transplant, same steps", "transplant, other steps", "permute", "swap"]
    assert not left_out and len(changes["permute"]) == 10
    for name, chosen in donors.items():
        for k in range(3):
            np.testing.assert_array_equal(changes[name][0](ALL, k, mx.zeros((4, 16))), clean.thoughts[chosen, k])
    for change in changes["permute"] + changes["swap"]:
        found = np.stack([np.array(change(ALL, k, mx.zeros((4, 16)))) for k in range(3)], axis=1)
        assert not np.array_equal(found, clean.thoughts)
        np.testing.assert_array_equal(np.sort(found, axis=1), np.sort(clean.thoughts, axis=1))


def test_one_thought_has_no_other_order(probe, data, clean):
    first = Clean(clean.thoughts[:, :1], clean.by_place[:1], clean.latent_row, 0)
    changes, _, left_out = changes_of(probe, data, first, "patched")
    assert "permute" not in changes and left_out == {"permute, swap": "there is one thought"}


# Pauses


def test_the_latent_row_in_every_place_is_a_pause(saved, probe, data, clean):
    """The same weights: a Coconut with that row in its places, and a model with pauses."""
    paused = open_checkpoint(str(saved("pause", thought="pause")))
    own_data = paused.data(paused.curriculum.config.val_path)
    changed = answer(probe, data, 4, 3, in_loop(CONDITIONS, clean)["latent row"])
    assert changed.texts == answer(paused, own_data, 4, 3).texts
    assert changed.texts != answer(probe, data, 4, 3).texts


def test_orders_transplants_and_means_change_nothing_for_pauses(saved):
    paused = open_checkpoint(str(saved("pause", thought="pause")))
    data = paused.data(paused.curriculum.config.val_path)
    clean = controls.clean_run(paused, data, 4, SimpleNamespace(means=None, seed=0))
    expected = answer(paused, data, 4, 3).texts
    same = {"transplant", "permute", "swap", "mean by place", "mean by item", "without item", "residual alone"}
    for mode in ("loop", "patched"):
        changes, _, _ = changes_of(paused, data, clean, mode)
        for name in same & set(changes):
            assert all(answer(paused, data, 4, 3, change).texts == expected for change in changes[name]), name
        assert answer(paused, data, 4, 3, changes["noise 50"][0]).texts != expected
    assert variance_shares(clean.thoughts) is None


# Means of another set, the tables and the command


def test_means_can_come_from_another_set(probe, data, tmp_path):
    (tmp_path / "train.json").write_text(json.dumps([{"question": "xyz?", "steps": ["x"], "answer": "x"}]))
    path = str(tmp_path / "train.json")
    clean = controls.clean_run(probe, data, 4, SimpleNamespace(means=path, seed=0))
    expected = all_thoughts(probe, [probe.data(path).tokens[0]], 3)[0]
    np.testing.assert_allclose(clean.by_place, expected, atol=1e-6)
    assert np.abs(clean.by_place - clean.thoughts.mean(axis=0)).max() > 0.01


def test_a_row_counts_flips_and_the_donors_answers():
    def answers(*said, right):
        return controls.Answers([f"###{s}" for s in said], np.array(right))

    clean = answers("a", "b", right=[True, True])
    cells = controls.row([answers("a", "c", right=[True, False])], clean, ["c", "c"])
    assert [cell[:5] for cell in cells] == ["0.500", "2", "1", "0.500", "0.500"]
    draws = [answers("a", "c", right=[True, False]), answers("a", "b", right=[True, True])]
    assert controls.row(draws, clean, None) == ["0.750 (0.500 to 1.000)", "2 x 2", "", "0.250 (0.000 to 0.500)", ""]
    assert (
        controls.interval(np.zeros((10, 5)))
        == controls.interval(np.zeros((1, 5)))
        == (0, 0, pytest.approx(0.4345, abs=1e-4))
    )


@pytest.mark.parametrize(("mode", "last"), [("loop", "noise of one size"), ("patched", "swap")])
def test_the_command(saved, tmp_path, capsys, mode, last):
    folder, out = saved(), tmp_path / "out"
    command = [str(folder), str(folder.parents[1] / "data.json"), "--mode", mode, "--out", str(out), "--by-place"]
    assert controls.main(command) == 0
    printed = capsys.readouterr().out
    rows = [[cell.strip() for cell in line.split("|")] for line in printed.splitlines() if line.startswith("|")][2:]
    assert rows[0][1] == "none" and rows[0][5].startswith("0.000")
    assert (rows[-1][1] if mode == "patched" else rows[-6][1]) == last
    assert {row[3] for row in rows} <= {"4", "4 x 10"}  # every condition has the same items
    assert "variance of the thoughts" in printed
    lines = [json.loads(line) for line in (out / "controls.jsonl").read_text().splitlines()]
    counts: dict = {}
    for line in lines[1:]:
        key = (line["condition"], line.get("draw"))
        counts[key] = counts.get(key, 0) + 1
    assert {line["mode"] for line in lines} == {mode} and set(counts.values()) == {4}
    assert len({name for name, _ in counts}) == len(rows)
    assert (out / "controls.png").read_bytes()[:4] == b"\x89PNG"


def test_a_second_checkpoint_answers_the_same_items(saved, tmp_path, capsys):
    folder, out = saved(), tmp_path / "out"
    data = str(folder.parents[1] / "data.json")
    for name, keys in (("pause", {"thought": "pause"}), ("cot", {"cot": True})):
        other = saved(name, **keys)
        assert controls.main([str(folder), data, "--control", str(other), "--items", "3", "--out", str(out)]) == 0
        printed = capsys.readouterr().out
        assert printed.count(", 3 items") == 2 and "each with its own thoughts: p " in printed
        assert ("left out: all but none" in printed) == (name == "cot")
        lines = [json.loads(line) for line in (out / "controls.jsonl").read_text().splitlines()]
        conditions = {line["condition"] for line in lines[1:] if line["checkpoint"] == str(other)}
        assert conditions == ({"none"} if name == "cot" else {"none", "remove", *CONDITIONS})
    assert controls.main([str(other), data]) == 2  # the first one needs thoughts
