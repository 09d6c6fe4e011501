"""Every mistake of the user's: exit status 2, one message that names the file or key, and nothing left behind.

Each case breaks one thing of a small working run and returns the command line; its decorator says what the message must
hold. {t} stands for the run's folder.
"""

import io
import json
import os
import pickle
import re
import struct
import zipfile

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from coconut import Coconut
from config import Config
from models.loading import load_gpt2
from models.source import find_source
from startup import blas  # noqa: F401  before mlx
from text.tokenizer import load_tokenizer

CASES = {}
GOOD_ITEM = {"question": "What is 1 plus 2?", "steps": ["<<1+2=3>>"], "answer": "3"}
LFS_POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 548118077\n"
WEB_PAGE = "\n<!doctype html>\n<html><body>404</body></html>\n"


def case(*expected: str):
    def register(function):
        CASES[function.__name__] = (function, expected)
        return function

    return register


@pytest.mark.parametrize("name", CASES)
def test_one_message_status_2_and_nothing_left(name, tiny, call_main):
    build, expected = CASES[name]
    arguments = build(tiny)
    arguments = arguments if isinstance(arguments, list) else [arguments]
    check(call_main(*arguments), expected, tiny)


@pytest.mark.parametrize("name", ["empty_yaml", "items_without_a_key", "weights_cut_off", "model_id_that_is_nowhere"])
def test_the_same_from_the_shell(name, tiny, run_cli):
    build, expected = CASES[name]
    check(run_cli(build(tiny)), expected, tiny)


def check(outcome, expected, tiny):
    assert outcome.status == 2, outcome
    assert "Traceback" not in outcome.out + outcome.err
    [message] = re.findall(r"^error: .*", outcome.err, flags=re.MULTILINE | re.DOTALL)
    assert message.count("error: ") == 1
    for fragment in expected:
        assert fragment.replace("{t}", str(tiny.folder)) in message, message
    assert len(message) < 1500
    assert not tiny.runs.exists()


def test_the_unbroken_run_works(tiny, call_main):
    """Else every case above might fail for another reason than its own."""
    outcome = call_main(tiny.config(num_epochs=1))
    assert outcome.status == 0, outcome.err
    assert call_main(evaluating(tiny, make_checkpoint(tiny))).status == 0


# The command line and the configuration


@case("{t}/nowhere.yaml: cannot read the configuration")
def no_such_config(t):
    return t.folder / "nowhere.yaml"


@case("{t}: cannot read the configuration")
def config_is_a_folder(t):
    return t.folder


@case("{t}/empty.yaml: expected `key: value` lines")
def empty_yaml(t):
    return t.write("empty.yaml", "# nothing\n")


@case("{t}/list.yaml: expected `key: value` lines")
def yaml_is_a_list(t):
    return t.write("list.yaml", "- coconut\n- cot\n")


@case("{t}/bad.yaml: not valid YAML", "line 2")
def yaml_is_broken(t):
    return t.write("bad.yaml", "name: a\ncot: [True\nlr: 1\n")


@case("{t}/latin.yaml: not a text file in UTF-8")
def config_is_not_utf8(t):
    return t.write("latin.yaml", "name: Tomás\n".encode("latin-1"))


@case("{t}/typed.yaml", "1e-4x")
def yaml_number_is_none(t):
    """The official files write !!float; PyYAML raises ValueError on a typing error behind it."""
    return t.write("typed.yaml", t.config().read_text() + '\nlr: !!float "1e-4x"\n')


@case("{t}/date.yaml", "month")
def yaml_date_is_none(t):
    """A value that looks like a date, and is none: PyYAML raises ValueError."""
    return t.write("date.yaml", t.config(debug=...).read_text() + "\ndebug: 2024-13-45\n")


@case("{t}/deep.yaml: not valid YAML: it is nested too deeply")
def yaml_is_nested_deeply(t):
    return t.write("deep.yaml", "name: " + "[" * 20_000)


@case("{t}/keys.yaml: not valid YAML: line 1: expected the name of a key")
def yaml_key_is_a_list(t):
    return t.write("keys.yaml", "? [a, b]\n: c\n")


@case("lr: expected a number, found [[[...]")
def yaml_anchors_make_billions_of_elements(t):
    lines = ["a0: &a0 [x]", *(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 13)), "lr: *a12"]
    return t.write("laugh.yaml", t.config(lr=...).read_text() + "\n".join(lines))


@case("{t}/pipe: cannot read the configuration (not a regular file)")
def config_is_a_pipe(t):
    os.mkfifo(t.folder / "pipe")
    return t.folder / "pipe"


@case("/dev/zero: cannot read the configuration (not a regular file)")
def config_is_a_device(t):
    return "/dev/zero"


def path_of_a_kind(key, value, expected):
    CASES[f"{key}_is_{value[:9]!a}"] = (
        lambda t: t.config(**{key: value}),
        (f"{key}: expected a path, found {expected}",),
    )


for path_key in ("save_path", "name", "model_id", "load_model_path", "model_config_path", "tokenizer", "train_path"):
    path_of_a_kind(path_key, "~a\0b", "a null character")
    path_of_a_kind(path_key, "x" * 300, "one of 300 characters")
    path_of_a_kind(path_key, "half \ud800", "'utf-8' codec can't encode")


def path_is_a_pipe(key):
    def build(t):
        os.mkfifo(t.folder / "pipe")
        return t.config(**{key: t.folder / "pipe"})

    CASES[f"{key}_is_a_pipe"] = (build, ("{t}/pipe", "not a regular file"))


for path_key in ("train_path", "val_path", "tokenizer", "load_model_path", "model_config_path"):
    path_is_a_pipe(path_key)


@case("lr", "[[[")
def override_is_nested_deeply(t):
    return [t.config(), "lr=" + "[" * 5000]


@case("lr", "!!float")
def override_number_is_none(t):
    return [t.config(), "lr=!!float fast"]


@case("epoch_per_stage: unknown key; did you mean epochs_per_stage?")
def unknown_key(t):
    return t.config(epoch_per_stage=3)


@case("'--lr' on the command line: expected key=value")
def override_without_a_value(t):
    return [t.config(), "--lr"]


@case("learning_rate: unknown key")
def override_of_an_unknown_key(t):
    return [t.config(), "learning_rate=1e-4"]


@case("val_path: missing")
def missing_key(t):
    return t.config(val_path=...)


@case("batch_size_training: expected a whole number, found 'many'")
def wrong_type(t):
    return [t.config(), "batch_size_training=many"]


@case("uniform_prob: expected at most 1")
def out_of_range(t):
    return t.config(uniform_prob=2)


@case("seed: ")
def seed_beyond_all_numbers(t):
    return t.config(seed=10**400)


@case("seed: ")
def seed_of_more_than_64_bits(t):
    return t.config(seed=2**64)


@case("method: expected exactly one", "found coconut and cot")
def two_methods(t):
    return t.config(cot=True)


@case("method: expected exactly one", "found none")
def no_method(t):
    return t.config(coconut=False)


@case("train_path: still the placeholder")
def placeholder_left_in(t):
    return t.config(train_path="YOUR_PATH/gsm_train.json")


@case("only_eval: nothing to evaluate")
def only_eval_without_weights(t):
    return t.config(only_eval=True)


@case("model: name model_id, load_model_path or model_config_path")
def no_model(t):
    return t.config(model_config_path=...)


@case("resume: 2 leaves nothing to train, because num_epochs is 2")
def resume_behind_the_end(t):
    return t.config(resume=2)


@case("4 problems", "seed: ", "lr: ", "two: unknown key", "train_path: missing")
def several_problems_at_once(t):
    return t.config(seed="x", lr="y", two=2, train_path=...)


@case("save_path", "{t}/words.json")
def save_path_is_a_file(t):
    return t.config(save_path=t.words)


@case("model_config_path", "{t}/nowhere")
def no_such_model_config(t):
    return t.config(model_config_path=t.folder / "nowhere")


# Data


@case("{t}/nowhere.json: cannot read the data")
def no_such_data(t):
    return t.config(train_path=t.folder / "nowhere.json")


@case("{t}/empty.json", "empty")
def data_file_is_empty(t):
    return t.config(val_path=t.write("empty.json", ""))


@case("{t}/none.json", "empty")
def data_list_is_empty(t):
    return t.config(train_path=t.write("none.json", []))


@case("{t}/data.json", "not JSON")
def data_is_a_lfs_pointer(t):
    return t.config(train_path=t.write("data.json", LFS_POINTER))


@case("{t}/data.json", "not JSON")
def data_is_a_web_page(t):
    return t.config(train_path=t.write("data.json", WEB_PAGE))


@case("{t}/data.json", "not JSON", "line 1")
def data_is_cut_off(t):
    return t.config(train_path=t.write("data.json", json.dumps([GOOD_ITEM] * 3)[:-20]))


@case("{t}/data.json", "UTF-8")
def data_is_not_utf8(t):
    return t.config(train_path=t.write("data.json", '["é"]'.encode("latin-1")))


@case("{t}/data.json: expected a JSON list")
def data_is_one_object(t):
    return t.config(train_path=t.write("data.json", json.dumps({"items": [GOOD_ITEM]}, indent=1)))


@case("{t}/data.json", "item 1", "answer", "item 2", "question", "item 3", "steps")
def items_without_a_key(t):
    lacking = [{k: v for k, v in GOOD_ITEM.items() if k != key} for key in ("answer", "question", "steps")]
    return t.config(train_path=t.write("data.json", [GOOD_ITEM, *lacking]))


@case("{t}/data.json", "item 0", "item 1", "answer", "item 2", "steps[1]")
def items_of_other_types(t):
    items = ["text", {**GOOD_ITEM, "answer": 3}, {**GOOD_ITEM, "steps": ["a", 5]}]
    return t.config(train_path=t.write("data.json", items))


@case("{t}/data.json", "... and ")
def many_bad_items_are_counted_not_listed(t):
    return t.config(train_path=t.write("data.json", [{}] * 1000))


@case("{t}/data.json", "item 1", "128 positions")
def item_longer_than_the_model(t):
    return t.config(train_path=t.write("data.json", [GOOD_ITEM, {**GOOD_ITEM, "question": "why? " * 30}]))


@case("{t}/data.json", "128 positions")
def validation_item_longer_than_the_model(t):
    return t.config(val_path=t.write("data.json", [{**GOOD_ITEM, "steps": ["long " * 30]}]))


# Tokenizer


@case("tokenizer: {t}/nowhere.tiktoken does not exist")
def no_such_tokenizer(t):
    return t.config(tokenizer=t.folder / "nowhere.tiktoken")


@case("tokenizer: {t}/words.tiktoken")
def tokenizer_is_damaged(t):
    return t.config(tokenizer=t.write("words.tiktoken", "IQ== 0\nIg== \n"))


@case("tokenizer: {t}/list.json")
def tokenizer_is_no_list_of_words(t):
    return t.config(tokenizer=t.write("list.json", {"a": 1}))


@case("{t}/model: its tokenizer files are not GPT-2's")
def tokenizer_of_the_model_folder_is_damaged(t):
    folder = make_checkpoint(t)
    (folder / "tokenizer.json").write_text('{"model": {}}')
    return t.config(model_id=folder, tokenizer=...)


# Models and weights


def make_tensors(t) -> dict:
    config = Config(save_path="", name="", val_path="", coconut=True, model_config_path=str(t.model))
    model = Coconut(load_gpt2(find_source(config), config, load_tokenizer(str(t.words))))
    return dict(tree_flatten(model.parameters()))


def make_checkpoint(t, change=None, tensors=None):
    """A model folder as transformers writes it; `change` breaks its tensors in place."""
    tensors = make_tensors(t) if tensors is None else tensors
    if change:
        change(tensors)
    folder = t.folder / "model"
    folder.mkdir()
    mx.save_safetensors(str(folder / "model.safetensors"), tensors)
    (folder / "config.json").write_text(t.model.read_text())
    return folder


def evaluating(t, checkpoint):
    return t.config(only_eval=True, load_model_path=checkpoint, model_config_path=..., train_path=...)


def with_weights(t, content: bytes | str):
    """A checkpoint folder whose weights file holds something else."""
    folder = make_checkpoint(t)
    path = folder / "model.safetensors"
    if isinstance(content, str):
        content = content.encode()
    path.write_bytes(content)
    return evaluating(t, folder)


@case("load_model_path", "{t}/nowhere")
def no_such_checkpoint(t):
    return t.config(load_model_path=t.folder / "nowhere")


@case("{t}/model/model.safetensors", "Git LFS pointer")
def weights_are_a_lfs_pointer(t):
    return with_weights(t, LFS_POINTER)


@case("{t}/model/model.safetensors", "web page")
def weights_are_a_web_page(t):
    return with_weights(t, WEB_PAGE)


@case("{t}/model/model.safetensors", "pickle")
def weights_are_a_pickle(t):
    return with_weights(t, pickle.dumps({"wte.weight": [1.0]}))


@case("{t}/model/model.safetensors", "safetensors")
def weights_are_empty(t):
    return with_weights(t, b"")


@case("{t}/model/model.safetensors", "damaged or cut off")
def weights_cut_off(t):
    return with_weights(t, (make_checkpoint_bytes(t))[:-100])


@case("{t}/model/model.safetensors", "damaged or cut off")
def weights_cut_off_in_the_header(t):
    return with_weights(t, make_checkpoint_bytes(t)[:50])


def make_checkpoint_bytes(t) -> bytes:
    path = t.folder / "whole.safetensors"
    mx.save_safetensors(str(path), make_tensors(t))
    return path.read_bytes()


@case("{t}/weights.npz", "damaged")
def npz_cut_off(t):
    path = t.folder / "weights.npz"
    mx.savez(str(path), **make_tensors(t))
    path.write_bytes(path.read_bytes()[:-200])
    return t.config(load_model_path=path)


@case("{t}/archive.npz", "no weights")
def zip_without_weights(t):
    path = t.folder / "archive.npz"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "hello")
    return t.config(load_model_path=path)


@case("{t}/weights.npz", "damaged")
def npz_whose_header_promises_more_than_there_is(t):
    """MLX would end the process with a segmentation fault."""
    path, header = t.folder / "weights.npz", io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": (2**33,)})
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("wte.weight.npy", header.getvalue() + bytes(64))
    return t.config(load_model_path=path)


@case("{t}/weights.npz", "unpack to 4.3 GB")
def npz_that_unpacks_to_gigabytes(t):
    path = t.folder / "weights.npz"
    np.savez_compressed(path, x=np.zeros(1000, dtype=np.float32))
    content = bytearray(path.read_bytes())
    entry = content.index(b"PK\x01\x02")  # of the archive's directory; at 24 is the unpacked size
    content[entry + 24 : entry + 28] = struct.pack("<I", 2**32 - 2)
    path.write_bytes(content)
    return t.config(load_model_path=path)


@case("{t}/model: the weights do not fit", "transformer.h.1.mlp.c_fc.bias is missing")
def a_tensor_is_missing(t):
    return evaluating(t, make_checkpoint(t, lambda tensors: tensors.pop("transformer.h.1.mlp.c_fc.bias")))


@case("{t}/model", "transformer.wte.weight is missing")
def the_embedding_is_missing(t):
    return evaluating(t, make_checkpoint(t, lambda tensors: tensors.pop("transformer.wte.weight")))


@case("{t}/model: the weights do not fit", "h.2.ln_1.bias is not a parameter")
def a_tensor_too_many(t):
    return evaluating(t, make_checkpoint(t, lambda tensors: tensors.update({"h.2.ln_1.bias": mx.zeros(16)})))


@case("{t}/model", "transformer.ln_f.weight has shape (17,), expected (16,)")
def a_tensor_of_another_shape(t):
    return evaluating(t, make_checkpoint(t, lambda tensors: tensors.update({"transformer.ln_f.weight": mx.ones(17)})))


@case("{t}/model", "transformer.wte.weight")
def the_embedding_is_one_number(t):
    return evaluating(t, make_checkpoint(t, lambda tensors: tensors.update({"transformer.wte.weight": mx.array(1.0)})))


@case("{t}/model", "transformer.wpe.weight holds values that are not finite")
def a_tensor_holds_nan(t):
    def change(tensors):
        values = np.array(tensors["transformer.wpe.weight"])
        values[3, 4] = np.nan
        tensors["transformer.wpe.weight"] = mx.array(values)

    return evaluating(t, make_checkpoint(t, change))


@case("{t}/model", "100 rows", "263")
def vocabulary_of_another_size(t):
    def change(tensors):
        tensors["transformer.wte.weight"] = tensors["transformer.wte.weight"][:100]

    return evaluating(t, make_checkpoint(t, change))


@case("{t}/model: has no rows for the three special tokens", "`<<`")
def markers_without_a_prototype(t):
    t.write("words.json", ["###"])

    def change(tensors):  # a model of these words, without markers
        tensors["transformer.wte.weight"] = tensors["transformer.wte.weight"][:258]

    return evaluating(t, make_checkpoint(t, change))


@case("{t}/model", "config.json")
def no_config_beside_the_weights(t):
    folder = make_checkpoint(t)
    (folder / "config.json").unlink()
    return evaluating(t, folder)


@case("{t}/model", "holds no weights")
def folder_without_weights(t):
    folder = make_checkpoint(t)
    (folder / "model.safetensors").unlink()
    return t.config(model_id=folder, model_config_path=...)


@case("model.safetensors.index.json: names files that are not there", "part-2")
def a_shard_is_missing(t):
    folder = make_checkpoint(t)
    index = {"weight_map": {"transformer.wte.weight": "model.safetensors", "transformer.wpe.weight": "part-2"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return evaluating(t, folder)


@case("{t}/model/model.safetensors.index.json")
def the_index_of_shards_is_damaged(t):
    folder = make_checkpoint(t)
    (folder / "model.safetensors.index.json").write_text("[]")
    return evaluating(t, folder)


@case("{t}/bad.json", "config.json")
def model_config_is_not_json(t):
    return t.config(model_config_path=t.write("bad.json", "{"))


@case("{t}/bad.json", "config.json")
def model_config_is_a_list(t):
    return t.config(model_config_path=t.write("bad.json", "[]"))


def model_config(**changes):
    """A case whose model config has these values."""

    def build(t):
        return t.config(model_config_path=t.write("bad.json", {**json.loads(t.model.read_text()), **changes}))

    return build


BAD_MODEL_CONFIGS = {
    "not llama's config.json: vocab_size, hidden_size, num_hidden_layers": {"model_type": "llama"},
    "n_embd 15 is not a multiple of n_head 2": {"n_embd": 15},
    "its vocabulary has 100 rows; the tokenizer": {"vocab_size": 100},
    "n_layer: expected a positive whole number": {"n_layer": 0},
    "n_positions: expected a positive whole number": {"n_positions": "many"},
    "activation_function: expected gelu_new": {"activation_function": "relu"},
    "scale_attn_by_inverse_layer_idx: not supported": {"scale_attn_by_inverse_layer_idx": True},
    "resid_pdrop": {"resid_pdrop": 1.5},
    "attn_pdrop": {"attn_pdrop": None},
    "layer_norm_epsilon": {"layer_norm_epsilon": "small"},
    "initializer_range": {"initializer_range": "wide"},
    "n_inner": {"n_inner": -3},
    "scale_attn_weights: expected True, found False": {"scale_attn_weights": False},
    "tie_word_embeddings: expected True, found False": {"tie_word_embeddings": False},
    "bias: expected True, found False": {"bias": False},
    "position_embedding_type: expected absolute": {"position_embedding_type": "relative_key"},
    "reorder_and_upcast_attn: not supported": {"reorder_and_upcast_attn": True},
    "add_cross_attention: not supported": {"add_cross_attention": True},
    "quantization: not supported": {"quantization": {"bits": 4}},
    "pruned_heads: not supported": {"pruned_heads": {"0": [1]}},
    "hidden_size 32 and n_embd 16 mean the same": {"hidden_size": 32},
    "hidden_size 16 and n_embd 16 mean the same": {"hidden_size": 16},
    "n_ctx 64 and n_positions 128 mean the same": {"n_ctx": 64},
    "n_layers: unknown key; did you mean n_layer?": {"n_layers": 2},
    "intermediate_size: unknown key; did you mean n_inner?": {"intermediate_size": 64},
    "dropout: unknown key; did you mean embd_pdrop": {"dropout": 0.1},
    "layer_norm_epsilon: expected a number above 0": {"layer_norm_epsilon": 0},
    "n_layer: expected a positive whole number up to 10,000": {"n_layer": 10**7},
    "n_embd: expected a positive whole number up to": {"n_embd": 10**400},
    "n_positions: expected a positive whole number up to": {"n_positions": True},
    "a fresh model: 2 layers, 1,000,000 wide": {"n_embd": 10**6},
}
for expected_text, broken in BAD_MODEL_CONFIGS.items():
    CASES[f"model_config_with_{next(iter(broken))}_{next(iter(broken.values()))}"] = (
        model_config(**broken),
        (expected_text,) if expected_text.startswith("a fresh model") else ("{t}/bad.json", expected_text),
    )


@case("initializer_range: 0")
def fresh_weights_that_are_all_zero(t):
    return t.config(initializer_range=0)


@case("{t}/deep.json", "nested too deeply")
def model_config_that_is_nested_deeply(t):
    return t.config(model_config_path=t.write("deep.json", "[" * 200_000))


@case("model_id: no-such/model-anywhere")
def model_id_that_is_nowhere(t):
    return t.config(model_id="no-such/model-anywhere", model_config_path=...)


@case("model_id: what is this? is neither a folder nor a Hugging Face repository id")
def model_id_that_is_no_name(t):
    return t.config(model_id="what is this?", model_config_path=...)
