"""Every source of weights gives the model that transformers computes with; what does not fit is named."""

import copy
import json
import os
import struct
import subprocess
import sys
import types
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

from config import Config
from models.loading import load_gpt2
from models.source import find_source
from models.weights import canonical, nanogpt_shape, read_tensors
from scripts import export
from text.tokenizer import load_tokenizer
from training.resume import best_checkpoint
from utils import UserError

torch = pytest.importorskip("torch", reason="needs torch to make the files of the official code")
transformers = pytest.importorskip("transformers", reason="needs transformers as the reference")

ROOT = Path(__file__).resolve().parents[1]
IDS = [[3, 77, 256, 19, 40, 65, 7, 11], [1, 2, 3, 250, 99, 98, 97, 256]]


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """A vocabulary of 257 words: rows without markers 258, with them 261."""
    path = tmp_path_factory.mktemp("words") / "words.json"
    path.write_text('["<<"]')
    return path


@pytest.fixture(scope="module", params=[258, 261], ids=["without markers", "with markers"])
def reference(request):
    """A random GPT-2 of transformers, every tensor of it non-trivial."""
    torch.manual_seed(1)
    shape = {"vocab_size": request.param, "n_positions": 64, "n_embd": 16, "n_layer": 2, "n_head": 2}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**shape, bos_token_id=0, eos_token_id=0)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def torch_logits(model):
    with torch.no_grad():
        return model(torch.tensor(IDS)).logits.numpy()


def our_logits(config, words):
    tokenizer = load_tokenizer(str(words))
    model = load_gpt2(find_source(config), config, tokenizer).eval()
    ids = mx.array(IDS)
    cache = model.make_cache(mx.ones(ids.shape, dtype=mx.bool_), mx.zeros(len(ids), dtype=mx.int32))
    return np.array(model.logits(model(model.embed(ids), cache)))


def make_config(words, method="coconut", **keys):
    return Config(save_path="x", name="x", val_path="x", tokenizer=str(words), **{method: True}, **keys)


def named_tensors(model):
    """transformers' parameters as numpy, without prefix, the tied output layer left out."""
    state = model.state_dict()
    return {k.removeprefix("transformer."): v.numpy() for k, v in state.items() if k != "lm_head.weight"}


def linear(tensors):
    """The same in nn.Linear layout."""
    names = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
    return {k: np.ascontiguousarray(v.T) if k.endswith(names) else v for k, v in tensors.items()}


def prefixed(tensors, prefix):
    return {prefix + name: tensor for name, tensor in tensors.items()}


def old_port(model):
    """What the older MLX port saves for coconut: nn.Linear layout, the embedding twice, a mask in every block."""
    tensors = prefixed(linear(named_tensors(model)), "base_causallm.")
    mask = np.tril(np.ones((1, 1, 64, 64), dtype=np.float32)) + 0.01  # trained, as it is there
    extras = {f"base_causallm.h.{i}.attn.bias": mask for i in range(2)}
    return tensors | extras | {"embedding.weight": tensors["base_causallm.wte.weight"]}


def hf_extras(model):
    """The buffers and the output layer that older Hugging Face files carry."""
    tensors = named_tensors(model)
    mask = np.tril(np.ones((1, 1, 64, 64), dtype=np.float32))
    buffers = {f"h.{i}.attn.bias": mask for i in range(2)} | {
        f"h.{i}.attn.masked_bias": np.float32(-1e4) for i in range(2)
    }
    return prefixed(tensors | buffers, "transformer.") | {"lm_head.weight": tensors["wte.weight"]}


def write(folder, tensors, kind, model):
    """Put tensors into a file of a kind, with the model's config.json beside it; returns the file."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(model.config.to_dict(), default=str))
    arrays = {name: mx.array(value) for name, value in tensors.items()}
    names = {"safetensors": "weights.safetensors", "npz": "weights.npz"}
    path = folder / names.get(kind, "checkpoint_33")
    if kind == "safetensors":
        mx.save_safetensors(str(path), arrays)
    elif kind == "npz":
        mx.savez(str(path), **arrays)
    else:
        state = {name: torch.tensor(np.asarray(value)) for name, value in tensors.items()}
        torch.save(state, path, _use_new_zipfile_serialization=kind == "torch")
    return path


LAYOUTS = {
    "Hugging Face, bare": named_tensors,
    "Hugging Face, transformer.": lambda m: prefixed(named_tensors(m), "transformer."),
    "Hugging Face, with buffers and lm_head": hf_extras,
    "official cot": lambda m: {k: v.numpy() for k, v in m.state_dict().items()},
    "official coconut": lambda m: (
        prefixed({k: v.numpy() for k, v in m.state_dict().items()}, "base_causallm.")
        | {"embedding.weight": m.transformer.wte.weight.detach().numpy()}
    ),
    "MLX, bare": lambda m: linear(named_tensors(m)),
    "MLX, base_causallm.": lambda m: prefixed(linear(named_tensors(m)), "base_causallm."),
    "MLX, transformer.": lambda m: prefixed(linear(named_tensors(m)), "transformer."),
    "older MLX port": old_port,
    "DDP": lambda m: prefixed(hf_extras(m), "module."),
    "torch.compile": lambda m: prefixed(linear(hf_extras(m)), "_orig_mod."),
    "FSDP blocks": lambda m: {
        name.replace("h.0.", "h.0._fsdp_wrapped_module."): value for name, value in hf_extras(m).items()
    },
    "safetensors' save_model, which keeps one of tied tensors": lambda m: {
        {"wte.weight": "lm_head.weight"}.get(name, f"transformer.{name}"): value
        for name, value in named_tensors(m).items()
    },
}


@pytest.mark.parametrize("kind", ["safetensors", "npz", "torch", "torch before 1.6"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_file_gives_the_logits_of_transformers(layout, kind, reference, words, tmp_path):
    """load_model_path: names, layouts and formats; for cot and for coconut, which may add three rows."""
    path = write(tmp_path, LAYOUTS[layout](reference), kind, reference)
    expected = torch_logits(reference)
    for method in ("cot", "coconut"):
        ours = our_logits(make_config(words, method, load_model_path=str(path)), words)
        np.testing.assert_allclose(ours[..., : expected.shape[-1]], expected, rtol=0, atol=1e-5)
        assert ours.shape[-1] == (261 if method == "coconut" else expected.shape[-1])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_files_become_float32(dtype, reference, words, tmp_path):
    """The values are those of the file, the parameters float32."""
    half = reference.to(getattr(torch, dtype))
    half.save_pretrained(tmp_path)
    reference.to(torch.float32)
    expected = torch_logits(transformers.GPT2LMHeadModel.from_pretrained(tmp_path, dtype=torch.float32).eval())
    ours = our_logits(make_config(words, "cot", model_id=str(tmp_path)), words)
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-5)


def test_a_local_folder_whole_and_in_shards(reference, words, tmp_path):
    """model_id as a folder that transformers wrote, in one file or several with their index."""
    expected = torch_logits(reference)
    for name, size in (("whole", "1GB"), ("shards", "8KB")):
        reference.save_pretrained(tmp_path / name, max_shard_size=size)
        ours = our_logits(make_config(words, "cot", model_id=str(tmp_path / name)), words)
        np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-5)
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1


def test_missing_markers_start_as_copies_of_the_double_angle(words, tmp_path, reference):
    """Only for coconut, and only where the file has no rows for them (official run.py)."""
    path = write(tmp_path, named_tensors(reference), "safetensors", reference)
    tokenizer = load_tokenizer(str(words))
    config = make_config(words, load_model_path=str(path))
    table = np.array(load_gpt2(find_source(config), config, tokenizer).wte.weight)
    original = reference.transformer.wte.weight.detach().numpy()
    np.testing.assert_array_equal(table[: len(original)], original)
    if len(original) == 258:
        np.testing.assert_array_equal(table[258:], np.repeat(original[[tokenizer.prototype_id]], 3, axis=0))


@pytest.mark.parametrize(
    ("rows", "header", "expected", "from_prototype"),
    [
        (259, {}, 261, True),  # one token was added
        (304, {}, 261, True),  # padded, as nanoGPT's 50304
        (261, {}, 261, False),  # exactly ours
        (261, {"method": "cot"}, 261, True),  # fresh weights of ours that never saw a special token
        (304, {"method": "coconut"}, 304, False),
    ],
)
def test_rows_of_special_tokens_that_nobody_trained(
    rows, header, expected, from_prototype, words, tmp_path, reference, capsys
):
    """Only coconut cuts the padding off and starts the rows from `<<`, as the official run.py does, and says so."""
    tensors = {name: mx.array(value) for name, value in named_tensors(reference).items()}
    table = mx.random.normal((rows, 16))
    mx.save_safetensors(str(tmp_path / "model.safetensors"), tensors | {"wte.weight": table}, header)
    (tmp_path / "config.json").write_text(json.dumps(reference.config.to_dict(), default=str))
    tokenizer = load_tokenizer(str(words))
    config = make_config(words, load_model_path=str(tmp_path))
    found = np.array(load_gpt2(find_source(config), config, tokenizer).wte.weight)
    table = np.array(table)
    special = np.repeat(table[[tokenizer.prototype_id]], 3, axis=0) if from_prototype else table[258:261]
    assert len(found) == expected
    np.testing.assert_array_equal(found[:258], table[:258])
    np.testing.assert_array_equal(found[258:261], special)
    assert ("start from the embedding of `<<`" in capsys.readouterr().out) == from_prototype
    config = make_config(words, "cot", load_model_path=str(tmp_path))
    assert len(load_gpt2(find_source(config), config, tokenizer).wte.weight) == rows


def test_rows_that_nobody_trained_stay_where_the_vocabulary_has_no_double_angle(tmp_path, reference):
    """The graph task's curriculum starts from a checkpoint of `cot`, and no word of its vocabulary is `<<`."""
    tensors = {name: mx.array(value) for name, value in named_tensors(reference).items()}
    table = mx.random.normal((261, 16))
    mx.save_safetensors(str(tmp_path / "model.safetensors"), tensors | {"wte.weight": table}, {"method": "cot"})
    (tmp_path / "config.json").write_text(json.dumps(reference.config.to_dict(), default=str))
    (tmp_path / "words.json").write_text('["###"]')
    config = make_config(tmp_path / "words.json", load_model_path=str(tmp_path))
    found = load_gpt2(find_source(config), config, load_tokenizer(config.tokenizer)).wte.weight
    np.testing.assert_array_equal(np.array(found), np.array(table))


def nanogpt_checkpoint(model, path, **arguments):
    """What nanoGPT's train.py saves of a compiled model."""
    tensors = prefixed(linear(named_tensors(model)), "_orig_mod.transformer.")
    tensors["_orig_mod.lm_head.weight"] = model.lm_head.weight.detach().numpy()
    if not arguments.get("bias", True):
        tensors = {name: value for name, value in tensors.items() if not name.endswith("bias")}
    tensors = {name: torch.tensor(value) for name, value in tensors.items()}
    shape = {"n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 64, "bias": True, "dropout": 0.0}
    shape |= {"vocab_size": len(model.transformer.wte.weight)} | arguments
    optimizer = {"state": {0: {"step": torch.tensor(1.0)}}, "param_groups": [{"lr": 1e-3}]}
    torch.save({"model": tensors, "optimizer": optimizer, "model_args": shape, "iter_num": 3}, path)
    return path


@pytest.mark.parametrize("bias", [True, False])
def test_a_checkpoint_of_nanogpt(bias, reference, words, tmp_path, capsys):
    """nn.Linear layout, names of torch.compile, sizes in model_args, and no biases where it was trained so."""
    model = copy.deepcopy(reference)
    for name, parameter in model.named_parameters():
        if name.endswith("bias") and not bias:
            parameter.data.zero_()
    path = nanogpt_checkpoint(model, tmp_path / "ckpt.pt", bias=bias)
    ours = our_logits(make_config(words, "cot", load_model_path=str(path)), words)
    np.testing.assert_allclose(ours, torch_logits(model), rtol=0, atol=1e-5)
    captured = capsys.readouterr()
    assert "GELU" in captured.err
    assert ("no biases" in captured.out) == (not bias)


def test_heads_of_nanogpt_that_the_named_config_contradicts(reference, words, tmp_path):
    """No tensor's shape shows the number of heads, so a wrong one would load and compute something else."""
    path = nanogpt_checkpoint(reference, tmp_path / "ckpt.pt", n_head=4)
    shape = tmp_path / "shape.json"
    shape.write_text(json.dumps(reference.config.to_dict(), default=str))
    config = make_config(words, "cot", load_model_path=str(path), model_config_path=str(shape))
    with pytest.raises(UserError, match=r"n_head 4, .*shape\.json says 2"):
        find_source(config)


def test_model_args_of_nanogpt_that_lack_a_size(reference, tmp_path):
    """GPT-2 small's number of heads would be taken in its place."""
    path = nanogpt_checkpoint(reference, tmp_path / "ckpt.pt")
    found = torch.load(path, weights_only=True)
    del found["model_args"]["n_head"]
    torch.save(found, path)
    with pytest.raises(UserError, match=r"ckpt\.pt: its model_args lack n_head"):
        nanogpt_shape(path)


TRAINERS = {
    "PyTorch": lambda state, optimizer: {
        "epoch": 3, "model_state_dict": state, "optimizer_state_dict": optimizer, "loss": torch.tensor(0.5),
    },
    "a configuration under `model`": lambda state, optimizer: {"model": {"n_layer": 2}, "model_state_dict": state},
    "Lightning": lambda state, optimizer: {
        "epoch": 3, "global_step": 9, "pytorch-lightning_version": "2.5.0", "hyper_parameters": {"lr": 1e-3},
        "state_dict": prefixed(state, "model."), "optimizer_states": [optimizer], "callbacks": {}, "loops": {},
    },
    "DeepSpeed": lambda state, optimizer: {
        "module": state, "buffer_names": [], "optimizer": None, "ds_version": "0.16.0", "dp_world_size": 1,
        "param_shapes": [{name: tensor.shape for name, tensor in state.items()}],
    },
    "DDP inside": lambda state, optimizer: {"model_state_dict": prefixed(state, "module."), "scheduler": {}},
}  # fmt: skip


@pytest.mark.parametrize("trainer", TRAINERS)
def test_a_checkpoint_of_another_trainer(trainer, reference, words, tmp_path):
    """A state dict among the optimizer's and a trainer's own values."""
    optimizer = torch.optim.AdamW(reference.parameters()).state_dict()
    (tmp_path / "config.json").write_text(json.dumps(reference.config.to_dict(), default=str))
    torch.save(TRAINERS[trainer](reference.state_dict(), optimizer), tmp_path / "last.ckpt")
    ours = our_logits(make_config(words, "cot", load_model_path=str(tmp_path / "last.ckpt")), words)
    np.testing.assert_allclose(ours, torch_logits(reference), rtol=0, atol=1e-5)


@pytest.mark.parametrize("found", [
    {"model_state_dict": {"wte.weight": "where it is"}}, {"module": {}}, {"epoch": 3}, ["wte.weight"],
])  # fmt: skip
def test_a_torch_file_without_a_state_dict_is_refused(found, tmp_path):
    torch.save(found, tmp_path / "last.ckpt")
    with pytest.raises(UserError, match=r"last\.ckpt: expected a state dict of tensors, bare or under `model`, "):
        read_tensors(tmp_path / "last.ckpt")


def test_shards_of_torch_files(reference, words, tmp_path):
    """pytorch_model.bin.index.json and its parts, as older versions of transformers saved large models."""
    state = list(reference.state_dict().items())
    parts = {"pytorch_model-00001-of-00002.bin": state[:9], "pytorch_model-00002-of-00002.bin": state[9:]}
    for name, part in parts.items():
        torch.save(dict(part), tmp_path / name)
    index = {"weight_map": {key: name for name, part in parts.items() for key, _ in part}}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    (tmp_path / "config.json").write_text(json.dumps(reference.config.to_dict(), default=str))
    ours = our_logits(make_config(words, "cot", model_id=str(tmp_path)), words)
    np.testing.assert_allclose(ours, torch_logits(reference), rtol=0, atol=1e-5)


def test_a_repository_that_holds_only_torch_files_is_fetched(tmp_path, monkeypatch):
    """safetensors are asked for first: most repositories hold both, and one is enough."""
    asked = []

    def snapshot_download(name, revision, allow_patterns=(), local_files_only=False):
        if local_files_only:
            raise LocalEntryNotFoundError("nothing cached")
        asked.append(allow_patterns)
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
        if "pytorch_model*.bin" in allow_patterns:
            (tmp_path / "pytorch_model.bin").write_bytes(b"")
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    config = Config(save_path="x", name="x", val_path="x", cot=True, model_id="someone/tiny")
    for _ in range(2):
        assert find_source(config).weights == tmp_path
    assert [("*.safetensors" in patterns) for patterns in asked] == [True, False, True]


BROKEN_SETTINGS = [
    {"ALL_PROXY": "socks5://127.0.0.1:9"},
    {"all_proxy": "socks://127.0.0.1:9"},
    {"HF_ENDPOINT": "hf-mirror.example"},
    {"HF_TOKEN": "hf_ä", "PYTHONUTF8": "1"},
]


def run_beside_the_hub(code: str, home: Path, setting: dict, *arguments: str) -> subprocess.CompletedProcess:
    """A program that ends well, with huggingface_hub's cache in `home`, online as far as the setting allows."""
    environment = {k: v for k, v in os.environ.items() if k not in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")}
    environment |= {"HF_HOME": str(home)} | setting
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done


@pytest.mark.parametrize("setting", BROKEN_SETTINGS, ids=str)
def test_a_repository_that_cannot_be_fetched_is_one_message(setting, tmp_path):
    """Proxies, addresses and tokens that are wrong raise errors of libraries far below huggingface_hub."""
    code = (
        "from startup import blas; from config import Config; from models.source import find_source\n"
        "from utils import UserError\n"
        "try: find_source(Config(save_path='x', name='x', val_path='x', cot=True, model_id='someone/nothing'))\n"
        "except UserError as error: print(error)"
    )
    printed = run_beside_the_hub(code, tmp_path, setting).stdout
    assert "model_id: someone/nothing is not a local folder" in printed
    assert "HF_ENDPOINT, HF_TOKEN" in printed


def test_a_number_in_the_environment_that_is_none_is_one_message(tmp_path):
    """huggingface_hub raises while it is imported."""
    code = (
        "from startup import blas; from config import Config; from models.source import find_source\n"
        "from utils import UserError\n"
        "try: find_source(Config(save_path='x', name='x', val_path='x', cot=True, model_id='someone/nothing'))\n"
        "except UserError as error: print(error)"
    )
    printed = run_beside_the_hub(code, tmp_path, {"HF_HUB_ETAG_TIMEOUT": "ten"}).stdout
    assert printed.startswith("model_id: the package huggingface_hub cannot be loaded (ValueError: ")
    assert "'ten'" in printed and printed.count("\n") == 1


@pytest.mark.parametrize("setting", [{"HF_HUB_OFFLINE": "1"}, *BROKEN_SETTINGS], ids=str)
def test_a_repository_id_is_found_in_the_hub_cache_without_the_network(setting, tmp_path):
    """huggingface_hub's cache layout, offline or with settings that would break a connection: branch and revision."""
    revision = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "hub" / "models--someone--tiny"
    shape = transformers.GPT2Config(n_positions=8, n_embd=4, n_layer=1, n_head=1, vocab_size=9)
    transformers.GPT2LMHeadModel(shape).save_pretrained(repository / "snapshots" / revision)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(revision)
    code = (
        "import sys; from startup import blas; from config import Config; from models.source import find_source\n"
        "for revision in (None, sys.argv[1]):\n"
        "    named = dict(model_id='someone/tiny', model_revision=revision)\n"
        "    print(find_source(Config(save_path='x', name='x', val_path='x', cot=True, **named)).weights)"
    )
    for with_tokenizer in (False, True):
        done = run_beside_the_hub(code, tmp_path, setting, revision)
        assert [Path(line).name for line in done.stdout.split()] == [revision] * 2
        if "HF_HUB_OFFLINE" not in setting:  # a complete copy asks nothing of the Hub
            assert ("the Hub was not reached" in done.stderr) == (not with_tokenizer)
        (repository / "snapshots" / revision / "vocab.json").write_text("{}")


@pytest.fixture(scope="module")
def trained(words, tmp_path_factory):
    """The directory of a short run of ours."""
    from survival import Trial

    trial = Trial(tmp_path_factory.mktemp("trained") / "run", {"num_epochs": 2})
    trial.finish()
    return trial


def test_transformers_opens_our_checkpoints_and_we_open_its(trained, words, tmp_path):
    """Saved here, opened there, same logits; and back."""
    folder = trained.run_dir / "checkpoint_2"
    theirs, info = transformers.GPT2LMHeadModel.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    ours = our_logits(make_config(words, load_model_path=str(folder)), words)
    np.testing.assert_allclose(ours, torch_logits(theirs.eval()), rtol=0, atol=1e-5)
    theirs.save_pretrained(tmp_path)
    back = our_logits(make_config(words, load_model_path=str(tmp_path)), words)
    np.testing.assert_array_equal(back, ours)


def test_generate_of_transformers_stops_at_end_of_text(trained, words):
    """Also with a vocabulary that is not GPT-2's; config.json names end of text and not a latent."""
    model = transformers.GPT2LMHeadModel.from_pretrained(trained.run_dir / "checkpoint_2").eval()
    end = load_tokenizer(str(words)).eos_id
    with torch.no_grad():
        model.transformer.ln_f.bias.add_(model.transformer.wte.weight[end] * 1e4)  # always the next token
    prompt = torch.tensor([[3, 77]])
    ids = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=5, do_sample=False)
    assert ids[0].tolist() == [3, 77, end]
    assert (model.config.bos_token_id, model.config.eos_token_id) == (end, end)


def test_a_checkpoint_says_where_it_comes_from(trained):
    """coconut.json beside the weights."""
    record = json.loads((trained.run_dir / "checkpoint_2" / "coconut.json").read_text())
    assert (record["epoch"], record["stage"], record["method"], record["c_thought"]) == (2, 1, "coconut", 1)
    assert record["versions"].keys() >= {"python", "mlx", "numpy", "tiktoken"}
    assert record["config"]["num_epochs"] == 2
    assert record["tokenizer"]["vocab_size"] == 261


@pytest.mark.parametrize("method", ["coconut", "cot"])
def test_export_writes_what_the_older_mlx_port_reads(method, trained, words, tmp_path, capsys):
    """nn.Linear layout under its names: base_causallm. for coconut, bare for the others."""
    out = tmp_path / "out.safetensors"
    assert export.main([str(trained.run_dir / "checkpoint_2"), str(out), "--method", method]) == 0
    tensors = mx.load(str(out))
    prefix = "base_causallm." if method == "coconut" else ""
    assert tensors[prefix + "h.0.attn.c_attn.weight"].shape == (96, 32)
    assert {name.split(".")[0 if not prefix else 1] for name in tensors} == {"wte", "wpe", "h", "ln_f"}
    back, original = canonical(read_tensors(out), out), read_tensors(trained.run_dir / "checkpoint_2")
    assert back.keys() == original.keys()
    assert all(mx.array_equal(back[name], original[name]).item() for name in original)


def test_a_run_directory_stands_for_its_best_checkpoint_of_the_last_stage(trained, tmp_path):
    """Stage 0 answers with all its steps in words: its accuracy is not that of the trained method.

    Of equal accuracies the first is the best, as in training (`best so far`, keep_checkpoints, save_only_improve).
    """
    for epoch, stage in ((1, 0), (2, 1), (3, 1), (4, 1)):
        folder = tmp_path / f"checkpoint_{epoch}"
        folder.mkdir()
        record = json.loads((trained.run_dir / "checkpoint_1" / "coconut.json").read_text())
        record |= {"epoch": epoch, "stage": stage}
        write_record(folder, record)
    for accuracies, best in (({1: 0.9, 2: 0.3, 3: 0.5, 4: 0.4}, 3), ({1: 0.9, 2: 0.3, 3: 0.5, 4: 0.5}, 3)):
        lines = [json.dumps({"epoch": epoch, "eval/acc": value}) for epoch, value in accuracies.items()]
        (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
        assert best_checkpoint(tmp_path).name == f"checkpoint_{best}"
    (tmp_path / "metrics.jsonl").unlink()
    assert best_checkpoint(tmp_path).name == "checkpoint_4"


def write_record(folder, record):
    from training import checkpoint

    checkpoint._seal(record)
    (folder / "coconut.json").write_text(json.dumps(record))


def test_an_untied_embedding_is_used_with_a_warning(reference, words, tmp_path, capsys):
    """The older port's alias may have been trained apart; GPT-2 has one table."""
    tensors = old_port(reference)
    tensors["embedding.weight"] = tensors["embedding.weight"] + 1
    path = write(tmp_path, tensors, "safetensors", reference)
    ours = our_logits(make_config(words, "cot", load_model_path=str(path)), words)
    np.testing.assert_allclose(ours, torch_logits(reference), rtol=0, atol=1e-5)
    assert "embedding.weight differs" in capsys.readouterr().err


def test_an_output_layer_of_its_own_is_refused(reference, words, tmp_path):
    """This GPT-2 would compute other logits than the model did."""
    tensors = hf_extras(reference)
    tensors["lm_head.weight"] = tensors["lm_head.weight"] + 1
    config = make_config(words, "cot", load_model_path=str(write(tmp_path, tensors, "safetensors", reference)))
    with pytest.raises(UserError, match=r"lm_head\.weight differs from wte\.weight"):
        our_logits(config, words)


def test_two_tensors_of_one_name_are_refused(reference, words, tmp_path):
    """Of a prefixed and a bare tensor, one would be lost."""
    tensors = named_tensors(reference)
    tensors["module.transformer.wpe.weight"] = tensors["wpe.weight"] + 1
    config = make_config(words, "cot", load_model_path=str(write(tmp_path, tensors, "safetensors", reference)))
    with pytest.raises(UserError, match=r"two different tensors for wpe\.weight"):
        our_logits(config, words)


def test_bfloat16_arrays_of_an_npz_file(tmp_path):
    """numpy has no such type: MLX writes two bytes that numpy calls V2."""
    values = mx.array([1.5, -2.0]).astype(mx.bfloat16)
    mx.savez(str(tmp_path / "half.npz"), x=values)
    assert mx.array_equal(read_tensors(tmp_path / "half.npz")["x"], values).item()


@pytest.mark.parametrize("start", [b"<", b"\x80", b"PK\0"])
def test_a_safetensors_file_is_told_by_its_header_whatever_its_size(start, tmp_path):
    """The file begins with the header's size, which can have the first bytes of a web page, a pickle or an archive."""
    tensors, unit = {"wte.weight": mx.ones((2, 3))}, 256 ** len(start)
    mx.save_safetensors(str(tmp_path / "a.safetensors"), tensors, {"pad": ""})
    [size] = struct.unpack("<Q", (tmp_path / "a.safetensors").read_bytes()[:8])
    pad = "x" * ((int.from_bytes(start, "little") - size) % unit)
    mx.save_safetensors(str(tmp_path / "a.safetensors"), tensors, {"pad": pad})
    assert (tmp_path / "a.safetensors").read_bytes().startswith(start)
    assert read_tensors(tmp_path / "a.safetensors").keys() == tensors.keys()


def test_a_tensor_larger_than_the_memory_is_refused(tmp_path):
    """A view of one number costs a torch file nothing, and would fill the memory when it is read."""
    torch.save({"wte.weight": torch.zeros(1).expand(10**13)}, tmp_path / "checkpoint_1")
    with pytest.raises(UserError, match=r"40,000\.0 GB, more than this machine's memory"):
        read_tensors(tmp_path / "checkpoint_1")


@pytest.mark.parametrize(("start", "what"), [
    (b"\x1f\x8b", "gunzip"), (b"\xfd7zXZ\x00", "unxz"), (b"BZh9", "bunzip2"), (b"\x28\xb5\x2f\xfd", "unzstd"),
    (b"GGUF", "GGUF"), (b"\x89HDF\r\n\x1a\n", "HDF5"),
])  # fmt: skip
def test_weights_of_another_kind_are_named(start, what, tmp_path):
    """Neither damaged nor cut off: packed, or of another program."""
    (tmp_path / "model").write_bytes(start + bytes(range(200)))
    with pytest.raises(UserError, match=what) as found:
        read_tensors(tmp_path / "model")
    assert "damaged" not in str(found.value)


def test_a_folder_named_torch_is_not_the_package(tmp_path, monkeypatch):
    torch.save({"wte.weight": torch.zeros(2)}, tmp_path / "model.pt")
    monkeypatch.setitem(sys.modules, "torch", types.ModuleType("torch"))
    with pytest.raises(UserError, match="`pip install torch` to open it here"):
        read_tensors(tmp_path / "model.pt")


def test_a_whole_module_of_torch_is_refused_by_its_reason(tmp_path):
    """And not with torch's advice to open it unsafely, nor with its escape codes for a terminal."""
    torch.save(torch.nn.Linear(2, 2), tmp_path / "model.pt")
    with pytest.raises(UserError, match=r"torch\.nn\.modules\.linear\.Linear was not an allowed") as found:
        read_tensors(tmp_path / "model.pt")
    assert "weights_only" not in str(found.value) and "\x1b" not in str(found.value)


def test_a_pickle_is_never_opened(tmp_path):
    """Neither a bare one nor one inside torch's or numpy's archive that holds more than tensors."""
    import pickle

    class Bomb:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "exploded"),))

    (tmp_path / "bare").write_bytes(pickle.dumps(Bomb()))
    torch.save({"weight": Bomb()}, tmp_path / "checkpoint_1")
    objects = np.empty(1, dtype=object)
    objects[0] = Bomb()
    np.savez(tmp_path / "objects.npz", weight=objects)
    for name in ("bare", "checkpoint_1", "objects.npz"):
        with pytest.raises(UserError, match=name):
            read_tensors(tmp_path / name)
    assert not (tmp_path / "exploded").exists()


def test_without_torch_its_files_are_an_error_that_says_what_to_install(reference, tmp_path, monkeypatch):
    """torch is no dependency of ours."""
    path = write(tmp_path, LAYOUTS["official cot"](reference), "torch", reference)
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(UserError, match="pip install torch"):
        read_tensors(path)


def test_a_run_directory_of_the_official_code_is_resumed(tmp_path, capsys):
    """Files of torch.save named checkpoint_N, among stray ones; the epochs behind N are trained."""
    from survival import Trial

    import run

    trial = Trial(tmp_path / "moved", {"num_epochs": 3, "reset_optimizer": True})
    trial.finish()
    official = tmp_path / "official" / "trial"
    official.mkdir(parents=True)
    tensors = read_tensors(trial.run_dir / "checkpoint_2")
    state = {f"base_causallm.{name}": torch.tensor(np.array(tensor)) for name, tensor in tensors.items()}
    torch.save(state, official / "checkpoint_2")
    (official / "checkpoint_12.pt").write_bytes(b"stray")
    (official / "wandb").mkdir()
    assert run.main([str(trial.folder / "trial.yaml"), f"save_path={official.parent}"]) == 0
    ours, expected = (read_tensors(folder / "checkpoint_3") for folder in (official, trial.run_dir))
    assert all(mx.array_equal(ours[name], expected[name]).item() for name in expected)
    assert "going on from" in capsys.readouterr().out
