"""Several ranks train what one process would, and fail together."""

import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from itertools import chain
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from conftest import TINY_MODEL, tiny_item
from launched import ENVIRONMENT, ROOT, Launch, free_ports
from survival import Trial, differences

import dataset
from dataset import TrainingSequence, micro_batch
from parallel import distributed as module
from parallel.distributed import ALONE, Group, join, parameter_digest
from utils import UserError

pytestmark = pytest.mark.usefixtures("on_cpu")  # bits are compared
NO_DROPOUT = {"embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0}

DTYPES = ("int32", "float32", "int64", "float64", "uint64", "uint8")

COLLECTIVES = """
import json, os
import mlx.core as mx
import numpy as np
from parallel import distributed
from utils import RunError, Stopped, UserError, say

def outcome(function, *arguments):
    try:
        return function(*arguments)
    except Exception as error:
        return f"{type(error).__name__}: {error}"

distributed.BUCKET_BYTES = 4000
group = distributed.join(os.environ)
say("only rank 0 says this")
rank, first = group.rank, group.is_main
results = {"group": [rank, group.world_size, first], "shard": list(group.shard(range(7)))}
for dtype in DTYPES:
    sent = np.frombuffer(np.random.default_rng(rank).bytes(24), dtype)
    for name, values in (("row", sent), ("columns", sent.reshape(1, -1))):
        found = group.all_gather(values)
        results[f"{dtype} {name}"] = [found.dtype.name, list(found.shape), found.tobytes().hex()]
ragged = group.all_gather_ragged(np.full((2 * rank, 2), rank + 1e-12))
results["ragged"] = [one.tolist() for one in ragged]
results["empty"] = [one.shape for one in group.all_gather_ragged(np.zeros((0, 3), np.int32))]
rng = np.random.default_rng(rank)
tree = {"a": [mx.array(rng.normal(size=n).astype(np.float32)) for n in (300, 900, 2000, 5)], "b": mx.ones((3, 4))}
summed = group.all_sum(tree)
results["sum"] = [np.array(array).tolist() for array in (*summed["a"], summed["b"])]
results["signals"] = [group.any_signal(None), group.any_signal(2 if first else None), group.any_signal(2 + rank)]
facts = {"parameters": 2**64 - 1, "seed": 3}
different = {"training data": 5 + 2**63 * (rank == 1), "seed": 3, "parameters": 2**63 + (not first)}
results["equal"] = [outcome(group.check_equal, facts, "at the start")]
results["different"] = outcome(group.check_equal, different, "at the start")
results["agree"] = [
    outcome(group.agree, problem)
    for problem in (None, UserError("mine") if rank == 1 else None, RunError(f"by rank {rank}"), Stopped(15))
]
group.barrier()
print(json.dumps(results))
"""


@pytest.fixture(scope="module", params=[2, 3])
def results(request, tmp_path_factory) -> list[dict]:
    """What COLLECTIVES found, by rank."""
    folder = tmp_path_factory.mktemp("collectives")
    script = folder / "collectives.py"
    script.write_text(f"DTYPES = {DTYPES!r}\n{COLLECTIVES}")
    with Launch(request.param, folder / "hosts.json", script=script) as launch:
        outcomes = launch.wait()
    assert [status for status, _, _ in outcomes] == [0] * request.param, outcomes
    printed = [out.splitlines() for _, out, _ in outcomes]
    assert [lines[:-1] for lines in printed[1:]] == [[]] * (request.param - 1)
    assert printed[0][0].startswith(f"group: {request.param} ranks, ring backend")
    assert printed[0][1:-1] == ["only rank 0 says this"]
    return [json.loads(lines[-1]) for lines in printed]


def test_each_rank_has_its_items(results):
    n = len(results)
    assert [found["group"] for found in results] == [[rank, n, rank == 0] for rank in range(n)]
    assert [found["shard"] for found in results] == [list(range(7))[rank::n] for rank in range(n)]


@pytest.mark.parametrize("dtype", DTYPES)
def test_values_are_gathered_bit_for_bit(dtype, results):
    """Random bits, so NaN and subnormal numbers too."""
    n, sent = len(results), b"".join(np.random.default_rng(rank).bytes(24) for rank in range(len(results)))
    length = 24 // np.dtype(dtype).itemsize
    for found in results:
        assert found[f"{dtype} row"] == [dtype, [n, length], sent.hex()]
        assert found[f"{dtype} columns"] == [dtype, [n, 1, length], sent.hex()]


def test_ranks_may_send_different_numbers_of_rows(results):
    expected = [[[rank + 1e-12] * 2] * (2 * rank) for rank in range(len(results))]
    assert [found["ragged"] for found in results] == [expected] * len(results)
    assert [found["empty"] for found in results] == [[[0, 3]] * len(results)] * len(results)


def test_a_tree_is_summed_over_the_ranks(results):
    """In several buckets, one of them larger than BUCKET_BYTES; same bits on all ranks."""
    rngs = [np.random.default_rng(rank) for rank in range(len(results))]
    for i, size in enumerate((300, 900, 2000, 5)):
        expected = sum(rng.normal(size=size) for rng in rngs)
        assert results[0]["sum"][i] == pytest.approx(expected, rel=1e-6, abs=1e-6)
    assert results[0]["sum"][4] == [[float(len(results))] * 4] * 3
    assert all(found["sum"] == results[0]["sum"] for found in results)


def test_a_signal_to_one_rank_reaches_all(results):
    assert [found["signals"] for found in results] == [[None, 2, 1 + len(results)]] * len(results)


def test_a_fact_that_differs_is_named_with_its_ranks(results):
    assert [found["equal"] for found in results] == [[None]] * len(results)
    others = ", ".join(str(rank) for rank in range(1, len(results)))
    message = f"RunError: at the start, these differ from rank 0: training data (rank 1); parameters (rank {others})"
    assert results[0]["different"].startswith(message)
    assert {found["different"] for found in results[1:]} == {"FailedElsewhere: another rank failed with exit status 1"}


def test_a_problem_of_one_rank_is_raised_on_all(results):
    """By the lowest rank that has one as it is, by the others as FailedElsewhere with the same exit status."""
    elsewhere = [f"FailedElsewhere: another rank failed with exit status {status}" for status in (2, 1, 143)]
    own = ["UserError: mine", "RunError: by rank 0", "Stopped: stopped by signal 15"]
    assert results[0]["agree"] == [None, elsewhere[0], own[1], own[2]]
    assert results[1]["agree"] == [None, own[0], elsewhere[1], elsewhere[2]]
    assert all(found["agree"] == [None, *elsewhere] for found in results[2:])


def test_one_process_agrees_with_itself():
    values, problem = np.arange(6.0).reshape(3, 2), UserError("mine")
    assert (ALONE.all_gather(values) == values[None]).all()
    assert [one.tolist() for one in ALONE.all_gather_ragged(values)] == [values.tolist()]
    assert [ALONE.any_signal(None), ALONE.any_signal(15)] == [None, 15]
    ALONE.check_equal({"parameters": -1}, "at the start")
    ALONE.agree(None)
    with pytest.raises(UserError) as raised:
        ALONE.agree(problem)
    assert raised.value is problem


def test_the_digest_sees_every_bit_and_no_order():
    one = {"b": [mx.ones((3,)), mx.array(2.0)], "a": mx.zeros((2, 2), mx.bfloat16)}
    assert parameter_digest(one) == parameter_digest({"a": one["a"], "b": one["b"]})
    assert parameter_digest(one) != parameter_digest(one | {"b": [mx.ones((3,)) + 1e-7, mx.array(2.0)]})


# Start


def test_without_a_launcher_a_process_is_alone(tmp_path):
    empty = tmp_path / "empty"
    empty.write_text("")
    assert join({}) is ALONE
    assert join({"MLX_RANK": "0", "MLX_HOSTFILE": str(empty)}) is ALONE, "mlx.launch -n 1"
    assert join({"WORLD_SIZE": "1"}) is ALONE
    assert join({"PMI_SIZE": ""}) is ALONE, "set, and empty"
    assert join({"SLURM_NTASKS": "4", "SLURM_PROCID": "0"}) is ALONE, "a batch script, which is one process"
    assert join({"SLURM_STEP_NUM_TASKS": "1", "SLURM_NTASKS": "4"}) is ALONE
    assert join({"MPI_LOCALNRANKS": "1", "MPI_LOCALRANKID": "0", "PMI_ID": "0"}) is ALONE, "mpiexec -n 1"
    assert join({"PALS_LOCAL_SIZE": "1", "PALS_RANKID": "0", "PMIX_RANK": "0", "ALPS_APP_PE": "0"}) is ALONE
    assert join({"PMIX_RANK": ""}) is ALONE


def test_each_launch_of_mlx_is_understood(tmp_path):
    hosts, devices = tmp_path / "hosts.json", tmp_path / "devices.json"
    hosts.write_text(json.dumps([["10.0.0.1:5000", "10.0.1.1:5001"], ["10.0.0.2:5002"]]))
    devices.write_text(json.dumps([[None, "rdma_en5"], ["rdma_en5", None]]))
    ring = {"MLX_RANK": "1", "MLX_HOSTFILE": str(hosts)}
    nccl = {"MLX_RANK": "2", "MLX_WORLD_SIZE": "4", "NCCL_HOST_IP": "10.0.0.1", "NCCL_PORT": "123"}
    jaccl = {"MLX_RANK": "0", "MLX_IBV_DEVICES": str(devices), "MLX_JACCL_COORDINATOR": "10.0.0.1:7"}
    assert module._launched(ring) == ("ring", 1, 2)
    assert module._launched(ring | {"SLURM_STEP_NUM_TASKS": "2"}) == ("ring", 1, 2), "srun may start mlx.launch"
    assert module._launched(nccl) == ("nccl", 2, 4)
    assert module._launched(jaccl) == ("jaccl", 0, 2)


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "started by mpirun"),
        ({"WORLD_SIZE": "4", "RANK": "0"}, "started by torchrun"),
        ({"PMI_SIZE": "2", "PMI_RANK": "1"}, "started by mpiexec"),
        ({"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1"}, "started by srun"),
        ({"MV2_COMM_WORLD_SIZE": "2", "MV2_COMM_WORLD_RANK": "1"}, "started by mpirun_rsh"),
        ({"JSM_NAMESPACE_SIZE": "2", "JSM_NAMESPACE_RANK": "1"}, "started by jsrun"),
        ({"FLUX_JOB_SIZE": "2", "FLUX_TASK_RANK": "1"}, "started by flux run"),
        ({"MPI_LOCALNRANKS": "4", "MPI_LOCALRANKID": "0", "PMI_ID": "0"}, r"mpiexec \(MPI_LOCALNRANKS is 4"),
        ({"MPI_LOCALNRANKS": "1", "MPI_LOCALRANKID": "0", "PMI_ID": "1"}, r"mpiexec \(PMI_ID is 1"),
        ({"PALS_LOCAL_SIZE": "2", "PALS_RANKID": "0"}, r"HPE's mpiexec \(PALS_LOCAL_SIZE is 2"),
        ({"PALS_LOCAL_SIZE": "1", "PALS_RANKID": "1"}, r"HPE's mpiexec \(PALS_RANKID is 1"),
        ({"MVP_COMM_WORLD_SIZE": "2", "MVP_COMM_WORLD_RANK": "0"}, "started by MVAPICH's mpiexec"),
        ({"HOROVOD_SIZE": "2", "HOROVOD_RANK": "0"}, "started by horovodrun"),
        ({"PMIX_RANK": "1", "PMIX_NAMESPACE": "prterun-host-1"}, "started by a PMIx launcher"),
        ({"ALPS_APP_PE": "3"}, "started by aprun"),
        ({"PMIX_RANK": "first"}, "are inconsistent.*PMIX_RANK is first, expected a number"),
        ({"WORLD_SIZE": "many"}, "are inconsistent.*WORLD_SIZE is many, expected a number"),
        ({"MLX_RANK": "0"}, "are inconsistent: MLX_HOSTFILE is not set; unset them for one process"),
        ({"MLX_RANK": "0", "MLX_HOSTFILE": "/nowhere"}, "are inconsistent"),
        ({"MLX_RANK": "2", "MLX_WORLD_SIZE": "2", "NCCL_HOST_IP": "x", "NCCL_PORT": "1"}, "rank 2 of 2"),
        ({"MLX_RANK": "-1", "MLX_WORLD_SIZE": "2"}, "rank -1 of 2"),
    ],
)
def test_a_launch_that_makes_no_group_is_an_error(environment, message):
    """And not several separate trainings."""
    with pytest.raises(UserError, match=message):
        join(environment)


def test_a_backend_that_mlx_lacks_is_an_error():
    """mlx.launch --backend nccl without CUDA."""
    variables = {"MLX_RANK": "0", "MLX_WORLD_SIZE": "2", "NCCL_HOST_IP": "127.0.0.1", "NCCL_PORT": "12345"}
    if module.mx.distributed.is_available("nccl"):
        pytest.skip("this MLX has the nccl backend")
    with pytest.raises(UserError, match="rank 0: MLX has no nccl backend"):
        join(variables)


WAITING = """
from startup import signals
signals.at_once()
import os, sys
from parallel import distributed
distributed.START_SECONDS = int(sys.argv[1])
print("starting", flush=True)
try:
    distributed.join(os.environ)
except distributed.UserError as error:
    sys.exit(f"error: {error}")
"""


def wait_alone(folder: Path, ports: list[int], rank: int = 0, seconds: int = 60) -> subprocess.Popen:
    """One rank of 2 without the other; it waits at most `seconds`."""
    script, hosts = folder / "waiting.py", folder / "hosts.json"
    script.write_text(WAITING)
    hosts.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in ports]))
    environment = os.environ | ENVIRONMENT | {"MLX_RANK": str(rank), "MLX_HOSTFILE": str(hosts)}
    command = [sys.executable, str(script), str(seconds)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_a_rank_does_not_wait_without_limit_for_one_that_never_comes(tmp_path):
    with wait_alone(tmp_path, free_ports(2), seconds=1) as process:
        out, err = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGALRM, err
    assert out == "starting\ngroup: 2 ranks, ring backend; waiting up to 1 s for all of them\n"


@pytest.mark.parametrize("rank", [0, 1])
def test_a_signal_ends_a_rank_that_waits_for_the_others(rank, tmp_path):
    """Although MLX holds the interpreter there, so that a Python handler runs late or never."""
    with wait_alone(tmp_path, free_ports(2), rank) as process:
        process.stdout.readline()
        time.sleep(0.5)  # until it is inside MLX
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=20)
    assert process.returncode == -signal.SIGTERM


def test_a_port_in_use_is_an_error(tmp_path):
    ports = free_ports(2)
    with socket.create_server(("127.0.0.1", ports[0])), wait_alone(tmp_path, ports) as process:
        _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert err.startswith("error: rank 0 of 2 cannot join the group: ") and "--starting-port" in err


# A rank that dies

DYING = """
import os, signal, sys
import mlx.core as mx
from parallel.distributed import FailedElsewhere, RunError, join
group = join(os.environ)
group.barrier()
if group.rank == int(sys.argv[1]):
    os.kill(os.getpid(), signal.SIGKILL)
try:
    group.all_sum({"w": mx.ones(3)})
except (FailedElsewhere, RunError) as error:
    print(f"{type(error).__name__}: {error}")
    sys.exit(3)
"""


@pytest.mark.parametrize(("n", "victim"), [(2, 0), (2, 1), (3, 2)])
def test_the_others_notice_a_rank_that_died(n, victim, tmp_path):
    """Without mlx.launch, which would end them itself."""
    (tmp_path / "dying.py").write_text(DYING)
    with Launch(n, tmp_path / "hosts.json", victim, script=tmp_path / "dying.py") as launch:
        outcomes = launch.wait(timeout=60)
    assert [status for status, _, _ in outcomes] == [-signal.SIGKILL if rank == victim else 3 for rank in range(n)]
    for rank, (_, out, _) in enumerate(outcomes):
        if rank != victim:
            assert ("RunError: another rank exited" if rank == 0 else "FailedElsewhere: another rank") in out


# Runs: the steps of one process


@pytest.mark.parametrize(("method", "n"), [("coconut", 2), ("cot", 3)])
def test_several_ranks_take_the_steps_of_one_process(method, n, tiny, call_main):
    """12 steps of 2 x 6 items of 19: the last micro-batch is one item, which leaves the other ranks with none."""
    tiny.write("model.json", TINY_MODEL | NO_DROPOUT)
    tiny.write("train.json", [tiny_item(a, 3, a % 4) for a in range(1, 20)])
    tiny.write("valid.json", [tiny_item(a, 2, a % 4) for a in range(1, 8)])
    keys = {
        "coconut": method == "coconut", "cot": method == "cot", "num_epochs": 6, "epochs_per_stage": 2,
        "gradient_accumulation_steps": 2, "debug": True, "batch_size_eval": 2,
    }  # fmt: skip
    alone = call_main(tiny.config("alone.yaml", name="alone", batch_size_training=6, **keys))
    assert alone.status == 0, alone.err
    config = tiny.config("group.yaml", name="group", batch_size_training=6 // n, **keys)
    with Launch(n, tiny.folder / "hosts.json", config) as launch:
        (status, out, err), *others = launch.wait()
    assert status == 0, err
    assert out.count(f"group: {n} ranks") == 1
    assert others == [(0, "", "")] * (n - 1), "rank 0 alone prints"

    one, several = tiny.records("alone"), tiny.records("group")
    for name, count in (("train/loss", 12), ("eval/loss", 6)):
        expected = [record[name] for record in one if name in record]
        assert len(expected) == count
        assert [record[name] for record in several if name in record] == pytest.approx(expected, rel=1e-5)
    for epoch in range(1, 7):
        ours, theirs = (tiny.runs / name / f"predictions_{epoch}.jsonl" for name in ("group", "alone"))
        assert ours.read_text() == theirs.read_text()
    assert [p["idx"] for p in map(json.loads, ours.read_text().splitlines())] == list(range(7))


def one_of(n: int, rank: int) -> Group:
    """A rank of n that needs no other."""
    group = Group()
    group.world_size, group.rank = n, rank
    return group


@pytest.mark.parametrize(("n", "n_rows"), [(1, 5), (2, 5), (3, 7), (3, 2)])
def test_the_chunks_of_all_ranks_are_the_micro_batch(n, n_rows, monkeypatch):
    """Each row once; every labeled token has the same weight wherever it is."""
    monkeypatch.setattr(dataset, "n_streams", lambda: 2)
    rng = np.random.default_rng(0)
    rows = [TrainingSequence(np.full(10 + i, i + 1, np.int32), 3, 0, int(rng.integers(2, 9))) for i in range(n_rows)]
    chunks = [micro_batch(rows, one_of(n, rank), pad_id=0) for rank in range(n)]
    counted = [chunk for chunk in chain(*chunks) if chunk.loss_weight]
    weights = [chunk.loss_weight / chunk.batch.label_mask.sum() for chunk in counted]
    assert sum(chunk.loss_weight for chunk in counted) == pytest.approx(1)
    assert all(weight == pytest.approx(1 / sum(row.n_labeled for row in rows)) for weight in weights)
    labels = [set(chunk.batch.labels[chunk.batch.label_mask > 0].tolist()) for chunk in counted]
    assert sorted(chain(*labels)) == list(range(1, n_rows + 1))
    assert all(chunks), "every rank has something to compute"


@pytest.mark.parametrize("n_valid", [3, 7])
def test_an_evaluation_is_shared_out(n_valid, tiny, call_main):
    """only_eval; 3 items are one batch, so that one rank has none."""
    tiny.write("valid.json", [tiny_item(a, 2, a % 4) for a in range(1, 1 + n_valid)])
    assert call_main(tiny.config(num_epochs=1)).status == 0
    keys = {"only_eval": True, "load_model_path": tiny.runs / "tiny" / "checkpoint_1", "batch_size_eval": 3}
    alone = call_main(tiny.config(name="alone", **keys))
    with Launch(2, tiny.folder / "hosts.json", tiny.config(name="group", **keys)) as launch:
        (status, out, err), other = launch.wait()
    assert (status, other) == (0, (0, "", "")), err
    (one,), (several,) = tiny.records("alone"), tiny.records("group")
    assert several["eval/loss"] == pytest.approx(one["eval/loss"], rel=1e-6)
    texts = [(tiny.runs / name / "predictions_1.jsonl").read_text() for name in ("alone", "group")]
    assert texts[0] == texts[1] and texts[0].count("\n") == n_valid
    assert f"/{n_valid} = " in out and f"/{n_valid} = " in alone.out


def test_the_dry_run_counts_all_ranks(tiny):
    with Launch(2, tiny.folder / "hosts.json", tiny.config(batch_size_training=2), "--dry-run") as launch:
        (status, out, err), other = launch.wait()
    assert (status, other) == (0, (0, "", "")), err
    assert "2 optimizer steps an epoch, of 4 items each" in out
    assert not tiny.runs.exists()


# Runs: mlx.launch


def mlx_launch(n: int, *arguments) -> subprocess.CompletedProcess:
    """Run run.py through mlx.launch itself, which takes consecutive ports."""
    launcher = Path(sys.executable).with_name("mlx.launch")
    if not launcher.exists():
        pytest.skip("mlx.launch is not beside this Python")
    (port,) = free_ports(1)
    options = ["-n", str(n), "--backend", "ring", "--starting-port", str(min(port, 60_000))]
    command = [launcher, *options, "--", sys.executable, ROOT / "run.py", *arguments]
    return subprocess.run(
        [*map(str, command)], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=110, check=False
    )


def test_a_run_under_mlx_launch(tiny):
    """What rank 0 writes is what one process writes. Few steps, because mlx.launch itself keeps a core busy."""
    done = mlx_launch(2, tiny.config(batch_size_training=2, save_only_improve=True))
    assert done.stdout.count("done: ") == done.stdout.count("run:   tiny") == 1, done.stderr
    assert len([record for record in tiny.records() if "train/loss" in record]) == 4
    assert sorted(path.name for path in tiny.runs.joinpath("tiny").iterdir() if path.name[0] != ".") == [
        "config.yaml", "curves.png", "first_batch.txt", "metrics.jsonl", "predictions_1.jsonl", "predictions_2.jsonl",
        "state_1_2",
    ]  # fmt: skip


def test_200_steps_of_two_ranks(tiny):
    """With dropout on; the loss falls."""
    tiny.write("train.json", [tiny_item(a % 30 + 1, a % 7, a % 4) for a in range(400)])
    config = tiny.config(batch_size_training=2, epochs_per_stage=2, save_only_improve=True)
    with Launch(2, tiny.folder / "hosts.json", config) as launch:
        (status, _, err), other = launch.wait()
    assert (status, other) == (0, (0, "", "")), err
    losses = [record["train/loss"] for record in tiny.records() if "train/loss" in record]
    assert len(losses) == 200
    assert all(map(math.isfinite, losses))
    assert sum(losses[-10:]) < 0.5 * sum(losses[:10])


def test_a_mistake_is_said_once(tiny):
    """mlx.launch itself exits with status 0; it prints those of the ranks."""
    done = mlx_launch(2, tiny.config(lr="fast"))
    assert (done.stdout + done.stderr).count("lr: expected a number") == 1
    assert "Traceback" not in done.stderr
    assert done.stderr.count("exited with code 2") == 2


# Runs: the end


def wait_for(condition, launch: Launch) -> None:
    """Until the condition holds; fails if a process ends before that."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        with suppress(OSError, ValueError):
            if condition():
                return
        ended = [process for process in launch.processes if process.poll() is not None]
        assert not ended, [process.communicate() for process in ended]
        time.sleep(0.02)
    raise AssertionError("nothing happened for a minute")


class GroupTrial(Trial):
    """A run of tests/survival.py on two ranks."""

    def __init__(self, folder: Path, **keys):
        own = {"num_epochs": 2, "reset_optimizer": False, "batch_size_training": 2, "gradient_accumulation_steps": 2}
        super().__init__(folder, own | keys)

    def start(self, *overrides, **options) -> Launch:
        return Launch(2, self.folder / "hosts.json", self.folder / "trial.yaml", *overrides, **options)

    def finish(self) -> str:
        with self.start() as launch:
            (status, out, err), (other, *_) = launch.wait()
        assert (status, other) == (0, 0), err
        return out

    @property
    def n_steps(self) -> int:
        return (self.run_dir / "metrics.jsonl").read_text().count('"train/step"')


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> GroupTrial:
    """An uninterrupted run on two ranks: 2 epochs of 5 steps."""
    trial = GroupTrial(tmp_path_factory.mktemp("group") / "whole")
    trial.finish()
    return trial


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_rank_ends_the_run_which_then_resumes_to_the_same_bits(victim, whole, tmp_path):
    trial = GroupTrial(tmp_path / "killed")
    with trial.start() as launch:
        wait_for(lambda: trial.n_steps >= 6, launch)
        launch.processes[victim].kill()
        survivor = launch.processes[1 - victim]
        started = time.monotonic()
        _, err = survivor.communicate(timeout=60)
        assert time.monotonic() - started < 20
    assert survivor.returncode == 1
    assert ("error: another rank exited" in err) == (victim == 1), err
    assert "connection to a peer was lost" in err or "closed by the peer" in err, "MLX says it on every rank"
    assert "Traceback" not in err
    out = trial.finish()
    assert "going on from" in out
    assert differences(whole, trial) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_any_rank_stops_all_at_one_step(number, whole, tmp_path):
    trial = GroupTrial(tmp_path / "stopped", save_interval_minutes=60)
    with trial.start() as launch:
        wait_for(lambda: trial.n_steps >= 2, launch)
        launch.processes[1].send_signal(number)
        outcomes = launch.wait()
    assert [status for status, _, _ in outcomes] == [128 + number] * 2, outcomes
    assert "".join(err for _, _, err in outcomes).count("stopped. To go on: the same mlx.launch with python run") == 1
    assert list(trial.run_dir.glob("state_*_*"))
    trial.finish()
    assert differences(whole, trial) == []


SLOW_DISK = """
import sys, time
import run
from training import checkpoint
save = checkpoint.save_state
checkpoint.save_state = lambda *arguments: (time.sleep(1), save(*arguments))[1]
sys.exit(run.main(sys.argv[1:]))
"""


def test_the_others_wait_until_rank_0_has_saved(whole, tmp_path):
    """No matter how long that takes: a step that all have taken is not lost because one was asked to stop."""
    trial = GroupTrial(tmp_path / "stopped", save_interval_minutes=60)
    (tmp_path / "slow.py").write_text(SLOW_DISK)
    with trial.start(script=tmp_path / "slow.py") as launch:
        wait_for(lambda: trial.n_steps >= 2, launch)
        launch.processes[1].send_signal(signal.SIGTERM)
        outcomes = launch.wait()
    assert [status for status, _, _ in outcomes] == [128 + signal.SIGTERM] * 2, outcomes
    (state,) = trial.run_dir.glob("state_*_*")
    position = json.loads((state / "coconut.json").read_text())["position"]
    assert 5 * position["epoch"] + position["step"] == trial.n_steps
    trial.finish()
    assert differences(whole, trial) == []


@pytest.mark.parametrize(("minutes", "message"), [(60, "the loss is"), (0, "the validation loss is")])
def test_a_loss_that_is_not_finite_ends_all_with_one_message(minutes, message, tmp_path):
    """That of a step, or that before a save, which rank 0 alone computes."""
    trial = GroupTrial(tmp_path / "wild", lr=1e30, save_interval_minutes=minutes)
    with trial.start() as launch:
        outcomes = launch.wait()
    assert [status for status, _, _ in outcomes] == [1, 1]
    (_, _, printed), other = outcomes
    assert printed.count("error: ") == printed.count(f"error: {message}") == 1 and "Traceback" not in printed
    assert other == (1, "", "")
    assert not list(trial.run_dir.glob("state_*"))


NOT_FINITE = """
import sys
import run
from training import trainer
loss = trainer.Evaluator.loss
trainer.Evaluator.loss = lambda self, epoch: float("nan") if epoch == 1 else loss(self, epoch)
sys.exit(run.main(sys.argv[1:]))
"""


def test_a_validation_loss_that_is_not_finite_leaves_the_state_before(whole, tmp_path):
    trial = GroupTrial(tmp_path / "spoiled")
    (tmp_path / "spoiled.py").write_text(NOT_FINITE)
    with trial.start(script=tmp_path / "spoiled.py") as launch:
        outcomes = launch.wait()
    assert [status for status, _, _ in outcomes] == [1, 1], outcomes
    printed = "".join(out + err for _, out, err in outcomes)
    assert printed.count("error: the validation loss of") == 1 and "Traceback" not in printed
    [state] = trial.run_dir.glob("state_*_*")
    assert json.loads((state / "coconut.json").read_text())["position"]["epoch"] <= 1
    assert state.name != "state_1_5" and not (trial.run_dir / "checkpoint_2").exists()
    trial.finish()
    assert differences(whole, trial) == []


OWN_FOLDER = """
import os, sys
import run
os.chdir(os.path.join(sys.argv[1], os.environ["MLX_RANK"]))
sys.exit(run.main(["trial.yaml"]))
"""


@pytest.mark.parametrize(("file", "fact", "old", "new"), [
    ("train.json", "training data", '"answer": "0"', '"answer": "9"'),
    ("trial.yaml", "configuration", '"lr": 0.001', '"lr": 0.002'),
])  # fmt: skip
def test_ranks_that_read_different_files_are_an_error(file, fact, old, new, tmp_path):
    """Each rank reads its own files, which on several machines may not be the same."""
    trial = GroupTrial(tmp_path / "0", train_path="train.json", save_path="runs")
    shutil.copytree(trial.folder, tmp_path / "1")
    path = tmp_path / "1" / file
    path.write_text(path.read_text().replace(old, new))
    (tmp_path / "own.py").write_text(OWN_FOLDER)
    with Launch(2, tmp_path / "hosts.json", tmp_path, script=tmp_path / "own.py") as launch:
        (status, _, err), other = launch.wait()
    assert err.count("error: ") == err.count(f"error: at the start, these differ from rank 0: {fact} (rank 1). ") == 1
    assert "Traceback" not in err
    assert (status, other) == (1, (1, "", ""))
    assert not list(trial.run_dir.glob("state_*"))


# Runs: another number of processes


def test_a_run_resumes_in_one_process_with_the_batch_of_both(whole, tmp_path, call_main):
    """Same items in every step, whether as a larger batch or as more of them; only dropout and rounding differ."""
    shutil.copytree(whole.folder, tmp_path / "copy")
    here = [tmp_path / "copy" / "trial.yaml", f"save_path={tmp_path}/copy/runs", "num_epochs=3"]
    refused = call_main(*here)
    assert refused.status == 2
    assert "2 processes took 8 items a step" in refused.err and "here 1 would take 4" in refused.err
    outcome = call_main(*here, "gradient_accumulation_steps=4")
    assert outcome.status == 0, outcome.err
    assert "processes: was 2, is 1" in outcome.out
    lines = (tmp_path / "copy" / "runs" / "trial" / "metrics.jsonl").read_text().splitlines()
    steps = [record["train/step"] for record in map(json.loads, lines) if "train/step" in record]
    assert steps == list(range(15))
