"""Writing run records: append-only, one validated line at a time, resumable after any interruption."""

from __future__ import annotations

import os
from collections.abc import Mapping
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from koala_bench.common.files import cannot, doing, write_text
from koala_bench.common.reading import encode_line, read_bytes
from koala_bench.errors import KoalaBenchError
from koala_bench.records.reading import Run, differences, parse
from koala_bench.records.schema import (
    SCHEMA,
    EndLine,
    Key,
    RunHeader,
    TurnLine,
    depths_by_method,
    end_problem,
    header_problem,
    key_of,
    turn_problem,
)


class RecordWriter:
    """Appends to one record; made by ``open_record``. Use it as a context manager.

    Attributes:
        header: the header in the file, which after a resume is that of the first start.
        done: keys of the turns that are there, failed ones included.
        finished: whether the end line is there; then nothing more can be written.
        resumed: whether the file was there before.
    """

    def __init__(self, run: Run, handle: FileIO, resumed: bool) -> None:
        self.path = run.path
        self.header = run.header
        self.done: set[Key] = {key_of(turn) for turn in run.turns}
        self.finished = run.finished
        self.resumed = resumed
        self._handle = handle
        self._methods = depths_by_method(run.header)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._handle.close()

    def append(self, turn: TurnLine) -> None:
        """Write one turn; it has been handed to the operating system when this returns.

        Raises:
            ValueError: the turn does not have the form of a record, is there already, or the record is finished.
            KoalaBenchError: the disk is full.
        """
        problem = turn_problem(turn, self._methods)
        if problem:
            raise ValueError(f"not a turn line: {problem}")
        if self.finished or key_of(turn) in self.done:
            raise ValueError(f"{key_of(turn)} is in the record already, or the record is finished")
        self._write(turn)
        self.done.add(key_of(turn))

    def finish(self, wall_s: float) -> None:
        """Write the end line. ``wall_s`` is the time this process took, in seconds."""
        if self.finished:
            raise ValueError("the record is finished already")
        end: EndLine = {"kind": "end", "status": "finished", "turns": len(self.done), "wall_s": wall_s}
        if problem := end_problem(end):
            raise ValueError(f"not an end line: {problem}")
        self._write(end)
        with doing("write", self.path, "Check the disk, and start again."):
            os.fsync(self._handle.fileno())
        self.finished = True

    def _write(self, line: Mapping[str, Any]) -> None:
        start = os.fstat(self._handle.fileno()).st_size
        try:
            # Unbuffered, in one call as a rule: a kill leaves at most one half-written line, the last.
            content = memoryview(encode_line(line))
            while content:
                content = content[self._handle.write(content) :]
        except OSError as error:
            self._handle.truncate(start)
            remedy = "Free space and start again; it goes on after the last complete turn."
            raise cannot("write", self.path, error, remedy) from error


def open_record(path: Path, header: RunHeader) -> RecordWriter:
    """Start a record, or go on with the one that is there.

    A half-written last line of an interrupted run is cut off. An unfinished record is continued only by the same
    experiment on the same machine with the same code, since its times are compared with one another; a finished
    one is handed back for reuse if the experiment is the same.

    Args:
        header: what is about to run; written if the file is new, else compared with the one there.

    Raises:
        ValueError: the header does not have the form of a record.
        KoalaBenchError: the file cannot be written, is damaged, or belongs to another run (the fields are named).
    """
    problem = header_problem(header)
    if problem or header["schema"] != SCHEMA:
        raise ValueError(f"not a run line: {problem or 'schema'}")
    content = read_bytes(path, "run record", "Check its permissions.") if path.exists() else b""
    # Without one line end not even the header was completed, so there is nothing to go on with.
    resumed = b"\n" in content
    if not resumed:
        write_text(path, encode_line(header).decode())
        run, length = Run(path, header, [], False), None
    else:
        run, length = parse(path, content)
        different = [*differences(run.header, header, circumstances=not run.finished)]
        if different:
            more = f" and {len(different) - 3} more" if len(different) > 3 else ""
            raise KoalaBenchError(
                f"{path} holds another run; they differ in {', '.join(different[:3])}{more}.",
                "Choose another folder with --out, or delete the record to start over.",
            )
    with doing("write", path, "Make the file writable or choose another folder with --out."):
        handle = FileIO(path, "a")
        if length is not None and length < len(content):
            # Truncation is one system call: the file has either its old length or the new one.
            handle.truncate(length)
    return RecordWriter(run, handle, resumed)
