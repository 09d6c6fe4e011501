"""Fixtures of all tests. Nothing here needs the network, a display, or a folder outside the repository and tmp_path."""

import importlib.util
import io
import json
import os
import signal
import subprocess
import sys
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
FIXTURES = ROOT / "tests" / "fixtures"
os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", WANDB_MODE="disabled")
# Several tests run side by side, so one thread each, here and in the processes that are started; tests of streams and
# threads set their own numbers. There are hundreds of starts: what the first one compiles, the others load.
os.environ.update(OPENBLAS_NUM_THREADS="1", COCONUT_STREAMS="1")
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

from startup import blas, settings  # noqa: F401  before mlx
import mlx.core as mx

import run as run_module
from parallel.streams import on_gpu, use_streams
from text.tokenizer import dump_tiktoken, load_tokenizer
from training import trainer
from training.curves import keep_curves

settings.exact_products()
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # also under nohup: the runs that are started inherit it


class Outcome(NamedTuple):
    """What a command did."""

    status: int
    out: str
    err: str


@contextmanager
def computing_on_cpu():
    """MLX's default device is the CPU."""
    device = mx.default_device()
    mx.set_default_device(mx.cpu)
    yield
    mx.set_default_device(device)


@pytest.fixture(scope="session", autouse=True)
def unpictured():
    """Runs in this process draw no curves.png, which takes half of a tiny run's time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "keep_curves", lambda run_dir: None)
        yield


@contextmanager
def pictures():
    """Runs in this process draw curves.png all the same."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "keep_curves", keep_curves)
        yield


@pytest.fixture
def cpu():
    """For a test that compares bits: on a GPU the embeddings' gradients are added in an order that varies."""
    with computing_on_cpu():
        yield


@pytest.fixture(scope="module")
def on_cpu():
    """The same for a whole module, and for the processes that its tests start."""
    with computing_on_cpu(), pytest.MonkeyPatch.context() as patch:
        patch.setenv("COCONUT_DEVICE", "cpu")
        yield


@pytest.fixture(scope="session")
def golden() -> Path:
    """The folder of numbers computed with the official code; see its README."""
    return FIXTURES / "golden"


@pytest.fixture(scope="session")
def fixtures() -> Path:
    """The folder of all fixtures."""
    return FIXTURES


@pytest.fixture(scope="session")
def golden_model(golden, tmp_path_factory) -> Path:
    """The golden tiny GPT-2 as a complete model folder.

    A filter on `attn.bias` (the mask buffer) dropped `attn.c_attn.bias` from the golden file. The model is a fresh one
    of transformers, where every bias is zero, so zeros are what the official code computed with.
    """
    folder = tmp_path_factory.mktemp("golden_model")
    shape = json.loads((golden / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(shape))
    tensors = mx.load(str(golden / "model.safetensors"))
    for layer in range(shape["n_layer"]):
        tensors.setdefault(f"transformer.h.{layer}.attn.c_attn.bias", mx.zeros(3 * shape["n_embd"]))
    mx.save_safetensors(str(folder / "model.safetensors"), tensors)
    return folder


@pytest.fixture(scope="session")
def tokenizer():
    """GPT-2's tokenizer, from mlx-whisper's copy where that is installed (no network), else as the program finds it."""
    whisper = importlib.util.find_spec("mlx_whisper")
    copy = Path(whisper.submodule_search_locations[0]) / "assets" / "gpt2.tiktoken" if whisper else None
    return load_tokenizer(str(copy) if copy and copy.is_file() else None)


@pytest.fixture(scope="session")
def gpt2_vocabulary(tokenizer, tmp_path_factory) -> Path:
    """GPT-2's vocabulary as a file that the key `tokenizer` can name."""
    path = tmp_path_factory.mktemp("vocabulary") / "gpt2.tiktoken"
    path.write_bytes(dump_tiktoken(tokenizer.ranks))
    return path


@pytest.fixture(scope="session")
def run_cli():
    """Run `python run.py ARGUMENTS` in a process of its own: run_cli(*arguments, cwd=None) -> Outcome."""

    def call(*arguments, cwd=None) -> Outcome:
        command = [sys.executable, str(ROOT / "run.py"), *map(str, arguments)]
        done = subprocess.run(command, cwd=cwd or ROOT, capture_output=True, text=True, timeout=120, check=False)
        return Outcome(done.returncode, done.stdout, done.stderr)

    return call


@pytest.fixture(scope="session")
def call_main():
    """Run the same command line in this process, which saves the start: call_main(*arguments) -> Outcome."""

    def call(*arguments) -> Outcome:
        out, err = io.StringIO(), io.StringIO()
        with redirect_stdout(out), redirect_stderr(err):
            status = run_module.main([str(argument) for argument in arguments])
        use_streams("1")  # tests that follow expect a process as it starts
        return Outcome(status, out.getvalue(), err.getvalue())

    return call


@pytest.fixture
def operands(monkeypatch) -> list[mx.Dtype]:
    """The types of all that goes into products and into MLX's attention from here on."""
    found: list[mx.Dtype] = []

    def noting(own):
        def call(*arrays, **named):
            found.extend(array.dtype for array in arrays if isinstance(array, mx.array))
            return own(*arrays, **named)

        return call

    for place, name in (
        (mx.array, "__matmul__"), (mx, "addmm"), (mx, "quantized_matmul"), (mx.fast, "scaled_dot_product_attention"),
    ):  # fmt: skip
        monkeypatch.setattr(place, name, noting(getattr(place, name)))
    return found


@pytest.fixture
def gpu_code(monkeypatch):
    """Every module believes that there is a GPU; nothing is compiled, which on a CPU takes a C++ compiler and time.

    MLX's limits stay: those of a small GPU would outlast the test, and a process that keeps no freed buffers takes up
    to three times as long.
    """
    for module in list(sys.modules.values()):
        if getattr(module, "on_gpu", None) is on_gpu:
            monkeypatch.setattr(module, "on_gpu", lambda: True)
    monkeypatch.setattr(mx, "device_info", lambda: {"total_memory": 80_000_000_000})
    for name in ("set_cache_limit", "set_memory_limit", "set_wired_limit"):
        monkeypatch.setattr(mx, name, lambda size: None)
    mx.disable_compile()
    yield
    mx.enable_compile()


TINY_MODEL = {"model_type": "gpt2", "n_positions": 128, "n_embd": 16, "n_layer": 2, "n_head": 2}


def tiny_item(a: int, b: int, n_steps: int = 2) -> dict:
    """A sum in `n_steps` steps; about 15 + 8 n_steps tokens in the tiny vocabulary."""
    steps = [f"<<{a}+{b}={a + b}>>" for _ in range(n_steps)]
    return {"question": f"What is {a} plus {b}?", "steps": steps, "answer": str(a + b)}


class Tiny:
    """A folder with everything a run of seconds needs: model config, word list, data, and a YAML file to break."""

    def __init__(self, folder: Path):
        self.folder, self.runs = folder, folder / "runs"
        self.model, self.words = self.write("model.json", TINY_MODEL), self.write("words.json", ["<<", ">>", "###"])
        self.train = self.write("train.json", [tiny_item(a, 3, a % 4) for a in range(1, 9)])
        self.valid = self.write("valid.json", [tiny_item(a, 2, a % 4) for a in range(1, 5)])

    def write(self, name: str, content) -> Path:
        """A file of the folder: text and bytes as they are, anything else as JSON."""
        path = self.folder / name
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
        return path

    def keys(self, **changes) -> dict:
        """The keys of a small coconut run, changed; a change to `...` leaves the key out."""
        keys = {
            "save_path": self.runs, "name": "tiny", "coconut": True, "c_thought": 1, "epochs_per_stage": 1,
            "max_latent_stage": 2, "model_config_path": self.model, "tokenizer": self.words, "train_path": self.train,
            "val_path": self.valid, "num_epochs": 2, "batch_size_training": 4, "max_new_tokens": 8, "lr": 1e-3,
        }  # fmt: skip
        keys = {name: value for name, value in {**keys, **changes}.items() if value is not ...}
        return {name: str(value) if isinstance(value, Path) else value for name, value in keys.items()}

    def config(self, file: str = "tiny.yaml", **changes) -> Path:
        """That configuration as a YAML file."""
        return self.write(file, yaml.safe_dump(self.keys(**changes)))

    def records(self, name: str = "tiny") -> list[dict]:
        """The lines of a run's metrics.jsonl."""
        return [json.loads(line) for line in (self.runs / name / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def tiny(tmp_path) -> Tiny:
    """A fresh Tiny in the test's own folder."""
    return Tiny(tmp_path)


@pytest.fixture(scope="module")
def shared_tiny(tmp_path_factory) -> Tiny:
    """A Tiny for all tests of a module that do not change it."""
    return Tiny(tmp_path_factory.mktemp("tiny"))
