"""What thoughts decode to: the lens against its definition, hits and norms of hand-made thoughts, the command."""

import json

import mlx.core as mx
import numpy as np
import pytest

from analysis import thoughts
from analysis.intervals import bootstrap, mean, share
from analysis.probing import all_thoughts, logits, open_checkpoint
from analysis.thoughts import Decoded, decode, layer_states
from coconut import Coconut
from config import Config
from dataset import Curriculum
from models.gpt2 import GPT2, GPT2Config
from startup import blas  # noqa: F401  before mlx
from text.tokenizer import load_tokenizer
from training.checkpoint import describe_run, save_checkpoint

WORDS = ["###", "<<", ">>", "12", " 12", "7", "5"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random Coconut of 2 layers with its vocabulary, in a checkpoint folder, and three items of two sums each."""
    root = tmp_path_factory.mktemp("thoughts")
    items = [
        {"question": f"{a}+5, +7?", "steps": [f"<<{a}+5={a + 5}>>", f"<<{a + 5}+7=12>>"], "answer": "12"}
        for a in (2, 0, 7)
    ]
    (root / "words.json").write_text(json.dumps(WORDS))
    (root / "data.json").write_text(json.dumps(items))
    paths = {"save_path": str(root), "val_path": str(root / "data.json"), "tokenizer": str(root / "words.json")}
    config = Config(**{"name": "run", "coconut": True, "c_thought": 1, "max_latent_stage": 2, **paths})
    curriculum = Curriculum(config, load_tokenizer(config.tokenizer, None))
    mx.random.seed(5)
    shape = {"n_positions": 64, "n_embd": 16, "n_layer": 2, "n_head": 2, "initializer_range": 0.4}
    (root / "run").mkdir()
    model = Coconut(GPT2(GPT2Config(vocab_size=curriculum.tokenizer.vocab_size, **shape)))
    return save_checkpoint(model, describe_run(curriculum, 5, 3))


@pytest.fixture
def probe(folder):
    return open_checkpoint(str(folder))


@pytest.fixture
def data(probe):
    return probe.data(probe.curriculum.config.val_path)


def test_the_last_layer_is_the_plain_lens_and_earlier_ones_are_not(probe, data):
    examples = [data.tokens[i] for i in range(3)]
    first, last = layer_states(probe, examples, 3)
    np.testing.assert_allclose(last, all_thoughts(probe, examples, 3), atol=1e-6)
    assert np.abs(first - last).max() > 0.1


def test_a_state_does_not_depend_on_the_thoughts_behind_it(probe, data):
    examples = [data.tokens[i] for i in range(3)]
    for few, many in zip(layer_states(probe, examples, 2), layer_states(probe, examples, 5), strict=True):
        np.testing.assert_allclose(few, many[:, :2], atol=1e-5)


def test_decoded_thoughts_are_the_softmax_of_their_logits(probe, data):
    states = all_thoughts(probe, [data.tokens[i] for i in range(3)], 3)
    expected = mx.softmax(probe.model.transformer.logits(mx.array(states)), axis=-1)
    found = decode(probe, data, 3)
    assert [(d.index, d.thought, d.layer) for d in found] == [(i, k, 2) for i in range(3) for k in (1, 2, 3)]
    for d in found:
        assert d.step == d.thought - 1  # one thought stands for each step
        shares = np.array(expected[d.index, d.thought - 1])
        np.testing.assert_allclose(d.probabilities, np.sort(shares)[::-1][:10], rtol=1e-4)
        np.testing.assert_allclose(shares[d.ids], d.probabilities, rtol=1e-4)
        assert d.entropy == pytest.approx(-(shares * np.log(shares)).sum(), rel=1e-4)
        own, before = states[d.index, d.thought - 1], states[d.index, d.thought - 2]
        assert d.norm == pytest.approx(np.sqrt((own**2).sum()), rel=1e-5)
        if d.thought > 1:
            norms = np.sqrt((own**2).sum() * (before**2).sum())
            assert d.cosine == pytest.approx((own * before).sum() / norms, abs=1e-5)
    assert found[0].cosine is None
    assert thoughts.softmax(logits(probe, states)).sum(axis=-1) == pytest.approx(1.0)


def test_all_layers_hold_the_plain_lens_as_their_last(probe, data):
    every = decode(probe, data, 3, all_layers=True)
    assert [d for d in every if d.layer == 2] == decode(probe, data, 3) and len(every) == 18


def test_a_planted_thought_decodes_to_its_row(probe, data):
    """1000 times a row of an orthogonal head is that row's token."""
    size = probe.curriculum.tokenizer.vocab_size
    probe.model.transformer.wte.weight = mx.eye(size)
    planted = np.zeros((2, size), dtype=np.float32)
    planted[0, 65], planted[1, 66] = 1000, 2000
    first, second = thoughts._decoded(probe, data, 0, 2, planted)
    assert (first.ids[0], second.ids[0]) == (65, 66) and first.probabilities[0] > 0.99
    assert (first.norm, second.norm, second.cosine) == (1000, 2000, 0)
    assert first.entropy == pytest.approx(0)


def test_the_scale_of_the_embedding_is_that_of_the_rows_in_use(probe, data):
    """Rows of one norm for each token, as large as its id; the questions have these tokens."""
    size = probe.curriculum.tokenizer.vocab_size
    probe.model.transformer.wte.weight = mx.diag(mx.arange(size).astype(mx.float32))
    used = {token for i in range(2) for token in data.tokens[i].question.tolist()}
    found = list(thoughts.embedding_norms(probe, data, 2).values())
    expected = [sum(used) / len(used), (size - 1) / 2, np.linalg.norm(np.arange(size) / size)]
    assert found == pytest.approx(expected, rel=1e-4)


def test_results_are_whole_tokens_with_and_without_a_space(probe):
    tokenizer = probe.curriculum.tokenizer
    spaced = tokenizer.encode(" 12")
    assert thoughts.result_tokens("<<5+7=12>>", tokenizer) == {tokenizer.encode("12")[0], spaced[0]}
    assert len(spaced) == 1
    assert thoughts.result_tokens("<<2+5=7>>", tokenizer) == {ord("7")} | set(tokenizer.encode("7"))
    assert thoughts.result_tokens("<<50*2=100>>", tokenizer) == set()  # three tokens
    assert thoughts.result_tokens("b is a c", tokenizer) == set()


def decoded(ids, results, thought=1, index=0) -> Decoded:
    """A hand-made thought."""
    return Decoded(index, thought, 2, ids, [0.5] * len(ids), 1.0, 2.0, None, results, thought - 1)


def test_hits_count_results_their_own_step_and_two_at_once():
    results = [{1, 2}, {3}, {1, 2}, set()]
    d = decoded([9, 2, 3, 8], results)
    assert d.hits(1) == [] and d.hits(2) == [0] and d.hits(3) == [0, 1]  # equal results count once
    assert [decoded([2, 3], results, k).hits_own(1) for k in (1, 2, 3)] == [True, False, True]
    assert [decoded([2], results, k).has_own for k in (3, 4, 5)] == [True, False, False]
    found = [decoded([2, 3], results), decoded([9], results, index=1), decoded([2], [set()], index=2)]
    expected = {(2, 1): {0: True, 1: False}}
    assert thoughts.hits(found, 2) == {"any result": expected, "own step's": expected, "two at once": expected}
    assert thoughts.hits([decoded([2], [])], 1) == {}
    places = {(2, 1): {0: True, 1: False}, (2, 2): {0: True}, (2, 3): {0: True}, (1, 1): {0: False, 1: True}}
    assert thoughts.pooled(places, 2, 2) == ([2, 0], [2, 1])  # the third thought is not fed back
    assert thoughts.all_equal([decoded([2], []), decoded([2], [], 2), decoded([3], [], 3)], 2) == (1, 1)


def test_intervals_by_hand():
    assert share(5, 10) == "0.500 (0.237 to 0.763) of 10" and share(0, 0) == "none" and mean([]) == "none"
    assert bootstrap([2.0, 2.0], [1, 1]) == (2.0, 2.0, 2.0)
    assert mean([6.0, 2.0], [3, 1]) == "2 (2 to 2) of 4"
    middle, low, high = bootstrap(np.arange(400.0), np.ones(400))
    error = 1.96 * np.arange(400).std() / 20
    assert (
        middle == 199.5 and low == pytest.approx(middle - error, abs=2) and high == pytest.approx(middle + error, abs=2)
    )
    # One item with many equal values is one draw, not many
    assert bootstrap([0.0, 100.0], [100, 100])[1:] == (0.0, 1.0)


def test_the_command(folder, tmp_path, capsys):
    data, out = str(folder.parents[1] / "data.json"), tmp_path / "out"
    assert thoughts.main([str(folder), data, "--out", str(out), "--layers", "--item", "2", "--top", "3"]) == 0
    printed = capsys.readouterr().out
    assert (
        "any result" in printed
        and "two at once" in printed
        and printed.count("not fed back") == 4
        and printed.count("| all ") == 2
    )
    lines = [json.loads(line) for line in (out / "thoughts.jsonl").read_text().splitlines()]
    assert {"python", "mlx", "numpy"} <= set(lines[0]["versions"])
    assert lines[0]["top"] == 3 and lines[0]["items"] == 3 and len(lines) == 1 + 3 * 3 * 2
    assert all(len(line["top"]) == 10 and {"hits", "own", "norm", "entropy"} <= set(line) for line in lines[1:])
    assert (out / "thoughts.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(("words", "message"), [
    (["--item", "3"], "--item 3: not among the 3 items"),
    (["--items", "0"], "--items 0: expected at least 1"),
    (["--top", "11"], "--top 11: expected 1 to 10"),
])  # fmt: skip
def test_mistakes_are_one_line_and_nothing_is_written(folder, tmp_path, capsys, words, message):
    command = [str(folder), str(folder.parents[1] / "data.json"), "--out", str(tmp_path / "out"), *words]
    assert thoughts.main(command) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
