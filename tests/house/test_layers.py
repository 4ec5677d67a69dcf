"""Rules of the house, checked on the source: who may import whom, how large a folder is, what must be installed."""

from __future__ import annotations

import ast
import importlib.metadata
import re
import subprocess
import sys
import tomllib
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "koala_bench"
FILES = sorted([*PACKAGE.rglob("*.py"), *(ROOT / "heads").rglob("*.py")])
LARGEST_FOLDER = 14
TESTS = sorted({path.parent for path in (ROOT / "tests").rglob("test_*.py")})
OF_NO_ROOM = ("house", "packaging")  # tests of the rules of the source, and of what is installed
# Rooms from the lowest floor up: each may import from those before it.
ROOMS = (
    *(
        "errors",
        "common",
        "records",
        "tree",
        "heads",
        "engine",
        "registry",
        "decoding",
        "testing",
        "presets",
        "dialogues",
    ),
    *("trees", "training", "evaluation", "contract", "interop", "results", "costs", "planning", "gate", "parity"),
    *("sweeps", "pretraining", "runs", "cli"),
)
FOR_HEADS = ("heads", "tree", "errors", "engine", "decoding", "testing", "common", "training", "registry", "records")


def name_of(path: Path) -> str:
    """Dotted name of the module in a file."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


@cache
def imports_of(path: Path) -> frozenset[str]:
    """Dotted names that a file imports anywhere; of a name imported from a package, the module if it is one."""
    found: set[str] = set()
    modules = {name_of(each) for each in FILES}
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in modules else node.module for name in names}
    return frozenset(found)


def files(folder: str) -> list[Path]:
    return [path for path in FILES if path.is_relative_to(ROOT / folder)]


def short(path: Path) -> str:
    return str(path.relative_to(ROOT))


def rooms_of(path: Path) -> set[str]:
    """The rooms of the harness that a file imports from."""
    parts = [name.split(".") for name in imports_of(path)]
    return {room[1] for room in parts if room[0] == "koala_bench" and len(room) > 1}


# ------------------------------------------------------------------------------ who may import whom


@pytest.mark.parametrize("path", files("koala_bench"), ids=short)
def test_the_harness_imports_no_head(path: Path) -> None:
    assert not {name for name in imports_of(path) if name.split(".")[0] == "heads"}


@pytest.mark.parametrize("path", files("koala_bench"), ids=short)
def test_imports_go_one_way(path: Path) -> None:
    _, own, *_ = (*name_of(path).split("."), "")
    if not own:  # the package itself
        assert not rooms_of(path)
        return
    above = set(ROOMS[ROOMS.index(own) + 1 :])
    assert rooms_of(path) <= set(ROOMS) and not rooms_of(path) & above


def test_every_room_has_its_floor() -> None:
    rooms = {path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in files("koala_bench")}
    assert rooms - {"__init__"} == set(ROOMS)


@pytest.mark.parametrize(
    ("room", "unknown"),
    [
        ("common", set(ROOMS) - {"common", "errors"}),
        ("records", {"results", "evaluation", "engine"}),
        ("engine", {"decoding", "evaluation", "results"}),
        *((room, {"cli"}) for room in ROOMS if room != "cli"),
    ],
)
def test_what_a_room_must_not_know(room: str, unknown: set[str]) -> None:
    inside = [path for path in files("koala_bench") if name_of(path).split(".")[1:2] == [room]]
    assert inside and not {name for path in inside for name in rooms_of(path)} & unknown


@pytest.mark.parametrize("path", files("heads"), ids=short)
def test_heads_import_what_any_head_may(path: Path) -> None:
    assert rooms_of(path) <= set(FOR_HEADS)


def test_no_modules_import_each_other_in_a_circle() -> None:
    names = {name_of(path) for path in FILES}
    graph = {name_of(path): {name for name in imports_of(path) if name in names} - {name_of(path)} for path in FILES}
    TopologicalSorter(graph).prepare()  # raises CycleError


# ------------------------------------------------------------------------------ files and folders


@pytest.mark.parametrize("folder", sorted({path.parent for path in FILES}), ids=short)
def test_a_folder_is_small_enough_to_look_through(folder: Path) -> None:
    assert len(list(folder.glob("*.py"))) <= LARGEST_FOLDER


@pytest.mark.parametrize("folder", TESTS, ids=short)
def test_tests_lie_in_the_folders_of_what_they_test(folder: Path) -> None:
    place = folder.relative_to(ROOT / "tests")
    assert place.parts[0] in OF_NO_ROOM or (PACKAGE / place).is_dir() or (ROOT / place).is_dir()
    assert len(list(folder.glob("test_*.py"))) <= LARGEST_FOLDER


@pytest.mark.parametrize("path", FILES, ids=short)
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


# ------------------------------------------------------------------------------ what must be installed


def required(extra: str | None = None) -> set[str]:
    """Distributions that pyproject.toml asks for, their names as the index compares them."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = project["dependencies"] if extra is None else project["optional-dependencies"][extra]
    return {normal(re.split(r"[<>=!~;\[ ]", line)[0]) for line in lines}


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def imported_distributions() -> dict[str, set[str]]:
    """Distribution -> files that import it, of all that are not Python's or ours."""
    known = importlib.metadata.packages_distributions()
    found: dict[str, set[str]] = {}
    for path in FILES:
        for top in {name.split(".")[0] for name in imports_of(path)} - sys.stdlib_module_names:
            if top not in ("koala_bench", "heads", "__future__"):
                for distribution in known.get(top, [top]):
                    found.setdefault(normal(distribution), set()).add(short(path))
    return found


def test_what_is_imported_is_required_and_what_is_required_is_imported() -> None:
    imported = imported_distributions()
    # torch for CUDA brings Triton, and nothing else runs the kernels; the tests interpret them. The guards of torch's
    # traces are sympy's expressions, which torch brings.
    assert set(imported) - required() == {"triton", "sympy", "pyarrow", "gguf"}
    assert imported["gguf"] == {"koala_bench/engine/loading/gguf.py"} and "gguf" in required("gguf")
    assert imported["pyarrow"] == {"koala_bench/dialogues/parquet.py"} and "pyarrow" in required("parquet")
    assert imported["sympy"] == {"koala_bench/engine/graphs/replay.py"}
    assert all(path.startswith("koala_bench/engine/kernels/") for path in imported["triton"])
    assert required() - set(imported) == {"tabulate"}  # pandas imports it to write Markdown
    assert "triton" in required("test")


def test_what_only_the_documentation_corpus_reads_is_an_extra() -> None:
    from koala_bench.pretraining.documentation import PACKAGES

    assert {normal(name) for name in PACKAGES.values()} <= required() | required("pretrain")
    assert not required("pretrain") & required()
    assert required("pretrain") <= {normal(name) for name in PACKAGES.values()}
