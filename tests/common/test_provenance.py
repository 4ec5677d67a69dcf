"""Where a record comes from: the machine, the versions, and the state of the code."""

from __future__ import annotations

import subprocess
from pathlib import Path

from koala_bench.common.provenance import code_state, environment
from koala_bench.evaluation.recording import open_record
from tests.support.synthetic_run import make_header


def test_the_environment_is_described_without_importing_torch(tmp_path: Path) -> None:
    where = environment(threads=2, gpu="GPU", driver="1.2")
    assert where["threads"] == 2
    assert where["gpu"] == "GPU"
    assert where["packages"]["numpy"]
    assert where["memory_bytes"] is None or where["memory_bytes"] > 2**20
    header = make_header()
    header["environment"] = where
    open_record(tmp_path / "run.jsonl", header).__exit__(None, None, None)


def test_code_state_of_a_checkout_and_of_an_installed_package(tmp_path: Path) -> None:
    package = tmp_path / "checkout" / "package"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")

    def git(*arguments: str) -> str:
        options = [
            "-c", "user.name=A", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false", "-c",
            "core.hooksPath=/dev/null",
        ]  # fmt: skip
        return subprocess.run(
            ["git", *options, *arguments], cwd=package, check=True, capture_output=True, text=True
        ).stdout.strip()

    assert code_state(package)["commit"] is None
    git("init", "-q")
    assert code_state(package)["commit"] is None, "no commit yet"
    git("add", "__init__.py")
    git("commit", "-q", "-m", "one")
    (package / "untracked.txt").write_text("")
    state = code_state(package)
    assert (state["commit"], state["dirty"]) == (git("rev-parse", "HEAD"), False)
    (package / "__init__.py").write_text("x = 1\n")
    assert code_state(package)["dirty"] is True
    below = package / "venv" / "package"
    below.mkdir(parents=True)
    (below / "__init__.py").write_text("")
    assert code_state(below)["commit"] is None, "a package below another project's checkout is not of that project"
