"""The leaderboard: a row per method and a column per task, as Spec-Bench prints it, from the rows of a table by task."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from koala_bench.results.tables.columns import COLUMNS, Column, excludes_zero, fastest, interval_in
from koala_bench.results.tables.rendering import NOTHING, Grid, fixed
from koala_bench.results.tables.tasks import ALL_TASKS

_Row = dict[str, Any]
_SPEEDUP, _WHOLE, _LENGTH = (COLUMNS[name].shown[0] for name in ("speedup", "whole_answer", "acceptance_length"))
_RATE = Column("", lambda row: NOTHING if row["speedup"] is None else fixed(row["speedup"], 2))


def whole_rows(rows: Sequence[_Row]) -> list[_Row]:
    """The rows over all tasks; those of the only task where there is one."""
    tasks = _tasks(rows)
    whole = ALL_TASKS if any(row["task"] == ALL_TASKS for row in rows) else tasks[-1]
    return [row for row in rows if row["task"] == whole]


def leaderboard(rows: Sequence[_Row]) -> Grid:
    """One row per target and method: speedup on each task, then over all of them the acceptance length and both
    speedups with their intervals. The best speedup of each target on each task is marked, of the lossless methods.
    """
    overall = (_LENGTH, _WHOLE, replace(_SPEEDUP, heading="Overall speedup (x)"))
    table = _pivot(rows, _RATE, overall)
    best = set()
    for column, task in enumerate([*_tasks(rows), None], 2):
        for target in dict.fromkeys(row["target"] for row in rows):
            found = [_at(rows, place, task) if place[0] == target else None for place in _places(rows)]
            best |= {(row, column if task else len(table.headings) - 1) for row in fastest(found)}
    return Grid(table.headings, table.rows, table.right, frozenset(best), table.begins)


def speedups_by_task(rows: Sequence[_Row]) -> Grid:
    """The speedup on each task with its interval."""
    return _pivot(rows, _SPEEDUP, ())


def changes_by_task(rows: Sequence[_Row], name: str) -> Grid:
    """The change of each method against its original on each task and over all; marked are changes whose whole interval
    lies on one side of zero.

    Args:
        name: a column of one change, such as ``change_x``.
    """
    changed = [row for row in rows if row["original"] is not None]
    (column,), raw = COLUMNS[name].shown, {"change_x": "speedup_change_x", "length_change": "acceptance_length_change"}
    table = _pivot(changed, column, [replace(column, heading="Overall")])
    tasks: list[str | None] = [*_tasks(changed), None]
    real = {
        (place, 2 + number)
        for place, where in enumerate(_places(changed))
        for number, task in enumerate(tasks)
        if (row := _at(changed, where, task))
        and row[raw[name]] is not None
        and excludes_zero(interval_in(row, raw[name]))
    }
    return Grid(table.headings, table.rows, table.right, frozenset(real), table.begins)


def _tasks(rows: Sequence[_Row]) -> list[str]:
    return list(dict.fromkeys(row["task"] for row in rows if row["task"] != ALL_TASKS))


def _places(rows: Sequence[_Row]) -> list[tuple[str, str]]:
    return list(dict.fromkeys((row["target"], row["method"]) for row in rows))


def _at(rows: Sequence[_Row], place: tuple[str, str], task: str | None) -> _Row | None:
    """The row of a target and method on a task; None as a task stands for all of them."""
    among = whole_rows(rows) if task is None else [row for row in rows if row["task"] == task]
    return next((row for row in among if (row["target"], row["method"]) == place), None)


def _pivot(rows: Sequence[_Row], each: Column, overall: Sequence[Column]) -> Grid:
    """A row per target and method; on each task ``each``, and then ``overall`` of all of them."""
    places, tasks, name = _places(rows), _tasks(rows), COLUMNS["method"].shown[0].cell
    cells = []
    for place in places:
        label = name(next(row for row in rows if (row["target"], row["method"]) == place))
        shown = [(_at(rows, place, task), each) for task in tasks] + [(_at(rows, place, None), one) for one in overall]
        cells.append([place[0], label, *(NOTHING if row is None else column.cell(row) for row, column in shown)])
    headings = ["Target", "Method", *(task.capitalize() for task in tasks), *(one.heading for one in overall)]
    begins = frozenset(place for place in range(1, len(places)) if places[place][0] != places[place - 1][0])
    return Grid(headings, cells, [False, False, *([True] * (len(headings) - 2))], frozenset(), begins)
