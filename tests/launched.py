"""Start several ranks as mlx.launch does it: MLX_RANK and MLX_HOSTFILE, on free ports."""

import json
import os
import socket
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

from survival import UNPICTURED

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT = {"PYTHONPATH": f"{UNPICTURED}:{ROOT}"}


def free_ports(n: int) -> list[int]:
    """Ports on which nothing listens."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(n)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


class Launch:
    """Ranks 0 to n - 1 of `python run.py ARGUMENTS`, or of another script; leaving the context kills them."""

    def __init__(self, n: int, hostfile: Path, *arguments, script: Path = ROOT / "run.py"):
        hostfile.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in free_ports(n)]))
        command = [sys.executable, str(script), *map(str, arguments)]
        self.processes = [
            subprocess.Popen(
                command,
                env=os.environ | ENVIRONMENT | {"MLX_RANK": str(rank), "MLX_HOSTFILE": str(hostfile)},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in range(n)
        ]

    def wait(self, timeout: float = 100) -> list[tuple[int, str, str]]:
        """Exit status, stdout and stderr of each rank."""
        outputs = [process.communicate(timeout=timeout) for process in self.processes]
        return [(process.returncode, *output) for process, output in zip(self.processes, outputs, strict=True)]

    def __enter__(self) -> "Launch":
        return self

    def __exit__(self, *exception) -> None:
        for process in self.processes:
            if process.poll() is None:
                process.kill()
            process.wait()
            process.stdout.close()
            process.stderr.close()
