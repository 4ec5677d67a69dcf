"""What each part of KOALA is worth: its layers and its adversarial term, alone and on top of each other, in words.

The four methods of a head are a two by two design. A part helps if the whole interval of its change lies above zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from koala_bench.records import statistics
from koala_bench.results.tables.rendering import with_interval
from koala_bench.records.statistics import Interval, Statistic
from koala_bench.records.summaries import Sample, Summary

Part = Literal["the layers", "the adversarial term"]
_OTHER: dict[Part, Part] = {"the layers": "the adversarial term", "the adversarial term": "the layers"}
_VERBS = {
    "above zero": "help",
    "below zero": "harm",
    "not distinguishable from zero": "make no difference beyond the interval",
}


@dataclass(frozen=True)
class Effect:
    """What adding something to a method does to its acceptance length and its speed, each in percent.

    Attributes:
        added: the part that ``method`` has and ``against`` has not; None if it has both.
        alone: whether ``against`` is the original head.
    """

    method: str
    against: str
    added: Part | None
    alone: bool
    length: Interval
    speed: Interval


def effects(chosen: Sample, summaries: Sequence[Summary]) -> dict[str, list[Effect]]:
    """The effects of the parts of KOALA, by original head; of a head without variants there are none."""
    found: dict[str, list[Effect]] = {}
    for original in (
        summary for summary in summaries if summary.method["head"] is not None and summary.original is None
    ):
        if original.name not in chosen.totals:
            continue
        variants = {
            _parts(summary, original): summary.name
            for summary in summaries
            if summary.original == original.name and summary.name in chosen.totals
        }
        layers, adversarial, both = (variants.get(parts) for parts in ((True, False), (False, True), (True, True)))
        wanted: list[tuple[str | None, str | None, Part | None]] = [
            (layers, original.name, "the layers"),
            (adversarial, original.name, "the adversarial term"),
            (both, original.name, None),
            (both, adversarial, "the layers"),
            (both, layers, "the adversarial term"),
        ]
        rows = [
            _effect(chosen, new, old, added, old == original.name)
            for new, old, added in wanted
            if new is not None and old is not None
        ]
        if rows:
            found[original.name] = rows
    return found


def _parts(summary: Summary, original: Summary) -> tuple[bool, bool]:
    return summary.method["layers"] > original.method["layers"], summary.method["adversarial"]


def _effect(chosen: Sample, new: str, old: str, added: Part | None, alone: bool) -> Effect:
    def percent(of: tuple[Statistic, Statistic]) -> Interval:
        return chosen.interval(statistics.change_percent(*of))

    return Effect(
        new,
        old,
        added,
        alone,
        percent((chosen.length(new), chosen.length(old))),
        percent((chosen.speedup(new), chosen.speedup(old))),
    )


def _measured(change: Interval) -> str:
    return f"{with_interval(change.value, change.low, change.high, 1, True)} %, {statistics.against_zero(change)}"


def _in_words(effects_of_part: Sequence[Effect], part: Part, measure: Literal["length", "speed"]) -> str:
    said = {each.alone: _VERBS[statistics.against_zero(getattr(each, measure))] for each in effects_of_part}
    verbs = said if part == "the layers" else {alone: _singular(verb) for alone, verb in said.items()}
    if len(set(verbs.values())) == 1 and len(verbs) == 2:
        return f"{part} {verbs[True]}, alone and on top of {_OTHER[part]}"
    places = {True: "alone", False: f"on top of {_OTHER[part]}"}
    return f"{part} " + " and ".join(f"{verbs[alone]} {places[alone]}" for alone in (True, False) if alone in verbs)


def _singular(verb: str) -> str:
    first, space, rest = verb.partition(" ")
    return f"{first}s{space}{rest}"


def verdict_lines(chosen: Sample, summaries: Sequence[Summary]) -> list[str]:
    """One verdict per head on acceptance and on speed, and the changes that it rests on."""
    lines: list[str] = []
    label = summaries[0].target
    of_heads = effects(chosen, summaries)
    for head, rows in of_heads.items():
        by_part: dict[Part, list[Effect]] = {part: [each for each in rows if each.added == part] for part in _OTHER}
        words = []
        measures: tuple[tuple[Literal["length", "speed"], str], ...] = (
            ("length", "Acceptance length"),
            ("speed", "Speed"),
        )
        for measure, name in measures:
            said = [_in_words(of_part, part, measure) for part, of_part in by_part.items() if of_part]
            both = [
                f"both together {_VERBS[statistics.against_zero(getattr(each, measure))]}"
                for each in rows
                if each.added is None
            ]
            words.append(f"{name}: {'; '.join([*said, *both])}.")
        lines.append(f"{head} on {label}. {' '.join(words)}")
        lines += [
            f"{each.method} against {each.against}: acceptance length {_measured(each.length)}; speed"
            f" {_measured(each.speed)}."
            for each in rows
        ]
    count = 2 * sum(len(rows) for rows in of_heads.values())
    return [*lines, statistics.caution(count)] if count else []
