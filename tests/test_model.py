"""The model equals its definition: the thought loop, decoding, accumulation, names, dropout, determinism."""

import dataclasses
from contextlib import nullcontext

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_unflatten

from coconut import Coconut
from config import Config
from dataset import TrainingSequence, chunks, collate
from models.cache import make_cache
from models.gpt2 import GPT2, MLP, Attention, GPT2Config
from models.loading import load_gpt2, sinusoids
from models.ops import Dropout, attention, dropout_mask, random_keys
from models.precision import compute_dtype, computing_in, training_in
from models.source import Source
from parallel.streams import even_slices, n_streams, on_gpu, use_streams
from startup import blas  # noqa: F401  before mlx
from text.tokenizer import Tokenizer
from training.step import TrainStep, joined, new_optimizer

VOCABULARY = 50
NO_DROPOUT = {"embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0}
# (tokens, latents) of each row; a latent row has at least two tokens in front of its latents
MIXED = [(9, 2), (5, 0), (14, 3), (11, 1), (23, 0), (6, 2)]


def make_model(seed: int = 0, **keys) -> Coconut:
    """A small GPT-2 whose weights are large enough to make every part of it matter."""
    mx.random.seed(seed)
    keys = {"n_positions": 64, "n_embd": 16, "n_layer": 2, "n_head": 2, "initializer_range": 0.4, **NO_DROPOUT, **keys}
    model = Coconut(GPT2(GPT2Config(vocab_size=VOCABULARY, **keys)))
    model.load_weights([(n, w + 0.1 * mx.random.normal(w.shape)) for n, w in tree_flatten(model.parameters())])
    return model.eval()


def make_rows(shapes=MIXED, seed: int = 0, n_labeled: int | None = None) -> list[TrainingSequence]:
    """Random rows: some tokens, latents at a random place, labels behind them (n_labeled of them, or all)."""
    rng = np.random.default_rng(seed)
    rows = []
    for n_tokens, n_latents in shapes:
        start = int(rng.integers(2, n_tokens - 1))
        ids = rng.integers(0, VOCABULARY, n_tokens + n_latents).astype(np.int32)
        n_unlabeled = len(ids) - n_labeled if n_labeled else start + n_latents
        rows.append(TrainingSequence(ids, start, n_latents, n_unlabeled))
    return rows


def make_batch(rows: list[TrainingSequence], multiple: int = 8):
    return collate(rows, pad_id=0, multiple=multiple).to_mlx()


def gradient_of(model, function):
    loss, gradient = nn.value_and_grad(model, function)(model)
    return loss.item(), {name: np.array(g) for name, g in tree_flatten(gradient)}


def naive_hidden(model: Coconut, row: TrainingSequence) -> mx.array:
    """The definition: thought by thought, the whole row so far anew. No cache, no padding, one row. -> [T, D]"""
    columns = list(model.transformer.embed(mx.array(row.ids)[None])[0])
    for column in range(row.latent_start, row.latent_start + row.n_latents):
        columns[column] = naive_pass(model, columns[:column])[-1]
    return naive_pass(model, columns)


def naive_pass(model: Coconut, columns: list[mx.array]) -> mx.array:
    return model.transformer(mx.stack(columns)[None], plain_cache(model.transformer, 1, len(columns)))[0]


def plain_cache(model: GPT2, n_rows: int, n_columns: int) -> list:
    """An empty cache for rows without padding."""
    return model.make_cache(mx.ones((n_rows, n_columns), dtype=mx.bool_), mx.zeros(n_rows, dtype=mx.int32))


def causal_mask(attention_mask: mx.array) -> mx.array:
    """[B, T] -> bool [B, 1, T, T]"""
    cache = make_cache(1, attention_mask, mx.zeros(len(attention_mask), dtype=mx.int32))
    return cache[0].make_mask(attention_mask.shape[1])


def naive_loss(model: Coconut, rows: list[TrainingSequence]) -> mx.array:
    """Mean negative log-probability of every labeled token of all rows."""
    losses = []
    for row in rows:
        logits = model.transformer.logits(naive_hidden(model, row))
        scores = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        losses += [-scores[t - 1, int(row.ids[t])] for t in range(row.n_unlabeled, len(row.ids))]
    return mx.stack(losses).mean()


def naive_answer(model: Coconut, row: TrainingSequence, max_new_tokens: int) -> list[int]:
    """Greedy continuation that recomputes everything for each token, to the last position; end tokens included."""
    columns = list(model.transformer.embed(mx.array(row.ids)[None])[0])
    for column in range(row.latent_start, row.latent_start + row.n_latents):
        columns[column] = naive_pass(model, columns[:column])[-1]
    found = []
    while len(found) < max_new_tokens and len(columns) <= model.transformer.config.n_positions:
        token = mx.argmax(model.transformer.logits(naive_pass(model, columns)[-1]))
        found.append(token.item())
        columns.append(model.transformer.embed(token))
    return found


# The thought loop


def test_hidden_states_equal_the_definition_on_a_mixed_batch():
    model, rows = make_model(), make_rows()
    batch = make_batch(rows)
    hidden, _ = model.think(batch)
    for i, row in enumerate(rows):
        ours = np.array(hidden[i])[np.array(batch.attention_mask[i])]
        np.testing.assert_allclose(ours, np.array(naive_hidden(model, row)), atol=2e-5)


@pytest.mark.parametrize(
    "shapes", [MIXED, [(7, 0), (12, 0)], [(6, 4)]], ids=["mixed", "no row with latents", "one row"]
)
def test_loss_and_gradients_equal_the_definition(shapes):
    model, rows = make_model(), make_rows(shapes)
    batch = make_batch(rows)
    loss, gradient = gradient_of(model, lambda m: m(batch))
    expected_loss, expected = gradient_of(model, lambda m: naive_loss(m, rows))
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    assert gradient.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(gradient[name], value, atol=1e-5 * max(1, np.abs(value).max()), err_msg=name)


@pytest.mark.parametrize("shapes", [MIXED, [(7, 0), (12, 0)], [(6, 4), (9, 2)]], ids=["mixed", "none", "all"])
def test_the_last_block_computes_only_columns_that_are_read(shapes, monkeypatch):
    """Their hidden states are the same, and its feed-forward layers see no others."""
    seen, original = [], MLP.__call__
    monkeypatch.setattr(MLP, "__call__", lambda self, x, key: (seen.append(x.shape[1]), original(self, x, key))[1])
    model, batch = make_model(), make_batch(make_rows(shapes), multiple=1)
    length = batch.input_ids.shape[1]
    whole, _ = model.think(batch)
    del seen[:]
    for first in {0, 1, batch.first_read // 2, batch.first_read}:
        hidden, cache = model.think(batch, first)
        np.testing.assert_allclose(np.array(hidden), np.array(whole[:, first:]), atol=1e-5)
        assert (sum(seen[::2]), sum(seen[1::2])) == (length, length - first)
        assert all(layer.n_columns == length for layer in cache)
        del seen[:]


def test_a_row_does_not_depend_on_its_neighbours_or_on_padding():
    """Padded equals alone, and what stands in the padding does not matter."""
    model, rows = make_model(), make_rows()
    batch = make_batch(rows)
    hidden, _ = model.think(batch)
    other, _ = model.think(batch._replace(input_ids=mx.where(batch.attention_mask, batch.input_ids, 7)))
    for i, row in enumerate(rows):
        real = np.array(batch.attention_mask[i])
        alone = make_batch([row], multiple=1)
        assert np.array(alone.attention_mask).all()
        np.testing.assert_allclose(np.array(hidden[i])[real], np.array(model.think(alone)[0][0]), atol=2e-5)
        np.testing.assert_array_equal(np.array(hidden[i])[real], np.array(other[i])[real])


@pytest.mark.parametrize("attn_pdrop", [0.0, 0.1], ids=["fused attention", "explicit attention"])
def test_columns_that_see_nothing_give_no_nan(attn_pdrop):
    """Left padding makes fully masked rows; hidden states, loss and gradients stay finite, also with dropout."""
    model = make_model(attn_pdrop=attn_pdrop).train()
    batch = make_batch(make_rows())
    assert not np.array(batch.attention_mask)[:, 0].all()
    loss, gradient = gradient_of(model, lambda m: m(batch))
    assert np.isfinite(loss)
    assert all(np.isfinite(g).all() for g in gradient.values())
    assert mx.isfinite(model.think(batch)[0]).all().item()


def test_attention_with_dropout_equals_the_fused_one_where_nothing_is_dropped():
    """Training's explicit attention at a vanishing dropout against evaluation's fused attention."""
    model = make_model(attn_pdrop=1e-9)
    batch = make_batch(make_rows())
    loss, gradient = gradient_of(model, lambda m: m(batch))
    model.train()
    explicit_loss, explicit = gradient_of(model, lambda m: m(batch))
    assert explicit_loss == pytest.approx(loss, rel=1e-5)
    for name, value in gradient.items():
        np.testing.assert_allclose(explicit[name], value, atol=1e-5 * max(1, np.abs(value).max()), err_msg=name)


@pytest.fixture
def passes(monkeypatch) -> list:
    """Columns of each pass through the transformer, as it is made."""
    lengths, original = [], GPT2.__call__

    def counted(self, embeddings, cache, first=0):
        lengths.append(embeddings.shape[1])
        return original(self, embeddings, cache, first)

    monkeypatch.setattr(GPT2, "__call__", counted)
    return lengths


def test_every_column_is_computed_once(passes):
    """One pass up to the first latent, one column for each further latent, one pass over the rest."""
    model, batch = make_model(), make_batch(make_rows())
    model.think(batch)
    length, first, n_latents = batch.input_ids.shape[1], batch.first_latent, batch.latent_mask.shape[1]
    assert passes == [first, *[1] * (n_latents - 1), length - first - n_latents + 1]


def test_the_forward_never_waits_for_a_value(monkeypatch):
    """No `.item()` and no `tolist()` inside the loss: each would stop the device."""

    def refuse(*_):
        raise AssertionError("the forward reads a value")

    model, batch = make_model(), make_batch(make_rows())
    for name in ("item", "tolist", "__array__", "__bool__", "__float__", "__int__", "__index__"):
        monkeypatch.setattr(mx.array, name, refuse)
    nn.value_and_grad(model, lambda m: m(batch))(model)


# Decoding


def test_decoding_computes_one_column_a_token(passes, prompts, cpu, two_streams):
    """The cache is used: behind the prompt every pass is one column wide, and the last token needs none."""
    model, rows, _ = prompts
    batch = make_batch(rows)
    model.generate(batch, 12, VOCABULARY)
    n_parts = len(even_slices(len(batch.input_ids)))
    assert n_parts == n_streams() == 2
    assert sum(passes) == n_parts * (batch.input_ids.shape[1] + 11)
    assert passes[-11 * n_parts :] == [1] * (11 * n_parts)


@pytest.fixture
def two_streams():
    """As run.py on a CPU with two cores."""
    yield use_streams("2")
    use_streams("1")


@pytest.fixture(scope="module")
def prompts():
    """A model, mixed prompts and their naive continuations of 12 tokens."""
    model, rows = make_model(seed=3), make_rows(seed=1)
    return model, rows, [naive_answer(model, row, 12) for row in rows]


def until(ids: list[int], end: int) -> list[int]:
    return ids[: ids.index(end)] if end in ids else ids


def test_cached_batched_decoding_equals_the_definition_whichever_token_ends_it(prompts):
    """Every token that occurs is the end token once, so rows end first, last, at different times, and not at all."""
    model, rows, expected = prompts
    ends = sorted({token for ids in expected for token in ids})
    lengths = {tuple(len(until(ids, end)) for ids in expected) for end in ends}
    assert any(0 in ended for ended in lengths), "no row ends at its first token"
    assert any(len({n for n in ended if n < 12}) > 1 for ended in lengths), "no two rows end at different times"
    for end in ends:
        assert model.generate(make_batch(rows), 12, end) == [until(ids, end) for ids in expected]


def test_a_batch_decodes_as_its_rows_alone(prompts):
    model, rows, expected = prompts
    end = expected[0][4]
    alone = [model.generate(make_batch([row]), 12, end)[0] for row in rows]
    assert model.generate(make_batch(rows), 12, end) == alone
    assert {len(ids) for ids in alone} != {12}


@pytest.mark.parametrize("limit", [1, 2, 7])
def test_decoding_stops_at_max_new_tokens(prompts, limit):
    model, rows, expected = prompts
    assert model.generate(make_batch(rows), limit, VOCABULARY) == [ids[:limit] for ids in expected]


def test_decoding_stops_at_the_last_position():
    """Rows of different lengths reach the last position at different times; the others go on."""
    model = make_model(seed=3, n_positions=20)
    rows = make_rows([(6, 2), (17, 3), (19, 0), (12, 0)])
    expected = [naive_answer(model, row, 100) for row in rows]
    assert [len(ids) for ids in expected] == [13, 1, 2, 9]
    assert model.generate(make_batch(rows), 100, VOCABULARY) == expected


# Training


def steps_of(model, optimizer, batches, config, epoch=0, lr=None) -> list:
    step, lr = TrainStep(model, optimizer, config), config.lr if lr is None else lr
    starts = range(0, len(batches), config.gradient_accumulation_steps)
    groups = [batches[start : start + config.gradient_accumulation_steps] for start in starts]
    return [step(group, epoch, number, lr) for number, group in enumerate(groups)]


def sgd_steps(batches, **keys) -> tuple[list, dict]:
    """TrainStep with plain gradient descent at rate 1, so that the weights' change is the gradient."""
    model = make_model()
    before = dict(tree_flatten(model.parameters()))
    config = Config(save_path="", name="", val_path="", coconut=True, **keys)
    steps = steps_of(model, optim.SGD(learning_rate=1.0), batches, config, lr=1.0)
    change = {name: np.array(before[name] - after) for name, after in tree_flatten(model.parameters())}
    return steps, change


def test_accumulated_equals_one_big_batch():
    """Four micro-batches with equally many labeled tokens give the loss and gradient of their union."""
    rows = make_rows([(9, 2), (7, 0), (14, 3), (11, 1), (23, 0), (8, 2), (10, 0), (9, 1)], n_labeled=3)
    micro = [chunks(rows[i : i + 2], 1, pad_id=0) for i in range(0, 8, 2)]
    [big], big_change = sgd_steps([chunks(rows, 1, pad_id=0)], gradient_accumulation_steps=1)
    [step], change = sgd_steps(micro, gradient_accumulation_steps=4)
    assert step.loss == pytest.approx(big.loss, rel=1e-6)
    assert step.n_tokens == big.n_tokens == sum(len(row.ids) for row in rows)
    for name, value in big_change.items():
        np.testing.assert_allclose(change[name], value, atol=1e-5 * max(1, np.abs(value).max()), err_msg=name)
    assert max(np.abs(value).max() for value in big_change.values()) > 1e-3


@pytest.mark.parametrize("n_parts", [2, 3])
def test_parts_on_several_streams_equal_one_batch(n_parts):
    rows = make_rows([(9, 2), (7, 0), (14, 3), (11, 1), (23, 0), (8, 2), (10, 0)])
    [whole], change = sgd_steps([chunks(rows, 1, pad_id=0)], gradient_accumulation_steps=1)
    parts = chunks(rows, n_parts, pad_id=0)
    assert len(parts) == n_parts
    [step], change_of_parts = sgd_steps([parts], gradient_accumulation_steps=1)
    assert step.loss == pytest.approx(whole.loss, rel=1e-6) and step.n_tokens == whole.n_tokens
    for name, value in change.items():
        np.testing.assert_allclose(change_of_parts[name], value, atol=1e-5 * max(1, np.abs(value).max()), err_msg=name)


def test_an_incomplete_last_group_is_divided_by_the_full_count():
    """As the official code does: one micro-batch of three counts a third, its reported loss is its own."""
    batch = chunks(make_rows(), 2, pad_id=0)
    [whole], change = sgd_steps([batch], gradient_accumulation_steps=1)
    [third], third_of_change = sgd_steps([batch], gradient_accumulation_steps=3)
    assert third.loss == whole.loss
    for name, value in change.items():
        np.testing.assert_allclose(third_of_change[name], value / 3, atol=1e-5 * max(1, np.abs(value).max()))


def train_a_little(seed: int) -> bytes:
    """Weights and losses, bit by bit, of three accumulated AdamW steps with dropout on a fresh model."""
    config = Config(save_path="", name="", val_path="", coconut=True, seed=seed, gradient_accumulation_steps=2, lr=1e-2)
    model = make_model(embd_pdrop=0.1, attn_pdrop=0.1, resid_pdrop=0.1)
    optimizer = new_optimizer(model, config)
    batches = [chunks(make_rows(seed=i), 2, pad_id=0) for i in range(6)]
    losses = [step.loss for step in steps_of(model, optimizer, batches, config, epoch=1)]
    assert len(losses) == 3
    arrays = [np.array(w) for _, w in tree_flatten([model.parameters(), optimizer.state])]
    return b"".join(a.tobytes() for a in [*arrays, np.array(losses)])


def test_ten_runs_of_one_seed_are_equal_bit_by_bit_and_another_seed_differs(cpu):
    runs = {train_a_little(seed=5) for _ in range(10)}
    assert len(runs) == 1
    assert train_a_little(seed=6) not in runs


def test_an_update_in_groups_changes_no_bit(cpu, monkeypatch):
    """Groups of one parameter, of some, and of all; each time all of them, with MLX's own update of the whole tree."""
    whole, sizes, own = train_a_little(seed=5), [], TrainStep._updated

    def updated(self, parameters, *others):
        sizes.append([array.nbytes for array in parameters])
        return own(self, parameters, *others)

    monkeypatch.setattr(TrainStep, "_updated", updated)
    monkeypatch.setattr("training.step.SMALL_PARAMETER", 0)
    for limit, largest_group in ((1, 4096), (5000, 5000)):
        monkeypatch.setattr("training.step.LARGEST_UPDATE", limit)
        sizes.clear()
        assert train_a_little(seed=5) == whole
        n_parameters = len(tree_flatten(make_model().parameters()))
        assert sum(map(len, sizes)) == 3 * n_parameters and max(map(sum, sizes)) <= largest_group
        assert len(sizes) == 3 * n_parameters if limit == 1 else len(sizes) < n_parameters

    def at_once(self, gradient, learning_rate):
        self.optimizer.learning_rate = learning_rate
        self.optimizer.update(self.model, gradient)
        mx.eval(self.model.parameters(), self.optimizer.state)
        return 0.0

    monkeypatch.setattr(TrainStep, "_update", at_once)
    assert train_a_little(seed=5) == whole


@pytest.mark.parametrize("largest, n_updated", [(0, 6), (12, 5), (40, 4), (60, 2)])
def test_small_parameters_are_updated_as_one_with_the_same_bits(cpu, monkeypatch, largest, n_updated):
    """Of five float32 and one bfloat16 parameter; each keeps its place, shape and type, and its moments theirs.

    The moments of one stand in another order, as they may in a state that was read.
    """
    monkeypatch.setattr("training.step.SMALL_PARAMETER", largest)
    config = Config(save_path="", name="", val_path="", coconut=True)
    step = TrainStep(make_model(), optim.AdamW(1e-2, bias_correction=True), config)
    shapes = [(4, 3), (7,), (5, 8), (60,), (6, 10), (12,)]  # small ones come first
    types = [mx.float32] * 5 + [mx.bfloat16]
    drawn = [[mx.random.normal(shape).astype(t) for shape, t in zip(shapes, types, strict=True)] for _ in range(4)]
    parameters, gradients, first, second = drawn
    moments = [{"m": m, "v": mx.abs(v)} for m, v in zip(first, second, strict=True)]
    moments[1] = dict(reversed(moments[1].items()))
    numbers, seen = {"step": mx.array(3), "learning_rate": mx.array(1e-2)}, []

    def updated(parameters, *others):
        seen.append(len(parameters))
        return TrainStep._updated(step, parameters, *others)

    expected = updated(parameters, gradients, moments, numbers, mx.array(2.0))
    found = joined(updated)(parameters, gradients, moments, numbers, mx.array(2.0))
    assert seen == [6, n_updated]
    expected, found = dict(tree_flatten(expected)), dict(tree_flatten(found))
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert found[name].dtype == array.dtype and mx.array_equal(found[name], array), name


def test_dropout_draws_another_mask_at_every_step_and_in_every_epoch():
    """The same batch at learning rate 0 has another loss each time; a frozen mask would repeat it."""
    config = Config(save_path="", name="", val_path="", coconut=True, lr=0, weight_decay=0)
    model, batch = make_model(embd_pdrop=0.1), chunks(make_rows(), 2, pad_id=0)
    losses = []
    for epoch in range(2):
        optimizer = new_optimizer(model, config)
        losses += [step.loss for step in steps_of(model, optimizer, [batch] * 3, config, epoch)]
    assert len(set(losses)) == 6


def test_bfloat16_computes_near_float32_and_leaves_float32_parameters():
    """Gradients reach the float32 parameters; the loss is near but not the same, and so it is in evaluation."""
    model, batch = make_model(initializer_range=0.1), make_batch(make_rows())
    before = dict(tree_flatten(model.parameters()))
    results = []
    for dtype in (mx.float32, mx.bfloat16):

        def loss(batch, dtype=dtype):
            with training_in(model, dtype):
                return model(batch)

        results.append(nn.value_and_grad(model, loss)(batch))
        model.update(tree_unflatten(list(before.items())))
    (exact, gradient), (rough, rough_gradient) = results
    assert rough.item() == pytest.approx(exact.item(), rel=2e-2) and rough.item() != exact.item()
    for (name, wanted), (_, found) in zip(tree_flatten(gradient), tree_flatten(rough_gradient), strict=True):
        assert found.dtype == mx.float32
        assert mx.linalg.norm(found - wanted).item() < 0.1 * mx.linalg.norm(wanted).item(), name
    with computing_in(model, mx.bfloat16):
        hidden, cache = model.eval().think(batch)
        assert hidden.dtype == mx.float32 and cache[0].state[0].dtype == mx.bfloat16
        assert len(model.generate(batch, 3, VOCABULARY)) == len(batch.last_column)
    assert all(mx.array_equal(before[name], array).item() for name, array in tree_flatten(model.parameters()))


@pytest.mark.parametrize("recompute", [False, True])
def test_gains_and_biases_in_the_products_behind_them_change_no_gradient(recompute):
    """Beside the model as it is, with gains and biases that are far from 1 and 0, dropout on, and thoughts."""
    model, batch = make_model(attn_pdrop=0.2, resid_pdrop=0.2), make_batch(make_rows())
    mx.random.seed(5)
    drawn = [(name, array + mx.random.normal(array.shape)) for name, array in tree_flatten(model.parameters())]
    model.load_weights(drawn)
    results = []
    for context in (nullcontext, lambda: training_in(model, mx.float32)):
        model.transformer.grad_checkpoint = recompute and bool(results)

        def loss(batch, context=context):
            with context():
                return model(batch)

        mx.random.seed(6)
        results.append(nn.value_and_grad(model.train(), loss)(batch))
        assert all(mx.array_equal(model_array, array).item() for (_, model_array), (_, array) in zip(
            tree_flatten(model.parameters()), drawn, strict=True))  # fmt: skip
    (loss, gradient), (other_loss, other_gradient) = results
    assert other_loss.item() == pytest.approx(loss.item(), rel=1e-5)
    assert [name for name, _ in tree_flatten(gradient)] == [name for name, _ in tree_flatten(other_gradient)]
    for (name, expected), (_, found) in zip(tree_flatten(gradient), tree_flatten(other_gradient), strict=True):
        assert mx.allclose(found, expected, atol=1e-4 * mx.abs(expected).max().item(), rtol=1e-4).item(), name


def test_bfloat16_is_for_gpus():
    assert compute_dtype(True) == (mx.bfloat16 if on_gpu() else mx.float32)
    assert compute_dtype(False) == mx.float32


# The parts of GPT-2


def gpt2_names(n_layer: int) -> set[str]:
    """The parameters of transformers' GPT2LMHeadModel."""
    parts = ["ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj"]
    modules = [f"h.{i}.{part}" for i in range(n_layer) for part in parts] + ["ln_f"]
    names = {f"transformer.{module}.{kind}" for module in modules for kind in ("weight", "bias")}
    return names | {"transformer.wte.weight", "transformer.wpe.weight"}


def test_parameters_are_exactly_gpt2s():
    """No mask, no second name for the embedding, before and after use."""
    model, batch = make_model(n_layer=3), make_batch(make_rows())
    nn.value_and_grad(model, lambda m: m(batch))(model)
    model.generate(batch, 2, VOCABULARY)
    names = [name for name, _ in tree_flatten(model.parameters())]
    assert sorted(names) == sorted(gpt2_names(3))
    assert [name for name, _ in tree_flatten(model.trainable_parameters())] == names


def test_a_fresh_model_is_initialized_as_gpt2_is():
    """Normal weights of 0.02, those that end a residual branch of 0.02 / sqrt(2 n_layer); no bias, unit norms."""
    mx.random.seed(1)
    model = GPT2(GPT2Config(vocab_size=2000, n_positions=512, n_embd=64, n_layer=8, n_head=2))
    for name, weight in tree_flatten(model.parameters()):
        values = np.array(weight)
        if name.endswith("bias"):
            assert (values == 0).all(), name
        elif "ln_" in name:
            assert (values == 1).all(), name
        else:
            expected = 0.02 / 4 if name.endswith("c_proj.weight") else 0.02
            assert values.std() == pytest.approx(expected, rel=0.05), name
            assert abs(values.mean()) < 5 * expected / np.sqrt(values.size), name
            assert np.abs(values).max() > 3 * expected, name  # normal, not uniform


SMALL = GPT2Config(n_positions=64, n_embd=32, n_layer=2, n_head=2)


def fresh_model(shape: GPT2Config = SMALL, **keys) -> GPT2:
    tokenizer = Tokenizer({bytes([i]): i for i in range(256)}, "bytes")
    config = Config(save_path="", name="", val_path="", coconut=True, seed=3, **keys)
    return load_gpt2(Source(None, shape, None), config, tokenizer)


@pytest.mark.parametrize(("vocab_size", "is_noted"), [(50_257, False), (257, False), (260, False), (258, True)])
def test_a_fresh_model_has_the_vocabularys_rows_and_says_so(vocab_size, is_noted, capsys):
    """257 without the three special tokens, 260 with them; files that name no number count as GPT-2's 50,257."""
    model = fresh_model(dataclasses.replace(SMALL, vocab_size=vocab_size), model_config_path="small.json")
    assert model.wte.weight.shape == (260, 32) and model.config.vocab_size == 260
    note = "note: small.json: vocab_size 258 is not used; the model gets 260 rows, one for each token of bytes\n"
    assert capsys.readouterr().out == note * is_noted


def test_fresh_embeddings_may_start_otherwise_and_the_other_weights_stay():
    default = dict(tree_flatten(fresh_model().parameters()))
    changed = dict(tree_flatten(fresh_model(embedding_range=0.5, sinusoidal_positions=0.25).parameters()))
    different = [name for name in default if not mx.array_equal(default[name], changed[name])]
    assert different == ["wte.weight", "wpe.weight"]
    assert np.array(changed["wte.weight"]).std() == pytest.approx(0.5, rel=0.05)
    positions, columns = np.arange(64)[:, None], np.arange(16)[None]
    angles = positions / 10_000 ** (2 * columns / 32)
    np.testing.assert_allclose(changed["wpe.weight"][:, 0::2], 0.25 * np.sin(angles), atol=1e-5)
    np.testing.assert_allclose(changed["wpe.weight"][:, 1::2], 0.25 * np.cos(angles), atol=1e-5)


def test_sinusoids_of_an_odd_width():
    assert sinusoids(5, 7).shape == (5, 7)
    assert mx.array_equal(sinusoids(5, 7)[0], mx.array([0.0, 1, 0, 1, 0, 1, 0]))


def assert_dropout(values: mx.array, probability: float):
    """Ones that went through dropout: a fraction `probability` is zero, the others are scaled up to keep the mean."""
    values = np.array(values).ravel()
    dropped = values == 0
    assert dropped.mean() == pytest.approx(probability, abs=5 * np.sqrt(probability / dropped.size))
    np.testing.assert_allclose(values[~dropped], 1 / (1 - probability), rtol=1e-5)


DROPOUTS = GPT2Config(
    vocab_size=9, n_positions=8, n_embd=16, n_layer=1, n_head=16, embd_pdrop=0.2, attn_pdrop=0.3, resid_pdrop=0.4
)
ONE = mx.array([[[[True]]]])  # one position that sees itself


def test_dropout_of_the_embeddings():
    model = GPT2(DROPOUTS)
    model.h, model.ln_f = [lambda x, *_: x], lambda x: x
    model.wpe.weight = mx.full((8, 16), 0.25)
    embeddings, cache = (
        mx.full((500, 8, 16), 0.75),
        make_cache(1, mx.ones((500, 8), dtype=mx.bool_), mx.zeros(500, dtype=mx.int32)),
    )
    assert_dropout(model(embeddings, cache), 0.2)
    assert (model.eval()(embeddings, cache) == 1).all().item()


@pytest.mark.parametrize("place", ["attention", "residual"])
def test_dropout_of_the_attention(place):
    """Each of 16 heads attends to its one position with weight 1, and its value is 1."""
    layer = Attention(DROPOUTS)
    layer.c_attn.bias = mx.concatenate([mx.zeros(32), mx.ones(16)])
    layer.c_proj.weight = mx.eye(16)
    off = layer.resid_dropout if place == "attention" else layer.attn_dropout
    off.eval()
    x = mx.random.normal((5000, 1, 16))
    (first, second) = (
        make_cache(1, mx.ones((5000, 1), dtype=mx.bool_), mx.zeros(5000, dtype=mx.int32))[0] for _ in range(2)
    )
    assert_dropout(layer(x, ONE, first, random_keys(2)), 0.3 if place == "attention" else 0.4)
    assert (layer.eval()(x, ONE, second, [None, None]) == 1).all().item()


def test_dropout_of_the_mlp():
    mlp = MLP(DROPOUTS)
    mlp.c_proj.bias = mx.ones(16)
    x = mx.zeros((5000, 1, 16))
    assert_dropout(mlp(x, random_keys(1)[0]), 0.4)
    assert (mlp.eval()(x, None) == 1).all().item()


def test_attention_in_blocks_of_queries_is_plain_attention():
    """300 columns behind a cache of 40 and padding on both sides: outputs and gradients of the fused form."""
    mx.random.seed(4)
    q, gradient = mx.random.normal((2, 2, 300, 8)), mx.random.normal((2, 2, 300, 8))
    k, v = mx.random.normal((2, 2, 340, 8)), mx.random.normal((2, 2, 340, 8))
    real = (mx.arange(340) >= mx.array([[0], [30]])) & (mx.arange(340) < mx.array([[310], [340]]))
    mask = causal_mask(real)[:, :, 40:]
    seen = mask.any(axis=-1, keepdims=True)  # padding that sees nothing may give anything finite

    def by_blocks(q, k, v):
        return (mx.where(seen, attention(q, k, v, mask, Dropout(0.0), None), 0) * gradient).sum()

    def fused(q, k, v):
        out = mx.fast.scaled_dot_product_attention(q, k, v, scale=8**-0.5, mask=mask)
        return (mx.where(seen, out, 0) * gradient).sum()

    ours = mx.value_and_grad(by_blocks, argnums=(0, 1, 2))(q, k, v)
    expected = mx.value_and_grad(fused, argnums=(0, 1, 2))(q, k, v)
    assert ours[0].item() == pytest.approx(expected[0].item(), rel=1e-4)
    for found, wanted in zip(ours[1], expected[1], strict=True):
        np.testing.assert_allclose(np.array(found), np.array(wanted), atol=2e-5)


def test_gradient_through_dropped_attention():
    """By MLX's own derivatives, block by block with the same masks; every block of queries drops others."""
    mx.random.seed(6)
    q, k, v, weight = (mx.random.normal((2, 3, 260, 4)) for _ in range(4))
    mask, key = causal_mask(mx.ones((2, 260), dtype=mx.bool_)), random_keys(1)[0]
    parts = [(0, 128), (128, 256), (256, 260)]
    keeps = [
        dropout_mask(key, (2, 3, end - start, end), 0.3)
        for (start, end), key in zip(parts, mx.random.split(key, 3), strict=True)
    ]
    assert not mx.array_equal(keeps[0][..., 0], keeps[1][..., 0]).item()

    def plain(q, k, v):
        out = []
        for (start, end), keep in zip(parts, keeps, strict=True):
            scores = q[:, :, start:end] @ k[:, :, :end].swapaxes(-1, -2) / 2
            weights = mx.softmax(mx.where(mask[:, :, start:end, :end], scores, -1e9), axis=-1)
            out.append((weights * keep / 0.7) @ v[:, :, :end])
        return (mx.concatenate(out, axis=2) * weight).sum()

    def ours(q, k, v):
        return (attention(q, k, v, mask, Dropout(0.3), key) * weight).sum()

    expected = mx.value_and_grad(plain, argnums=(0, 1, 2))(q, k, v)
    found = mx.value_and_grad(ours, argnums=(0, 1, 2))(q, k, v)
    assert found[0].item() == pytest.approx(expected[0].item(), rel=1e-5)
    for gradient, wanted in zip(found[1], expected[1], strict=True):
        np.testing.assert_allclose(np.array(gradient), np.array(wanted), atol=1e-5)


def test_recomputation_gives_the_same_gradient():
    """grad_checkpoint, dropout on: bit for bit, where mx.checkpoint beside nn.Dropout draws other masks."""
    model = Coconut(GPT2(dataclasses.replace(DROPOUTS, n_positions=40, n_layer=2)))
    batch = collate(
        [TrainingSequence(np.arange(12) % 9, 4, 2, 7), TrainingSequence(np.arange(9) % 9, 3, 1, 5)], pad_id=0
    ).to_mlx()
    results = []
    for model.transformer.grad_checkpoint in (False, True):
        mx.random.seed(3)
        results.append(nn.value_and_grad(model, lambda batch: model(batch))(batch))
    assert results[0][0].item() == results[1][0].item()
    for (name, plain), (_, again) in zip(*(tree_flatten(gradient) for _, gradient in results), strict=True):
        assert mx.array_equal(plain, again).item() and mx.abs(plain).max().item() > 0, name


def test_other_names_of_config_json_are_read():
    """transformers.GPT2Config.attribute_map, n_ctx of older files, and other names of the same GELU."""
    names = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "max_position_embeddings": 64}
    config = GPT2Config.from_dict(names | {"n_ctx": 64, "activation_function": "gelu_pytorch_tanh"})
    assert (config.n_embd, config.n_layer, config.n_head, config.n_positions) == (16, 3, 2, 64)
    assert GPT2Config.from_dict({"n_ctx": 32}).n_positions == 32
    assert GPT2Config.from_dict({"hidden_size": None, "n_embd": 24}).n_embd == 24


@pytest.mark.parametrize("n_inner", [None, 24])
def test_the_number_of_parameters_is_known_from_the_shape(n_inner):
    """It is compared with the memory before the model is built."""
    config = GPT2Config(vocab_size=30, n_positions=8, n_embd=16, n_layer=3, n_head=2, n_inner=n_inner)
    assert config.n_parameters == sum(array.size for _, array in tree_flatten(GPT2(config).parameters()))
