"""Pictures of runs: what they show, and the messages for bad input."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from scripts.plot import main
from training import curves
from training.curves import make_figure, read_curves

ROOT = Path(__file__).resolve().parents[1]


def logged(folder, stages, first_epoch=1, max_latent_stage=None, trained=True):
    """A run's directory with one epoch per stage, and a config.yaml if max_latent_stage is given."""
    folder.mkdir(parents=True)
    lines = []
    for epoch, stage in enumerate(stages, start=first_epoch):
        if trained:
            index = 2 * (epoch - 1)
            lines += [
                {"train/epoch": epoch, "train/step": index + i, "train/loss": 1.0, "stage": stage} for i in range(2)
            ]
        lines.append({"eval/loss": 1.0, "eval/acc": 0.5, "epoch": epoch, "stage": stage})
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    if max_latent_stage is not None:
        (folder / "config.yaml").write_text(f"max_latent_stage: {max_latent_stage}\n")
    return folder


def stage_texts(figure):
    return [text.get_text() for text in figure.axes[0].texts]


def test_stages_past_max_latent_stage_are_one(tmp_path):
    """They all train the same sequences: no steps, the most thoughts."""
    run = logged(tmp_path / "gsm", [1, 2, 3, 4, 5, 5, 6], max_latent_stage=3)
    assert read_curves(run).stages == [("1", 0), ("2", 1), ("3", 2), ("4+", 3)]
    assert stage_texts(make_figure([read_curves(run)])) == ["stage 1", "stage 2", "stage 3", "stage 4+"]


def test_a_narrow_picture_numbers_its_stages(tmp_path):
    """Where the word has no place, as on a phone, the number alone stands above each stage."""
    run = read_curves(logged(tmp_path / "run", [0, 1, 2, 3, 4]))
    assert stage_texts(make_figure([run])) == [f"stage {n}" for n in range(5)]
    assert stage_texts(make_figure([run], size=(3.7, 5))) == ["stage", *"01234"]


def test_a_run_before_its_first_validation_is_drawn(tmp_path):
    """Training losses alone; matplotlib would warn of a layout that collapses."""
    path = logged(tmp_path / "run", [0]) / "metrics.jsonl"
    path.write_text("\n".join(line for line in path.read_text().splitlines() if "train/loss" in line))
    figure = make_figure([read_curves(path)])
    figure.savefig(tmp_path / "curves.png")
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["validation", "training"]


def test_lines_that_are_not_records_are_skipped(tmp_path):
    """Truncated by a power failure, or written by other programs."""
    path = logged(tmp_path / "run", [0, 1]) / "metrics.jsonl"
    whole = read_curves(path)
    first, *others = path.read_bytes().splitlines()
    path.write_bytes(
        b"\n".join([b'{"eval/acc": 1', b"\xff\x00", b"[1]", b"{}", first, b"", b"7", *others, others[0][:30]])
    )
    assert read_curves(path) == whole


@pytest.mark.parametrize("config", [None, b"", b"\xff", b"[", b"name: x\n", b"max_latent_stage: x\n", b"[1]"])
def test_without_a_config_every_stage_is_shown_as_logged(config, tmp_path):
    run = logged(tmp_path / "run", [0, 1, 2])
    if config is not None:
        (run / "config.yaml").write_bytes(config)
    assert read_curves(run).stages == [("0", 0), ("1", 1), ("2", 2)]


def test_the_axis_begins_where_the_run_did(tmp_path):
    """With `resume: 3` the first epoch is the fourth."""
    run = logged(tmp_path / "resumed", [1, 1, 2], first_epoch=4)
    assert make_figure([read_curves(run)]).axes[1].get_xlim() == (3, 6)


@pytest.mark.parametrize("epoch", [0, 25])
def test_an_evaluation_alone_is_a_point_with_space_around_it(epoch, tmp_path):
    run = logged(tmp_path / "evaluated", [0], first_epoch=epoch, trained=False)
    figure = make_figure([read_curves(run)])
    assert figure.axes[1].get_xlim() == (epoch - 0.5, epoch + 0.5)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["validation"]


def test_evaluations_of_several_checkpoints_and_data_sets_are_one_curve(tmp_path):
    """An only_eval folder: in any order, some twice, of two data files. The last file counts, and each epoch's last."""
    lines = [(8, "test", 0.8), (2, "valid", 0.1), (8, "valid", 0.7), (4, "valid", 0.4), (2, "valid", 0.2)]
    records = [{"eval/loss": 1.0, "eval/acc": a, "epoch": e, "stage": e, "data": data} for e, data, a in lines]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, records)))
    curves = read_curves(tmp_path)
    assert curves.accuracies == [(2, 0.2), (4, 0.4), (8, 0.7)]
    figure = make_figure([curves])
    assert figure.axes[1].get_xlim() == (1.5, 8.5) and stage_texts(figure) == []


def test_files_between_the_runs_of_a_pattern_are_skipped(tmp_path, monkeypatch, capsys):
    """`python -m scripts.plot runs/demo/seed_0/*` also names table.txt and demo.png."""
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        logged(tmp_path / name, [0, 1])
    (tmp_path / "table.txt").write_text("a table")
    (tmp_path / "demo.png").write_bytes(b"\x89PNG")
    (tmp_path / "empty").mkdir()
    (tmp_path / "log.jsonl").write_bytes((tmp_path / "a" / "metrics.jsonl").read_bytes())
    drawn = []
    monkeypatch.setattr("scripts.plot.draw", lambda runs, path: drawn.extend(run.name for run in runs))
    assert main(["a", "b", "demo.png", "empty", "log.jsonl", "table.txt"]) == 0
    printed = capsys.readouterr()
    assert drawn == ["a", "b", tmp_path.name] and printed.out == "comparison.png\n"
    assert printed.err == "warning: no run's directory, left out: demo.png, empty, table.txt\n"
    (tmp_path / "a" / "predictions_1.jsonl").write_text('{"index": 0}\n')
    assert main(["a/metrics.jsonl", "a/predictions_1.jsonl"]) == 0  # a/* names both
    assert main(["a", "nowhere"]) == 2
    assert main(["a", "table.txt"]) == 0
    assert main(["table.txt"]) == 2


def test_narrow_stages_show_only_numbers_and_only_if_they_fit(tmp_path):
    """Fifty epochs with six short stages; the numbers of sixty stages would overlap."""
    run = logged(tmp_path / "narrow", [*range(6), *[6] * 44])
    assert stage_texts(make_figure([read_curves(run)])) == ["stage", *map(str, range(7))]
    many = logged(tmp_path / "many", range(60))
    assert stage_texts(make_figure([read_curves(many)])) == ["stage", *map(str, range(10))]


def test_stages_are_marked_only_where_the_runs_agree_on_them(tmp_path):
    """An unfinished run and a run without stages agree with the others."""
    whole, part, flat, other = (
        read_curves(logged(tmp_path / name, stages))
        for name, stages in {"whole": [0, 0, 1, 2], "part": [0, 0, 1], "flat": [0] * 4, "other": [0, 1, 1, 2]}.items()
    )
    assert stage_texts(make_figure([part, whole, flat])) == ["stage 0", "stage 1", "stage 2"]
    assert stage_texts(make_figure([whole, other])) == []


def test_the_legend_tells_the_runs_apart_and_covers_nothing(tmp_path, monkeypatch):
    """Names are shown literally, equal names as paths, and the legend is below the panels."""
    monkeypatch.chdir(tmp_path)
    for name in ("a/coconut", "b/coconut", "_$x_$y"):
        logged(tmp_path / name, [0, 1])
    seen = []
    monkeypatch.setattr("scripts.plot.draw", lambda runs, path: seen.append(make_figure(runs)))
    assert main(["a/coconut", "b/coconut/metrics.jsonl", "_$x_$y"]) == 0
    figure = seen[0]
    figure.draw_without_rendering()
    names = [text.get_text().strip().replace(r"\$", "$") for text in figure.legends[0].get_texts()]
    assert names == ["a/coconut", "b/coconut/metrics.jsonl", "_$x_$y"]
    legend = figure.legends[0].get_window_extent()
    assert not any(legend.overlaps(axes.get_tightbbox()) for axes in figure.axes)
    assert figure.bbox.x0 <= legend.x0 and legend.x1 <= figure.bbox.x1


BAD = {
    "nothing": "is nothing a run's directory?",
    "empty": "holds no losses yet",
    "run -o picture.gif": "expected a name that ends in .png, .pdf, .svg",
    "run -o absent/picture.png": "absent/picture.png: cannot write it (No such file or directory)",
}


@pytest.mark.parametrize("words", BAD)
def test_bad_input_is_one_line(words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    logged(tmp_path / "run", [0])
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "metrics.jsonl").write_text('{"half a li')
    assert main(words.split()) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ") and message.count("\n") == 1
    assert BAD[words] in message


@pytest.mark.parametrize(
    "rc", [b"text.usetex: True\nfont.family: Nowhere\nbackend: TkAgg\n", b"\xff\xfe broken \x00\n"]
)
@pytest.mark.parametrize("backend", ["module://matplotlib_inline.backend_inline", "TkAgg", "no such backend"])
def test_neither_the_users_backend_nor_the_users_rc_is_used(tmp_path, backend, rc):
    """A notebook's variable, a display that is not there, LaTeX, missing fonts, a file that is no text."""
    run = logged(tmp_path / "run", [0, 0, 1])
    (tmp_path / "matplotlibrc").write_bytes(rc)
    variables = {"MPLBACKEND": backend, "MATPLOTLIBRC": str(tmp_path / "matplotlibrc"), "MPLCONFIGDIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-m", "scripts.plot", str(run)], cwd=ROOT, env=os.environ | variables, capture_output=True,
        text=True, timeout=60, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert (run / "curves.png").read_bytes()[:4] == b"\x89PNG"


def test_a_matplotlibrc_in_the_current_folder_is_not_used(tmp_path):
    """It comes before the one that a variable names."""
    run = logged(tmp_path / "run", [0, 0, 1])
    (tmp_path / "matplotlibrc").write_text("text.usetex: True\nfont.family: Nowhere\nbackend: TkAgg\nsavefig.dpi: 1\n")
    done = subprocess.run(
        [sys.executable, "-m", "scripts.plot", str(run)], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")


def test_whatever_drawing_raises_costs_one_warning(tmp_path, monkeypatch, capsys):
    run = logged(tmp_path / "run", [0, 0, 1])
    monkeypatch.setattr(curves, "_warned", False)
    monkeypatch.setattr(curves, "make_figure", lambda *_: {}["font"])
    for _ in range(3):
        curves.keep_curves(run)
    assert capsys.readouterr().err == (
        f"warning: curves.png is not drawn: {run}/curves.png: matplotlib cannot draw it (KeyError('font'))\n"
    )
    assert not list(run.glob("*.png")) and not list(run.glob(".*"))
