"""Figure 1, beside Table 1: speedup and acceptance length of each method as bars with their intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke

from koala_bench.errors import KoalaBenchError
from koala_bench.records.reading import Run, short_names
from koala_bench.records.statistics import Interval
from koala_bench.records.summaries import Summary, evaluations, sample, summaries_of
from koala_bench.results.figures.style import (
    ROW_INCHES,
    bar_intervals,
    bars,
    grid_lines,
    looks,
    panels,
    save,
    vanilla_line,
)

_CHARACTERS_ACROSS = 40  # of the font above, in one of two panels
_MANY = 8  # bars, above which their values are set smaller so as not to touch
_LABEL_SHARE = 0.18  # room for the word "vanilla" at the right of the bars, as a share of theirs


def _bars(axes: Axes, summaries: Sequence[Summary], measured: Sequence[Interval], label: str) -> None:
    names, places = [summary.name for summary in summaries], range(len(summaries))
    bars(axes, places, [each.value for each in measured], looks(names), 0.72)
    known = [place for place in places if not math.isnan(measured[place].low)]
    # A white line under the black one keeps the lower half of an interval visible on a dark bar.
    for colour, width, cap in (("white", 2.4, 3.0), ("black", 0.9, 2.5)):
        bar_intervals(axes, known, [measured[place] for place in known], colour, width, cap)
    tops = [max(each.value, each.value if math.isnan(each.high) else each.high) for each in measured]
    for place, interval, top in zip(places, measured, tops, strict=True):
        at: dict[str, Any] = {"xytext": (0, 2.5), "textcoords": "offset points", "ha": "center", "va": "bottom"}
        text = axes.annotate(f"{interval.value:.2f}", (place, top), **at)
        if len(summaries) > _MANY:
            text.set_fontsize("xx-small")
        text.set_path_effects([withStroke(linewidth=2.0, foreground="white")])
    vanilla_line(axes, len(summaries) - 0.5)
    axes.set_xlim(-0.6, len(summaries) - 0.5 + _LABEL_SHARE * len(summaries))
    axes.set_ylim(0, max([1.0, *tops]) * 1.13)
    axes.set_ylabel(label)
    _name_places(axes, names)
    axes.tick_params(axis="x", length=0)
    grid_lines(axes)


def _name_places(axes: Axes, names: Sequence[str]) -> None:
    # A line for the head and one for the variant keeps a few names upright; many or long ones are slanted.
    lines = [[head, plus + rest] for head, plus, rest in (name.partition("+") for name in names)]
    room = _CHARACTERS_ACROSS / (len(names) * (1 + _LABEL_SHARE))
    if max(len(line) for both in lines for line in both) < room:
        axes.set_xticks(range(len(names)), ["\n".join(both) for both in lines])
    else:
        axes.set_xticks(range(len(names)), names, rotation=35, ha="right", rotation_mode="anchor")


def write_figure1(runs: Sequence[Run], out_dir: Path, methods: Sequence[str] | None = None) -> list[Path]:
    """Figure 1: speedup and acceptance length side by side, one row of panels per target.

    Bars are the methods with their 95 % intervals, vanilla is the dashed line at 1.
    """
    shown = []
    for of_processes in evaluations(runs):
        rows = [summary for summary in summaries_of(sample(of_processes, methods)) if summary.is_measured]
        if not rows:
            raise KoalaBenchError(
                f"{of_processes[0].path} has no method beside vanilla to draw.", "Evaluate with more --methods."
            )
        shown.append(rows)

    names = short_names(rows[0].target for rows in shown)

    def draw() -> Figure:
        figure, axes = panels(len(shown), 2, ROW_INCHES * len(shown))
        for (left, right), rows in zip(axes, shown, strict=True):
            target = f"{names[rows[0].target]}\n" if len(shown) > 1 else ""
            _bars(left, rows, [row.speedup for row in rows], f"{target}speedup (x)")
            _bars(right, rows, [row.acceptance_length for row in rows], f"{target}tokens per step")
        return figure

    return save(draw, out_dir, "figure1")
