"""Which published order of methods a record bears out: every pair of published systems, by acceptance length and by
speedup.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence

from koala_bench.records import statistics
from koala_bench.results.tables.published import Paper, TaskClaim
from koala_bench.results.tables.rendering import with_interval
from koala_bench.records.statistics import Interval, Statistic
from koala_bench.records.summaries import Sample
from koala_bench.results.tables.tasks import ALL_TASKS

_Value = Callable[[TaskClaim], float | None]


def _ahead(claims: Sequence[TaskClaim], one: str, other: str, value: _Value) -> bool | None:
    """Whether a system is ahead of another wherever both are published together; None where that differs, or nowhere
    are both.
    """
    places: dict[tuple[str, str, str], dict[str, float]] = {}
    for claim in claims:
        if claim.system in (one, other) and (found := value(claim)) is not None:
            places.setdefault((claim.target, claim.device, claim.source), {})[claim.system] = found
    said = {both[one] > both[other] for both in places.values() if len(both) == 2 and both[one] != both[other]}
    return said.pop() if len(said) == 1 else None


def order_lines(chosen: Sample, systems: Mapping[str, str], paper: Paper, target: str) -> list[str]:
    """Sentences on what the measured intervals say of each published order; none where fewer than two of the systems
    were measured.

    Args:
        chosen: turns over all tasks.
        systems: published name -> method that stands for it here.
    """
    claims = [*paper.leaderboard, *paper.by_task]
    here = {system: method for system, method in systems.items() if method in chosen.totals}
    lines = []
    measures: tuple[tuple[str, str, _Value, Callable[[str], Statistic]], ...] = (
        ("acceptance length", "", lambda claim: claim.acceptance_length, chosen.length),
        ("overall speedup", " x", lambda claim: claim.speedup.get(ALL_TASKS), chosen.speedup),
    )
    for what, unit, value, statistic in measures:
        found: dict[str, list[str]] = {"confirmed": [], "contradicted": [], "not decided": []}
        for one, other in itertools.combinations(here, 2):
            if (ahead := _ahead(claims, one, other, value)) is None:
                continue
            first, second = (one, other) if ahead else (other, one)
            gap = chosen.interval(statistics.change(statistic(here[first]), statistic(here[second])))
            found[_verdict(gap)].append(
                f"{first} over {second} ({with_interval(gap.value, gap.low, gap.high, 2, True)}{unit})"
            )
        if count := sum(map(len, found.values())):
            counts = ", ".join(f"{len(pairs)} {verdict}" for verdict, pairs in found.items())
            lines.append(
                f"By {what}, of {count} pairs of systems whose order is the same wherever both are published, on"
                f" {target}: {counts}."
            )
            lines += [
                f"{verdict.capitalize()} by {what}: {', '.join(pairs)}." for verdict, pairs in found.items() if pairs
            ]
    if lines:
        stands = ", ".join(f"{system} is {method}" for system, method in here.items())
        lines.append(
            f"Here {stands}, each with the tree listed below. In brackets: by how much the system that is ahead"
            " elsewhere is ahead here, with its interval."
        )
    return lines


def _verdict(gap: Interval) -> str:
    return {"above zero": "confirmed", "below zero": "contradicted"}.get(statistics.against_zero(gap), "not decided")
