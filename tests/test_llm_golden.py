"""The official PyTorch code's numbers for a tiny Llama and a tiny Qwen2 (tests/fixtures/llm/README.md)."""

import json

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten

from coconut import Coconut
from config import Config
from dataset import Curriculum, collate
from models.loading import find_tokenizer, load_model
from models.source import find_source
from text.reader import read_examples
from text.tokens import tokenize

pytest.importorskip("mlx_lm", reason="requirements-llm.txt is not installed")
BASES = ("llama", "qwen2")
CURRICULUM = ("c_thought", "max_latent_stage", "pad_latent_to_max")
FORWARD = (
    "coconut_mixed_counts", "coconut_with_row_without_latents", "coconut_stage2_all_padded_left",
    "coconut_stage0_markers_only", "coconut_one_row", "cot", "no_cot", "no_thoughts_stage2",
)  # fmt: skip
TRAJECTORIES = ("coconut", "coconut_reset", "cot", "no_cot")


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


def case_of(folder, file: str, name: str) -> dict:
    return {case["name"]: case for case in read(folder / file)}[name]


def make_config(case: dict, folder, **keys) -> Config:
    own = {name: case[name] for name in CURRICULUM if name in case}
    named = {"save_path": "unused", "name": "unused", "val_path": "unused", "model_id": str(folder)}
    return Config(**named, **own, **{case["method"]: True}, **keys)


@pytest.fixture(scope="module", params=BASES)
def base(request, fixtures):
    return fixtures / "llm" / request.param


def loaded(config: Config):
    """The model, the curriculum and the training items of a configuration."""
    source = find_source(config)
    tokenizer = find_tokenizer(source, config)
    model = Coconut(load_model(source, config, tokenizer))
    return model, Curriculum(config, tokenizer)


def items_of(base, curriculum: Curriculum, name: str = "train.json"):
    return tokenize(read_examples(str(base.parent / name)), curriculum.tokenizer, name)


def test_every_sequence_is_the_official_one(base):
    """Special ids, pieces of every item, training ids, number of unlabeled tokens and prompts."""
    official = read(base / "sequences.json")
    assert len(official["sequences"]) >= 250
    config = make_config(official["sequences"][0], base)
    tokenizer = find_tokenizer(find_source(config), config)
    found = {name: getattr(tokenizer, f"{name}_id") for name in ("eos", "start", "end", "latent", "prototype")}
    assert found | {"n": tokenizer.vocab_size} == {k: v for k, v in official["ids"].items() if k != "bos"}
    data = items_of(base, Curriculum(config, tokenizer))
    for example, pieces in zip((data[i] for i in range(len(data))), official["pieces"], strict=True):
        steps = [step.tolist() for step in example.steps]
        assert (example.question.tolist(), steps, example.answer.tolist()) == tuple(pieces.values())
    for case in official["sequences"]:
        curriculum, example = Curriculum(make_config(case, base), tokenizer), data[case["item"]]
        trained = curriculum.training(example, case["stage"])
        prompt = curriculum.prompt(example, curriculum.n_prompt_latents(case["stage"], len(example.steps)))
        found = (trained.ids.tolist(), trained.n_unlabeled, prompt.ids.tolist())
        assert found == (case["ids"], case["n_unlabelled"], case["prompt"]), case


@pytest.mark.parametrize("name", FORWARD)
def test_forward_and_gradients_are_the_official_ones(name, base):
    case = case_of(base, "forward.json", name)
    model, curriculum = loaded(make_config(case, base))
    data, eos = items_of(base, curriculum), curriculum.tokenizer.eos_id
    batch = collate([curriculum.training(data[i], case["stage"]) for i in case["items"]], eos, multiple=1)
    assert batch.input_ids.tolist() == case["batch"]["input_ids"]
    batch = batch.to_mlx()

    loss, gradient = nn.value_and_grad(model, lambda b: model(b))(batch)
    assert loss.item() == pytest.approx(case["loss"], rel=1e-5)
    gradients = dict(tree_flatten(gradient["transformer"]["lm"]))
    norms = {key: mx.linalg.norm(g.reshape(-1)).item() for key, g in gradients.items()}
    assert norms == pytest.approx(case["grad_norms"], rel=1e-4)
    tokens = curriculum.tokenizer
    rows = gradients["model.embed_tokens.weight"]
    if case.get("marker_grad_norms"):
        found = [mx.linalg.norm(rows[i]).item() for i in (tokens.start_id, tokens.end_id, tokens.latent_id)]
        assert found == pytest.approx(case["marker_grad_norms"], rel=1e-4, abs=1e-7)

    hidden, _ = model.think(batch)
    assert len(case["logprobs"]) >= 4
    for expected in case["logprobs"]:
        logits = model.transformer.logits(hidden[expected["row"], expected["column"]])
        logprob = (logits[expected["target"]] - mx.logsumexp(logits)).item()
        assert logprob == pytest.approx(expected["logprob"], abs=2e-5)
        if expected["gap"] > 1e-4:
            assert mx.argmax(logits).item() == expected["argmax"]
    for expected in case.get("thoughts", []):
        thought = hidden[expected["row"], expected["column"] - 1]
        assert mx.linalg.norm(thought).item() == pytest.approx(expected["norm"], rel=1e-5)
        assert thought.sum().item() == pytest.approx(expected["sum"], abs=1e-4)


@pytest.mark.parametrize("name", TRAJECTORIES)
def test_training_is_the_official_one(name, base, tmp_path, call_main):
    """Every epoch's training and validation loss through run.py; debug only leaves out writing checkpoints."""
    case = case_of(base, "trajectories.json", name)
    keys = {key: value for key, value in case.items() if key not in ("method", "history", "name")}
    keys |= {"train_path": base.parent / "train.json", "val_path": base.parent / "valid.json"}
    keys |= {"batch_size_training": 64, "save_path": tmp_path, "name": name, "model_id": base, case["method"]: True}
    keys |= {"max_new_tokens": 2, "debug": True}
    file = tmp_path / "config.yaml"
    file.write_text("".join(f"{key}: {value}\n" for key, value in keys.items()))

    outcome = call_main(file)
    assert outcome.status == 0, outcome.err
    records = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
    tolerance = 3e-3 if case["reset_optimizer"] else 2e-5
    for ours, official in (("train/loss", "train_loss"), ("eval/loss", "eval_loss")):
        found = [record[ours] for record in records if ours in record]
        assert found == pytest.approx([epoch[official] for epoch in case["history"]], rel=tolerance), ours


def test_greedy_ids_are_the_official_ones(base):
    cases = read(base / "generation.json")
    assert len(cases) == 4
    for case in cases:
        weights = base / f"trained_{case['method']}.safetensors"
        model, curriculum = loaded(make_config(case, base, load_model_path=str(weights)))
        data, tokenizer = items_of(base, curriculum, "valid.json"), curriculum.tokenizer
        rows = [data[answer["item"]] for answer in case["answers"]]
        prompts = [curriculum.prompt(r, curriculum.n_prompt_latents(case["stage"], len(r.steps))) for r in rows]
        assert [p.ids.tolist() for p in prompts] == [answer["prompt"] for answer in case["answers"]]
        batch = collate(prompts, tokenizer.eos_id).to_mlx()
        found = model.eval().generate(batch, case["max_new_tokens"], tokenizer.eos_id)
        assert found == [[i for i in answer["new_ids"] if i != tokenizer.eos_id] for answer in case["answers"]]
