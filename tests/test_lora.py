"""LoRA and QLoRA over the tiny Llama and Qwen2 of tests/fixtures/llm: what trains, what is saved, who reopens it."""

import json
import shutil

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import yaml
from mlx.utils import tree_flatten

from coconut import Coconut
from config import Config, load_config
from dataset import Curriculum, collate
from models.loading import find_tokenizer, load_model
from models.lora import ADAPTERS, ROWS
from models.precision import computing_in
from models.recompute import RepeatedDropout
from models.source import find_source
from scripts import export
from text.reader import read_examples
from text.tokens import tokenize
from training.step import new_optimizer
from utils import UserError

mlx_lm_utils = pytest.importorskip("mlx_lm.utils", reason="requirements-llm.txt is not installed")
BASES = ("llama", "qwen2")


@pytest.fixture(params=BASES)
def base(request, fixtures):
    return fixtures / "llm" / request.param


def make_config(base, **keys) -> Config:
    own = {"save_path": "unused", "name": "unused", "val_path": "unused", "coconut": True, "model_id": str(base)}
    return Config(**own, c_thought=2, max_latent_stage=3, lr=1e-2, **keys)


def loaded(config: Config):
    source = find_source(config)
    tokenizer = find_tokenizer(source, config)
    return Coconut(load_model(source, config, tokenizer)), tokenizer


def batch_of(base, config: Config, tokenizer):
    data = tokenize(read_examples(str(base.parent / "train.json")), tokenizer, "train")
    curriculum = Curriculum(config, tokenizer)
    return collate([curriculum.training(data[i], 2) for i in range(6)], tokenizer.eos_id).to_mlx()


def loss_of(model: Coconut, batch) -> float:
    return model.eval()(batch).item()


def trained(model: Coconut, batch, config: Config, steps: int) -> float:
    """The loss after some steps."""
    optimizer = new_optimizer(model, config)
    gradient_of = nn.value_and_grad(model.train(), lambda b: model(b))
    for _ in range(steps):
        optimizer.update(model, gradient_of(batch)[1])
        mx.eval(model.parameters(), optimizer.state)
    return loss_of(model, batch)


def leaves(model: Coconut, trainable: bool) -> dict[str, np.ndarray]:
    tree = model.trainable_parameters() if trainable else model.parameters()
    return {name: np.array(array) for name, array in tree_flatten(tree)}


@pytest.mark.parametrize("keys", [None, "self_attn.q_proj, self_attn.v_proj"])
def test_only_adapters_and_three_rows_train(base, keys):
    """The base is the same bits after 20 steps; the loss at fresh adapters is that of the whole model."""
    config = make_config(base, lora_rank=4, lora_keys=keys)
    model, tokenizer = loaded(config)
    batch = batch_of(base, config, tokenizer)
    whole, _ = loaded(make_config(base))
    before = loss_of(model, batch)
    assert before == pytest.approx(loss_of(whole, batch), rel=1e-6)
    frozen = {name: array for name, array in leaves(model, False).items() if name not in leaves(model, True)}
    names = {name.split(".", 2)[2].split("layers.")[-1] for name in leaves(model, True)}
    assert all(name.endswith(("lora_a", "lora_b", "special_rows")) for name in names)
    if keys:
        assert {name.split(".", 1)[1] for name in names if "lora" in name} == {
            f"self_attn.{part}_proj.lora_{side}" for part in "qv" for side in "ab"
        }
    assert trained(model, batch, config, 20) < before - 1
    for name, array in leaves(model, False).items():
        assert name not in frozen or np.array_equal(array, frozen[name]), name


@pytest.mark.parametrize("bits", [8, 4])
def test_a_quantized_base_trains(base, bits):
    config = make_config(base, lora_rank=4, quantize=bits)
    model, tokenizer = loaded(config)
    kinds = {array.dtype.name for array in leaves(model, False).values()}
    assert "uint32" in kinds
    batch = batch_of(base, config, tokenizer)
    before = loss_of(model, batch)
    assert trained(model, batch, config, 10) < before - 1


@pytest.mark.parametrize("bits", [None, 8])
def test_bfloat16_sums_the_special_rows_in_float32_and_nothing_else(base, bits, operands):
    """Thousands of tokens that each add one; adapters, base and states are bfloat16 in a whole training pass."""
    config = make_config(base, lora_rank=4, quantize=bits)
    model, tokenizer = loaded(config)
    batch, special = batch_of(base, config, tokenizer), mx.full((3, 2001), tokenizer.latent_id)
    operands.clear()  # those of the check at load
    with computing_in(model.train(), mx.bfloat16):
        gradient = nn.value_and_grad(model, lambda: model(batch))()[1]
        sums = nn.value_and_grad(model, lambda: model.transformer.embed(special).astype(mx.float32).sum())()[1]
        hidden, cache = model.think(batch)
        assert hidden.dtype == cache[0].state[0].dtype == model.transformer.logits(hidden).dtype == mx.bfloat16
    assert len(operands) > 100 and set(operands) <= {mx.bfloat16, mx.uint32}
    kinds = {name.rsplit(".", 1)[-1]: array.dtype for name, array in tree_flatten(gradient)}
    assert kinds == {"lora_a": mx.bfloat16, "lora_b": mx.bfloat16, "special_rows": mx.float32}
    [rows] = [array for name, array in tree_flatten(sums) if name.endswith("embed_tokens.special_rows")]
    assert rows.max().item() == 3 * 2001  # a bfloat16 sum of ones ends at 256


def gradients(model: Coconut, batch, seed: int = 7) -> tuple[float, dict[str, mx.array]]:
    """(loss, gradient by name) in training."""
    mx.random.seed(seed)
    loss, gradient = nn.value_and_grad(model.train(), lambda b: model(b))(batch)
    return loss.item(), dict(tree_flatten(gradient))


def test_dropout_is_the_same_where_layers_are_computed_again(base):
    """The same bits of loss and gradients, over several passes of each layer; other seeds give others."""
    config = make_config(base, lora_rank=4, lora_dropout=0.3)
    model, tokenizer = loaded(config)
    batch = batch_of(base, config, tokenizer)
    trained(model, batch, config, 3)  # fresh adapters put out 0, whatever is dropped
    loss, expected = gradients(model, batch)
    assert loss != gradients(model, batch, seed=8)[0]
    assert gradients(model, batch)[0] == loss
    model.transformer.grad_checkpoint = True
    again, found = gradients(model, batch)
    assert again == loss and found.keys() == expected.keys()
    for name, gradient in found.items():
        assert mx.array_equal(gradient, expected[name]).item(), name
    assert model.eval()(batch).item() == loss_of(model, batch) != loss


def test_dropout_drops_its_share_and_keeps_the_mean(base):
    config = make_config(base, lora_rank=4, lora_dropout=0.3)
    model, _ = loaded(config)
    [*dropouts] = [m for m in model.modules() if isinstance(m, RepeatedDropout)]
    assert len(dropouts) == sum("lora_a" in m for m in model.modules()) and not any(m.parameters() for m in dropouts)
    model.train()
    mx.random.seed(0)
    one, other = (dropouts[0](mx.ones((200, 500))) for _ in range(2))
    assert (one == 0).mean().item() == pytest.approx(0.3, abs=0.01) and one.mean().item() == pytest.approx(1, abs=0.01)
    assert not mx.array_equal(one, other).item()


def run_keys(base, folder, **keys) -> dict:
    data = {name: str(base.parent / file) for name, file in (("train_path", "train.json"), ("val_path", "valid.json"))}
    own = {"save_path": str(folder), "name": "run", "coconut": True, "c_thought": 2, "max_latent_stage": 2}
    numbers = {"num_epochs": 2, "lr": 1e-2, "batch_size_training": 8, "max_new_tokens": 2, "lora_rank": 4}
    return own | numbers | data | {"model_id": str(base), "wandb": "off"} | keys


@pytest.fixture
def run(base, tmp_path, call_main):
    """Train with run.py: run(**keys) -> its directory."""

    def call(**keys):
        file = tmp_path / "config.yaml"
        file.write_text(yaml.safe_dump(run_keys(base, tmp_path, **keys)))
        outcome = call_main(file)
        assert outcome.status == 0, outcome.err
        return tmp_path / keys.get("name", "run")

    return call


def losses(folder) -> list[float]:
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [record["train/loss"] for record in records if "train/loss" in record]


def test_a_resumed_run_is_the_same_run(run):
    """Four epochs at once, and two and then two more, with dropout in front of the adapters."""
    whole = run(name="whole", num_epochs=4, lora_dropout=0.1)
    part = run(name="part", num_epochs=2, lora_dropout=0.1)
    shutil.rmtree(part / "checkpoint_2")  # what is left is the state
    part = run(name="part", num_epochs=4, lora_dropout=0.1)
    assert losses(part) == losses(whole)
    for name in (ADAPTERS, ROWS):
        one, other = (mx.load(str(folder / "checkpoint_4" / name)) for folder in (whole, part))
        assert one.keys() == other.keys() and all(mx.array_equal(one[key], other[key]).item() for key in one)


def test_mlx_lm_reopens_the_adapters(run, base):
    """The logits of ordinary tokens are ours, from mlx-lm's own loader."""
    checkpoint = run() / "checkpoint_2"
    theirs, _ = mlx_lm_utils.load_model(base)
    mlx_lm_utils.load_adapters(theirs, str(checkpoint))
    model, tokenizer = loaded(make_config(base, load_model_path=str(checkpoint)))
    ids = mx.array([[5, 9, 33, 70, 12]])
    ours = model.transformer
    states = ours(ours.embed(ids), ours.make_cache(mx.ones(ids.shape, dtype=mx.bool_), mx.array([0])))
    n = tokenizer.vocab_size - 3
    assert mx.allclose(ours.logits(states)[..., :n], theirs(ids)[..., :n], atol=1e-5).item()


def test_an_evaluation_needs_no_keys_of_lora(run, base, tmp_path):
    """The checkpoint says what its adapters are and which base they belong to."""
    checkpoint = run() / "checkpoint_2"
    found, tokenizer = loaded(make_config(base, load_model_path=str(checkpoint)))
    moved = tmp_path / "moved"
    shutil.copytree(base, moved)
    also, _ = loaded(make_config(moved, load_model_path=str(checkpoint)))
    batch = batch_of(base, make_config(base), tokenizer)
    assert loss_of(found, batch) == loss_of(also, batch)
    whole, _ = loaded(make_config(base))
    assert abs(loss_of(found, batch) - loss_of(whole, batch)) > 0.1


def test_adapters_of_another_base_are_refused(run, base, tmp_path):
    checkpoint = run() / "checkpoint_2"
    other = tmp_path / "other"
    shutil.copytree(base, other)
    tensors = mx.load(str(other / "model.safetensors"))
    mx.eval(tensors)
    tensors["model.norm.weight"] = tensors["model.norm.weight"] * 1.001
    mx.save_safetensors(str(other / "model.safetensors"), tensors)
    with pytest.raises(UserError, match="another base"):
        loaded(make_config(other, load_model_path=str(checkpoint)))
    with pytest.raises(UserError, match="rank"):
        loaded(make_config(base, load_model_path=str(checkpoint), lora_rank=8))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"lora_rank": None, "quantize": 4}, "quantize: no effect without lora_rank"),
        ({"quantize": 3}, "quantize: expected 8, 4 or None"),
    ],
)
def test_keys_that_do_not_fit_are_refused(keys, message, fixtures, tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(run_keys(fixtures / "llm" / "llama", tmp_path, **keys)))
    with pytest.raises(UserError, match=message):
        load_config(str(file))


def test_names_that_no_layer_has_are_refused(fixtures):
    with pytest.raises(UserError, match="lora_keys"):
        loaded(make_config(fixtures / "llm" / "llama", lora_rank=4, lora_keys="attn.c_attn"))


def test_gpt2_has_no_adapters(golden, golden_model, tokenizer):
    config = make_config(golden_model, lora_rank=4)
    with pytest.raises(UserError, match="lora_rank: GPT-2"):
        load_model(find_source(config), config, tokenizer)


@pytest.mark.parametrize("quantize", [None, 8])
def test_the_fused_model_has_the_same_loss(run, base, tmp_path, quantize):
    checkpoint = run(quantize=quantize) / "checkpoint_2"
    out = tmp_path / "fused"
    assert export.main([str(checkpoint), str(out), "--fuse"]) == 0
    found, tokenizer = loaded(make_config(out))
    model, _ = loaded(make_config(base, load_model_path=str(checkpoint)))
    batch = batch_of(base, make_config(base), tokenizer)
    assert type(found.transformer) is not type(model.transformer)
    assert loss_of(found, batch) == pytest.approx(loss_of(model, batch), rel=1e-5)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT's affair with transformers
def test_peft_opens_the_adapters(run, base, tmp_path):
    """The logits of ordinary tokens behind transformers' model with PEFT's layers are ours."""
    torch = pytest.importorskip("torch", reason="requirements-oracle.txt is not installed")
    peft = pytest.importorskip("peft", reason="requirements-oracle.txt is not installed")
    transformers = pytest.importorskip("transformers")
    checkpoint = run() / "checkpoint_2"
    out = tmp_path / "peft"
    assert export.main([str(checkpoint), str(out), "--peft"]) == 0
    whole = transformers.AutoModelForCausalLM.from_pretrained(base, torch_dtype=torch.float32)
    ids = [[5, 9, 33, 70, 12]]
    with torch.no_grad():
        bare = whole(torch.tensor(ids)).logits.numpy()
        theirs = peft.PeftModel.from_pretrained(whole, str(out)).eval()(torch.tensor(ids)).logits.numpy()
    model, tokenizer = loaded(make_config(base, load_model_path=str(checkpoint)))
    ours, ids = model.transformer.eval(), mx.array(ids)
    states = ours(ours.embed(ids), ours.make_cache(mx.ones(ids.shape, dtype=mx.bool_), mx.array([0])))
    n = tokenizer.vocab_size - 3
    found = np.array(ours.logits(states)[..., :n])
    assert found == pytest.approx(theirs[..., :n], abs=1e-4)
    assert np.abs(found - bare[..., :n]).max() > 0.1


def test_a_whole_model_has_nothing_to_fuse(golden_model, tmp_path, capsys):
    assert export.main([str(golden_model), str(tmp_path / "out"), "--fuse"]) == 2
    assert "holds no adapters" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
