"""Every command, file name, link and key of the README and of docs/ is real. (The lab book tells of what once was.)"""

import importlib.util
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from config import FIELDS, REQUIRED, load_config, type_name

ROOT = Path(__file__).resolve().parents[1]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted(set((ROOT / "docs").glob("*.md")) - {ROOT / "docs/LOG.md"}),
]
TEXTS = {page: page.read_text(encoding="utf-8") for page in PAGES}
BLOCKS = [block for text in TEXTS.values() for block in re.findall(r"^```bash\n(.*?)^```", text, flags=re.M | re.S)]
INLINE = sorted({word for text in TEXTS.values() for word in re.findall(r"(?<!`)`([^`\n]+)`(?!`)", text)})
STARTS = ("python ", "bash ", "make ", "mlx.launch ")
COMMANDS = {line.strip() for block in BLOCKS for line in block.splitlines() if line.strip()}
COMMANDS = sorted(COMMANDS | {text for text in INLINE if text.startswith(STARTS) and "PYTHON=..." not in text})
# Names of files that runs, scripts and other programs write, or that stand for the reader's own.
MADE = {"config.yaml", "metrics.jsonl", "curves.png", "coconut.json", "first_batch.txt", "wandb_id.txt", "mine.yaml"}
MADE |= {"checkpoint_12.pt", "5hop_0shot_random.json", "vocab.json", "merges.txt", ".json"}


def key_row(name: str) -> str:
    """A key's line in the table of docs/config.md."""
    field = FIELDS[name]
    default = "required" if field.default is REQUIRED else f"`{field.default}`"
    return f"| `{name}` | {type_name(name)} | {default} | {field.metadata['meaning']} |"


def test_the_table_of_keys_is_the_declaration():
    """Type, default and meaning as `--help` says them."""
    rows = [line for line in TEXTS[ROOT / "docs/config.md"].splitlines() if line.startswith("| `")]
    assert rows == [key_row(name) for name in FIELDS]


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_can_be_run(command):
    """Its program exists and takes these arguments; `make` and bash would run what is there."""
    words = [word for word in shlex.split(command) if not re.fullmatch(r"[A-Z_]+=\S+", word)]
    program = words[0].removeprefix(".venv/bin/")
    if program in ("python", "python3"):
        check_python(words[1:])
    elif program == "bash":
        assert subprocess.run(["bash", "-n", ROOT / words[1]], check=False).returncode == 0
    elif program == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), flags=re.M)
    elif program == "mlx.launch":
        if "--" in words:
            check_python(words[words.index("--") + 2 :])
    else:
        assert program == "source", f"no check for {command!r}"


def check_python(words):
    if words and words[0] == "-m":
        assert words[1] in ("venv", "pip", "pytest") or importlib.util.find_spec(words[1]), words[1]
        assert all((ROOT / word).is_file() for word in words if word.endswith(".txt"))
    elif (words and words[0] != "run.py") or len(words) > 1:
        assert (ROOT / words[0]).is_file(), words[0]
        if words[0] == "run.py" and words[1].startswith("args/") and "NAME" not in words[1]:
            load_config(str(ROOT / words[1]), [word for word in words[2:] if "=" in word])


@pytest.mark.parametrize(
    "text", [text for text in INLINE if re.fullmatch(r"[\w./-]*\.(py|sh|bash|yaml|md|txt|json|png|toml|cff)", text)]
)
def test_a_named_file_is_in_the_repository(text):
    """By its path, or beside the page that names it; or it is one that a run or a script makes."""
    assert text in MADE or (ROOT / text).exists() or (ROOT / "docs" / text).exists(), text


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for path in re.findall(r"\]\((?!http)([^)#]+)(?:#[^)]*)?\)", TEXTS[page]):
        assert (page.parent / path).exists(), path
    headings = {
        re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in re.findall(r"^#+ (.*)$", TEXTS[page], flags=re.M)
    }
    for anchor in re.findall(r"\]\(#([^)]+)\)", TEXTS[page]):
        assert anchor in headings, anchor


def test_readme_is_short_and_nothing_is_left_to_fill_in():
    assert len(TEXTS[ROOT / "README.md"].encode()) <= 8000
    assert not any(re.search(r"^[A-Z_]{6,}$|TODO", text, flags=re.M) for text in TEXTS.values())
