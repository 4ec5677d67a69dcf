"""Rules of the house, checked on the source: the harness knows no head, records need no torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "koala_bench"


def imports_of(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return found


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_the_harness_imports_no_head(path: Path) -> None:
    assert not {name for name in imports_of(path) if name.split(".")[0] == "heads"}


@pytest.mark.parametrize(
    "path", sorted([*PACKAGE.rglob("*.py"), *(PACKAGE.parent / "heads").glob("*.py")]), ids=lambda path: path.name
)
def test_every_file_says_its_subject_in_its_first_line(path: Path) -> None:
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    assert path.name == "__init__.py" or docstring


def test_help_and_tables_come_without_torch() -> None:
    names = (
        "cli",
        "results.tables",
        "results.figures",
        "records.reading",
        "results.making",
        "results.recipes",
        "results.integrity",
        "results.report",
        "records.statistics",
    )
    modules = ", ".join(f"koala_bench.{name}" for name in names)
    code = f"import sys, {modules}; sys.exit(any(name in sys.modules for name in ('torch', 'transformers')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
