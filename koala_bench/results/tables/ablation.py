"""What each part of KOALA is worth: its layers and its adversarial term, alone and on top of each other.

The four methods of a head are a two by two design.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from koala_bench.records import statistics
from koala_bench.records.statistics import Interval
from koala_bench.records.summaries import Sample, Summary
from koala_bench.results.tables.columns import excludes_zero
from koala_bench.results.tables.rendering import Grid, with_interval

_Parts = tuple[bool, bool]  # more layers, adversarial
_CONTRASTS: tuple[tuple[_Parts, _Parts, str], ...] = (
    ((True, False), (False, False), "layers"),
    ((False, True), (False, False), "adversarial term"),
    ((True, True), (False, False), "both"),
    ((True, True), (False, True), "layers"),
    ((True, True), (True, False), "adversarial term"),
)


@dataclass(frozen=True)
class Effect:
    """What adding something to a method changes.

    Attributes:
        added: what ``method`` has and ``against`` has not.
        length, length_percent: of the acceptance length, in tokens per step and in percent.
        speed, speed_percent: of the speedup, in x and in percent.
    """

    method: str
    against: str
    added: str
    length: Interval
    length_percent: Interval
    speed: Interval
    speed_percent: Interval


def effects(chosen: Sample, summaries: Sequence[Summary]) -> list[Effect]:
    """The effects of the parts of KOALA, head by head; a head without variants has none."""
    measured = [each for each in summaries if each.method["head"] is not None and each.name in chosen.totals]
    found = []
    for head in (each for each in measured if each.original is None):
        variants: dict[_Parts, str] = {(False, False): head.name}
        for each in measured:
            other = "objective" in each.method and not each.method["adversarial"]  # a part of KOALA it is not
            if each.original == head.name and not other:
                more = each.method["layers"] > head.method["layers"]
                variants.setdefault((more, each.method["adversarial"]), each.name)
        for new, old, added in _CONTRASTS:
            if new in variants and old in variants:
                found.append(_effect(chosen, variants[new], variants[old], added))
    return found


def _effect(chosen: Sample, new: str, old: str, added: str) -> Effect:
    pairs = [(measure(new), measure(old)) for measure in (chosen.length, chosen.speedup)]
    compared = [change(*pair) for pair in pairs for change in (statistics.change, statistics.change_percent)]
    return Effect(new, old, added, *map(chosen.interval, compared))


def effects_grid(of_targets: Sequence[tuple[str, Sequence[Effect]]]) -> Grid:
    """A row per target and effect; marked are changes whose whole interval lies on one side of zero."""
    rows: list[list[str]] = []
    real: set[tuple[int, int]] = set()
    begins: set[int] = set()
    for target, found in of_targets:
        begins |= {len(rows)}
        for each in found:
            changes = (each.length, each.length_percent, each.speed, each.speed_percent)
            cells = [
                with_interval(change.value, change.low, change.high, digits, True)
                for change, digits in zip(changes, (3, 1, 3, 1), strict=True)
            ]
            real |= {(len(rows), 4 + place) for place, change in enumerate(changes) if excludes_zero(change)}
            rows.append([target, each.method, each.against, each.added, *cells])
    headings = ["Target", "Method", "Against", "Added"]
    headings += ["Change of τ", "Change of τ (%)", "Change of speedup (x)", "Change of speedup (%)"]
    return Grid(headings, rows, [False] * 4 + [True] * 4, frozenset(real), frozenset(begins - {0}))
