"""Figure 1, beside Table 1: speedup and acceptance length of each method as bars with their intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke

from koala_bench.errors import KoalaBenchError
from koala_bench.records.reading import Run, short_name
from koala_bench.records.statistics import Interval
from koala_bench.records.summaries import VANILLA, Summary, evaluations, sample, summaries_of
from koala_bench.results.figures.style import GREY, ROW_INCHES, WIDTH_INCHES, grid_lines, looks, save

_CHARACTERS_ACROSS = 40  # of the font above, in one of two panels
_LABEL_SHARE = 0.18  # room for the word "vanilla" at the right of the bars, as a share of theirs


def _bars(axes: Axes, summaries: Sequence[Summary], measured: Sequence[Interval], label: str) -> None:
    places = range(len(summaries))
    values = [interval.value for interval in measured]
    axes.bar(places, values, width=0.72, color=[look.colour for look in looks([summary.name for summary in summaries])])
    known = [place for place in places if not math.isnan(measured[place].low)]
    ends = [[values[p] - measured[p].low for p in known], [measured[p].high - values[p] for p in known]]
    # A white line under the black one keeps the lower half of an interval visible on a dark bar.
    for colour, width, cap in (("white", 2.4, 3.0), ("black", 0.9, 2.5)):
        axes.errorbar(
            known,
            [values[p] for p in known],
            yerr=ends,
            fmt="none",
            ecolor=colour,
            elinewidth=width,
            capsize=cap,
            capthick=width,
        )
    top = max([1.0, *(interval.value if math.isnan(interval.high) else interval.high for interval in measured)])
    for place, interval in zip(places, measured, strict=True):
        above = interval.value if math.isnan(interval.high) else max(interval.high, interval.value)
        text = axes.annotate(
            f"{interval.value:.2f}",
            (place, above),
            xytext=(0, 2.5),
            textcoords="offset points",
            ha="center",
            va="bottom",
        )
        text.set_path_effects([withStroke(linewidth=2.0, foreground="white")])
    axes.axhline(1.0, color=GREY, linewidth=0.9, linestyle=(0, (4, 3)), zorder=3)
    # At the right of the last bar, where nothing else is.
    axes.annotate(
        "vanilla",
        (len(summaries) - 0.5, 1.0),
        xytext=(1, 2),
        textcoords="offset points",
        color=GREY,
        fontsize=7,
        va="bottom",
    )
    axes.set_xlim(-0.6, len(summaries) - 0.5 + _LABEL_SHARE * len(summaries))
    axes.set_ylim(0, top * 1.13)
    axes.set_ylabel(label)
    _name_places(axes, [summary.name for summary in summaries])
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

    Args:
        methods: which ones, in which order; None takes all of each run.

    Returns:
        The paths of ``figure1.pdf`` and ``figure1.png``.

    Raises:
        KoalaBenchError: see ``summaries.summarise``; or a record without a method to show; or a folder that cannot be
            written.
    """
    shown = []
    for of_processes in evaluations(runs):
        rows = [
            summary
            for summary in summaries_of(sample(of_processes, methods))
            if summary.name != VANILLA and not math.isnan(summary.speedup.value)
        ]
        if not rows:
            raise KoalaBenchError(f"{of_processes[0].path} has no method beside vanilla to draw.", "Evaluate with more --methods.")
        shown.append(rows)

    def draw() -> Figure:
        figure = Figure(figsize=(WIDTH_INCHES, ROW_INCHES * len(shown)), layout="constrained")
        panels = figure.subplots(len(shown), 2, squeeze=False)
        for (left, right), rows in zip(panels, shown, strict=True):
            target = f"{short_name(rows[0].target)}\n" if len(shown) > 1 else ""
            _bars(left, rows, [row.speedup for row in rows], f"{target}speedup (x)")
            _bars(right, rows, [row.acceptance_length for row in rows], f"{target}acceptance length (tokens per step)")
        return figure

    return save(draw, out_dir, "figure1")
