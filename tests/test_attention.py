"""Recorded layers and attention, and the command that shows it: against definitions, on a tiny random model."""

import mlx.core as mx
import numpy as np
import pytest

from analysis.recording import record
from coconut import Coconut
from config import Config
from dataset import Curriculum, collate
from models.gpt2 import GPT2, GPT2Config
from startup import blas  # noqa: F401  before mlx
from text.tokenizer import load_tokenizer
from text.tokens import TokenExample

EDGES = ["ie", "gh", "ec", "id", "cm"]


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


def prompts(curriculum, questions, n_latents: int):
    """A batch of prompts."""
    tokens = curriculum.tokenizer
    examples = [TokenExample(np.array(tokens.encode(q), np.int32), [], np.array([1])) for q in questions]
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


def test_queries_of_zero_attend_to_every_column_alike(model, curriculum):
    for block in model.transformer.h:
        block.attn.c_attn.weight = mx.concatenate([mx.zeros((16, 16)), block.attn.c_attn.weight[:, 16:]], axis=1)
        block.attn.c_attn.bias = mx.concatenate([mx.zeros(16), block.attn.c_attn.bias[16:]])
    batch = prompts(curriculum("compact"), ["abcdefg"], 2)  # 7 tokens and one column of padding before them
    recorded = record(model, batch)
    first = int(batch.left_padding[0])
    for weights in map(np.array, recorded.weights):
        for t in range(9):
            np.testing.assert_allclose(weights[0, :, first + t, first : first + t + 1], 1 / (t + 1), atol=1e-6)
