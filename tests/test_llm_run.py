"""Runs of a tiny Llama through run.py: every method, resuming, two processes, --dry-run, and mistakes."""

import json
import re
import shutil
import string

import mlx.core as mx
import pytest
import yaml
from launched import Launch

from models import language

pytest.importorskip("mlx_lm", reason="requirements-llm.txt is not installed")
METHODS = {
    "cot": {"cot": True},
    "no_cot": {"no_cot": True},
    "no_thoughts": {"no_thoughts": True},
    "pause": {"coconut": True, "thought": "pause"},
    "icot": {"no_thoughts": True, "curriculum": "tokens", "tokens_per_epoch": 6},
    "coconut": {"coconut": True, "uniform_prob": 0.3},
}


@pytest.fixture
def llama(fixtures):
    return fixtures / "llm" / "llama"


@pytest.fixture
def write(llama, tmp_path):
    """Write a configuration: write(**keys) -> its file."""

    def call(**keys):
        data = {"train_path": llama.parent / "train.json", "val_path": llama.parent / "valid.json"}
        own = {"save_path": tmp_path / "runs", "name": "run", "c_thought": 2, "max_latent_stage": 2, "wandb": "off"}
        numbers = {"num_epochs": 3, "lr": 1e-3, "batch_size_training": 8, "max_new_tokens": 4}
        values = {"coconut": True} | own | numbers | data | {"model_id": llama} | keys
        if keys.get("cot") or keys.get("no_cot") or keys.get("no_thoughts"):
            values["coconut"] = False
        file = tmp_path / f"{values['name']}.yaml"
        file.write_text(yaml.safe_dump({k: str(v) if hasattr(v, "parts") else v for k, v in values.items()}))
        return file

    return call


def records(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def losses(folder) -> list[float]:
    return [record["train/loss"] for record in records(folder) if "train/loss" in record]


@pytest.mark.parametrize("name", METHODS)
def test_every_method_learns_and_its_checkpoint_evaluates_alike(name, write, tmp_path, call_main):
    file = write(name=name, **METHODS[name])
    outcome = call_main(file)
    assert outcome.status == 0, outcome.err
    folder = tmp_path / "runs" / name
    found = losses(folder)
    assert found[-1] < found[0]
    [last] = [record for record in records(folder) if record.get("epoch") == 3 and "eval/loss" in record]
    outcome = call_main(file, "only_eval=True", f"load_model_path={folder}/checkpoint_3", "name=again", "model_id=None")
    assert outcome.status == 0, outcome.err
    [again] = [record for record in records(tmp_path / "runs" / "again") if "eval/loss" in record]
    assert (again["eval/loss"], again["eval/acc"]) == (last["eval/loss"], last["eval/acc"])


def test_a_resumed_run_is_the_same_run(write, tmp_path, call_main):
    for epochs, name in ((4, "whole"), (2, "part")):
        assert call_main(write(name=name, num_epochs=epochs)).status == 0
    shutil.rmtree(tmp_path / "runs" / "part" / "checkpoint_2")
    outcome = call_main(write(name="part", num_epochs=4))
    assert outcome.status == 0 and "going on from" in outcome.out
    runs = [tmp_path / "runs" / name for name in ("whole", "part")]
    assert losses(runs[0]) == losses(runs[1])
    one, other = (mx.load(str(run / "checkpoint_4" / "model.safetensors")) for run in runs)
    assert one.keys() == other.keys() and all(mx.array_equal(one[key], other[key]).item() for key in one)


IN_TURN = """
import os, sys
sys.modules["torch"] = None  # mlx-lm's tokenizers do without, and its import takes longer than theirs
import run
group = run.join(os.environ)
run.join = lambda environment: group
sys.exit(max([run.main([config]) for config in sys.argv[1:]]))
"""


def test_two_processes_are_one(write, tmp_path, call_main):
    """The whole model and adapters, in turn, because each start imports mlx-lm and transformers for seconds."""
    (tmp_path / "in_turn.py").write_text(IN_TURN)
    methods = {"whole": {}, "adapters": {"lora_rank": 4}}
    files = [write(name=f"{name}-both", batch_size_training=4, **keys) for name, keys in methods.items()]
    with Launch(2, tmp_path / "hosts.json", *files, script=tmp_path / "in_turn.py") as launch:
        outcomes = launch.wait()
    assert [status for status, _, _ in outcomes] == [0, 0], outcomes
    for name, keys in methods.items():
        assert call_main(write(name=name, **keys)).status == 0
        assert losses(tmp_path / "runs" / f"{name}-both") == pytest.approx(losses(tmp_path / "runs" / name), rel=1e-5)


def test_a_dry_run_writes_nothing(write, tmp_path, call_main):
    outcome = call_main(write(lora_rank=4), "--dry-run")
    assert outcome.status == 0, outcome.err
    assert "of them train" in outcome.out and "nothing was written" in outcome.out
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: (f / "tokenizer.json").unlink(), "cannot read it"),
        (lambda f: (f / "tokenizer.json").write_text("{}"), "not a tokenizer.json"),
        (lambda f: [p.unlink() for p in f.glob("*tok*_*.json")], "eos_token"),
        (lambda f: edit(f / "config.json", model_type="rwkv_of_no_kind"), "no such model"),
        (lambda f: edit(f / "config.json", hidden_size=72), "do not fit the model"),
        (lambda f: edit(f / "config.json", num_hidden_layers=3), "is missing"),
        (lambda f: edit(f / "config.json", rope_scaling={"rope_type": "dynamic", "factor": 2}), "dynamic"),
        (lambda f: cut(f / "model.safetensors"), "damaged or cut off"),
        (lambda f: edit_tensor(f / "model.safetensors"), "not finite"),
        (lambda f: sentence_pieces(f / "tokenizer.json"), "SentencePiece"),
        (lambda f: widen(f / "tokenizer.json"), "its tokens have ids up to 7,000, and there are 483"),
    ],
)
def test_a_bad_model_folder_is_one_message(spoil, message, write, llama, tmp_path, call_main):
    folder = tmp_path / "model"
    shutil.copytree(llama, folder)
    spoil(folder)
    outcome = call_main(write(model_id=folder))
    assert outcome.status == 2 and "Traceback" not in outcome.err
    assert message in outcome.err
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("keys", [
    METHODS["cot"], METHODS["coconut"], METHODS["cot"] | {"lora_rank": 4}, METHODS["coconut"] | {"lora_rank": 4},
    METHODS["cot"] | {"lora_rank": 4, "quantize": 8},
])  # fmt: skip
def test_a_tokenizer_with_more_tokens_than_the_model_has_rows_is_one_message(keys, write, llama, tmp_path, call_main):
    """MLX reads past the end of a table without a word, or crashes there."""
    folder = tmp_path / "model"
    shutil.copytree(llama, folder)
    tokens = json.loads((folder / "tokenizer.json").read_text())
    added = tokens["added_tokens"]
    added += [added[-1] | {"id": 480 + i, "content": f"<|extra_{i}|>"} for i in range(20)]
    (folder / "tokenizer.json").write_text(json.dumps(tokens))
    outcome = call_main(write(model_id=folder, **keys))
    assert outcome.status == 2 and "Traceback" not in outcome.err
    expected = f"error: {folder}: its vocabulary has 480 rows; the tokenizer ({folder}) needs 500, or 503 with"
    assert expected in outcome.err
    assert not (tmp_path / "runs").exists()


def test_tables_of_unknown_names_have_a_row_for_each_token(write, llama, call_main, monkeypatch):
    """Some models call them embed_in or word_embeddings: no rows are added there for the special tokens."""
    monkeypatch.setattr(language, "TABLES", re.compile("word_embeddings"))
    outcome = call_main(write())
    assert outcome.status == 2
    assert f"{llama}: its vocabulary has 480 rows; the tokenizer ({llama}) needs 480, or 483 with" in outcome.err
    assert call_main(write(num_epochs=1, **METHODS["cot"])).status == 0


def widen(path) -> None:
    """Give a token an id behind a gap."""
    tokens = json.loads(path.read_text())
    tokens["model"]["vocab"][max(tokens["model"]["vocab"], key=len)] = 7000
    path.write_text(json.dumps(tokens))


def sentence_pieces(path) -> None:
    """A tokenizer that puts a space before every text, as that of Llama 2."""
    space = {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "always", "split": True}
    tokens = ["<|end_of_text|>", "\u2581", "\u00e9", *string.printable]
    model = {"type": "BPE", "vocab": {token: i for i, token in enumerate(dict.fromkeys(tokens))}, "merges": []}
    path.write_text(json.dumps({"version": "1.0", "model": model, "pre_tokenizer": space, "decoder": space}))


def edit(path, **values) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def cut(path) -> None:
    path.write_bytes(path.read_bytes()[:-1000])


def edit_tensor(path) -> None:
    tensors = mx.load(str(path))
    mx.eval(tensors)
    tensors["model.norm.weight"][3] = mx.nan
    mx.save_safetensors(str(path), tensors)


def test_without_mlx_lm_it_says_what_to_install(write, call_main, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "mlx_lm.utils", None)
    outcome = call_main(write())
    assert outcome.status == 2
    assert "pip install -r requirements-llm.txt" in outcome.err


@pytest.mark.parametrize("keys", [{}, {"bf16": True}, {"lora_rank": 4, "quantize": 8}])
def test_a_gpu_gets_as_many_rows_at_once_as_its_memory_holds(keys, write, tmp_path, call_main, gpu_code, monkeypatch):
    """The estimate is among the run's first lines and those of a dry run; steps have other rows and equal losses."""
    found = {}
    for name, size in (("large", 80_000_000_000), ("small", 40_000_000)):
        monkeypatch.setattr(mx, "device_info", lambda size=size: {"total_memory": size})
        outcome = call_main(write(name=name, num_epochs=3, gradient_accumulation_steps=4, **keys))
        assert outcome.status == 0, outcome.err
        [line] = [line for line in outcome.out.splitlines() if line.startswith("memory: about ")]
        found[name] = int(re.search(r"for micro-batches of (\d+) of the longest", line)[1])
    assert line in call_main(tmp_path / "small.yaml", "--dry-run").out.splitlines()
    assert 1 < found["small"] < found["large"] == 32
    one, other = (losses(tmp_path / "runs" / name) for name in ("small", "large"))
    assert one == pytest.approx(other, rel=2e-3 if "bf16" in keys else 1e-5) and len(one) == 3


@pytest.mark.parametrize(("keys", "warned"), [({"quantize": 8}, True), ({}, False)])
def test_a_quantized_base_on_a_cpu_is_warned_of(keys, warned, cpu, write, call_main):
    outcome = call_main(write(lora_rank=4, **keys), "--dry-run")
    assert outcome.status == 0
    assert ("a quantized base takes about ten times as long on a CPU" in outcome.err) == warned


def test_a_gpu_that_is_too_small_for_one_item(write, tmp_path, call_main, gpu_code, monkeypatch):
    """Activations are not computed again where adapters have dropout, so that is not advised then."""
    monkeypatch.setattr(mx, "device_info", lambda: {"total_memory": 1000})
    outcome = call_main(write(name="one"), "--dry-run")
    assert "one item may not fit into this GPU's memory; try grad_checkpoint: True" in outcome.err
    outcome = call_main(write(name="two", lora_rank=4, lora_dropout=0.1), "--dry-run")
    assert "one item may not fit into this GPU's memory\n" in outcome.err
