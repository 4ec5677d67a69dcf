"""What can be asked of the machine, where some of it cannot: macOS and Windows lack functions that Linux has."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from koala_bench.common import machine
from koala_bench.common.files import write_text
from koala_bench.common.provenance import environment


def test_cores_and_memory_are_those_of_this_machine() -> None:
    assert 1 <= machine.cores() <= (os.cpu_count() or 1)
    total, free, peak = machine.memory_bytes(), machine.memory_bytes("available"), machine.peak_memory_bytes()
    assert total is not None and free is not None and peak is not None
    assert 2**24 < peak < total and 0 < free < total


def test_without_affinity_all_cores_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    assert machine.cores() == os.cpu_count()


def test_without_resource_the_peak_is_what_windows_says_or_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "resource", None)
    assert machine.peak_memory_bytes() is None or sys.platform == "win32"
    memory = type("Memory", (), {"peak_wset": 12345})
    monkeypatch.setattr(psutil.Process, "memory_info", lambda self: memory)
    assert machine.peak_memory_bytes() == 12345


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no resource")
def test_the_peak_is_in_bytes_on_macos_too(monkeypatch: pytest.MonkeyPatch) -> None:
    import resource

    monkeypatch.setattr(resource, "getrusage", lambda who: type("Usage", (), {"ru_maxrss": 7}))
    for platform, expected in (("darwin", 7), ("linux", 7 * 1024)):
        monkeypatch.setattr(sys, "platform", platform)
        assert machine.peak_memory_bytes() == expected


def test_where_memory_cannot_be_had_the_environment_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails() -> None:
        raise FileNotFoundError("/proc/meminfo")

    monkeypatch.setattr(psutil, "virtual_memory", fails)
    assert machine.memory_bytes() is None and environment(threads=1)["memory_bytes"] is None


@pytest.mark.skipif(sys.platform == "win32", reason="Windows does so by itself")
def test_files_are_flushed_through_handles_that_can_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fcntl

    flush = os.fsync

    def as_on_windows(handle: int) -> None:
        if fcntl.fcntl(handle, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, "Bad file descriptor")
        flush(handle)

    monkeypatch.setattr(os, "fsync", as_on_windows)
    write_text(tmp_path / "a.txt", "text")
    assert (tmp_path / "a.txt").read_text() == "text"


def test_commands_start_without_what_only_linux_has() -> None:
    code = """if True:
        import os, sys
        for name in ("sched_getaffinity", "sysconf", "sysconf_names"):
            if hasattr(os, name):
                delattr(os, name)
        for name in ("resource", "fcntl", "pwd", "grp", "termios"):
            sys.modules[name] = None
        from koala_bench.cli import main

        sys.argv = ["koala-bench", "heads"]
        main()
        """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, "medusa" in done.stdout) == (0, True), done.stderr
