"""What each part is worth: more layers and another objective, alone and on top of each other.

The methods of a head are a design of layers by objectives; KOALA's is two by two.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from koala_bench.presets import cut_of
from koala_bench.records import statistics
from koala_bench.records.statistics import Interval
from koala_bench.records.summaries import Sample, Summary
from koala_bench.results.tables.rendering import Grid, with_interval

_Parts = tuple[int, str | None]  # layers, how it is trained otherwise than the head alone
_ADVERSARIAL = "adversarial term"
_CHANGES = {"Change of τ": 3, "Change of τ (%)": 1, "Change of speedup (x)": 3, "Change of speedup (%)": 1}  # digits


@dataclass(frozen=True)
class Effect:
    """What adding a part to the method ``against`` changes: acceptance length and speedup, each also in percent."""

    method: str
    against: str
    added: str
    length: Interval
    length_percent: Interval
    speed: Interval
    speed_percent: Interval


def effects(chosen: Sample, summaries: Sequence[Summary]) -> list[Effect]:
    """The effects of layers and objectives, head by head, and of heads of equal draft vocabularies, cut or trained on
    it; a head without variants has none."""
    measured = [each for each in summaries if each.method["head"] is not None and each.name in chosen.totals]
    alike: dict[tuple[str, int | None, bool], list[Summary]] = {}
    for each in sorted(measured, key=lambda each: each.original is not None):
        key = (each.original or each.name, each.method.get("draft_vocabulary"), cut_of(each.name) is not None)
        alike.setdefault(key, []).append(each)
    found = []
    for group in alike.values():
        few = group[0].method["layers"]
        variants: dict[_Parts, str] = {}
        for each in group:
            variants.setdefault((max(each.method["layers"], few), _objective(each)), each.name)
        for new, old, added in _contrasts(variants, few):
            if new in variants and old in variants:
                changes = (
                    chosen.interval(change(measure(variants[new]), measure(variants[old])))
                    for measure in (chosen.length, chosen.speedup)
                    for change in (statistics.change, statistics.change_percent)
                )
                found.append(Effect(variants[new], variants[old], added, *changes))
    return found


def _objective(summary: Summary) -> str | None:
    """What a method calls its objective: it may have options, and so may its head, which one name stands for."""
    if summary.method["adversarial"]:
        return _ADVERSARIAL
    if "objective" not in summary.method:
        return None
    name, _ = cut_of(summary.name) or (summary.name, None)
    return name.removeprefix(f"{summary.original}+").removesuffix("+layers")


def _contrasts(variants: Iterable[_Parts], few: int) -> Iterator[tuple[_Parts, _Parts, str]]:
    """Each part alone, both, and each on top of the other; KOALA's own objective before all others."""
    counts = sorted({layers for layers, _ in variants} - {few})
    objectives = dict.fromkeys([_ADVERSARIAL, *(objective for _, objective in variants if objective)])
    for many in counts:
        yield (many, None), (few, None), f"{many} layers"
    for objective in objectives:
        yield (few, objective), (few, None), objective
        for many in counts:
            yield (many, objective), (few, None), "both"
            yield (many, objective), (few, objective), f"{many} layers"
            yield (many, objective), (many, None), objective


def effects_grid(of_targets: Sequence[tuple[str, Sequence[Effect]]]) -> Grid:
    """A row per target and effect; marked are changes whose whole interval lies on one side of zero."""
    rows: list[list[str]] = []
    real: set[tuple[int, int]] = set()
    begins: set[int] = set()
    for target, found in of_targets:
        begins |= {len(rows)}
        for each in found:
            changes = (each.length, each.length_percent, each.speed, each.speed_percent)
            real |= {(len(rows), 4 + place) for place, change in enumerate(changes) if statistics.excludes_zero(change)}
            cells = (with_interval(*pair, True) for pair in zip(changes, _CHANGES.values(), strict=True))
            rows.append([target, each.method, each.against, each.added, *cells])
    headings = ["Target", "Method", "Against", "Added", *_CHANGES]
    return Grid(headings, rows, [False] * 4 + [True] * 4, frozenset(real), frozenset(begins - {0}))
