"""The rows of Table 1 that the official code does not train, against their definitions (docs/fidelity.md)."""

from itertools import chain, product

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from coconut import Coconut
from config import Config
from dataset import Curriculum, collate, loss_batches, prompt_batches, training_steps
from models.gpt2 import GPT2, GPT2Config
from startup import blas  # noqa: F401  before mlx
from text.reader import Example
from text.tokenizer import Tokenizer
from text.tokens import tokenize

TOKENIZER = Tokenizer({bytes([i]): i for i in range(256)} | {b"###": 256}, "test")
EXAMPLES = [
    Example("What is it?", ["ab", "c", "defg"], "42"),
    Example("And?", [], "7"),
    Example("Which of them?", ["h", "ij", "k", "lm", "n"], "x"),
    Example("Who?", ["opqrst"], "yz"),
]
KEYS = {"c_thought": 2, "max_latent_stage": 3}


def make_config(key: str = "coconut", **keys) -> Config:
    return Config(**{"save_path": "", "name": "", "val_path": "", key: True, **KEYS, **keys})


def curriculum_of(key: str = "coconut", **keys) -> Curriculum:
    return Curriculum(make_config(key, **keys), TOKENIZER)


def tokens_of(layout: str = "lines"):
    return tokenize(EXAMPLES, TOKENIZER, "test", layout)


@pytest.fixture(scope="module")
def model() -> Coconut:
    """A small GPT-2 without dropout whose weights are large enough to make every part of it matter."""
    mx.random.seed(0)
    shape = {"n_positions": 80, "n_embd": 16, "n_layer": 2, "n_head": 2, "initializer_range": 0.4}
    rates = {"embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0}
    return Coconut(GPT2(GPT2Config(vocab_size=TOKENIZER.vocab_size, **shape, **rates))).eval()


# Pauses


@pytest.mark.parametrize("layout", ["lines", "compact"])
@pytest.mark.parametrize("curriculum", ["steps", "none"])
def test_pauses_stand_where_latents_do(curriculum, layout):
    """Ids and labels of every row at every stage, in training and in prompts; only nothing is fed back."""
    hidden = curriculum_of(curriculum=curriculum, layout=layout)
    pause = curriculum_of(curriculum=curriculum, layout=layout, thought="pause")
    data = tokens_of(layout)
    for index, stage in product(range(len(data)), range(6)):
        example = data[index]
        n_latents = hidden.n_prompt_latents(stage, len(example.steps))
        assert pause.n_prompt_latents(stage, len(example.steps)) == n_latents
        for one, other in (
            (hidden.training(example, stage), pause.training(example, stage)),
            (hidden.prompt(example, n_latents), pause.prompt(example, n_latents)),
        ):
            assert np.array_equal(one.ids, other.ids)
            assert one.n_unlabeled == other.n_unlabeled
            assert other.n_latents == 0


class FeedsPauses:
    """A GPT-2 whose every pass seems to end in the pause vector: what the thought loop feeds back is then a pause."""

    def __init__(self, transformer: GPT2):
        self.transformer, self.passes = transformer, []
        self.embed, self.make_cache = transformer.embed, transformer.make_cache

    def __call__(self, embeddings: mx.array, cache: list, first: int) -> mx.array:
        hidden = self.transformer(embeddings, cache, first)
        self.passes.append(hidden)
        pause = self.transformer.embed(mx.array([TOKENIZER.latent_id]))[0]
        return mx.concatenate([hidden[:, :-1], mx.broadcast_to(pause, hidden[:, -1:].shape)], axis=1)


@pytest.mark.parametrize("stage", range(5))
def test_one_pass_over_pauses_equals_the_thought_loop_fed_with_them(model, stage):
    data = tokens_of()
    rows = [curriculum_of().training(data[i], stage) for i in range(len(data))]
    looped = collate(rows, TOKENIZER.eos_id).to_mlx()
    feeding = FeedsPauses(model.transformer)
    Coconut.think(type("Loop", (), {"transformer": feeding})(), looped)
    assert len(feeding.passes) == 1 + 2 * min(stage, 3)
    expected = mx.concatenate(feeding.passes, axis=1)
    rows = [curriculum_of(thought="pause").training(data[i], stage) for i in range(len(data))]
    single = collate(rows, TOKENIZER.eos_id).to_mlx()
    found, _ = model.think(single)
    for row in range(len(rows)):
        one = model.transformer.logits(found[row][mx.array(np.flatnonzero(single.attention_mask[row]))])
        other = model.transformer.logits(expected[row][mx.array(np.flatnonzero(looped.attention_mask[row]))])
        np.testing.assert_allclose(one, other, atol=1e-5)


def test_the_pause_vector_learns_from_what_it_does_as_an_input(model):
    """The gradient of its row where the tied head sees a constant in the row's place."""
    data = tokens_of()
    rows = [curriculum_of(thought="pause").training(data[i], 2) for i in range(len(data))]
    batch = collate(rows, TOKENIZER.eos_id).to_mlx()
    head = mx.stop_gradient(model.transformer.wte.weight)

    def loss(model):
        hidden, _ = model.think(batch)
        labeled = hidden.reshape(-1, hidden.shape[-1])[batch.label_positions]
        return (nn.losses.cross_entropy(labeled @ head.T, batch.labels) * batch.label_mask).sum()

    _, gradient = nn.value_and_grad(model, loss)(model)
    assert mx.abs(gradient["transformer"]["wte"]["weight"][TOKENIZER.latent_id]).max().item() > 1e-3


# iCoT: single tokens go away, as a function of the optimizer step


def icot(**keys) -> Curriculum:
    return curriculum_of("no_thoughts", **{"curriculum": "tokens", "remove_all_from": None, **keys})


def test_nothing_is_due_at_the_start_and_the_number_never_falls():
    for rate in (0.3, 1, 2, 7.5):
        curriculum = icot(tokens_per_epoch=rate)
        due = [curriculum.step_stage(epoch, step, 70) for epoch in range(6) for step in range(70)]
        assert due[0] == 0 and due == sorted(due)
        assert due == [int(rate * place / 70 + 1e-9) for place in range(420)]
        assert [curriculum.stage(epoch) for epoch in range(6)] == due[
            69::70
        ]  # an evaluation is at the epoch's last step


def test_once_the_longest_chain_is_due_the_batches_are_those_of_no_cot():
    data, curriculum = tokens_of(), icot(tokens_per_epoch=3, removal_smoothing=None)
    longest = int(data.chain_lengths.max())
    assert longest == max(sum(len(step) + 1 for step in example.steps) for example in EXAMPLES)
    curriculum.limit_removal(data)
    no_cot = curriculum_of("no_cot")
    for epoch in range(8):
        same = equal_batches(curriculum, no_cot, data, epoch)
        assert same == (3 * epoch >= longest), epoch
    assert curriculum.stage(7) == longest


def equal_batches(one: Curriculum, other: Curriculum, data, epoch: int) -> bool:
    """Whether training batches, validation batches and prompts of an epoch are the same."""
    arrays = []
    for curriculum in (one, other):
        chunks = [chunk.batch for step in training_steps(data, curriculum, epoch) for part in step for chunk in part]
        prompts = [batch for _, batch in prompt_batches(data, curriculum, curriculum.stage(epoch))]
        arrays.append(
            [value for batch in [*chunks, *loss_batches(data, curriculum, epoch), *prompts] for value in batch]
        )
    return all(np.array_equal(a, b) for a, b in zip(*arrays, strict=True))


@pytest.mark.parametrize(("due", "left"), [(37, 20), (38, 20), (39, 0), (40, 0)])
def test_from_remove_all_on_nothing_is_left_of_longer_chains(due, left):
    """The limit is on what is due and not on the random extra (official train.py of iCoT)."""
    long = tokenize([Example("q", ["x" * 57], "a")] * 50, TOKENIZER, "test")
    curriculum = icot(tokens_per_epoch=due, remove_all_from=39, removal_smoothing=0.5)
    curriculum.limit_removal(long)
    [stages] = [curriculum.training_stages(long, np.arange(50), 1, 50)]
    lengths = [len(curriculum.training(long[0], int(stage)).ids) for stage in stages]
    short = len(bytes_of("q\n")) + len(answer_of(Example("q", [], "a")))
    assert max(lengths) - short == (58 - due if left else 0)
    assert left == 0 or min(lengths) < max(lengths)  # some lose more


def test_every_step_removes_what_is_due_at_it():
    """Six items in steps of two: 0, then 4, then 8 tokens of each chain, in the shuffled order of the epoch."""
    data = tokenize([Example("q" * (i + 1), ["x" * 30], "a") for i in range(6)], TOKENIZER, "test")
    keys = {"batch_size_training": 1, "gradient_accumulation_steps": 2, "removal_smoothing": None}
    curriculum = icot(tokens_per_epoch=12, **keys)
    full = {len(example.question): len(curriculum.training(example, 0).ids) for example in (data[i] for i in range(6))}
    removed = []
    for [chunk] in chain(*training_steps(data, curriculum, 0)):
        ids = chunk.batch.input_ids[0, chunk.batch.attention_mask[0]]
        removed.append(full[int((ids == ord("q")).sum()) + 1] - len(ids))
    assert removed == [0, 0, 4, 4, 8, 8]


def test_validation_items_longer_than_any_in_training_lose_the_whole_chain_too():
    long, no_cot = tokenize([Example("q", ["x" * 90], "a")], TOKENIZER, "test"), curriculum_of("no_cot")
    for curriculum in (icot(tokens_per_epoch=50), icot(tokens_per_epoch=50, remove_all_from=40)):
        curriculum.limit_removal(tokens_of())
        one, other = ([batch.input_ids for batch in loss_batches(long, c, 3)] for c in (curriculum, no_cot))
        assert all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


def test_the_tokens_of_whole_steps_are_coconut_without_thoughts_at_that_stage():
    data, curriculum, steps = tokens_of(), icot(removal_smoothing=None), curriculum_of("no_thoughts")
    for index, n_dropped in product(range(len(data)), range(4)):
        due = sum(map(len, data[index].steps[:n_dropped]))
        one, other = curriculum.training(data[index], due), steps.training(data[index], n_dropped)
        assert np.array_equal(one.ids, other.ids) and one.n_unlabeled == other.n_unlabeled


def test_the_random_extra_is_rarely_more_than_nothing():
    """Over one item that comes 100,000 times."""
    data, order = tokenize([Example("q", ["x" * 500], "a")], TOKENIZER, "test"), np.zeros(100_000, np.int64)
    stages = icot(removal_smoothing=4.0).training_stages(data, order, 0, len(order))
    assert np.mean(stages == 0) == pytest.approx(1 - np.exp(-4), abs=0.002)
    assert np.mean(stages == 1) == pytest.approx((1 - np.exp(-4)) * np.exp(-4), abs=0.002)
    assert not np.array_equal(stages, icot(seed=1).training_stages(data, order, 0, len(order)))
    assert icot(removal_smoothing=0.01).training_stages(data, order, 0, len(order)).max() == 100


@pytest.mark.parametrize("skip", range(4))
def test_a_resumed_icot_epoch_has_the_same_batches(skip):
    data = tokenize(EXAMPLES * 3, TOKENIZER, "test")
    curriculum = icot(tokens_per_epoch=5, removal_smoothing=0.3, batch_size_training=2, gradient_accumulation_steps=2)
    whole, rest = (list(training_steps(data, curriculum, 1, skip=n)) for n in (0, skip))
    assert len(whole) == 3 and len(rest) == 3 - skip
    for one, other in zip(chain(*chain(*whole[skip:])), chain(*chain(*rest)), strict=True):
        assert all(np.array_equal(a, b) for a, b in zip(one.batch, other.batch, strict=True))


def test_an_evaluation_draws_nothing():
    """The same validation batches for any seed and smoothing, and prompts that are the question alone."""
    data = tokens_of()
    one, other = icot(removal_smoothing=0.1, seed=1), icot(removal_smoothing=None, seed=2)
    for epoch in (0, 2, 30):
        batches = [list(loss_batches(data, curriculum, epoch)) for curriculum in (one, other)]
        assert all(np.array_equal(a, b) for x, y in zip(*batches, strict=True) for a, b in zip(x, y, strict=True))
    assert one.n_prompt_latents(9, 3) == 0
    assert np.array_equal(one.prompt(data[0], 0).ids, data[0].question)


def test_the_longest_sequence_has_the_whole_chain():
    data = tokens_of()
    whole = [len(icot().training(data[i], 0).ids) for i in range(len(data))]
    assert icot(num_epochs=9).longest(data).tolist() == whole
    assert icot(num_epochs=9, only_eval=True, resume=8).longest(data).tolist() == whole


# An independent oracle: the definitions in PyTorch, one row at a time

torch = pytest.importorskip("torch", reason="torch is not installed: the live oracle is skipped")
transformers = pytest.importorskip("transformers", reason="transformers is not installed: the live oracle is skipped")
safetensors_torch = pytest.importorskip("safetensors.torch")


@pytest.fixture(scope="module")
def theirs(model, tmp_path_factory):
    """The same weights in transformers' GPT-2."""
    folder = tmp_path_factory.mktemp("oracle")
    shape = model.transformer.config.to_dict(TOKENIZER.eos_id)
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(**shape, attn_implementation="eager")).eval()
    mx.save_safetensors(str(folder / "m.safetensors"), dict(tree_flatten(model.parameters())))
    missing = theirs.load_state_dict(safetensors_torch.load_file(folder / "m.safetensors"), strict=False)
    assert missing.missing_keys == ["lm_head.weight"] and not missing.unexpected_keys
    return theirs


def bytes_of(text: str) -> list[int]:
    """The ids of a text: `###` is one token, every other byte its own."""
    return [256, *text[3:].encode()] if text.startswith("###") else list(text.encode())


def their_loss(theirs, rows: list[tuple[list[int], list[int]]]) -> float:
    """Mean cross-entropy over all labeled tokens; rows of (unlabeled ids, labeled ids)."""
    losses = []
    for before, labeled in rows:
        with torch.no_grad():
            logits = theirs(torch.tensor([before + labeled])).logits[0]
        losses.append(
            torch.nn.functional.cross_entropy(logits[len(before) - 1 : -1], torch.tensor(labeled), reduction="none")
        )
    return torch.cat(losses).mean().item()


def our_loss(model: Coconut, curriculum: Curriculum, stage: int) -> float:
    data = tokens_of(curriculum.config.layout)
    rows = [curriculum.training(data[i], stage) for i in range(len(data))]
    return model(collate(rows, TOKENIZER.eos_id).to_mlx()).item()


def answer_of(example: Example) -> list[int]:
    return [*bytes_of("### " + example.answer), TOKENIZER.eos_id]


def pause_row(example: Example, stage: int) -> tuple[list[int], list[int]]:
    """Question, start token, 2 pauses for each of up to 3 dropped steps, end token; what is left counts."""
    n_pauses = 2 * min(stage, 3)
    steps = [] if stage > 3 else example.steps[stage:]
    special = [TOKENIZER.start_id, *[TOKENIZER.latent_id] * n_pauses, TOKENIZER.end_id]
    chain = [i for step in steps for i in bytes_of(step + "\n")]
    return bytes_of(example.question + "\n") + special, chain + answer_of(example)


def test_a_pause_token_run_is_question_pauses_and_answer(model, theirs):
    """At every epoch what pause as thought shows in its last stage."""
    curriculum = curriculum_of(thought="pause", curriculum="none")
    expected = their_loss(theirs, [pause_row(example, 4) for example in EXAMPLES])
    for epoch in (0, 9):
        assert our_loss(model, curriculum, curriculum.stage(epoch)) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("stage", range(6))
def test_pause_as_thought_has_the_loss_of_its_definition(model, theirs, stage):
    expected = their_loss(theirs, [pause_row(example, stage) for example in EXAMPLES])
    assert our_loss(model, curriculum_of(thought="pause"), stage) == pytest.approx(expected, rel=1e-5)


def icot_row(example: Example, due: int) -> tuple[list[int], list[int]]:
    """Question; then the chain without its first `due` tokens, and the answer, which all count."""
    chain = [i for step in example.steps for i in bytes_of(step + "\n")]
    return bytes_of(example.question + "\n"), chain[due:] + answer_of(example)


@pytest.mark.parametrize("due", [0, 1, 3, 7, 11, 40])
def test_icot_has_the_loss_of_its_definition(model, theirs, due):
    expected = their_loss(theirs, [icot_row(example, due) for example in EXAMPLES])
    assert our_loss(model, icot(), due) == pytest.approx(expected, rel=1e-5)
