"""Provenance of a record: the machine, the installed versions, and the state of the code."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
from functools import cache
from pathlib import Path
from typing import Annotated, NotRequired

from pydantic import ConfigDict, Field, with_config
from typing_extensions import TypedDict  # pydantic needs this one below Python 3.12

from koala_bench.common.bundled import PACKAGE
from koala_bench.common.machine import cores, memory_bytes

# Libraries that determine tokens and times; those that only draw tables and figures are left out.
_PACKAGES = ("torch", "transformers", "tokenizers", "accelerate", "safetensors", "numpy", "fschat")


STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
Count = Annotated[int, Field(ge=0)]


@with_config(STRICT)
class Environment(TypedDict):
    """The machine and the versions that determine tokens and times. Null means not installed or unknown. ``compiler``
    compiled the kernels of the passes, see ``koala_bench.engine.processor``; without it there were none.
    """

    python: str
    platform: str
    cpu: str
    cores: Count
    threads: Count
    memory_bytes: Count | None
    packages: dict[str, str | None]
    gpu: str | None
    driver: str | None
    compiler: NotRequired[str]


@with_config(STRICT)
class CodeState(TypedDict):
    """The code that ran. ``commit`` and ``dirty`` are null where the package is not a checkout."""

    version: str | None
    commit: str | None
    dirty: bool | None


@cache
def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass  # not Linux
    return platform.processor() or platform.machine()


def driver_version() -> str | None:
    """Version of the graphics driver, as nvidia-smi tells it."""
    if not (tool := shutil.which("nvidia-smi")):
        return None
    answer = subprocess.run(
        [tool, "--query-gpu=driver_version", "--format=csv,noheader"], capture_output=True, text=True, check=False
    )
    return answer.stdout.split("\n")[0].strip() or None


def environment(threads: int, gpu: str | None = None, driver: str | None = None) -> Environment:
    """Describe this machine and the installed versions, without importing any of the packages.

    Args:
        threads: threads that the target computes with (``torch.get_num_threads()``).
        gpu, driver: names of the device and its driver, if there is one; the caller asks torch.
    """
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": _cpu(),
        "cores": cores(),
        "threads": threads,
        "memory_bytes": memory_bytes(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "gpu": gpu,
        "driver": driver,
    }


def code_state(package_dir: Path = PACKAGE) -> CodeState:
    """Version, commit and whether tracked files differ from it, for the checkout that ``package_dir`` is part of.

    ``commit`` and ``dirty`` are null if the package is installed elsewhere, even below some other project's
    checkout (a virtual environment often is), and if git is missing.
    """
    # Git's own variables would point it at another repository, e.g. while a commit hook runs.
    variables = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}

    def git(*arguments: str) -> str | None:
        try:
            answer = subprocess.run(
                ["git", "-C", str(package_dir), *arguments], capture_output=True, text=True, env=variables, check=False
            )
        except OSError:
            return None
        return answer.stdout.strip() if answer.returncode == 0 else None

    version = _version("koala-bench")
    commit = git("rev-parse", "HEAD") if git("ls-files", "--error-unmatch", "__init__.py") is not None else None
    changes = git("status", "--porcelain", "--untracked-files=no") if commit else None
    return {"version": version, "commit": commit, "dirty": None if changes is None else changes != ""}
