"""Every command, file name and key of the README is real."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest

from config import FIELDS, REQUIRED, _type_name, load_config

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```bash\n(.*?)^```", README, flags=re.M | re.S)
COMMANDS = sorted({line.strip() for block in BLOCKS for line in block.splitlines() if line.strip()})
INLINE = sorted(set(re.findall(r"(?<!`)`([^`\n]+)`(?!`)", README)))
# Names of files that runs, scripts and other programs write, or that stand for the reader's own.
MADE = {"runs", "data", ".venv", "checkpoint_33", "checkpoint_12.pt", "5hop_0shot_random.json"}


def key_row(name: str) -> str:
    """A key's line in the README's table."""
    field = FIELDS[name]
    default = "required" if field.default is REQUIRED else f"`{field.default}`"
    return f"| `{name}` | {_type_name(name)} | {default} | {field.metadata['meaning']} |"


@pytest.mark.parametrize("name", FIELDS)
def test_the_table_of_keys_is_the_declaration(name):
    """Type, default and meaning as `--help` says them."""
    assert key_row(name) in README


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_can_be_run(command):
    """Its program exists and takes these arguments; `make` and bash would run what is there."""
    words = shlex.split(command)
    program = words[0].removeprefix(".venv/bin/")
    if program in ("python", "python3"):
        check_python(words[1:])
    elif program == "bash":
        assert subprocess.run(["bash", "-n", ROOT / words[1]], check=False).returncode == 0
    elif program == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), flags=re.M)
    elif program == "mlx.launch":
        check_python(words[words.index("--") + 2 :])
    else:
        assert program == "source", f"no check for {command!r}"


def check_python(words):
    if words[0] == "-m":
        assert words[1] in ("venv", "pip", "pytest")
        assert all((ROOT / word).is_file() for word in words if word.endswith(".txt"))
        return
    assert (ROOT / words[0]).is_file()
    if words[0] == "run.py" and words[1] != "CONFIG" and words[1].startswith("args/"):
        load_config(str(ROOT / words[1]), [word for word in words[2:] if "=" in word])


@pytest.mark.parametrize(
    "text", [text for text in INLINE if re.fullmatch(r"[\w./-]+\.(py|sh|bash|yaml|md|txt|json|png)", text)]
)
def test_a_named_file_is_in_the_repository(text):
    """Or is one that a run or a script makes."""
    written = {"config.yaml", "metrics.jsonl", "curves.png", "coconut.json", "first_batch.txt"} | MADE
    assert text in written or (ROOT / text).exists(), text


@pytest.mark.parametrize("path", re.findall(r"\]\((?!http|#)([^)]+)\)", README))
def test_a_link_leads_to_a_file(path):
    assert (ROOT / path).is_file()


@pytest.mark.parametrize("anchor", re.findall(r"\]\(#([^)]+)\)", README))
def test_a_link_leads_to_a_heading(anchor):
    headings = re.findall(r"^#+ (.*)$", README, flags=re.M)
    assert anchor in {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}


def test_nothing_is_left_to_fill_in():
    assert not re.search(r"^[A-Z_]{6,}$|TODO", README, flags=re.M)
