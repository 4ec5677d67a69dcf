"""Reads a training log, and compares acceptance as trained with acceptance as decoded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from koala_bench.common.reading import complete_lines, read_bytes
from koala_bench.errors import KoalaBenchError

GAP = 0.10  # relative; a larger one between teacher-forced and decoded acceptance is flagged


def read_training(path: Path) -> list[dict[str, Any]]:
    """The lines of a ``training.jsonl``, a half-written last one left out. Raises KoalaBenchError where there is no
    such file, or a line that training did not write."""
    remedy = "Name the training.jsonl beside trained heads."
    lines = complete_lines(path, read_bytes(path, "training log", remedy), remedy)[0]
    for number, line in enumerate(lines, 1):
        known = line.get("kind") in ("step", "held_out")
        if not (known and isinstance(line.get("step"), int) and isinstance(line.get("method"), str)):
            raise KoalaBenchError(f"{path}:{number}: not a line of a training log.", remedy)
    return lines


@dataclass(frozen=True)
class Agreement:
    """Acceptance rates of one method at one depth, given the depths before: as trained and as decoded, over the same
    steps.

    Attributes:
        step: of the training, when it was measured last.
    """

    method: str
    step: int
    depth: int
    teacher_forced: float
    decoded: float

    @property
    def gap(self) -> float:
        """Decoded against teacher-forced, relative; infinite where only one of them is zero."""
        if self.teacher_forced == self.decoded:
            return 0.0
        return self.decoded / self.teacher_forced - 1 if self.teacher_forced else float("inf")

    @property
    def flagged(self) -> bool:
        """Whether the gap is too large: another template, shifted features or a faulty cache may be the cause."""
        return abs(self.gap) > GAP


def agreements(lines: Sequence[dict[str, Any]]) -> list[Agreement]:
    """The last comparison of each method, depth by depth; empty where the log holds none.

    Args:
        lines: of ``read_training``.
    """
    last: dict[str, dict[str, Any]] = {
        line["method"]: line for line in lines if line["kind"] == "held_out" and "teacher_forced_rate_by_depth" in line
    }
    found = []
    for method, line in last.items():
        pairs = zip(line["teacher_forced_rate_by_depth"], line["decoded_rate_by_depth"], strict=False)
        for depth, (forced, decoded) in enumerate(pairs, 1):
            if forced is not None and decoded is not None:
                found.append(Agreement(method, line["step"], depth, forced, decoded))
    return found
