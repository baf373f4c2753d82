"""Imports go down only: discovla is a house with floors, and this file holds them."""

import ast
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LOW = {  # room -> the rooms it may import beside itself
    "batch": set(),
    "torchvision_cpu": set(),
    "ops": {"batch"},
    "nn": {"ops"},
    "towers": {"nn", "ops"},
    "methods": {"towers", "nn", "ops", "batch"},
    "retrieval": {"methods", "ops", "batch"},
    "data": {"batch"},
    "drawn_world": {"data"},
    "engine": {"batch", "ops"},
}
HIGH = {
    "config": 6,
    "drawn_world": 6,
    "errors": 6,
    "evaluate": 7,
    "checkpoints": 7,
    "load": 7,
    "export": 8,
    "splits": 7,
    "train_step": 6,
    "trainer": 8,
    "commands": 9,
    "cli": 10,
    "__main__": 11,
    "testing": 9,
}  # these may import whatever is lower
FOREIGN = {  # file -> the libraries it imports, besides discovla and the standard library
    "batch.py": {"torch"},
    "retrieval/metrics.py": {"numpy"},
    "retrieval/ranks.py": {"numpy"},
    "retrieval/rerank.py": {"numpy"},
}
FILES = {str(p.relative_to(ROOT / "discovla")): p for p in sorted((ROOT / "discovla").rglob("*.py"))}
SHARED = {"base", "config", "released"}  # files of methods/ that every method may import
METHODS = [name for name in FILES if name.startswith("methods/") and name != "methods/__init__.py"]


def imports(path: Path) -> set[str]:
    """Dotted names of everything `path` imports, wherever in the file the import stands."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def allowed(room: str, other: str) -> bool:
    """Whether a file in `room` may import from `other`."""
    if other in {room, "torchvision_cpu", "__version__"}:
        return True
    if room in LOW:
        return other in LOW[room]
    return HIGH[room] > HIGH.get(other, 0) or (room, other) == ("commands", "testing")


@pytest.mark.parametrize("name", [name for name in FILES if name != "__init__.py"])
def test_imports_go_down_only(name):
    room = Path(name).with_suffix("").parts[0]
    assert room in LOW or room in HIGH, f"{name}: give this room a floor here"
    for imported in imports(FILES[name]):
        top, *rest = imported.split(".")
        assert top not in {"tests", "benchmarks"}, f"{name} imports {imported}"
        assert top != "discovla_kernels" or room == "ops", f"{name} imports {imported}: only ops/ does"
        assert top != "discovla" or allowed(room, rest[0]), f"{name} may not import {imported}"


@pytest.mark.parametrize("name", METHODS)
def test_one_method_never_imports_another(name):
    siblings = {i.split(".")[2] for i in imports(FILES[name]) if i.startswith("discovla.methods.")}
    assert siblings <= SHARED, siblings


def modules() -> dict[str, set[str]]:
    """Every module of discovla with the modules of discovla it imports."""
    names = {
        f"discovla.{name.removesuffix('.py').replace('/', '.')}".removesuffix(".__init__") for name in FILES
    }

    def module_of(imported: str) -> str | None:
        """Return the module that holds an imported name."""
        return next((name for name in (imported, imported.rpartition(".")[0]) if name in names), None)

    graph = {}
    for file, path in FILES.items():
        name = f"discovla.{file.removesuffix('.py').replace('/', '.')}".removesuffix(".__init__")
        graph[name] = {module for one in imports(path) if (module := module_of(one)) and module != name}
    return graph


def test_imports_have_no_cycle():
    graph = modules()
    try:
        tuple(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


@pytest.mark.parametrize("name", FOREIGN)
def test_the_lowest_files_import_one_library(name):
    tops = {imported.split(".")[0] for imported in imports(FILES[name])}
    assert tops - set(sys.stdlib_module_names) - {"discovla"} == FOREIGN[name]
