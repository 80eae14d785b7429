"""Imports point one way: scripts, then modules of the package, then formats, files and cli."""

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

from conftest import ROOT

PACKAGE = ROOT / "inpars_lib"


def imports(path: Path) -> Iterator[str]:
    """Yield the modules that a file imports, inside functions too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_imports_point_one_way() -> None:
    modules = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in PACKAGE.rglob("*.py")}
    inside = {name: set(imports(path)) & modules.keys() for name, path in modules.items()}
    list(TopologicalSorter(inside).static_order())  # raises CycleError
    assert not inside["inpars_lib.cli"]
    assert inside["inpars_lib.files"] <= {"inpars_lib.cli"}
    for name in modules:
        if name.startswith("inpars_lib.formats."):
            outside = {found for found in inside[name] if not found.startswith("inpars_lib.formats")}
            assert outside <= {"inpars_lib.cli", "inpars_lib.files"}, name
    scripts = {path.stem for path in ROOT.glob("*.py")}
    assert len(scripts) == 5
    folders = [path for path in PACKAGE.rglob("*") if path.is_dir()]
    for folder in (ROOT, PACKAGE, *folders, ROOT / "tests", ROOT / "benchmarks", ROOT / "demo"):
        for path in folder.glob("*.py"):
            assert not scripts & set(imports(path)), path
    assert not [name for name, path in modules.items() if "Namespace" in path.read_text()]
