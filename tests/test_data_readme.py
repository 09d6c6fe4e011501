"""data/README.md: it lists every data file, with the checksums that the scripts verify or produce."""

import hashlib
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "data" / "README.md"
SUM = re.compile(r"\b(?:[0-9a-f]{64}|[0-9a-f]{40})\b")  # sha256 or git blob id


def rows() -> dict[str, str]:
    """{file name: its row} of all tables."""
    lines = README.read_text(encoding="utf-8").splitlines()
    return {line.split("`")[1]: line for line in lines if line.startswith("| `")}


def pins() -> dict[str, dict[str, str]]:
    """{file name: {kind: value}} of preprocessing/checksums.txt, without the commits."""
    found = {}
    for line in (ROOT / "preprocessing" / "checksums.txt").read_text(encoding="utf-8").splitlines():
        words = line.split("#")[0].split()
        if words and words[1] != "commit":
            found.setdefault(words[0], {})[words[1]] = words[2]
    return found


def commits() -> list[str]:
    text = (ROOT / "preprocessing" / "checksums.txt").read_text(encoding="utf-8")
    return re.findall(r"^\w+ +commit +(\w+)$", text, re.MULTILINE)


@pytest.mark.parametrize("path", sorted((ROOT / "args").glob("*.yaml")), ids=lambda path: path.stem)
def test_it_lists_every_file_that_a_configuration_names(path):
    text = path.read_text(encoding="utf-8")
    named = set(re.findall(r"\bdata/([\w.]+)", text))
    assert (named or "val_path: pretrained/" in text) and named <= set(rows())


@pytest.mark.parametrize("name", sorted(pins()))
def test_its_figures_are_those_of_the_checksum_file(name):
    values = dict(pins()[name])
    row = rows()[name]
    assert f"{int(values.pop('items', 0)):,}" in row
    assert sorted(SUM.findall(row)) == sorted(values.values())


def test_it_names_the_pinned_commits():
    text = README.read_text(encoding="utf-8")
    assert len(commits()) == 3 and all(commit in text for commit in commits())


@pytest.mark.parametrize(("command", "names"), [
    ("graphs.py", [f"graph_{part}.json" for part in (
        "train", "valid", "test", "chains_train", "chains_valid", "vocabulary")]),
    ("prosqa.py --train 0", ["prosqa_generated_valid.json", "prosqa_generated_test.json"]),
])  # fmt: skip
def test_its_sums_of_generated_files_are_what_the_commands_write(tmp_path, command, names):
    """The validation and test sets of prosqa.py do not depend on --train, so the slow training set is left out."""
    script, *options = command.split()
    subprocess.run(
        [sys.executable, ROOT / "preprocessing" / script, *options], cwd=tmp_path, check=True, capture_output=True
    )
    for name in names:
        content = (tmp_path / "data" / name).read_bytes()
        assert SUM.findall(rows()[name]) == [hashlib.sha256(content).hexdigest()]
        assert f"| {len(content):,} |" in rows()[name]


def test_its_commands_exist():
    text = README.read_text(encoding="utf-8")
    scripts = set(re.findall(r"(?:bash|python) (preprocessing/\S+?)[\s`]", text))
    assert {Path(script).suffix for script in scripts} == {".bash", ".py"}
    assert all((ROOT / script).is_file() for script in scripts)


@pytest.mark.skipif(not shutil.which("git"), reason="git is not installed")
def test_git_keeps_the_readme_and_ignores_the_data(tmp_path):
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    shutil.copyfile(ROOT / ".gitignore", tmp_path / ".gitignore")
    (tmp_path / "data").mkdir()
    for name in ("README.md", "gsm_train.json", "prosqa_generated_README.md", ".gsm_train.txt.part"):
        (tmp_path / "data" / name).write_text("")
    status = ["git", "status", "--porcelain", "--untracked-files=all", "data"]
    shown = subprocess.run(status, cwd=tmp_path, check=True, capture_output=True, text=True).stdout
    assert shown.split() == ["??", "data/README.md"]
