"""Tokens, curriculum, batches: nothing lost or invented, labels where they belong, for any texts, stage and method."""

import json
from itertools import chain

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import dataset
from config import Config
from dataset import Curriculum, Data, collate
from methods import METHOD_KEYS
from parallel.distributed import Group
from parallel.streams import on_gpu
from text import tokens as tokens_module
from text.reader import Example, Source
from text.tokenizer import Tokenizer
from text.tokens import tokenize
from utils import UserError

PROPERTY = settings(derandomize=True, deadline=None, database=None, max_examples=150)
WORDS = ["What", " is", "<<", ">>", "###", " ", "\n", " +", "é".encode()]  # few words: other texts fall back to bytes
WORDS = [word if isinstance(word, bytes) else word.encode() for word in WORDS]
VOCABULARY = [bytes([i]) for i in range(256)]
TOKENIZER = Tokenizer({token: i for i, token in enumerate(dict.fromkeys(VOCABULARY + WORDS))}, "test")

texts = st.text(max_size=12)
examples = st.builds(Example, question=texts, steps=st.lists(texts, max_size=5), answer=texts)
many_examples = st.lists(examples, min_size=1, max_size=6)


def make_config(method: str = "coconut", **keys) -> Config:
    keys = {"save_path": "", "name": "", "val_path": "", "num_epochs": 3, method: True, **keys}
    return Config(**keys)


@st.composite
def configs(draw) -> Config:
    return make_config(
        draw(st.sampled_from(METHOD_KEYS)),
        c_thought=draw(st.integers(0, 3)),
        max_latent_stage=draw(st.integers(0, 4)),
        pad_latent_to_max=draw(st.booleans()),
        uniform_prob=draw(st.sampled_from([0.0, 0.0, 0.5, 1.0])),
        num_epochs=draw(st.integers(1, 7)),
        layout=draw(st.sampled_from(["lines", "compact"])),
    )


def tokens_of(given_examples: list[Example], layout: str = "lines"):
    return tokenize(given_examples, TOKENIZER, "test", layout)


def texts_of(example: Example, layout: str) -> list[str]:
    """What the official get_dataset tokenizes, piece by piece; the compact layout has no newlines and no spaces."""
    if layout == "compact":
        return [example.question, *example.steps, "###" + example.answer]
    return [example.question + "\n", *(step + "\n" for step in example.steps), "### " + example.answer]


# Tokens


@PROPERTY
@given(many_examples, st.sampled_from(["lines", "compact"]))
def test_tokens_are_the_texts(given_examples, layout):
    data = tokens_of(given_examples, layout)
    assert len(data) == len(given_examples)
    for found, example in zip((data[i] for i in range(len(data))), given_examples, strict=True):
        pieces = [found.question, *found.steps, found.answer[:-1]]
        assert [TOKENIZER.decode(piece.tolist()) for piece in pieces] == texts_of(example, layout)
        assert found.answer[-1] == TOKENIZER.eos_id
        assert max(map(max, filter(len, pieces))) < TOKENIZER.eos_id  # no marker comes out of a text


@PROPERTY
@given(many_examples, st.integers(0, 6), st.data())
def test_lengths_and_selection_agree_with_the_pieces(given_examples, n_dropped, data):
    whole = tokens_of(given_examples)
    chosen = data.draw(st.lists(st.integers(0, len(whole) - 1), unique=True))
    part = whole.select(np.array(chosen, dtype=int))
    assert len(part) == len(chosen)
    assert part.n_steps.tolist() == [len(given_examples[i].steps) for i in chosen]
    assert part.question_lengths.tolist() == [len(whole[i].question) for i in chosen]
    kept = [[*whole[i].steps[n_dropped:], whole[i].answer] for i in chosen]
    assert part.lengths_from(n_dropped).tolist() == [sum(map(len, pieces)) for pieces in kept]
    for row, i in enumerate(chosen):
        assert np.array_equal(np.concatenate(part[row].steps or [[]]), np.concatenate(whole[i].steps or [[]]))


def test_tokenising_in_chunks_changes_nothing(monkeypatch):
    given_examples = [Example(f"What is {i}?", ["a"] * (i % 4), str(i)) for i in range(11)]
    whole = tokens_of(given_examples)
    monkeypatch.setattr("text.tokens.CHUNK", 3)
    for name, array in vars(tokens_of(given_examples)).items():
        assert np.array_equal(array, getattr(whole, name))


# Curriculum


def prompt_at(tokens, stage: int, config: Config):
    """The prompt of an evaluation at a stage."""
    curriculum = Curriculum(config, TOKENIZER)
    return curriculum.prompt(tokens, curriculum.n_prompt_latents(stage, len(tokens.steps)))


def split_at_thoughts(sequence, config: Config):
    """(ids before, thoughts with their markers, ids behind) of a sequence."""
    surrounded = config.coconut and config.layout == "lines"
    n_inserted = sequence.n_latents + 2 * surrounded
    start = sequence.latent_start - surrounded
    ids = sequence.ids.tolist()
    return ids[:start], ids[start : start + n_inserted], ids[start + n_inserted :]


def expected_thoughts(n_latents: int, config: Config) -> list[int]:
    if not config.coconut or config.layout == "compact":
        return [TOKENIZER.latent_id] * n_latents
    return [TOKENIZER.start_id, *[TOKENIZER.latent_id] * n_latents, TOKENIZER.end_id]


def expected_training(stage: int, n_steps: int, config: Config) -> tuple[int, int]:
    """(steps dropped, latents) as FIDELITY's third point words it."""
    c_thought = config.c_thought if config.coconut else 0
    if config.no_cot:
        return n_steps, 0
    if stage > config.max_latent_stage:
        most = config.max_latent_stage
        return n_steps, c_thought * (most if config.pad_latent_to_max else min(n_steps, most))
    return min(stage, n_steps), c_thought * stage


@PROPERTY
@given(examples, configs(), st.integers(0, 7))
def test_a_training_sequence_keeps_its_tokens_and_labels_the_rest(example, config, stage):
    tokens = tokens_of([example], config.layout)[0]
    dropped, n_latents = expected_training(stage, len(example.steps), config)
    sequence = Curriculum(config, TOKENIZER).training(tokens, stage)
    before, thoughts, behind = split_at_thoughts(sequence, config)
    assert before == tokens.question.tolist()
    assert thoughts == expected_thoughts(n_latents, config)
    assert behind == np.concatenate([*tokens.steps[dropped:], tokens.answer]).tolist()
    assert sequence.n_latents == n_latents
    assert sequence.n_unlabeled == len(before) + len(thoughts)
    assert sequence.ids.dtype == np.int32


@PROPERTY
@given(examples, configs(), st.integers(0, 7))
def test_a_prompt_is_the_question_and_its_thoughts(example, config, stage):
    tokens = tokens_of([example], config.layout)[0]
    most = config.max_latent_stage
    most = most if config.pad_latent_to_max else min(most, len(example.steps))
    n_latents = min(stage, most) * (config.c_thought if config.coconut else 0)
    sequence = prompt_at(tokens, stage, config)
    assert split_at_thoughts(sequence, config) == (tokens.question.tolist(), expected_thoughts(n_latents, config), [])
    assert sequence.n_latents == n_latents


@PROPERTY
@given(many_examples, configs())
def test_longest_is_the_longest_sequence_of_the_run(given_examples, config):
    data = tokens_of(given_examples, config.layout)
    for index, found in enumerate(Curriculum(config, TOKENIZER).longest(data)):
        stages = {Curriculum(config, TOKENIZER).stage(epoch) for epoch in range(config.num_epochs)}
        if config.uniform_prob:
            stages |= set(range(len(data[index].steps) + 1))
        trained = [len(Curriculum(config, TOKENIZER).training(data[index], stage).ids) for stage in stages]
        prompts = [len(prompt_at(data[index], stage, config).ids) for stage in stages]
        assert found == max(trained) > max(prompts)


# The rows of Table 1 beyond the official four


def batches_of(config: Config, epoch: int, data) -> list[list[np.ndarray]]:
    """The arrays of every batch of an epoch, for training and for evaluation."""
    curriculum = Curriculum(config, TOKENIZER)
    trained = all_batches(dataset.training_steps(data, curriculum, epoch))
    checked = list(dataset.loss_batches(data, curriculum, epoch))
    prompted = [batch for _, batch in dataset.prompt_batches(data, curriculum, curriculum.stage(epoch))]
    return [[np.asarray(value) for value in batch] for batch in [*trained, *checked, *prompted]]


def assert_same(one: list[list[np.ndarray]], other: list[list[np.ndarray]]) -> None:
    assert len(one) == len(other) > 0
    assert all(np.array_equal(a, b) for x, y in zip(one, other, strict=True) for a, b in zip(x, y, strict=True))


@PROPERTY
@given(many_examples, configs(), st.integers(0, 3))
def test_without_curriculum_every_epoch_is_the_last_stage(given_examples, config, epoch):
    """Question, all latents, answer: no written step at any epoch."""
    data = tokens_of(given_examples, config.layout)
    keys = {**config.to_dict(), **dict.fromkeys(METHOD_KEYS, False), "coconut": True, "uniform_prob": 0.0}
    most = config.max_latent_stage
    always = Config(**{**keys, "curriculum": "none"})
    curriculum = Curriculum(always, TOKENIZER)
    for index in range(len(data)):
        tokens = data[index]
        n_latents = config.c_thought * (most if config.pad_latent_to_max else min(most, len(tokens.steps)))
        expected = [*tokens.question, *expected_thoughts(n_latents, always), *tokens.answer]
        assert curriculum.training(tokens, curriculum.stage(epoch)).ids.tolist() == expected


def test_without_curriculum_at_an_epoch_is_the_curriculum_past_its_end():
    data, keys = small_set(), {**CURRICULUM, "epochs_per_stage": 2}
    always, steps = make_config(**keys, curriculum="none"), make_config(**keys)
    for epoch in (6, 7, 9):
        assert Curriculum(always, TOKENIZER).stage(epoch) == Curriculum(steps, TOKENIZER).stage(6) == 3
        assert_same(batches_of(always, epoch, data), batches_of(steps, epoch, data))
    early = batches_of(always, 0, data)
    with pytest.raises(AssertionError):
        assert_same(early, batches_of(steps, 0, data))


def test_no_thoughts_without_curriculum_is_no_cot():
    one, other = make_config("no_thoughts", **CURRICULUM, curriculum="none"), make_config("no_cot", **CURRICULUM)
    for epoch in (0, 3):
        assert_same(batches_of(one, epoch, small_set()), batches_of(other, epoch, small_set()))


def test_a_billion_epochs_cost_no_more_than_a_few():
    """Both where most of them are past max_latent_stage and where each is a stage of its own."""
    data = tokens_of([Example("q", ["x" * 40, "zz"], "a")])

    def longest(max_latent_stage, num_epochs):
        config = make_config(max_latent_stage=max_latent_stage, num_epochs=num_epochs)
        return Curriculum(config, TOKENIZER).longest(data).item()

    assert longest(3, 10**9) == longest(3, 6)
    assert longest(10**9, 10**9) == longest(10**9, 10**9 - 1) + 1


def test_an_evaluation_looks_at_its_own_stage_alone():
    data = tokens_of([Example("q", ["x" * 40, "y" * 40, "zz"], "a")])
    config = make_config(c_thought=5, max_latent_stage=9, num_epochs=9, only_eval=True, resume=2)
    expected = [*"q\n", "start", *["latent"] * 10, "end", *"zz\n", "###", *" a", "end of text"]
    assert Curriculum(config, TOKENIZER).longest(data).tolist() == [len(expected)]


def test_a_drawn_stage_takes_no_more_thoughts_than_the_item_has_steps():
    data = tokens_of([Example("q", [], "a"), Example("q", ["", "", ""], "a")])
    config = make_config(c_thought=5, max_latent_stage=9, uniform_prob=0.5, num_epochs=1)
    shortest, longest = Curriculum(config, TOKENIZER).longest(data).tolist()
    assert longest - shortest == 3 * 5


@pytest.mark.parametrize(("probability", "expected"), [(0.0, {2}), (1.0, {0, 1, 2, 3})])
def test_uniform_prob_draws_stages_up_to_the_number_of_steps(probability, expected):
    n_steps = np.array([3] * 200 + [0] * 5)
    config = make_config(uniform_prob=probability)
    stages = Curriculum(config, TOKENIZER).item_stages(n_steps, 2)
    assert set(stages[:200]) == expected
    assert set(stages[200:]) == ({0} if probability else {2})
    assert np.array_equal(stages, Curriculum(config, TOKENIZER).item_stages(n_steps, 2))
    assert not probability or not np.array_equal(stages, Curriculum(config, TOKENIZER).item_stages(n_steps, 1))


# Batches

PAD = 999


@st.composite
def sequences(draw):
    """Rows of a batch, by any method at any stage; ids 0, 1, 2, ... so that none can be mistaken for another."""
    rows, count = [], 0
    for _ in range(draw(st.integers(1, 5))):
        n_question, n_latents, markers = (
            draw(st.integers(1, 9)),
            draw(st.sampled_from([0, 0, 1, 2, 5])),
            draw(st.booleans()),
        )
        n_unlabeled = n_question + n_latents + 2 * (markers or n_latents > 0)
        length = n_unlabeled + draw(st.integers(0, 9))
        ids = np.arange(count, count + length, dtype=np.int32)
        rows.append(dataset.TrainingSequence(ids, n_question + 1, n_latents, n_unlabeled))
        count += length
    return rows


@PROPERTY
@given(sequences(), st.sampled_from([1, 8, 32]))
def test_a_batch_holds_every_row_once_with_positions_from_0(rows, multiple):
    batch = collate(rows, PAD, multiple)
    assert batch.input_ids.shape == batch.attention_mask.shape
    assert batch.input_ids.shape[0] == len(rows)
    assert batch.input_ids.shape[1] % multiple == 0
    assert (batch.input_ids[~batch.attention_mask] == PAD).all()
    for row, sequence in enumerate(rows):
        columns = np.flatnonzero(batch.attention_mask[row])
        assert np.array_equal(batch.input_ids[row, columns], sequence.ids)
        assert np.array_equal(np.diff(columns), np.ones(len(columns) - 1))  # in one piece
        assert np.array_equal(columns - batch.left_padding[row], np.arange(len(sequence.ids)))  # positions
        assert batch.last_column[row] == columns[-1]


@PROPERTY
@given(sequences(), st.sampled_from([1, 8]))
def test_first_latents_stand_in_one_column(rows, multiple):
    batch = collate(rows, PAD, multiple)
    most = max(s.n_latents for s in rows)
    assert batch.latent_mask.shape == (len(rows), most)
    assert batch.latent_mask.sum(axis=1).tolist() == [s.n_latents for s in rows]
    for row, sequence in enumerate(rows):
        first = np.flatnonzero(batch.attention_mask[row])[0]
        if sequence.n_latents:
            assert first + sequence.latent_start == batch.first_latent
            assert batch.latent_mask[row, : sequence.n_latents].all()
        else:
            assert first == 0  # rows without latents are not padded on the left
    assert batch.first_latent == batch.input_ids.shape[1] if not most else batch.first_latent % multiple == 0


@PROPERTY
@given(sequences())
def test_labels_are_the_tokens_behind_the_thoughts_predicted_one_before(rows):
    batch = collate(rows, PAD)
    expected = np.concatenate([s.ids[s.n_unlabeled :] for s in rows])
    count = len(expected)
    assert np.array_equal(batch.labels[:count], expected)
    assert np.array_equal(batch.input_ids.ravel()[batch.label_positions[:count] + 1], expected)
    assert batch.attention_mask.ravel()[
        batch.label_positions[:count]
    ].all()  # from a token of its own, never from padding
    assert batch.label_mask.tolist() == [1.0] * count + [0.0] * (len(batch.label_mask) - count)
    assert len(batch.label_positions) == len(batch.labels) == len(batch.label_mask)
    assert len(batch.label_mask) % dataset.LABELS_MULTIPLE[on_gpu()] == 0
    assert batch.label_positions.min(initial=0) >= 0
    assert batch.label_positions.max(initial=0) < batch.input_ids.size


@PROPERTY
@given(sequences(), st.sampled_from([1, 8]), st.booleans())
def test_no_column_is_read_before_the_first_that_is_said_to_be(rows, multiple, labeled):
    """Read are those before latents and labels; of a prompt, which has no labels, the last one."""
    if not labeled:
        rows = [row._replace(n_unlabeled=len(row.ids)) for row in rows]
    batch = collate(rows, PAD, multiple)
    counted = batch.label_positions[batch.label_mask > 0] % batch.input_ids.shape[1]
    read = counted.tolist() or batch.last_column.tolist()
    if batch.latent_mask.any():
        read.append(batch.first_latent - 1)
    assert 0 <= batch.first_read <= min(read)
    assert batch.first_read > min(read) - dataset.READ_MULTIPLE[on_gpu()]
    assert (batch.label_positions % batch.input_ids.shape[1] >= batch.first_read).all(), "those of weight 0 too"


@pytest.mark.skipif(on_gpu(), reason="a GPU's lengths are rounded up, so that shapes repeat")
def test_rows_alike_are_not_padded_on_a_cpu():
    row = dataset.TrainingSequence(np.arange(11, dtype=np.int32), latent_start=5, n_latents=3, n_unlabeled=8)
    batch = collate([row, row], PAD)
    assert batch.attention_mask.all() and batch.label_mask.tolist() == [1.0] * 6


def small_set(n: int = 11):
    return tokens_of([Example(f"What is {i}?" + " is" * (i * 7 % 5), ["a"] * (i % 4), str(i)) for i in range(n)])


def all_batches(steps) -> list:
    """The batches of all chunks of all micro-batches."""
    return [chunk.batch for micro_batches in steps for chunk in chain(*micro_batches)]


def questions(batches) -> list[str]:
    """Every row of some batches as text up to its question mark."""
    rows = [row for batch in batches for row in zip(batch.input_ids, batch.attention_mask, strict=True)]
    return [TOKENIZER.decode(ids[real].tolist()).split("?")[0] for ids, real in rows]


CURRICULUM = {"c_thought": 2, "max_latent_stage": 2, "batch_size_training": 4, "batch_size_eval": 3}


def test_an_epoch_shows_every_item_once_in_a_new_order():
    data, config = small_set(), make_config(**CURRICULUM)
    epochs = [
        questions(all_batches(dataset.training_steps(data, Curriculum(config, TOKENIZER), epoch)))
        for epoch in (0, 0, 1)
    ]
    assert sorted(epochs[0]) == sorted(epochs[2]) == sorted(f"What is {i}" for i in range(11))
    assert epochs[0] == epochs[1] != epochs[2]
    other = dataset.training_steps(data, Curriculum(make_config(**CURRICULUM, seed=1), TOKENIZER), 0)
    assert epochs[0] != questions(all_batches(other))


@pytest.mark.parametrize("accumulated", [1, 2])
@pytest.mark.parametrize("skip", range(5))
def test_a_resumed_epoch_goes_on_where_it_stopped(skip, accumulated):
    data, config = small_set(), make_config(**CURRICULUM, uniform_prob=0.5, gradient_accumulation_steps=accumulated)
    whole = list(dataset.training_steps(data, Curriculum(config, TOKENIZER), 1))
    rest = list(dataset.training_steps(data, Curriculum(config, TOKENIZER), 1, skip=skip))
    assert dataset.count_batches(len(data), config) == sum(map(len, whole)) == 3
    assert len(whole) == -(-3 // accumulated) and len(rest) == max(0, len(whole) - skip)
    for one, other in zip(chain(*chain(*whole[skip:])), chain(*chain(*rest)), strict=True):
        assert one.loss_weight == other.loss_weight
        assert all(np.array_equal(a, b) for a, b in zip(one.batch, other.batch, strict=True))


@pytest.mark.parametrize(
    "lengths, parts",
    [([5, 9, 5, 9], [[5, 5], [9, 9]]), ([7], [[7]]), ([3, 3, 3], [[3], [3, 3]]), ([4, 30, 4, 4], [[4, 4, 4], [30]])],
)
def test_a_micro_batch_in_chunks_of_like_length(lengths, parts):
    """Every row once, weighted by its labeled tokens; n_unlabeled is 2, so a row of 5 has 3 of them."""
    rows = [dataset.TrainingSequence(np.arange(n), 1, 0, 2) for n in lengths]
    chunks = dataset.chunks(rows, 2, PAD)
    assert [chunk.batch.attention_mask.sum(axis=1).tolist() for chunk in chunks] == parts
    counts = [sum(n - 2 for n in part) for part in parts]
    assert [chunk.loss_weight for chunk in chunks] == pytest.approx([n / sum(counts) for n in counts])
    [whole] = dataset.chunks(rows, 1, PAD)
    assert whole.batch.attention_mask.sum(axis=1).tolist() == sorted(lengths) and whole.loss_weight == 1


def test_six_chunks_of_four_rows_are_four():
    rows = [dataset.TrainingSequence(np.arange(n), 1, 0, 2) for n in (3, 4, 5, 6)]
    assert sum(len(chunk.batch.input_ids) for chunk in dataset.chunks(rows, 6, PAD)) == 4


def test_validation_loss_goes_through_the_file_in_order():
    found = questions(dataset.loss_batches(small_set(), Curriculum(make_config(**CURRICULUM), TOKENIZER), 2))
    assert found == [f"What is {i}" for i in range(11)]


@pytest.mark.parametrize("n", [2, 3, 5])
def test_several_ranks_split_the_validation_set(n):
    """The batches of a single process, each on one of the ranks: nothing is counted twice."""
    data, config, groups = small_set(), make_config(**CURRICULUM), [Group() for _ in range(n)]
    for rank, group in enumerate(groups):
        group.rank, group.world_size = rank, n
    alone = [questions([batch]) for batch in dataset.loss_batches(data, Curriculum(config, TOKENIZER), 2)]
    shared = [
        questions([batch])
        for group in groups
        for batch in dataset.loss_batches(data, Curriculum(config, TOKENIZER), 2, group)
    ]
    assert sorted(shared) == sorted(alone)
    alone = [chosen for chosen, _ in dataset.prompt_batches(data, Curriculum(config, TOKENIZER), 1)]
    shared = [
        chosen
        for group in groups
        for chosen, _ in dataset.prompt_batches(data, Curriculum(config, TOKENIZER), 1, group)
    ]
    assert sorted(shared) == sorted(alone)


def test_prompts_come_with_their_indices_by_length():
    data = small_set()
    batches = list(dataset.prompt_batches(data, Curriculum(make_config(**CURRICULUM), TOKENIZER), 1))
    indices = [index for chosen, _ in batches for index in chosen]
    assert sorted(indices) == list(range(11))
    assert questions(batch for _, batch in batches) == [f"What is {i}" for i in indices]
    lengths = [len(data[i].question) for i in indices]
    assert lengths == sorted(lengths)
    assert all(len(chosen) <= 3 and not batch.label_mask.any() for chosen, batch in batches)


def test_a_described_batch_shows_ids_and_labels():
    data = tokens_of([Example("What", ["a"], "1")])
    [[[(batch, _)]]] = dataset.training_steps(data, Curriculum(make_config(**CURRICULUM), TOKENIZER), 1)
    lines = dataset.describe_batch([batch], TOKENIZER).splitlines()
    assert lines[-1] == "=" * 40
    real = [line for line, kept in zip(lines, batch.attention_mask[0], strict=False) if kept]
    what, newline, hashes = (TOKENIZER.encode(text)[0] for text in ("What", "\n", "###"))
    assert real[:2] == [f"{what} -100 'What'", f"{newline} -100 '\\n'"]
    assert real[2] == f"{TOKENIZER.start_id} -100 '<|start-latent|>'"
    assert real[3:5] == [f"{TOKENIZER.latent_id} -100 '<|latent|>'"] * 2
    assert real[5] == f"{TOKENIZER.end_id} -100 '<|end-latent|>'"
    assert real[6] == f"{hashes} {hashes} '###'"
    assert real[-1] == f"{TOKENIZER.eos_id} {TOKENIZER.eos_id} '<|endoftext|>'"
    padding = [line for line, kept in zip(lines, batch.attention_mask[0], strict=False) if not kept]
    assert set(padding) <= {f"{TOKENIZER.eos_id} -100 '<|endoftext|>'"}


# Data: from a path to checked tokens


def item(question: str = "What?", steps=("a", "b"), answer: str = "1") -> dict:
    return {"question": question, "steps": list(steps), "answer": answer}


@pytest.fixture
def open_data(tmp_path, monkeypatch):
    """Write items and open them as run.py does: open_data(items, name=..., keep_texts=..., **config keys) -> Data."""
    monkeypatch.setattr(tokens_module, "MIN_CACHED_BYTES", 0)

    def call(items, name="data.json", n_positions=100, keep_texts=True, tokenizer=TOKENIZER, **keys) -> Data:
        (tmp_path / name).write_text(json.dumps(items))
        config = make_config(**{"token_cache": str(tmp_path / "cache"), **keys})
        return Data(str(tmp_path / name), Curriculum(config, tokenizer), n_positions, 2, keep_texts)

    return call


def test_texts_are_kept_for_evaluation_alone(open_data, tmp_path):
    items = [item(), item("Who?")]
    valid = open_data(items)
    assert valid.examples == [Example("What?", ["a", "b"], "1"), Example("Who?", ["a", "b"], "1")]
    assert not (tmp_path / "cache").exists()  # the texts are read anyway
    train = open_data(items, keep_texts=False)
    assert train.examples == []
    assert len(train) == len(valid) == 2
    for name, array in vars(valid.tokens).items():
        assert np.array_equal(getattr(train.tokens, name), array), name


def test_debug_takes_the_first_items_and_no_cache(open_data, tmp_path):
    for keep_texts in (True, False):
        assert len(open_data([item()] * 5, debug=True, keep_texts=keep_texts)) == 2
    assert not (tmp_path / "cache").exists()


def test_the_cache_knows_content_and_vocabulary(open_data, tmp_path, monkeypatch):
    """Same content under another name: not read again. Other content or vocabulary: not mistaken for it."""
    reads = []
    read = Source.examples
    monkeypatch.setattr(Source, "examples", lambda self, limit=None: reads.append(self.path) or read(self, limit))
    other = Tokenizer({token: 255 - i for i, token in enumerate(VOCABULARY)}, "other")
    first = open_data([item()], keep_texts=False)
    again = open_data([item()], name="copy.json", keep_texts=False)
    assert len(reads) == 1
    assert np.array_equal(first.tokens.tokens, again.tokens.tokens)
    assert open_data([item(answer="2")], keep_texts=False).tokens[0].answer[-2] == TOKENIZER.encode("2")[0]
    assert open_data([item()], keep_texts=False, tokenizer=other).tokens[0].question[0] == 255 - ord("W")
    assert len(reads) == 3
    assert len(list((tmp_path / "cache").iterdir())) == 3


def test_wrong_items_are_never_cached(open_data, tmp_path):
    for _ in range(2):
        with pytest.raises(UserError, match="item 1: answer is empty"):
            open_data([item(), item(answer="")], keep_texts=False)
    assert not (tmp_path / "cache").exists()


LONG = item("W" * 120)


def test_items_too_long_for_the_model_are_listed(open_data):
    expected = (
        r"data.json: 2 of 3 items are longer than the model's 100 positions: items 0 \(\d+ tokens\), 2 \(\d+ tokens\). "
        "`drop_too_long: True` leaves them out"
    )
    for keep_texts in (True, False, False):  # also from the cache
        with pytest.raises(UserError, match=expected):
            open_data([LONG, item(), LONG], keep_texts=keep_texts)
    with pytest.raises(UserError, match=r"12 of 12 items .* 9 \(\d+ tokens\), \.\.\.\. `drop"):
        open_data([LONG] * 12)


def test_the_limit_counts_every_position(open_data):
    data = tokens_of([Example("What?", ["a", "b"], "1")])
    length = Curriculum(make_config(), TOKENIZER).longest(data).item()
    assert len(open_data([item()], n_positions=length)) == 1
    with pytest.raises(UserError, match=rf"item 0 \({length} tokens\)"):
        open_data([item()], n_positions=length - 1)


@pytest.mark.parametrize("keep_texts", [True, False])
def test_items_too_long_are_dropped_on_request_and_said(keep_texts, open_data, capsys):
    data = open_data([LONG, item("Who?"), LONG, item("Why?")], keep_texts=keep_texts, drop_too_long=True)
    assert len(data) == len(data.tokens) == 2
    assert data.indices.tolist() == [1, 3]
    assert [e.question for e in data.examples] == (["Who?", "Why?"] if keep_texts else [])
    assert [TOKENIZER.decode(data.tokens[i].question.tolist()) for i in range(2)] == ["Who?\n", "Why?\n"]
    warning = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
    assert len(warning) == 1
    assert "LEFT OUT, because too long: 2 of 4 items" in warning[0]
    assert "items 0 (" in warning[0] and warning[0].endswith("about the other 2")


def test_dropping_every_item_is_an_error(open_data):
    with pytest.raises(UserError, match="none would be left"):
        open_data([LONG], drop_too_long=True)


def test_questions_in_both_sets_are_counted(open_data, capsys):
    train = open_data([item("a"), item("b", answer="2"), item("c"), item("b c")], name="train.json", keep_texts=False)
    valid = open_data([LONG, item("d"), item("b"), item("b "), item("c")], name="valid.json", drop_too_long=True)
    capsys.readouterr()
    dataset.warn_of_shared_questions(train, valid)
    error = capsys.readouterr().err
    assert "valid.json: 2 of 4 questions are in " in error
    assert "train.json too (items 2, 4): accuracy on them may be memory" in error
    other = open_data([item("x")], keep_texts=False)
    capsys.readouterr()
    dataset.warn_of_shared_questions(other, valid)
    assert capsys.readouterr().err == ""
