"""The same evaluation in several fresh processes, one after the other.

What a process is given once for all of its answers (where its memory lies, how its threads were placed) moves every
speed of it alike, so that questions and repeats within one process do not show it.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from koala_bench.errors import KoalaBenchError


def record_of_process(record: Path, process: int) -> Path:
    """Where a process writes: the first one to the record itself, the others to folders beside it."""
    return record if process == 1 else record.parent / f"process-{process}" / record.name


def in_fresh_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function of a module in a new Python interpreter that ends with it, and return what it returns.

    Raises:
        KoalaBenchError: what the function raises, or the process was killed.
    """
    try:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            return pool.submit(function, *arguments).result()
    except BrokenProcessPool as error:
        raise KoalaBenchError(
            "A process of the evaluation was killed, perhaps for lack of memory.",
            "Start the same command again; it goes on where it was.",
        ) from error


def refuse_launched() -> None:
    """Refuse fresh processes within a launcher's: those would start processes of their own, all of them the same.

    Raises:
        KoalaBenchError: this is one of several processes that were launched together.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise KoalaBenchError("--processes starts processes itself.", "Leave the launcher out.")
