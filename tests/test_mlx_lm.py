"""Coconut over mlx-lm's models: our definitions on tiny random models, what is refused, transformers as an oracle."""

import json
import subprocess
import sys

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from launched import ROOT
from mlx.utils import tree_flatten, tree_map

from coconut import Batch, Coconut
from dataset import TrainingSequence, collate
from models import ops
from models.mlx_lm import TESTED, LanguageConfig, LanguageModel, build, self_check
from models.precision import computing_in
from models.rope import check_rope, flat_rope
from utils import UserError

pytest.importorskip("mlx_lm", reason="requirements-llm.txt is not installed")
EOS, LATENT = 1, 2
TINY = {
    "vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 48, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "rms_norm_eps": 1e-5, "max_position_embeddings": 128,
    "rope_theta": 10000.0, "tie_word_embeddings": True, "bos_token_id": 0, "eos_token_id": EOS, "pad_token_id": EOS,
}  # fmt: skip
LLAMA3 = {
    "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32,
    "rope_type": "llama3",
}  # fmt: skip
SLIDING = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 4}
MODELS = {
    "llama": {"tie_word_embeddings": False, "rope_scaling": LLAMA3, "rope_theta": 500000.0},
    "mistral": {"tie_word_embeddings": False, "sliding_window": None},
    "qwen2": {"use_sliding_window": False},
    "qwen3": {},
    "gemma2": {
        "query_pre_attn_scalar": 8, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0,
        "hidden_activation": "gelu_pytorch_tanh", "sliding_window": 4096,
    },
    "phi3": {"rope_scaling": None, "tie_word_embeddings": False, "original_max_position_embeddings": 128},
    "smollm3": {"no_rope_layers": [1, 0], "no_rope_layer_interval": 2},
    "olmo2": {"tie_word_embeddings": False},
}  # fmt: skip
GEMMA = {"hidden_activation": "gelu_pytorch_tanh", "hidden_act": "gelu_pytorch_tanh"}
WINDOWED = {
    "llama": MODELS["llama"] | SLIDING,
    "gemma3_text": {
        "sliding_window": 4, "sliding_window_pattern": 2, "query_pre_attn_scalar": 8, "rope_local_base_freq": 10000.0,
        "rope_theta": 1000000.0,
    },
    "cohere2": {"layer_norm_eps": 1e-5, "sliding_window": 4, "sliding_window_pattern": 2, "logit_scale": 0.25},
}  # fmt: skip
CASES = [*MODELS.items(), *WINDOWED.items(), ("gemma", GEMMA)]
IDS = [*MODELS, *(f"{name}-window" for name in WINDOWED), "gemma"]


def tiny(kind: str, keys: dict) -> LanguageModel:
    """A random model whose norms and biases matter."""
    mx.random.seed(7)
    config = LanguageConfig.from_dict(TINY | {"model_type": kind} | keys)
    lm = build(config.values)
    noisy = [(n, p + 0.3 * mx.random.normal(p.shape)) for n, p in tree_flatten(lm.parameters()) if p.ndim == 1]
    lm.load_weights(noisy, strict=False)
    model = LanguageModel(lm, config)
    mx.eval(model.parameters())
    return model


@pytest.fixture(scope="module", params=CASES, ids=IDS)
def model(request):
    return tiny(*request.param)


def rows() -> list[TrainingSequence]:
    """Questions of several lengths with 3, 1, 2 and 0 thoughts; the last six ids are labeled."""
    rng = np.random.default_rng(3)
    result = []
    for length, n_latents in ((9, 3), (5, 1), (12, 2), (7, 0)):
        question = rng.integers(3, 40, length)
        ids = np.concatenate([question, [LATENT] * n_latents, rng.integers(3, 40, 6)]).astype(np.int32)
        result.append(TrainingSequence(ids, length, n_latents, length + n_latents))
    return result


def plain_states(model: LanguageModel, embeddings: mx.array) -> mx.array:
    """Hidden states of one row by mlx-lm's own pass without any cache: [1, T, D]."""
    return model._run(model.lm.model, embeddings[...], cache=None)


def naive_embeddings(model: LanguageModel, row: TrainingSequence) -> mx.array:
    """The row's inputs, thoughts filled in one after the other, each from a pass over all that stands before it."""
    inputs = model.embed(mx.array(row.ids)[None])
    for place in range(row.latent_start, row.latent_start + row.n_latents):
        thought = plain_states(model, inputs[:, :place])[:, -1:]
        inputs = mx.concatenate([inputs[:, :place], thought, inputs[:, place + 1 :]], axis=1)
    return inputs


def naive_loss(model: LanguageModel, sequences: list[TrainingSequence]) -> mx.array:
    losses = []
    for row in sequences:
        states = plain_states(model, naive_embeddings(model, row))
        logits = model.logits(states)[0, row.n_unlabeled - 1 : -1]
        losses.append(nn.losses.cross_entropy(logits, mx.array(row.ids[row.n_unlabeled :])))
    return mx.concatenate(losses).mean()


def naive_answer(model: LanguageModel, row: TrainingSequence, n: int) -> list[int]:
    inputs, ids = naive_embeddings(model, row), []
    for _ in range(n):
        token = mx.argmax(model.logits(plain_states(model, inputs)[:, -1:])[0, 0]).item()
        if token == EOS:
            break
        ids.append(token)
        inputs = mx.concatenate([inputs, model.embed(mx.array([[token]]))], axis=1)
    return ids


def test_the_loop_is_its_definition(model):
    """Loss and every gradient of a mixed batch, against one row at a time, from scratch, without a cache."""
    batch = collate(rows(), EOS).to_mlx()
    coconut = Coconut(model)
    loss, gradient = nn.value_and_grad(coconut, lambda b: coconut(b))(batch)
    expected, plain = nn.value_and_grad(model, lambda r: naive_loss(model, r))(rows())
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    plain = dict(tree_flatten(plain))
    for name, found in tree_flatten(gradient["transformer"]):
        difference = mx.abs(found - plain[name]).max().item()
        assert difference <= 1e-4 * (mx.abs(plain[name]).max().item() + 1e-3), name


def test_decoding_is_its_definition(model):
    """Batched and cached, against one row at a time without a cache."""
    prompts = [row._replace(ids=row.ids[: row.n_unlabeled]) for row in rows()]
    found = Coconut(model).eval().generate(collate(prompts, EOS).to_mlx(), 8, EOS)
    assert found == [naive_answer(model, row, 8) for row in prompts]
    assert any(found)


def test_checks_pass_and_recomputing_changes_nothing(model):
    self_check(model, "tiny")
    batch = collate(rows(), EOS).to_mlx()
    coconut = Coconut(model).train()
    before = dict(tree_flatten(nn.value_and_grad(coconut, lambda b: coconut(b))(batch)[1]))
    other = tiny(model.config.model_type, {k: v for k, v in model.config.values.items() if k != "model_type"})
    other.grad_checkpoint = True
    coconut = Coconut(other).train()
    after = nn.value_and_grad(coconut, lambda b: coconut(b))(batch)[1]
    for name, found in tree_flatten(after):
        assert mx.allclose(found, before[name], rtol=1e-5, atol=1e-7).item(), name


@pytest.mark.parametrize("kind", TESTED)
def test_a_saved_model_opens_in_transformers(kind, tmp_path):
    """transformers computes the same logits from the files that a checkpoint would hold."""
    torch = pytest.importorskip("torch", reason="requirements-oracle.txt is not installed")
    transformers = pytest.importorskip("transformers")
    model = tiny(kind, MODELS[kind]).eval()
    for name, tensors in model.saved_tensors().items():
        mx.save_safetensors(str(tmp_path / name), tensors, {"format": "pt"})
    for name, text in model.saved_texts(EOS).items():
        (tmp_path / name).write_text(text)
    official = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
    ids = np.random.default_rng(0).integers(3, 40, (1, 20))
    with torch.no_grad():
        expected = official(torch.tensor(ids)).logits.numpy()
    found = np.array(model.logits(plain_states(model, model.embed(mx.array(ids)))))
    assert found == pytest.approx(expected, abs=2e-4)


def test_the_rotation_that_transformers_5_writes_is_read():
    """mlx-lm's Llama does not know rope_parameters; a model that ignores them is refused."""
    values = {k: v for k, v in (TINY | MODELS["llama"] | {"model_type": "llama"}).items() if not k.startswith("rope")}
    values["rope_parameters"] = LLAMA3 | {"rope_theta": 500000.0}
    read = build(LanguageConfig.from_dict(values).values)
    expected = build(TINY | MODELS["llama"] | {"model_type": "llama"})
    x = mx.random.normal((1, 4, 3, 8))
    rotated, wanted = (lm.layers[0].self_attn.rope(x, offset=50) for lm in (read, expected))
    assert mx.array_equal(rotated, wanted).item()
    with pytest.raises(UserError, match="rotates by other frequencies"):
        check_rope(build(TINY | {"model_type": "llama"}), flat_rope(values))


@pytest.mark.parametrize("change", [{"factor": 4.0}, {"high_freq_factor": 8.0}, {"rope_type": "linear"}])
def test_a_wrong_rotation_is_refused(change):
    values = TINY | MODELS["llama"] | {"model_type": "llama"}
    with pytest.raises(UserError, match="rotates by other frequencies"):
        check_rope(build(values), values | {"rope_scaling": LLAMA3 | change})


def test_a_rotation_that_depends_on_the_length_is_refused():
    with pytest.raises(UserError, match="dynamic"):
        build(TINY | {"model_type": "llama", "rope_scaling": {"rope_type": "dynamic", "factor": 2.0}})


@pytest.mark.parametrize("limit", [1024, 3000])
def test_the_limit_of_open_files_stays(limit):
    """mlx_lm.utils sets it to 2,048 of 4,096 at import, and raises ValueError where fewer are allowed."""
    code = f"""if True:
        import resource, sys
        sys.modules["torch"] = None  # not needed, and longer to import than all else
        resource.setrlimit(resource.RLIMIT_NOFILE, ({limit}, {limit}))
        from startup import blas
        from models.mlx_lm import build
        build({TINY | {"model_type": "qwen3"}!r})
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == ({limit}, {limit})
    """
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_embeddings_stay_as_they_were():
    """Gemma 3 scales its input in place."""
    model = tiny("gemma3_text", WINDOWED["gemma3_text"])
    batch = collate(rows(), EOS).to_mlx()
    embeddings = model.embed(batch.input_ids)
    before = np.array(embeddings)
    mx.eval(model(embeddings, model.make_cache(batch.attention_mask, batch.left_padding)))
    assert np.array_equal(np.array(embeddings), before)


def test_quantized_weights_keep_their_type_in_another_precision():
    model = tiny("llama", MODELS["llama"])
    nn.quantize(model.lm, group_size=32, bits=8, class_predicate=lambda name, m: name.endswith("mlp.gate_proj"))
    kinds = {name: p.dtype for name, p in tree_flatten(model.parameters())}
    with computing_in(Coconut(model), mx.bfloat16):
        inside = {name: p.dtype for name, p in tree_flatten(model.parameters())}
    assert (
        {name for name, kind in kinds.items() if kind == mx.uint32}
        == {name for name, kind in inside.items() if kind == mx.uint32}
        != set()
    )
    assert {name: p.dtype for name, p in tree_flatten(model.parameters())} == kinds


def test_float32_modules_compute_the_bits_of_mlx_lms(model, cpu):
    """Logits and every gradient of whole rows, against a model of mlx-lm that nothing was done to."""
    values, ids = model.config.values, mx.array([[3, 9, 30, 9, 4], [8, 5, 7, 21, 39]])
    plain, weights = build(values), mx.random.normal((2, 5, 40))
    plain.load_weights(tree_flatten(model.lm.parameters()))
    found, expected = (
        nn.value_and_grad(lm, lambda ids, lm=lm: (lm(ids) * weights).sum())(ids) for lm in (model.lm, plain)
    )
    for (name, one), (_, other) in zip(tree_flatten(found), tree_flatten(expected), strict=True):
        assert mx.array_equal(one, other).item(), name


def bfloat16_gradient(model: LanguageModel, loss) -> tuple[mx.array, dict[str, mx.array]]:
    """A loss of no arguments in bfloat16, and its gradient by parameter in the types that it was computed in."""
    wrapped = Coconut(model).train()
    with computing_in(wrapped, mx.bfloat16):
        found, gradient = nn.value_and_grad(wrapped, loss)()
    return found, {name.removeprefix("transformer."): array for name, array in tree_flatten(gradient)}


def is_sum_over_tokens(name: str) -> bool:
    """Of a parameter's gradient: those of norms, biases and the embedding table are."""
    return "norm" in name or name.endswith("bias") or "embed_tokens" in name


def worst_error(found: dict[str, mx.array], exact: dict[str, mx.array]) -> float:
    """The largest error of a gradient that is a sum over tokens, as a part of its norm."""
    names = [name for name in exact if is_sum_over_tokens(name)]
    return max((mx.linalg.norm(found[name] - exact[name]) / mx.linalg.norm(exact[name])).item() for name in names)


def test_products_are_bfloat16_and_sums_over_tokens_float32(model, operands):
    """A whole training pass with thoughts; its sums are within 4 times what rounding the weights alone changes."""
    batch, coconut, own = collate(rows(), EOS).to_mlx(), Coconut(model), model.parameters()
    loss, exact = nn.value_and_grad(coconut, lambda: coconut(batch))()
    assert set(operands) == {mx.float32}
    operands.clear()
    found, rough = bfloat16_gradient(model, lambda: coconut(batch))
    assert len(operands) >= 2 * 4 * 11  # layers, passes, operands of four products and of attention
    assert set(operands) == {mx.bfloat16}
    model.update(tree_map(lambda array: array.astype(mx.bfloat16).astype(mx.float32), own))
    rounded = nn.value_and_grad(coconut, lambda: coconut(batch))()[1]
    model.update(own)
    assert found.item() == pytest.approx(loss.item(), rel=1e-2)
    for name, array in rough.items():
        assert array.dtype == (mx.float32 if is_sum_over_tokens(name) else mx.bfloat16), name
    exact, rounded = (dict(tree_flatten(gradient["transformer"])) for gradient in (exact, rounded))
    assert worst_error(rough, exact) < 4 * worst_error(rounded, exact)


N_TOKENS = 6003  # a bfloat16 sum of ones ends at 256


def test_long_sums_over_tokens_do_not_stop_growing(model):
    """The gradients of every norm and bias, and of the table, where each token adds one."""
    modules = {f"lm.{name}": module for name, module in model.lm.named_modules()}
    names = {name for name, _ in tree_flatten(model.parameters()) if is_sum_over_tokens(name)}
    assert len(names) >= 4
    for name in names - {"lm.model.embed_tokens.weight"}:
        module = modules[name.rpartition(".")[0]]
        weight = module.weight  # [width of a norm], or [out, in] of a biased layer
        signs = mx.where(mx.arange(weight.shape[-1]) % 2, 1, -1).astype(mx.bfloat16)  # its own layer norm
        x = mx.broadcast_to(signs, (3, N_TOKENS // 3, *signs.shape))
        _, gradient = bfloat16_gradient(model, lambda module=module, x=x: module(x).astype(mx.float32).sum())
        assert np.abs(np.array(gradient[name])) == pytest.approx(N_TOKENS, rel=1e-3), name
    ids = mx.ones((3, N_TOKENS // 3), dtype=mx.int32)
    _, gradient = bfloat16_gradient(model, lambda: model.embed(ids).astype(mx.float32).sum())
    assert gradient["lm.model.embed_tokens.weight"][1].max().item() == N_TOKENS


def test_recomputing_changes_nothing_in_bfloat16(operands):
    """The same products, and the same gradients in the same types."""
    batch, gradients = collate(rows(), EOS).to_mlx(), []
    for recomputes in (False, True):
        model = tiny("qwen2", MODELS["qwen2"])
        model.grad_checkpoint = recomputes
        coconut = Coconut(model)
        gradients.append(bfloat16_gradient(model, lambda coconut=coconut: coconut(batch))[1])
    assert set(operands) == {mx.bfloat16}
    for name, expected in gradients[0].items():
        assert gradients[1][name].dtype == expected.dtype, name
        assert mx.allclose(gradients[1][name], expected, rtol=1e-2, atol=1e-3).item(), name


class Wrong(LanguageModel):
    """A model that is wrong in one way."""

    def __init__(self, how: str):
        model = tiny("llama", MODELS["llama"])
        super().__init__(model.lm, model.config)
        self._run, self.how = model._run, how

    def __call__(self, embeddings, cache):
        if self.how == "forgets its cache":
            cache = self.make_cache(mx.ones((1, 64), dtype=mx.bool_), mx.array([0]))
        states = super().__call__(embeddings, cache)
        if self.how == "sees padding":
            states = states + 0.1 * embeddings.mean(axis=1, keepdims=True)
        return states * mx.sqrt(mx.array(-1.0)) if self.how == "is not finite" else states

    def logits(self, hidden):
        return super().logits(hidden) * (2 if self.how == "has another head" else 1)


@pytest.mark.parametrize(
    ("how", "what"),
    [
        ("forgets its cache", "computed in parts"), ("sees padding", "beside padding on the left"),
        ("has another head", "output layer"), ("is not finite", "gradient beside padding is not finite"),
    ],
)  # fmt: skip
def test_a_model_that_is_wrong_is_refused(how, what):
    with pytest.raises(UserError, match=what):
        self_check(Wrong(how), "tiny")


@pytest.mark.parametrize("kind", ["mamba", "no_such_model", "gemma3n"])
def test_another_kind_of_model_is_refused(kind):
    with pytest.raises(UserError):
        config = LanguageConfig.from_dict(TINY | {"model_type": kind, "state_size": 4, "conv_kernel": 4})
        self_check(LanguageModel(build(config.values), config), "tiny")


def test_a_config_without_sizes_is_refused():
    with pytest.raises(ValueError, match="hidden_size"):
        LanguageConfig.from_dict({"model_type": "llama", "vocab_size": 3})
    with pytest.raises(ValueError, match="vocab_size"):
        LanguageConfig.from_dict(TINY | {"model_type": "llama", "vocab_size": "many"})


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({}, (4, 2, 8, 48)),
        ({"num_attention_heads": None, "num_key_value_heads": None, "head_dim": None}, (1, 1, 32, 48)),
        ({"head_dim": None, "num_key_value_heads": None}, (4, 4, 8, 48)),
        ({"intermediate_size": None}, (4, 2, 8, 128)),
        ({"intermediate_size": [64, 96], "num_key_value_heads": [1, 2]}, (4, 2, 8, 96)),
    ],
)
def test_sizes_of_the_layers_have_defaults(keys, expected):
    """Heads, those of keys, width of a head and between feed-forward layers: what memory is estimated from."""
    shape = LanguageConfig.from_dict(TINY | {"model_type": "llama"} | keys)
    assert (shape.n_head, shape.n_kv_head, shape.head_dim, shape.n_inner) == expected


def test_batches_are_what_the_loop_gets():
    """The rows of this file have thoughts in different places, so that the tests above compare something."""
    batch = collate(rows(), EOS)
    assert isinstance(batch, Batch) and batch.latent_mask.sum() == 6 and batch.left_padding.max() > 0
    assert json.dumps(tree_map(str, TINY))


@pytest.mark.parametrize("on_gpu", [False, True])
@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma2"])
def test_logits_in_parts_change_nothing(name, on_gpu, monkeypatch):
    """Loss and gradients, of an output layer of its own, a tied one, and one with a cap; also with a GPU's code."""
    monkeypatch.setattr(ops, "on_gpu", lambda: on_gpu)
    coconut, batch = Coconut(tiny(name, MODELS[name])), collate(rows(), EOS).to_mlx()
    loss_and_gradient = nn.value_and_grad(coconut, lambda b: coconut(b))
    loss, gradient = loss_and_gradient(batch)
    monkeypatch.setattr("coconut.LARGEST_LOGITS", 7 * coconut.transformer.config.vocab_size)
    calls = []
    head = type(coconut.transformer).logits
    monkeypatch.setattr(type(coconut.transformer), "logits", lambda self, x: calls.append(len(x)) or head(self, x))
    in_parts, other = loss_and_gradient(batch)
    assert max(calls) == 7
    assert in_parts.item() == pytest.approx(loss.item(), rel=1e-6)
    other = dict(tree_flatten(other))
    for key, found in tree_flatten(gradient):
        assert mx.allclose(other[key], found, rtol=1e-4, atol=1e-6).item(), key
