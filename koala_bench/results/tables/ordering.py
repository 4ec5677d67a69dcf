"""Tests the published order of methods: every pair of published systems, by acceptance length and speedup."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence

from koala_bench.records import statistics
from koala_bench.records.summaries import Sample
from koala_bench.results.tables.published import Paper, TaskClaim
from koala_bench.results.tables.rendering import Grid, grid_of, with_interval
from koala_bench.results.tables.tasks import ALL_TASKS

_Value = Callable[[TaskClaim], float | None]


def _ahead(claims: Sequence[TaskClaim], one: str, other: str, value: _Value) -> bool | None:
    """Whether a system is ahead of another in all publications of both; None if these disagree or there are none."""
    places: dict[tuple[str, str, str], dict[str, float]] = {}
    for claim in claims:
        if claim.system in (one, other) and (published := value(claim)) is not None:
            places.setdefault((claim.target, claim.device, claim.source), {})[claim.system] = published
    orders = {both[one] > both[other] for both in places.values() if len(both) == 2 and both[one] != both[other]}
    return orders.pop() if len(orders) == 1 else None


def order_grid(chosen: Sample, systems: Mapping[str, str], paper: Paper) -> Grid:
    """Each published pair with its measured gap; marked are gaps whose whole interval lies on one side of zero.

    Args:
        chosen: turns over all tasks.
        systems: published name -> method that stands for it here.
    """
    claims = [*paper.leaderboard, *paper.by_task]
    here = {system: method for system, method in systems.items() if method in chosen.totals}
    measures: dict[str, tuple[_Value, Callable[[str], statistics.Statistic]]] = {
        "τ": (lambda claim: claim.acceptance_length, chosen.length),
        "speedup (x)": (lambda claim: claim.speedup.get(ALL_TASKS), chosen.speedup),
    }
    gaps: dict[tuple[str, str], dict[str, statistics.Interval]] = {}
    for name, (value, statistic) in measures.items():
        for pair in itertools.combinations(here, 2):
            if (ahead := _ahead(claims, *pair, value)) is not None:
                first, second = pair if ahead else pair[::-1]
                gap = statistics.change(statistic(here[first]), statistic(here[second]))
                gaps.setdefault((first, second), {})[name] = chosen.interval(gap)
    table = grid_of(
        [
            {"Published ahead": f"{first} ({here[first]})", "Published behind": f"{second} ({here[second]})"}
            | {f"Gap in {name}": with_interval(of.get(name), 2, True) for name in measures}
            for (first, second), of in gaps.items()
        ],
        ["Published ahead", "Published behind"],
    )
    marked = {
        (row, 2 + column)
        for row, of in enumerate(gaps.values())
        for column, name in enumerate(measures)
        if name in of and statistics.excludes_zero(of[name])
    }
    return Grid(table.headings, table.rows, table.right, frozenset(marked))
