"""C kernels, compiled for this processor at first use and kept in the user's cache."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch

from koala_bench.common.files import cache_folder, replacing
from koala_bench.common.progress import log_line
from koala_bench.errors import KoalaBenchError

_FLAGS = ("-O3", "-march=native", "-ffp-contract=off", "-fopenmp", "-shared", "-fPIC")


@cache
def compiler() -> tuple[str, ...] | None:
    """The command of a C compiler, ``CC`` if it is set; None if there is none."""
    if named := os.environ.get("CC"):
        return tuple(shlex.split(named))
    return next(((found,) for name in ("cc", "gcc", "clang") if (found := shutil.which(name))), None)


@cache
def compiler_version() -> str | None:
    """What the compiler calls itself; None if there is none, or it does not start."""
    if (command := compiler()) is None:
        return None
    try:
        answer = subprocess.run([*command, "--version"], capture_output=True, text=True, check=False)
    except OSError:
        return None
    lines = answer.stdout.splitlines()
    return lines[0] if lines and answer.returncode == 0 else None


def compiled(sources: Sequence[Path]) -> ctypes.CDLL | None:
    """C files, and the headers beside them, as one library.

    Returns:
        None, after one line that says why, where it cannot be compiled or loaded.
    """
    if (command := compiler()) is None or (version := compiler_version()) is None:
        _without("there is no C compiler, install gcc or clang")
        return None
    libraries = (*_threading_library(), "-lm")
    texts = [each.read_text(encoding="utf-8") for each in (*sources, *sorted(sources[0].parent.glob("*.h")))]
    key = hashlib.sha256(repr((texts, command, version, _FLAGS, libraries, _processor())).encode()).hexdigest()
    library = cache_folder() / "kernels" / f"{key[:16]}.so"
    try:
        if not library.exists():
            with replacing(library) as temporary:
                _compile([*command, *_FLAGS, *map(str, sources), "-o", str(temporary), *libraries])
        return ctypes.CDLL(str(library))
    except (KoalaBenchError, OSError, subprocess.SubprocessError) as error:
        _without(str(error))
        return None


def _compile(command: list[str]) -> None:
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    if answer.returncode:
        raise OSError(f"{command[0]} failed: {(answer.stderr.splitlines() or ['no message'])[0]}")


def _without(reason: str) -> None:
    log_line(f"koala-bench: decoding on the CPU is slower than it could be, without kernels of its own: {reason}")


def _processor() -> str:
    """What ``-march=native`` depends on, since a cache may be shared by several machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        return platform.processor() or platform.machine()
    return "".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))}))


def _threading_library() -> tuple[str, ...]:
    """The OpenMP library that torch loaded, if it brings its own: two of them would compete for the cores."""
    own = sorted((Path(torch.__file__).parent / "lib").glob("libgomp*.so*"))
    return ("-Wl,--as-needed", str(own[0])) if own else ()
