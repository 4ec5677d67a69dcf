"""The files of a baseline: finding its records, and putting accepted ones in their place."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from koala_bench.common.files import replacing
from koala_bench.common.progress import log_line
from koala_bench.errors import KoalaBenchError
from koala_bench.gate.comparable import consistent
from koala_bench.gate.regression import describe_update
from koala_bench.records.reading import Run, read_runs


def records_in(path: Path) -> list[Path]:
    """The file itself, or the .jsonl files of a folder by name, of which there must be some.

    Raises:
        KoalaBenchError: the folder has none.
    """
    if not path.is_dir():
        return [path]
    found = sorted(each for each in path.glob("*.jsonl") if each.is_file())
    if not found:
        raise KoalaBenchError(
            f"The folder {path} holds no record: no file in it ends in .jsonl.",
            "Name the .jsonl file that an evaluation wrote.",
        )
    return found


def accept(baseline: Path, new: Sequence[Run]) -> list[str]:
    """Copy the records over the baseline, each file atomically; returns lines on what changed.

    In a folder the files of the old baseline go last, so that a kill leaves too many records rather than too few; the
    same command then finishes the work.

    Raises:
        KoalaBenchError: the records are not of one kind, or the baseline is a file and they are several.
    """
    consistent(new)
    if len(new) > 1 and baseline.is_file():
        raise KoalaBenchError(
            f"{baseline} is a file, but {len(new)} records are to be the baseline.", "Name a folder as the baseline."
        )
    folder = len(new) > 1 or baseline.is_dir()
    stale = sorted(baseline.glob("*.jsonl")) if baseline.is_dir() else [baseline] if baseline.exists() else []
    try:
        old = read_runs(stale)
    except KoalaBenchError as error:
        log_line(f"The old baseline cannot be read, so what changed is not known: {error.message}")
        old = []
    changes = describe_update(old, new)
    places = [
        baseline / f"seed-{run.training_seed}-{run.header['run_id'][:8]}.jsonl" if folder else baseline for run in new
    ]
    for run, place in zip(new, places, strict=True):
        with replacing(place) as temporary:
            shutil.copyfile(run.path, temporary)
    for path in stale:
        if path not in places:
            path.unlink()
    return [f"{baseline} now holds {len(new)} record{'' if len(new) == 1 else 's'}.", *changes]
