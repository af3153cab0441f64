"""The floors of the package: imports go downward, without cycles, and private torch names stay in one package."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = {"mstc": "mstc", "passes": "mstc.passes", "kernels": "mstc.kernels"}
MOST_LINES = 600

# A module's floor is that of the longest name here that it lies under. `mstc` itself is no
# floor: it only loads names from the others when they are used.
FLOORS = {
    "mstc.errors": 0,
    "mstc.options": 0,
    "mstc.report": 0,
    "mstc.compat": 0,
    "mstc.graph": 1,
    "mstc.ops": 1,
    "mstc.kernels": 1,
    "mstc.plan": 2,
    "mstc.passes": 3,
    "mstc.pipeline": 4,
    "mstc.lower": 4,
    "mstc.verify": 4,
    "mstc.assume": 4,
    "mstc.dump": 4,
    "mstc.backend": 5,
    "mstc.wrapper": 5,
    "mstc.cli": 5,
}


def _source_files(folder: str) -> Iterator[Path]:
    """The Python files of one real folder; the links mstc/passes and mstc/kernels are not followed."""
    for path in sorted((ROOT / folder).rglob("*.py")):
        if not any(parent.is_symlink() for parent in path.parents):
            yield path


def _module_name(path: Path, folder: str) -> str:
    parts = path.relative_to(ROOT / folder).with_suffix("").parts
    return ".".join((FOLDERS[folder], *(part for part in parts if part != "__init__")))


MODULES = {_module_name(path, folder): path for folder in FOLDERS for path in _source_files(folder)}
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in MODULES.items()}
LIBRARY = sorted(name for name in MODULES if name != "mstc")


def imports_of(tree: ast.Module) -> set[str]:
    """Every dotted name that the module imports anywhere in it, ``from a import b`` as ``a.b``."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names


def modules_in(names: set[str]) -> set[str]:
    """Which of our modules the imported names are, or lie in."""
    found = set()
    for name in names:
        parts = name.split(".")
        prefixes = (".".join(parts[:n]) for n in range(len(parts), 0, -1))
        found.add(next((prefix for prefix in prefixes if prefix in MODULES), ""))
    return found - {"", "mstc"}


def floor_of(module: str) -> int | None:
    parts = module.split(".")
    prefixes = (".".join(parts[:n]) for n in range(len(parts), 0, -1))
    return next((FLOORS[prefix] for prefix in prefixes if prefix in FLOORS), None)


def private_torch_names(tree: ast.Module) -> set[str]:
    """Private names of torch that the module imports or reaches by attribute; ``torch.ops`` is public."""
    aliases = {"torch": "torch"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            aliases |= {alias.asname: alias.name for alias in node.names if alias.asname}
        elif isinstance(node, ast.ImportFrom):
            aliases |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    reached = (_dotted(node, aliases) for node in ast.walk(tree) if isinstance(node, ast.Attribute))
    return {name for name in {*imports_of(tree), *reached} if _is_private_torch(name)}


def _dotted(node: ast.expr, aliases: dict[str, str]) -> str:
    if isinstance(node, ast.Attribute):
        owner = _dotted(node.value, aliases)
        return f"{owner}.{node.attr}" if owner else ""
    return aliases.get(node.id, "") if isinstance(node, ast.Name) else ""


def _is_private_torch(name: str) -> bool:
    root, *rest = name.split(".")
    private = any(part.startswith("_") and not part.endswith("__") for part in rest)
    return root == "torch" and private and rest[0] != "ops"


@pytest.mark.parametrize("module", LIBRARY)
def test_every_module_has_a_floor_and_imports_downward(module: str) -> None:
    floor = floor_of(module)
    assert floor is not None, f"{module} lies on no floor: give it one in FLOORS"
    above = {name for name in modules_in(imports_of(TREES[module])) if (floor_of(name) or 0) > floor}
    assert not above, f"{module} on floor {floor} imports from above: {sorted(above)}"


def test_no_import_cycles() -> None:
    TopologicalSorter({name: modules_in(imports_of(TREES[name])) - {name} for name in LIBRARY}).prepare()


@pytest.mark.parametrize("module", [name for name in LIBRARY if name.split(".")[:2] != ["mstc", "compat"]])
def test_private_torch_names_stay_in_compat(module: str) -> None:
    assert private_torch_names(TREES[module]) == set()


@pytest.mark.parametrize("folder", [*FOLDERS, "tests", "examples"])
def test_nothing_imports_the_folders_by_their_bare_names(folder: str) -> None:
    for path in _source_files(folder):
        names = imports_of(ast.parse(path.read_text(encoding="utf-8")))
        assert not {name for name in names if name.split(".")[0] in ("passes", "kernels")}, path


@pytest.mark.parametrize("folder", [*FOLDERS, "tests", "examples"])
def test_files_are_short(folder: str) -> None:
    lines = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in _source_files(folder)}
    assert not {str(path): count for path, count in lines.items() if count > MOST_LINES}


def test_the_checks_see_what_they_should() -> None:
    tree = ast.parse(
        "import torch, torch.fx as fx\nfrom torch import _C\nfrom torch.fx import Node\n"
        "def f():\n    import torch._dynamo.config\n"
        "    return fx._symbolic_trace, torch.ops._x.y, Node._args, fx.__name__"
    )
    assert private_torch_names(tree) == {
        "torch._C",
        "torch._dynamo.config",
        "torch.fx._symbolic_trace",
        "torch.fx.Node._args",
    }
    assert modules_in({"mstc.options.Options", "mstc.options", "mstc.nothing", "torch"}) == {"mstc.options"}
    assert [floor_of(name) for name in ("mstc.cli.bench.job", "mstc.graph", "mstc.other")] == [5, 1, None]
