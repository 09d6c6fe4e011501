"""The shipped configurations load, start from GPT-2, and name only data and runs that shipped commands make."""

import re
from pathlib import Path

import pytest

from config import load_config
from dataset import Curriculum
from training.setup import trains_no_thought

ROOT = Path(__file__).resolve().parents[1]
LLM = sorted([*(ROOT / "args").glob("gsm_llama*.yaml"), *(ROOT / "args").glob("gsm_smollm*.yaml")])
PAPER = sorted(p for p in (ROOT / "args").glob("*.yaml") if not p.name.startswith("graph_") and p not in LLM)
GRAPHS = sorted(p for p in (ROOT / "args").glob("graph_*.yaml") if not p.stem.endswith("_eval"))
NAMES = (
    "gsm_icot prontoqa_icot prosqa_icot "
    "gsm_pause_token prontoqa_pause_token prosqa_pause_token "
    "gsm_coconut_pause prontoqa_coconut_pause prosqa_coconut_pause "
    "gsm_coconut_no_curriculum prontoqa_coconut_no_curriculum prosqa_coconut_no_curriculum "
    "gsm_cot gsm_coconut gsm_coconut_eval gsm_no_cot gsm_no_thoughts prontoqa_coconut prontoqa_coconut_eval "
    "prontoqa_no_cot prontoqa_no_thoughts prosqa_cot prosqa_cot_eval prosqa_coconut prosqa_coconut_eval prosqa_no_cot "
    "prosqa_no_thoughts prosqa_coconut_analysis"
).split()
# What the official YAML files hold (facebookresearch/coconut, args/): c_thought, epochs_per_stage, max_latent_stage,
# num_epochs, resume, reset_optimizer.
OFFICIAL = {
    "gsm_cot": (0, 1, 0, 25, 0, False),
    "gsm_coconut": (2, 3, 3, 25, 3, True),
    "gsm_coconut_eval": (2, 3, 3, 25, 15, True),
    "prontoqa_coconut": (1, 5, 6, 50, 0, True),
    "prontoqa_coconut_eval": (1, 5, 6, 50, 40, True),
    "prosqa_coconut": (1, 5, 6, 50, 0, True),
    "prosqa_coconut_eval": (1, 5, 6, 50, 40, True),
}


def test_every_configuration_is_there():
    assert sorted(path.stem for path in PAPER) == sorted(NAMES)


@pytest.mark.parametrize("path", PAPER, ids=lambda path: path.stem)
def test_it_loads_with_the_papers_batch_from_gpt2(path):
    config = load_config(str(path))
    batch = 32 if path.stem == "gsm_icot" else 128  # arXiv 2405.14838's own values there
    assert config.batch_size_training * config.gradient_accumulation_steps == batch
    assert config.model_id == "openai-community/gpt2"
    lr = 5e-5 if path.stem == "gsm_icot" else 1e-4
    assert (config.lr, config.weight_decay, config.seed, config.bf16) == (lr, 0.01, 0, False)
    assert config.name == path.stem.replace("_", "-")
    assert config.only_eval == path.stem.endswith("_eval")


@pytest.mark.parametrize("path", sorted((ROOT / "args").glob("*.yaml")), ids=lambda path: path.stem)
def test_none_is_warned_to_train_no_thought(path):
    config = load_config(str(path))
    assert config.only_eval or not trains_no_thought(Curriculum(config, None), config.resume, range(1, 6))


@pytest.mark.parametrize(("changes", "is_warned"), [
    ([], False), (["max_latent_stage=0"], True), (["c_thought=0"], True), (["num_epochs=4"], False),
    (["num_epochs=3", "resume=0"], True), (["num_epochs=3", "resume=0", "uniform_prob=0.1"], False),
    (["coconut=False", "cot=True"], False), (["num_epochs=1_000_000_000", "c_thought=0"], True),
    (["num_epochs=1_000_000_000"], False),
])  # fmt: skip
def test_a_run_that_trains_no_thought_is_found(changes, is_warned):
    config = load_config(str(ROOT / "args" / "gsm_coconut.yaml"), changes)
    assert trains_no_thought(Curriculum(config, None), config.resume, range(1, 6)) == is_warned


def test_the_model_for_analysis_differs_in_mixing_alone():
    one, other = (load_config(str(ROOT / "args" / f"prosqa_coconut{end}.yaml")).to_dict() for end in ("", "_analysis"))
    assert {key for key in one if one[key] != other[key]} == {"name", "uniform_prob"}
    assert other["uniform_prob"] == 0.3


@pytest.mark.parametrize("name", OFFICIAL)
def test_it_has_the_official_values(name):
    c = load_config(str(ROOT / "args" / f"{name}.yaml"))
    found = (c.c_thought, c.epochs_per_stage, c.max_latent_stage, c.num_epochs, c.resume, c.reset_optimizer)
    assert found == OFFICIAL[name]
    assert c.pad_latent_to_max and c.uniform_prob == 0


@pytest.mark.parametrize("path", PAPER, ids=lambda path: path.stem)
def test_its_data_and_checkpoint_are_made_by_shipped_commands(path):
    """Data files appear in a preprocessing script; a checkpoint is the run directory of another configuration."""
    config = load_config(str(path))
    scripts = "".join(p.read_text() for p in (ROOT / "preprocessing").glob("*") if p.suffix in (".txt", ".bash", ".py"))
    for file in (config.train_path, config.val_path):
        assert re.fullmatch(r"data/\w+_(train|valid|test)\.json", file)
        assert Path(file).name in scripts
    if config.load_model_path:
        others = {str(load_config(str(p)).run_dir) for p in PAPER if not load_config(str(p)).only_eval}
        assert config.load_model_path in others


@pytest.mark.parametrize("path", PAPER, ids=lambda path: path.stem)
def test_its_first_lines_give_the_command_and_the_papers_result(path):
    head = path.read_text().split("\n\n")[0]
    assert f"python run.py args/{path.name}" in head
    assert "# First: bash preprocessing/" in head
    assert re.search(r"# Paper \(GPT-2, test set(, without mixing)?\): \d+\.\d( ± \d+\.\d)? %", head)
    for command in re.findall(r"(?:bash|python) (\S+)", head):
        assert (ROOT / command).is_file()


@pytest.mark.parametrize("path", GRAPHS, ids=lambda path: path.stem)
def test_a_graph_run_names_its_command_and_what_comes_first(path):
    """The run that a configuration starts from is the last one that its first lines name."""
    config, head = load_config(str(path)), path.read_text().split("\n\n")[0]
    assert f"python run.py args/{path.name}" in head and "python preprocessing/graphs.py" in head
    assert config.name == path.stem.replace("_", "-")
    earlier = [name for name in re.findall(r"args/(graph_\w+)\.yaml", head) if name != path.stem]
    if not config.load_model_path:
        assert earlier == []
        return
    start = load_config(str(ROOT / "args" / f"{earlier[-1]}.yaml"))
    assert config.load_model_path == f"{start.run_dir}/checkpoint_1"
    shared = ("layout", "tokenizer", "batch_size_training", "lr", "warmup_steps", "max_grad_norm", "reset_optimizer")
    assert all(getattr(config, key) == getattr(start, key) for key in shared)


@pytest.mark.parametrize("path", LLM, ids=lambda path: path.stem)
def test_a_run_of_another_model_says_what_it_needs(path):
    """Its command, the runs before it, the memory it takes and that nobody has run it here."""
    config, head = load_config(str(path)), path.read_text().split("\n\n")[0]
    assert len(LLM) == 9
    assert f"python run.py args/{path.name}" in head and "pip install -r requirements-llm.txt" in head
    assert "# Memory: " in head and "Not run here" in head
    assert config.name == path.stem.replace("_", "-") and config.model_id.split("/")[1].lower().startswith(
        path.stem.split("_")[1][:5]
    )
    assert config.batch_size_training * config.gradient_accumulation_steps == 128
    for file in re.findall(r"((?:preprocessing|args)/[\w.]+|requirements-\w+\.txt)", head):
        assert (ROOT / file).is_file()
    if config.load_model_path:
        others = {str(load_config(str(p)).run_dir) for p in LLM if not load_config(str(p)).only_eval}
        assert config.load_model_path in others
