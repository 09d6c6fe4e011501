"""Kill a run at random moments, take it up again until it ends, and compare it bit for bit with one that never stopped.

The long version, a table over all settings: `python tests/survival.py --rounds 3` (about 5 minutes on 2 cores).
"""

import argparse
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
UNPICTURED = ROOT / "tests" / "unpictured"
MODEL = {"model_type": "gpt2", "n_positions": 96, "n_embd": 32, "n_layer": 2, "n_head": 2}
TIMES = (
    "eval/seconds_per_example",
    "train/seconds",
    "train_seconds",
    "metrics_bytes",
    "metrics_crc32",
)  # what two equal runs may differ in
SETTINGS = {
    "every epoch anew": {"reset_optimizer": True},
    "optimizer kept": {"reset_optimizer": False},
    "anew at stages": {"reset_optimizer": "stage", "epochs_per_stage": 2},
    "accumulation": {"reset_optimizer": False, "gradient_accumulation_steps": 3},
    "mixed stages": {"reset_optimizer": True, "uniform_prob": 0.4, "gradient_accumulation_steps": 2},
    "only improvements": {"reset_optimizer": False, "save_only_improve": True},
    "few checkpoints": {"reset_optimizer": False, "keep_checkpoints": 1, "warmup_steps": 20},
    "rare saves": {"reset_optimizer": False, "save_interval_minutes": 60},
    "no curriculum": {"reset_optimizer": True, "curriculum": "none"},
    "pause as thought": {"reset_optimizer": "stage", "thought": "pause"},
    "pause token": {"reset_optimizer": False, "thought": "pause", "curriculum": "none", "layout": "compact"},
    "icot": {
        "reset_optimizer": "stage", "coconut": False, "no_thoughts": True, "curriculum": "tokens",
        "tokens_per_epoch": 5, "remove_all_from": 11, "removal_smoothing": 0.7, "num_epochs": 4,
    },
}  # fmt: skip


class Trial:
    """One configuration in one folder, run as often as needed."""

    def __init__(self, folder: Path, keys: dict):
        self.folder, self.run_dir = folder, folder / "runs" / "trial"
        folder.mkdir(parents=True)
        items = [
            {"question": f"{a} plus {b}?", "steps": [f"{a}+{b}={a + b}"] * (a % 4), "answer": str((a + b) % 7)}
            for a in range(12)
            for b in range(4)
        ]
        for name, content in {"model": MODEL, "words": ["<<"], "train": items[:40], "valid": items[40:]}.items():
            (folder / f"{name}.json").write_text(json.dumps(content))
        defaults = {
            "save_path": str(folder / "runs"), "name": "trial", "coconut": True, "c_thought": 1, "max_latent_stage": 2,
            "num_epochs": 3, "model_config_path": str(folder / "model.json"), "tokenizer": str(folder / "words.json"),
            "train_path": str(folder / "train.json"), "val_path": str(folder / "valid.json"), "lr": 1e-3,
            "batch_size_training": 4, "save_interval_minutes": 0.002, "max_new_tokens": 8, "batch_size_eval": 3,
        }  # fmt: skip
        (folder / "trial.yaml").write_text(json.dumps(defaults | keys))

    def start(self) -> subprocess.Popen:
        command = [sys.executable, str(ROOT / "run.py"), str(self.folder / "trial.yaml")]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        return subprocess.Popen(command, **pipes, cwd=self.folder, env=os.environ | {"PYTHONPATH": str(UNPICTURED)})

    def finish(self) -> float:
        """Run to the end without a kill; returns the seconds it took."""
        started, process = time.monotonic(), self.start()
        output, _ = process.communicate(timeout=300)
        assert process.returncode == 0, output
        return time.monotonic() - started

    def kill_until_done(self, longest: float, rng: random.Random, most: int = 12) -> list[str]:
        """Start and kill after a random time, again and again; after `most` kills let it end.

        Returns what the run was at when each kill hit it.
        """
        kills = []
        while len(kills) < most:
            process = self.start()
            try:
                output, _ = process.communicate(timeout=rng.uniform(0.05, 0.95 * longest))
                assert process.returncode == 0, output
                return kills
            except subprocess.TimeoutExpired:
                process.kill()
                output, _ = process.communicate(timeout=60)
                if process.returncode == -signal.SIGKILL:
                    kills.append(self.phase(output))
        self.finish()
        return kills

    def phase(self, output: str) -> str:
        """What a killed run was at: preparing (start, data, model), writing a folder, validating, or at its steps."""
        if "files:" not in output:
            return "preparing"
        if list(self.run_dir.glob(".*.tmp")):
            return "writing"
        states = [json.loads((p / "coconut.json").read_bytes()) for p in self.run_dir.glob("state_*")]
        newest = max(states, key=lambda s: (s["epoch"], s["position"]["step"]), default=None)
        between = newest is not None and newest["position"]["epoch"] < newest["epoch"]  # trained, not yet validated
        return "validating" if between else "at its steps"

    def contents(self) -> dict[str, object]:
        """Everything that must be equal: tensors, metrics, predictions, and the set of files."""
        found = {}
        for path in sorted(self.run_dir.rglob("*")):
            name = str(path.relative_to(self.run_dir))
            if path.is_dir() or path.name in (".lock", "config.yaml"):
                continue
            if path.name == "coconut.json":
                record = json.loads(path.read_bytes())
                found[name] = {key: record[key] for key in ("epoch", "stage", "files")}
                found[name]["position"] = _without_times(record.get("position", {}))
            elif path.name == "metrics.jsonl":
                found[name] = [_without_times(json.loads(line)) for line in path.read_text().splitlines()]
            else:
                found[name] = path.read_bytes()
        return found


def _without_times(record: dict) -> dict:
    return {name: value for name, value in record.items() if name not in TIMES}


def differences(one: Trial, other: Trial) -> list[str]:
    """Names of what differs between two finished runs."""
    a, b = one.contents(), other.contents()
    return [name for name in sorted(a.keys() | b.keys()) if a.get(name) != b.get(name)]


def main() -> int:
    """Print the table of all settings; exit status 1 if any run differs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="killed runs for each setting")
    parser.add_argument("--folder", type=Path, required=True, help="an empty folder to work in")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rng, total, bad = random.Random(options.seed), 0, 0
    phases = ("preparing", "at its steps", "writing", "validating")
    print(f"{'setting':20} {'runs':>4} " + " ".join(f"{phase:>12}" for phase in phases) + "  different")
    for name, keys in SETTINGS.items():
        base = options.folder / re.sub(r"\W", "_", name)
        whole = Trial(base / "whole", keys)
        longest = whole.finish()
        kills, differing = [], []
        for number in range(options.rounds):
            trial = Trial(base / f"killed_{number}", keys)
            kills += trial.kill_until_done(longest, rng)
            differing += differences(whole, trial)
        total, bad = total + len(kills), bad + len(differing)
        counts = " ".join(f"{kills.count(phase):>12}" for phase in phases)
        print(f"{name:20} {options.rounds:>4} {counts}  {', '.join(differing) or 'nothing'}", flush=True)
    print(f"{total} kills, {bad} differences")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
