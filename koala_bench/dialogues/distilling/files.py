"""``distill --source self`` on disk: parts that grow dialogue by dialogue, and one file of conversations in the end.

Each process appends to a part of its own below ``OUT.parts``, which is a folder of conversations like any other at any
time. A dialogue is there as a whole or not at all, so a kill loses only the rows in the making, and the same command,
with as many processes as it likes, goes on.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from koala_bench.common.files import doing, make_folder, write_text
from koala_bench.common.process_group import find_process_group
from koala_bench.common.progress import log_line, progress
from koala_bench.common.reading import complete_lines
from koala_bench.dialogues.distilling.manifest import identity_for, identity_of, is_made, manifest_of, write_answers
from koala_bench.dialogues.distilling.questions import NGRAM, EvaluationText, mix, words_of
from koala_bench.dialogues.distilling.sampling import SelfDialogues, SelfOptions
from koala_bench.dialogues.encoding import ChatTemplate
from koala_bench.engine.target import Target
from koala_bench.errors import KoalaBenchError

SELF = "self"


def distill_self(
    target: Target,
    template: ChatTemplate,
    out: Path,
    options: SelfOptions,
    train: int,
    held_out: int,
    evaluation: Sequence[Path],
) -> Path:
    """Let a target write ``train`` and ``held_out`` dialogues with itself into ``out``, JSON lines, gzip-compressed if
    its name ends in ``.gz``.

    Args:
        evaluation: question files that no question may share ``NGRAM`` words in a row with.

    Raises:
        KoalaBenchError: ``out`` or its parts are there and were made otherwise, cannot be written, or the target asks
            nothing usable.
    """
    texts = EvaluationText(evaluation)
    source = {"source": SELF, "mix": mix(), "ngram": NGRAM, "evaluation_sha256": texts.files}
    given = {key: value for key, value in asdict(options).items() if key != "rows"}
    identity = identity_for(target, template, source, {"train": train, "held_out": held_out, **given})
    if is_made(out, identity):
        return out
    group, total = find_process_group(target.device), train + held_out
    parts = out.with_name(out.name + ".parts")
    make_folder(parts)
    own = parts / f"{group.rank}.jsonl"
    _check_parts(parts, identity)
    _mend(own)
    group.wait()
    rows = read_parts(parts)
    group.wait()  # before anybody writes
    write_text(manifest_of(own), json.dumps({"identity": identity}, indent=2) + "\n")
    done = {row["id"] for row in rows}
    numbers = [number for number in group.own(total) if f"{SELF}:{number}" not in done]
    if rows:
        log_line(f"Resuming after {len(rows):,} of {total:,} dialogues.")
    known = {
        " ".join(words_of(message["value"]))
        for row in rows
        for message in row["conversations"]
        if message["from"] == "human"
    }
    _write(SelfDialogues(target, template, options, known, texts), own, numbers, total // group.size, held_out / total)
    group.wait()
    if group.first:
        _finish(parts, out, identity)
    group.wait()
    return out


def read_parts(parts: Path) -> list[dict[str, Any]]:
    """The dialogues in a folder of parts, without lines that a kill has cut. Raises KoalaBenchError where a part is
    damaged."""
    remedy = "Delete the line; its dialogue is written again."
    paths = sorted(parts.glob("*.jsonl"))
    return [row for path in paths for row in complete_lines(path, path.read_bytes(), remedy)[0]]


def _check_parts(parts: Path, identity: dict[str, Any]) -> None:
    for path in parts.glob("*.jsonl"):
        if identity_of(path) != identity:
            raise KoalaBenchError(
                f"{path} belongs to another run.", f"Choose another --out, or delete {parts} to start again."
            )


def _mend(path: Path) -> None:
    """Cut off a line that a kill or a full disk has left half written."""
    if path.exists():
        with open(path, "r+b") as handle:
            handle.truncate(path.read_bytes().rfind(b"\n") + 1)


def _write(dialogues: SelfDialogues, path: Path, numbers: Sequence[int], total: int, held_out: float) -> None:
    answered = 0

    def count(tokens: int) -> None:
        nonlocal answered
        answered += tokens
        if tokens:
            advance(0, f"{answered:,} answer tokens")

    with (
        doing("write", path, "Free space and repeat the command: it goes on."),
        open(path, "ab", buffering=0) as handle,
        progress("distill", total, "dialogues", total - len(numbers)) as advance,
    ):
        for row in dialogues.write(numbers, count):
            number = int(row["id"].partition(":")[2])
            apart = int((number + 1) * held_out) > int(number * held_out)  # spread evenly
            split = "held_out" if apart else "train"
            handle.write((json.dumps({**row, "split": split}, ensure_ascii=False) + "\n").encode())
            advance(1)


def _finish(parts: Path, out: Path, identity: dict[str, Any]) -> None:
    rows = sorted(read_parts(parts), key=lambda row: int(row["id"].partition(":")[2]))
    left_out: Counter[str] = Counter()
    for row in rows:
        left_out.update(row["rejected"])
    counts = {
        "answer_tokens": sum(row["answer_tokens"] for row in rows),
        "kinds": dict(Counter(row["kind"] for row in rows).most_common()),
        "left_out": dict(left_out.most_common()),
    }
    write_answers(out, rows, identity, counts)
    shutil.rmtree(parts)
