"""Whether a folder of results still is what its record says: hashes and tables computed once more.

Needs no model. What is not on this machine (weights, question files) is reported as not here, never as a match.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from koala_bench.errors import KoalaBenchError
from koala_bench.files import sha256_of
from koala_bench.interop.answers import write_fastchat_answers
from koala_bench.presets import resolved_sha256
from koala_bench.questions import find_questions, questions_sha256
from koala_bench.records import Run, read_run
from koala_bench.reproduction import make_table1

RECORD = "records.jsonl"


@dataclass(frozen=True)
class Check:
    """One thing compared with the record."""

    subject: str
    state: Literal["matches", "differs", "not here"]
    detail: str


def _of_hash(subject: str, recorded: str | None, found: str | None, where: str) -> Check:
    if recorded is None or found is None:
        return Check(subject, "not here", where if recorded is not None else "the record has no hash of it")
    if recorded == found:
        return Check(subject, "matches", f"sha256 {found[:12]}")
    return Check(subject, "differs", f"sha256 {found[:12]}, the record says {recorded[:12]}")


def _questions(run: Run, data_dir: Path | None) -> Check:
    recorded = run.header["questions"]
    subject = f"questions {recorded['name']}"
    try:
        found = questions_sha256(find_questions(recorded["name"], data_dir)[1])
    except KoalaBenchError as error:
        return Check(subject, "not here", error.message)
    return _of_hash(subject, recorded["sha256"], found, "")


def _heads(run: Run, folder: Path) -> Iterator[Check]:
    for name, method in run.methods.items():
        if method["head"] is None:
            continue
        places = [folder / "heads" / name / "model.safetensors", *([Path(method["checkpoint"]) / "model.safetensors"] if method["checkpoint"] else [])]
        place = next((place for place in places if place.is_file()), None)
        yield _of_hash(f"head {name}", method["weights_sha256"], sha256_of(place) if place else None, f"no {places[0]}")


def _same_bytes(subject: str, kept: Path, made: Path) -> Check:
    if not kept.is_file():
        return Check(subject, "not here", f"no {kept}")
    same = kept.read_bytes() == made.read_bytes()
    return Check(subject, "matches" if same else "differs", "the same bytes made again" if same else "made again from the record it has other bytes")


def verify(folder: Path, data_dir: Path | None = None) -> tuple[Run, list[Check]]:
    """Compare what lies in a folder of results with its record.

    Args:
        folder: holds ``records.jsonl`` and, where they were kept, the tables, figures, answers and heads made with it.
        data_dir: folder of question files.

    Returns the run and the checks: the record's own form, the preset's hash, the questions, every head's weights, and
    every table, figure and answer file.

    Raises:
        KoalaBenchError: there is no record, or it is damaged.
    """
    run = read_run(folder / RECORD)
    state: Literal["matches", "differs"] = "matches" if run.finished else "differs"
    checks = [
        Check("record", state, f"{len(run.turns)} turns, {'finished' if run.finished else 'but no end line: it is unfinished'}"),
        _of_hash("preset", run.header["preset"]["sha256"], resolved_sha256(run.header["preset"]["resolved"]), ""),
        _questions(run, data_dir),
        *_heads(run, folder),
    ]
    with tempfile.TemporaryDirectory() as scratch:
        made = [*make_table1([run], Path(scratch)), *write_fastchat_answers(run, Path(scratch) / "answers")]
        names = [str(path.relative_to(scratch)) for path in made]
        checks += [_same_bytes(name, folder / name, path) for name, path in zip(names, made, strict=True)]
    return run, checks
