"""Live comparison with torch and transformers, where they are installed."""

import json

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from coconut import Coconut
from config import Config
from dataset import Chunk, TrainingSequence, collate
from models.gpt2 import GPT2, GPT2Config
from models.loading import load_gpt2
from models.source import find_source
from startup import blas  # noqa: F401  before mlx
from text.tokenizer import load_tokenizer
from training.step import TrainStep, clipped, gradient_norm, new_optimizer

torch = pytest.importorskip("torch", reason="torch is not installed: the live oracle is skipped")
transformers = pytest.importorskip("transformers", reason="transformers is not installed: the live oracle is skipped")
torch.set_num_threads(1)  # the products are tiny

SHAPE = {"n_positions": 48, "n_embd": 16, "n_layer": 3, "n_head": 4, "layer_norm_epsilon": 1e-3}
NO_DROPOUT = {"embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0}


@pytest.fixture
def words(tiny):
    """A tokenizer of 263 ids, so that the model is small."""
    return load_tokenizer(str(tiny.words))


@pytest.fixture
def theirs(words):
    """GPT-2 by transformers; every parameter moved, so that biases and norms matter and GELU is far from linear."""
    torch.manual_seed(0)
    shape = transformers.GPT2Config(vocab_size=words.vocab_size, **SHAPE, **NO_DROPOUT, attn_implementation="eager")
    model = transformers.GPT2LMHeadModel(shape).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


def opened(folder, words):
    """The saved model through our own loading."""
    config = Config(save_path="", name="", val_path="", coconut=True, model_id=str(folder))
    return Coconut(load_gpt2(find_source(config), config, words))


def make_batch(vocab_size: int, seed: int = 0):
    """Rows of several lengths; those with a latent column are left-padded, none of the latents is a thought."""
    rng = np.random.default_rng(seed)
    rows = [
        TrainingSequence(rng.integers(0, vocab_size, n).astype(np.int32), 2, 0, unlabeled)
        for n, unlabeled in ((31, 4), (9, 3), (20, 19), (2, 1))
    ]
    batch = collate(rows, pad_id=0)
    shift = [0, 7, 3, 11]  # left padding too, as rows with latents have it
    return shift_rows(batch, shift)


def shift_rows(batch, shifts):
    """The batch with each row moved right by its shift."""
    width = batch.input_ids.shape[1] + max(shifts)
    rows, columns = batch.label_positions // batch.input_ids.shape[1], batch.label_positions % batch.input_ids.shape[1]

    def moved(array):
        out = np.zeros((len(array), width), dtype=array.dtype)
        for row, shift in enumerate(shifts):
            out[row, shift : shift + array.shape[1]] = array[row]
        return out

    return batch._replace(
        input_ids=moved(batch.input_ids),
        attention_mask=moved(batch.attention_mask),
        left_padding=batch.left_padding + np.array(shifts, dtype=np.int32),
        first_latent=width,
        label_positions=(rows * width + columns + np.array(shifts)[rows]).astype(np.int32),
        last_column=batch.last_column + np.array(shifts, dtype=np.int32),
    )


def labels_of(batch) -> np.ndarray:
    """The official form of our targets: -100 wherever there is none."""
    labels = np.full(batch.input_ids.size, -100)
    used = batch.label_mask > 0
    labels[batch.label_positions[used] + 1] = batch.labels[used]
    return labels.reshape(batch.input_ids.shape)


def their_loss(theirs, batch):
    """The official Coconut's loss: cross-entropy of shifted logits with -100 ignored. -> (loss, logits)"""
    tensor = lambda array: torch.tensor(np.array(array, dtype=np.int64))  # noqa: E731
    positions = np.maximum(np.arange(batch.input_ids.shape[1]) - batch.left_padding[:, None], 0)
    positions = np.where(batch.attention_mask, positions, 0)
    out = theirs(tensor(batch.input_ids), attention_mask=tensor(batch.attention_mask), position_ids=tensor(positions))
    shifted, labels = out.logits[:, :-1].flatten(0, 1), tensor(labels_of(batch))[:, 1:].flatten()
    return torch.nn.functional.cross_entropy(shifted, labels), out.logits


def parameters_of(theirs) -> dict:
    return {name: parameter for name, parameter in theirs.named_parameters() if name != "lm_head.weight"}


def save(theirs, folder, names: str):
    """Save as transformers does: GPT2LMHeadModel's names begin with `transformer.`, those of GPT2Model are bare."""
    (theirs if names == "transformer." else theirs.transformer).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] == "gpt2"
    stored = mx.load(str(folder / "model.safetensors"))
    assert ("transformer.h.0.attn.c_attn.weight" if names == "transformer." else "h.0.attn.c_attn.weight") in stored
    return folder


@pytest.mark.parametrize("names", ["transformer.", "bare"])
@pytest.mark.parametrize("n_inner", [None, 24])
def test_logits_and_gradients_equal_transformers(names, n_inner, theirs, words, tmp_path):
    """GELU, layer norm (with its own epsilon), attention, masks, positions, the tied head, and their gradients."""
    if n_inner:
        torch.manual_seed(1)
        theirs = transformers.GPT2LMHeadModel(
            transformers.GPT2Config(**{**theirs.config.to_dict(), "n_inner": n_inner, "initializer_range": 0.5})
        ).eval()
    ours = opened(save(theirs, tmp_path, names), words)
    batch = make_batch(words.vocab_size)

    expected_loss, expected_logits = their_loss(theirs, batch)
    expected_loss.backward()
    hidden, _ = ours.think(batch.to_mlx())
    real = batch.attention_mask
    np.testing.assert_allclose(
        np.array(ours.transformer.logits(hidden))[real], expected_logits.detach().numpy()[real], atol=1e-4
    )
    loss, gradient = nn.value_and_grad(ours, lambda b: ours(b))(batch.to_mlx())
    assert loss.item() == pytest.approx(expected_loss.item(), rel=1e-5)
    gradient, expected = dict(tree_flatten(gradient)), parameters_of(theirs)
    assert gradient.keys() == expected.keys()
    for name, parameter in expected.items():
        value = parameter.grad.numpy()
        np.testing.assert_allclose(
            np.array(gradient[name]), value, atol=1e-5 * max(1, np.abs(value).max()), err_msg=name
        )


def test_file_holds_exactly_transformers_parameters(theirs, words, tmp_path):
    """The names and shapes of our parameters are those transformers saves."""
    ours = opened(save(theirs, tmp_path, "transformer."), words)
    stored = mx.load(str(tmp_path / "model.safetensors"))
    assert {n: w.shape for n, w in tree_flatten(ours.parameters())} == {n: w.shape for n, w in stored.items()}


@pytest.mark.parametrize("weight_decay", [0.0, 0.01, 0.5])
def test_twenty_adamw_steps_equal_torch(weight_decay, theirs, words, tmp_path):
    """Losses, weights and both moments after 20 steps on changing batches with one optimizer."""
    ours = opened(save(theirs, tmp_path, "transformer."), words)
    config = Config(save_path="", name="", val_path="", coconut=True, lr=1e-3, weight_decay=weight_decay)
    batches = [make_batch(words.vocab_size, seed) for seed in range(20)]
    optimizer = new_optimizer(ours, config)
    step = TrainStep(ours, optimizer, config)
    losses = [step([[Chunk(batch, 1.0)]], 0, number, config.lr).loss for number, batch in enumerate(batches)]

    reference = torch.optim.AdamW(theirs.parameters(), lr=1e-3, weight_decay=weight_decay)
    expected = []
    for batch in batches:
        reference.zero_grad()
        loss, _ = their_loss(theirs, batch)
        loss.backward()
        reference.step()
        expected.append(loss.item())

    assert losses == pytest.approx(expected, rel=1e-5)
    state = dict(tree_flatten(optimizer.state))
    for name, weight in tree_flatten(ours.parameters()):
        parameter = parameters_of(theirs)[name]
        moments = reference.state[parameter]
        moved = np.ones(parameter.shape, dtype=bool)
        if name.endswith("c_attn.bias"):
            moved[16:32] = False  # the keys': softmax does not see them, so their gradient and its sign are noise
        found, wanted = np.array(weight), parameter.detach().numpy()
        np.testing.assert_allclose(found[moved], wanted[moved], atol=2e-5, err_msg=name)
        np.testing.assert_allclose(np.array(state[f"{name}.m"]), moments["exp_avg"].numpy(), atol=1e-6)
        np.testing.assert_allclose(np.array(state[f"{name}.v"]), moments["exp_avg_sq"].numpy(), atol=1e-7)


@pytest.mark.parametrize("max_norm", [0.5, 1e6])
def test_clipping_equals_torch(max_norm):
    """A gradient above the norm is scaled to it, one below is left alone."""
    rng = np.random.default_rng(0)
    arrays = [rng.normal(size=shape).astype(np.float32) for shape in ((3, 4), (5,), (2, 3, 4))]
    parameters = [torch.nn.Parameter(torch.zeros(a.shape)) for a in arrays]
    for parameter, array in zip(parameters, arrays, strict=True):
        parameter.grad = torch.tensor(array)
    norm = torch.nn.utils.clip_grad_norm_(parameters, max_norm)
    gradient = [mx.array(a) for a in arrays]
    ours = clipped(gradient, gradient_norm(gradient), max_norm)
    assert gradient_norm(gradient).item() == pytest.approx(norm.item(), rel=1e-6)
    for parameter, array in zip(parameters, ours, strict=True):
        np.testing.assert_allclose(np.array(array), parameter.grad.numpy(), rtol=1e-5)


def test_fresh_weights_are_spread_as_transformers_spreads_them():
    """Mean and spread of every tensor of a fresh model, both with the same initializer_range."""
    shape = {"vocab_size": 1000, "n_positions": 256, "n_embd": 64, "n_layer": 5, "n_head": 2, "initializer_range": 0.07}
    torch.manual_seed(0)
    mx.random.seed(0)
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(**shape))
    ours = dict(tree_flatten({"transformer": GPT2(GPT2Config(**shape)).parameters()}))
    assert ours.keys() == parameters_of(theirs).keys()
    for name, parameter in parameters_of(theirs).items():
        found, expected = np.array(ours[name]), parameter.detach().numpy()
        assert found.std() == pytest.approx(expected.std(), rel=0.05), name
        assert found.mean() == pytest.approx(expected.mean(), abs=6 * expected.std() / np.sqrt(found.size)), name
