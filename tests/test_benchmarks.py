"""benchmarks/: the commands print the documented fields, and the peer computes the same as this project."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from coconut import Coconut
from dataset import TrainingSequence, collate
from models.gpt2 import GPT2, GPT2Config
from startup import blas  # noqa: F401  before mlx

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
VOCABULARY = 60
TINY = "--layers 2 --width 16 --heads 2 --vocabulary 60 --length 9 --batch 2 --runs 1".split()
FIELDS = {
    "device",
    "seconds",
    "cpu_seconds",
    "tokens_per_second",
    "peak_rss_gb",
    "peak_mlx_gb",
    "blas",
    "processor",
    "load",
}
NEEDS_TORCH = "torch and transformers are not installed: no peer to compare with"


def measured(script: str, *arguments: str) -> dict:
    """Run a benchmark on a tiny model; returns its one JSON line."""
    command = [sys.executable, str(BENCHMARKS / script), *TINY, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 1
    return json.loads(done.stdout)


def test_train_step_prints_its_fields_and_grows_with_the_batch():
    result = measured("train_step.py", "--sweep", "batch=1,2", "--own-blas")
    assert [point["batch"] for point in result["points"]] == [1, 2]
    for point in result["points"]:
        assert FIELDS | {"sgemm_share", "sgemm_gflops", "ratio_to_own_blas"} <= point.keys()
        assert point["tokens"] == (9 + 6 + 2 + 50) * point["batch"]
        assert point["seconds"] > 0 and point["sgemm_share"] > 0


def test_generate_prints_its_fields():
    result = measured("generate.py", "--examples", "3", "--new-tokens", "2", "--latents", "0", "--own-blas")
    assert FIELDS | {"seconds_per_example", "ratio_to_own_blas"} <= result.keys()
    assert (result["examples"], result["prompt_tokens"], result["latents"]) == (3, 9 + 6 + 2, 0)
    assert result["shortest_answer"] == 2


def test_data_parallel_computes_the_same_and_reports_the_time_of_communication():
    result = measured("data_parallel.py")
    one, two = result["one_process"], result["two_processes"]
    assert two["seconds"] > two["sum_seconds"] > 0 == one["sum_share"]
    assert two["loss"] == pytest.approx(one["loss"], rel=0.05)  # dropout differs
    assert {"speedup", "processor", "load"} <= result.keys()


def test_required_flops_of_a_model_small_enough_to_count(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import workload

    options = workload.parser("", batch=1).parse_args("--layers 1 --width 2 --vocabulary 10".split())
    row = workload.Row(np.zeros(3, dtype=np.int32), 1, 0, 2)
    layer = 2 * 6 + 6 + 2 * 2 + 2 + 2 * 8 + 8 + 8 * 2 + 2 + 4 * 2  # c_attn, c_proj, c_fc, c_proj, two norms
    assert workload.required_flops(options, [row]) == 6 * ((layer + 4) * 3 + 10 * 2 * 1) + 12 * 2 * (1 + 2 + 3)


@pytest.fixture
def peer(monkeypatch):
    """benchmarks/peer.py."""
    pytest.importorskip("torch", reason=NEEDS_TORCH)
    pytest.importorskip("transformers", reason=NEEDS_TORCH)
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import peer

    return peer


@pytest.fixture
def models(peer):
    """The same weights, large enough to matter, in both: (ours, theirs)."""
    import torch

    theirs = peer.new_model(VOCABULARY, layers=2, width=16, heads=2, dropout=0.0).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    rates = {"embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0}
    ours = Coconut(GPT2(GPT2Config(vocab_size=VOCABULARY, n_embd=16, n_layer=2, n_head=2, **rates))).eval()
    weights = {name: mx.array(p.detach().numpy()) for name, p in theirs.named_parameters() if name != "lm_head.weight"}
    assert weights.keys() == dict(tree_flatten(ours.parameters())).keys()
    ours.load_weights(list(weights.items()))
    return ours, theirs


def make_rows(n_labeled: int) -> list[TrainingSequence]:
    """Rows with 3, 1 and no latents, of several lengths."""
    rng = np.random.default_rng(0)
    shapes = ((9, 3), (5, 1), (12, 0))
    total = [question + 2 + n_latents + n_labeled for question, n_latents in shapes]
    ids = [rng.integers(0, VOCABULARY, n).astype(np.int32) for n in total]
    return [
        TrainingSequence(ids[i], question + 1, n_latents, question + 2 + n_latents)
        for i, (question, n_latents) in enumerate(shapes)
    ]


def test_the_peer_has_our_loss(peer, models):
    ours, theirs = models
    rows = make_rows(n_labeled=4)
    expected = peer.loss(theirs, peer.collate(rows, pad_id=0)).item()
    assert peer.lean_loss(theirs, peer.collate(rows, pad_id=0)).item() == pytest.approx(expected, rel=1e-6)
    assert ours(collate(rows, pad_id=0).to_mlx()).item() == pytest.approx(expected, rel=1e-5)


def test_the_peer_decodes_our_tokens(peer, models):
    ours, theirs = models
    rows = make_rows(n_labeled=0)
    expected = [peer.generate(theirs, row, 6, eos_id=7) for row in rows]
    assert ours.generate(collate(rows, pad_id=0).to_mlx(), 6, eos_id=7) == expected
    assert any(expected)
    assert peer.lean_generate(theirs, rows, 6, eos_id=7) == expected


def test_the_peer_is_measured(peer):
    """One peer of one command, because torch takes seconds to import; the other is named and started alike."""
    result = measured("generate.py", "--peer", "--latents", "1")
    assert {"peer_seconds", "ratio_to_peer", "ratio_to_peer_of_pairs"} <= result.keys()


@pytest.mark.parametrize("side", ["peer", "lean_peer"])
@pytest.mark.parametrize("script", ["train_step", "generate"])
def test_each_side_of_the_peer_works(script, side, peer, monkeypatch, capsys):
    """Asked for two runs; in this process, because torch and transformers take five seconds to import."""
    words = ["--examples", "3", "--new-tokens", "2"] if script == "generate" else []
    monkeypatch.setattr(sys, "argv", [script, *TINY, "--latents", "1", *words, "--worker", side])
    monkeypatch.setattr(sys, "stdin", ["run", "run"])
    monkeypatch.setattr(sys, "stdout", sys.stdout)  # a worker changes it
    importlib.import_module(script).main()
    ready, *runs, facts = map(json.loads, capsys.readouterr().out.splitlines())
    assert ready == {} and len(runs) == 2
    assert all(run["seconds"] > 0 and ("loss" in run) == (script == "train_step") for run in runs)
    assert facts.keys() == {"torch", "peak_rss_gb"}


def test_a_gpu_is_checked_against_the_cpu():
    """Here a CPU against itself, and a few optimizer steps of unlike items."""
    lines = [checked(*words) for words in (["smoke"], ["fidelity"], ["steps", "--steps", "2"])]
    [product, *attention], batches, [steps] = lines
    assert product["error_of_a_product"] < 1e-5 and len(attention) == 2
    assert [batch["latents"] for batch in batches] == [[3, 1, 0, 3], [6, 6, 6, 6], [0, 0, 0, 0]]
    for batch in batches:
        assert batch["loss_difference"] < 1e-4 and batch["gradient_difference"] < 1e-3
        assert batch["same_answers"] == "4 of 4"
    assert steps["step"] == 2 and steps["loss"] > 1 and steps["most"] >= steps["least"] > 0


def checked(*words: str) -> list[dict]:
    """The JSON lines of gpu_check.py."""
    command = [sys.executable, str(BENCHMARKS / "gpu_check.py"), *words, *TINY]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]
