"""Cores and memory of this machine, on Linux, macOS and Windows; None if unknown."""

from __future__ import annotations

import os
import sys
from typing import Literal

import psutil


def cores() -> int:
    """CPU cores that this process may use; all of them if the system does not say."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 0


def memory_bytes(kind: Literal["total", "available"] = "total") -> int | None:
    """Memory of the machine, in all or available without swapping."""
    try:
        return int(getattr(psutil.virtual_memory(), kind))
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
