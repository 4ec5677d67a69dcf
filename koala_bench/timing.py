"""Clocks that do not disturb what they measure: host time on the CPU, events in the stream on CUDA."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch


def synchronise(device: torch.device) -> None:
    """Wait until the device has finished all that was asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(device: torch.device, run: Callable[[], object]) -> float:
    """Seconds of one call, from an idle device to an idle device."""
    synchronise(device)
    before = time.perf_counter()
    run()
    synchronise(device)
    return time.perf_counter() - before


class Stopwatch:
    """Splits a decode into named parts.

    ``mark(name)`` ends the part since the previous mark and gives it a name. On CUDA a mark records an event and
    waits for nothing; the times are read once at the end. On the CPU it costs one reading of the clock, some
    50 ns, against milliseconds for a step, so whole and parts come from the same pass.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._marks: list[tuple[str, Any]] = []
        self.mark("start")

    def mark(self, name: str) -> None:
        """End the current part and call it ``name``."""
        if self.device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record(torch.cuda.current_stream(self.device))
            self._marks.append((name, event))
        else:
            self._marks.append((name, time.perf_counter()))

    def seconds(self) -> dict[str, float]:
        """Total seconds of each name, after waiting for the device."""
        synchronise(self.device)
        totals: dict[str, float] = {}
        for (_, before), (name, after) in zip(self._marks, self._marks[1:], strict=False):
            span = before.elapsed_time(after) / 1000.0 if self.device.type == "cuda" else after - before
            totals[name] = totals.get(name, 0.0) + span
        return totals
