"""What runs on GPUs alone, on the device there is: on a CPU the same code with `on_gpu` saying yes."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from conftest import ROOT
from mlx.utils import tree_flatten

import dataset
from coconut import Coconut
from config import Config
from dataset import TrainingSequence, alike_micro_batches, collate, micro_batch
from models import ops
from models.cache import BufferedCache, TrainingCache, make_cache
from models.gpt2 import GPT2, GPT2Config
from models.lora import Lora, LoraModel
from models.mlx_lm import LanguageConfig, LanguageModel, build
from models.precision import computing_in, training_in
from parallel import streams
from parallel.distributed import ALONE
from parallel.streams import on_gpu, use_device
from startup import settings
from training import memory
from training.step import TrainStep, compiled, new_optimizer
from utils import UserError

SET_CACHE_LIMIT = mx.set_cache_limit  # MLX's own; it returns the limit before
needs_mlx_lm = pytest.mark.skipif(
    importlib.util.find_spec("mlx_lm") is None, reason="requirements-llm.txt is not installed"
)


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
        with training_in(wrapped, mx.bfloat16):
            return loss(model)

    gradient = nn.value_and_grad(wrapped, computed)()[1]
    return {name.removeprefix("transformer."): array for name, array in tree_flatten(gradient)}


N_ROWS = 6003  # a bfloat16 sum of ones ends at 256


@pytest.mark.parametrize(
    ("name", "loss"),
    [
        ("h.0.attn.c_proj.bias", lambda model: model.h[0].attn.c_proj(mx.ones((3, N_ROWS // 3, 16))).sum()),
        ("ln_f.bias", lambda model: model.ln_f(mx.ones((3, N_ROWS // 3, 16))).sum()),
        ("wte.weight", lambda model: model.embed(mx.ones((N_ROWS,), dtype=mx.int32)).sum()),
    ],
)
def test_gradients_of_biases_norms_and_embeddings_are_float32_sums(name, loss):
    found = bfloat16_gradient(small_gpt2(), loss)[name]
    assert found.dtype == mx.float32 and found.max().item() == N_ROWS


def test_gradients_of_norms_in_the_products_behind_them_are_float32_sums():
    """A norm of equal numbers is its bias, times a row sum of the matrix for each token."""
    model = small_gpt2()
    block, x = model.h[0], mx.ones((3, N_ROWS // 3, 16))
    found = bfloat16_gradient(model, lambda model: block.attn.c_attn(block.ln_1(x)).sum())
    expected = N_ROWS * block.attn.c_attn.weight.sum(axis=1)
    assert found["h.0.ln_1.bias"].dtype == mx.float32
    assert mx.allclose(found["h.0.ln_1.bias"], expected, rtol=1e-5).item()


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


@pytest.mark.parametrize("rate", [0.0, 0.3])
@pytest.mark.parametrize("bounds", [(20,), (12, 20), (12, 13, 14, 20), (1, 2, 20)])
def test_a_gpus_attention_equals_the_definition(bounds, rate, gpu_code):
    """Output and gradients of passes that end at `bounds`, beside MLX's own gradient of one pass over all columns."""
    mx.random.seed(1)
    q, k, v = mx.random.normal((3, 2, 2, 20, 8))  # [B, H, T, Dh] each
    visible = mx.tril(mx.ones((2, 1, 20, 20))).astype(mx.bool_)
    kept = mx.random.uniform(shape=(2, 2, 20, 20)) >= rate

    def in_passes(q, k, v):
        [cache] = make_cache(1, mx.ones((2, 20), dtype=mx.bool_), mx.zeros(2, dtype=mx.int32), TrainingCache)
        out, start = [], 0
        for end in bounds:
            new = [x[:, :, start:end] for x in (q, k, v)]
            mask = cache.make_mask(end - start)
            keep = kept[:, :, start:end, : mask.shape[-1]]
            out.append(ops.attention_in_training(new[0], (new[1], new[2]), cache, mask, ops.Dropout(rate), keep))
            start = end
        return (mx.concatenate(out, axis=2) * mx.arange(8)).sum()

    def at_once(q, k, v):
        scores = mx.where(visible, q @ k.swapaxes(-1, -2) * 8**-0.5, -1e9)
        weights = mx.where(kept, mx.softmax(scores, axis=-1) / (1 - rate), 0)
        return (weights @ v * mx.arange(8)).sum()

    found, expected = (mx.value_and_grad(function, argnums=(0, 1, 2))(q, k, v) for function in (in_passes, at_once))
    for (_, one), (_, other) in zip(tree_flatten(found), tree_flatten(expected), strict=True):
        assert mx.allclose(one, other, atol=1e-4, rtol=1e-5).item()


def test_what_a_column_adds_to_bfloat16_gradients_is_rounded_once():
    mx.random.seed(4)
    parts = total, weights, rows = [mx.random.normal((1, 2, *end)) for end in ((9, 8), (1, 9), (1, 8))]
    narrow = [part.astype(mx.bfloat16) for part in parts]
    total, weights, rows = [part.astype(mx.float32) for part in narrow]
    expected = (total + weights.swapaxes(-1, -2) * rows).astype(mx.bfloat16)
    assert mx.array_equal(ops._plus_product(*narrow), expected).item()


def test_the_first_pass_sees_its_own_columns_and_later_ones_have_one_width():
    """So the first pass computes no score of a column to come, and no shape depends on the number of the pass."""
    [cache] = make_cache(1, mx.ones((2, 9), dtype=mx.bool_), mx.zeros(2, dtype=mx.int32), TrainingCache)
    fresh, widths = [mx.ones((2, 1, n, 4)) for n in (5, 1, 3)], []
    for part in fresh:
        widths.append(cache.make_mask(part.shape[2]).shape[-1])
        cache.write((part, part))
        cache.advance(cache.state, part.shape[2])
    assert widths == [5, 9, 9] and [buffer.shape[2] for buffer in cache.buffers] == [9, 9]


def calm_optimizer(model: Coconut, config: Config):
    """The run's, with an eps that is large beside rounding: with 1e-8, AdamW makes whole steps of noise."""
    optimizer = new_optimizer(model, config)
    optimizer.eps = 1e-3
    return optimizer


def train(
    rows: list[list[TrainingSequence]], steps: int, grad_checkpoint: bool = False, n_rows: int = 2
) -> tuple[list[float], dict[str, np.ndarray]]:
    """Losses and weights of some steps on these micro-batches; a new optimizer before the last one."""
    mx.random.seed(0)
    rates = dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), 0.0)
    model = Coconut(small_gpt2(**rates))
    model.transformer.grad_checkpoint = grad_checkpoint
    config = Config(save_path="", name="", val_path="", gradient_accumulation_steps=len(rows), max_grad_norm=1.0)
    take_step, losses = TrainStep(model, calm_optimizer(model, config), config), []
    for number in range(steps):
        if number == steps - 1:
            take_step.optimizer = calm_optimizer(model, config)
        if streams.on_gpu():
            micro_batches = alike_micro_batches(rows, ALONE, 0, n_rows)
        else:
            micro_batches = [micro_batch(part, ALONE, 0) for part in rows]
        losses.append(take_step(micro_batches, 0, number, 1e-2).loss)
    return losses, {name: np.array(array) for name, array in tree_flatten(model.parameters())}


@pytest.mark.parametrize(("grad_checkpoint", "n_rows"), [(False, 3), (True, 3), (False, 1), (False, 64)])
def test_steps_with_sorted_rows_equal_the_cpus(grad_checkpoint, n_rows, rows, request):
    """Micro-batches of unlike sizes cut into more, as many and one, a clipped gradient, an optimizer that changes."""
    micro_batches = [rows[:3], rows[3:] + rows[:1] * 2, rows[1:2]]
    losses, weights = train(micro_batches, 4)
    request.getfixturevalue("gpu_code")
    other_losses, other_weights = train(micro_batches, 4, grad_checkpoint, n_rows)
    np.testing.assert_allclose(other_losses, losses, rtol=1e-5)
    compare_weights(other_weights, weights)


def test_alike_rows_are_together_and_keep_their_weights(gpu_code):
    """The sum of weights of every label is that of its own micro-batch; long rows come last."""
    rng = np.random.default_rng(0)
    lengths = [[9, 40, 12], [33, 70], [8]]
    step = [
        [TrainingSequence(rng.integers(0, 50, n).astype(np.int32), n - 4, 2, n - n // 4) for n in part]
        for part in lengths
    ]
    chunks = [chunk for [chunk] in alike_micro_batches(step, ALONE, 0, n_rows=2)]
    assert [sorted(c.batch.attention_mask.sum(axis=1).tolist()) for c in chunks] == [[8, 9], [12, 33], [40, 70]]
    found = {}
    for chunk in chunks:
        assert chunk.loss_weight == pytest.approx(chunk.batch.label_mask.sum(), rel=1e-6)
        for position, weight in zip(chunk.batch.label_positions, chunk.batch.label_mask, strict=True):
            row = int(position) // chunk.batch.input_ids.shape[1]
            n = int(chunk.batch.attention_mask[row].sum())
            found[n] = found.get(n, 0.0) + float(weight)
    for part in lengths:
        total = sum(n // 4 for n in part)
        assert [found[n] for n in part] == pytest.approx([n // 4 / total for n in part], rel=1e-6)


def test_a_rank_without_rows_takes_a_step_that_counts_nothing(rows, gpu_code):
    step = [rows[:1], rows[1:2], rows[2:3]]
    for rank in (0, 1):
        group = SimpleNamespace(shard=lambda items, rank=rank: items[rank::2])
        chunks = [chunk for [chunk] in alike_micro_batches(step, group, 0, n_rows=2)]
        assert len(chunks) == (2 if rank == 0 else 1)
        assert sum(c.loss_weight for c in chunks) == pytest.approx(3.0 if rank == 0 else 0.0)


def test_shapes_repeat_on_a_gpu(rows, gpu_code):
    batch = collate(rows, pad_id=0)
    assert batch.input_ids.shape[1] % 32 == batch.first_latent % 32 == len(batch.labels) % 512 == 0


def test_dropout_of_one_column_draws_all_masks_at_once(gpu_code):
    """At the rates asked for, other masks in every layer, and other ones at the next call of a compiled function."""
    model = small_gpt2(n_embd=64, embd_pdrop=0.0, attn_pdrop=0.25, resid_pdrop=0.5)
    keys = model._masks_at_once(ops.random_keys(2), (40, 1, 1, 30))
    assert [mask.shape for mask in keys] == [(40, 2, 1, 30), (40, 1, 64), (40, 1, 64)] * 2
    for mask, rate in zip(keys, [0.25, 0.5, 0.5] * 2, strict=True):
        assert 1 - mask.mean().item() == pytest.approx(rate, abs=0.04)
    assert not any(mx.array_equal(keys[i], keys[j]).item() for i, j in [(0, 3), (1, 2), (1, 4)])


needs_compiler = pytest.mark.skipif(not (on_gpu() or shutil.which("g++")), reason="MLX compiles with g++ on a CPU")
# MLX's header takes a compiler four times as long as one of fifty kernels. A compiler that cannot use a parsed one, as
# clang under this name, finds the copy beside it.
COMPILER = """#!/bin/sh
[ -e {header}.gch ] || {own} -std=c++17 -O3 -Wall -fPIC -w -I {include} -x c++-header {header} -o {header}.gch
exec {own} -I {folder} "$@"
"""


@pytest.fixture(scope="module")
def quick_compiler(tmp_path_factory):
    """MLX's compiler parses its header once."""
    folder, own, name = tmp_path_factory.mktemp("compiler"), shutil.which("g++"), "mlx/backend/cpu/compiled_preamble.h"
    include, header = Path(mx.__file__).parent / "include", folder / name
    if not own or not (include / name).is_file():
        yield
        return
    header.parent.mkdir(parents=True)
    shutil.copy(include / name, header)
    (folder / "g++").write_text(COMPILER.format(header=header, own=own, include=include, folder=folder))
    (folder / "g++").chmod(0o755)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", str(folder), prepend=os.pathsep)
        yield


@needs_compiler
def test_compiled_steps_equal_those_that_are_not(rows, gpu_code, quick_compiler):
    """With a new optimizer before the last one, and two shapes."""
    micro_batches = [rows[:3], rows[1:] + rows[:1] * 2]
    losses, weights = train(micro_batches, 3)
    mx.enable_compile()
    other_losses, other_weights = train(micro_batches, 3)
    np.testing.assert_allclose(other_losses, losses, rtol=1e-5)
    compare_weights(other_weights, weights)


def compare_weights(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    """Equal within 2e-4, but for the keys' biases: a softmax does not change with them, so Adam follows noise."""
    for name, value in expected.items():
        counted = np.r_[:16, 32:48] if name.endswith("c_attn.bias") else slice(None)
        np.testing.assert_allclose(found[name][counted], value[counted], atol=2e-4, err_msg=name)


@needs_compiler
def test_a_compiled_step_drops_something_else_each_time(rows, gpu_code, quick_compiler):
    """And what the same function drops when it is not compiled."""
    mx.enable_compile()
    model, batch = Coconut(small_gpt2()).train(), collate(rows, pad_id=0).to_mlx()
    function = nn.value_and_grad(model, lambda batch, weight: model(batch) * weight)
    losses = []
    for one in (compiled(model, function), function):
        mx.random.seed(5)
        losses.append([one(batch, 1.0)[0].item() for _ in range(3)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5) and len(set(losses[0])) == 3


# Memory


@pytest.fixture
def small_gpu(gpu_code, monkeypatch):
    """A GPU of 20 MB; returns the limits that were set."""
    limits = {}
    monkeypatch.setattr(mx, "device_info", lambda: {"total_memory": 20_000_000})
    monkeypatch.setattr(mx, "set_cache_limit", lambda size: limits.update(cache=size))
    monkeypatch.setattr(mx, "set_memory_limit", lambda size: limits.update(memory=size))
    monkeypatch.setattr(mx, "set_wired_limit", lambda size: limits.update(wired=size))
    return limits


def test_freed_buffers_take_a_part_of_a_gpu(small_gpu, monkeypatch):
    monkeypatch.setattr(sys, "platform", "linux")
    memory.limit_memory()
    assert small_gpu == {"cache": 6_000_000, "memory": 16_000_000}
    small_gpu.clear()
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(mx, "device_info", lambda: {"max_recommended_working_set_size": 12_000, "memory_size": 16_000})
    memory.limit_memory()
    assert small_gpu == {"cache": 6_000, "wired": 12_000}


def test_a_gpu_that_is_believed_in_sets_no_limit(gpu_code):
    """It would outlast its test, and slow down all that follow in this process."""
    before = SET_CACHE_LIMIT(1 << 40)
    memory.limit_memory()
    assert SET_CACHE_LIMIT(before) == 1 << 40


def test_no_limit_on_a_cpu(small_gpu, monkeypatch):
    monkeypatch.setattr(memory, "on_gpu", lambda: False)
    memory.limit_memory()
    assert small_gpu == {}


def test_micro_batches_are_as_large_as_memory_allows(small_gpu, shared_tiny, call_main, monkeypatch, tmp_path):
    """The tiny model takes about 0.6 MB an item."""
    rows, collated = [], dataset._weighted_chunk
    monkeypatch.setattr(dataset, "_weighted_chunk", lambda part, pad: rows.append(len(part)) or collated(part, pad))
    monkeypatch.setattr(mx, "device_info", lambda: {"total_memory": 6_000_000})
    keys = {"num_epochs": 1, "batch_size_training": 16, "gradient_accumulation_steps": 2, "save_path": tmp_path}
    outcome = call_main(shared_tiny.config(**keys))
    assert outcome.status == 0, outcome.err
    [n] = map(int, re.findall(r"memory: about .* of 6 MB, for micro-batches of (\d+) of the longest", outcome.out))
    assert 4 <= n < 8 and rows[1:] == [4, 4]  # before them the one that is shown in first_batch.txt
    monkeypatch.setattr(mx, "device_info", lambda: {"total_memory": 80_000_000_000})
    outcome = call_main(shared_tiny.config(**keys | {"name": "more"}))
    assert "for micro-batches of 32 of the longest" in outcome.out  # both of a step in one


@pytest.mark.parametrize(("size", "accumulated", "expected"), [(32, 4, 64), (16, 1, 16), (96, 1, 96), (8, 2, 16)])
def test_small_micro_batches_are_joined_on_a_large_gpu(size, accumulated, expected, monkeypatch):
    monkeypatch.setattr(mx, "device_info", lambda: {"total_memory": 150_000_000_000})
    keys = {"batch_size_training": size, "gradient_accumulation_steps": accumulated}
    curriculum = SimpleNamespace(longest=lambda data: np.array([400, 500]), thoughts_per_step=2)
    data = SimpleNamespace(question_lengths=np.array([390, 490]))
    config = Config(save_path="", name="", val_path="", **keys)
    assert memory.rows_at_once(GPT2(GPT2Config(vocab_size=50_260)), config, data, curriculum) == expected


def test_a_gpu_that_is_too_small_for_one_item(small_gpu, shared_tiny, call_main, monkeypatch, tmp_path):
    monkeypatch.setattr(mx, "device_info", lambda: {"total_memory": 1000})
    outcome = call_main(shared_tiny.config(save_path=tmp_path, num_epochs=1))
    assert "one item may not fit into this GPU's memory; try grad_checkpoint: True" in outcome.err


@pytest.mark.parametrize(
    ("keys", "items", "columns", "labels", "counted"),  # GPT-2 124M; GB, the least of four steps
    [
        ({}, 4, 416, 512, 4.3),
        ({}, 32, 416, 2048, 16.7),
        ({}, 64, 416, 4096, 30.8),
        ({}, 32, 736, 2048, 35.0),
        ({}, 128, 128, 7680, 21.2),
        ({"bf16": True}, 32, 416, 2048, 13.8),
        ({"bf16": True}, 32, 736, 2048, 29.7),
        ({"bf16": True}, 128, 128, 7680, 15.4),
        ({"grad_checkpoint": True}, 8, 416, 512, 4.3),
        ({"grad_checkpoint": True}, 32, 416, 2048, 10.2),
        ({"grad_checkpoint": True}, 64, 416, 4096, 18.7),
        ({"grad_checkpoint": True}, 32, 736, 2048, 22.7),
        ({"grad_checkpoint": True}, 128, 128, 7680, 13.2),
    ],
)
def test_the_estimate_is_near_what_was_counted(keys, items, columns, labels, counted):
    config = Config(save_path="", name="", val_path="", **keys)
    found = memory.step_size(GPT2(GPT2Config(vocab_size=50_260)), config, items, columns, labels, 6)
    assert found.expected / 1e9 == pytest.approx(counted, rel=0.2)


LLAMA = {"model_type": "llama", "rms_norm_eps": 1e-5, "max_position_embeddings": 2048, "tie_word_embeddings": True}
SMOLLM2 = {
    "hidden_size": 576, "num_hidden_layers": 30, "intermediate_size": 1536, "num_attention_heads": 9,
    "num_key_value_heads": 3, "vocab_size": 49_152,
}  # fmt: skip
LLAMA_1B = {
    "hidden_size": 2048, "num_hidden_layers": 16, "intermediate_size": 8192, "num_attention_heads": 32,
    "num_key_value_heads": 8, "vocab_size": 128_256,
}  # fmt: skip
LLAMA_3B = {
    "hidden_size": 3072, "num_hidden_layers": 28, "intermediate_size": 8192, "num_attention_heads": 24,
    "num_key_value_heads": 8, "vocab_size": 128_256,
}  # fmt: skip
MANY_WORDS = {
    "hidden_size": 256, "num_hidden_layers": 4, "intermediate_size": 512, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "vocab_size": 128_256,
}  # fmt: skip


def language_model(sizes: dict, **keys) -> LanguageModel:
    """A model of these sizes, whose random weights are never computed; lora_rank: adapters, quantize: 4 bits."""
    config = LanguageConfig.from_dict(LLAMA | sizes)
    lm = build(config.values)
    if keys.get("quantize"):
        nn.quantize(lm, group_size=64, bits=4)
    if not keys.get("lora_rank"):
        return LanguageModel(lm, config)
    return LoraModel(lm, config, Lora(16, 32.0), (config.vocab_size - 3, 0))


@needs_mlx_lm
@pytest.mark.parametrize(
    ("sizes", "keys", "items", "columns", "labels", "counted"),  # 6 thoughts; GB, the least of ten steps
    [
        (SMOLLM2, {}, 1, 448, 512, 3.6),
        (SMOLLM2, {}, 8, 448, 512, 9.9),
        (SMOLLM2, {}, 32, 448, 2048, 33.0),
        (SMOLLM2, {}, 8, 736, 512, 16.6),
        (SMOLLM2, {}, 32, 128, 1024, 9.7),
        (SMOLLM2, {"bf16": True}, 8, 448, 512, 6.9),
        (SMOLLM2, {"bf16": True}, 32, 448, 2048, 20.0),
        (SMOLLM2, {"grad_checkpoint": True}, 8, 448, 512, 4.7),
        (SMOLLM2, {"grad_checkpoint": True}, 32, 448, 2048, 12.0),
        (SMOLLM2, {"lora_rank": 16}, 8, 448, 512, 8.5),
        (SMOLLM2, {"lora_rank": 16, "quantize": 4, "bf16": True}, 32, 448, 2048, 17.0),
        (LLAMA_1B, {}, 1, 448, 512, 29.5),
        (LLAMA_1B, {"bf16": True}, 8, 448, 512, 32.3),
        (LLAMA_1B, {}, 32, 448, 2048, 92.5),
        (LLAMA_1B, {"bf16": True}, 32, 448, 2048, 61.9),
        (LLAMA_1B, {"grad_checkpoint": True}, 32, 448, 2048, 53.0),
        (LLAMA_1B, {"lora_rank": 16, "bf16": True}, 8, 448, 512, 17.2),
        (LLAMA_1B, {"lora_rank": 16, "quantize": 4, "bf16": True}, 8, 448, 512, 10.9),
        (LLAMA_3B, {"lora_rank": 16, "bf16": True}, 8, 448, 512, 37.6),
        (MANY_WORDS, {"bf16": True}, 64, 352, 4096, 11.7),
    ],
)
def test_the_estimate_of_a_language_model_is_near_what_was_counted(
    sizes, keys, items, columns, labels, counted, gpu_code
):
    config = Config(save_path="", name="", val_path="", **keys)
    found = memory.step_size(language_model(sizes, **keys), config, items, columns, labels, 6)
    assert 0.95 < found.expected / 1e9 / counted < 1.3
    assert found.expected < found.most


def test_cuda_graphs_do_not_depend_on_shapes(monkeypatch):
    monkeypatch.setattr(os, "environ", {"MLX_MAX_OPS_PER_BUFFER": "7"})
    monkeypatch.setattr(sys, "platform", "darwin")
    settings.long_graphs()
    assert os.environ == {"MLX_MAX_OPS_PER_BUFFER": "7"}
    monkeypatch.setattr(sys, "platform", "linux")
    settings.long_graphs()
    assert os.environ == {"MLX_MAX_OPS_PER_BUFFER": "7", "MLX_MAX_MB_PER_BUFFER": "1000000"}


def test_kernels_are_kept_in_the_users_cache_and_their_making_is_announced(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(os, "environ", {"XDG_CACHE_HOME": str(tmp_path)})
    monkeypatch.setattr(sys, "platform", "darwin")
    settings.own_kernels()
    memory.say_kernels()
    assert "MLX_PTX_CACHE_DIR" not in os.environ and capsys.readouterr().out == ""
    monkeypatch.setattr(sys, "platform", "linux")
    settings.own_kernels()
    folder = tmp_path / "coconut-mlx" / "kernels"
    assert os.environ["MLX_PTX_CACHE_DIR"] == str(folder)
    memory.say_kernels()
    assert f"2 to 3 minutes; kept in {folder}" in capsys.readouterr().out
    folder.mkdir(parents=True)
    (folder / "a.ptx").touch()
    memory.say_kernels()
    assert capsys.readouterr().out == ""
    os.environ["MLX_PTX_CACHE_DIR"] = "/own"
    settings.own_kernels()
    assert os.environ["MLX_PTX_CACHE_DIR"] == "/own"


# Decoding


def test_decoding_from_buffers_equals_decoding_from_copies(rows, request, monkeypatch):
    """Past the room of a buffer, with rows that end early and are dropped."""
    model = Coconut(small_gpt2(n_positions=120)).eval()
    prompts = collate([row._replace(ids=row.ids[: row.n_unlabeled]) for row in rows], pad_id=0, multiple=8).to_mlx()
    endless = model.generate(prompts, 90, eos_id=-1)
    eos_id = next(token for token in endless[0] if any(token not in ids for ids in endless))
    expected = model.generate(prompts, 90, eos_id)
    assert len({len(ids) for ids in expected}) > 1 and max(map(len, expected)) == 90
    request.getfixturevalue("gpu_code")
    monkeypatch.setattr(BufferedCache, "ROOM", 10)
    assert model.generate(prompts, 90, eos_id) == expected
    assert model.think(prompts)[1][0].state[0].shape[2] > prompts.input_ids.shape[1]
