"""The table of runs: best epoch of the last stage, seeds in one row, notes, Markdown and CSV."""

import csv
import io
import json
from pathlib import Path

import pytest

from config import Config
from scripts import table
from training.resume import FREE_KEYS

LEGACY = Path(__file__).parent / "fixtures" / "legacy_run"
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
        ["Coconut", "valid.json", "0.700 (0.350 to 0.850)", "0.700", "9.0", "0.2500", "4", "1", "a", ""],
    ]  # fmt: skip


def test_of_equal_epochs_the_first_counts(make_run, capsys):
    """As in resume.best_checkpoint, so that the row is about the checkpoint that load_model_path takes."""
    assert rows_of(capsys, make_run("a", [(3, 0.4)] + [(3, 0.5)] * 4))[0][6] == "2"


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
    assert rows_of(capsys, run)[0][-1] == "epoch 2 of 5, stage 1 of 3"


@pytest.mark.parametrize(
    "keys, stages, note",
    [
        ({"num_epochs": 4}, [0, 1, 2], "epoch 3 of 4, stage 2 of 3"),  # stage 3 has no written step left
        ({"num_epochs": 3}, [0, 1, 2], ""),  # as in the old demo: words stay by plan
        ({"num_epochs": 2}, [0, 1], "stage 1 of 2"),  # max_latent_stage cannot be reached
        ({"curriculum": "none", "num_epochs": 2}, [3], "epoch 1 of 2"),
        ({"cot": True, "num_epochs": 9, "max_latent_stage": 3}, [0], "epoch 1 of 9"),
    ],
)
def test_the_last_stage_is_that_of_the_plan(keys, stages, note, make_run, capsys):
    run = make_run("a", [(stage, 0.5) for stage in stages], **keys)
    assert rows_of(capsys, run)[0][-1] == note


@pytest.mark.parametrize(
    "keys, stages, note",
    [
        ({"remove_all_from": 4}, [0, 1, 2, 3, 4], ""),
        ({"remove_all_from": 9}, [0, 1, 2, 3, 4], "stage 4 of at most 9: tokens may be left"),
        ({"remove_all_from": None}, [0, 1, 2, 3, 4], "stage 4 of unknown: tokens may be left"),
        ({"remove_all_from": None}, [0, 1, 2, 3, 3], ""),  # four tokens are due, and no chain has more than three
        ({"remove_all_from": None, "tokens_per_epoch": 0.5}, [0, 0, 1, 1, 2], "stage 2 of unknown: tokens may be left"),
    ],
)
def test_icot_says_where_tokens_may_be_left(keys, stages, note, make_run, capsys):
    run = make_run("i", [(stage, 0.5) for stage in stages], no_thoughts=True, curriculum="tokens", **keys)
    assert rows_of(capsys, run)[0][-1] == note


def test_unfinished_runs_are_not_averaged_with_finished_ones(make_run, tmp_path, capsys):
    """Two that are equally far are; without an evaluation there is nothing to average."""
    for seed, n_epochs in enumerate((5, 5, 3, 3, 0)):
        make_run(f"{seed}/coconut", [(3, 0.1 * (seed + 1))] * n_epochs, seed=seed)
    rows = rows_of(capsys, tmp_path)
    assert [[row[2], *row[7:]] for row in rows] == [
        ["0.150 ± 0.071", "2", f"{tmp_path}/0/coconut, {tmp_path}/1/coconut", ""],
        ["0.350 ± 0.071", "2", f"{tmp_path}/2/coconut, {tmp_path}/3/coconut", "epoch 3 of 5"],
        ["", "1", f"{tmp_path}/4/coconut", "no evaluation yet"],
    ]


def test_only_keys_without_effect_may_differ_in_a_row(make_run, tmp_path, capsys):
    """Of the keys that a resumed run may change, some change its results."""
    assert table.WITHOUT_EFFECT < FREE_KEYS
    free = {
        "project": "p", "wandb": "off", "token_cache": "t", "grad_checkpoint": True, "save_interval_minutes": 1,
        "keep_checkpoints": 1, "save_only_improve": True, "save_path": "elsewhere",
    }  # fmt: skip
    assert free.keys() | {"name"} == table.WITHOUT_EFFECT
    make_run("same/a", [(3, 0.5)] * 5, load_model_path="s0/cot/checkpoint_1")
    make_run("same/b", [(3, 0.5)] * 5, load_model_path="s1/cot/checkpoint_1", seed=1, **free)
    assert len(rows_of(capsys, tmp_path / "same")) == 1
    others = {"lr": 1e-3, "debug": True, "weight_decay": 0.0, "max_new_tokens": 9, "batch_size_eval": 2, "resume": 1}
    for name, value in {**others, "load_model_path": "s0/cot/checkpoint_2"}.items():
        start = {"load_model_path": "s0/cot/checkpoint_1"}
        make_run(f"other/{name}", [(3, 0.5)] * 5, **{**start, name: value})
    assert len(rows_of(capsys, tmp_path / "same", tmp_path / "other")) == 8


def test_a_seed_that_occurs_twice_is_noted(make_run, tmp_path, capsys):
    for name, seed in {"a": 3, "b": 1, "c": 3}.items():
        make_run(name, [(3, 0.1 * seed)] * 5, seed=seed)
    assert rows_of(capsys, tmp_path)[0][3:] == [
        "0.100 0.300 0.300", "6.0", "0.2500", "1 1 1", "2", "b, a, c", "seed 3 in 2 runs",
    ]  # fmt: skip


def evaluate(folder, *accuracies):
    """Write what only_eval of an older version writes: metrics.jsonl without training records, and no config.yaml."""
    folder.mkdir(parents=True)
    lines = [{"eval/acc": accuracy, "eval/n_tokens": 3.0, "epoch": 5, "stage": 3} for accuracy in accuracies]
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


def test_an_evaluation_is_a_row_of_its_own(make_run, tmp_path, capsys):
    """Its newest record counts: the best one would be chosen on the test set. Without a config.yaml no method is told.

    Nothing in it tells how its checkpoint was trained, so two of them never share a row.
    """
    run = make_run("runs/a", [(3, 0.5)] * 5)
    evaluate(run / "only_eval", 0.9, 0.4)
    other = evaluate(tmp_path / "runs/b", 0.3)
    rows = [
        ["Coconut", "valid.json", "0.500 (0.250 to 0.750)", "0.500", "6.0", "0.2500", "1", "1", "a", ""],
        ["?", "?", "0.400", "0.400", "3.0", "", "5", "", "a/only_eval", "no config.yaml, newest of 2 evaluations"],
        ["?", "?", "0.300", "0.300", "3.0", "", "5", "", "b", "no config.yaml"],
    ]
    assert rows_of(capsys, tmp_path / "runs") == rows
    assert rows_of(capsys, run, other) == rows
    config = Config(**{**KEYS, "name": "b", "coconut": True, "only_eval": True, "num_epochs": 25, "seed": 7})
    (other / "config.yaml").write_text(config.to_yaml())
    (run / "only_eval" / "config.yaml").write_text(config.to_yaml())
    expected = ["Coconut", "valid.json", "0.300", "0.300", "3.0", "", "5", "1", "b", ""]
    assert rows_of(capsys, other) == [expected]
    evaluate(tmp_path / "runs/c", 0.3)
    (tmp_path / "runs/c/config.yaml").write_text(config.to_yaml())
    assert [row[8] for row in rows_of(capsys, tmp_path / "runs")] == ["a", "a/only_eval", "b", "c"]


def test_a_run_is_one_row_however_it_is_named(make_run, tmp_path, monkeypatch, capsys):
    run = make_run("runs/a", [(3, 0.5)] * 5)
    (tmp_path / "link").symlink_to(run)
    monkeypatch.chdir(run)
    rows = rows_of(capsys, run, run / "metrics.jsonl", tmp_path / "runs", tmp_path, tmp_path / "link", ".")
    assert [row[7:] for row in rows] == [["1", "a", ""]]
    assert rows_of(capsys, ".") == rows


def test_rows_with_the_same_name_show_paths(make_run, tmp_path, monkeypatch, capsys):
    make_run("x/a", [(3, 0.5)] * 5)
    make_run("y/a", [(3, 0.5)] * 5, c_thought=2)
    make_run("y/b", [(3, 0.5)] * 5, c_thought=3)
    monkeypatch.chdir(tmp_path)
    assert [row[8] for row in rows_of(capsys, "x", "y")] == ["x/a", "y/a", "b"]


def test_lines_that_are_not_evaluations_are_skipped(make_run, capsys):
    """Truncated by a power failure, or of other programs."""
    run = make_run("a", [(3, 0.5)] * 5)
    with open(run / "metrics.jsonl", "ab") as file:
        file.write(b'\n{"eval/acc": 1.0}\n[1]\n\xff\n{"eval/acc": 0.9, "epo')
    assert rows_of(capsys, run)[0][2] == "0.500 (0.250 to 0.750)"


def test_runs_without_an_evaluation_are_named(make_run, capsys):
    empty, good = make_run("empty", []), make_run("good", [(3, 0.5)] * 5)
    assert table.main([str(empty), str(good)]) == 0
    printed = capsys.readouterr()
    assert "| empty | no evaluation yet |" in printed.out and "0.500" in printed.out
    assert table.main([str(empty)]) == 2
    assert "no run with an evaluation yet" in capsys.readouterr().err


BAD = {
    "nowhere": "nowhere: no such folder",
    "run/nowhere/metrics.jsonl": "metrics.jsonl: no such folder",
    "run/config.yaml": "config.yaml: no such folder",
    "nothing": "nothing: no metrics.jsonl in it or up to two levels below",
    "run nothing": "nothing: no metrics.jsonl",
    "broken": "broken/config.yaml: 1 problem in the configuration",
    "run -o table.txt": "table.txt: expected a name that ends in .md or .csv",
    "run --csv -o table.md": "table.md: expected a name that ends in .csv",
    "run -o absent/table.md": "absent/table.md: cannot write it (No such file or directory)",
    "folder": "metrics.jsonl: cannot read the metrics (Is a directory)",
}


@pytest.mark.parametrize("words", BAD)
def test_bad_input_is_one_message_and_status_2(words, make_run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    make_run("run", [(3, 0.5)] * 5)
    config = make_run("broken", [(3, 0.5)] * 5) / "config.yaml"
    config.write_text(config.read_text() + "colour: red\n")
    (tmp_path / "nothing").mkdir()
    (tmp_path / "folder" / "metrics.jsonl").mkdir(parents=True)
    before = sorted(tmp_path.rglob("*"))
    assert table.main(words.split()) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and BAD[words] in err
    assert sorted(tmp_path.rglob("*")) == before


def test_the_suffix_decides_the_format(make_run, tmp_path, capsys):
    run = make_run("a", [(3, 0.5)] * 5)
    for suffix, start in {".md": "| method ", ".csv": "method,data,"}.items():
        out = tmp_path / f"table{suffix}"
        assert table.main([str(run), "--out", str(out)]) == 0
        assert out.read_text().startswith(start) and out.read_text().endswith("\n")
        assert capsys.readouterr().out == f"{out}\n"


def test_csv_has_all_digits(make_run, tmp_path):
    runs = [make_run(str(seed), [(3, 0.1 * seed + 1 / 3)] * 5, seed=seed) for seed in (1, 2)]
    out = tmp_path / "table.csv"
    assert table.main([*map(str, runs), "--csv", "-o", str(out)]) == 0
    [row] = csv.DictReader(io.StringIO(out.read_text()))
    assert row["method"] == "Coconut" and row["interval_low"] == ""
    assert [float(a) for a in row["accuracies"].split()] == [0.1 + 1 / 3, 0.2 + 1 / 3]
    assert float(row["standard_deviation"]) == pytest.approx(0.1 / 2**0.5)
    assert row["epochs"] == "1 1" and row["seeds"] == "1 2" and row["n_seeds"] == "2"
    assert row["runs"] == f"{runs[0]}, {runs[1]}"


def test_a_mean_that_lacks_a_value_is_left_out(make_run, tmp_path, capsys):
    """Of a log that another program wrote."""
    for seed in (1, 2):
        run = make_run(str(seed), [(3, 0.5)] * 5, seed=seed)
    (run / "metrics.jsonl").write_text((run / "metrics.jsonl").read_text().replace("eval/n_tokens", "tokens"))
    assert rows_of(capsys, tmp_path)[0][3:6] == ["0.500 0.500", "", "0.2500"]


def test_a_run_of_an_older_version(capsys):
    """Its config.yaml lacks the newer keys."""
    expected = ["Coconut", "valid.json", "0.000 (0.000 to 0.324)", "0.000", "8.0", "0.0049", "1", "1", "legacy"]
    assert rows_of(capsys, LEGACY) == [[*expected, "epoch 1 of 3, stage 0 of 2"]]
