"""The demo: its data, table, pictures and messages."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from analysis.pictures import draw_accuracies
from config import load_config
from scripts import demo, demo_seeds, plot
from training.curves import make_figure, new_figure, read_curves
from utils import UserError

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("name", demo.TITLES)
def test_the_configurations_differ_in_method_and_start_alone(name):
    ours, base = (load_config(str(ROOT / "args" / f"graph_{n}.yaml")).to_dict() for n in (name, "coconut"))
    different = {key for key in ours if ours[key] != base[key]}
    method = {"name", "coconut", "cot", "no_cot", "no_thoughts", "thought"}
    start = {"load_model_path", "resume"} if demo.STARTS[name] == "chains" else set()
    schedule = {"epochs_per_stage", "max_latent_stage", "num_epochs"} if name in ("cot", "no_cot") else set()
    assert different <= method | start | schedule


@pytest.mark.parametrize(("methods", "runs"), [
    (["coconut"], ["chains", "cot", "coconut"]),
    (["no_cot"], ["chains", "no_cot"]),
    (list(demo.TITLES), ["chains", "cot", "no_cot", "no_thoughts", "pause", "coconut"]),
])  # fmt: skip
def test_every_run_comes_after_the_one_it_starts_from(methods, runs):
    assert demo.needed_runs(methods) == runs
    for name in set(runs) - {"chains"}:
        assert runs.index(demo.STARTS[name]) < runs.index(name)
        config = load_config(str(ROOT / "args" / f"graph_{name}.yaml"))
        assert config.load_model_path == f"runs/graph-{demo.STARTS[name]}/checkpoint_1"


def commands_of(names, *words):
    """{run: its arguments of run.py} in a folder X."""
    options = demo.parse_args(["--seed", "7", *words])
    return {name: demo.command_of(name, Path("X"), options) for name in names}


@pytest.mark.parametrize("quick", [False, True])
def test_a_run_starts_from_the_demos_own_runs_and_reads_the_data_that_the_demo_makes(quick, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    names = ["chains", *demo.STARTS]
    configs = {n: load_config(w[0], w[1:]) for n, w in commands_of(names, *["--quick"] * quick).items()}
    for name, config in configs.items():
        start = f"X/graph-{demo.STARTS[name]}/checkpoint_1" if name != "chains" else None
        assert (config.run_dir, config.load_model_path) == (Path(f"X/graph-{name.replace('_', '-')}"), start)
        assert config.seed == 7
        trees = "_quick" * quick + ("_chains" if name == "chains" else "")
        assert config.train_path == f"data/graph{trees}_train.json"
        assert config.val_path == f"data/graph{trees}_valid.json"
    monkeypatch.setattr(demo, "QUICK_DATA", [*demo.QUICK_DATA, "--out", str(tmp_path)])
    if quick:
        demo.make_data(demo.parse_args(["--quick"]))
        named = {path for c in configs.values() for path in (c.train_path, c.val_path, c.tokenizer)}
        assert named <= {f"data/{path.name}" for path in tmp_path.iterdir()}
        assert len(json.loads((tmp_path / "graph_quick_train.json").read_text())) <= 40_000 / 8


@pytest.mark.parametrize("words", [[], ["--quick"]])
def test_no_run_of_the_demo_ends_in_its_warm_up(words, monkeypatch):
    monkeypatch.chdir(ROOT)
    options = demo.graphs.parse_args(demo.QUICK_DATA if words else [])
    for name, command in commands_of(["chains", *demo.STARTS], *words).items():
        config = load_config(command[0], command[1:])
        n_items = options.chains_train if name == "chains" else options.train
        n_steps = (config.num_epochs - config.resume) * n_items // config.batch_size_training
        assert 0 < config.warmup_steps <= n_steps / 2


def test_the_quick_demo_trains_one_epoch_a_stage():
    configs = {
        n: load_config(str(ROOT / w[0]), w[1:]) for n, w in commands_of(["chains", *demo.STARTS], "--quick").items()
    }
    assert configs["coconut"].num_epochs == configs["coconut"].max_latent_stage + 1
    assert {name: config.num_epochs for name, config in configs.items()} == {"chains": 1} | dict.fromkeys(
        demo.STARTS, 4
    )


def finished_run(folder, accuracies, first_epoch=1):
    """A run's metrics.jsonl with two stages."""
    folder.mkdir()
    lines = []
    for epoch, accuracy in enumerate(accuracies, start=first_epoch):
        stage = 0 if epoch < 3 else 1
        for step in range(4):
            index = (epoch - 1) * 4 + step
            lines.append({"train/epoch": epoch, "train/step": index, "train/loss": 2 / (index + 1), "stage": stage})
        evaluation = {
            "eval/loss": 1 / epoch,
            "eval/acc": accuracy,
            "eval/n_tokens": 7.0,
            "eval/seconds_per_example": 0.01,
        }
        lines.append(evaluation | {"train/seconds": 5.0, "acc_interval": [0.1, 0.9], "epoch": epoch, "stage": stage})
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


def test_the_table_holds_the_last_evaluation_and_the_whole_training_time(tmp_path):
    lines = demo.results_table([demo.read_result("coconut", finished_run(tmp_path / "a", [0.2, 0.5, 0.75], 4))])
    assert [cell.strip() for cell in lines[2].split("|")[1:-1]] == [
        "Coconut", "0.750 (0.100 to 0.900)", "7.0", "0.0100", "3", "15 s",
    ]  # fmt: skip
    assert len({len(line) for line in lines}) == 1


def test_a_finished_run_is_not_repeated_and_one_with_other_settings_is_rejected(tmp_path):
    keys = [f"save_path={tmp_path}", "name=a", "num_epochs=3"]
    config = load_config(str(ROOT / "args" / "graph_coconut.yaml"), keys)
    assert not demo.is_finished(config)
    finished_run(tmp_path / "a", [0.2, 0.5, 0.75])
    (tmp_path / "a" / "config.yaml").write_text(config.to_yaml())
    assert demo.is_finished(config)
    with pytest.raises(UserError, match="other settings"):
        demo.is_finished(load_config(str(ROOT / "args" / "graph_coconut.yaml"), [*keys, "seed=9"]))


def test_the_picture_shows_every_runs_values_with_labeled_axes_and_stages(tmp_path):
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
        "loss per labeled token",
    )
    assert [text.get_text() for text in above.texts] == ["stage 0", "stage 1"]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["a", "b"]


def test_plot_writes_a_picture_or_one_message(tmp_path, capsys):
    run = finished_run(tmp_path / "a", [0.1, 0.2, 0.3])
    assert plot.main([str(run)]) == 0
    assert (run / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert plot.main([str(run), str(run), "-o", str(tmp_path / "two.svg")]) == 0
    assert plot.main([str(tmp_path / "nothing")]) == 2
    assert plot.main([str(run), "-o", "picture.gif"]) == 2
    assert "Traceback" not in capsys.readouterr().err


def test_the_demo_prints_a_summary_first_and_next_steps_last(tmp_path, capsys, monkeypatch):
    """Without training: all runs exist but one, which is stopped."""
    monkeypatch.setattr(demo.graphs, "main", lambda words: None)
    monkeypatch.setattr(demo.run, "main", lambda words: 130)
    monkeypatch.setattr(demo, "is_finished", lambda config: config.method.name != "coconut")
    assert demo.main(["--out", str(tmp_path), "--methods", "coconut", "cot", "coconut"]) == 130
    printed = capsys.readouterr()
    for words in ("chance: 0.5", "CoT, Coconut, one", demo.DURATION, "2 trained already", f"{tmp_path}/seed_0"):
        assert words in printed.out, words
    assert "resumes from here" in printed.err
    monkeypatch.setattr(demo, "is_finished", lambda config: True)
    (tmp_path / "seed_0").mkdir()
    finished_run(tmp_path / "seed_0" / "graph-cot", [0.2, 0.5])
    assert demo.main(["--out", str(tmp_path), "--methods", "cot"]) == 0
    *_, picture, _, _, look, command = capsys.readouterr().out.splitlines()
    assert picture == f"picture: {tmp_path}/seed_0/demo.png"
    assert "-m analysis.frontier" in look
    program, config, *keys = command.split()[1:]
    assert (ROOT / program).is_file() and load_config(str(ROOT / config), keys).c_thought == 2


def test_a_picture_that_cannot_be_drawn_costs_one_warning(tmp_path, monkeypatch, capsys):
    (tmp_path / "seed_0").mkdir()
    finished_run(tmp_path / "seed_0" / "graph-cot", [0.2, 0.5])
    monkeypatch.setattr(demo, "is_finished", lambda config: True)
    monkeypatch.setattr(demo, "draw_accuracies", lambda *_, **__: {}["font"])
    assert demo.main(["--out", str(tmp_path), "--methods", "cot"]) == 0
    printed = capsys.readouterr().err
    assert "demo.png is not drawn: " in printed and printed.count("\n") == 1
    assert (tmp_path / "seed_0" / "table.txt").is_file() and not list(tmp_path.rglob("*.png"))


@pytest.mark.parametrize("chosen", [["no_cot", "cot", "coconut"], ["no_thoughts"]])
def test_the_picture_has_every_methods_accuracies_from_the_shared_start_on(chosen, tmp_path, monkeypatch):
    """CoT's first epoch is stage 0 of the methods that start from it, whether CoT is compared or not."""
    runs = {"no_cot": ([0.5, 0.4], 1), "cot": ([0.8, 0.9], 1), "coconut": ([0.7, 0.95], 2), "no_thoughts": ([0.6], 2)}
    folders = {n: finished_run(tmp_path / f"graph-{n}", *run) for n, run in runs.items()}
    drawn = []
    monkeypatch.setattr(demo, "draw_accuracies", lambda panel, *drawing, chance: drawn.extend(drawing))
    demo.draw({name: demo.read_result(name, folders[name]) for name in chosen}, [], tmp_path)
    lines = {
        "no_cot": {1: 0.5, 2: 0.4}, "cot": {1: 0.8, 2: 0.9}, "coconut": {1: 0.8, 2: 0.7, 3: 0.95},
        "no_thoughts": {1: 0.8, 2: 0.6},
    }  # fmt: skip
    assert drawn[0] == {demo.TITLES[name]: lines[name] for name in chosen}
    assert drawn[1] == ({1: 0, 2: 0, 3: 1} if "coconut" in chosen else {1: 0, 2: 0})  # as finished_run logs them
    assert (tmp_path / "demo.png").read_bytes()[:4] == b"\x89PNG"


def test_the_line_of_chance_is_named():
    panel = new_figure((6, 4)).subplots()
    draw_accuracies(panel, {"CoT": {1: 0.8, 2: 0.9}}, {1: 0, 2: 1}, chance=0.5)
    assert [(text.get_text(), text.xy[1]) for text in panel.texts] == [("chance", 0.5)]
    assert [tick.get_text() for tick in panel.get_xticklabels()] == ["1\nstage 0", "2\nstage 1"]


@pytest.mark.parametrize("words", [["--seed", "-1"], ["--out", __file__], ["--out", f"{__file__}/below"]])
def test_wrong_arguments_of_the_demo_are_one_line_and_nothing_is_done(words, capsys):
    assert demo.main(words) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("error: ") and printed.err.count("\n") == 1


@pytest.mark.skipif(not shutil.which("make"), reason="make is not installed")
def test_make_rejects_a_python_that_is_too_old(tmp_path):
    for name in ("Makefile", "requirements.txt"):
        shutil.copy(ROOT / name, tmp_path)
    old = tmp_path / "python3"
    old.write_text('#!/bin/sh\ncase $1 in --version) echo "Python 3.9.18" ;; *) exit 1 ;; esac\n')
    old.chmod(0o755)
    done = subprocess.run(["make", "demo", f"PYTHON={old}"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "error: Python 3.10 or newer is needed; Python 3.9.18 was found" in done.stdout
    assert not (tmp_path / ".venv").exists()


def write_wheel(folder, name, requires=(), **files):
    """A package of a few text files, as pip installs it."""
    info = f"{name}-0.32.4.dist-info"
    needs = "".join(
        f"Provides-Extra: {extra}\nRequires-Dist: {needed}; extra == '{extra}'\n" for extra, needed in requires
    )
    contents = {path.replace("__", "/"): text for path, text in files.items()} | {
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 0.32.4\n{needs}",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "".join(f"{path},,\n" for path in [*contents, f"{info}/RECORD"])
    with zipfile.ZipFile(folder / f"{name}-0.32.4-py3-none-any.whl", "w") as archive:
        for path, text in (contents | {f"{info}/RECORD": record}).items():
            archive.writestr(path, text)


@pytest.fixture
def make(tmp_path):
    """`make` in a folder where pip finds small stand-ins of MLX's packages alone: make(*words) -> what it printed.

    As in the real ones, the builds for CPU and for CUDA hold a library of the same name. The demo prints its content.
    """
    extras = {"cpu": "mlx_cpu", "cuda13": "mlx_cuda_13"}
    write_wheel(tmp_path, "mlx", extras.items(), mlx__core="")
    for extra, name in extras.items():
        write_wheel(tmp_path, name, mlx__library=f"built for {extra}")
    shutil.copy(ROOT / "Makefile", tmp_path)
    (tmp_path / "requirements.txt").write_text("mlx[cpu]>=0.32.4,<0.33\n")
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts" / "demo.py").write_text(
        "from importlib.resources import files\nprint(files('mlx').joinpath('library').read_text())\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "CUDA" and not name.startswith("PIP_")}
    environment |= {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(tmp_path), "PIP_CONFIG_FILE": os.devnull}

    def call(*words):
        command = ["make", *words, f"PYTHON={sys.executable}"]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return call


@pytest.mark.skipif(not shutil.which("make"), reason="make is not installed")
def test_one_build_of_mlx_at_a_time(make, tmp_path):
    """The one that was asked for last; removing the other one behind it would take its library away."""

    def builds():
        return sorted(path.name.split("-")[0] for path in tmp_path.glob(".venv/lib/*/site-packages/mlx_c*.dist-info"))

    assert "built for cpu" in make("demo") and builds() == ["mlx_cpu"]
    assert "built for cuda13" in make("demo", "CUDA=1") and builds() == ["mlx_cuda_13"]
    printed = make("demo")
    assert "built for cuda13" in printed and "installing" not in printed, "it stays without being asked for again"
    assert "built for cpu" in make("demo", "CUDA=") and builds() == ["mlx_cpu"]


def test_the_summary_over_seeds(tmp_path):
    """The last accuracy, the total training time, and the differences seed by seed."""
    runs = {"a": [0.9, 1.0], "b": [0.1, 0.5], "c": [0.97, 0.96], "d": [0.0, 0.46], "e": [0.85], "f": [0.3]}
    for name, accuracies in runs.items():
        finished_run(tmp_path / name, accuracies)
    a, b, c, d, e, f = (demo.read_result("coconut", tmp_path / name) for name in "abcdef")
    assert (a.accuracy, a.seconds) == (1.0, 10.0)
    results = {"no_cot": [b, d, f], "coconut": [a, c, e]}
    rows = [line.replace(" ", "") for line in demo_seeds.by_seed(results)]
    assert rows[0] == "|seed|No-CoT|Coconut|" and rows[2:] == ["|0|0.500|1.000|", "|1|0.460|0.960|", "|2|0.300|0.850|"]
    rows = [line.replace(" ", "") for line in demo_seeds.summary(results)]
    assert rows[2:] == ["|No-CoT|3|0.420|0.106|0.300|0.500|8|", "|Coconut|3|0.937|0.078|0.850|1.000|8|"]
    assert demo_seeds.verdict(results) == [
        "Coconut is above 0.9 on 2 of 3 seeds", "above No-CoT: 0.517 on average, at least 0.500",
    ]  # fmt: skip
    assert demo_seeds.verdict({"cot": [a]})[0].startswith("no verdict")
    row = demo_seeds.summary({"cot": [a]})[2].replace(" ", "")
    assert row == "|CoT|1|1.000|-|1.000|1.000|10|", "one seed has no spread"
