"""A file of a target's own answers and the manifest beside it: whose answers they are, and what they were made from."""

from __future__ import annotations

import gzip
import hashlib
import json
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from koala_bench.common.files import replacing, write_text
from koala_bench.common.progress import log_line
from koala_bench.common.reading import object_in
from koala_bench.dialogues.conversations import MANIFEST
from koala_bench.dialogues.encoding import ChatTemplate
from koala_bench.engine.loading.targets import fingerprint
from koala_bench.engine.target import Target
from koala_bench.errors import KoalaBenchError


def manifest_of(answers: Path) -> Path:
    """Where the manifest of a file of answers lies."""
    return answers.with_name(f"{answers.name.removesuffix('.gz').removesuffix('.jsonl')}{MANIFEST}")


def identity_for(target: Target, template: ChatTemplate, source: Any, options: dict[str, Any]) -> dict[str, Any]:
    """What answers depend on."""
    return {
        "target": {"name": target.name, **fingerprint(target)},
        "source": source,
        "chat_template": template.sha256,
        "dtype": str(target.dtype).removeprefix("torch."),
        "options": options,
    }


def identity_of(out: Path) -> Any:
    """What the manifest beside a file says it was made from; None where there is none that can be read."""
    return (object_in(manifest_of(out)) or {}).get("identity")


def is_made(out: Path, identity: dict[str, Any]) -> bool:
    """Whether a file was made already from just this; raises KoalaBenchError where it was made with other settings."""
    if not out.exists():
        return False
    if identity_of(out) != identity:
        raise KoalaBenchError(f"{out} exists and was made with other settings.", "Choose another --out, or delete it.")
    log_line(f"Reusing {out}: it was made by the same command.")
    return True


def answering_target(source: Path) -> dict[str, str] | None:
    """Name and hashes of the target whose answers a file of conversations holds; None if no manifest of ``distill``
    lies beside it. Raises KoalaBenchError where the manifest is damaged."""
    manifest = manifest_of(source)
    try:
        found = json.loads(manifest.read_bytes())
        if isinstance(found, dict) and "identity" not in found:
            return None  # somebody else's
        target = found["identity"]["target"]
        if not all(isinstance(target[key], str) for key in ("name", "weights_sha256")):
            raise TypeError
    except (OSError, UnicodeEncodeError):  # there is none
        return None
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise KoalaBenchError(
            f"{manifest} does not say whose answers {source.name} holds: it is damaged.",
            "Delete it, or make the answers again with koala-bench distill.",
        ) from error
    return dict(target)


def messages_of(turns: Sequence[str], cut: Collection[int]) -> list[dict[str, Any]]:
    """The turns in ShareGPT's form; ``cut`` are the answers that a limit ended."""
    return [
        {"from": ("human", "gpt")[place % 2], "value": text, **({"cut": True} if place in cut else {})}
        for place, text in enumerate(turns)
    ]


def write_answers(
    out: Path, rows: Sequence[dict[str, Any]], identity: dict[str, Any], more_counts: dict[str, Any]
) -> None:
    """Write rows of conversations, gzip-compressed if the name ends in ``.gz``, and their manifest."""
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    data = gzip.compress(text, mtime=0) if out.name.endswith(".gz") else text
    answers = [message for row in rows for message in row["conversations"] if message["from"] == "gpt"]
    cut = sum("cut" in one for one in answers)
    counts = {"dialogues": len(rows), "answers": len(answers), "cut_answers": cut, **more_counts}
    manifest = {"identity": identity, "counts": counts, "sha256": hashlib.sha256(data).hexdigest()}
    # First the manifest: killed in between, the same command goes on from what is there and writes both again.
    write_text(manifest_of(out), json.dumps(manifest, indent=2) + "\n")
    with replacing(out) as temporary:
        temporary.write_bytes(data)
