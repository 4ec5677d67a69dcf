"""One style for all figures, and writing them without dates or versions.

The colour-blind-safe palette of Okabe and Ito (2008), no title inside, and sizes that stay readable when a figure is
set across the text width of a paper (7 inches). Original heads are light, their variants dark in the same hue, so that
a pair reads as one, in grey print too; bars of one colour are told apart by their hatching.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from koala_bench.common.files import replacing
from koala_bench.records.statistics import Interval

_STYLE: dict[str, Any] = {
    "font.family": "DejaVu Sans",  # comes with matplotlib, so it is the same on every machine
    "font.size": 8,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "hatch.linewidth": 0.7,
    "pdf.fonttype": 42,  # text stays text
    "savefig.dpi": 200,
}
_LEGEND_ENTRIES = 5  # side by side, at the width of the text
WIDTH_INCHES, ROW_INCHES = 7.0, 2.7
GREY = "#444444"
DASHES = (0, (4, 3))

# Light and dark of one hue, after Okabe and Ito's blue, vermilion, green, purple and orange.
_PAIRS = (
    ("#8CC4E8", "#0072B2"),
    ("#F2B38A", "#D55E00"),
    ("#8FD3BC", "#009E73"),
    ("#E3BBD2", "#A8487F"),
    ("#F7D58B", "#C98A00"),
)
_MARKERS = "os^Dv"
_HATCHES = ("", "/////", ".....", "xxxxx", "-----", "|||||")


@dataclass(frozen=True)
class Look:
    """How a method is drawn.

    Attributes:
        hatch: of its bars; empty for the first method of a colour.
        lines: colour of the hatching.
    """

    colour: str
    marker: str
    dashed: bool
    hatch: str
    lines: str


def head_of(method: str) -> str:
    """The original head that a method's name begins with: ``eagle`` of ``eagle+koala`` and of ``eagle@3``."""
    return re.split(r"[+@]", method)[0]


def looks(methods: Sequence[str]) -> list[Look]:
    """A look for each method by name; several variants of a head differ by their marker and by the hatching of their
    bars, and so do heads of one hue, where there are more heads than hues."""
    hues = list(dict.fromkeys(head_of(method) for method in methods))
    found: list[Look] = []
    for place, method in enumerate(methods):
        head, is_variant = head_of(method), head_of(method) != method
        earlier = sum(1 for other in methods[:place] if head_of(other) == head and other != head)
        again, hue = divmod(hues.index(head), len(_PAIRS))
        marker = _MARKERS[(1 + earlier if is_variant else again) % len(_MARKERS)]
        colour = _PAIRS[hue][is_variant]
        hatch = _HATCHES[sum(1 for look in found if look.colour == colour) % len(_HATCHES)]
        found.append(Look(colour, marker, is_variant, hatch, "white" if is_variant else _PAIRS[hue][True]))
    return found


def bars(
    axes: Axes, across: Sequence[float], heights: Sequence[float], looks: Sequence[Look], width: float, **more: Any
) -> None:
    """One bar each, without an outline."""
    drawn = axes.bar(across, heights, width=width, color=[look.colour for look in looks], **more)
    for bar, look in zip(drawn, looks, strict=True):
        if look.hatch:
            bar.set(hatch=look.hatch, edgecolor=look.lines, linewidth=0)


def error_bars(axes: Axes, across: Sequence[float], measured: Sequence[Interval], **style: Any) -> None:
    """Values with their intervals, which are not drawn where they are NaN."""
    ends = [[each.value - each.low for each in measured], [each.high - each.value for each in measured]]
    axes.errorbar(across, [each.value for each in measured], yerr=ends, **style)


def grid_lines(axes: Axes) -> None:
    """Thin horizontal lines behind everything."""
    axes.yaxis.grid(True, color="#DDDDDD", linewidth=0.5)


def save(draw: Callable[[], Figure], out_dir: Path, name: str) -> list[Path]:
    """Write PDF and PNG without dates or versions in them; returns the two paths."""
    # After a reset, so that whatever style the user has set elsewhere changes nothing.
    with style.context(_STYLE, after_reset=True):
        figure = draw()
        FigureCanvasAgg(figure)
        metadata = {
            "pdf": {"CreationDate": None, "ModDate": None, "Producer": None, "Creator": None},
            "png": {"Software": None},
        }
        written = []
        for kind, without in metadata.items():
            path = out_dir / f"{name}.{kind}"
            with replacing(path) as temporary:
                figure.savefig(temporary, format=kind, metadata=without)
            written.append(path)
    return written


def panels(rows: int, columns: int, height: float, **layout: Any) -> tuple[Figure, Any]:
    """A figure of the text's width, its height in inches, and its axes [rows, columns]."""
    figure = Figure(figsize=(WIDTH_INCHES, height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **layout)


def legend(figure: Figure, axes: Axes) -> None:
    """One legend above all panels, of what stands in one of them, in as many rows as its entries need."""
    handles, labels = axes.get_legend_handles_labels()
    legend_above(figure, handles, labels)


def legend_above(figure: Figure, handles: Sequence[Any], labels: Sequence[str]) -> None:
    """A legend of these entries above all panels, in as many rows as they need."""
    rows = -(-len(labels) // _LEGEND_ENTRIES)
    columns = -(-len(labels) // max(1, rows))
    figure.legend(handles, labels, loc="outside upper center", ncols=columns, frameon=False)


def vanilla_line(axes: Axes, right: float, zorder: int = 3, **place: Any) -> None:
    """The dashed line at 1, with its name at the right, where nothing else is."""
    axes.axhline(1.0, color=GREY, linewidth=0.9, linestyle=DASHES, zorder=zorder)
    usual = {"xytext": (1, 2), "textcoords": "offset points", "color": GREY, "fontsize": 7, "va": "bottom"}
    axes.annotate("vanilla", (right, 1.0), **{**usual, **place})


def bar_intervals(
    axes: Axes, across: Sequence[float], measured: Sequence[Interval], colour: str, width: float, cap: float
) -> None:
    """The intervals of bars; ``width`` and ``cap`` in points."""
    error_bars(axes, across, measured, fmt="none", ecolor=colour, elinewidth=width, capsize=cap, capthick=width)


def curve_with_intervals(
    axes: Axes, across: Sequence[float], measured: Sequence[Interval], look: Look, dashed: bool, label: str
) -> None:
    """Draw a line through measured values, each with its interval."""
    line: dict[str, Any] = {"color": look.colour, "marker": look.marker, "markersize": 4, "linewidth": 1.2}
    error_bars(
        axes, across, measured, **line, linestyle="--" if dashed else "-", elinewidth=0.9, capsize=2, label=label
    )
