"""The house rules that a reader relies on: who may import whom, and what comes first."""

import ast
import sys
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MODULES = {path.stem: path for path in sorted(ROOT.glob("*.py"))}
COMMANDS = {"run", "export", "describe", "demo"}
UPPER = {"plan", "plot"}  # run.py's own helpers, which may use the middle; plot is a command too
MIDDLE = {"train", "evaluation", "dataset", "checkpoint", "weights", "metrics"}
BOTTOM = {
    "stopping",
    "coconut",
    "gpt2",
    "config",
    "tokenizer",
    "examples",
    "utils",
    "cpu_blas",
    "token_data",
    "token_cache",
    "loss",
    "streams",
    "processes",
}


@cache
def imports(path: Path) -> list[str]:
    """Names of all modules a file imports, in order, also inside functions; `a.b` counts as `a`."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found.append((node.lineno, node.module or ""))
    return [name.split(".")[0] for _, name in sorted(found)]


def ours(module: str) -> set[str]:
    return set(imports(MODULES[module])) & set(MODULES)


def test_every_module_has_its_place():
    """A new module must be put into one of the storeys above."""
    assert set(MODULES) - COMMANDS == UPPER | MIDDLE | BOTTOM


def test_upper_modules_are_used_by_run_and_the_demo_alone():
    assert all(ours(module) <= MIDDLE | BOTTOM for module in UPPER)
    assert not [module for module in set(MODULES) - {"run", "demo"} if ours(module) & UPPER]


@pytest.mark.parametrize("module", sorted(MIDDLE))
def test_middle_modules_do_not_import_each_other(module):
    assert ours(module) <= BOTTOM


@pytest.mark.parametrize("module", sorted(BOTTOM))
def test_bottom_modules_import_only_the_bottom(module):
    assert ours(module) <= BOTTOM


def test_the_bottom_has_no_cycles_and_stands_on_leaves():
    order = list(TopologicalSorter({module: ours(module) for module in BOTTOM}).static_order())
    assert set(order) == BOTTOM
    assert ours("utils") == {"stopping"}
    assert not ours("stopping") | ours("cpu_blas"), "leaves import nothing of ours"


def test_nothing_imports_a_command_but_the_demo_and_its_benchmark():
    """demo.py trains through run.py, demo_seeds.py reads what the demo has trained."""
    folders = ("preprocessing", "benchmarks")
    files = [*MODULES.values(), *(file for folder in folders for file in (ROOT / folder).rglob("*.py"))]
    found = {(file.name, name) for file in files for name in imports(file) if name in COMMANDS}
    assert found == {("demo.py", "run"), ("demo_seeds.py", "demo")}


@pytest.mark.parametrize("command", sorted(COMMANDS | {"plot"}))
def test_a_command_first_of_all_sees_to_ctrl_c(command):
    """Before the slow imports; the scripts in preprocessing/ leave it to datafiles.py, which they import first."""
    assert imports(MODULES[command])[0] == "stopping"
    assert "    stopping.at_once()" in MODULES[command].read_text(encoding="utf-8")
    for script in ROOT.glob("preprocessing/*.py"):
        assert script.stem == "datafiles" or imports(script)[0] == "datafiles", script


def test_cpu_blas_comes_before_mlx():
    """A module that imports mlx imports cpu_blas (or one of ours that does) first, else MLX keeps its slow BLAS."""

    def brings_it(name: str) -> bool:
        return name == "cpu_blas" or (name in MODULES and "mlx" in imports(MODULES[name]))

    for path in [*MODULES.values(), *ROOT.glob("benchmarks/**/*.py"), *ROOT.glob("preprocessing/**/*.py")]:
        names = imports(path)
        if "mlx" in names:
            assert any(brings_it(name) for name in names[: names.index("mlx")]), path
    assert sum("mlx" in imports(path) for path in MODULES.values()) >= 5


def test_module_names_shadow_no_installed_package():
    shadowed = {"mlx", "numpy", "tiktoken", "tqdm", "yaml", "torch", "transformers", "datasets", "evaluate", "wandb"}
    assert not set(MODULES) & (shadowed | set(sys.stdlib_module_names))
