"""Figure of the speedup by task or category: one group of bars each, one bar per method."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from koala_bench.errors import KoalaBenchError
from koala_bench.records.reading import Run, short_names
from koala_bench.records.summaries import VANILLA, Summary
from koala_bench.results.figures.style import (
    ROW_INCHES,
    bar_intervals,
    grid_lines,
    legend,
    looks,
    panels,
    save,
    vanilla_line,
)
from koala_bench.results.tables.published import TableSpec
from koala_bench.results.tables.tasks import TaskRows, rows_by_task

_GROUP = 0.84  # of the distance between two groups is taken by bars


def _shown(row: TaskRows) -> list[Summary]:
    return [summary for summary in row.summaries if summary.name != VANILLA and not math.isnan(summary.speedup.value)]


def _draw(axes: Axes, rows: Sequence[TaskRows], methods: Sequence[str], label: str) -> None:
    width = _GROUP / len(methods)
    for place, (method, look) in enumerate(zip(methods, looks(methods), strict=True)):
        found = [
            (index, summary.speedup)
            for index, row in enumerate(rows)
            for summary in _shown(row)
            if summary.name == method
        ]
        across = [index - _GROUP / 2 + (place + 0.5) * width for index, _ in found]
        speedups = [speedup for _, speedup in found]
        axes.bar(across, [each.value for each in speedups], width=width * 0.92, color=look.colour, label=method)
        bar_intervals(axes, across, speedups, "black", 0.7, 1.2)
    vanilla_line(axes, len(rows) - 0.5)
    axes.set_xlim(-0.55, len(rows) - 0.5 + 0.055 * len(rows))
    names = [f"{row.task} ({row.summaries[0].questions})" for row in rows]
    axes.set_xticks(range(len(rows)), names, rotation=30, ha="right", rotation_mode="anchor")
    axes.tick_params(axis="x", length=0)
    axes.set_ylabel(label)
    grid_lines(axes)


def write_categories(runs: Sequence[Run], out_dir: Path, tasks: TableSpec, methods: Sequence[str]) -> list[Path]:
    """``figure-categories.pdf`` and ``.png``: speedup by task with 95 % intervals over the questions, whose number is
    in brackets.

    Args:
        runs: as for Table 2; a row of bars per target.
        tasks: the recipe of Table 2.
    """
    rows, _ = rows_by_task(runs, tasks.model_copy(update={"methods": tuple(dict.fromkeys((VANILLA, *methods)))}))
    targets = short_names(row.summaries[0].target for row in rows)
    names = [name for name in methods if any(summary.name == name for row in rows for summary in _shown(row))]
    if not names:
        raise KoalaBenchError(f"{runs[0].path} has no method beside vanilla to draw.", "Evaluate with more --methods.")

    def draw() -> Figure:
        figure, axes = panels(len(targets), 1, (ROW_INCHES + 0.6) * len(targets) + 0.2)
        for (panel,), target in zip(axes, targets, strict=True):
            here = [row for row in rows if row.summaries[0].target == target]
            _draw(panel, here, names, f"{targets[target]}\nspeedup (x)" if len(targets) > 1 else "speedup (x)")
        legend(figure, axes[0][0])
        return figure

    return save(draw, out_dir, "figure-categories")
