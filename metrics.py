"""metrics.jsonl, and wandb as one more sink behind the same call."""

import json
import netrc
import os
import zlib
from importlib.util import find_spec
from pathlib import Path

from config import Config
from utils import crc32, sync, warn, write_text


class MetricLog:
    """Appends one JSON object a line; each line is in the file before `log` returns."""

    def __init__(self, path: Path, wandb_run):
        self.path, self.wandb_run = path, wandb_run
        self._file = open(path, "ab")  # noqa: SIM115  closed by close()

    def check(self, n_bytes: int, expected_crc32: int) -> None:
        """Warn where the first n_bytes are not what they were when a state was saved."""
        if zlib.crc32(self.path.read_bytes()[:n_bytes]) != expected_crc32:
            warn(f"{self.path}: changed since it was written, or damaged; what can be read of it is kept")

    def rewind(self, next_step: int, epochs_done: int) -> None:
        """Drop what a run taken up at this point will write again: later steps, and later epochs' evaluations."""
        kept = [line for line in self.path.read_bytes().splitlines() if _is_before(line, next_step, epochs_done)]
        self._file.close()
        write_text(self.path, "".join(line.decode() + "\n" for line in kept))
        self._file = open(self.path, "ab")  # noqa: SIM115

    def log(self, record: dict) -> None:
        """Write one record to the file and to wandb."""
        self._file.write((json.dumps(record, ensure_ascii=False) + "\n").encode())
        self._file.flush()
        self._to_wandb({name: value for name, value in record.items() if "/" in name})

    def log_text(self, name: str, step: int, text: str) -> None:
        """Send a text as a one-row table to wandb (the official `data_table`)."""
        if self.wandb_run is not None:
            import wandb

            self._to_wandb({name: wandb.Table(columns=["step", "text"], data=[[step, text]])})

    def sync(self) -> tuple[int, int]:
        """Size and checksum of the file, every line of which is on disk when this returns."""
        sync(self.path)
        return self.path.stat().st_size, crc32(self.path)

    def __enter__(self) -> "MetricLog":
        return self

    def __exit__(self, *exception) -> None:
        self._file.close()
        if self.wandb_run is not None:
            self.wandb_run.finish(exit_code=int(exception[0] is not None))

    def _to_wandb(self, values: dict) -> None:
        if self.wandb_run is None:
            return
        import wandb

        try:
            self.wandb_run.log(values)
        except (wandb.Error, OSError) as error:
            warn(f"wandb stopped taking metrics ({error}); metrics.jsonl goes on")
            self.wandb_run = None


class NoMetrics:
    """The same calls with nowhere to write, for the processes beside process 0."""

    def rewind(self, next_step: int, epochs_done: int) -> None:
        """Nothing to drop."""

    def log(self, record: dict) -> None:
        """Nothing is written."""

    def __enter__(self) -> "NoMetrics":
        return self

    def __exit__(self, *exception) -> None:
        pass


def _is_before(line: bytes, next_step: int, epochs_done: int) -> bool:
    try:
        record = json.loads(line)
        return record.get("train/step", -1) < next_step and ("train/step" in record or record["epoch"] <= epochs_done)
    except (ValueError, KeyError, AttributeError, TypeError):
        return False  # torn by a power cut, or not ours


def start_wandb(config: Config):
    """A wandb run where wandb is installed and logged in (or WANDB_MODE=offline), else None. It never asks."""
    if config.debug or config.only_eval or not find_spec("wandb") or not _logged_in():
        return None
    import wandb

    try:
        settings = wandb.Settings(silent=True, console="off")
        return wandb.init(
            project=config.project,
            name=config.name,
            config=config.to_dict(),
            dir=str(config.run_dir),
            settings=settings,
        )
    except (wandb.Error, OSError) as error:
        warn(f"wandb did not start ({error}); metrics.jsonl is written all the same")
        return None


def _logged_in() -> bool:
    if os.environ.get("WANDB_MODE") in ("offline", "disabled", "dryrun"):
        return os.environ["WANDB_MODE"] != "disabled"
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return netrc.netrc().authenticators("api.wandb.ai") is not None
    except (OSError, netrc.NetrcParseError):
        return False
