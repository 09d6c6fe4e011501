"""Every command, file name, link and key in the README, CONTRIBUTING.md and docs/ is real.

docs/LOG.md is left out: it describes the past. `python -m tests.test_readme` prints the table of docs/config.md.
"""

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
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", flags=re.M | re.S)
PROSE = {page: FENCE.sub("", text) for page, text in TEXTS.items()}
BLOCKS = [block for text in TEXTS.values() for language, block in FENCE.findall(text) if language == "bash"]
INLINE = {" ".join(code.split()) for text in PROSE.values() for code in re.findall(r"`([^`]+)`", text)}
STARTS = ("python ", "python3 ", "bash ", "make ", "mlx.launch ")
COMMANDS = {line.strip() for block in BLOCKS for line in block.splitlines() if line.strip()}
COMMANDS = sorted(COMMANDS | {code for code in INLINE if code.startswith(STARTS)})
ROOMS = ("models", "text", "training", "parallel", "startup", "analysis", "scripts")
# Names of files that runs, scripts and other programs write, or that stand for the reader's own.
MADE = {"metrics.jsonl", "curves.png", "coconut.json", "first_batch.txt", "wandb_id.txt", "only_eval/", "config.yaml"}
MADE |= {"mine.yaml", "hosts.json", "5hop_0shot_random.json", "vocab.json", "merges.txt", "config.json", ".json"}
MADE |= {"checkpoint_12.pt", "tokenizer.json", "debug/", "predictions_N.jsonl"}


def key_row(name: str) -> str:
    """A key's line in the table of docs/config.md."""
    field = FIELDS[name]
    default = "required" if field.default is REQUIRED else f"`{field.default}`"
    return f"| `{name}` | {type_name(name)} | {default} | {field.metadata['meaning']} |"


def test_the_table_of_keys_is_the_declaration():
    """Type, default and meaning as `--help` prints them."""
    rows = [line for line in TEXTS[ROOT / "docs/config.md"].splitlines() if line.startswith("| `")]
    assert rows == [key_row(name) for name in FIELDS], "`python -m tests.test_readme` prints the table"


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_can_be_run(command):
    """Its program exists and knows these options and targets."""
    words = [word for word in shlex.split(command) if not re.fullmatch(r"[A-Z_]+=\S+", word)]
    program = words[0].removeprefix(".venv/bin/")
    if program in ("python", "python3"):
        check_python(words[1:])
    elif program == "bash":
        assert subprocess.run(["bash", "-n", ROOT / words[1]], check=False).returncode == 0
    elif program == "make":
        for target in words[1:]:
            assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), flags=re.M), target
    elif program == "mlx.launch":
        assert "--" not in words or words[words.index("--") + 1] == "python"
        check_python(words[words.index("--") + 2 :] if "--" in words else [])
    else:
        assert program in ("source", "pre-commit", ".ci/run"), f"no check for {command!r}"


def check_python(words: list[str]) -> None:
    """The script or module exists, its options are in its source, and a configuration of args/ loads."""
    if not words:
        return
    if words[:1] == ["-m"] and words[1] in ("venv", "pip", "pytest"):
        assert all((ROOT / word).is_file() for word in words if word.endswith(".txt"))
        return
    is_module = words[0] == "-m"
    script = Path(importlib.util.find_spec(words[1]).origin) if is_module else ROOT / words[0]
    shared = [script.parent / name for name in ("workload.py", "beside.py")]  # options of several benchmarks, analyses
    source = "".join(file.read_text() for file in (script, *shared) if file.is_file())
    arguments = words[1 + is_module :]
    for option in arguments:
        assert not option.startswith("-") or f'"{option}"' in source, (script, option)
    if script == ROOT / "run.py" and arguments and arguments[0].startswith("args/") and "NAME" not in arguments[0]:
        load_config(str(ROOT / arguments[0]), [word for word in arguments[1:] if "=" in word])


@pytest.mark.parametrize(
    "name",
    sorted(n for n in INLINE if re.fullmatch(r"[\w./-]*(\.(py|sh|bash|yaml|yml|md|txt|json|jsonl|png|toml|cff)|/)", n)),
)
def test_a_named_file_is_in_the_repository(name):
    """By its path from the root, or beside the page that names it; or it is one that a run or a script makes."""
    assert name in MADE or (ROOT / name).exists() or (ROOT / "docs" / name).exists()


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives a page's headings."""
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", page.read_text(encoding="utf-8")), flags=re.M)
    return {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for path, anchor in re.findall(r"\]\((?!http)([^)#]*)#?([^)]*)\)", PROSE[page]):
        target = page.parent / path if path else page
        assert target.exists(), path
        assert not anchor or anchor in anchors(target), f"{path}#{anchor}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_nothing_is_left_open(page):
    """No placeholder, and every piece of code ends."""
    assert not re.search(r"^[A-Z_]{6,}$|TODO", TEXTS[page], flags=re.M)
    assert all(paragraph.count("`") % 2 == 0 for paragraph in PROSE[page].split("\n\n"))


def test_the_tree_shows_every_file():
    """The tree of docs/design.md has a line for each Python file of the root and the rooms; the rest of it exists."""
    tree = FENCE.findall(TEXTS[ROOT / "docs" / "design.md"])[-1][1]
    shown, folder = set(), ""
    for line in tree.splitlines():
        name = line.split()[0]
        folder = "" if not line.startswith(" ") else folder
        assert (ROOT / folder / name).exists(), line
        shown.add(folder + name)
        folder = name if name.endswith("/") else folder
    files = [*ROOT.glob("*.py"), *(file for room in ROOMS for file in (ROOT / room).glob("[a-z]*.py"))]
    assert {str(file.relative_to(ROOT)) for file in files} - shown == set()


def test_readme_is_short():
    assert len(TEXTS[ROOT / "README.md"].encode()) <= 8000


if __name__ == "__main__":
    print("\n".join(["| key | type | default | meaning |", "|---|---|---|---|", *map(key_row, FIELDS)]))
