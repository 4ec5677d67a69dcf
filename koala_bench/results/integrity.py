"""Whether a folder of results still is what its record says: hashes and tables computed once more.

Needs no model. What is not on this machine (weights, question files) is reported as not here, never as a match.
"""

from __future__ import annotations

import re
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

from koala_bench.common.files import sha256_of
from koala_bench.dialogues.questions import find_questions, questions_sha256
from koala_bench.errors import KoalaBenchError
from koala_bench.interop.answers import write_fastchat_answers
from koala_bench.presets import resolved_sha256
from koala_bench.records.reading import Run, read_runs
from koala_bench.results.making import RECORD, Sources, made_in, make, sources_in


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
        places = [
            run.path.parent / "heads" / name / "model.safetensors",
            folder / "heads" / name / "model.safetensors",
            *([Path(method["checkpoint"]) / "model.safetensors"] if method["checkpoint"] else []),
        ]
        place = next((place for place in places if place.is_file()), None)
        yield _of_hash(f"head {name}", method["weights_sha256"], sha256_of(place) if place else None, f"no {places[0]}")


def _same_bytes(subject: str, kept: Path, made: Path) -> Check:
    if not kept.is_file():
        return Check(subject, "not here", f"no {kept}")
    if sha256_of(kept) == sha256_of(made):
        return Check(subject, "matches", "the same bytes made again")
    return Check(subject, "differs", "made again from the record it has other bytes")


def _record(run: Run, folder: Path, data_dir: Path | None) -> Iterator[Check]:
    """A record's own form, its preset, questions and heads, and the answer files beside it."""
    below = "" if run.path.parent == folder else f" of {run.path.parent.relative_to(folder)}"
    finished = "finished" if run.finished else "but no end line: it is unfinished"
    preset = run.header["preset"]
    checks = [
        Check("record", "matches" if run.finished else "differs", f"{len(run.turns)} turns, {finished}"),
        _of_hash("preset", preset["sha256"], resolved_sha256(preset["resolved"]), ""),
        _questions(run, data_dir),
        *_heads(run, folder),
    ]
    yield from (replace(check, subject=check.subject + below) for check in checks)
    with tempfile.TemporaryDirectory() as scratch:
        for path in write_fastchat_answers(run, Path(scratch)):
            kept = run.path.parent / "answers" / path.name
            yield _same_bytes(str(kept.relative_to(folder)), kept, path)


def _made(sources: Sources, folder: Path) -> Iterator[Check]:
    """Tables and figures that lie in the folder; Table 1 is looked for where there is none at all."""
    for name in made_in(folder) or (["table1"] if sources.main else []):
        if not sources.of(name):
            yield Check(name, "not here", "what it was made from")
        else:
            yield from _again(folder, partial(make, name, sources))


def _again(folder: Path, maker: Callable[[Path], list[Path]]) -> Iterator[Check]:
    with tempfile.TemporaryDirectory() as scratch:
        for path in maker(Path(scratch)):
            yield _same_bytes(path.name, folder / path.name, path)


def verify(folder: Path, data_dir: Path | None = None) -> tuple[Run, list[Check]]:
    """Compare what lies in a folder of results with its records.

    Args:
        folder: holds ``records.jsonl``, or records below it as ``making.Sources`` has them, and, where they were kept,
            the tables, figures, answers and heads made with them.

    Returns the main run and the checks: each record's own form, the preset's hash, the questions, every head's weights,
    and every table, figure and answer file.

    Raises:
        KoalaBenchError: there is no record, or it is damaged.
    """
    sources = sources_in(folder)
    runs = read_runs(sources.records or [folder / RECORD])
    checks = [check for run in runs for check in _record(run, folder, data_dir)]
    return runs[0], [*checks, *_made(sources, folder)]


# A file of measurements of another kind -> what makes its pages in a folder.
Makers = Mapping[str, Callable[[Path, Path], list[Path]]]


@dataclass(frozen=True)
class Verdict:
    """A folder below a verified one: whether everything that is here matches, how many files do, and what differs."""

    folder: Path
    state: Literal["matches", "differs", "damaged"]
    detail: str


def _verdict(folder: Path, checks: Sequence[Check]) -> Verdict:
    counts = Counter(check.state for check in checks)
    differing = ", ".join(check.subject for check in checks if check.state == "differs")
    absent = f", {counts['not here']} not here" if counts["not here"] else ""
    detail = f"{counts['matches']} match{absent}" + (f"; differs: {differing}" if differing else "")
    return Verdict(folder, "differs" if differing else "matches", detail)


def verify_below(
    root: Path, data_dir: Path | None = None, makers: Makers | None = None, update: bool = False
) -> Iterator[Verdict]:
    """Verify every folder of results below one, in the order of their names.

    Args:
        makers: of pages that are made from other files than run records.
        update: make the tables, figures and pages that lie in each folder again first; records stay as they are.
    """
    for folder in sorted(path for path in (root, *root.rglob("*")) if path.is_dir()):
        others = [(maker, folder / name) for name, maker in (makers or {}).items() if (folder / name).is_file()]
        is_result = _is_result(folder)
        if not others and not is_result:
            continue
        try:
            if update:
                for name in made_in(folder) if is_result else ():
                    make(name, sources_in(folder), folder)
                for maker, log in others:
                    maker(log, folder)
            checks = verify(folder, data_dir)[1] if is_result else []
            for maker, log in others:
                checks += _again(folder, partial(maker, log))
            yield _verdict(folder, checks)
        except KoalaBenchError as error:
            yield Verdict(folder, "damaged", str(error))


def _is_result(folder: Path) -> bool:
    """Whether a folder has records of its own and is no part of another."""
    part = re.fullmatch(r"seed-\d+", folder.name) or folder.parent.name == "tasks"
    return bool(sources_in(folder).records) and not part
