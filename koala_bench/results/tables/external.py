"""Published values under a table, apart from the measured rows, since machines and heads differ."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

from koala_bench.records.reading import Run
from koala_bench.results.tables.published import OwnClaim, Paper, TableSpec, TaskClaim, paper_names
from koala_bench.results.tables.rendering import NOTHING, Grid, grid_of
from koala_bench.results.tables.tasks import ALL_TASKS, is_named

_Claim = TypeVar("_Claim", OwnClaim, TaskClaim)


def external_table(runs: Sequence[Run], spec: TableSpec, paper: Paper) -> list[tuple[str, Grid]]:
    """A title and the published rows for a table: those of the records' targets, or, under Tables 2, 3 and the
    leaderboard, of all targets if none is published for these.
    """
    names = {name for run in runs for name in paper_names(run)}
    title = "Published elsewhere, not measured here"
    if spec.by == "task":
        table = _by_task(runs, spec, _of_targets(paper.by_task, names))
        title = "Published elsewhere: speedup (x) of the original heads, not measured here"
    elif spec.by == "method":
        claims = [*paper.leaderboard, *paper.by_task]
        claims.sort(key=lambda each: (len(each.target), each.target, each.device, -each.speedup.get(ALL_TASKS, 0)))
        table = _by_task(runs, spec, _of_targets(claims, names))
        title = "Published elsewhere: speedup (x), not measured here"
    elif spec.by == "part":
        overall = _of_targets([each for each in paper.by_task if ALL_TASKS in each.speedup], names)
        table = _original_heads(_of_targets(paper.own_claims, names), overall)
    else:
        table = _original_heads([each for each in paper.own_claims if each.target in names], [])
    return [(title, table)]


def _of_targets(claims: Sequence[_Claim], names: set[str]) -> list[_Claim]:
    return [claim for claim in claims if claim.target in names] or list(claims)


def _number(value: float | str | None) -> str:
    return NOTHING if value is None else value if isinstance(value, str) else f"{value:.2f}"


def _by_task(runs: Sequence[Run], spec: TableSpec, claims: Sequence[TaskClaim]) -> Grid:
    """The tasks of the records' own categories where something is published on these, of the table's tasks otherwise;
    the speedup over all tasks stands last, as in Spec-Bench's own table.
    """
    own = list(dict.fromkeys(turn["category"] for run in runs if not is_named(run, spec) for turn in run.turns))
    named = [task.name for task in spec.tasks]
    shown = next((tasks for tasks in (own, named) if any(set(tasks) & set(each.speedup) for each in claims)), [])
    rows = [
        {"System": claim.system, "Target": claim.target, "Device": claim.device}
        | {task.capitalize(): _number(claim.speedup.get(task)) for task in shown}
        | {"Acceptance length τ": _number(claim.acceptance_length)}
        | {ALL_TASKS.capitalize(): _number(claim.speedup.get(ALL_TASKS)), "Source": claim.source}
        for claim in claims
        if set(shown) & set(claim.speedup)
    ]
    return _without_empty(rows)


def _original_heads(own: Sequence[OwnClaim], overall: Sequence[TaskClaim]) -> Grid:
    each: list[tuple[Any, str, str, float | str, float | None]]
    each = [(claim, f"MT-bench (temperature {claim.temperature})", NOTHING, claim.speedup, None) for claim in own]
    each += [(one, "Spec-Bench", one.device, one.speedup[ALL_TASKS], one.acceptance_length) for one in overall]
    rows = [
        {"System": claim.system, "Target": claim.target, "Questions": questions, "Device": device}
        | {"Speedup (x)": _number(speedup), "Acceptance length τ": _number(length), "Source": claim.source}
        for claim, questions, device, speedup, length in each
    ]
    return _without_empty(rows)


def _without_empty(rows: list[dict[str, str]]) -> Grid:
    """The table without its empty columns."""
    kept = [heading for heading in rows[0] if any(row[heading] != NOTHING for row in rows)] if rows else []
    left = ("System", "Target", "Questions", "Device", "Source")
    return grid_of([{heading: row[heading] for heading in kept} for row in rows], left)
