"""A wheel carries everything: installed elsewhere, without the checkout, the commands work."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import venv
from importlib.metadata import version
from pathlib import Path

import pytest

from tests.support.synthetic_run import write_run

ROOT = Path(__file__).parents[2]
SOURCES = ("koala_bench", "heads", "reproduce", "pyproject.toml", "setup.py", "README.md", "LICENSE")
RECENT_SETUPTOOLS = 77


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The command of an environment that has the wheel, and the other packages from here."""
    place = tmp_path_factory.mktemp("wheel")
    (place / "source").mkdir()
    for name in SOURCES:  # a copy: what an earlier build left in the checkout would come along
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, place / "source" / name)
    isolated = int(version("setuptools").split(".")[0]) < RECENT_SETUPTOOLS
    build = ["wheel", "--no-deps", *([] if isolated else ["--no-build-isolation"]), "--wheel-dir", str(place)]
    run([sys.executable, "-m", "pip", *build, str(place / "source")])
    venv.create(place / "env", with_pip=False)
    libraries = next((place / "env").glob("[Ll]ib/**/site-packages"))
    run([sys.executable, "-m", "pip", "install", "--no-deps", "--target", str(libraries), str(*place.glob("*.whl"))])
    (libraries / "others.pth").write_text("".join(f"{path}\n" for path in sys.path if path.endswith("site-packages")))
    shutil.rmtree(place / "source")
    return next(path for path in (place / "env").glob("*/python*") if path.stem == "python")


def run(command: list[str], folder: Path | None = None) -> str:
    # Without coverage's and pytest's own settings, and not from the checkout, which would be imported instead.
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "KOALA_BENCH_DATA")}
    done = subprocess.run(
        command, check=False, capture_output=True, text=True, cwd=folder or Path(sys.prefix), env=environment
    )
    assert done.returncode == 0, done.stderr + done.stdout
    return done.stdout


@pytest.mark.slow
def test_a_wheel_works_in_another_folder(installed: Path, tmp_path: Path) -> None:
    koala = [str(installed), "-m", "koala_bench.cli"]
    where = run([str(installed), "-c", "import koala_bench.common.bundled as b; print(b.PACKAGE, b.RECIPES)"], tmp_path)
    assert str(ROOT) not in where and "env" in where
    assert "reproduce" in run([*koala, "--help"], tmp_path)
    assert "heads.medusa:Medusa" in run([*koala, "heads"], tmp_path)
    record = write_run(tmp_path / "records.jsonl")
    assert "table1.md" in run([*koala, "table", str(record)], tmp_path)
    assert (tmp_path / "table1.md").read_text(encoding="utf-8").startswith("# Table 1")


@pytest.mark.slow
def test_a_wheel_has_every_file_that_is_read(installed: Path, tmp_path: Path) -> None:
    code = "from koala_bench.common.bundled import PACKAGE, RECIPES; print(PACKAGE); print(RECIPES)"
    package, recipes = map(Path, run([str(installed), "-c", code], tmp_path).split())
    for here, there in ((ROOT / "koala_bench", package), (ROOT / "reproduce", recipes)):
        tracked = subprocess.run(["git", "ls-files", "."], cwd=here, capture_output=True, text=True, check=False)
        wanted = {name for name in tracked.stdout.splitlines() if not name.endswith(".md")}
        assert wanted and {name for name in wanted if not (there / name).is_file()} == set()
