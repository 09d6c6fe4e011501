"""The table of runs: best epoch of the last stage, seeds in one row, notes, Markdown and CSV."""

import csv
import io
import json

import pytest

from config import Config
from scripts import table

KEYS = {"save_path": "runs", "val_path": "data/valid.json", "model_id": "gpt2", "train_path": "t.json", "num_epochs": 5}


@pytest.fixture
def make_run(tmp_path):
    """make_run(name, [(stage, accuracy), ...], **keys) -> its folder."""

    def make(name, evaluations, **keys):
        folder = tmp_path / name
        folder.mkdir(parents=True)
        method = {} if {"cot", "no_cot", "no_thoughts"} & set(keys) else {"coconut": True, "max_latent_stage": 2}
        (folder / "config.yaml").write_text(Config(**{**KEYS, "name": name, **method, **keys}).to_yaml())
        lines = [{"train/loss": 1.0, "epoch": 1, "stage": 0}]
        for epoch, (stage, accuracy) in enumerate(evaluations, 1):
            lines.append({
                "eval/acc": accuracy, "eval/n_tokens": 5.0 + epoch, "eval/seconds_per_example": 0.25, "eval/loss": 1.0,
                "acc_interval": [accuracy / 2, (1 + accuracy) / 2], "epoch": epoch, "stage": stage,
            })  # fmt: skip
        (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
        return folder

    return make


def rows_of(capsys, *words) -> list[list[str]]:
    assert table.main([str(word) for word in words]) == 0
    lines = capsys.readouterr().out.splitlines()
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("|")][2:]


def test_a_row_is_the_best_epoch_of_the_last_stage(make_run, capsys):
    """Epoch 1 is better, but of stage 1; stages 3 and 4 are one, because nothing is left of the chain in both."""
    run = make_run("a", [(1, 0.9), (2, 0.8), (3, 0.5), (4, 0.7), (4, 0.6)])
    assert rows_of(capsys, run) == [
        ["Coconut", "valid.json", "0.700 (0.350 to 0.850)", "0.700", "9.0", "0.2500", "4", ""],
    ]  # fmt: skip


def test_runs_that_differ_by_their_seed_share_a_row(make_run, tmp_path, capsys):
    for seed, accuracy in enumerate((0.5, 0.7, 0.9)):
        make_run(f"seeds/{seed}/coconut", [(3, accuracy)] * 5, seed=seed, load_model_path=f"runs/{seed}/cot")
        make_run(f"seeds/{seed}/cot", [(0, accuracy / 2)] * 5, seed=seed, cot=True)
    make_run("seeds/other", [(3, 0.4)] * 5, lr=0.5)
    rows = rows_of(capsys, tmp_path / "seeds")
    assert [row[:4] for row in rows] == [
        ["Coconut", "valid.json", "0.400 (0.200 to 0.700)", "0.400"],
        ["Coconut", "valid.json", "0.700 ± 0.200", "0.500 0.700 0.900"],
        ["CoT", "valid.json", "0.350 ± 0.100", "0.250 0.350 0.450"],
    ]


def test_methods_of_table_1_are_named(make_run, capsys):
    runs = [
        make_run("p", [(3, 0.5)] * 5, thought="pause"),
        make_run("n", [(3, 0.5)] * 5, curriculum="none"),
        make_run("t", [(3, 0.5)] * 5, thought="pause", curriculum="none"),
    ]
    titles = [row[0] for row in rows_of(capsys, *runs)]
    assert titles == ["Pause as thought", "Coconut without curriculum", "Pause token"]


def test_an_icot_row_is_of_the_epochs_with_the_most_tokens_removed(make_run, capsys):
    run = make_run("i", [(5, 1.0), (9, 0.9), (11, 0.2), (11, 0.6), (11, 0.4)], no_thoughts=True, curriculum="tokens")
    assert rows_of(capsys, run)[0][2:7] == ["0.600 (0.300 to 0.800)", "0.600", "9.0", "0.2500", "4"]


def test_unfinished_runs_say_so(make_run, capsys):
    run = make_run("a", [(0, 0.9), (1, 0.8)])
    assert rows_of(capsys, run)[0][-1] == "epoch 2 of 5, stage 1 of 2"


def test_runs_without_an_evaluation_are_named(make_run, capsys):
    empty, good = make_run("empty", []), make_run("good", [(3, 0.5)] * 5)
    assert table.main([str(empty), str(good)]) == 0
    printed = capsys.readouterr()
    assert "empty: left out, because it has no evaluation yet" in printed.err and "0.500" in printed.out
    assert table.main([str(empty)]) == 2
    assert "no run with an evaluation yet" in capsys.readouterr().err
    assert table.main([str(empty / "nowhere")]) == 2
    assert "nowhere: no such folder" in capsys.readouterr().err


def test_csv_has_all_digits(make_run, tmp_path):
    runs = [make_run(str(seed), [(3, 0.1 * seed + 1 / 3)] * 5, seed=seed) for seed in (1, 2)]
    out = tmp_path / "table.csv"
    assert table.main([*map(str, runs), "--csv", "-o", str(out)]) == 0
    [row] = csv.DictReader(io.StringIO(out.read_text()))
    assert row["method"] == "Coconut" and row["interval_low"] == ""
    assert [float(a) for a in row["accuracies"].split()] == [0.1 + 1 / 3, 0.2 + 1 / 3]
    assert float(row["standard_deviation"]) == pytest.approx(0.1 / 2**0.5)
    assert row["epochs"] == "1 1"
