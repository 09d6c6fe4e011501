"""Random checkpoints and generated ProsQA items for the tests of analysis/."""

import functools
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import mlx.core as mx

from coconut import Coconut
from config import Config
from dataset import Curriculum
from models.gpt2 import GPT2, GPT2Config
from startup import blas  # noqa: F401  before mlx
from text.tokenizer import load_tokenizer
from training.checkpoint import describe_run, save_checkpoint

SCRIPT = Path(__file__).resolve().parents[1] / "preprocessing" / "prosqa.py"


@functools.cache
def generated(*options: str) -> str:
    """100 items of preprocessing/prosqa.py, as JSON."""
    with tempfile.TemporaryDirectory() as folder:
        words = ["--train", "0", "--valid", "0", "--test", "100", "--out", folder, *options]
        subprocess.run([sys.executable, SCRIPT, *words], check=True, capture_output=True, timeout=60)
        return (Path(folder) / "prosqa_generated_test.json").read_text()


def save_model(folder: Path, items: list[dict], name: str = "run", **keys) -> Path:
    """A random model in a checkpoint folder, with its vocabulary (bytes, `###`) and data.json beside it."""
    (folder / "words.json").write_text('["###"]')
    (folder / "data.json").write_text(json.dumps(items))
    paths = {"val_path": str(folder / "data.json"), "tokenizer": str(folder / "words.json")}
    method = {} if {"cot", "no_cot"} & set(keys) else {"coconut": True}
    config = Config(**{
        "save_path": str(folder), "name": name, "max_latent_stage": 3, "max_new_tokens": 4, **paths, **method, **keys,
    })  # fmt: skip
    (folder / name).mkdir(exist_ok=True)
    curriculum = Curriculum(config, load_tokenizer(config.tokenizer, None))
    mx.random.seed(5)
    shape = {"n_positions": 2048, "n_embd": 16, "n_layer": 2, "n_head": 2, "initializer_range": 0.4}
    model = Coconut(GPT2(GPT2Config(vocab_size=curriculum.tokenizer.vocab_size, **shape)))
    return save_checkpoint(model, describe_run(curriculum, 5, 4))
