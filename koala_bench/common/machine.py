"""What this machine has: cores and memory, on Linux, macOS and Windows; None where it cannot be had."""

from __future__ import annotations

import os
import sys

import psutil


def cores() -> int:
    """CPU cores that this process may use; where the system does not say, all there are."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 0


def memory_bytes() -> int | None:
    """Memory of the machine."""
    return _of_psutil("total")


def free_memory_bytes() -> int | None:
    """Memory that new programs can have without swapping."""
    return _of_psutil("available")


def _of_psutil(field: str) -> int | None:
    try:
        return int(getattr(psutil.virtual_memory(), field))
    except (OSError, RuntimeError, AttributeError, ValueError):  # a container without /proc, a system unknown to psutil
        return None


def peak_memory_bytes() -> int | None:
    """The most memory that this process has held so far."""
    try:
        import resource
    except ImportError:  # Windows
        return getattr(psutil.Process().memory_info(), "peak_wset", None)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak  # bytes on macOS, KiB elsewhere
