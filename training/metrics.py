"""metrics.jsonl, and wandb as one more sink behind the same call."""

import json
import os
import zlib
from importlib.util import find_spec
from pathlib import Path

from config import Config
from utils import crc32, say, sync, warn, write_text

MODES = {"online": "online", "offline": "offline", "dryrun": "offline", "disabled": "off"}  # of WANDB_MODE


class MetricLog:
    """Appends one JSON object per line; each line is in the file before `log` returns."""

    def __init__(self, path: Path, wandb_run):
        self.path, self.wandb_run = path, wandb_run
        self._file = open(path, "ab")  # noqa: SIM115  closed by __exit__

    def check(self, n_bytes: int, expected_crc32: int) -> None:
        """Warn where the first n_bytes are not what they were when a state was saved."""
        if zlib.crc32(self.path.read_bytes()[:n_bytes]) != expected_crc32:
            warn(f"{self.path}: changed since it was written, or damaged; the readable lines are kept")

    def rewind(self, next_step: int, epochs_done: int) -> None:
        """Drop what a run resumed at this point will write again: later steps, and later epochs' evaluations."""
        kept = [line for line in self.path.read_bytes().splitlines() if _is_before(line, next_step, epochs_done)]
        self._file.close()
        write_text(self.path, "".join(line.decode() + "\n" for line in kept))
        self._file = open(self.path, "ab")  # noqa: SIM115

    def log(self, record: dict) -> None:
        """Write one record to the file, and its official keys (`train/...`, `eval/...`) to wandb."""
        self._file.write((json.dumps(record, ensure_ascii=False) + "\n").encode(errors="backslashreplace"))
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
            try:
                self.wandb_run.finish(exit_code=int(exception[0] is not None))
            except Exception as error:
                warn(f"wandb did not end well ({one_line(error)}); metrics.jsonl is complete")

    def _to_wandb(self, values: dict) -> None:
        if self.wandb_run is None:
            return
        try:
            self.wandb_run.log(values)
        except Exception as error:
            warn(f"wandb stopped taking metrics ({one_line(error)}); metrics.jsonl continues")
            self.wandb_run = None


class NoMetrics:
    """The same calls, which write nothing: for the ranks beside rank 0."""

    def check(self, n_bytes: int, expected_crc32: int) -> None:
        """Nothing to check."""

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
        return False  # torn by a power cut, or another program's


def start_wandb(config: Config):
    """This run's wandb run, or None; prints in one line whether wandb is on and why. It never asks for a login.

    A resumed run continues the wandb run whose id the run directory holds.
    """
    mode, reason = wandb_mode(config)
    if mode == "off":
        say(f"wandb: off ({reason})")
        return None
    id_file = config.run_dir / "wandb_id.txt"
    try:
        import wandb

        run = wandb.init(
            project=config.project,
            name=config.name,
            id=id_file.read_text().strip() if id_file.is_file() else None,
            resume="allow",
            mode=mode,
            config=config.to_dict(),
            dir=str(config.run_dir),
            settings=wandb.Settings(silent=True, console="off"),
        )
    except Exception as error:  # settings that it refuses, an installation that does not import
        warn(f"wandb did not start ({one_line(error)}); metrics.jsonl is written all the same")
        return None
    write_text(id_file, f"{run.id}\n")
    say(f"wandb: {mode}, run {run.id} ({reason})")
    return run


def wandb_mode(config: Config) -> tuple[str, str]:
    """(`online`, `offline` or `off`, the reason): the key `wandb`, unless WANDB_DISABLED or WANDB_MODE decide."""
    if config.debug or config.only_eval:
        return "off", "no training is recorded with debug or only_eval"
    if os.environ.get("WANDB_DISABLED", "").lower() in ("1", "true", "yes", "on"):
        return "off", "WANDB_DISABLED"
    variable = os.environ.get("WANDB_MODE", "")
    if variable and variable not in MODES:
        warn(f"WANDB_MODE: expected one of {', '.join(MODES)}, found {variable!r}; the key wandb decides")
    wanted, reason = MODES.get(variable, config.wandb), "WANDB_MODE" if variable in MODES else "the key wandb"
    if wanted == "off":
        return "off", reason
    if not _is_installed():
        return "off", "not installed: pip install wandb"
    if wanted == "auto":
        return ("online", "logged in") if _logged_in() else ("off", "not logged in: wandb login")
    return wanted, reason


def _is_installed() -> bool:
    """Whether there is a package wandb; a folder of that name in the path, as wandb's own runs make, is none."""
    spec = find_spec("wandb")
    return spec is not None and spec.origin is not None


def _logged_in() -> bool:
    """Whether wandb finds credentials. It is asked only where there may be some: importing it takes half a second."""
    netrc_files = [os.environ.get("NETRC", ""), Path.home() / ".netrc", Path.home() / "_netrc"]
    variables = ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE")
    if not any(map(os.environ.get, variables)) and not any(file and Path(file).is_file() for file in netrc_files):
        return False
    try:
        import wandb

        return bool(wandb.login(prompt=False))
    except Exception as error:  # a .netrc that is not UTF-8, an installation that does not import
        warn(f"wandb cannot tell whether it is logged in ({one_line(error)})")
        return False


def one_line(error: Exception) -> str:
    """What an error of wandb says, which has several lines where a setting is refused."""
    return f"{' '.join(str(error).split()):.300}"
