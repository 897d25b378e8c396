"""The house stays as it is: who may import whom. A drawing of these rules has no circle and no arrow that points up."""

from __future__ import annotations

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

PACKAGE = "sb3_ppo_from_scratch"
ROOT = Path(__file__).parent.parent / PACKAGE

# From the ground up. A file may import what lies below it; files on one floor do not know each other.
FLOORS: list[set[str]] = [
    {"errors", "advantages", "losses", "distributions", "policies", "hyperparams"},
    {"checks.arguments"},
    {"buffer"},
    {"checks.finite", "checks.answers", "safe_files", "recurrent"},
    {"update", "vec_env", "checks.hyperparameters"},
    {"distributed"},
    {"engines", "checkpoint"},
    {"rollout", "evaluation"},
    {"ppo"},
    {"__init__"},
    {"zoo"},
    {"train"},
]
TOP = {"__init__", "train", *(name for floor in FLOORS for name in floor if "." not in name)}


@cache
def imports() -> dict[str, set[str]]:
    """By module, what it imports of the package, imports for types and within functions included."""
    found = {}
    for path in sorted(ROOT.rglob("*.py")):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        found[name] = {target for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) for target in targets(node)}
    return found


def targets(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module is not None:
        is_package = (ROOT.parent / Path(*node.module.split("."))).is_dir()
        names = [f"{node.module}.{alias.name}" if is_package else node.module for alias in node.names]
    else:
        return []
    inside = [name.removeprefix(PACKAGE).lstrip(".") for name in names if name.split(".")[0] == PACKAGE]
    return [module_of(name) for name in inside]


def module_of(name: str) -> str:
    """A name imported from a package may be a module of it, or something that its ``__init__`` has."""
    path = ROOT / Path(*name.split("."))
    if name and (path.is_dir() or path.with_suffix(".py").is_file()):
        return name
    return name.rpartition(".")[0] or "__init__"


def floor_of(module: str) -> int:
    for index, floor in enumerate(FLOORS):
        if any(module == name or module.startswith(name + ".") for name in floor):
            return index
    raise AssertionError(f"{module} has no floor: say in FLOORS where it belongs")


def room_of(module: str) -> str:
    return next(name for name in FLOORS[floor_of(module)] if module == name or module.startswith(name + "."))


@pytest.mark.parametrize("module", sorted(imports()))
def test_nothing_imports_upwards(module: str) -> None:
    for target in imports()[module]:
        if module != "checks" and room_of(module) != room_of(target):
            assert floor_of(target) < floor_of(module), f"{module} imports {target}, which does not lie below it"


def test_there_is_no_circle() -> None:
    """Among all modules, those of one folder included."""
    graph, done = imports(), set[str]()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, f"a circle: {' -> '.join((*path, module))}"
        if module not in done:
            for target in graph.get(module, ()):
                if target != module:
                    visit(target, (*path, module))
            done.add(module)

    for module in graph:
        visit(module, ())


def test_the_top_shows_ppo_and_nothing_else() -> None:
    names = {path.stem for path in ROOT.glob("*.py")}
    assert names <= {name.split(".")[0] for name in TOP}
    assert len(names) <= 12


@pytest.mark.parametrize("engine", ["compiled", "numpy_mlp", "channels_last", "lstm", "cudagraph"])
def test_the_package_needs_no_engine_but_the_reference(engine: str) -> None:
    """Nothing outside ``engines/`` names one; within, only the choice does, and an engine that builds on another."""
    users = {module for module, found in imports().items() for target in found if target.startswith(f"engines.{engine}")}
    outside = {module for module in users if not module.startswith(f"engines.{engine}")} - {"engines"}
    builds_on = {
        "channels_last": {"engines.cudagraph.engine"},
        "numpy_mlp": {f"engines.compiled.{name}" for name in ("engine", "learning")},
    }
    assert outside <= builds_on.get(engine, set())


def test_an_import_brings_neither_the_zoo_nor_cuda_graphs() -> None:
    names = ("rl_zoo3", "sb3_contrib", "optuna", "envpool")
    code = f"import sys, {PACKAGE}; print([name for name in {names} if name in sys.modules])"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == "[]"
