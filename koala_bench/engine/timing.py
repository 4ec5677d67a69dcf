"""Clocks that do not disturb what they measure: host time on the CPU, events in the stream on CUDA."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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


@contextmanager
def without_collection() -> Iterator[None]:
    """Keep Python's garbage collector from running while this lasts, as ``timeit`` does; use it as a decorator for a
    whole function.

    It looks through all objects there are, those of a loaded model included: on a GPU it took a tenth of a millisecond
    of every step.
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

    ``mark(name)`` ends the part since the previous mark and gives it a name. On the CPU it costs one reading of the
    clock, some 50 ns, against milliseconds for a step, so whole and parts come from the same pass. On CUDA a mark
    records an event, some 8 us of the host's time, and waits for nothing; ``mark(name, waited=True)``, where the host
    has just waited for the device, reads the host's clock alone. What the host asks of the device between such a mark
    and the next event may end later than the host thinks: it is then counted where the host waits next.
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
        _, asked, first = self._marks[
            0
        ]  # when the last event was recorded that follows no other without a wait, and that event
        for (_, before, earlier), (name, after, event) in zip(self._marks, self._marks[1:], strict=False):
            if earlier is not None and event is not None:
                span = earlier.elapsed_time(event) / 1000.0
            elif (
                earlier is not None and first is not None
            ):  # the host waited: the device took what the events before do not account for
                span = max(0.0, after - asked - first.elapsed_time(earlier) / 1000.0)
            else:
                span = after - before
            if event is not None and earlier is None:
                asked, first = after, event
            totals[name] = totals.get(name, 0.0) + span
        return totals
