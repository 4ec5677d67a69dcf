"""The table of published values under Tables 2 and 3: others' machines and heads, so rows apart from the measured ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from koala_bench.results.tables.published import OwnClaim, Paper, TableSpec, TaskClaim, paper_names
from koala_bench.records.reading import Run
from koala_bench.results.tables.rendering import Grid
from koala_bench.results.tables.tasks import ALL_TASKS, is_named

_NOT_STATED = "\N{EN DASH}"


def external_table(runs: Sequence[Run], spec: TableSpec, paper: Paper) -> tuple[str, Grid] | None:
    """A title and the published rows that belong under a table; Table 1 has its own in its notes.

    Rows of the records' targets, or of every target where none is published for theirs.
    """
    names = {name for run in runs for name in paper_names(run)}
    if spec.by == "task":
        return _by_task(
            runs,
            spec,
            _of_targets(paper.by_task, names),
            "Published elsewhere: speedup (x) of the original heads, not measured here",
        )
    if spec.by == "method":
        claims = [*paper.leaderboard, *paper.by_task]
        ranked = sorted(
            claims, key=lambda claim: (len(claim.target), claim.target, claim.device, -claim.speedup.get(ALL_TASKS, 0))
        )
        return _by_task(runs, spec, _of_targets(ranked, names), "Published elsewhere: speedup (x), not measured here")
    if spec.by == "part":
        return _original_heads(
            _of_targets(paper.own_claims, names),
            _of_targets([each for each in paper.by_task if ALL_TASKS in each.speedup], names),
        )
    return None


_Claim = TypeVar("_Claim", OwnClaim, TaskClaim)


def _of_targets(claims: Sequence[_Claim], names: set[str]) -> list[_Claim]:
    return [claim for claim in claims if claim.target in names] or list(claims)


def _number(value: float | str | None) -> str:
    return _NOT_STATED if value is None else value if isinstance(value, str) else f"{value:.2f}"


def _by_task(runs: Sequence[Run], spec: TableSpec, claims: Sequence[TaskClaim], title: str) -> tuple[str, Grid] | None:
    named = [task.name for task in spec.tasks]
    own = list(dict.fromkeys(turn["category"] for run in runs if not is_named(run, spec) for turn in run.turns))
    shown = next((tasks for tasks in (own, named) if any(set(tasks) & set(claim.speedup) for claim in claims)), [])
    rows = [claim for claim in claims if set(shown) & set(claim.speedup)]
    if not rows:
        return None
    tasks = [task for task in shown if any(task in claim.speedup for claim in rows)]
    # As in the measured leaderboard and in Spec-Bench's own, the speedup over all tasks stands last.
    whole = [ALL_TASKS] if any(ALL_TASKS in claim.speedup for claim in rows) else []
    lengths = any(claim.acceptance_length is not None for claim in rows)
    cells = [
        [
            claim.system,
            claim.target,
            claim.device,
            *(_number(claim.speedup.get(task)) for task in tasks),
            *([_number(claim.acceptance_length)] if lengths else []),
            *(_number(claim.speedup.get(task)) for task in whole),
            claim.source,
        ]
        for claim in rows
    ]
    length = ["Acceptance length τ"] if lengths else []
    headings = [
        "System",
        "Target",
        "Device",
        *(task.capitalize() for task in tasks),
        *length,
        *(task.capitalize() for task in whole),
        "Source",
    ]
    right = [False, False, False, *([True] * (len(headings) - 4)), False]
    return title, Grid(headings, cells, right)


def _original_heads(own: Sequence[OwnClaim], overall: Sequence[TaskClaim]) -> tuple[str, Grid] | None:
    cells = [
        [
            each.system,
            each.target,
            f"MT-bench (temperature {each.temperature})",
            _NOT_STATED,
            _number(each.speedup),
            _NOT_STATED,
            each.source,
        ]
        for each in own
    ]
    cells += [
        [
            each.system,
            each.target,
            "Spec-Bench",
            each.device,
            _number(each.speedup[ALL_TASKS]),
            _number(each.acceptance_length),
            each.source,
        ]
        for each in overall
    ]
    if not cells:
        return None
    headings = ["System", "Target", "Questions", "Device", "Speedup (x)", "Acceptance length τ", "Source"]
    return "Published elsewhere: the original heads, not measured here", Grid(
        headings, cells, [False, False, False, False, True, True, False]
    )
