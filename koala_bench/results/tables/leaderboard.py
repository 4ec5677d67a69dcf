"""The leaderboard: a row per method and a column per task, as Spec-Bench prints it, from the rows of a table by task."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd

from koala_bench.results.tables.rendering import COLUMNS, Grid, with_interval
from koala_bench.results.tables.tasks import ALL_TASKS

_NOTHING = "\N{EN DASH}"


def leaderboard(frame: pd.DataFrame) -> Grid:
    """One row per target and method: speedup on each task, then over all of them the acceptance length and the speedup.

    Methods keep their order; the best speedup of each target on each task is marked, of the lossless ones. Where there
    is one task only, it is the whole.

    Args:
        frame: a table by task in full precision, see ``tables.table_frame``.
    """
    records = [{str(name): value for name, value in row.items()} for row in frame.to_dict(orient="records")]
    tasks = list(dict.fromkeys(row["task"] for row in records if row["task"] != ALL_TASKS))
    whole = ALL_TASKS if any(row["task"] == ALL_TASKS for row in records) else tasks[-1]
    cells = {(row["target"], row["method"], row["task"]): row for row in records}
    rows: list[list[str]] = []
    places: list[tuple[str, str]] = list(dict.fromkeys((row["target"], row["method"]) for row in records))
    name = COLUMNS["method"].shown[0].cell
    for target, method in places:
        overall = cells.get((target, method, whole))
        shown = overall or next(row for (where, which, _), row in cells.items() if (where, which) == (target, method))
        speeds = [_cell(cells.get((target, method, task)), "speedup") for task in tasks]
        rows.append([target, name(shown), *speeds, _cell(overall, "acceptance_length"), _cell(overall, "speedup")])
    headings = [
        "Target",
        "Method",
        *(f"{task.capitalize()} (x)" for task in tasks),
        "Acceptance length τ",
        "Overall (x)",
    ]
    columns = [*((task, 2 + place) for place, task in enumerate(tasks)), (whole, len(headings) - 1)]
    best = {
        (_fastest([cells.get((where, method, task)) if where == target else None for where, method in places]), column)
        for target in dict.fromkeys(where for where, _ in places)
        for task, column in columns
    }
    begins = frozenset(place for place in range(1, len(places)) if places[place][0] != places[place - 1][0])
    return Grid(
        headings,
        rows,
        [False, False, *([True] * (len(headings) - 2))],
        frozenset((row, column) for row, column in best if row >= 0),
        begins,
    )


def _cell(row: dict[str, Any] | None, name: str) -> str:
    if row is None or row[name] is None:
        return _NOTHING
    return (
        with_interval(row[name], row[f"{name}_low"], row[f"{name}_high"], 2)
        if row["layers"] is not None
        else f"{row[name]:.2f}"
    )


def _fastest(rows: Sequence[dict[str, Any] | None]) -> int:
    """Place of the best speedup of a lossless method, or -1."""
    speeds = {
        place: row["speedup"]
        for place, row in enumerate(rows)
        if row is not None and row["lossless"] and row["speedup"] is not None
    }
    return max(speeds, key=lambda place: speeds[place], default=-1)
