"""Progress of long work: a bar with rate and time left on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm import tqdm

_SECONDS_BETWEEN_LINES = 15.0
_LINE = "{desc}: {n:,}/{total:,}{unit}, {rate_noinv_fmt}, {elapsed} elapsed, {remaining} left{postfix}"


def log_line(text: str) -> None:
    """Print a status line to standard error; standard output is for results. Only the first process prints."""
    if os.environ.get("RANK", "0") == "0":
        print(text, file=sys.stderr, flush=True)


def in_time(seconds: float) -> str:
    """A duration in words, such as "3 min"."""
    if seconds < 90:
        return f"{max(1, round(seconds)) if seconds else 0} s"
    return f"{seconds / 60:.0f} min" if seconds < 2 * 3600 else f"{seconds / 3600:,.1f} h"


class _Lines(io.TextIOBase):
    """A file that prints each update of the bar as its own line."""

    def write(self, text: str) -> int:
        if line := text.strip():
            log_line(line)
        return len(text)


@contextmanager
def progress(description: str, total: int, unit: str, done: int = 0) -> Iterator[Callable[..., None]]:
    """Yield ``advance(amount=1, note="")``.

    Args:
        done: amount that an interrupted run finished before; it does not count towards the rate.
    """
    common = {"total": total, "initial": done, "desc": description, "unit": f" {unit}", "smoothing": 0, "miniters": 1}
    terminal = sys.stderr.isatty() and not os.environ.get("TQDM_DISABLE") and os.environ.get("RANK", "0") == "0"
    bar = (
        tqdm(**common, file=sys.stderr, dynamic_ncols=True)
        if terminal
        # The delay keeps tqdm from drawing an empty bar at the start.
        else tqdm(
            **common, file=_Lines(), bar_format=_LINE, mininterval=_SECONDS_BETWEEN_LINES, delay=1e-9, leave=False
        )
    )

    def advance(amount: int = 1, note: str = "") -> None:
        if note:
            bar.set_postfix_str(note, refresh=False)
        bar.update(amount)

    with bar:
        yield advance
        if bar.n > bar.last_print_n:
            bar.refresh()
