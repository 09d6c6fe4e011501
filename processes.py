"""The processes of a run: one, or several that `mlx.launch` started and that train one model together.

Gradients are summed by mx.distributed. All else goes through a TCP connection from each process to process 0: what the
run is made of (read by process 0 alone), small facts, and the news that a process failed or died. A thread reads each
connection, so that a death ends the run at once, whatever the others are at. Waiting there costs nothing either, while
waiting in MLX's ring keeps a core busy.
"""

import hashlib
import json
import os
import pickle
import signal
import socket
import struct
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from queue import SimpleQueue
from threading import Event, Lock, Thread
from typing import Any, NamedTuple

import cpu_blas  # noqa: F401  must come before mlx
import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from utils import RunError, UserError, say, silence

START = 120  # seconds a process may come later than the first
GRACE = 5  # seconds in which process 0, told of another's failure, may come to the same end by itself
PATIENCE = 5  # seconds to wait for what should come at once
# A machine that vanished (no power, no network) says nothing: its silence counts as its death after about 20 seconds.
SILENCE = {"TCP_KEEPIDLE": 5, "TCP_KEEPALIVE": 5, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 3, "TCP_USER_TIMEOUT": 20_000}
GROUP = 32 << 20  # bytes of gradients that are summed in one go
HEADER = struct.Struct("!?Q")  # of a message: whether it is the sender's last one, and its length


class Processes:
    """A single process: nothing to share, nothing to sum. Launched has the same verbs for several.

    All processes must call the verbs in the same order; what comes back is the same everywhere, except from `own`.
    """

    rank, size = 0, 1

    @property
    def is_main(self) -> bool:
        """Whether this is process 0, which alone prints, logs, and reads and writes files."""
        return self.rank == 0

    def start(self) -> None:
        """Find the other processes. Raises UserError where they do not come or the backend is not there."""

    def own(self, items: Sequence) -> Sequence:
        """This process's share: every size-th item, so that none is counted twice."""
        return items[self.rank :: self.size]

    def from_main(self, make: Callable[[], Any]) -> Any:
        """What `make` gives on process 0, where alone it is called; the others get a copy."""
        return self._share(make() if self.is_main else None)

    def gather(self, value: Any) -> list:
        """The values of all processes, by rank."""
        return [value]

    def sum(self, tree: Any) -> Any:
        """A tree of float32 arrays, each summed over the processes."""
        return tree

    def check_same(self, tree: Any, when: str) -> None:
        """Raise RunError, naming the processes, where the arrays are not the same bits everywhere; else say so."""

    def leave(self, status: int, message: str) -> None:
        """End together: print the message, where there is one, once."""
        if message:
            print(message, file=sys.stderr, flush=True)

    def _share(self, value: Any) -> Any:
        return value


ALONE = Processes()


class Place(NamedTuple):
    """What the launcher tells a process of its group; host and port are process 0's address."""

    backend: str
    rank: int
    size: int
    host: str
    port: int

    def greeting(self) -> bytes:
        """The first bytes to process 0: that this is the same launch, which no other run or stranger says by chance."""
        digest = hashlib.sha256(f"coconut-mlx {self.backend} {self.size} {self.host} {self.port}".encode()).digest()
        return digest + struct.pack("!I", self.rank)


def join(environment: Mapping[str, str] = os.environ) -> Processes:
    """This process's group, as the launcher's variables say: alone where there is no launcher.

    Raises UserError for a launcher that would make separate runs of its processes, or variables that make no sense.
    """
    try:
        place = _place(environment)
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise UserError(f"the launcher's variables (MLX_RANK and others) make no sense: {error!r:.200}") from error
    return Launched(place) if place else ALONE


def _place(environment: Mapping[str, str]) -> Place | None:
    for foreign, name in (("torchrun", "WORLD_SIZE"), ("mpirun", "OMPI_COMM_WORLD_SIZE")):
        if int(environment.get(name, 1)) > 1:
            raise UserError(
                f"started by {foreign} ({name} is {environment[name]}): each process would train for itself. Use "
                "`mlx.launch -n N --backend ring -- python run.py CONFIG`"
            )
    if "MLX_RANK" not in environment:
        return None
    if "MLX_JACCL_COORDINATOR" in environment:
        devices = json.loads(Path(environment["MLX_IBV_DEVICES"]).read_text())
        backend, size, address = "jaccl", len(devices), environment["MLX_JACCL_COORDINATOR"]
    elif "MLX_WORLD_SIZE" in environment:
        backend, size = "nccl", int(environment["MLX_WORLD_SIZE"])
        address = f"{environment['NCCL_HOST_IP']}:{environment['NCCL_PORT']}"
    else:
        text = Path(environment["MLX_HOSTFILE"]).read_text()
        hosts = json.loads(text) if text.strip() else [[":0"]]  # mlx.launch -n 1 names no host
        backend, size, address = "ring", len(hosts), hosts[0][0]
    rank, (host, _, port) = int(environment["MLX_RANK"]), address.rpartition(":")
    if not 0 <= rank < size:
        raise ValueError(f"rank {rank} of {size}")
    return Place(backend, rank, size, host, int(port)) if size > 1 else None


class End(NamedTuple):
    """The last thing a process says: its exit status, and what it has to tell the user."""

    status: int
    message: str


class Link:
    """The connection to another process. Its thread keeps what comes, and calls `ended` with its End, or with None
    where the connection breaks before that."""

    def __init__(self, name: str, connection: socket.socket, ended: Callable[["Link", End | None], None]):
        self.name, self.closed = name, Event()
        self._connection, self._inbox = connection, SimpleQueue()
        self._sending = Lock()  # the main thread's, or that of another link that has to end this process
        connection.settimeout(None)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in SILENCE.items():
            if hasattr(socket, option):  # each system has some of them
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
        Thread(target=self._read, args=(ended,), daemon=True).start()

    def send(self, message: bytes, is_last: bool = False) -> None:
        """Raises OSError where the other process is gone."""
        with self._sending:
            self._connection.sendall(HEADER.pack(is_last, len(message)))
            self._connection.sendall(message)

    def receive(self) -> Any:
        """The next value; waits for ever, because `ended` ends this process where none can come."""
        return pickle.loads(self._inbox.get())

    def _read(self, ended: Callable[["Link", End | None], None]) -> None:
        end = None
        with suppress(OSError, struct.error), self._connection.makefile("rb") as stream:
            while end is None:
                is_last, length = HEADER.unpack(stream.read(HEADER.size))  # struct.error: closed
                message = stream.read(length)
                if len(message) < length:
                    break
                if is_last:
                    end = pickle.loads(message)
                else:
                    self._inbox.put(message)
        ended(self, end)
        self.closed.set()


class Launched(Processes):
    """Several processes that train one model."""

    def __init__(self, place: Place):
        self.place, self.rank, self.size = place, place.rank, place.size
        self.links: list[Link] = []  # process 0: to all others, by rank; the others: to process 0
        self.names: list[str] = []
        self._group = None
        self._status: int | None = None  # how this process ends, once it knows
        self._leaving, self._aborting = Event(), Lock()
        if not self.is_main:
            silence()

    def start(self) -> None:
        if self.is_main:
            self._welcome()
        else:
            self._call()
        places = self.gather(f"{socket.gethostname()}, pid {os.getpid()}")
        self.names = [f"process {rank} ({place})" for rank, place in enumerate(places)]
        for link, name in zip(self.links, self.names[1:] if self.is_main else self.names, strict=False):
            link.name = name
        self._open_backend()
        say(f"group: {self.size} processes, {self.place.backend}: {', '.join(self.names)}")

    def gather(self, value: Any) -> list:
        if self.is_main:
            return self._share([value, *(link.receive() for link in self.links)])
        self._send(value)
        return self._share(None)

    def sum(self, tree: Any) -> Any:
        names, arrays = zip(*tree_flatten(tree), strict=True)
        summed = []
        for group in _groups(arrays):
            ends = np.cumsum([array.size for array in group])[:-1].tolist()
            flat = self._summed(mx.concatenate([array.reshape(-1) for array in group]))
            summed += [part.reshape(array.shape) for part, array in zip(mx.split(flat, ends), group, strict=True)]
        return tree_unflatten(list(zip(names, summed, strict=True)))

    def check_same(self, tree: Any, when: str) -> None:
        checksum = 0
        for _, array in sorted(tree_flatten(tree), key=lambda pair: pair[0]):
            checksum = zlib.crc32(np.array(array), checksum)
        checksums = self.gather(checksum)
        different = [name for name, other in zip(self.names, checksums, strict=True) if other != checksums[0]]
        if different:
            raise RunError(
                f"{when} the parameters of {', '.join(different)} are not those of process 0: training stopped. The "
                "machines compute differently or the network is at fault; go on from the last state without them"
            )
        say(f"{when} the parameters are the same bits in all {self.size} processes (checksum {checksum:08x})")

    def leave(self, status: int, message: str) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):  # the launcher sends one as soon as a process has failed
            signal.signal(number, signal.SIG_IGN if status else signal.SIG_DFL)
        self._status = status
        self._leaving.set()
        if self.is_main or not self.links:
            super().leave(status, message)
        if self.is_main:
            for link in () if status else self.links:
                link.closed.wait()  # the others' failures, until here, are the run's
            self._dismiss(status, self.links)
        elif self.links:
            with suppress(OSError):  # process 0 may be ending, too
                self.links[0].send(pickle.dumps(End(status, message)), is_last=True)
            self.links[0].closed.wait(2 * PATIENCE if status else None)

    def _share(self, value: Any) -> Any:
        if not self.is_main:
            return self.links[0].receive()
        self._send(value)
        return value

    def _send(self, value: Any) -> None:
        message = pickle.dumps(value)
        for link in self.links:
            try:
                link.send(message)
            except OSError as error:
                time.sleep(PATIENCE)  # the thread that sees why names it and ends this process
                raise RunError(f"{link.name} cannot be reached: {error}") from error

    def _summed(self, array: mx.array) -> mx.array:
        total = mx.distributed.all_sum(array, group=self._group)
        try:
            mx.eval(total)
        except RuntimeError as error:
            time.sleep(PATIENCE)  # as above
            raise RunError(f"the {self.place.backend} backend failed: {error}") from error
        return total

    def _welcome(self) -> None:
        """Process 0: wait for all others, at the address that the backend uses later on."""
        host, port = self.place.host, self.place.port
        try:
            listener = socket.create_server((host, port), backlog=self.size)
        except OSError as error:
            raise UserError(
                f"process 0 cannot listen at {host}:{port} ({error.strerror}): is it another machine's address, or in "
                "use by another run? `mlx.launch --starting-port` names other ports (--nccl-port with nccl)"
            ) from error
        links: dict[int, Link] = {}
        deadline = time.monotonic() + START
        with listener:
            while len(links) < self.size - 1:
                listener.settimeout(max(0.1, deadline - time.monotonic()))
                try:
                    connection, _ = listener.accept()
                except TimeoutError as error:
                    missing = ", ".join(str(rank) for rank in range(1, self.size) if rank not in links)
                    raise UserError(f"of {self.size} processes, {missing} did not come within {START} s") from error
                rank = self._introduced(connection)
                if rank is None or rank in links:  # a stranger, hung up on before anything of his is unpickled
                    connection.close()
                    continue
                links[rank] = Link(f"process {rank}", connection, self._ended)
                self.links = [links[rank] for rank in sorted(links)]

    def _introduced(self, connection: socket.socket) -> int | None:
        """The rank of a caller from the same launch."""
        connection.settimeout(PATIENCE)
        with suppress(OSError):
            greeting = connection.recv(len(self.place.greeting()))  # so few bytes come in one piece
            ranks = {self.place._replace(rank=rank).greeting(): rank for rank in range(1, self.size)}
            return ranks.get(greeting)
        return None

    def _call(self) -> None:
        """Another process: connect to process 0, as soon as it listens."""
        deadline = time.monotonic() + START
        while True:
            try:
                connection = socket.create_connection((self.place.host, self.place.port), timeout=PATIENCE)
                connection.sendall(self.place.greeting())
                break
            except OSError as error:
                if time.monotonic() > deadline:
                    where = f"{self.place.host}:{self.place.port}"
                    raise UserError(f"process {self.rank} cannot reach process 0 at {where}: {error}") from error
                time.sleep(0.1)
        self.links = [Link(f"process 0 ({self.place.host})", connection, self._ended)]

    def _open_backend(self) -> None:
        backend = self.place.backend
        there = self.gather(mx.distributed.is_available(backend))
        if not all(there):
            without = [name for name, has_it in zip(self.names, there, strict=True) if not has_it]
            raise UserError(f"MLX has no {backend} backend in {', '.join(without)}")
        # init holds the interpreter: no thread could end this process where another one dies at this very moment
        signal.alarm(START)
        try:
            self._group = mx.distributed.init(strict=True, backend=backend)
        except RuntimeError as error:
            raise UserError(f"process {self.rank} cannot start the {backend} backend: {error}") from error
        finally:
            signal.alarm(0)
        found = self.gather((self._group.rank(), self._group.size()))
        if found != [(rank, self.size) for rank in range(self.size)]:
            raise UserError(f"{self.size} processes were launched; {backend} made (rank, size) {found} of them")

    def _ended(self, link: Link, end: End | None) -> None:
        """A link's thread: the other process has come to its end, well or ill."""
        if self._status:
            return  # this one's own failure counts
        if end is None:
            self._abort(link, 1, f"error: {link.name} died, so the run ends. What was saved is intact: launch it again")
        elif end.status and not (self.is_main and self._leaving.wait(GRACE) and self._status):
            self._abort(link, end.status, f"{link.name}: {end.message}" if end.message else "")

    def _abort(self, link: Link, status: int, message: str) -> None:
        """End this process from a link's thread, while the main one may be anywhere."""
        self._aborting.acquire()  # and never released: the first one ends the process
        self._status = status
        super().leave(status, message)
        silence()  # the launcher may send a signal now
        if self.is_main:
            self._dismiss(status, [other for other in self.links if other is not link])
        os._exit(status)

    def _dismiss(self, status: int, links: list[Link]) -> None:
        """Process 0 tells the others to end, too, and closes no connection before they heard it."""
        for link in links:
            with suppress(OSError):  # gone already
                link.send(pickle.dumps(End(status, "")), is_last=True)
        for link in links if status else ():
            link.closed.wait(GRACE)


def _groups(arrays: Sequence[mx.array]) -> Iterator[list[mx.array]]:
    """Neighbours together up to about GROUP bytes: each sum costs a round of the ring, however small it is."""
    group: list[mx.array] = []
    for array in arrays:
        if group and sum(a.nbytes for a in group) + array.nbytes > GROUP:
            yield group
            group = []
        group.append(array)
    if group:
        yield group
