"""Data parallelism over mx.distributed: several ranks, started by `mlx.launch`, train one model.

Every rank reads its own configuration, data and weights, as in the official code, and the ranks compare digests of
them. Rank 0 alone prints and writes files. All ranks call the collective methods in the same order.
docs/distributed.md tells what happens when a rank fails.
"""

import json
import signal
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from utils import RunError, Stopped, UserError, say, silence, warn

START_SECONDS = 120  # longest wait for the other ranks at the start
BUCKET_BYTES = 32 << 20  # gradients summed at once, as in mlx.nn.average_gradients
FOREIGN_LAUNCHERS = {  # variable with the number of processes -> launcher
    "WORLD_SIZE": "torchrun",
    "OMPI_COMM_WORLD_SIZE": "mpirun",
    "PMI_SIZE": "mpiexec",
    "MV2_COMM_WORLD_SIZE": "mpirun_rsh",
    "JSM_NAMESPACE_SIZE": "jsrun",
    "FLUX_JOB_SIZE": "flux run",
    "SLURM_STEP_NUM_TASKS": "srun",  # SLURM_NTASKS is set in a batch script too, which is one process
    "MVP_COMM_WORLD_SIZE": "MVAPICH's mpiexec",
    "HOROVOD_SIZE": "horovodrun",
    "MPI_LOCALNRANKS": "mpiexec",  # of MPICH and Intel MPI; on this machine, as the next one
    "PALS_LOCAL_SIZE": "HPE's mpiexec",
}
FOREIGN_RANKS = {  # variable with the number of a process, from 0, where no variable has how many there are -> launcher
    "PMI_ID": "mpiexec",
    "PMIX_RANK": "a PMIx launcher",  # prterun, mpirun, srun --mpi=pmix
    "PALS_RANKID": "HPE's mpiexec",
    "ALPS_APP_PE": "aprun",
}


class FailedElsewhere(Exception):
    """Another rank failed and prints the reason; this rank exits with the same `status` and prints nothing."""

    def __init__(self, status: int):
        super().__init__(f"another rank failed with exit status {status}")
        self.status = status


class Group:
    """A single process: the collective methods return what the caller passed. DistributedGroup has several ranks."""

    rank = 0
    world_size = 1

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which alone prints, logs and writes files."""
        return self.rank == 0

    def shard(self, items: Sequence) -> Sequence:
        """Every world_size-th item, beginning at rank: each item is on exactly one rank."""
        return items[self.rank :: self.world_size]

    def all_gather(self, values: np.ndarray) -> np.ndarray:
        """Values of all ranks, [world_size, *values.shape], bit for bit; same on all ranks.

        Shape and dtype must be equal on all ranks.
        """
        return values[None]

    def all_sum(self, tree: Any) -> Any:
        """Tree of float32 arrays, each summed over the ranks; same bits on all ranks."""
        return tree

    def all_gather_ragged(self, values: np.ndarray) -> list[np.ndarray]:
        """Values of all ranks, by rank; same on all ranks. The length of the first axis may differ between ranks."""
        lengths = self.all_gather(np.array(len(values)))
        padded = np.zeros((lengths.max(), *values.shape[1:]), values.dtype)
        padded[: len(values)] = values
        return [one[:length] for one, length in zip(self.all_gather(padded), lengths, strict=True)]

    def largest(self, *numbers: int) -> list[int]:
        """The largest of each number over the ranks; same on all ranks."""
        return self.all_gather(np.array(numbers, np.int64)).max(axis=0).tolist()

    def any_signal(self, number: int | None) -> int | None:
        """The largest signal number that any rank received, None without one; same on all ranks."""
        return self.largest(number or 0)[0] or None

    def check_equal(self, facts: dict[str, int], when: str) -> None:
        """Raise RunError on rank 0, FailedElsewhere on the others, if a fact (64 bits) differs between the ranks.

        The message names the facts and the ranks that differ from rank 0. The names must be equal on all ranks.
        """
        values = self.all_gather(np.array([value % 2**64 for value in facts.values()], np.uint64))
        different = values != values[0]  # [world_size, n_facts]
        found = [
            f"{name} (rank {', '.join(map(str, np.flatnonzero(ranks)))})"
            for name, ranks in zip(facts, different.T, strict=True)
            if ranks.any()
        ]
        text = f"{when}, these differ from rank 0: {'; '.join(found)}. All ranks must read and compute the same"
        self.agree(RunError(text) if found else None)

    def agree(self, problem: Exception | None) -> None:
        """Raise on every rank if any rank has a problem.

        The lowest rank with a problem raises its own and is the one to print it; the others raise FailedElsewhere.
        """
        statuses = self.all_gather(np.array(_exit_status(problem)))
        if not statuses.any():
            return
        first = int(np.flatnonzero(statuses)[0])
        if problem and first == self.rank:
            raise problem
        raise FailedElsewhere(int(statuses[first]))

    def barrier(self) -> None:
        """Wait until all ranks have come here."""
        self.all_gather(np.array(0))

    def ignore_launcher(self) -> None:
        """From here on this rank ends with its own status, not by the SIGTERM that follows another rank's exit."""


ALONE = Group()


class DistributedGroup(Group):
    """Several ranks. If one of them exits, the next collective raises RunError on rank 0, FailedElsewhere elsewhere."""

    def __init__(self, group: mx.distributed.Group):
        self.rank, self.world_size = group.rank(), group.size()
        self._group = group

    def all_gather(self, values: np.ndarray) -> np.ndarray:
        sent = mx.array(np.frombuffer(values.tobytes(), np.uint8))  # bytes: MLX has no float64 on a GPU
        received = self._evaluate(mx.distributed.all_gather(sent, group=self._group))
        return np.array(received).view(values.dtype).reshape(self.world_size, *values.shape)

    def ignore_launcher(self) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)

    def all_sum(self, tree: Any) -> Any:
        names, arrays = zip(*tree_flatten(tree), strict=True)
        summed = []
        for bucket in _buckets(arrays):
            flat = mx.concatenate([array.reshape(-1) for array in bucket])
            mx.eval(flat)  # first, so that no GPU command waits for the network: Metal's watchdog would end it
            flat = self._evaluate(mx.distributed.all_sum(flat, group=self._group))
            ends = np.cumsum([array.size for array in bucket])[:-1].tolist()
            summed += [part.reshape(array.shape) for part, array in zip(mx.split(flat, ends), bucket, strict=True)]
        return tree_unflatten(list(zip(names, summed, strict=True)))

    def _evaluate(self, array: mx.array) -> mx.array:
        """Run the collective operation that computes `array`."""
        try:
            mx.eval(array)
        except RuntimeError as error:
            if not self.is_main:
                raise FailedElsewhere(1) from error
            raise RunError(
                f"another rank exited, or the network failed ({error}). Saved states are intact: run the same command "
                "again to resume"
            ) from error
        return array


def join(environment: Mapping[str, str]) -> Group:
    """The group that the launcher's variables describe; ALONE without a launcher. Silences all ranks but rank 0.

    Raises UserError if another launcher started several processes, if the variables are inconsistent, or if MLX lacks
    the backend or cannot reach the other ranks. On all ranks the same, except for a rank's own network problems.
    """
    try:
        backend, rank, world_size = _launched(environment)
    except (OSError, ValueError, LookupError, TypeError) as error:
        found = f"{error.args[0]} is not set" if isinstance(error, KeyError) else f"{error!r:.200}"
        remedy = "unset them for one process, `mlx.launch` sets them for several"
        raise UserError(
            f"the launcher's variables (MLX_RANK and others) are inconsistent: {found}; {remedy}"
        ) from error
    if world_size == 1:
        return ALONE
    if rank:
        silence()
    if not mx.distributed.is_available(backend):
        raise UserError(f"rank {rank}: MLX has no {backend} backend on this machine")
    say(f"group: {world_size} ranks, {backend} backend; waiting up to {START_SECONDS} s for all of them")
    try:
        with _default_signals():
            group = DistributedGroup(mx.distributed.init(strict=True, backend=backend))
    except RuntimeError as error:
        raise UserError(
            f"rank {rank} of {world_size} cannot join the group: {error}. Either a rank did not start, or another run "
            "uses the port (`mlx.launch --starting-port` chooses others, for nccl --nccl-port)"
        ) from error
    if (group.rank, group.world_size) != (rank, world_size):
        found = f"rank {group.rank} of {group.world_size}"
        raise UserError(f"launched as rank {rank} of {world_size}, but the {backend} backend made it {found}")
    return group


def parameter_digest(tree: Any) -> int:
    """CRC-32 over the bytes of all arrays, in the order of their names."""
    arrays, checksum = dict(tree_flatten(tree)), 0
    for name in sorted(arrays):
        checksum = zlib.crc32(np.array(arrays[name].reshape(-1).view(mx.uint8)), checksum)
    return checksum


def _launched(environment: Mapping[str, str]) -> tuple[str, int, int]:
    """Backend, rank and world size as mlx.launch sets them; world size 1 without a launcher."""
    if "MLX_RANK" not in environment:
        _refuse_foreign_launchers(environment)
        return "", 0, 1
    if "MLX_JACCL_COORDINATOR" in environment:
        backend, world_size = "jaccl", len(json.loads(Path(environment["MLX_IBV_DEVICES"]).read_text()))
    elif "MLX_WORLD_SIZE" in environment:
        backend, world_size = "nccl", int(environment["MLX_WORLD_SIZE"])
    else:
        text = Path(environment["MLX_HOSTFILE"]).read_text()
        backend, world_size = "ring", len(json.loads(text)) if text.strip() else 1  # mlx.launch -n 1: an empty file
    rank = int(environment["MLX_RANK"])
    if not 0 <= rank < world_size:
        raise ValueError(f"rank {rank} of {world_size}")
    return backend, rank, world_size


def _refuse_foreign_launchers(environment: Mapping[str, str]) -> None:
    """Raise UserError where one of several processes is sure; warn a first one that cannot know whether it is alone."""
    for name, launcher in (FOREIGN_LAUNCHERS | FOREIGN_RANKS).items():
        alone = 0 if name in FOREIGN_RANKS else 1
        value = environment.get(name) or str(alone)
        if not value.isdecimal():
            raise ValueError(f"{name} is {value}, expected a number")
        if int(value) > alone:
            raise UserError(
                f"started by {launcher} ({name} is {value}): each process would train for itself. Use "
                "`mlx.launch -n N --backend ring -- python run.py CONFIG`"
            )
    rank = next((name for name in FOREIGN_RANKS if environment.get(name)), None)
    if rank and not any(map(environment.get, FOREIGN_LAUNCHERS)):
        warn(f"{rank} is 0 and nothing says how many processes {FOREIGN_RANKS[rank]} started; this one trains alone")


@contextmanager
def _default_signals() -> Iterator[None]:
    """Let Ctrl-C, SIGTERM and, after START_SECONDS, SIGALRM end the process inside MLX's init.

    It waits without limit for a rank that does not come, and holds the interpreter: Python handlers run late or never.
    """
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number in handlers:
        signal.signal(number, signal.SIG_DFL)
    signal.alarm(START_SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _buckets(arrays: Sequence[mx.array]) -> Iterator[list[mx.array]]:
    """Neighbors together, up to BUCKET_BYTES: each sum costs a round trip, no matter how small it is."""
    bucket: list[mx.array] = []
    for array in arrays:
        if bucket and sum(a.nbytes for a in bucket) + array.nbytes > BUCKET_BYTES:
            yield bucket
            bucket = []
        bucket.append(array)
    yield bucket


def _exit_status(problem: Exception | None) -> int:
    """The exit status of run.py for a problem."""
    if isinstance(problem, Stopped):
        return 128 + problem.signal
    return 2 if isinstance(problem, UserError) else int(problem is not None)
