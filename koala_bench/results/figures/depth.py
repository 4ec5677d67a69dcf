"""Figure of the acceptance rate by depth: given that the parent was accepted, and of all steps."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from koala_bench.errors import KoalaBenchError
from koala_bench.records.definitions import DepthRate, acceptance_rate_by_depth, unconditional_rate_by_depth
from koala_bench.records.reading import Run
from koala_bench.records.statistics import Array, Interval
from koala_bench.records.summaries import VANILLA, Sample, sample
from koala_bench.results.figures.style import ROW_INCHES, curve_with_intervals, grid_lines, legend, looks, panels, save
from koala_bench.results.tables.notes import labels

_DODGE = 0.08  # methods stand beside each other, so that their intervals can be told apart


@dataclass(frozen=True)
class _Curve:
    method: str
    depths: list[int]
    rates: list[Interval]


def _rate(counts: Array, weights: Array) -> Array:
    """Accepted / trials of [questions, 2]."""
    return (weights @ counts[:, 0]) / (weights @ counts[:, 1])


def _curve(chosen: Sample, method: str, rates_of: Callable[..., list[DepthRate]]) -> _Curve:
    questions = chosen.totals[VANILLA].question_ids
    steps: dict[int, tuple[list[int], list[int]]] = {question: ([], []) for question in questions}
    for turn in chosen.turns(method):
        steps[turn["question_id"]][0].extend(turn["accepted"] or [])
        steps[turn["question_id"]][1].extend(turn["drafted_depth"] or [])
    every = rates_of(*(list(itertools.chain(*each)) for each in zip(*steps.values(), strict=True)))
    by_question = [{rate.depth: rate for rate in rates_of(*steps[question])} for question in questions]
    depths = [rate.depth for rate in every if rate.trials]
    rates = []
    for depth in depths:
        none = DepthRate(depth, 0, 0)
        counts = np.array(
            [[of.get(depth, none).accepted, of.get(depth, none).trials] for of in by_question], np.float64
        )
        with np.errstate(invalid="ignore", divide="ignore"):  # a resample without a trial has no rate
            rates.append(chosen.interval(partial(_rate, counts)))
    return _Curve(method, depths, rates)


def _draw(axes: Axes, curves: Sequence[_Curve], label: str) -> None:
    apart = min(_DODGE, 0.7 / len(curves))  # within the limits below
    for place, (curve, look) in enumerate(zip(curves, looks([curve.method for curve in curves]), strict=True)):
        across = [depth + apart * (place - (len(curves) - 1) / 2) for depth in curve.depths]
        curve_with_intervals(axes, across, curve.rates, look, look.dashed, curve.method)
    deepest = max(depth for curve in curves for depth in curve.depths)
    axes.set_xlim(0.6, deepest + 0.4)
    axes.set_ylim(0, 1)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("depth in the draft tree (tokens)")
    axes.set_ylabel(label)
    grid_lines(axes)


def write_depth(runs: Sequence[Run], out_dir: Path, methods: Sequence[str]) -> list[Path]:
    """``figure-depth.pdf`` and ``.png``: acceptance rate by depth with 95 % intervals over questions, one row of panels
    per record.

    At the left given that the parent was accepted, at the right of all steps that drafted.
    """
    shown = []
    for label, run in zip(labels(runs), runs, strict=True):
        chosen = sample([run], methods)
        both = [
            [curve for curve in (_curve(chosen, name, rates_of) for name in chosen.drafting) if curve.depths]
            for rates_of in (acceptance_rate_by_depth, unconditional_rate_by_depth)
        ]
        if not both[0]:
            raise KoalaBenchError(f"{run.path} has no method that drafts.", "Evaluate with more --methods.")
        shown.append((label, both))

    def draw() -> Figure:
        figure, axes = panels(len(shown), 2, ROW_INCHES * len(shown) + 0.3)
        for (left, right), (label, (conditional, every)) in zip(axes, shown, strict=True):
            target = f"{label}\n" if len(shown) > 1 else ""
            _draw(left, conditional, f"{target}acceptance rate given the parent")
            _draw(right, every, f"{target}acceptance rate of all steps")
        legend(figure, axes[0][0])
        return figure

    return save(draw, out_dir, "figure-depth")
