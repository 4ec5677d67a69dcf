"""Progress of long work: a bar with rate and time left on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_SECONDS_BETWEEN_LINES = 15.0


def say(text: str) -> None:
    """Print a status line to standard error, which keeps standard output for results; of a team of processes the first
    one speaks.
    """
    if os.environ.get("RANK", "0") == "0":
        print(text, file=sys.stderr, flush=True)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


@contextmanager
def progress(description: str, total: int, unit: str, done: int = 0) -> Iterator[Callable[..., None]]:
    """Yield ``advance(amount=1, note="")``.

    Args:
        total: amount of work, in ``unit``.
        done: what an earlier, interrupted run has finished; it does not count towards the rate.
    """
    if sys.stderr.isatty() and not os.environ.get("TQDM_DISABLE") and os.environ.get("RANK", "0") == "0":
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        columns = [
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
        ]
        started = time.perf_counter()
        with Progress(*columns, console=Console(stderr=True)) as bar:
            task = bar.add_task(description, total=total, completed=done, rate="", note="")
            count = 0

            def advance(amount: int = 1, note: str = "") -> None:
                nonlocal count
                count += amount
                rate = count / max(time.perf_counter() - started, 1e-9)
                bar.update(task, advance=amount, rate=f"{rate:,.1f} {unit}/s")
                if note:
                    bar.update(task, note=note)

            yield advance
        return

    started = last_line = time.perf_counter()
    count = 0

    def advance_plain(amount: int = 1, note: str = "") -> None:
        nonlocal count, last_line
        count += amount
        now = time.perf_counter()
        finished = done + count >= total
        if now - last_line < _SECONDS_BETWEEN_LINES and not finished:
            return
        last_line = now
        rate = count / max(now - started, 1e-9)
        left = max(total - done - count, 0.0) / rate if rate > 0 else 0.0
        times = f"{_clock(now - started)} elapsed, {_clock(left)} left"
        say(
            f"{description}: {done + count:,.0f}/{total:,.0f} {unit}, {rate:,.1f} {unit}/s,"
            f" {times}{'  ' + note if note else ''}"
        )

    yield advance_plain
