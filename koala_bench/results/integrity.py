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

from koala_bench.common.bundled import PACKAGE
from koala_bench.common.files import sha256_of
from koala_bench.dialogues.questions import find_questions, questions_sha256
from koala_bench.errors import KoalaBenchError
from koala_bench.interop.answers import write_fastchat_answers
from koala_bench.presets import resolved_sha256
from koala_bench.records.reading import BEGINNING_BYTES, Run, begins_as_run, read_run, read_runs
from koala_bench.results.making import RECORD, Sources, made_in, make, sources_in

_WEIGHTS = "model.safetensors"
# What a folder of results may show without a record: a README is written by hand.
_PAGES = {".md", ".csv", ".tex", ".html", ".pdf", ".png"}


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
    """Weights beside the record have to be the record's. Those at the path that it names do not: a later training may
    have written its own there, and heads that ship are replaced by better ones.
    """
    for name, method in run.methods.items():
        if method["head"] is None:
            continue
        recorded, given = method["weights_sha256"], Path(method["checkpoint"]) if method["checkpoint"] else None
        shipped = given is not None and given.parts[-5:-3] == (PACKAGE.name, "targets")
        # A method that decodes with the head of another finds it under that one's name.
        names = dict.fromkeys([name, *([given.name] if given else [])])
        beside = [place / "heads" / each / _WEIGHTS for place in (run.path.parent, folder) for each in names]
        kept = None if shipped else next((place for place in beside if place.is_file()), None)
        if kept is None and given is not None:
            named = (PACKAGE / Path(*given.parts[-4:]) if shipped else given) / _WEIGHTS
            if named.is_file() and recorded is not None and sha256_of(named) != recorded:
                yield Check(f"head {name}", "not here", f"{given} now holds other weights")
                continue
            kept = named if named.is_file() else None
        yield _of_hash(f"head {name}", recorded, sha256_of(kept) if kept else None, f"no {given or beside[0]}")


def _same_bytes(subject: str, kept: Path, made: Path) -> Check:
    if not kept.is_file():
        return Check(subject, "not here", f"no {kept}")
    if sha256_of(kept) == sha256_of(made):
        return Check(subject, "matches", "the same bytes made again")
    return Check(subject, "differs", "made again from the record it has other bytes")


def _record(run: Run, folder: Path, data_dir: Path | None) -> Iterator[Check]:
    """A record's own form, its preset, questions and heads, and the answer files beside it."""
    place = run.path.parent if run.path.name == RECORD else run.path
    below = "" if place == folder else f" of {place.relative_to(folder)}"
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
    """A folder below a verified one: whether everything that is here matches, how many files do, and what differs; or
    that it has pages but nothing that they could be compared with."""

    folder: Path
    state: Literal["matches", "differs", "damaged", "no record"]
    detail: str


def _verdict(folder: Path, checks: Sequence[Check]) -> Verdict:
    counts = Counter(check.state for check in checks)
    differing = ", ".join(check.subject for check in checks if check.state == "differs")
    absent = f", {counts['not here']} not here" if counts["not here"] else ""
    detail = f"{counts['matches']} match{absent}" + (f"; differs: {differing}" if differing else "")
    return Verdict(folder, "differs" if differing else "matches", detail)


@dataclass(frozen=True)
class _Found:
    """What there is to verify in a folder.

    Attributes:
        is_result: it has records of its own and is no part of another folder of results.
        baselines: run records of other names, as the gate keeps them.
        logs: what makes pages from a file of another kind, and that file.
        pages: how many files it shows.
    """

    folder: Path
    is_result: bool
    baselines: tuple[Path, ...]
    logs: tuple[tuple[Callable[[Path, Path], list[Path]], Path], ...]
    pages: int

    @property
    def verifiable(self) -> bool:
        """Whether anything in it can be compared with a record."""
        return self.is_result or bool(self.baselines or self.logs)


def _found_in(folder: Path, makers: Makers) -> _Found:
    files = sorted(path for path in folder.iterdir() if path.is_file())
    return _Found(
        folder,
        _is_result(folder),
        tuple(path for path in files if path.suffix == ".jsonl" and path.name != RECORD and _is_run(path)),
        tuple((maker, folder / name) for name, maker in makers.items() if (folder / name).is_file()),
        sum(path.suffix in _PAGES and path.name != "README.md" for path in files),
    )


def _is_run(path: Path) -> bool:
    """Whether a file begins as a run record does, however damaged it may be behind that, or cannot be read at all."""
    try:
        with path.open("rb") as handle:
            return begins_as_run(handle.read(BEGINNING_BYTES))
    except OSError:
        return True  # whoever reads it says what is wrong


def verify_below(
    root: Path, data_dir: Path | None = None, makers: Makers | None = None, update: bool = False
) -> Iterator[Verdict]:
    """Verify every folder of results below one, in the order of their names, and name those without a record.

    Args:
        makers: of pages that are made from other files than run records.
        update: make the tables, figures and pages that lie in each folder again first; records stay as they are.

    Raises:
        KoalaBenchError: there is nothing to verify.
    """
    every = [_found_in(folder, makers or {}) for folder in sorted((root, *root.rglob("*"))) if folder.is_dir()]
    if not any(found.verifiable for found in every):
        raise KoalaBenchError(
            f"{root} and the folders below have no records.jsonl.", "Name a folder that an evaluation wrote."
        )
    results = {found.folder for found in every if found.is_result}
    for found in every:
        if found.verifiable:
            yield _verify_one(found, data_dir, update)
        elif found.pages and results.isdisjoint(found.folder.parents):
            yield Verdict(found.folder, "no record", f"{found.pages} pages and figures to compare with nothing")


def _verify_one(found: _Found, data_dir: Path | None, update: bool) -> Verdict:
    folder = found.folder
    try:
        if update:
            for name in made_in(folder) if found.is_result else ():
                make(name, sources_in(folder), folder)
            for maker, log in found.logs:
                maker(log, folder)
        checks = verify(folder, data_dir)[1] if found.is_result else []
        for path in found.baselines:
            checks += _record(read_run(path), folder, data_dir)
        for maker, log in found.logs:
            checks += _again(folder, partial(maker, log))
        return _verdict(folder, checks)
    except KoalaBenchError as error:
        return Verdict(folder, "damaged", str(error))


def _is_result(folder: Path) -> bool:
    """Whether a folder has records of its own and is no part of another."""
    part = re.fullmatch(r"seed-\d+", folder.name) or folder.parent.name == "tasks"
    return bool(sources_in(folder).records) and not part
