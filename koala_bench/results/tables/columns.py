"""The columns that a table can show: heading and rounded cell of each."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from koala_bench.errors import KoalaBenchError
from koala_bench.records import statistics
from koala_bench.records.summaries import VANILLA
from koala_bench.results.tables.rendering import ALPHA, NOTHING, Grid, fixed, method_label, with_interval

_Row = Mapping[str, Any]
_Cell = Callable[[_Row], str]


@dataclass(frozen=True)
class Column:
    """A column of the rounded table: its heading, its cell, and whether it is aligned at the right."""

    heading: str
    cell: _Cell
    right: bool = True


def _plain(name: str) -> _Cell:
    return lambda row: NOTHING if row[name] is None else str(row[name])


def _scaled(name: str, factor: float, digits: int) -> _Cell:
    return lambda row: NOTHING if row[name] is None else fixed(row[name] * factor, digits)


def _interval_of(name: str, digits: int, sign: bool = False) -> _Cell:
    def cell(row: _Row) -> str:
        vanilla = row["method"] == VANILLA  # 1 by definition
        return with_interval(replace(row[name], low=math.nan) if vanilla else row[name], digits, sign)

    return cell


def _equal(row: _Row) -> str:
    if not row["turns_compared_with_vanilla"]:
        return NOTHING
    return f"{row['turns_equal_to_vanilla']}/{row['turns_compared_with_vanilla']}"


def _rates(row: _Row) -> str:
    name = "acceptance_rate_given_parent_depth_"
    rates = [value for key, value in row.items() if key.startswith(name) and value is not None]
    return " / ".join(fixed(rate, 2) for rate in rates) or NOTHING


def _tree(row: _Row) -> str:
    if row["tree"] is None:
        return NOTHING
    return f"{row['tree']} ({row['tree_nodes']} nodes, depth {row['tree_depth']})"


def _other_speedups(row: _Row) -> str:
    values = (row["speedup_ratio_of_means"], row["speedup_mean_of_ratios"])
    return NOTHING if row["method"] == VANILLA or None in values else " / ".join(fixed(each, 3) for each in values)


def _claim(unit: str, digits: int) -> _Cell:
    """The paper's range of a change, and whether the measured interval agrees with it."""
    name, sign = f"speedup_change_{unit}", {"x": "x", "percent": "%"}[unit]

    def cell(row: _Row) -> str:
        low, high = row[f"claim_{name}_low"], row[f"claim_{name}_high"]
        if low is None:
            return NOTHING
        claimed = f"+{low:.{digits}f} to +{high:.{digits}f} {sign}"
        change = row[name]
        if math.isnan(change.value):
            return claimed
        verdict: str = statistics.against_range(change, low, high)
        if verdict == "contradicts":
            verdict += " (below)" if change.high < low else " (above)"
        return f"{claimed}: {verdict}"

    return cell


def _paper(row: _Row) -> str:
    values = [value for value in (row["paper_speedup"], row["paper_acceptance_length"]) if value is not None]
    if set(values) == {"unknown"}:
        return "unknown"
    return "; ".join(value if isinstance(value, str) else f"{value:.2f}" for value in values) or NOTHING


# Columns of a change -> their numbers.
_CHANGES = {
    "change_x": "speedup_change_x",
    "change_percent": "speedup_change_percent",
    "length_change": "acceptance_length_change",
}


def _left(heading: str, cell: _Cell) -> tuple[Column]:
    return (Column(heading, cell, right=False),)


def _right(heading: str, cell: _Cell) -> tuple[Column]:
    return (Column(heading, cell),)


# What a name in a table's file shows.
COLUMNS: dict[str, tuple[Column, ...]] = {
    "target": _left("Target", _plain("target")),
    "task": _left("Task", _plain("task")),
    "questions": _right("Questions", _plain("questions")),
    "method": _left("Method", lambda row: method_label(row["method"], row["lossless"], row["total_variation"])),
    "original": _left("Against", _plain("original")),
    "layers": _right("Layers K", _plain("layers")),
    "adversarial": _left("Adversarial", lambda row: {None: NOTHING, True: "yes", False: "no"}[row["adversarial"]]),
    "parameters": _right("Head (M)", _scaled("parameters", 1e-6, 2)),
    "tree": _left("Draft tree", _tree),
    "speedup": _right("Speedup (x)", _interval_of("speedup", 2)),
    "whole_answer": _right("Whole answer (x)", _interval_of("whole_answer_speedup", 2)),
    "other_speedups": _right("Speedup, ratio of means / mean of ratios", _other_speedups),
    "acceptance_length": _right("Acceptance length τ", _interval_of("acceptance_length", 2)),
    "acceptance_rate": _left(f"Acceptance rate {ALPHA}₁ / {ALPHA}₂ / …", _rates),
    "equal": _right("Equal answers", _equal),
    "draft_overhead": _right("Draft overhead (%)", _scaled("draft_overhead_percent", 1.0, 1)),
    "change_x": _right("Change (x)", _interval_of("speedup_change_x", 3, sign=True)),
    "change_percent": _right("Change (%)", _interval_of("speedup_change_percent", 1, sign=True)),
    "length_change": _right("Change of τ", _interval_of("acceptance_length_change", 3, sign=True)),
    "claim": (
        Column("Paper's range (x)", _claim("x", 2), right=False),
        Column("Paper's range (%)", _claim("percent", 2), right=False),
    ),
    "paper": _left("Paper: speedup; τ", _paper),
}
_GROUPING = ("target", "task", "method")


def known(columns: Sequence[str], where: str) -> tuple[str, ...]:
    """The names of columns as they are, if they are ones; ``where`` is the file or option that has them.

    Raises:
        KoalaBenchError: there is no such column.
    """
    for name in columns:
        if name not in COLUMNS:
            raise KoalaBenchError(f"{where}: unknown column '{name}'.", f"The columns are {', '.join(COLUMNS)}.")
    return tuple(columns)


def grouped(columns: Sequence[str], others: Sequence[str]) -> tuple[str, ...]:
    """More columns of a table's rows: those that say which row it is come first."""
    return (*(name for name in _GROUPING if name in columns), *others)


def grid(rows: Sequence[_Row], columns: Sequence[str]) -> Grid:
    """Round rows to what is read; marked is the highest speedup of a lossless method of each target, or of its tasks,
    whether or not it is distinguishable from the next.
    """
    groups = [(row["target"], row.get("task")) for row in rows]
    best = [
        row
        for group in (dict.fromkeys(groups) if "speedup" in columns else ())
        for row in fastest([row if its == group else None for its, row in zip(groups, rows, strict=True)])
    ]
    return _grid(rows, columns, {(row, "speedup") for row in best})


def changes_grid(rows: Sequence[_Row], columns: Sequence[str]) -> Grid:
    """The rows that are compared with another; changes whose whole interval lies on one side of zero are marked."""
    changed = [row for row in rows if row["original"] is not None]
    real = {(at, name) for at, row in enumerate(changed) for name in columns if name in _CHANGES and is_real(row, name)}
    return _grid(changed, columns, real)


def is_real(row: _Row, name: str) -> bool:
    """Whether the whole interval of a change, such as ``change_x``, lies on one side of zero."""
    return statistics.excludes_zero(row[_CHANGES[name]])


def _grid(rows: Sequence[_Row], columns: Sequence[str], marked: set[tuple[int, str]]) -> Grid:
    shown = [(name, column) for name in columns for column in COLUMNS[name]]
    groups = [(row["target"], row.get("task")) for row in rows]
    return Grid(
        [column.heading for _, column in shown],
        [[column.cell(row) for _, column in shown] for row in rows],
        [column.right for _, column in shown],
        frozenset((row, at) for row in range(len(rows)) for at, (name, _) in enumerate(shown) if (row, name) in marked),
        frozenset(at for at in range(1, len(rows)) if groups[at] != groups[at - 1]),
    )


def fastest(rows: Sequence[_Row | None]) -> list[int]:
    """Place of the highest speedup of a lossless method; empty if none has one."""
    speeds = {
        place: row["speedup"].value
        for place, row in enumerate(rows)
        if row is not None and row["lossless"] and not math.isnan(row["speedup"].value)
    }
    return [max(speeds, key=speeds.__getitem__)] if speeds else []
