"""The configuration: official spellings, precedence, problems reported at once, derived values, and help."""

import dataclasses
import re
from types import SimpleNamespace

import pytest

from config import FIELDS, Config, load_config, usage
from dataset import Curriculum
from methods import METHOD_KEYS
from training.checkpoint import TrainState
from training.trainer import Trainer
from utils import UserError

OFFICIAL_TRAIN = """
# the official repository's own spelling (args/gsm_coconut.yaml)
project: coconut
save_path: /somewhere
name: gsm-coconut

only_eval: False

coconut: True
cot: False
no_thoughts: False
no_cot: False

c_thought: 2
epochs_per_stage: 3
max_latent_stage: 3
pad_latent_to_max: True

save_only_improve: False
uniform_prob: 0.0
model_id: openai-community/gpt2
load_model_path: checkpoints/gsm-cot/checkpoint_6
seed: 0
resume: 3
bf16: False
train_path: data/gsm_train.json
val_path: data/gsm_valid.json
reset_optimizer: True
batch_size_training: 32
debug: False
gradient_accumulation_steps: 1
num_epochs: 25
lr: !!float "1e-4"
weight_decay: !!float "0.01"
"""
OFFICIAL_COT = """
save_path: /somewhere
name: gsm-cot
cot: True
load_model_path: None
model_id: openai-community/gpt2
train_path: data/gsm_train.json
val_path: data/gsm_valid.json
num_epochs: 25
lr: !!float "1e-4"
"""
OLDER_PORT = """
# the older MLX port's spelling: no model_id, a model_config_path, 1e-4 without a dot
project: "coconut"
save_path: "./checkpoints"
name: "prosqa-coconut"
coconut: true
c_thought: 1
epochs_per_stage: 5
max_latent_stage: 6
load_model_path: "None"
model_config_path: "args/gpt2.json"
train_path: "data/prosqa_train.json"
val_path: "data/prosqa_valid.json"
num_epochs: 50
lr: 1e-4
weight_decay: 1e-2
reset_optimizer: true
"""
SMALL = "save_path: runs\nname: a\ncot: True\nmodel_id: gpt2\ntrain_path: t.json\nval_path: v.json\n"


@pytest.fixture
def load(tmp_path):
    """load(text, *overrides): the configuration of a YAML text."""

    def call(text, *overrides) -> Config:
        path = tmp_path / "config.yaml"
        path.write_text(text, encoding="utf-8")
        return load_config(str(path), overrides)

    return call


def problems_of(load, text, *overrides) -> list[str]:
    with pytest.raises(UserError) as caught:
        load(text, *overrides)
    title, *problems = str(caught.value).split("\n")
    assert "config.yaml" in title
    assert all(problem.startswith("  - ") for problem in problems)
    return [problem[4:] for problem in problems]


def test_official_yaml_loads_as_it_is(load):
    config = load(OFFICIAL_TRAIN)
    assert (config.lr, config.weight_decay) == (1e-4, 0.01)
    assert (config.method.name, config.c_thought, config.resume, config.num_epochs) == ("coconut", 2, 3, 25)
    assert config.reset_optimizer is True
    assert config.load_model_path == "checkpoints/gsm-cot/checkpoint_6"


def test_none_as_a_word_is_none(load):
    assert load(OFFICIAL_COT).load_model_path is None
    assert load(OFFICIAL_COT, "load_model_path=x").load_model_path == "x"
    assert load(SMALL, "tokenizer=None").tokenizer is None
    assert load(SMALL, "tokenizer=null").tokenizer is None
    assert load(SMALL, "max_new_tokens=").max_new_tokens is None


def test_older_ports_yaml_loads_as_it_is(load):
    config = load(OLDER_PORT)
    assert config.model_id is None
    assert config.load_model_path is None
    assert config.model_config_path == "args/gpt2.json"
    assert (config.lr, config.weight_decay) == (1e-4, 1e-2)


@pytest.mark.parametrize("text", ["1e-4", "1.0e-4", "0.0001", '"1e-4"', '!!float "1e-4"', "1E-4"])
def test_every_spelling_of_a_number(load, text):
    assert load(SMALL + f"lr: {text}\n").lr == 1e-4
    assert load(SMALL, f"lr={text}").lr == 1e-4


def test_byte_order_mark_and_windows_lines_are_fine(load):
    assert load("\ufeff" + SMALL.replace("\n", "\r\n")) == load(SMALL)


def test_overrides_win_over_the_file_and_the_file_over_defaults(load):
    assert load(SMALL).seed == 0
    assert load(SMALL + "seed: 1\n").seed == 1
    assert load(SMALL + "seed: 1\n", "seed=2").seed == 2
    assert load(SMALL, "seed=2", "seed=3").seed == 3
    assert load(SMALL, "name=a=b").name == "a=b"
    assert load(SMALL, "cot=False", "coconut=True").method.name == "coconut"


def test_all_problems_are_reported_at_once(load):
    text = "save_path: YOUR_PATH_TO_SAVE\ncoconut: True\ncot: True\nlr: fast\nseed: -1\nbatchsize: 3\nbf16: 1\n"
    found = problems_of(load, text, "num_epochs")
    assert [problem.split(":")[0] for problem in found] == [
        "'num_epochs' on the command line",
        "lr",
        "seed",
        "batchsize",
        "bf16",
        "name",
        "val_path",
        "save_path",
        "method",
        "train_path",
        "model",
    ]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("epoch_per_stage: 3", "epoch_per_stage: unknown key; did you mean epochs_per_stage?"),
        ("learning_speed: 3", "learning_speed: unknown key; `python run.py --help` lists the keys"),
        ("seed: -1", "seed: expected at least 0, found -1"),
        ("uniform_prob: 1.5", "uniform_prob: expected at most 1, found 1.5"),
        ("batch_size_training: 0", "batch_size_training: expected at least 1, found 0"),
        ("num_epochs: 1e30", "expected at most 1000000000, found 1000000000000000019884624838656"),
        ("num_epochs: 2.5", "num_epochs: expected a whole number, found 2.5 (float)"),
        ("seed: true", "seed: expected a whole number, found True (bool)"),
        ("debug: 1", "debug: expected True or False, found 1 (int)"),
        ("debug: maybe", "debug: expected True or False, found 'maybe' (str)"),
        ("lr: .nan", "lr: expected a number, found nan (float)"),
        ("lr: None", "lr: expected a number, found nothing (None)"),
        ("lr: [1]", "lr: expected a number, found [1] (list)"),
        ("reset_optimizer: never", "reset_optimizer: expected True or False or `stage`, found 'never' (str)"),
        ("no_cot: True", "expected exactly one of coconut, cot, no_cot, no_thoughts to be True, found cot and no_cot"),
        ("cot: False", "expected exactly one of coconut, cot, no_cot, no_thoughts to be True, found none"),
        ("val_path: YOUR_PATH/x.json", "val_path: still the placeholder 'YOUR_PATH/x.json'; put your own path there"),
        ("train_path: None", "train_path: missing; needed unless only_eval is True"),
        ("model_id: None", "model: name model_id, load_model_path or model_config_path"),
        ("val_path: $NOT_SET/x", "val_path: expected a path, found a user or variable that is not there: $NOT_SET/x"),
        ("save_path: ~no-one/x", "save_path: expected a path, found a user or variable that is not there: ~no-one/x"),
        ("resume: 1", "resume: 1 leaves nothing to train, because num_epochs is 1"),
    ],
)
def test_one_problem_is_one_line_that_names_the_key(load, line, expected):
    [problem] = problems_of(load, SMALL, line.replace(": ", "=", 1))
    assert problem.endswith(expected)


def test_only_eval_needs_weights_but_no_training_data(load):
    text = SMALL.replace("t.json", "None") + "only_eval: True\nresume: 7\n"
    assert load(text).train_path is None
    fresh = text.replace("model_id: gpt2", "model_id: None\nmodel_config_path: gpt2.json")
    [problem] = problems_of(load, fresh)
    assert problem == "only_eval: nothing to evaluate; name a checkpoint with load_model_path"
    assert load(fresh, "load_model_path=checkpoint_3").only_eval


@pytest.mark.parametrize("name", [".", "./", "..", "../other", "a/../..", "../../x", "/tmp/x", "a/../../b"])
def test_a_name_stays_inside_save_path(name, load):
    [problem] = problems_of(load, OFFICIAL_COT, f"name={name}")
    assert problem.startswith("name: expected a folder inside save_path, found")


@pytest.mark.parametrize("name", ["checkpoint_3", "a/checkpoint_3", "a/state_1_2/b", "checkpoint_3.safetensors"])
def test_a_name_is_none_of_a_saved_folder(name, load):
    """A run inside another run's checkpoint would be deleted with it."""
    [problem] = problems_of(load, OFFICIAL_COT, f"name={name}")
    assert re.match("name: expected .* found .*a run calls its saved folders so", problem)


@pytest.mark.parametrize("name", ["x", "a/b", "checkpoint_3-eval", "state_1", ".hidden", "..x", "a/../b"])
def test_a_name_may_have_folders(name, load):
    assert load(OFFICIAL_COT, f"name={name}").name == name


def test_every_key_has_type_default_and_meaning_in_help():
    text = usage()
    keys = dict(zip(text.splitlines()[6:], text.splitlines()[7:], strict=False))
    shown = {
        line.split()[0]: (line, meaning) for line, meaning in keys.items() if line.startswith("  ") and line[2] != " "
    }
    assert list(shown) == list(FIELDS) == [f.name for f in dataclasses.fields(Config) if f.name != "resume_given"]
    for name, (line, meaning) in shown.items():
        assert len(meaning.strip()) > 10, name
        assert "required" in line or f"default {FIELDS[name].default})" in line


def test_official_keys_are_all_there():
    """The issue's list."""
    official = """project save_path name only_eval coconut cot no_thoughts no_cot c_thought epochs_per_stage
        max_latent_stage pad_latent_to_max save_only_improve uniform_prob model_id load_model_path model_config_path
        seed resume bf16 train_path val_path reset_optimizer batch_size_training debug gradient_accumulation_steps
        num_epochs lr weight_decay tokenizer max_new_tokens batch_size_eval"""
    assert set(official.split()) <= set(FIELDS)


def test_a_config_cannot_be_changed(load):
    with pytest.raises(dataclasses.FrozenInstanceError):
        load(SMALL).seed = 1


@pytest.mark.parametrize(
    "text",
    [
        OFFICIAL_TRAIN,
        OFFICIAL_COT,
        OLDER_PORT,
        SMALL.replace("name: a", 'name: "ünï # x: y"') + "seed: 7\n",
        SMALL.replace("name: a", "name: 12"),
    ],
)
def test_resolved_yaml_loads_again_and_is_equal(load, text):
    config = load(text)
    resolved = config.to_yaml()
    assert load(resolved) == config
    assert all(f"\n{name}: " in "\n" + resolved for name in FIELDS)


# Derived values


def make(method: str, **keys) -> Config:
    return Config(save_path="runs", name="a", val_path="v.json", **{method: True}, **keys)


@pytest.mark.parametrize(
    ("method", "stages"),
    [("coconut", [0, 0, 1, 1, 2]), ("no_thoughts", [0, 0, 1, 1, 2]), ("cot", [0] * 5), ("no_cot", [0] * 5)],
)
def test_stage_of_an_epoch(method, stages):
    config = make(method, epochs_per_stage=2)
    assert [Curriculum(config, None).stage(epoch) for epoch in range(5)] == stages
    assert config.method.name == method


@pytest.mark.parametrize(
    ("reset", "method", "expected"),
    [
        (True, "coconut", [True] * 6),
        (False, "coconut", [False] * 6),
        ("stage", "coconut", [False, False, True, False, True, False]),
        ("stage", "cot", [False] * 6),
    ],
)
def test_optimizer_resets(reset, method, expected):
    config = make(method, epochs_per_stage=2, reset_optimizer=reset)
    trainer = object.__new__(Trainer)
    trainer.config, trainer.curriculum = config, Curriculum(config, None)
    trainer.run = SimpleNamespace(steps_per_epoch=4)
    found = []
    for epoch in range(6):
        trainer.state = TrainState(epoch=epoch)
        found.append(trainer._resets_optimizer())
    assert found == expected


def test_thoughts_per_step_is_zero_without_latents():
    assert [Curriculum(make(method, c_thought=2), None).thoughts_per_step for method in METHOD_KEYS] == [2, 0, 0, 0]


def test_longest_answer_follows_the_validation_path():
    def limit(path, **keys):
        return Config(save_path="", name="", val_path=path, cot=True, **keys).answer_limit

    assert (limit("data/gsm_valid.json"), limit("data/prosqa_valid.json")) == (64, 128)
    assert limit("data/gsm_valid.json", max_new_tokens=5) == 5


# Values as they are written


@pytest.mark.parametrize("text", ["1.10", "007", "1:30", "off", "2026-11-26", "1e3"])
def test_text_keys_keep_their_text(load, text):
    """YAML 1.1 would read a number, a time, a boolean or a date."""
    assert load(SMALL.replace("name: a", f"name: {text}")).name == text
    assert load(SMALL, f"name={text}").name == text


def test_text_that_is_no_text_is_an_error(load):
    [problem] = problems_of(load, SMALL.replace("name: a", "name: {a: 1}"))
    assert problem == "name: expected text, found {'a': 1} (dict)"


def test_an_override_of_a_text_key_is_not_yaml(load):
    assert load(SMALL, "name=exp #2").name == "exp #2"


@pytest.mark.parametrize(("text", "seed"), [("010", 10), ("0", 0), ("08", 8)])
def test_leading_zeros_are_decimal(load, text, seed):
    assert load(SMALL, f"seed={text}").seed == seed
    assert load(SMALL + f"\nseed: {text}\n").seed == seed


def test_a_number_in_base_60_is_an_error(load):
    assert any(
        "num_epochs: expected a whole number, found '1:30'" in line
        for line in problems_of(load, SMALL, "num_epochs=1:30")
    )


def test_a_key_given_twice_is_named_with_its_lines(load):
    text = "lr: 1e-4\n" + SMALL.strip() + "\nlr: 1e-3\n"
    last = len(text.splitlines())
    assert f"lr: given twice, in lines 1 and {last}; keep one" in problems_of(load, text)


def test_a_merge_key_of_yaml_is_refused(load):
    """Keys that it brings would be checked by none of the rules for a file: text that stays text, a key given twice."""
    [problem] = problems_of(load, SMALL.strip() + "\n<<: {lr: 1e-3, lr: 1e-4}\n")
    assert problem.startswith("<<: unknown key")


def test_a_norm_of_0_is_refused(load):
    assert "max_grad_norm: 0 would train nothing; None switches clipping off" in problems_of(
        load, SMALL, "max_grad_norm=0"
    )


def test_a_learning_rate_of_0_is_refused(load):
    assert "lr: 0 would train nothing; for an evaluation set only_eval" in problems_of(load, SMALL, "lr=0")


def test_keys_about_fresh_weights_are_refused_where_weights_are_loaded(load):
    found = problems_of(load, SMALL, "model_id=gpt2", "embedding_range=0.5", "sinusoidal_positions=0.5")
    for name in ("embedding_range", "sinusoidal_positions"):
        assert f"{name}: has no effect, because it is about fresh weights and model_id names weights" in found


def test_paths_are_expanded(load, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("RUNS", "/scratch")
    config = load(SMALL, "save_path=$RUNS/x", "val_path=~/valid.json", "name=~me")
    assert (config.save_path, config.val_path, config.name) == ("/scratch/x", "/home/me/valid.json", "~me")
    names = {name for name in FIELDS if name.endswith("_path")} | {"model_id", "tokenizer", "token_cache"}
    config = load(SMALL, *(f"{name}=${{RUNS}}/{name}" for name in names))
    assert {name: getattr(config, name) for name in names} == {name: f"/scratch/{name}" for name in names}


@pytest.mark.parametrize(("key", "thought", "curriculum", "row"), [
    ("coconut", "hidden", "steps", "coconut"), ("coconut", "hidden", "none", "no_curriculum"),
    ("coconut", "pause", "steps", "pause_as_thought"), ("coconut", "pause", "none", "pause_token"),
    ("no_thoughts", "hidden", "steps", "no_thoughts"), ("no_thoughts", "hidden", "tokens", "icot"),
    ("no_thoughts", "hidden", "none", "no_thoughts_no_curriculum"), ("cot", "hidden", "steps", "cot"),
    ("no_cot", "hidden", "steps", "no_cot"),
])  # fmt: skip
def test_three_keys_select_a_row_of_table_1(load, key, thought, curriculum, row):
    config = load(SMALL, "coconut=False", "cot=False", f"{key}=True", f"thought={thought}", f"curriculum={curriculum}")
    assert config.method.name == row


@pytest.mark.parametrize(("key", "thought", "curriculum"), [
    ("cot", "pause", "steps"), ("no_cot", "pause", "none"), ("no_thoughts", "pause", "steps"),
    ("cot", "hidden", "tokens"), ("no_cot", "hidden", "none"), ("coconut", "hidden", "tokens"),
    ("coconut", "pause", "tokens"),
])  # fmt: skip
def test_combinations_that_are_no_method_are_refused(load, key, thought, curriculum):
    keys = ["coconut=False", "cot=False", f"{key}=True", f"thought={thought}", f"curriculum={curriculum}"]
    [problem] = problems_of(load, SMALL, *keys)
    assert problem.startswith(
        f"thought, curriculum: no method is {key} with thought `{thought}` and curriculum `{curriculum}`; there is `"
    )


def test_all_senseless_keys_of_a_curriculum_are_named_at_once(load):
    keys = ["coconut=False", "cot=True", "thought=pause", "curriculum=none", "uniform_prob=0.3", "tokens_per_epoch=2"]
    found = problems_of(load, SMALL, *keys, "remove_all_from=7", "removal_smoothing=None")
    assert [problem.split(":")[0] for problem in found] == [
        "uniform_prob", "tokens_per_epoch", "remove_all_from", "removal_smoothing", "thought, curriculum",
    ]  # fmt: skip
    keys = ["cot=False", "no_thoughts=True", "curriculum=tokens", "tokens_per_epoch=0"]
    assert problems_of(load, SMALL, *keys, "removal_smoothing=1e-308") == [
        "removal_smoothing: expected at least 1e-06, found 1e-308", "tokens_per_epoch: expected more than 0"
    ]  # fmt: skip
    [problem] = problems_of(load, SMALL, *keys, "tokens_per_epoch=1e308")
    assert problem == "tokens_per_epoch: expected at most 1000000000, found 1e+308"
    assert "thought: expected `hidden` or `pause`, found 'hiden' (str)" in problems_of(load, SMALL, "thought=hiden")


def test_a_resolved_configuration_of_any_row_loads_again(load):
    """config.yaml holds every key, also those that only iCoT has."""
    rows = (
        ["coconut=True", "curriculum=none"],
        ["coconut=True", "thought=pause"],
        ["no_thoughts=True", "curriculum=tokens"],
    )
    for keys in rows:
        config = load(SMALL, "cot=False", *keys)
        assert load(config.to_yaml()) == config
