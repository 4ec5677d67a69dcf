"""Figure of predicted against measured speedup: is the speedup what the times of drafting, verifying and a vanilla step
say?

Predicted: tau * t_base / (t_draft + t_verify), the mean tokens of a step over its cost in vanilla steps. Leviathan et
    al.
(2023, arXiv 2211.17192, Theorem 3.8) have this with the tokens of a chain of independent drafts for tau and a
verification that costs as much as a vanilla step; here all of tau, t_draft, t_verify and t_base are measured.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from matplotlib.figure import Figure

from koala_bench.errors import KoalaBenchError
from koala_bench.records import statistics
from koala_bench.records.reading import Run
from koala_bench.records.schema import TurnLine
from koala_bench.records.statistics import Interval, Totals
from koala_bench.records.summaries import VANILLA, Sample, sample
from koala_bench.results.figures.style import GREY, Look, grid_lines, looks, save
from koala_bench.results.tables.notes import labels

_INCHES = 3.6


@dataclass(frozen=True)
class Point:
    """Speedup of a method, as predicted from the times of its steps and as measured."""

    method: str
    predicted: Interval
    measured: Interval


def _parts(turns: Sequence[TurnLine]) -> Totals | None:
    """Totals whose seconds are those of drafting and verifying alone; None if these were not timed in every turn."""
    if not turns or any(turn["draft_s"] is None or turn["verify_s"] is None for turn in turns):
        return None
    timed: list[TurnLine] = [
        {**turn, "decode_s": (turn["draft_s"] or 0.0) + (turn["verify_s"] or 0.0)} for turn in turns
    ]
    return statistics.totals(timed)


def predictions(chosen: Sample) -> list[Point]:
    """One point per method whose steps were timed in parts; none if vanilla's were not.

    tau * t_base / (t_draft + t_verify) is the tokens per second of drafting and verifying over vanilla's, as a step of
    vanilla gives one token.
    """
    base = _parts(chosen.turns(VANILLA))
    points = []
    for name in (name for name in chosen.names if name != VANILLA and name in chosen.totals):
        here = _parts(chosen.turns(name))
        if base is not None and here is not None:
            points.append(
                Point(
                    name,
                    chosen.interval(statistics.speedup_of_totals(here, base)),
                    chosen.interval(chosen.speedup(name)),
                )
            )
    return points


def _by_category(run: Run, methods: Sequence[str]) -> list[Point]:
    categories = dict.fromkeys(turn["category"] for turn in run.turns if turn["error"] is None)
    parts = [
        replace(run, turns=[turn for turn in run.turns if turn["category"] == category]) for category in categories
    ]
    # A category without a question that every method has finished says nothing here; the whole record still does.
    return [point for part in parts if _is_common(part, methods) for point in predictions(sample([part], methods))]


def _is_common(run: Run, methods: Sequence[str]) -> bool:
    done = [
        {(t["question_id"], t["turn"], t["repeat"]) for t in run.turns_of(name) if t["error"] is None}
        for name in (VANILLA, *methods)
    ]
    return bool(done[0]) and bool(set.intersection(*(places for places in done if places)))


def write_prediction(runs: Sequence[Run], out_dir: Path, methods: Sequence[str]) -> list[Path]:
    """``figure-prediction.pdf`` and ``.png``: measured against predicted speedup, a panel per record.

    Large marks are whole methods with 95 % intervals over questions, small ones their categories.

    Args:
        methods: which ones, in which order; those that a record does not have are passed over.

    Raises:
        KoalaBenchError: see ``summaries.sample``, or the parts of the steps were not timed.
    """
    shown: list[tuple[str, list[Point], list[Point]]] = []
    for label, run in zip(labels(runs), runs, strict=True):
        points = predictions(sample([run], methods))
        if not points:
            raise KoalaBenchError(
                f"{run.path} does not say how long drafting and verifying took.", "Evaluate again with this version."
            )
        shown.append((label, points, _by_category(run, [point.method for point in points])))

    def draw() -> Figure:
        figure = Figure(figsize=(_INCHES * len(shown), _INCHES), layout="constrained")
        panels = figure.subplots(1, len(shown), squeeze=False)[0]
        for axes, (label, points, small) in zip(panels, shown, strict=True):
            styles: dict[str, Look] = dict(
                zip([p.method for p in points], looks([p.method for p in points]), strict=True)
            )
            reach = [value for p in (*points, *small) for value in (p.predicted.value, p.measured.value)]
            reach += [
                end
                for p in points
                for each in (p.predicted, p.measured)
                for end in (each.low, each.high)
                if not math.isnan(end)
            ]
            low, high = min(reach), max(reach)
            ends = (low - 0.06 * (high - low) - 0.02, high + 0.06 * (high - low) + 0.02)
            axes.plot(ends, ends, color=GREY, linewidth=0.9, linestyle=(0, (4, 3)), zorder=1)
            for point in small:
                look = styles[point.method]
                axes.plot(
                    point.predicted.value,
                    point.measured.value,
                    look.marker,
                    color=look.colour,
                    markersize=3.5,
                    alpha=0.45,
                    markeredgewidth=0,
                )
            for point in points:
                look, x, y = styles[point.method], point.predicted, point.measured
                axes.errorbar(
                    x.value,
                    y.value,
                    xerr=[[x.value - x.low], [x.high - x.value]],
                    yerr=[[y.value - y.low], [y.high - y.value]],
                    color=look.colour,
                    marker=look.marker,
                    markersize=6.5,
                    markeredgecolor="black",
                    markeredgewidth=0.6,
                    ecolor="black",
                    elinewidth=0.7,
                    capsize=2,
                    linestyle="none",
                    label=point.method,
                    zorder=3,
                )
            axes.set_xlim(*ends)
            axes.set_ylim(*ends)
            axes.set_aspect("equal")
            axes.set_xlabel(r"predicted speedup (x): $\tau\, t_{base}\, /\, (t_{draft} + t_{verify})$")
            axes.set_ylabel(f"{label}\nmeasured speedup (x)" if len(shown) > 1 else "measured speedup (x)")
            grid_lines(axes)
            axes.legend(loc="upper left", frameon=False, handletextpad=0.3)
        return figure

    return save(draw, out_dir, "figure-prediction")
