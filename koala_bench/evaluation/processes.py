"""The same evaluation in several fresh processes, one after the other.

What a process is given once for all of its answers (where its memory lies, how its threads were placed) moves every
speed of it alike, so that questions and repeats within one process do not show it.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from koala_bench.errors import KoalaBenchError


def record_of_process(record: Path, process: int) -> Path:
    """Where a process writes: the first one to the record itself, the others to folders beside it."""
    return record if process == 1 else record.parent / f"process-{process}" / record.name


def in_fresh_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function of a module in a new Python interpreter that ends with it, and return what it returns.

    Not by ``multiprocessing``, whose new processes run the caller's main script again. Raises what
    the function raises, and KoalaBenchError where the process ended otherwise."""
    with tempfile.TemporaryDirectory() as folder:
        call, answer = Path(folder) / "call", Path(folder) / "answer"
        call.write_bytes(pickle.dumps((function, arguments)))
        done = subprocess.run([sys.executable, "-P", "-m", __name__, str(call), str(answer)], check=False)
        if not answer.exists():
            raise KoalaBenchError(
                f"A process of the evaluation ended with exit code {done.returncode}.",
                "See its message above, or the system's log if it was killed; the same command goes on where it was.",
            )
        value, error = pickle.loads(answer.read_bytes())
    if error is not None:
        raise error
    return value


def refuse_launched() -> None:
    """Refuse fresh processes within a launcher's: those would start processes of their own, all of them the same.
    Raises KoalaBenchError where this is one of several processes that were launched together."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise KoalaBenchError("--processes starts processes itself.", "Leave the launcher out.")


def _answer(call: Path, answer: Path) -> None:
    function, arguments = pickle.loads(call.read_bytes())
    found: tuple[Any, KoalaBenchError | None]
    try:
        found = function(*arguments), None
    except KoalaBenchError as error:
        found = None, error
    answer.write_bytes(pickle.dumps(found))


if __name__ == "__main__":
    _answer(*map(Path, sys.argv[1:]))
