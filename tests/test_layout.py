"""Imports point one way: scripts, then modules of the package, then formats, storage and cli."""

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

from conftest import ROOT

BASE = {"cli": set(), "records": set(), "compression": {"cli"}, "storage": {"cli", "compression"}}
BASE |= {"text_lines": {"cli", "compression", "storage"}}
BASE |= {"ir_dataset": {"cli"}, "line_parsers": {"records"}}
BASE |= {"trec_topics": {"cli", "text_lines"}}
BASE |= {"formats": {"cli", "compression", "ir_dataset", "line_parsers", "records", "storage", "text_lines",
                     "trec_topics"}}  # fmt: skip


def imports(path: Path) -> Iterator[str]:
    """Yield the modules that a file imports, inside functions too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_imports_point_one_way() -> None:
    modules = {".".join(path.relative_to(ROOT / "inpars_lib").with_suffix("").parts): path
               for path in (ROOT / "inpars_lib").rglob("*.py")}  # fmt: skip
    inside = {name: {found.removeprefix("inpars_lib.") for found in imports(path)} & modules.keys()
              for name, path in modules.items()}  # fmt: skip
    list(TopologicalSorter(inside).static_order())  # raises CycleError
    assert all(inside[name] <= allowed for name, allowed in BASE.items())
    scripts = {path.stem for path in ROOT.glob("*.py")}
    assert len(scripts) == 5
    for folder in (".", "inpars_lib", "inpars_lib/llm", "tests", "benchmarks", "demo"):
        for path in (ROOT / folder).glob("*.py"):
            assert not scripts & set(imports(path)), path
    assert not [name for name, path in modules.items() if "Namespace" in path.read_text()]
