"""Published values under a table: others' machines and heads, so rows apart from the measured ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from koala_bench.records.reading import Run
from koala_bench.results.tables.published import OwnClaim, Paper, TableSpec, TaskClaim, paper_names
from koala_bench.results.tables.rendering import NOTHING, Grid
from koala_bench.results.tables.tasks import ALL_TASKS, is_named

_Claim = TypeVar("_Claim", OwnClaim, TaskClaim)


def external_table(runs: Sequence[Run], spec: TableSpec, paper: Paper) -> tuple[str, Grid] | None:
    """A title and the published rows that belong under a table.

    Rows of the records' targets; under Tables 2, 3 and the leaderboard of every target where none is published for
    theirs.
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
    return (title, table) if table.rows else None


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
    rows = [claim for claim in claims if set(shown) & set(claim.speedup)]
    tasks = [task for task in shown if any(task in claim.speedup for claim in rows)]
    cells = []
    for claim in rows:
        speeds = [_number(claim.speedup.get(task)) for task in (*tasks, ALL_TASKS)]
        length = _number(claim.acceptance_length)
        cells.append([claim.system, claim.target, claim.device, *speeds[:-1], length, speeds[-1], claim.source])
    headings = ["System", "Target", "Device", *(task.capitalize() for task in tasks)]
    headings += ["Acceptance length τ", ALL_TASKS.capitalize(), "Source"]
    return _without_empty(Grid(headings, cells, [False] * 3 + [True] * (len(tasks) + 2) + [False]))


def _original_heads(own: Sequence[OwnClaim], overall: Sequence[TaskClaim]) -> Grid:
    cells = [
        [each.system, each.target, f"MT-bench (temperature {each.temperature})", NOTHING, *speeds, each.source]
        for each, speeds in ((claim, (_number(claim.speedup), NOTHING)) for claim in own)
    ]
    cells += [
        [each.system, each.target, "Spec-Bench", each.device, *speeds, each.source]
        for each, speeds in (
            (claim, (_number(claim.speedup[ALL_TASKS]), _number(claim.acceptance_length))) for claim in overall
        )
    ]
    headings = ["System", "Target", "Questions", "Device", "Speedup (x)", "Acceptance length τ", "Source"]
    return _without_empty(Grid(headings, cells, [False] * 4 + [True] * 2 + [False]))


def _without_empty(table: Grid) -> Grid:
    """The table without columns in which nothing stands."""
    kept = [place for place in range(len(table.headings)) if any(row[place] != NOTHING for row in table.rows)]
    rows = [[row[place] for place in kept] for row in table.rows]
    return Grid([table.headings[place] for place in kept], rows, [table.right[place] for place in kept])
