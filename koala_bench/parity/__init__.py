"""Numerical parity with the official Medusa and EAGLE code, judged on a folder of recorded inputs, weights and outputs.

In: the folder, from which sizes, trees, prompts and numbers of heads are all read. Its parts are ``medusa_tiny``,
``medusa_decode``, ``eagle_tiny``, ``eagle_decode`` and ``losses``, laid out as in the README that comes with the
recordings; a part that is missing is skipped by name. Out: agreement or the place of the first difference.
Read ``shared`` first.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from koala_bench.errors import KoalaBenchError
from koala_bench.parity.eagle import eagle_decode, eagle_losses, eagle_tiny
from koala_bench.parity.medusa import medusa_decode, medusa_losses, medusa_tiny
from koala_bench.parity.shared import Check, Recordings, ok, skipped

__all__ = ["PARTS", "Check", "check", "ok", "report"]

_WORDS = {"pass": "passed", "fail": "failed", "skip": "skipped", "unsupported": "unsupported"}
PARTS = ("medusa_tiny", "medusa_decode", "eagle_tiny", "eagle_decode", "losses")


def check(folder: Path) -> list[Check]:
    """Compare the project with everything in a folder of recordings. Raises KoalaBenchError where the folder holds no
    recordings, or a file in it is damaged or lacks a field."""
    if not any((folder / part).is_dir() for part in PARTS):
        fault = f"{folder} holds none of {', '.join(PARTS)}." if folder.is_dir() else f"There is no folder {folder}."
        raise KoalaBenchError(fault, "Give a folder of recordings of the official code.")
    recordings = Recordings(folder)
    checks: list[Check] = []
    for part, run in zip(PARTS, (medusa_tiny, medusa_decode, eagle_tiny, eagle_decode, _losses), strict=True):
        checks += run(recordings, part) if (folder / part).is_dir() else [Check(part, "skip", f"{part} is absent")]
    return checks


def report(checks: Sequence[Check]) -> str:
    """A line for each check, then how many there were of each status."""
    width = max((len(each.name) for each in checks), default=0)
    lines = [f"{each.status:<11}  {each.name:<{width}}  {each.detail}".rstrip() for each in checks]
    counts: Counter[str] = Counter(each.status for each in checks)
    last = ", ".join(f"{counts[status]} {word}" for status, word in _WORDS.items())
    return "\n".join([*lines, last])


def _losses(recordings: Recordings, part: str) -> list[Check]:
    checks: list[Check] = []
    for kind, run, head, batch in (
        ("medusa", medusa_losses, "medusa_decode/heads", "medusa_batch"),
        ("eagle", eagle_losses, "eagle_decode/draft", "eagle"),
    ):
        name = f"{part}/{kind}"
        files = ("medusa_decode/target", head, f"{part}/{batch}.safetensors", f"{name}_loss.json")
        absent = recordings.absent(*files)
        checks += skipped(name, absent) if absent else run(recordings, name, recordings.target(files[0]), files)
    return checks
