"""The rules that a reader relies on: which room may import which, what comes first, and how large things are."""

import ast
import statistics
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# From the top floor down: a room imports from the floors below it and from itself.
FLOORS = [
    {"scripts", "benchmarks"},
    {"analysis"},
    {"run"},
    {"training"},
    {"dataset"},
    {"coconut"},
    {"models"},
    {"parallel", "config", "text"},
    {"utils"},
    {"startup", "methods"},
]
# The same inside training/.
TRAINING = [
    {"trainer", "dry_run"},
    {"setup"},
    {"resume", "memory"},
    {"checkpoint", "step", "evaluation", "metrics", "curves"},
]
FOLDERS = ("models", "text", "training", "parallel", "startup", "analysis", "scripts", "benchmarks", "preprocessing")
FILES = sorted([*ROOT.glob("*.py"), *(file for folder in FOLDERS for file in (ROOT / folder).glob("*.py"))])
# Of analysis/; its other files are commands.
LIBRARIES = {
    "beside", "graphs", "classes", "probing", "changes", "conditions", "recording", "intervals", "pictures",
    "recorded", "page",
}  # fmt: skip
COMMANDS = [
    ROOT / "run.py",
    *(path for folder in ("scripts", "analysis") for path in (ROOT / folder).glob("[a-z]*.py")),
]
COMMANDS = sorted(path for path in COMMANDS if path.stem not in LIBRARIES)


@cache
def imports(path: Path) -> list[str]:
    """Dotted names of all modules a file imports, in order, also inside functions; `from a import b` gives a.b."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found += [(node.lineno, f"{node.module}.{alias.name}") for alias in node.names]
    return [name for _, name in sorted(found, key=lambda pair: pair[0])]


def room(path: Path) -> str:
    return path.stem if path.parent == ROOT else path.parent.name


def floor(name: str, floors: list[set[str]]) -> int:
    return next((number for number, names in enumerate(floors) if name in names), -1)


def test_every_file_has_its_room():
    """A new folder or root file must be put on a floor above; the root keeps at most eight files."""
    assert {room(path) for path in FILES} - {"preprocessing"} == set().union(*FLOORS)
    assert len(list(ROOT.glob("*.py"))) <= 8
    assert {path.stem for path in (ROOT / "training").glob("[a-z]*.py")} == set().union(*TRAINING)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_one_way(path):
    own = floor(room(path), FLOORS)
    for name in imports(path):
        other = name.split(".")[0]
        if other == room(path) or floor(other, FLOORS) < 0 or room(path) == "preprocessing":
            continue
        assert floor(other, FLOORS) > own, f"{path} imports {name}"


@pytest.mark.parametrize("path", sorted((ROOT / "training").glob("[a-z]*.py")), ids=lambda path: path.stem)
def test_inside_training_imports_go_one_way(path):
    for name in imports(path):
        first, _, module = name.partition(".")
        module = module.split(".")[0]
        if first == "training":
            assert floor(module, TRAINING) > floor(path.stem, TRAINING), f"{path} imports {name}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_startup_belongs_to_entry_points(path):
    """Libraries do not import it for its effect (utils asks signals whether to be silent) and set no variable."""
    found = {name for name in imports(path) if name.startswith("startup")}
    if room(path) in ("models", "text", "training", "parallel", "coconut", "dataset", "config", "methods"):
        assert not found
    if room(path) != "startup":
        text = path.read_text(encoding="utf-8")
        assert "os.environ[" not in text.replace("os.environ[name]", "") and "environ.setdefault" not in text


@pytest.mark.parametrize("path", COMMANDS, ids=lambda path: path.stem)
def test_a_command_first_of_all_sees_to_ctrl_c(path):
    """Before the slow imports; the scripts in preprocessing/ leave it to datafiles.py."""
    assert imports(path)[0].startswith("startup.") and "startup.signals" in imports(path)[:2]
    assert "    signals.at_once()" in path.read_text(encoding="utf-8")
    for script in ROOT.glob("preprocessing/*.py"):
        first = next(name for name in imports(script) if name not in ("os", "sys"))
        assert script.stem == "datafiles" or first.startswith("datafiles"), script


def test_module_names_shadow_no_installed_package():
    names = {path.stem for path in ROOT.glob("*.py")} | set(FOLDERS)
    shadowed = {"mlx", "numpy", "tiktoken", "tqdm", "yaml", "torch", "transformers", "datasets", "evaluate", "wandb"}
    assert not names & (shadowed | set(sys.stdlib_module_names))


def functions() -> list[tuple[str, ast.FunctionDef]]:
    trees = ((path, ast.parse(path.read_text(encoding="utf-8"))) for path in FILES)
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    return [
        (f"{path.name}:{node.name}", node) for path, tree in trees for node in ast.walk(tree) if isinstance(node, kinds)
    ]


def test_functions_are_short():
    lengths = sorted(node.end_lineno - node.lineno + 1 for _, node in functions())
    assert statistics.median(lengths) <= 8
    assert lengths[len(lengths) * 9 // 10] <= 20
    assert lengths[-1] <= 50


def test_no_function_takes_more_than_six_arguments():
    """`self` is not counted."""
    for name, node in functions():
        arguments = [a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs) if a.arg != "self"]
        assert len(arguments) <= 6, (name, arguments)


def test_run_reads_like_the_experiment():
    assert (ROOT / "run.py").read_text(encoding="utf-8").count("\n") <= 160
