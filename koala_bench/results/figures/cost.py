"""Figure of the acceptance length against the cost of a draft, for heads with several numbers of layers K.

A head that drafts level by level pays its layers once per level, one that drafts in one pass once per draft: here both
stand on the same axes.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from koala_bench.errors import KoalaBenchError
from koala_bench.records.bounds import bounds
from koala_bench.records.reading import Run, short_names
from koala_bench.records.statistics import Interval
from koala_bench.records.summaries import evaluations, sample
from koala_bench.results.figures import style
from koala_bench.results.figures.style import DASHES, GREY, ROW_INCHES

_CURVE = 2  # numbers of layers that make a curve
# K, the cost of a draft in vanilla tokens, the acceptance length, and the break-even length without drafting
Point = tuple[int, float, Interval, float]


def head_with_layers(method: str, heads: Sequence[str]) -> str | None:
    """The head of a method that is one of them, as it is or with other layers and nothing else (``eagle@4``)."""
    return next((head for head in heads if re.fullmatch(rf"{re.escape(head)}(@\d+|\+layers)?", method)), None)


def has_cost_curves(runs: Sequence[Run], heads: Sequence[str]) -> bool:
    """Whether a record holds one of the heads with several numbers of layers."""
    found = [[head for name in run.methods if (head := head_with_layers(name, heads))] for run in runs]
    return any(each.count(head) >= _CURVE for each in found for head in each)


def cost_curves(runs: Sequence[Run], heads: Sequence[str]) -> list[tuple[str, str, list[Point]]]:
    """Target, head and its points by ascending K; methods whose parts of a step were not timed have no point.

    Raises:
        KoalaBenchError: see ``summaries.sample``, or no head has several numbers of layers with timed drafts.
    """
    curves = []
    for group in evaluations(runs):
        chosen = sample(group)
        found: dict[str, list[Point]] = {}
        for name in chosen.names:
            head = head_with_layers(name, heads)
            each = bounds(chosen.pairs(name)) if head and name in chosen.totals else None
            if head is not None and each is not None and each.draft_share is not None:
                draft = each.break_even * each.draft_share
                layers, length = group[0].methods[name]["layers"], chosen.interval(chosen.length(name))
                found.setdefault(head, []).append((layers, draft, length, each.break_even - draft))
        target = group[0].header["target"]["name"]
        curves += [(target, head, sorted(found[head])) for head in heads if len(found.get(head, [])) >= _CURVE]
    if not curves:
        raise KoalaBenchError(
            f"{runs[0].path} has no head with several numbers of layers and timed drafts.",
            "Use `koala-bench reproduce cost`, or name its record.",
        )
    return curves


def write_cost(runs: Sequence[Run], out_dir: Path, heads: Sequence[str]) -> list[Path]:
    """``figure-cost.pdf`` and ``.png``: a curve over K for each head, with 95 % intervals of the length.

    Dashed lines are of equal speed: the length that a draft of this cost needs for a speedup of 1, 1.5, 2, ..., at the
    mean seconds that the rest of a step takes.

    Raises:
        KoalaBenchError: see ``cost_curves``.
    """
    drawn = cost_curves(runs, heads)
    targets = short_names(target for target, _, _ in drawn)

    def draw() -> Figure:
        figure, panels = style.panels(len(targets), 1, (ROW_INCHES + 0.6) * len(targets))
        for (axes,), target in zip(panels, targets, strict=True):
            here = [(head, points) for each, head, points in drawn if each == target]
            for (head, points), look in zip(here, style.looks([head for head, _ in here]), strict=True):
                costs, lengths = [point[1] for point in points], [point[2] for point in points]
                style.curve_with_intervals(axes, costs, lengths, look, False, head)
                for layers, cost, length, _ in points:
                    place = (cost, length.value)
                    axes.annotate(f"K={layers}", place, xytext=(4, 4), textcoords="offset points", fontsize=7)
            axes.set_xlim(left=0)
            axes.margins(x=0.1, y=0.15)
            (left, right), (low, high) = axes.get_xlim(), axes.get_ylim()
            rest = float(np.mean([point[3] for _, points in here for point in points]))
            for speed in np.arange(0.5, 6.0, 0.25):
                ends = [speed * (rest + cost) for cost in (left, right)]
                if ends[0] < high and ends[1] > low:
                    axes.plot([left, right], ends, color=GREY, linewidth=0.6, linestyle=DASHES, zorder=0)
                    across = min(right, (high / speed) - rest)
                    axes.annotate(f"{speed:g}x", (across, speed * (rest + across)), fontsize=7, color=GREY)
            axes.set_ylim(low, high)
            axes.set_xlabel("cost of a draft (vanilla tokens)")
            several = f"{targets[target]}\nacceptance length"
            axes.set_ylabel(several if len(targets) > 1 else "acceptance length (tokens per step)")
            axes.legend(loc="best", facecolor="white", framealpha=1, edgecolor="white")
        return figure

    return style.save(draw, out_dir, "figure-cost")
