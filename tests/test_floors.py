"""Imports go down only: every package has a floor and imports only lower ones."""

import ast
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LOW = {  # package -> the packages it may import besides itself
    "batch": set(),
    "tensor_files": set(),
    "torchvision_cpu": set(),
    "foreign": set(),
    "terminal": set(),
    "cpu": set(),
    "ops": {"batch"},
    "nn": {"ops"},
    "towers": {"nn", "ops", "tensor_files"},
    "methods": {"towers", "nn", "ops", "batch"},
    "retrieval": {"methods", "ops", "batch", "files", "tensor_files"},
    "files": set(),
    "lock": {"files"},
    "data": {"batch", "files", "lock"},
    "drawn_world": {"data", "files"},
    "engine": {"batch", "files", "ops", "tensor_files"},
}
HIGH = {
    "candidates": 6,
    "config": 6,
    "drawn_world": 6,
    "errors": 6,
    "inputs": 6,
    "peft_format": 6,
    "train_step": 6,
    "card": 7,
    "checkpoints": 7,
    "evaluate": 7,
    "features": 7,
    "model": 7,
    "processes": 7,
    "report": 7,
    "tune": 7,
    "corpus": 8,
    "export": 8,
    "mteb_encoder": 8,
    "order": 8,
    "search": 8,
    "trainer": 8,
    "commands": 9,
    "testing": 9,
    "cli": 10,
    "__main__": 11,
}  # each imports anything lower; drawn_world is imported from above 6 only
FOREIGN = {  # file -> the libraries it imports, besides discovla and the standard library
    "batch.py": {"torch"},
    "retrieval/metrics.py": {"numpy"},
    "retrieval/ranks.py": {"numpy"},
    "retrieval/record.py": {"numpy"},
    "retrieval/rerank.py": {"numpy"},
}
FILES = {str(p.relative_to(ROOT / "discovla")): p for p in sorted((ROOT / "discovla").rglob("*.py"))}
SHARED = {"base", "config", "released"}  # files of methods/ that every method may import
METHODS = [name for name in FILES if name.startswith("methods/") and name != "methods/__init__.py"]


def imports(path: Path, *, in_functions: bool = True) -> set[str]:
    """Return the dotted names of everything `path` imports."""
    names, tree = set(), ast.parse(path.read_text())
    for node in ast.walk(tree) if in_functions else tree.body:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def module_name(name: str) -> str:
    """Return the dotted name of a file."""
    return ".".join(["discovla", *Path(name).with_suffix("").parts]).removesuffix(".__init__")


def allowed(package: str, other: str) -> bool:
    """Return True if a file in `package` may import from `other`."""
    if other in {package, "torchvision_cpu", "foreign", "terminal", "cpu", "__version__"}:
        return True
    if package in LOW:
        return other in LOW[package]
    return HIGH[package] > HIGH.get(other, 0) or (package, other) == ("commands", "testing")


@pytest.mark.parametrize("name", [name for name in FILES if name != "__init__.py"])
def test_imports_go_down_only(name):
    package = Path(name).with_suffix("").parts[0]
    assert package in LOW or package in HIGH, f"{name}: give this package a floor here"
    for imported in imports(FILES[name]):
        top, *rest = imported.split(".")
        assert top not in {"tests", "benchmarks"}, f"{name} imports {imported}"
        assert top != "discovla_kernels" or package == "ops", f"{name} imports {imported}: only ops/ does"
        assert top != "discovla" or allowed(package, rest[0]), f"{name} may not import {imported}"


def test_no_module_imports_itself_through_others():
    modules = {module_name(name): imports(path, in_functions=False) for name, path in FILES.items()}
    below = {
        module: {other for other in modules if any(f"{i}.".startswith(f"{other}.") for i in names)}
        for module, names in modules.items()
    }
    packages = {module_name(name) for name in FILES if name.endswith("__init__.py")}
    waiting = {module: others - packages - {module} for module, others in below.items()}
    while free := [module for module, others in waiting.items() if not others]:
        for module in free:
            del waiting[module]
        for others in waiting.values():
            others.difference_update(free)
    assert not waiting, f"circles among {sorted(waiting)}"


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
