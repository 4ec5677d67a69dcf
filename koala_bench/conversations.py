"""Where training dialogues come from: the documentation corpus, or files of conversations in ShareGPT's form.

A ShareGPT row is ``{"id": ..., "conversations": [{"from": "human", "value": ...}, {"from": "gpt", "value": ...}]}``, in a JSON
array or one a line, plain or gzip-compressed. A row may say ``"split": "train"`` or ``"held_out"``, as those of ``distill`` do.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from koala_bench.corpus import cached_corpus
from koala_bench.dialogues import ChatTemplate, EncodedDialogue, encode_dialogues
from koala_bench.errors import KoalaBenchError
from koala_bench.progress import say
from koala_bench.target import Target

BUNDLED = "bundled"
_HELD_OUT_ONE_IN = 40
# JSON can spell half of a surrogate pair, which neither UTF-8 nor a tokenizer takes.
_LONE_SURROGATE = re.compile("[\\ud800-\\udfff]")
_ROLES = {"human": 0, "user": 0, "gpt": 1, "assistant": 1, "chatgpt": 1, "bing": 1, "bard": 1}


@dataclass(frozen=True)
class Conversations:
    """Dialogues of alternating turns, user first, answer last, with a name for each.

    Attributes:
        provenance: what they were read from, for the manifest.
    """

    train: list[list[str]]
    train_names: list[str]
    held_out: list[list[str]]
    provenance: dict[str, Any]


def bundled_answers() -> Path:
    """The answers of the bundled target to questions of its training corpus, made by ``koala-bench distill``."""
    return Path(__file__).parent / "targets" / "tiny" / "answers.jsonl.gz"


def read_conversations(source: str) -> Conversations:
    """Read ``documentation``, the ``bundled`` answers, or a file of conversations.

    Rows that name no split: one dialogue in forty, chosen by the hash of its text, is held out. The corpus holds out
    whole entries.

    Raises:
        KoalaBenchError: the file is missing, damaged, or holds no dialogue.
    """
    if source == "documentation":
        say("Reading the documentation of the installed packages ...")
        corpus = cached_corpus()
        if corpus.missing:
            say(f"Not installed, so missing from the corpus: {', '.join(corpus.missing)}.")
        provenance: dict[str, Any] = {"source": source, "versions": corpus.versions, "corpus_sha256": corpus.sha256}
        return Conversations(corpus.train, [f"documentation:{i}" for i in range(len(corpus.train))], corpus.held_out, provenance)
    path = bundled_answers() if source == BUNDLED else Path(source)
    train: list[list[str]] = []
    names: list[str] = []
    held_out: list[list[str]] = []
    dropped = 0
    for name, row in _rows(path):
        turns = _turns(row)
        if not turns:
            dropped += 1
        elif _is_held_out(row, turns):
            held_out.append(turns)
        else:
            train.append(turns)
            names.append(name)
    if not train or not held_out:
        raise KoalaBenchError(
            f"{path} holds {len(train)} usable dialogues to train on and {len(held_out)} to hold out.", "Give a file with more conversations."
        )
    if dropped:
        say(f"{path.name}: {dropped} rows without a question followed by an answer were left out.")
    provenance = {"source": path.name, "file_sha256": hashlib.sha256(path.read_bytes()).hexdigest(), "dropped": dropped}
    return Conversations(train, names, held_out, provenance)


def _is_held_out(row: dict[str, Any], turns: Sequence[str]) -> bool:
    split = row.get("split")
    if split in ("train", "held_out"):
        return bool(split == "held_out")
    return hashlib.sha256("\0".join(turns).encode()).digest()[0] * _HELD_OUT_ONE_IN < 256


def _rows(path: Path) -> Iterator[tuple[str, Any]]:
    """Rows of a file with a name for each: file and line, or file and index in an array."""
    try:
        data = path.read_bytes()
        text = (gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data).decode("utf-8-sig")
    except (EOFError, zlib.error, gzip.BadGzipFile, UnicodeDecodeError) as error:
        raise KoalaBenchError(f"{path} is damaged: {error}.", "Fetch it again.") from error
    except OSError as error:
        raise KoalaBenchError(
            f"Cannot read {path}: {error.strerror}.", "Check --set data.source: 'documentation', 'bundled', or a file of conversations."
        ) from error
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


def _turns(row: Any) -> list[str]:
    """Alternating texts from the first question to the last answer; empty if there is no such pair."""
    messages = row.get("conversations") if isinstance(row, dict) else None
    turns: list[str] = []
    for message in messages if isinstance(messages, list) else []:
        role = _ROLES.get(str(message.get("from"))) if isinstance(message, dict) else None
        text = message.get("value") if isinstance(message, dict) else None
        if not isinstance(text, str) or not text.strip() or _LONE_SURROGATE.search(text) or role != len(turns) % 2:
            if not turns:
                continue  # a system message, or an answer to a question that is not there
            break
        turns.append(text.strip())
    return turns[: len(turns) // 2 * 2]


def encode_all(target: Target, template: ChatTemplate, dialogues: Sequence[Sequence[str]]) -> list[EncodedDialogue]:
    """Token ids and answer masks of dialogues.

    Raises:
        KoalaBenchError: the target came without a tokenizer.
    """
    if target.tokenizer is None:
        raise KoalaBenchError(f"{target.name} has no tokenizer.", "Use a checkpoint with a tokenizer.")
    return encode_dialogues(template, target.tokenizer, dialogues)
