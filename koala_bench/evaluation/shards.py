"""A record made by several processes: each writes a part, and in the end the first process merges them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from koala_bench.common.files import replacing
from koala_bench.common.process_group import ProcessGroup
from koala_bench.common.reading import encode_line
from koala_bench.dialogues.questions import Question
from koala_bench.errors import KoalaBenchError
from koala_bench.records.reading import read_run
from koala_bench.records.schema import EndLine


def part_of(record: Path, rank: int, size: int) -> Path:
    """Where process ``rank`` of ``size`` writes its part of a record."""
    return record.with_name(f"{record.stem}.part-{rank + 1}-of-{size}{record.suffix}")


def place_for(record: Path, group: ProcessGroup, questions: int) -> Path:
    """The file that this process writes or reuses: the record itself if it is there or there is one process, else its
    part. Raises KoalaBenchError where parts of a run with another number of processes are in the way, or there are
    fewer questions than processes."""
    if record.exists() or (group.size == 1 and not _parts(record)):
        return record
    if group.size > questions:
        raise KoalaBenchError(
            f"{questions} questions cannot be shared out to {group.size} processes.", f"Launch at most {questions}."
        )
    own = part_of(record, group.rank, group.size)
    for other in _parts(record):
        if other not in [part_of(record, rank, group.size) for rank in range(group.size)]:
            raise KoalaBenchError(
                f"{other} is a part of a run with another number of processes.",
                "Go on with as many, or delete the parts to start over.",
            )
    return own


def _parts(record: Path) -> list[Path]:
    return sorted(record.parent.glob(f"{record.stem}.part-*-of-*{record.suffix}"))


def merge_parts(record: Path, group: ProcessGroup, questions: Sequence[Question], started: float) -> None:
    """Make the record of finished parts, in the order in which one process would have written it; the parts go.

    All processes come here; a record that is there already is left as it is.

    Args:
        questions: all of them, in their order.
        started: ``time.perf_counter()`` when this process began.

    Raises:
        KoalaBenchError: a part is damaged, or the disk is full.
    """
    if group.size == 1:
        return
    group.wait()
    if group.first and not record.exists():
        paths = [part_of(record, rank, group.size) for rank in range(group.size)]
        parts = [read_run(path) for path in paths]
        place = {question.question_id: index for index, question in enumerate(questions)}
        turns = sorted(
            (turn for part in parts for turn in part.turns),
            key=lambda turn: (turn["repeat"], place[turn["question_id"]]),
        )
        wall_s = time.perf_counter() - started
        end: EndLine = {"kind": "end", "status": "finished", "turns": len(turns), "wall_s": wall_s}
        with replacing(record) as temporary, open(temporary, "wb") as handle:
            for line in (parts[0].header, *turns, end):
                handle.write(encode_line(line))
        for path in paths:
            path.unlink()
    group.wait()
