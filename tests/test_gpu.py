"""What runs on GPUs alone, on the device there is: on a CPU the same code with `on_gpu` saying yes."""

import json
import os
import subprocess
import sys

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from conftest import ROOT
from mlx.utils import tree_flatten

from coconut import Coconut
from dataset import TrainingSequence, collate
from models import ops
from models.cache import make_cache
from models.gpt2 import GPT2, GPT2Config
from models.precision import computing_in
from parallel import streams
from parallel.streams import on_gpu, use_device
from utils import UserError


@pytest.fixture
def gpu_code(monkeypatch):
    """Every module believes that there is a GPU."""
    for module in list(sys.modules.values()):
        if getattr(module, "on_gpu", None) is on_gpu:
            monkeypatch.setattr(module, "on_gpu", lambda: True)


@pytest.fixture
def rows() -> list[TrainingSequence]:
    """A batch with zero to three latents and padding on both sides; (tokens, first latent, latents, labels from)."""
    rng = np.random.default_rng(0)
    shapes = [(20, 12, 3, 15), (9, 3, 1, 6), (24, 5, 0, 9), (16, 10, 2, 12)]
    return [TrainingSequence(rng.integers(0, 50, n).astype(np.int32), *facts) for n, *facts in shapes]


# The device and its precision


@pytest.mark.parametrize(("kind", "index", "expected"), [(mx.gpu, 0, True), (mx.gpu, 1, True), (mx.cpu, 0, False)])
def test_any_gpu_counts_as_one(kind, index, expected, monkeypatch):
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(kind, index))
    assert on_gpu() == expected


@pytest.mark.parametrize("wanted", ["cuda", "CPU", ""])
def test_an_unknown_device_is_one_clear_error(wanted):
    with pytest.raises(UserError, match=f"COCONUT_DEVICE: expected cpu or gpu, found '{wanted}'"):
        use_device(wanted)


def test_a_gpu_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.setattr(streams, "on_gpu", lambda: False)
    with pytest.raises(UserError, match="COCONUT_DEVICE: expected cpu, found 'gpu'"):
        use_device("gpu")


def test_the_cpu_of_a_machine_with_a_gpu(monkeypatch):
    chosen = []
    monkeypatch.setattr(mx, "set_default_device", chosen.append)
    use_device(None)
    use_device("cpu")
    assert chosen == [mx.cpu]


@pytest.mark.parametrize(
    ("keys", "variable", "expected"),
    [
        ({}, None, "float32"),
        ({"tf32": True}, None, "TF32"),
        ({}, "1", "TF32"),
        ({"tf32": True}, "0", "float32"),
        ({"bf16": True}, None, "bfloat16"),
    ],
)
def test_products_are_float32_unless_the_run_says_otherwise(
    keys, variable, expected, gpu_code, shared_tiny, call_main, monkeypatch, tmp_path
):
    """In the environment that MLX reads, in the run's first line, and in the checkpoint."""
    monkeypatch.setattr(os, "environ", {**os.environ})
    os.environ.pop("MLX_ENABLE_TF32", None)
    if variable:
        os.environ["MLX_ENABLE_TF32"] = variable
    outcome = call_main(shared_tiny.config(save_path=tmp_path, num_epochs=1, **keys))
    assert outcome.status == 0, outcome.err
    assert f"on GPU ({expected})" in outcome.out.splitlines()[0]
    metadata = json.loads((tmp_path / "tiny" / "checkpoint_1" / "coconut.json").read_text())
    assert metadata["precision"] == expected
    assert os.environ.get("MLX_ENABLE_TF32") == (variable or (None if "tf32" in keys else "0"))


def test_a_cuda_build_without_a_driver_is_one_sentence(tmp_path):
    """MLX's CUDA build cannot be imported there."""
    fault = "cudaMallocManaged(&data, size) failed: CUDA driver version is insufficient"
    (tmp_path / "mlx").mkdir()
    (tmp_path / "mlx" / "core.py").write_text(f"raise ImportError({fault!r})")
    (tmp_path / "mlx_cuda_13-0.32.4.dist-info").mkdir()
    (tmp_path / "mlx_cuda_13-0.32.4.dist-info" / "METADATA").write_text("Name: mlx-cuda-13\nVersion: 0.32.4\n")
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, str(ROOT / "run.py"), "--help"], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith(f"error: this CUDA build of MLX does not load here ({fault}). It needs an NVIDIA")
    assert "mlx[cpu]" in done.stderr and done.stderr.count("\n") == 1


# bfloat16: sums over many tokens are float32


def small_gpt2(**keys) -> GPT2:
    mx.random.seed(0)
    shape = {"vocab_size": 50, "n_positions": 64, "n_embd": 16, "n_layer": 2, "n_head": 2, "initializer_range": 0.4}
    return GPT2(GPT2Config(**shape | keys))


def bfloat16_gradient(model: GPT2, loss) -> dict[str, mx.array]:
    """The gradient of a loss of a model that computes in bfloat16, by parameter."""
    wrapped = Coconut(model)

    def computed() -> mx.array:
        with computing_in(wrapped, mx.bfloat16):
            return loss(model)

    gradient = nn.value_and_grad(wrapped, computed)()[1]
    return {name.removeprefix("transformer."): array for name, array in tree_flatten(gradient)}


N_ROWS = 6001  # a bfloat16 sum of ones ends at 256


@pytest.mark.parametrize(
    ("name", "loss"),
    [
        ("h.0.attn.c_proj.bias", lambda model: model.h[0].attn.c_proj(mx.ones((N_ROWS, 16))).sum()),
        ("h.0.ln_1.bias", lambda model: model.h[0].ln_1(mx.ones((N_ROWS, 16))).sum()),
        ("wte.weight", lambda model: model.embed(mx.ones((N_ROWS,), dtype=mx.int32)).sum()),
    ],
)
def test_gradients_of_biases_norms_and_embeddings_are_float32_sums(name, loss):
    found = bfloat16_gradient(small_gpt2(), loss)[name]
    assert found.dtype == mx.float32 and found.max().item() == N_ROWS


def test_products_are_bfloat16_and_what_is_added_up_is_float32():
    model = Coconut(small_gpt2(n_layer=1)).eval()
    with computing_in(model, mx.bfloat16):
        narrow = {name for name, array in tree_flatten(model.parameters()) if array.dtype == mx.bfloat16}
        hidden = model.transformer(model.transformer.embed(mx.array([[1, 2]])), plain_cache(model, 1, 2))
        assert hidden.dtype == model.transformer.logits(hidden).dtype == mx.float32
        assert model.transformer.h[0].mlp.c_fc(hidden).dtype == mx.bfloat16
    parts = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    assert narrow == {f"transformer.h.0.{part}.weight" for part in parts}


def plain_cache(model: Coconut, n_rows: int, n_columns: int) -> list:
    """An empty cache for rows without padding."""
    return model.transformer.make_cache(mx.ones((n_rows, n_columns), dtype=mx.bool_), mx.zeros(n_rows, dtype=mx.int32))


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_gelu_is_computed_in_float32(dtype, gpu_code):
    """The numbers of the CPU's GELU, rounded once."""
    x = mx.arange(-6, 6, 0.01).astype(dtype)
    for function in (ops.gelu_new, lambda x: mx.grad(lambda x: ops.gelu_new(x).astype(mx.float32).sum())(x)):
        reference = mx.grad(lambda x: ops._gelu_and_gate(x)[0].sum()) if function is not ops.gelu_new else None
        expected = reference(x.astype(mx.float32)) if reference else ops._gelu_and_gate(x.astype(mx.float32))[0]
        atol = 1e-6 if dtype == mx.float32 else 0
        found = function(x)
        assert found.dtype == dtype
        assert mx.allclose(found, expected.astype(dtype), atol=atol, rtol=1e-5 if atol else 2**-8).item()


# Masks


def test_every_column_of_a_pass_may_attend_to_something(rows):
    batch = collate(rows, pad_id=0)
    assert batch.left_padding.max() > 0  # and there is padding on both sides
    cache = make_cache(1, mx.array(batch.attention_mask), mx.array(batch.left_padding))[0]
    mask = np.array(cache.make_mask(batch.attention_mask.shape[1]))
    assert mask.any(axis=-1).all()
    padding_seen = mask[:, 0] & ~batch.attention_mask[:, None]  # [B, T, S]
    assert (padding_seen == np.eye(padding_seen.shape[1], dtype=bool) * ~batch.attention_mask[:, None]).all()


def test_minus_infinity_in_masks_gives_no_nan(rows, monkeypatch):
    """What MLX's attention does on CUDA with a mask of booleans, in float32 and bfloat16."""

    def fused(q, k, v, scale, mask):
        scores = (q * scale) @ k.swapaxes(-1, -2) + mx.where(mask, 0, -mx.inf)
        return mx.softmax(scores, axis=-1).astype(v.dtype) @ v

    monkeypatch.setattr(mx.fast, "scaled_dot_product_attention", fused)
    monkeypatch.setattr(ops, "on_gpu", lambda: True)
    model = Coconut(small_gpt2()).eval()
    expected = model(collate(rows, pad_id=0).to_mlx())
    assert mx.isfinite(expected).item()
    with computing_in(model, mx.bfloat16):
        assert model(collate(rows, pad_id=0).to_mlx()).item() == pytest.approx(expected.item(), rel=0.02)


# The same step


def test_a_gpus_step_equals_the_cpus(rows, monkeypatch):
    """Loss and gradient of a mixed batch, with the dropout whose masks both draw alike: all but attention's."""
    found = []
    for answer in (False, True):
        monkeypatch.setattr(ops, "on_gpu", lambda answer=answer: answer)
        model, batch = Coconut(small_gpt2(attn_pdrop=0.0)).train(), collate(rows, pad_id=0).to_mlx()
        mx.random.seed(3)
        loss, gradient = nn.value_and_grad(model, lambda batch, model=model: model(batch))(batch)
        found.append((loss.item(), dict(tree_flatten(gradient))))
    (loss, gradient), (other_loss, other_gradient) = found
    assert other_loss == pytest.approx(loss, rel=1e-6)
    for name, expected in gradient.items():
        assert mx.allclose(other_gradient[name], expected, atol=1e-5, rtol=1e-4).item(), name


def test_a_gpus_attention_equals_the_cpus(monkeypatch):
    """With dropout. A CPU draws a mask for each block of queries, here one, from a key of its own."""
    mx.random.seed(1)
    q, k, v = mx.random.normal((3, 2, 2, 20, 8))
    mask, key = mx.tril(mx.ones((1, 1, 20, 20))).astype(mx.bool_), mx.random.key(2)
    found = []
    for answer, own_key in ((False, key), (True, mx.random.split(key, 1)[0])):
        monkeypatch.setattr(ops, "on_gpu", lambda answer=answer: answer)

        def total(q, k, v, own_key=own_key):
            return (ops.attention(q, k, v, mask, ops.Dropout(0.3), own_key) * mx.arange(8)).sum()

        found.append(mx.value_and_grad(total, argnums=(0, 1, 2))(q, k, v))
    for expected, other in zip(*(tree_flatten(result) for result in found), strict=True):
        assert mx.allclose(other[1], expected[1], atol=1e-4, rtol=1e-5).item()
