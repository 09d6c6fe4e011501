"""Several processes train what one would, and end together, well or ill."""

import json
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from itertools import chain
from pathlib import Path
from threading import Thread
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import TINY_MODEL, tiny_item
from launched import ENVIRONMENT, ROOT, Group, free_ports
from survival import Trial, differences

import checkpoint as ckpt
import processes as module
import stopping
from config import Config
from dataset import Sequence, in_parts, own_parts
from processes import ALONE, Launched, Place, Processes, join
from run import asked_to_stop
from train import training_steps
from utils import RunError, StopSignals, UserError

NO_DROPOUT = {"embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0}


def wait_for(condition, group: Group) -> None:
    """Until the condition holds; fails where a process ends before that."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        with suppress(OSError, ValueError):
            if condition():
                return
        ended = [process for process in group.processes if process.poll() is not None]
        assert not ended, [process.communicate() for process in ended]
        time.sleep(0.02)
    raise AssertionError("nothing happened for a minute")


# The steps of one process


@pytest.mark.parametrize(("method", "n"), [("coconut", 2), ("cot", 3)])
def test_several_processes_take_the_steps_of_one(method, n, tiny, call_main):
    """20 steps of 2 x 6 items of 19: the last micro-batch is one item, which leaves the others with none."""
    tiny.write("model.json", TINY_MODEL | NO_DROPOUT)
    tiny.write("train.json", [tiny_item(a, 3, a % 4) for a in range(1, 20)])
    tiny.write("valid.json", [tiny_item(a, 2, a % 4) for a in range(1, 8)])
    keys = {
        "coconut": method == "coconut", "cot": method == "cot", "num_epochs": 10, "epochs_per_stage": 3,
        "gradient_accumulation_steps": 2, "debug": True, "batch_size_eval": 2,
    }  # fmt: skip
    alone = call_main(tiny.config("alone.yaml", name="alone", batch_size_training=6, **keys))
    assert alone.status == 0, alone.err
    config = tiny.config("group.yaml", name="group", batch_size_training=6 // n, **keys)
    with Group(n, tiny.folder / "hosts.json", config) as group:
        (status, out, err), *others = group.wait()
    assert status == 0, err
    assert others == [(0, "", "")] * (n - 1), "process 0 alone talks"
    assert len(re.findall(f"the parameters are the same bits in all {n} processes", out)) == 1 + 10

    one, several = tiny.records("alone"), tiny.records("group")
    for name, count in (("train/loss", 20), ("eval/loss", 10)):
        expected = [record[name] for record in one if name in record]
        assert len(expected) == count
        assert [record[name] for record in several if name in record] == pytest.approx(expected, rel=1e-5)
    for epoch in range(1, 11):
        ours, theirs = (tiny.runs / name / f"predictions_{epoch}.jsonl" for name in ("group", "alone"))
        assert ours.read_text() == theirs.read_text()
    assert [p["idx"] for p in map(json.loads, ours.read_text().splitlines())] == list(range(7))


def one_of(n: int, rank: int) -> Processes:
    """A process of n that needs no other."""
    made = Processes()
    made.size, made.rank = n, rank
    return made


@pytest.mark.parametrize(("n", "n_rows"), [(1, 5), (2, 5), (3, 7), (3, 2)])
def test_parts_of_all_processes_are_the_micro_batch(n, n_rows):
    """Each row once; every labelled token weighs the same wherever it is."""
    rng = np.random.default_rng(0)
    rows = [Sequence(np.full(10 + i, i + 1, np.int32), 3, 0, int(rng.integers(2, 9))) for i in range(n_rows)]
    parts = [own_parts(rows, one_of(n, rank), n_parts=2, pad_id=0) for rank in range(n)]
    weights = [(int(part.targets[0]), part.share / part.weights.sum()) for part in chain(*parts) if part.share]
    assert sum(part.share for part in chain(*parts)) == pytest.approx(1)
    assert all(weight == pytest.approx(1 / sum(row.n_labelled for row in rows)) for _, weight in weights)
    counted = [set(part.targets[part.weights > 0].tolist()) for part in chain(*parts) if part.share]
    assert sorted(chain(*counted)) == list(range(1, n_rows + 1))
    assert all(parts), "every process has something to do"
    if n == 1:
        assert [part.share for part in parts[0]] == [part.share for part in in_parts(rows, 2, 0)]


def test_each_process_draws_its_own_dropout(monkeypatch):
    """And process 0 draws what one process alone draws."""
    seeds, config = [], Config(save_path="", name="", val_path="", seed=3)

    def note(seed):
        seeds.append(seed)
        raise RunError("that is all")

    monkeypatch.setattr(module.mx.random, "seed", note)
    for rank in range(3):
        with pytest.raises(RunError):
            next(training_steps(SimpleNamespace(train=list), None, [[]], config, 1, 9, 7, one_of(3, rank)))
    assert len(set(seeds)) == 3
    assert seeds[0] == np.random.SeedSequence((3, 1, 7)).generate_state(1, np.uint64)[0]


# The launcher


def launch(n: int, *arguments) -> subprocess.CompletedProcess:
    """Through mlx.launch itself, which takes ports in a row."""
    launcher = Path(sys.executable).with_name("mlx.launch")
    if not launcher.exists():
        pytest.skip("mlx.launch is not beside this Python")
    (port,) = free_ports(1)
    options = ["-n", str(n), "--backend", "ring", "--starting-port", str(min(port, 60_000))]
    command = [launcher, *options, "--", sys.executable, ROOT / "run.py", *arguments]
    environment = os.environ | ENVIRONMENT
    return subprocess.run(
        [*map(str, command)], env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=110
    )


def test_200_steps_under_mlx_launch(tiny):
    """With dropout on; the loss falls, and what process 0 writes is what one process writes."""
    tiny.write("train.json", [tiny_item(a % 30 + 1, a % 7, a % 4) for a in range(400)])
    done = launch(2, tiny.config(batch_size_training=2, epochs_per_stage=2, save_only_improve=True))
    assert done.stdout.count("done: ") == done.stdout.count("run:   tiny") == 1, done.stderr
    assert "after epoch 2 the parameters are the same bits in all 2 processes" in done.stdout
    losses = [record["train/loss"] for record in tiny.records() if "train/loss" in record]
    assert len(losses) == 200
    assert all(map(math.isfinite, losses))
    assert sum(losses[-10:]) < 0.5 * sum(losses[:10])
    assert sorted(path.name for path in tiny.runs.joinpath("tiny").iterdir() if path.name[0] != ".") == [
        "config.yaml", "curves.png", "first_batch.txt", "metrics.jsonl", "predictions_1.jsonl", "predictions_2.jsonl",
        "state_1_100",
    ]  # fmt: skip


def test_a_mistake_is_said_once(tiny):
    done = launch(2, tiny.config(lr="fast"))
    assert (done.stdout + done.stderr).count("lr: expected a number") == 1
    assert "Traceback" not in done.stderr
    assert done.stderr.count("exited with code 2") == 2


def test_without_a_launcher_a_process_is_alone(tmp_path):
    empty = tmp_path / "empty"
    empty.write_text("")
    assert join({}) is ALONE
    assert join({"MLX_RANK": "0", "MLX_HOSTFILE": str(empty)}) is ALONE, "mlx.launch -n 1"
    assert join({"WORLD_SIZE": "1"}) is ALONE


def test_each_launch_of_mlx_is_understood(tmp_path, monkeypatch):
    monkeypatch.setattr(stopping, "silent", False)
    hosts, devices = tmp_path / "hosts.json", tmp_path / "devices.json"
    hosts.write_text(json.dumps([["10.0.0.1:5000", "10.0.1.1:5001"], ["10.0.0.2:5002"]]))
    devices.write_text(json.dumps([[None, "rdma_en5"], ["rdma_en5", None]]))
    ring = join({"MLX_RANK": "1", "MLX_HOSTFILE": str(hosts)})
    nccl = join({"MLX_RANK": "2", "MLX_WORLD_SIZE": "4", "NCCL_HOST_IP": "10.0.0.1", "NCCL_PORT": "123"})
    jaccl = join({"MLX_RANK": "0", "MLX_IBV_DEVICES": str(devices), "MLX_JACCL_COORDINATOR": "10.0.0.1:7"})
    assert ring.place == Place("ring", 1, 2, "10.0.0.1", 5000)
    assert nccl.place == Place("nccl", 2, 4, "10.0.0.1", 123)
    assert jaccl.place == Place("jaccl", 0, 2, "10.0.0.1", 7)


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "started by mpirun"),
        ({"WORLD_SIZE": "4", "RANK": "0"}, "started by torchrun"),
        ({"MLX_RANK": "0"}, "make no sense"),
        ({"MLX_RANK": "0", "MLX_HOSTFILE": "/nowhere"}, "make no sense"),
        ({"MLX_RANK": "2", "MLX_WORLD_SIZE": "2", "NCCL_HOST_IP": "x", "NCCL_PORT": "1"}, "rank 2 of 2"),
    ],
)
def test_a_launch_that_makes_no_group_is_an_error(environment, message, monkeypatch, call_main):
    """And not several separate trainings."""
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    outcome = call_main("args/gsm_cot.yaml")
    assert outcome.status == 2
    assert outcome.err.startswith("error: ") and message in outcome.err


def test_a_backend_that_is_not_there_is_an_error(tmp_path, monkeypatch, tiny):
    """mlx.launch --backend nccl without CUDA."""
    (port,) = free_ports(1)
    variables = {"MLX_WORLD_SIZE": "2", "NCCL_HOST_IP": "127.0.0.1", "NCCL_PORT": str(port)}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with Group(2, tmp_path / "hosts.json", tiny.config()) as group:
        (status, _, err), *others = group.wait()
    assert status == 2 and "MLX has no nccl backend in process 0 (" in err
    assert others == [(2, "", "")]
    assert not tiny.runs.exists()


def test_processes_that_do_not_come_are_named(monkeypatch):
    """A stranger at the port is none of them."""
    monkeypatch.setattr(module, "START", 1)
    (port,) = free_ports(1)

    def disturb():
        while True:
            with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=5) as stranger:
                stranger.sendall(b"GET / HTTP/1.1\r\nHost: coconut.example.org\r\n\r\n")
                return

    Thread(target=disturb, daemon=True).start()
    with pytest.raises(UserError, match="of 3 processes, 1, 2 did not come within 1 s"):
        Launched(Place("ring", 0, 3, "127.0.0.1", port)).start()


# Parameters


@pytest.fixture
def pair(monkeypatch):
    """Two connected processes in this one, without a backend: both(function of a process) -> results by rank."""
    monkeypatch.setattr(stopping, "silent", False)
    (port,) = free_ports(1)
    two = [Launched(Place("ring", rank, 2, "127.0.0.1", port)) for rank in range(2)]

    def both(function) -> list:
        results = [None, None]

        def call(rank):
            try:
                results[rank] = function(two[rank])
            except RunError as error:
                results[rank] = error

        threads = [Thread(target=call, args=(rank,)) for rank in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        return results

    both(lambda one: one._welcome() if one.is_main else one._call())
    for one in two:
        one.names = ["process 0 (here)", "process 1 (there)"]
    yield both
    for one in two:
        one._status = 1  # so that the end of one is not taken for a death, which would end this process
    for one in two:
        for link in one.links:
            link._connection.shutdown(socket.SHUT_RDWR)
            assert link.closed.wait(30)
            link._connection.close()


def test_what_process_0_makes_all_have(pair):
    made = []
    assert pair(lambda one: one.from_main(lambda: made.append(one.rank) or {"a": 1})) == [{"a": 1}] * 2
    assert made == [0]
    assert pair(lambda one: one.gather(one.rank + 5)) == [[5, 6], [5, 6]]


def test_parameters_that_differ_in_a_bit_stop_the_run(pair):
    same = pair(lambda one: one.check_same({"w": module.mx.ones((3,))}, "at the start"))
    assert same == [None, None]
    different = pair(lambda one: one.check_same({"w": module.mx.ones((3,)) + 1e-7 * one.rank}, "at the start"))
    for error in different:
        assert isinstance(error, RunError)
        assert "at the start the parameters of process 1 (there) are not those of process 0" in str(error)


@pytest.mark.parametrize("n_valid", [3, 7])
def test_an_evaluation_is_shared_out(n_valid, tiny, call_main):
    """only_eval; 3 items are one batch, so that one process has nothing to do."""
    tiny.write("valid.json", [tiny_item(a, 2, a % 4) for a in range(1, 1 + n_valid)])
    assert call_main(tiny.config(num_epochs=1)).status == 0
    keys = {"only_eval": True, "load_model_path": tiny.runs / "tiny" / "checkpoint_1", "batch_size_eval": 3}
    alone = call_main(tiny.config(name="alone", **keys))
    with Group(2, tiny.folder / "hosts.json", tiny.config(name="group", **keys)) as group:
        (status, out, err), other = group.wait()
    assert (status, other) == (0, (0, "", "")), err
    (one,), (several,) = tiny.records("alone"), tiny.records("group")
    assert several["eval/loss"] == pytest.approx(one["eval/loss"], rel=1e-6)
    texts = [(tiny.runs / name / "predictions_0.jsonl").read_text() for name in ("alone", "group")]
    assert texts[0] == texts[1] and texts[0].count("\n") == n_valid
    assert f"/{n_valid} = " in out and f"/{n_valid} = " in alone.out


def test_the_plan_counts_all_processes(tiny):
    with Group(2, tiny.folder / "hosts.json", tiny.config(batch_size_training=2), "--dry-run") as group:
        (status, out, err), other = group.wait()
    assert (status, other) == (0, (0, "", "")), err
    assert "2 optimiser steps an epoch, of 4 items each" in out
    assert not tiny.runs.exists()


# The end


class GroupTrial(Trial):
    """A run of tests/survival.py in two processes."""

    def __init__(self, folder: Path, **keys):
        own = {"reset_optimizer": False, "batch_size_training": 2, "gradient_accumulation_steps": 2}
        super().__init__(folder, own | keys)

    def start(self, *overrides, **options) -> Group:
        return Group(2, self.folder / "hosts.json", self.folder / "trial.yaml", *overrides, **options)

    def finish(self) -> str:
        with self.start() as group:
            (status, out, err), (other, *_) = group.wait()
        assert (status, other) == (0, 0), err
        return out

    @property
    def n_lines(self) -> int:
        return len((self.run_dir / "metrics.jsonl").read_text().splitlines())


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> GroupTrial:
    """An uninterrupted run in two processes: 3 epochs of 5 steps."""
    trial = GroupTrial(tmp_path_factory.mktemp("group") / "whole")
    trial.finish()
    return trial


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_ends_the_run_which_then_goes_on_to_the_same_bits(victim, whole, tmp_path):
    trial = GroupTrial(tmp_path / "killed")
    with trial.start() as group:
        wait_for(lambda: trial.n_lines >= 8, group)
        group.processes[victim].kill()
        killed, survivor = group.processes[victim], group.processes[1 - victim]
        started = time.monotonic()
        _, err = survivor.communicate(timeout=60)
        assert time.monotonic() - started < 20
    assert survivor.returncode == 1
    assert re.search(rf"error: process {victim} \(.*, pid {killed.pid}\) died", err), err
    assert "Traceback" not in err
    out = trial.finish()
    assert "going on from" in out
    assert differences(whole, trial) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_any_process_stops_all_at_one_step(number, whole, tmp_path):
    trial = GroupTrial(tmp_path / "stopped", save_interval_minutes=60)
    with trial.start() as group:
        wait_for(lambda: trial.n_lines >= 2, group)
        group.processes[1].send_signal(number)
        outcomes = group.wait()
    assert [status for status, _, _ in outcomes] == [128 + number] * 2, outcomes
    assert "".join(err for _, _, err in outcomes).count("stopped. To go on: the same mlx.launch with python run") == 1
    assert list(trial.run_dir.glob("state_*_*"))
    trial.finish()
    assert differences(whole, trial) == []


def test_a_signal_while_the_processes_agree_counts_the_next_time():
    """Waiting for a slower process is where a signal is most likely to come."""
    stop = StopSignals()

    class Waiting(Processes):
        def gather(self, value):
            stop.requested = signal.SIGTERM
            return [value, None]

    assert asked_to_stop(stop, Waiting()) is None
    assert asked_to_stop(stop, ALONE) == signal.SIGTERM


SLOW_DISK = """
import sys, time
sys.path.insert(0, {root!r})
import processes, run
processes.GRACE = processes.PATIENCE = 0.2
save = run.ckpt.save_state
run.ckpt.save_state = lambda *arguments: (time.sleep(3), save(*arguments))
sys.exit(run.main(sys.argv[1:]))
"""


def test_the_others_wait_until_process_0_has_saved(whole, tmp_path):
    """However long that takes: a step that all have taken is not lost because one was asked to stop."""
    trial = GroupTrial(tmp_path / "stopped", save_interval_minutes=60)
    (tmp_path / "slow.py").write_text(SLOW_DISK.format(root=str(ROOT)))
    with trial.start(script=tmp_path / "slow.py") as group:
        wait_for(lambda: trial.n_lines >= 2, group)
        group.processes[1].send_signal(signal.SIGTERM)
        outcomes = group.wait()
    assert [status for status, _, _ in outcomes] == [128 + signal.SIGTERM] * 2, outcomes
    (state,) = trial.run_dir.glob("state_*_*")
    position = json.loads((state / ckpt.RECORD).read_text())["position"]
    assert 5 * position["epoch"] + position["step"] == trial.n_lines
    trial.finish()
    assert differences(whole, trial) == []


def test_a_loss_that_is_not_finite_ends_all_with_one_message(tmp_path):
    trial = GroupTrial(tmp_path / "wild", lr=1e30)
    with trial.start() as group:
        outcomes = group.wait()
    assert [status for status, _, _ in outcomes] == [1, 1]
    printed = "".join(out + err for _, out, err in outcomes)
    assert printed.count("error: the loss is") == 1
    assert "Traceback" not in printed


# Another number of processes


def test_a_run_goes_on_in_one_process_with_the_batch_of_both(whole, tmp_path, call_main):
    """Same items in every step, whether as a larger batch or as more of them; only dropout and rounding differ."""
    shutil.copytree(whole.folder, tmp_path / "copy")
    here = [tmp_path / "copy" / "trial.yaml", f"save_path={tmp_path}/copy/runs", "num_epochs=4"]
    refused = call_main(*here)
    assert refused.status == 2
    assert "2 processes took 8 items a step" in refused.err and "here 1 would take 4" in refused.err
    outcome = call_main(*here, "gradient_accumulation_steps=4")
    assert outcome.status == 0, outcome.err
    assert "processes: was 2, is 1" in outcome.out
    lines = (tmp_path / "copy" / "runs" / "trial" / "metrics.jsonl").read_text().splitlines()
    steps = [record["train/step"] for record in map(json.loads, lines) if "train/step" in record]
    assert steps == list(range(20))


def test_with_as_many_processes_the_batch_stays_what_it_was():
    config = Config(save_path="x", name="x", val_path="x", cot=True, batch_size_training=4)
    record = {"config": config.to_dict() | {"batch_size_training": 2, "gradient_accumulation_steps": 2}}
    saved = SimpleNamespace(path="state", record=record | {"processes": 2})
    with pytest.raises(UserError, match="batch_size_training: was 2, is 4"):
        ckpt.check_same_run(saved, config, 2)
    assert len(ckpt.check_same_run(saved, Config(**config.to_dict() | {"batch_size_training": 8}), 1)) == 3
