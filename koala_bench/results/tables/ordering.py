"""Whether the published order of methods holds in a record: every pair of published systems, by acceptance length and
by speedup.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

from koala_bench.records import statistics
from koala_bench.records.summaries import Sample
from koala_bench.results.tables.published import Paper, TaskClaim
from koala_bench.results.tables.rendering import NOTHING, Grid, with_interval
from koala_bench.results.tables.tasks import ALL_TASKS

_Value = Callable[[TaskClaim], float | None]
_VERDICTS = {"above zero": "confirmed", "below zero": "contradicted", "not distinguishable from zero": "not decided"}
_MEASURES: dict[str, _Value] = {
    "τ": lambda claim: claim.acceptance_length,
    "speedup (x)": lambda claim: claim.speedup.get(ALL_TASKS),
}


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


def order_grid(chosen: Sample, systems: Mapping[str, str], paper: Paper) -> tuple[Grid, list[str]] | None:
    """Each published pair with the measured gap and its verdict, and lines that count the verdicts; None where fewer
    than two of the systems were measured.

    Args:
        chosen: turns over all tasks.
        systems: published name -> method that stands for it here.
    """
    claims = [*paper.leaderboard, *paper.by_task]
    here = {system: method for system, method in systems.items() if method in chosen.totals}
    statistic = {"τ": chosen.length, "speedup (x)": chosen.speedup}
    cells: dict[tuple[str, str], dict[str, str]] = {}
    counts: dict[str, Counter[str]] = {name: Counter() for name in _MEASURES}
    for name, value in _MEASURES.items():
        for one, other in itertools.combinations(here, 2):
            if (ahead := _ahead(claims, one, other, value)) is None:
                continue
            first, second = (one, other) if ahead else (other, one)
            gap = chosen.interval(statistics.change(*(statistic[name](here[each]) for each in (first, second))))
            verdict = _VERDICTS[statistics.against_zero(gap)]
            counts[name][verdict] += 1
            measured = with_interval(gap.value, gap.low, gap.high, 2, True)
            cells.setdefault((first, second), {})[name] = f"{measured}: {verdict}"
    if not cells:
        return None
    rows = [[*pair, *(of.get(name, NOTHING) for name in _MEASURES)] for pair, of in cells.items()]
    lines = [
        f"By {name}: "
        + ", ".join(f"{found[verdict]} of {found.total()} {verdict}" for verdict in _VERDICTS.values())
        + "."
        for name, found in counts.items()
        if found
    ]
    lines.append(
        "A pair is listed if one of the two is ahead wherever both are published. The gap is by how much it is ahead"
        f" here. {', '.join(f'{system} is {method}' for system, method in here.items())}."
    )
    headings = ["Published ahead", "Published behind", *(f"Gap in {name}" for name in _MEASURES)]
    return Grid(headings, rows, [False, False, True, True]), lines
