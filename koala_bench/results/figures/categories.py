"""Figure of the speedup by task or category: one group of bars each, one bar per method."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from koala_bench.errors import KoalaBenchError
from koala_bench.records.reading import Run, short_names
from koala_bench.records.summaries import VANILLA
from koala_bench.results.figures import style
from koala_bench.results.figures.style import ROW_INCHES
from koala_bench.results.tables.published import TableSpec
from koala_bench.results.tables.tasks import TaskRows, rows_by_task

_GROUP = 0.84  # of the distance between two groups is taken by bars


def _draw(axes: Axes, rows: Sequence[TaskRows], methods: Sequence[str], label: str) -> None:
    width = _GROUP / len(methods)
    for place, (method, look) in enumerate(zip(methods, style.looks(methods), strict=True)):
        found = [
            (index, summary.speedup)
            for index, row in enumerate(rows)
            for summary in row.summaries
            if summary.is_measured and summary.name == method
        ]
        across = [index - _GROUP / 2 + (place + 0.5) * width for index, _ in found]
        speedups = [speedup for _, speedup in found]
        heights = [each.value for each in speedups]
        style.bars(axes, across, heights, [look] * len(heights), width * 0.92, label=method)
        style.bar_intervals(axes, across, speedups, "black", 0.7, 1.2)
    style.vanilla_line(axes, len(rows) - 0.5)
    axes.set_xlim(-0.55, len(rows) - 0.5 + 0.055 * len(rows))
    names = [f"{row.task} ({row.summaries[0].questions})" for row in rows]
    axes.set_xticks(range(len(rows)), names, rotation=30, ha="right", rotation_mode="anchor")
    axes.tick_params(axis="x", length=0)
    axes.set_ylabel(label)
    style.grid_lines(axes)


def write_categories(runs: Sequence[Run], out_dir: Path, tasks: TableSpec, methods: Sequence[str]) -> list[Path]:
    """Speedup by task of Table 2 with intervals over the questions, whose number is in brackets; a row per target."""
    rows, _ = rows_by_task(runs, tasks.model_copy(update={"methods": tuple(dict.fromkeys((VANILLA, *methods)))}))
    targets = short_names(row.summaries[0].target for row in rows)
    measured = {summary.name for row in rows for summary in row.summaries if summary.is_measured}
    names = [name for name in methods if name in measured]
    if not names:
        raise KoalaBenchError(f"{runs[0].path} has no method beside vanilla to draw.", "Evaluate with more --methods.")

    def draw() -> Figure:
        figure, axes = style.panels(len(targets), 1, (ROW_INCHES + 0.6) * len(targets) + 0.2)
        for (panel,), target in zip(axes, targets, strict=True):
            here = [row for row in rows if row.summaries[0].target == target]
            _draw(panel, here, names, f"{targets[target]}\nspeedup (x)" if len(targets) > 1 else "speedup (x)")
        style.legend(figure, axes[0][0])
        return figure

    return style.save(draw, out_dir, "figure-categories")
