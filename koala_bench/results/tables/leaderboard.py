"""The leaderboard: a row per method and a column per task, as Spec-Bench prints it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from koala_bench.results.tables.columns import COLUMNS, Column, fastest, is_real
from koala_bench.results.tables.rendering import NOTHING, Grid, with_interval
from koala_bench.results.tables.tasks import ALL_TASKS

_Row = dict[str, Any]
_SPEEDUP, _WHOLE, _LENGTH = (COLUMNS[name][0] for name in ("speedup", "whole_answer", "acceptance_length"))
_OVERALL = replace(_SPEEDUP, heading="Overall speedup (x)")
_RATE = Column("", lambda row: with_interval(replace(row["speedup"], low=math.nan), 2))
_PLAIN_LENGTH = replace(_LENGTH, cell=lambda row: with_interval(replace(row["acceptance_length"], low=math.nan), 2))


def whole_rows(rows: Sequence[_Row]) -> list[_Row]:
    """The rows over all tasks; those of the only task where there is one."""
    whole = ALL_TASKS if any(row["task"] == ALL_TASKS for row in rows) else rows[-1]["task"]
    return [row for row in rows if row["task"] == whole]


def leaderboard(rows: Sequence[_Row], printed: bool = False) -> Grid:
    """One row per target and method: speedup on each task, then over all of them the acceptance length and both
    speedups with their intervals. The highest speedup of each target on each task is marked, of the lossless methods.

    Args:
        printed: as wide as a page: without the speedup of whole answers and the interval of the acceptance length.
    """
    overall = (_PLAIN_LENGTH, _OVERALL) if printed else (_LENGTH, _WHOLE, _OVERALL)
    table, at = _pivot(rows, _RATE, overall)
    best = {
        (row, column)
        for column in (*range(2, len(table.headings) - len(overall)), len(table.headings) - 1)
        for target in {row["target"] for row in rows}
        for row in fastest([each[column] if each[column] and each[column]["target"] == target else None for each in at])
    }
    return replace(table, best=frozenset(best))


def speedups_by_task(rows: Sequence[_Row]) -> Grid:
    """The speedup on each task with its interval."""
    return _pivot(rows, _SPEEDUP, ())[0]


def changes_by_task(rows: Sequence[_Row], name: str) -> Grid:
    """Changes against the original by task and over all; marked where the whole interval excludes zero."""
    (column,) = COLUMNS[name]
    table, at = _pivot(
        [row for row in rows if row["original"] is not None], column, [replace(column, heading="Overall")]
    )
    real = {(row, place) for row, of in enumerate(at) for place, each in enumerate(of) if each and is_real(each, name)}
    return replace(table, best=frozenset(real))


def _pivot(rows: Sequence[_Row], each: Column, overall: Sequence[Column]) -> tuple[Grid, list[list[_Row | None]]]:
    """A row per target and method, on each task ``each`` and then ``overall`` of all of them; and each cell's row."""
    tasks = list(dict.fromkeys(row["task"] for row in rows if row["task"] != ALL_TASKS))
    shown = [(task, each) for task in tasks] + [(None, column) for column in overall]
    of_place = {(row["target"], row["method"], row["task"]): row for row in rows}
    of_place |= {(row["target"], row["method"], None): row for row in (whole_rows(rows) if rows else [])}
    places = {(row["target"], row["method"]): COLUMNS["method"][0].cell(row) for row in rows}
    at = [[None, None, *(of_place.get((*place, task)) for task, _ in shown)] for place in places]
    cells = [
        [
            target,
            label,
            *(NOTHING if row is None else column.cell(row) for row, (_, column) in zip(of[2:], shown, strict=True)),
        ]
        for ((target, _), label), of in zip(places.items(), at, strict=True)
    ]
    headings = ["Target", "Method", *(column.heading if task is None else task.capitalize() for task, column in shown)]
    begins = frozenset(place for place in range(1, len(cells)) if cells[place][0] != cells[place - 1][0])
    return Grid(headings, cells, [False] * 2 + [True] * len(shown), frozenset(), begins), at
