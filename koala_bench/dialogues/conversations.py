"""Where training dialogues come from: files of conversations, or those of a data set on the hub.

A file is a JSON array of rows or has one a line, plain or gzip-compressed, or is Parquet. ``rows`` says what a row may
look like. It may say ``"split": "train"`` or ``"held_out"``, as those of ``distill`` do.
"""

from __future__ import annotations

import gzip
import hashlib
import itertools
import json
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from koala_bench.common.bundled import PACKAGE
from koala_bench.common.files import cannot
from koala_bench.common.progress import log_line
from koala_bench.common.suggestions import did_you_mean
from koala_bench.dialogues.encoding import ChatTemplate, EncodedDialogue, encode_dialogues, encode_prompt
from koala_bench.dialogues.hub import HUB, fetch_dialogues
from koala_bench.dialogues.parquet import parquet_rows
from koala_bench.dialogues.rows import read_row
from koala_bench.engine.loading.token_ids import refuse_unknown_ids
from koala_bench.engine.target import Target
from koala_bench.errors import KoalaBenchError

BUNDLED = "bundled"
PARQUET = ".parquet"
MANIFEST = ".manifest.json"  # how the names of manifests end that ``distill`` writes beside its answers
_HELD_OUT_ONE_IN = 40


@dataclass(frozen=True)
class Conversations:
    """Dialogues of alternating turns, user first, answer last, with a name for each.

    Attributes:
        provenance: what they were read from, for the manifest; what was made of it by ``distill`` is known by it.
        rows: how many were read as a whole, in part and not at all, the latter two by reason.
    """

    train: list[list[str]]
    train_names: list[str]
    held_out: list[list[str]]
    provenance: dict[str, Any]
    rows: dict[str, Any] = field(default_factory=dict)


def bundled_answers(source: str) -> Path | None:
    """The answers that ship with the project and were made by ``koala-bench distill``: ``bundled``, those of the
    bundled target, or ``bundled:NAME``; None for any other source. Raises KoalaBenchError where none of that name
    ship."""
    kind, _, name = source.partition(":")
    if kind != BUNDLED:
        return None
    path = PACKAGE / "targets" / (name or "tiny") / "answers.jsonl.gz"
    if not path.is_file():
        known = sorted(each.parent.name for each in (PACKAGE / "targets").glob("*/answers.jsonl.gz"))
        raise KoalaBenchError(
            f"There are no bundled answers '{name}'.",
            did_you_mean(name, known, f"Use bundled:NAME with {', '.join(known)}."),
        )
    return path


def read_conversations(source: str, template: ChatTemplate | None = None) -> Conversations:
    """Read conversations from ``bundled``, ``bundled:NAME``, a file, a folder, or ``hub:OWNER/NAME``, with ``:FILE`` if
    it has several.

    A folder stands for its ``.json`` and ``.jsonl`` files, plain or ``.gz``, and ``.parquet`` files, sorted by name;
    subfolders are not read.

    If rows name no split, one dialogue in forty is held out, chosen by the hash of its text.

    Args:
        template: what the dialogues will be shown in: rows that it cannot show, and text that it has not formatted, are
            counted. Without one preformatted text is not read.

    Raises:
        KoalaBenchError: the file is missing, damaged, or holds no dialogue.
    """
    path = _path_of(source)
    train: list[list[str]] = []
    names: list[str] = []
    held_out: list[list[str]] = []
    dropped: Counter[str] = Counter()
    shortened: Counter[str] = Counter()
    paths = files_of(path)
    for name, row in itertools.chain.from_iterable(map(_rows, paths)):
        turns, reason = read_row(row, template)
        if not turns:
            dropped[str(reason)] += 1
            continue
        if reason is not None:
            shortened[reason] += 1
        if _is_held_out(row, turns):
            held_out.append(turns)
        else:
            train.append(turns)
            names.append(name)
    if not train or not held_out:
        why = f" {dropped.total():,} rows are of no use: {counted(dropped)}." if dropped else ""
        raise KoalaBenchError(
            f"{path} holds {len(train)} usable dialogues to train on and {len(held_out)} to hold out.{why}",
            f"Give a file {'with more' if train or held_out else 'whose rows hold'} conversations.",
        )
    if dropped:
        log_line(
            f"{path.name}: {dropped.total():,} rows without a question followed by an answer are left out:"
            f" {counted(dropped)}."
        )
    if shortened:
        log_line(f"{path.name}: {shortened.total():,} rows are read in part: {counted(shortened)}.")
    provenance = {
        "source": source if source.startswith(HUB) else path.name, **_hashes(paths, paths != [path]),
        "dropped": dropped.total(), "shortened": dict(sorted(shortened.items())),
    }  # fmt: skip
    rows = {
        "whole": len(train) + len(held_out) - shortened.total(),
        "in_part": dict(sorted(shortened.items())),
        "left_out": dict(sorted(dropped.items())),
    }
    return Conversations(train, names, held_out, provenance, rows)


def counted(reasons: Counter[str]) -> str:
    """Reasons with how often each was met, the commonest first."""
    return ", ".join(f"{reason} ({count:,})" for reason, count in reasons.most_common())


def files_of(path: Path) -> list[Path]:
    """The files of conversations that a path means: itself, or those of a folder but for manifests of ``distill``.
    Raises KoalaBenchError where a folder holds none."""
    try:
        inside = sorted(path.iterdir())
    except OSError:  # a file, or nothing that there is: opening it tells
        return [path]
    kinds = (".json", ".jsonl", ".json.gz", ".jsonl.gz", PARQUET)
    paths = [
        each for each in inside if each.name.endswith(kinds) and not each.name.endswith(MANIFEST) and each.is_file()
    ]
    if not paths:
        raise KoalaBenchError(
            f"The folder {path} has no .json, .jsonl or .parquet file of conversations.", "Check --set data.source."
        )
    return paths


def content_of(source: str) -> list[str] | None:
    """Hashes of the files of a source, in their order; None where they cannot be read."""
    try:
        return list(map(_sha256, files_of(_path_of(source))))
    except OSError:
        return None


def _path_of(source: str) -> Path:
    return bundled_answers(source) or (fetch_dialogues(source) if source.startswith(HUB) else Path(source))


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _hashes(paths: Sequence[Path], several: bool) -> dict[str, Any]:
    hashes = {path.name: _sha256(path) for path in paths}
    return {"files_sha256": hashes} if several else {"file_sha256": hashes[paths[0].name]}


def _is_held_out(row: dict[str, Any], turns: Sequence[str]) -> bool:
    if (split := row.get("split")) in ("train", "held_out"):
        return bool(split == "held_out")
    return hashlib.sha256("\0".join(turns).encode()).digest()[0] * _HELD_OUT_ONE_IN < 256


def _rows(path: Path) -> Iterator[tuple[str, Any]]:
    """Rows of a file with a name for each: file and line, or file and index in an array."""
    if path.suffix == PARQUET and path.is_file():
        yield from parquet_rows(path)
        return
    try:
        data = path.read_bytes()
        text = (gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data).decode("utf-8-sig")
    except (EOFError, zlib.error, gzip.BadGzipFile, UnicodeDecodeError) as error:
        raise KoalaBenchError(f"{path} is damaged: {error}.", "Fetch it again.") from error
    except OSError as error:
        remedy = "Check --set data.source: 'bundled', a file or folder of conversations, or 'hub:OWNER/NAME'."
        raise cannot("read", path, error, remedy) from error
    if text.lstrip().startswith("["):
        try:
            yield from ((f"{path.name}[{index}]", row) for index, row in enumerate(json.loads(text)))
        except (ValueError, RecursionError) as error:
            raise KoalaBenchError(f"{path} is not valid JSON: {error}.", "Mend the file.") from error
        return
    # Not splitlines(): a text may hold U+2028 and others that it takes for line ends.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                yield f"{path.name}:{number}", json.loads(line)
            except (ValueError, RecursionError) as error:
                raise KoalaBenchError(f"{path}, line {number} is not valid JSON: {error}.", "Mend the line.") from error


def encode_all(target: Target, template: ChatTemplate, dialogues: Sequence[Sequence[str]]) -> list[EncodedDialogue]:
    """Token ids and answer masks of dialogues; raises KoalaBenchError where the target came without a tokenizer, or a
    dialogue has a token that the target does not know."""
    if target.tokenizer is None:
        raise KoalaBenchError(f"{target.name} has no tokenizer.", "Use a checkpoint with a tokenizer.")
    encoded = encode_dialogues(template, target.tokenizer, dialogues)
    for turns, each in zip(dialogues, encoded, strict=True):
        what = f"The dialogue that begins {turns[0][:40]!r}"
        refuse_unknown_ids(target.name, target.tokenizer, each.ids, target.config.vocab_size, what)
    return encoded


def held_out_prompts(target: Target, template: ChatTemplate, source: str, count: int, longest: int) -> list[list[int]]:
    """First questions of held-out dialogues as token ids, the first ``count`` that are shorter than ``longest``; there
    may be fewer. Raises KoalaBenchError as ``read_conversations``, or where the target came without a tokenizer."""
    if target.tokenizer is None:
        raise KoalaBenchError(f"{target.name} has no tokenizer.", "Use a checkpoint with a tokenizer.")
    prompts = (
        list(encode_prompt(template, target.tokenizer, turns[:1]))
        for turns in read_conversations(source, template).held_out
    )
    return list(itertools.islice((prompt for prompt in prompts if len(prompt) < longest), count))
