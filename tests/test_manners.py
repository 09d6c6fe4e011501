"""How commands behave towards users: Ctrl-C at any moment, output with and without a terminal, foreign warnings."""

import fcntl
import json
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest
from survival import SETTINGS, UNPICTURED, Trial

from startup import settings

ROOT = Path(__file__).resolve().parents[1]
# Runs inside the command: sends SIGNAL when the module STOP_AT is imported, or DELAY seconds later.
STOPPER = """
import os, sys, threading, time

def stop():
    os.kill(os.getpid(), int(os.environ["SIGNAL"]))

class Finder:
    def find_spec(name, path=None, target=None):
        if name == os.environ["STOP_AT"]:
            delay = float(os.environ.get("DELAY", 0))
            stop() if not delay else threading.Thread(target=lambda: (time.sleep(delay), stop()), daemon=True).start()

sys.meta_path.insert(0, Finder)
"""
# Restores Ctrl-C, which a child process ignores if the tests run in the background.
LISTEN = "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); os.execv(sys.executable, sys.argv[1:])"


@pytest.fixture(scope="module")
def trial(tmp_path_factory):
    """A configuration, its data, and a finished run of it."""
    trial = Trial(tmp_path_factory.mktemp("manners") / "trial", SETTINGS["optimizer kept"] | {"num_epochs": 1})
    trial.finish()
    return trial


@pytest.fixture(scope="module")
def stopper(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stopper")
    (folder / "sitecustomize.py").write_text(STOPPER)
    return folder


@pytest.fixture
def without_curves(monkeypatch):
    """Runs that are started draw no curves.png."""
    monkeypatch.setenv("PYTHONPATH", str(UNPICTURED))


def python(*arguments, cwd, **environment):
    """Run Python with the arguments and Ctrl-C enabled."""
    return subprocess.run(
        [sys.executable, "-c", LISTEN, sys.executable, *map(str, arguments)], cwd=cwd, env=os.environ | environment,
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip


STARTS = [
    ("run.py trial.yaml", ["shlex", "tqdm", "numpy", "mlx.core", "tiktoken"]),
    ("-m scripts.demo --quick", ["argparse", "mlx.core", "graphs"]),
    ("-m scripts.plot runs/trial", ["argparse", "yaml", "matplotlib.figure", "matplotlib.ft2font", "PIL"]),
    ("-m scripts.ask runs/trial/checkpoint_1 question", ["argparse", "mlx.core"]),
    ("-m analysis.frontier runs/trial/checkpoint_1 valid.json", ["argparse", "mlx.core"]),
    ("-m scripts.export runs/trial/checkpoint_1 out.safetensors", ["argparse", "mlx.core"]),
    ("-m scripts.describe_data train.json --tokenizer words.json", ["numpy", "tqdm"]),
    ("preprocessing/graphs.py --out made", ["argparse", "random"]),
    ("preprocessing/prosqa.py --out made", ["argparse"]),
    ("preprocessing/gsm_icot.py a b", ["argparse"]),
    ("preprocessing/prontoqa.py", ["argparse"]),
    ("preprocessing/datafiles.py pin gsm commit", ["argparse"]),
]


@pytest.mark.parametrize(("command", "module"), [(command, name) for command, names in STARTS for name in names])
def test_ctrl_c_during_an_import_is_one_word(command, module, trial, stopper):
    program, *words = command.split()
    program = program if program == "-m" else ROOT / program
    stop = {"PYTHONPATH": f"{stopper}:{ROOT}", "STOP_AT": module, "SIGNAL": str(int(signal.SIGINT))}
    done = python(program, *words, cwd=trial.folder, **stop)
    assert (done.returncode, done.stderr.splitlines()[-1]) == (-signal.SIGINT, "interrupted")
    assert "Traceback" not in done.stderr
    assert not list(trial.folder.rglob(".*.tmp"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("delay", [0.01, 0.2, 0.4, 0.6, 0.8, 1.0])
def test_a_run_stopped_at_any_moment_leaves_no_traceback(number, delay, stopper, tmp_path):
    """From the first import to the interpreter's shutdown."""
    trial = Trial(tmp_path / "stopped", SETTINGS["optimizer kept"] | {"num_epochs": 1})
    stop = {"PYTHONPATH": str(stopper), "STOP_AT": "shlex", "DELAY": str(delay), "SIGNAL": str(int(number))}
    done = python(ROOT / "run.py", "trial.yaml", cwd=trial.folder, **stop)
    assert done.returncode in (-number, 128 + number, 0), done.stderr
    assert "Traceback" not in done.stderr
    assert "Error" not in done.stderr


def signalled(code, cwd, listen=LISTEN):
    """Run a few lines after signals.at_once()."""
    head = "import signal, utils\nfrom pathlib import Path\nfrom startup import signals\nsignals.at_once()\n"
    command = [sys.executable, "-c", listen, sys.executable, "-c", head + code]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=60, check=False)


def test_a_second_ctrl_c_ends_the_process_at_once(tmp_path):
    """The first one only sets a flag."""
    twice = "signal.raise_signal(2)\n print(stop.requested, flush=True)\n signal.raise_signal(2)\n print('too late')"
    done = signalled(f"with utils.StopSignals() as stop:\n {twice}", tmp_path)
    assert (done.returncode, done.stdout) == (-signal.SIGINT, "2\n")
    assert done.stderr == "stopping after this step; Ctrl-C again stops immediately\ninterrupted\n"


def test_a_cpu_time_limit_is_no_second_signal(tmp_path):
    """The kernel repeats SIGXCPU in every second past the soft limit, also while a step is computed."""
    loop = "while time.process_time() < 2.5:\n  pass\n stop.check()"
    limit = "import resource, time\nresource.setrlimit(resource.RLIMIT_CPU, (1, 60))\n"
    done = signalled(f"{limit}with utils.StopSignals() as stop:\n {loop}", tmp_path)
    assert done.returncode == 1 and f"stopped by signal {signal.SIGXCPU:d}" in done.stderr
    assert done.stderr.count("stopping after this step") == 1
    again = "signal.raise_signal(signal.SIGXCPU)\n signal.raise_signal(2)"
    assert signalled(f"with utils.StopSignals() as stop:\n {again}", tmp_path).returncode == -signal.SIGINT


def test_a_half_written_file_is_removed(tmp_path):
    half = "with utils.replacing(Path('x')) as path:\n path.write_text('half')\n signal.raise_signal(15)"
    assert signalled(half, tmp_path).returncode == -signal.SIGTERM
    assert list(tmp_path.iterdir()) == []


def test_an_ignored_ctrl_c_stays_ignored(tmp_path):
    """Shells start the background commands of a script this way."""
    ignored = LISTEN.replace("SIG_DFL", "SIG_IGN")
    assert signalled("signal.raise_signal(2)\nprint('still here')", tmp_path, ignored).stdout == "still here\n"


def test_nohup_is_respected_during_training(tmp_path):
    """It starts a command with SIGHUP ignored; Ctrl-C stays a request to stop."""
    code = "with utils.StopSignals() as stop:\n signal.raise_signal(1)\n stop.check()\n print('still here')"
    ignored = LISTEN.replace("SIGINT", "SIGHUP").replace("SIG_DFL", "SIG_IGN")
    assert signalled(code, tmp_path, ignored).stdout == "still here\n"


@pytest.mark.parametrize("existing, expected", [(None, "1000000"), ("7", "7")])
def test_a_variable_that_the_user_has_set_stays(existing, expected, monkeypatch):
    monkeypatch.setenv("MLX_BFS_MAX_WIDTH", existing or "")
    if existing is None:
        monkeypatch.delenv("MLX_BFS_MAX_WIDTH")
    settings.lift_graph_width()
    assert os.environ["MLX_BFS_MAX_WIDTH"] == expected


SMALL = [ROOT / "run.py", "trial.yaml", "num_epochs=1"]


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-", "<&- >&- 2>&-"])
@pytest.mark.usefixtures("without_curves")
def test_closed_output_is_no_failure(closed, trial, tmp_path):
    """And nothing that is printed lands in a file of the run."""
    words = " ".join(f"'{word}'" for word in [sys.executable, *SMALL, f"save_path={tmp_path}"])
    done = subprocess.run(
        f"{words} {closed}", shell=True, cwd=trial.folder, capture_output=True, text=True, check=False
    )
    assert (done.returncode, "Traceback" in done.stderr) == (0, False), done.stderr
    for line in (tmp_path / "trial" / "metrics.jsonl").read_text().splitlines():
        json.loads(line)


@pytest.mark.parametrize("words", [
    ["-m", "scripts.describe_data", "trial/train.json", "--tokenizer", "trial/words.json"], ["run.py", "--help"],
    ["preprocessing/graphs.py", "--train", "99", "--chains-train", "99", "--out", "."],
    ["-m", "scripts.ask", "trial/runs/trial/checkpoint_1", "a"],
])  # fmt: skip
def test_a_command_whose_reader_has_left_ends_quietly(words, trial, tmp_path):
    """`python -m scripts.describe_data FILE | head`: the status of what SIGPIPE ends, and no message."""
    reading, writing = os.pipe()
    os.close(reading)
    words = [word.replace("trial/", f"{trial.folder}/", 1) if "/" in word else word for word in words]
    words = [str(tmp_path) if word == "." else word for word in words]
    with os.fdopen(writing, "w") as stdout:
        done = subprocess.run(
            [sys.executable, *words], cwd=ROOT, stdout=stdout, stderr=subprocess.PIPE, text=True, check=False
        )
    assert done.returncode == 141
    assert not re.search("error|warning|Traceback|Exception|Broken", done.stderr), done.stderr


@pytest.mark.usefixtures("without_curves")
def test_a_run_whose_reader_has_left_says_how_to_go_on(trial, tmp_path):
    words = " ".join(f"'{word}'" for word in [sys.executable, *SMALL, f"save_path={tmp_path}"])
    done = subprocess.run(
        f"{words} 2>{tmp_path}/log | head -1; exit ${{PIPESTATUS[0]}}",
        shell=True, executable="bash", cwd=trial.folder, capture_output=True, text=True, check=False,
    )  # fmt: skip
    said = (tmp_path / "log").read_text()
    assert done.returncode == 141 and done.stdout.startswith("run:")
    line = r"^nobody reads stdout any more, so the run stopped\. To go on: python run\.py .*trial.yaml"
    assert re.search(line, said, re.MULTILINE)
    assert "Traceback" not in said and "error" not in said


@pytest.mark.parametrize(("redirection", "status"), [("2>&1 | head -1", 141), ("2>/dev/full | cat", 1)])
@pytest.mark.usefixtures("without_curves")
def test_a_run_that_can_print_no_error_keeps_its_status(redirection, status, trial, tmp_path):
    """stderr is a pipe that nobody reads, or a full disk: no traceback in the place of the message."""
    words = " ".join(f"'{word}'" for word in [sys.executable, *SMALL, f"save_path={tmp_path}"])
    done = subprocess.run(
        f"{words} {redirection}; exit ${{PIPESTATUS[0]}}",
        shell=True, executable="bash", cwd=trial.folder, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == status
    assert "Traceback" not in done.stdout + done.stderr


@pytest.mark.parametrize(("options", "environment"), [
    ([], {"LC_ALL": "C", "PYTHONIOENCODING": "ascii"}),
    ([], {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}),
    ([], {"PYTHONSAFEPATH": "1"}), (["-OO"], {}),
])  # fmt: skip
def test_the_interpreters_settings_are_no_failure(options, environment, trial, tmp_path):
    """A locale that cannot spell the run's name, an import path without the program's folder, no docstrings."""
    done = python(*options, *SMALL, f"save_path={tmp_path}", "name=é", cwd=trial.folder, **environment)
    assert (done.returncode, "Traceback" in done.stderr) == (0, False), done.stderr
    assert (tmp_path / "é" / "checkpoint_1").is_dir()
    assert (tmp_path / "é" / "curves.png").is_file()
    assert python(*options, ROOT / "run.py", "--help", cwd=trial.folder, **environment).returncode == 0


@pytest.mark.parametrize("name", ["é", os.fsdecode(b"\xff")])
def test_a_run_whose_name_cannot_be_spelled_is_resumed_evaluated_and_shown(name, trial, tmp_path):
    """The locale has no é, or the name is not text in any: MLX opens files by names in UTF-8 only."""
    ascii_alone = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0", "PYTHONPATH": str(ROOT)}
    run = tmp_path / name
    again = ["num_epochs=2", f"save_path={tmp_path}", f"name={name}"]
    evaluation = ["only_eval=True", "name=eval", f"save_path={tmp_path}", f"load_model_path={run}/checkpoint_2"]
    for words in (
        [*SMALL, *again[1:]], [*SMALL[:2], *again], [*SMALL[:2], *evaluation],
        ["-m", "scripts.table", run, tmp_path / "eval", "-o", tmp_path / "table.md"], ["-m", "scripts.plot", run],
    ):  # fmt: skip
        done = python(*words, cwd=trial.folder, **ascii_alone)
        assert done.returncode == 0 and not re.search("Traceback|warning: curves", done.stderr), done.stderr
    assert len((tmp_path / "eval" / "metrics.jsonl").read_text().splitlines()) == 1
    assert "Coconut" in (tmp_path / "table.md").read_text()


@pytest.mark.parametrize("script", ["plot", "demo", "demo_seeds", "describe_data", "export"])
def test_help_needs_neither_docstrings_nor_an_open_stdout(script, trial):
    words = [sys.executable, "-OO", "-m", f"scripts.{script}", "--help"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(words, cwd=trial.folder, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr


def test_output_without_an_encoding_stays_as_it_is(tmp_path):
    """That of a notebook, where `%run run.py` starts a command."""
    code = "import io, sys\nsys.stdout = io.StringIO()\nfrom startup import signals\nsignals.at_once()\n"
    assert signalled(code, tmp_path).returncode == 0


def test_a_deleted_working_directory_is_one_message(trial, tmp_path):
    (tmp_path / "gone").mkdir()
    command = f"cd '{tmp_path}/gone' && rmdir ../gone && '{sys.executable}' '{ROOT}/run.py' '{trial.folder}/trial.yaml'"
    done = subprocess.run(f"{command} save_path=runs", shell=True, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and done.stderr.startswith("error: ") and "Traceback" not in done.stderr


def on_a_terminal(command, cwd, size=(24, 80), **environment) -> str:
    """Run a command on a terminal of so many rows and columns; returns its output."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", *size, 0, 0))
    process = subprocess.Popen(command, cwd=cwd, env=os.environ | environment, stdout=slave, stderr=slave)
    os.close(slave)
    shown = b""
    try:
        while part := os.read(master, 4096):
            shown += part
    except OSError:  # Linux: the other end is closed
        pass
    os.close(master)
    assert process.wait(60) == 0, shown.decode()
    return shown.decode()


@pytest.mark.parametrize("environment", [{"TERM": "xterm-256color", "NO_COLOR": "1"}, {"TERM": "xterm-256color"}])
@pytest.mark.usefixtures("without_curves")
def test_a_terminal_gets_bars_without_colors(environment, trial, tmp_path):
    command = [sys.executable, ROOT / "run.py", "trial.yaml", f"save_path={tmp_path}"]
    shown = on_a_terminal(command, trial.folder, **environment)
    assert re.search(r"\rEpoch 1/1, stage 0: 100% \[.*loss=\d+\.\d+, [\d,]+ tok/s, [\d.]+ [kMG]B\]", shown)
    assert max(len(line) for line in re.split(r"[\r\n]", shown) if line.startswith("Epoch")) <= 80
    assert not re.search(r"\x1b\[[0-9;]*m", shown)


@pytest.mark.usefixtures("without_curves")
def test_a_terminal_without_a_size_gets_bars_too(trial, tmp_path):
    """As programs open them that never set one."""
    command = [sys.executable, ROOT / "run.py", "trial.yaml", f"save_path={tmp_path}"]
    shown = on_a_terminal(command, trial.folder, size=(0, 0), TERM="xterm-256color")
    assert re.search(r"\rEpoch 1/1, stage 0: 100% \[", shown)


@pytest.mark.usefixtures("without_curves")
def test_a_dumb_terminal_gets_plain_lines(trial, tmp_path):
    command = [sys.executable, ROOT / "run.py", "trial.yaml", f"save_path={tmp_path}"]
    shown = on_a_terminal(command, trial.folder, TERM="dumb")
    assert "Epoch 1/1, stage 0: 10/10 [" in shown
    assert "\x1b" not in shown
    assert "\r" not in shown.replace("\r\n", "\n")


def test_a_warning_does_not_break_plain_progress():
    """No cursor movements are written to a log file when a warning is printed while a bar is open."""
    lines = ["import utils", "bar = utils.Progress(total=2, desc='x')", "bar.update()", "utils.warn('w')"]
    code = [*lines, "bar.update()", "bar.close()"]
    done = subprocess.run([sys.executable, "-c", "; ".join(code)], cwd=ROOT, capture_output=True, text=True, check=True)
    assert [line.split(" [")[0] for line in done.stderr.split("\n")] == ["warning: w", "x: 2/2", ""]


def test_warnings_of_other_packages_are_not_shown(trial, tmp_path):
    """With all warnings enabled, stderr has only progress and our own warnings."""
    run = python("-W", "always", ROOT / "run.py", "trial.yaml", f"save_path={tmp_path}", cwd=trial.folder)
    ours = r"(Tokenizing|Epoch|Validation loss|Answers|warning: )"
    assert [line for line in run.stderr.splitlines() if not re.match(ours, line)] == []
    environment = {"MPLCONFIGDIR": "/dev/null/x", "PYTHONPATH": str(ROOT)}
    plot = python("-W", "always", "-m", "scripts.plot", "runs/trial", cwd=trial.folder, **environment)
    assert (plot.returncode, plot.stderr) == (0, "")
