"""The columns that a table can show: heading and rounded cell of each, and its columns in the CSV."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from koala_bench.errors import KoalaBenchError
from koala_bench.records import statistics
from koala_bench.records.reading import short_name
from koala_bench.records.statistics import Interval
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


@dataclass(frozen=True)
class ColumnGroup:
    """What a name in a table's file gives: rounded columns, and a pattern of its columns in the CSV."""

    shown: tuple[Column, ...]
    raw: str


# ---------------------------------------------------------------------------------------------- cells


def _plain(name: str) -> _Cell:
    return lambda row: NOTHING if row[name] is None else str(row[name])


def _scaled(name: str, factor: float, digits: int) -> _Cell:
    return lambda row: NOTHING if row[name] is None else fixed(row[name] * factor, digits)


def interval_in(row: _Row, name: str) -> Interval:
    """A number of a row with its interval; NaN where there is none."""
    value, low, high = (row[name + end] for end in ("", "_low", "_high"))
    return Interval(*(math.nan if each is None else each for each in (value, low, high)))


def _interval_of(name: str, digits: int, sign: bool = False) -> _Cell:
    def cell(row: _Row) -> str:
        if row[name] is None:
            return NOTHING
        each = interval_in(row, name)
        if row["method"] == VANILLA:
            return fixed(each.value, digits, sign)  # 1 by definition
        return with_interval(each.value, each.low, each.high, digits, sign)

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
        if row[name] is None:
            return claimed
        change = interval_in(row, name)
        verdict: str = statistics.against_range(change, low, high)
        if verdict == "contradicts":
            verdict += ", below" if change.high < low else ", above"
        return f"{claimed}: {verdict}"

    return cell


def _paper(row: _Row) -> str:
    values = [value for value in (row["paper_speedup"], row["paper_acceptance_length"]) if value is not None]
    if set(values) == {"unknown"}:
        return "unknown"
    return "; ".join(value if isinstance(value, str) else f"{value:.2f}" for value in values) or NOTHING


def _yes_or_no(row: _Row) -> str:
    return NOTHING if row["adversarial"] is None else "yes" if row["adversarial"] else "no"


def _method(row: _Row) -> str:
    return method_label(str(row["method"]), row["lossless"], row["total_variation"])


# ---------------------------------------------------------------------------------------------- columns

_ENDS = "(_low|_high)?"
_CHANGE_X = Column("Change (x)", _interval_of("speedup_change_x", 3, sign=True))
_CHANGE_PERCENT = Column("Change (%)", _interval_of("speedup_change_percent", 1, sign=True))


def _left(heading: str, name: str) -> ColumnGroup:
    return ColumnGroup((Column(heading, _plain(name), right=False),), name)


def _right(heading: str, cell: _Cell, raw: str) -> ColumnGroup:
    return ColumnGroup((Column(heading, cell),), raw)


COLUMNS: dict[str, ColumnGroup] = {
    "target": ColumnGroup((Column("Target", lambda row: short_name(row["target"]), right=False),), "target"),
    "task": _left("Task", "task"),
    "questions": _right("Questions", _plain("questions"), "questions"),
    "method": ColumnGroup((Column("Method", _method, right=False),), "method"),
    "original": _left("Against", "original"),
    "layers": _right("Layers K", _plain("layers"), "layers"),
    "adversarial": ColumnGroup((Column("Adversarial", _yes_or_no, right=False),), "adversarial"),
    "parameters": _right("Head (M)", _scaled("parameters", 1e-6, 2), "parameters"),
    "tree": ColumnGroup((Column("Draft tree", _tree, right=False),), "tree(_nodes|_depth)?"),
    "speedup": _right("Speedup (x)", _interval_of("speedup", 2), f"speedup({_ENDS}|_ratio_of_means|_mean_of_ratios)"),
    "whole_answer": _right(
        "Whole answer (x)",
        _interval_of("whole_answer_speedup", 2),
        f"whole_answer_speedup({_ENDS}|_ratio_of_means)",
    ),
    "other_speedups": _right(
        "Speedup, ratio of means / mean of ratios", _other_speedups, "speedup(_ratio_of_means|_mean_of_ratios)"
    ),
    "acceptance_length": _right(
        "Acceptance length τ", _interval_of("acceptance_length", 2), f"acceptance_length{_ENDS}"
    ),
    "acceptance_rate": ColumnGroup(
        (Column(f"Acceptance rate {ALPHA}₁ / {ALPHA}₂ / …", _rates, right=False),), "acceptance_(rate|trials)_.*"
    ),
    "equal": _right("Equal answers", _equal, "turns_(equal_to|compared_with)_vanilla"),
    "draft_overhead": _right("Draft overhead (%)", _scaled("draft_overhead_percent", 1.0, 1), "draft_overhead_percent"),
    "change": ColumnGroup(
        (_CHANGE_X, _CHANGE_PERCENT),
        f"original|(speedup_change_x|speedup_change_percent|acceptance_length_change){_ENDS}",
    ),
    "change_x": ColumnGroup((_CHANGE_X,), f"original|speedup_change_x{_ENDS}"),
    "change_percent": ColumnGroup((_CHANGE_PERCENT,), f"original|speedup_change_percent{_ENDS}"),
    "length_change": _right(
        "Change of τ", _interval_of("acceptance_length_change", 3, sign=True), f"acceptance_length_change{_ENDS}"
    ),
    "claim": ColumnGroup(
        (
            Column("Paper's range (x)", _claim("x", 2), right=False),
            Column("Paper's range (%)", _claim("percent", 2), right=False),
        ),
        "(claim|paper)_.*",
    ),
    "paper": ColumnGroup((Column("Paper: speedup; τ", _paper, right=False),), "paper_.*"),
}
_GROUPING = ("target", "task", "method")
# The CSV always says how much its numbers stand on.
_ALWAYS = "decode_tokens_per_s|lossless|total_variation|questions|turns_.*"


def known(columns: Sequence[str], where: str) -> tuple[str, ...]:
    """The names of columns as they are.

    Args:
        where: file or option that has them.

    Raises:
        KoalaBenchError: there is no such column.
    """
    for name in columns:
        if name not in COLUMNS:
            raise KoalaBenchError(f"{where}: unknown column '{name}'.", f"The columns are {', '.join(COLUMNS)}.")
    return tuple(columns)


def records_of(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """The rows of a table's frame."""
    return [{str(name): value for name, value in row.items()} for row in frame.to_dict(orient="records")]


def grouped(columns: Sequence[str], others: Sequence[str]) -> tuple[str, ...]:
    """More columns of a table's rows: those that say which row it is come first."""
    return (*(name for name in _GROUPING if name in columns), *others)


def grid(rows: Sequence[_Row], columns: Sequence[str]) -> Grid:
    """Round rows of a table's frame to what is read; the best speedup of each target, or of each of its tasks, is
    marked, lossy methods aside.
    """
    groups = [tuple(row[name] for name in ("target", "task") if name in row) for row in rows]
    best: list[int] = []
    if "speedup" in columns:
        for group in dict.fromkeys(groups):
            best += fastest([row if its == group else None for its, row in zip(groups, rows, strict=True)])
    return _grid(rows, columns, {(row, "speedup") for row in best})


def changes_grid(rows: Sequence[_Row], columns: Sequence[str]) -> Grid:
    """The rows that are compared with another; changes whose whole interval lies on one side of zero are marked."""
    changed = [row for row in rows if row["original"] is not None]
    names = {"change_x": "speedup_change_x", "change_percent": "speedup_change_percent"}
    names["length_change"] = "acceptance_length_change"
    real = {
        (place, column)
        for place, row in enumerate(changed)
        for column in set(columns) & set(names)
        if row[names[column]] is not None and excludes_zero(interval_in(row, names[column]))
    }
    return _grid(changed, columns, real)


def excludes_zero(change: Interval) -> bool:
    """Whether the whole interval lies on one side of zero."""
    return statistics.against_zero(change) != "not distinguishable from zero"


def _grid(rows: Sequence[_Row], columns: Sequence[str], marked: set[tuple[int, str]]) -> Grid:
    shown = [(name, column) for name in columns for column in COLUMNS[name].shown]
    groups = [tuple(row[name] for name in ("target", "task") if name in row) for row in rows]
    return Grid(
        [column.heading for _, column in shown],
        [[column.cell(row) for _, column in shown] for row in rows],
        [column.right for _, column in shown],
        frozenset(
            (row, place) for row in range(len(rows)) for place, (name, _) in enumerate(shown) if (row, name) in marked
        ),
        frozenset(place for place in range(1, len(rows)) if groups[place] != groups[place - 1]),
    )


def fastest(rows: Sequence[_Row | None]) -> list[int]:
    """Place of the best speedup of a lossless method; empty if none has one."""
    speeds = {
        place: row["speedup"]
        for place, row in enumerate(rows)
        if row is not None and row["lossless"] and row["speedup"] is not None
    }
    return [max(speeds, key=lambda place: speeds[place])] if speeds else []


def to_csv(frame: pd.DataFrame, columns: Sequence[str]) -> str:
    """The table's numbers with 12 digits, which hides how vector units round the last ones; empty cells for what there
    is not. The columns stand in the order of ``columns``.
    """
    patterns = [re.compile(pattern) for pattern in (*(COLUMNS[name].raw for name in columns), _ALWAYS)]
    chosen = frame[list(dict.fromkeys(name for each in patterns for name in frame.columns if each.fullmatch(name)))]

    def text(value: Any) -> str:
        if value is None or (isinstance(value, float) and math.isnan(value)):
            return ""
        if isinstance(value, bool):
            return "true" if value else "false"
        return f"{value:.12g}" if isinstance(value, float) else str(value)

    return str(chosen.map(text).to_csv(index=False, lineterminator="\n"))
