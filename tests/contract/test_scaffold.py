"""new-head: what it writes works as it stands, names that would not work are refused, and nothing is overwritten."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from importlib.metadata import distributions
from pathlib import Path

import pytest

from koala_bench.contract.scaffold import new_head
from koala_bench.errors import KoalaBenchError
from koala_bench.registry import HEADS
from tests.support.commands import Koala
from tests.support.processes import alone


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scaffold") / "my_own"
    assert [path.name for path in new_head("my_own", folder)] == [
        "pyproject.toml",
        "README.md",
        "my_own.py",
        "test_my_own.py",
    ]
    return folder


def test_the_package_is_whole_and_names_itself(package: Path) -> None:
    assert sorted(path.name for path in package.iterdir()) == [
        "README.md",
        "my_own.py",
        "pyproject.toml",
        "test_my_own.py",
    ]
    assert list(package.parent.iterdir()) == [package]
    assert not [path.name for path in package.iterdir() if "@NAME@" in (text := path.read_text()) or "@CLASS@" in text]
    points = tomllib.loads((package / "pyproject.toml").read_text())["project"]["entry-points"]
    assert points == {HEADS: {"my_own": "my_own:MyOwnHead"}}
    assert len((package / "README.md").read_text().splitlines()) <= 25


@pytest.mark.slow
def test_its_own_tests_pass_as_generated(package: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert alone(its_tests, package) == 0
    assert "2 passed" in capfd.readouterr().out


def its_tests(package: Path) -> None:
    os.chdir(package)
    sys.path.insert(0, str(package))
    sys.exit(pytest.main(["-q", "-p", "no:cacheprovider"]))


def test_installed_it_is_found_under_its_name(package: Path, tmp_path: Path) -> None:
    build = [
        sys.executable, "-c", "import setuptools; setuptools.setup()", "-q", "egg_info", "--egg-base", str(tmp_path),
    ]  # fmt: skip
    subprocess.run(build, cwd=package, check=True, capture_output=True)
    (found,) = distributions(path=[str(tmp_path)])
    (point,) = found.entry_points.select(group=HEADS)
    assert (point.name, point.value, found.metadata["Name"].replace("-", "_")) == (
        "my_own",
        "my_own:MyOwnHead",
        "my_own",
    )


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("", "cannot be the name"),
        ("x", "cannot be the name"),
        ("My_own", "cannot be the name"),
        ("my-own", "cannot be the name"),
        ("my own", "cannot be the name"),
        ("2nd", "cannot be the name"),
        ("my_own_", "cannot be the name"),
        ("../own", "cannot be the name"),
        ("mÿ", "cannot be the name"),
        ("lambda", "cannot be the name"),
        ("match", "cannot be the name"),
        ("eagle", "'eagle' is taken by an installed head, heads.eagle:Eagle"),
        ("koala", "'koala' is taken by an installed objective"),
        ("vanilla", "'vanilla' is taken by decoding without a head"),
        ("json", "'json' is taken by the module"),
        ("torch", "'torch' is taken by the module"),
        ("sys", "'sys' is taken by the module"),
    ],
)
def test_a_name_that_would_not_work_is_refused(tmp_path: Path, name: str, words: str) -> None:
    with pytest.raises(KoalaBenchError, match=words) as caught:
        new_head(name, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_what_is_there_is_never_overwritten(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("mine")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    for place in ("empty", "file", "dangling"):
        with pytest.raises(KoalaBenchError, match=f"{place} exists already"):
            new_head("my_own", tmp_path / place)
    with pytest.raises(KoalaBenchError, match="Cannot make the folder"):
        new_head("my_own", tmp_path / "file" / "below")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dangling", "empty", "file"]
    assert (tmp_path / "file").read_text() == "mine"


def test_the_command_writes_it_and_says_how_to_go_on(
    koala: Koala, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = koala("new-head", "my_own")
    assert (result.code, result.out.split()) == (
        0,
        ["my_own/pyproject.toml", "my_own/README.md", "my_own/my_own.py", "my_own/test_my_own.py"],
    )
    assert "pip install -e my_own" in result.err and "koala-bench check-head my_own" in result.err
    again = koala("new-head", "my_own")
    assert (again.code, again.complaint) == (
        2,
        "koala-bench: my_own exists already; nothing was written. Choose another folder with --out.",
    )
    assert koala("new-head", "my_own", "--out", "deep/er").code == 0
    assert (tmp_path / "deep" / "er" / "my_own.py").is_file()


def test_the_command_checks_what_it_wrote(koala: Koala, package: Path) -> None:
    result = koala("check-head", f"{package}/my_own.py:MyOwnHead", "--option", "layers=2")
    assert (result.code, result.out.count("passed ")) == (0, 16), result.out
