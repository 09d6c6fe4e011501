"""`python -m scripts.describe_data FILE`: its report on a small data set, and its error for a bad one."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from scripts import describe_data

ROOT = Path(__file__).parents[1]
ITEMS = [
    {"question": "What?", "steps": ["abc", "de"], "answer": "12"},
    {"question": "What?", "steps": ["abc", "de"], "answer": "12"},
    {"question": "What?", "steps": [], "answer": "13"},
    {"question": "What?", "steps": [], "answer": "13"},
    {"question": "W" * 30, "steps": ["x" * 40, "y", "z"], "answer": "1" * 20},
]


@pytest.fixture
def vocabulary(tmp_path) -> str:
    """A vocabulary with one token per byte, so that lengths can be counted by hand."""
    (tmp_path / "bytes.json").write_text("[]")
    return str(tmp_path / "bytes.json")


@pytest.fixture
def data(tmp_path) -> str:
    (tmp_path / "data.json").write_text(json.dumps(ITEMS))
    return str(tmp_path / "data.json")


@pytest.fixture
def report(data, vocabulary, capsys):
    """The lines printed for ITEMS: report(*options) -> list of lines with single spaces."""

    def call(*options: str, path: str = data) -> list[str]:
        assert describe_data.main([path, "--tokenizer", vocabulary, *options]) == 0
        return [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]

    return call


def test_counts_and_steps(report, data, vocabulary):
    lines = report()
    assert lines[0] == f"{data}: 5 items, vocabulary from {vocabulary}"
    start = lines.index("steps per item (mean 1.40)")
    assert lines[start + 1 : start + 4] == [
        "0 2 40.0% " + "#" * 40,
        "2 2 40.0% " + "#" * 40,
        "3 1 20.0% " + "#" * 20,
    ]


def test_lengths(report):
    """question + newline; steps + newlines; `### ` + answer + end of text; two special tokens."""
    lines = report()
    start = lines.index("tokens mean median 95 % longest")
    longest = [line.split()[-1] for line in lines[start + 1 : start + 5]]
    assert longest == ["31", "45", "25", str(31 + 45 + 25 + 2)]
    assert lines[start + 1].startswith("question 11.0 6 ")
    assert lines[start + 3].startswith("answer 10.6 7 ")
    assert lines[lines.index("longest items") + 1] == f"item 4: 103 tokens: {'W' * 30!r}"


def test_items_are_compared_with_the_models_positions(report):
    assert "model's positions: 1,024: every item fits" in report()
    assert "model's positions: 103: every item fits" in report("--n-positions", "103")
    assert "model's positions: 102: 1 of 5 items are longer, see drop_too_long" in report("--n-positions", "102")


def test_answers_that_do_not_fit(report, data):
    """The longest answer is `### ` and 20 digits, and 45 tokens of steps before it."""

    def counts(*options, **where):
        lines = report(*options, **where)
        start = next(i for i, line in enumerate(lines) if line.startswith("longer than max_new_tokens"))
        return lines[start].split()[3], *(line.split("(")[0].split()[-1] for line in lines[start + 1 : start + 3])

    assert counts() == ("128,", "0", "0")
    assert counts("--max-new-tokens", "69") == ("69,", "0", "0")
    assert counts("--max-new-tokens", "68") == ("68,", "0", "1")
    assert counts("--max-new-tokens", "23") == ("23,", "1", "1")
    gsm = Path(data).with_name("gsm.json")
    gsm.write_bytes(Path(data).read_bytes())
    assert counts(path=str(gsm)) == ("64,", "0", "1")  # run.py's rule


def test_duplicates(report):
    lines = report()
    assert lines[lines.index("duplicates") + 1 :] == [
        "items that equal an earlier one 2",
        "questions that equal an earlier one 3",
        "questions with different answers 1",
    ]


def test_a_mark_inside_a_step(report, tmp_path):
    """Where a generated chain ends: its match can never be true."""
    path = tmp_path / "marks.json"
    path.write_text(json.dumps([ITEMS[0], ITEMS[0] | {"steps": ["No. #1"]}]))
    for file, expected in ((str(path), "items 1 (the first is item 1)"), (None, "items 0")):
        lines = report(path=file) if file else report()
        title = next(i for i, line in enumerate(lines) if line.startswith("`#` in a step"))
        assert lines[title + 1] == expected


def test_bad_data_is_status_2_and_one_message(vocabulary, tmp_path, capsys):
    bad = tmp_path / "bad.json"
    bad.write_text('[{"question": "", "steps": "a"}]')
    assert describe_data.main([str(bad), "--tokenizer", vocabulary]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"error: {bad}: 3 problems in 1 items\n  - item 0: answer is missing")
    assert describe_data.main([str(tmp_path / "none.json")]) == 2
    assert describe_data.main([str(bad), "--tokenizer", "none.json"]) == 2


def test_the_command_line(data, vocabulary):
    def call(*arguments):
        command = [sys.executable, "-m", "scripts.describe_data", *arguments]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)

    done = call(data, "--tokenizer", vocabulary)
    assert done.returncode == 0
    assert "steps per item" in done.stdout
    done = call("--help")
    assert done.returncode == 0
    assert "--max-new-tokens" in done.stdout
    assert call().returncode == 2
