"""Cores and memory of this machine, on Linux, macOS and Windows; None if unknown."""

from __future__ import annotations

import os
import sys

import psutil


def cores() -> int:
    """CPU cores that this process may use; all of them if the system does not say."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 0


def memory_bytes() -> int | None:
    """Memory of the machine."""
    return _of_psutil("total")


def free_memory_bytes() -> int | None:
    """Memory available to new programs without swapping."""
    return _of_psutil("available")


def _of_psutil(field: str) -> int | None:
    try:
        return int(getattr(psutil.virtual_memory(), field))
    except (OSError, RuntimeError, AttributeError, ValueError):  # a container without /proc, a system unknown to psutil
        return None


def peak_memory_bytes() -> int | None:
    """Peak memory of this process so far."""
    try:
        import resource
    except ImportError:  # Windows
        return getattr(psutil.Process().memory_info(), "peak_wset", None)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak  # bytes on macOS, KiB elsewhere
