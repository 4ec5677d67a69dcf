"""Timing without synchronisation: host clock on the CPU, stream events on CUDA."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch


def synchronise(device: torch.device) -> None:
    """Wait until the device has finished all queued work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(device: torch.device, run: Callable[[], object]) -> float:
    """Seconds of one call, from an idle device to an idle device."""
    synchronise(device)
    before = time.perf_counter()
    run()
    synchronise(device)
    return time.perf_counter() - before


@contextmanager
def without_collection() -> Iterator[None]:
    """Disable Python's garbage collector, as ``timeit`` does; also a decorator.

    It scans all objects, a loaded model's included: on a GPU that took a tenth of a millisecond of every step.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class Stopwatch:
    """Splits a decode into named parts.

    ``mark(name)`` ends the part since the previous mark and names it. On the CPU a mark reads the clock, some 50 ns. On
    CUDA it records an event, some 8 us of host time, without synchronising; ``mark(name, waited=True)``, right after
    the host has synchronised, reads the host's clock only. Work queued between such a mark and the next event may
    finish later; it is counted at the next synchronisation.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
        self._marks: list[tuple[str, float, Any]] = []
        self.mark("start")

    def mark(self, name: str, waited: bool = False) -> None:
        """End the current part and call it ``name``."""
        event = None
        if self._stream is not None and not waited:
            event = torch.cuda.Event(enable_timing=True)
            event.record(self._stream)
        self._marks.append((name, time.perf_counter(), event))

    def seconds(self) -> dict[str, float]:
        """Total seconds of each name, after waiting for the device."""
        synchronise(self.device)
        totals: dict[str, float] = {}
        _, since, first = self._marks[0]  # the last event recorded right after a wait, and its host time
        for (_, before, earlier), (name, after, event) in zip(self._marks, self._marks[1:], strict=False):
            if earlier is not None and event is not None:
                span = earlier.elapsed_time(event) / 1000.0
            elif earlier is not None and first is not None:
                # The host waited: the device took the time that the events before do not account for.
                span = max(0.0, after - since - first.elapsed_time(earlier) / 1000.0)
            else:
                span = after - before
            if event is not None and earlier is None:
                since, first = after, event
            totals[name] = totals.get(name, 0.0) + span
        return totals
