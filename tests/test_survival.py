"""Runs that are killed, stopped, damaged or out of disk go on to the same result, or say clearly why not."""

import errno
import json
import random
import shutil
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import pytest
from survival import SETTINGS, Trial, differences

import run as run_module
from config import Config
from training import checkpoint
from training.resume import best_checkpoint, clean, prune
from training.step import TrainStep
from utils import crc32

pytestmark = pytest.mark.usefixtures("on_cpu")  # bits are compared


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run: three epochs, a new optimizer each."""
    trial = Trial(tmp_path_factory.mktemp("survival") / "whole", SETTINGS["every epoch anew"])
    trial.finish()
    return trial


@pytest.mark.parametrize(("name", "streams"), [
    ("optimizer kept", "2"), ("mixed stages", "2"), ("pause as thought", "1"), ("icot", "1"),
])  # fmt: skip
def test_a_killed_run_ends_with_the_same_bits(name, streams, tmp_path, monkeypatch):
    """SIGKILL at random moments; `python tests/survival.py` does this at length for every setting."""
    monkeypatch.setenv("COCONUT_STREAMS", streams)
    uninterrupted, killed = Trial(tmp_path / "whole", SETTINGS[name]), Trial(tmp_path / "killed", SETTINGS[name])
    uninterrupted.finish()
    rng, n_lines = random.Random(5), len(lines(uninterrupted))
    for part in (0.2, 0.5, 0.8):
        process = killed.start()
        wait_for(lambda share=part: len(lines(killed)) >= share * n_lines, process)
        time.sleep(rng.uniform(0, 0.02))
        process.kill()
        process.communicate()
    killed.finish()
    assert differences(uninterrupted, killed) == []


@pytest.mark.parametrize(("number", "status"), [
    (signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGUSR1, 138), (signal.SIGUSR2, 140),
    (signal.SIGXCPU, 152),
])  # fmt: skip
def test_a_stopped_run_saves_says_how_to_go_on_and_does(whole, number, status, tmp_path):
    """Ctrl-C, SIGTERM, a closed terminal and a scheduler's warning save; the same command goes on to the same bits."""
    trial = Trial(tmp_path / "stopped", SETTINGS["every epoch anew"] | {"save_interval_minutes": 60})
    process = trial.start()
    wait_for(lambda: len(lines(trial)) >= 3, process)
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == status, output
    assert "Traceback" not in output
    assert "To go on: python run.py" in output
    written = [record["train/step"] for record in map(json.loads, lines(trial)) if "train/step" in record]
    positions = [json.loads(path.read_text())["position"] for path in trial.run_dir.glob("state_*/coconut.json")]
    assert max(p["epoch"] * 10 + p["step"] for p in positions) >= len(written) - 1, "steps were lost"
    trial.finish()
    assert differences(whole, trial) == []


def test_a_second_signal_stops_at_once(tmp_path):
    """Without waiting for the step."""
    trial = Trial(tmp_path / "twice", SETTINGS["optimizer kept"] | {"num_epochs": 200})
    process = trial.start()
    wait_for(lambda: lines(trial), process)
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=20)
    assert process.returncode in (130, -signal.SIGINT)  # 130 where the step was done before the second one came
    assert "Traceback" not in output


def test_a_second_process_on_the_same_directory_refuses(tmp_path):
    """While the first one works on, undisturbed."""
    trial = Trial(tmp_path / "busy", SETTINGS["optimizer kept"] | {"num_epochs": 200})
    first = trial.start()
    try:
        wait_for(lambda: lines(trial), first)
        second = trial.start()
        output, _ = second.communicate(timeout=60)
        assert second.returncode == 2
        assert "another process" in output
        assert first.poll() is None
    finally:
        first.kill()
        first.communicate()


# Epochs of four steps and an evaluation in one batch: nearly a hundred tests train at least one.
SHORT = SETTINGS["every epoch anew"] | {"batch_size_training": 10, "batch_size_eval": 8}


@pytest.fixture(scope="module")
def two_of_three(tmp_path_factory):
    """A run stopped after two of the three epochs, to be copied and damaged."""
    trial = Trial(tmp_path_factory.mktemp("damage") / "original", SHORT | {"num_epochs": 2})
    trial.finish()
    return trial


@pytest.fixture(scope="module")
def all_three(tmp_path_factory):
    """The same run, not stopped."""
    trial = Trial(tmp_path_factory.mktemp("damage") / "whole", SHORT)
    trial.finish()
    return trial


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path):
    path.write_bytes(b"")


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def remove(path):
    path.unlink()


STATE = "state_1_4"
RECOVERED = [
    f"{STATE}/{name}" for name in ("coconut.json", "config.json", "model.safetensors", "optimizer.safetensors")
]
HARMLESS = [f"checkpoint_{n}/{name}" for n in (1, 2) for name in ("coconut.json", "config.json", "model.safetensors")]
HARMLESS += ["config.yaml", "first_batch.txt", "predictions_1.jsonl"]


@pytest.mark.parametrize("damage", [truncate, empty, flip_a_bit, remove])
@pytest.mark.parametrize("name", [*RECOVERED, "metrics.jsonl", *HARMLESS])
def test_a_damaged_file_is_named_or_does_no_harm(name, damage, all_three, two_of_three, tmp_path, capsys):
    """The run goes on from what is whole and ends with the model it would have had."""
    shutil.copytree(two_of_three.folder, tmp_path / "copy")
    run_dir = tmp_path / "copy" / "runs" / "trial"
    files = {str(path.relative_to(run_dir)) for path in run_dir.rglob("*") if path.is_file()}
    assert name in files
    damage(run_dir / name)
    status = run_module.main(resume_command(tmp_path / "copy"))
    printed = capsys.readouterr()
    assert status == 0, printed.err
    model = "checkpoint_3/model.safetensors"
    assert (run_dir / model).read_bytes() == (all_three.run_dir / model).read_bytes()
    if name in RECOVERED:
        assert STATE in printed.err
        assert "going back" in printed.err
    if name == "metrics.jsonl":
        assert "metrics.jsonl" in printed.err


def refuse_to_read(path, monkeypatch):
    """Reading this file fails as it does on a bad sector."""

    def failing(function):
        def read(file, *arguments, **keys):
            if file == path:
                raise OSError(errno.EIO, "Input/output error", str(path))
            return function(file, *arguments, **keys)

        return read

    monkeypatch.setattr(Path, "open", failing(Path.open))
    monkeypatch.setattr(checkpoint, "crc32", failing(crc32))


def contents(folder) -> dict:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}


@pytest.mark.parametrize("name", ["coconut.json", "model.safetensors", "optimizer.safetensors"])
@pytest.mark.parametrize("how", ["bad sector", "folder in its place"])
def test_a_file_that_cannot_be_read_is_no_damage(name, how, two_of_three, tmp_path, capsys, monkeypatch):
    """The newest state may be intact: the run stops, and goes on from it once it can be read again."""
    shutil.copytree(two_of_three.folder, tmp_path / "copy")
    run_dir = tmp_path / "copy" / "runs" / "trial"
    command, before = resume_command(tmp_path / "copy"), contents(run_dir)
    path = run_dir / STATE / name
    with monkeypatch.context() as patch:
        if how == "bad sector":
            refuse_to_read(path, patch)
        else:
            path.rename(tmp_path / "aside")
            path.mkdir()
        assert run_module.main(command) == 2
    printed = capsys.readouterr().err
    assert f"cannot read {path}" in printed and "Nothing was changed" in printed
    assert "going back" not in printed
    if how != "bad sector":
        path.rmdir()
        (tmp_path / "aside").rename(path)
    assert contents(run_dir) == before


def test_a_state_that_lies_elsewhere_is_resumed_and_left_there(two_of_three, tmp_path):
    """Behind a link, on another disk: the run removes the link alone."""
    shutil.copytree(two_of_three.folder, tmp_path / "copy")
    run_dir = tmp_path / "copy" / "runs" / "trial"
    (run_dir / STATE).rename(tmp_path / "elsewhere")
    (run_dir / STATE).symlink_to(tmp_path / "elsewhere")
    before = contents(tmp_path / "elsewhere")
    assert run_module.main(resume_command(tmp_path / "copy")) == 0
    assert not (run_dir / STATE).is_symlink() and (run_dir / "checkpoint_3").is_dir()
    assert contents(tmp_path / "elsewhere") == before
    assert not list(run_dir.glob(".*.tmp"))


@pytest.mark.parametrize("name", [STATE, "checkpoint_2"])
def test_a_link_to_what_is_not_there_is_no_damage(name, two_of_three, tmp_path, capsys):
    """Its disk may not be mounted: the run does not go back to an older state."""
    shutil.copytree(two_of_three.folder, tmp_path / "copy")
    run_dir = tmp_path / "copy" / "runs" / "trial"
    shutil.rmtree(run_dir / name)
    (run_dir / name).symlink_to(tmp_path / "unmounted")
    before = contents(run_dir)
    assert run_module.main(resume_command(tmp_path / "copy")) == 2
    assert f"{run_dir / name}: a link to what is not there" in capsys.readouterr().err
    assert contents(run_dir) == before


def test_a_file_named_like_a_state_is_another_programs(two_of_three, tmp_path):
    shutil.copytree(two_of_three.folder, tmp_path / "copy")
    file = tmp_path / "copy" / "runs" / "trial" / "state_9_9"
    file.write_text("notes")
    assert run_module.main(resume_command(tmp_path / "copy")) == 0
    assert file.read_text() == "notes" and (file.parent / "checkpoint_3").is_dir()


def resume_command(folder):
    """The arguments that take up a copied run for its third epoch."""
    config = json.loads((folder / "trial.yaml").read_text())
    keys = {"save_path": str(folder / "runs"), "num_epochs": 3, "save_interval_minutes": 60}
    (folder / "trial.yaml").write_text(json.dumps(config | keys))
    return [str(folder / "trial.yaml")]


def fill(path):
    """Write until the disk is full."""
    with suppress(OSError), open(path, "wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))


def lines(trial):
    path = trial.run_dir / "metrics.jsonl"
    return path.read_bytes().splitlines() if path.exists() else []


def wait_for(condition, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 2 MB, where this user may mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", folder], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("needs the right to mount a small file system (root on Linux)")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_disk_that_cannot_hold_the_run_is_refused_early(small_disk, tmp_path):
    """Before anything is written, with the sizes."""
    trial = Trial(tmp_path / "full", SETTINGS["optimizer kept"] | {"save_path": str(small_disk), "num_epochs": 30})
    output, _ = (process := trial.start()).communicate(timeout=60)
    assert process.returncode == 2
    assert "keep_checkpoints" in output
    assert list(small_disk.iterdir()) == []


def test_a_full_disk_leaves_the_last_state_intact_and_the_run_can_go_on(small_disk, tmp_path):
    """Filled by something else in mid-run: a clear message, status 1; after making room the same bits as ever."""
    keys = SETTINGS["optimizer kept"] | {"num_epochs": 2, "keep_checkpoints": 1}
    undisturbed = Trial(tmp_path / "undisturbed", keys)
    undisturbed.finish()
    trial = Trial(tmp_path / "full", keys | {"save_path": str(small_disk)})
    trial.run_dir = small_disk / "trial"
    process = trial.start()
    wait_for(lambda: list(small_disk.glob("trial/state_*")), process)
    fill(small_disk / "filler")
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 1, output
    assert "Traceback" not in output
    assert "disk" in output or "space" in output
    (small_disk / "filler").unlink()
    trial.finish()
    assert differences(undisturbed, trial) == []


@pytest.mark.parametrize(
    ("kept", "best", "left"), [(1, 2, {2, 5}), (2, 5, {4, 5}), (2, 0, {4, 5}), ("all", 1, {1, 2, 3, 4, 5})]
)
def test_the_newest_checkpoints_and_the_best_are_kept(kept, best, left, tmp_path):
    """keep_checkpoints: N | all; files of other programs are never touched."""
    run_dir = tmp_path / "run"
    for epoch in range(1, 6):
        (run_dir / f"checkpoint_{epoch}").mkdir(parents=True)
    (run_dir / "checkpoint_1.safetensors").write_bytes(b"the older port's")
    config = Config(save_path=str(tmp_path), name="run", val_path="x", cot=True, keep_checkpoints=kept)
    prune(config, best)
    assert {int(path.name.split("_")[1]) for path in run_dir.iterdir() if path.is_dir()} == left
    assert (run_dir / "checkpoint_1.safetensors").exists()


def test_a_harmless_change_of_the_configuration_is_taken_over_with_a_note(two_of_three, tmp_path, capsys):
    """More epochs and another learning rate: the run goes on."""
    shutil.copytree(two_of_three.folder, tmp_path / "copy")
    assert run_module.main([*resume_command(tmp_path / "copy"), "lr=0.0005"]) == 0
    printed = capsys.readouterr().out
    assert "changed since the last start: num_epochs: was 2, is 3" in printed
    assert "changed since the last start: lr: was 0.001, is 0.0005" in printed


@pytest.mark.parametrize("change", ["c_thought=2", "seed=7", "batch_size_training=8", "coconut=False cot=True"])
def test_a_change_that_makes_it_another_run_is_refused_with_the_difference(change, two_of_three, tmp_path, capsys):
    """Method, data, model and what the numbers depend on; nothing in the directory changes."""
    shutil.copytree(two_of_three.folder, tmp_path / "copy")
    command = [*resume_command(tmp_path / "copy"), *change.split()]
    before = {path: path.read_bytes() for path in (tmp_path / "copy" / "runs").rglob("*") if path.is_file()}
    assert run_module.main(command) == 2
    printed = capsys.readouterr().err
    name, _, value = change.split()[-1].partition("=")
    assert f"{name}: was " in printed
    assert f"is {value}" in printed
    assert {path: path.read_bytes() for path in (tmp_path / "copy" / "runs").rglob("*") if path.is_file()} == before


def copied(two_of_three, tmp_path, **keys):
    """A copy of the stopped run: (its folder, the command that resumes it). keys: of the configuration, changed."""
    folder = tmp_path / "copy"
    shutil.copytree(two_of_three.folder, folder)
    command = resume_command(folder)
    config = json.loads((folder / "trial.yaml").read_text())
    names = {"train_path": "train", "val_path": "valid", "tokenizer": "words", "model_config_path": "model"}
    moved = {key: str(folder / f"{name}.json") for key, name in names.items()}  # the same content at another path
    (folder / "trial.yaml").write_text(json.dumps(config | moved | keys))
    return folder, command


def test_data_at_another_path_is_the_same_data(all_three, two_of_three, tmp_path, capsys):
    folder, command = copied(two_of_three, tmp_path)
    (folder / "train.json").write_text(json.dumps(json.loads((folder / "train.json").read_text()), indent=2))
    assert run_module.main(command) == 0, capsys.readouterr().err
    model = "checkpoint_3/model.safetensors"
    assert (folder / "runs" / "trial" / model).read_bytes() == (all_three.run_dir / model).read_bytes()


def change_one_item(file):
    items = json.loads(file.read_text())
    items[-1]["answer"] = "8"
    file.write_text(json.dumps(items))


def change_the_model(file):
    file.write_text(json.dumps(json.loads(file.read_text()) | {"n_layer": 3}))


def change_the_words(file):
    file.write_text('["##"]')


@pytest.mark.parametrize(("key", "name", "change"), [
    ("train_path", "train", change_one_item), ("val_path", "valid", change_one_item),
    ("model_config_path", "model", change_the_model), ("tokenizer", "words", change_the_words),
])  # fmt: skip
def test_content_that_changed_under_a_run_is_refused(key, name, change, two_of_three, tmp_path, capsys):
    """With a way on, and nothing in the directory changes."""
    folder, command = copied(two_of_three, tmp_path)
    change(folder / f"{name}.json")
    before = contents(folder / "runs")
    assert run_module.main(command) == 2
    printed = capsys.readouterr().err
    assert key in printed and STATE in printed
    assert "another `name`" in printed or "name the right one" in printed
    assert contents(folder / "runs") == before


def test_another_number_of_streams_is_noted(two_of_three, tmp_path, capsys, monkeypatch):
    """It decides which dropout masks are drawn."""
    _, command = copied(two_of_three, tmp_path)
    before = json.loads((two_of_three.run_dir / STATE / "coconut.json").read_text())["streams"]
    monkeypatch.setenv("COCONUT_STREAMS", str(before + 1))
    assert run_module.main(command) == 0
    assert f"changed since the last start: streams: was {before}, is {before + 1}; dropout" in capsys.readouterr().out


def test_the_key_resume_does_not_move_the_warm_up_of_a_resumed_run(two_of_three, tmp_path, capsys, monkeypatch):
    """Its first start skipped no epoch, and that is where the steps are counted from."""
    rates = []
    original = TrainStep.__call__

    def noted(self, micro_batches, epoch, number, rate):
        rates.append((epoch, number, rate))
        return original(self, micro_batches, epoch, number, rate)

    monkeypatch.setattr(TrainStep, "__call__", noted)
    _, command = copied(two_of_three, tmp_path, name="warm", warmup_steps=100)
    assert run_module.main([*command, "num_epochs=1"]) == 0
    assert run_module.main([*command, "num_epochs=2", "resume=1"]) == 0, capsys.readouterr().err
    assert [rate for *_, rate in rates] == pytest.approx([1e-3 * (n + 1) / 100 for n in range(8)])


def test_the_best_checkpoint_is_told_by_the_sealed_metadata(two_of_three, tmp_path):
    """Not by metrics.jsonl, which anybody may change; runs without sealed accuracies fall back to it."""
    run_dir = copied(two_of_three, tmp_path, max_latent_stage=0)[0] / "runs" / "trial"
    for number, accuracy in ((1, 0.75), (2, 0.25)):
        record = checkpoint.read_metadata(run_dir / f"checkpoint_{number}")
        record["config"]["max_latent_stage"] = record["stage"] = 0
        write_metadata(run_dir / f"checkpoint_{number}", record)
        state = checkpoint.read_metadata(run_dir / STATE)
        state["position"]["accuracies"][str(number)] = accuracy
        write_metadata(run_dir / STATE, state)
    lines = [json.dumps({"epoch": epoch, "eval/acc": epoch / 2}) for epoch in (1, 2)]
    (run_dir / "metrics.jsonl").write_text("\n".join(lines))
    assert best_checkpoint(run_dir).name == "checkpoint_1"
    shutil.rmtree(run_dir / STATE)
    assert best_checkpoint(run_dir).name == "checkpoint_2"


def write_metadata(folder, record):
    checkpoint._seal(record)
    (folder / "coconut.json").write_text(json.dumps(record))


def test_a_run_records_the_accuracy_of_every_epoch(two_of_three):
    metrics = [json.loads(line) for line in lines(two_of_three)]
    expected = {str(r["epoch"]): r["eval/acc"] for r in metrics if "eval/acc" in r}
    assert checkpoint.read_metadata(two_of_three.run_dir / STATE)["position"]["accuracies"] == expected
    assert checkpoint.read_metadata(two_of_three.run_dir / "checkpoint_2")["accuracies"] == {"1": expected["1"]}


def test_of_two_starts_on_a_fresh_directory_one_trains(tmp_path):
    """Also where both are still reading their data when the other one comes."""
    trial = Trial(tmp_path / "twice", SETTINGS["optimizer kept"] | {"num_epochs": 1})
    processes = [trial.start() for _ in range(3)]
    outputs = [process.communicate(timeout=100)[0] for process in processes]
    assert sorted(process.returncode for process in processes) == [0, 2, 2], outputs
    assert sum("another process" in output for output in outputs) == 2
    assert not any("Traceback" in output for output in outputs)


def test_only_own_temporary_files_are_removed(tmp_path):
    """Of a killed process in this directory; not those of runs in folders below it, nor other programs'."""
    for name in (".metrics.jsonl.41.tmp", ".notes.tmp", "inner/.metrics.jsonl.42.tmp", ".state_1_2.43.tmp/model"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("half")
    (tmp_path / ".state_1_1.44.old.tmp").mkdir()
    clean(tmp_path)
    left = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert left == {".notes.tmp", "inner/.metrics.jsonl.42.tmp"}
    assert not (tmp_path / ".state_1_1.44.old.tmp").exists()
