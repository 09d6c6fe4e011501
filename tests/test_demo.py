"""The demo's task, table and pictures."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import demo
from config import load_config
from plot import main as plot_main
from plot import make_figure, read_curves
from utils import UserError

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def chains(tmp_path_factory):
    """A small set of chains, as the script writes it."""
    folder = tmp_path_factory.mktemp("chains")
    command = [sys.executable, ROOT / "preprocessing" / "chains.py", "--train", "300", "--valid", "50", "--out", folder]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    again = tmp_path_factory.mktemp("again")
    subprocess.run([*command[:-1], again], capture_output=True, check=True)
    return folder, again


def worked_off(question):
    """The values on the way, from left to right modulo 10, by other means than the generator's."""
    first, *rest = re.findall(r"[+*-] \d|\d", question)
    values = [int(first)]
    for operation in rest:
        values.append(eval(f"{values[-1]} {operation}") % 10)
    return [str(value) for value in values[1:]]


def test_steps_and_answers_are_right_and_no_question_appears_twice(chains):
    folder, _ = chains
    items = [item for split in ("train", "valid") for item in json.loads((folder / f"chains_{split}.json").read_text())]
    assert len(items) == 350
    assert len({item["question"] for item in items}) == 350
    for item in items:
        assert item["steps"] == worked_off(item["question"])
        assert item["answer"] == item["steps"][-1]


def test_the_same_seed_gives_the_same_files(chains):
    for name in ("chains_train.json", "chains_valid.json", "chains_vocabulary.json"):
        assert (chains[0] / name).read_bytes() == (chains[1] / name).read_bytes()


def test_impossible_options_are_one_message():
    command = [sys.executable, ROOT / "preprocessing" / "chains.py", "--operations", "1", "--train", "9999999"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("method", demo.TITLES)
def test_the_configurations_differ_in_the_method_alone(method):
    ours, base = (load_config(str(ROOT / "args" / f"demo_{name}.yaml")).to_dict() for name in (method, "coconut"))
    assert {key for key in ours if ours[key] != base[key]} <= {"name", *demo.TITLES}


def finished_run(folder, accuracies):
    """A run's metrics.jsonl with two stages."""
    folder.mkdir()
    lines = []
    for epoch, accuracy in enumerate(accuracies, start=1):
        stage = 0 if epoch < 3 else 1
        for step in range(4):
            index = (epoch - 1) * 4 + step
            lines.append({"train/epoch": epoch, "train/step": index, "train/loss": 2 / (index + 1), "stage": stage})
        judged = {"eval/loss": 1 / epoch, "eval/acc": accuracy, "eval/n_tokens": 7.0, "eval/seconds_per_example": 0.01}
        lines.append(judged | {"train/seconds": 5.0, "acc_interval": [0.1, 0.9], "epoch": epoch, "stage": stage})
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


def test_the_table_holds_the_last_evaluation_and_the_whole_training_time(tmp_path):
    lines = demo.table([demo.read_result("coconut", finished_run(tmp_path / "a", [0.2, 0.5, 0.75]))])
    assert [cell.strip() for cell in lines[2].split("|")[1:-1]] == [
        "Coconut", "0.750 (0.100 to 0.900)", "7.0", "0.0100", "3", "15 s",
    ]  # fmt: skip
    assert len({len(line) for line in lines}) == 1


def test_a_finished_run_is_not_trained_again_and_another_ones_is_refused(tmp_path):
    keys = [f"save_path={tmp_path}", "name=a", "num_epochs=3"]
    config = load_config(str(ROOT / "args" / "demo_coconut.yaml"), keys)
    assert not demo.is_finished(config)
    finished_run(tmp_path / "a", [0.2, 0.5, 0.75])
    (tmp_path / "a" / "config.yaml").write_text(config.to_yaml())
    assert demo.is_finished(config)
    with pytest.raises(UserError, match="other settings"):
        demo.is_finished(load_config(str(ROOT / "args" / "demo_coconut.yaml"), [*keys, "seed=9"]))


def test_the_picture_shows_every_runs_values_with_labelled_axes_and_stages(tmp_path):
    runs = [
        read_curves(finished_run(tmp_path / name, values))
        for name, values in (("a", [0.1, 0.2, 0.3]), ("b", [0.4, 0.5, 1]))
    ]
    figure = make_figure(runs)
    above, below = figure.axes
    drawn = [list(line.get_ydata()) for line in above.get_lines() if line.get_label() in ("a", "b")]
    assert drawn == [[0.1, 0.2, 0.3], [0.4, 0.5, 1]]
    assert (above.get_ylabel(), below.get_xlabel(), below.get_ylabel()) == (
        "accuracy",
        "epoch",
        "loss per labelled token",
    )
    assert [text.get_text() for text in above.texts] == ["stage 0", "stage 1"]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["a", "b"]


def test_plot_writes_a_picture_or_one_message(tmp_path, capsys):
    run = finished_run(tmp_path / "a", [0.1, 0.2, 0.3])
    assert plot_main([str(run)]) == 0
    assert (run / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert plot_main([str(run), str(run), "-o", str(tmp_path / "two.svg")]) == 0
    assert plot_main([str(tmp_path / "nothing")]) == 2
    assert plot_main([str(run), "-o", "picture.gif"]) == 2
    assert "Traceback" not in capsys.readouterr().err
