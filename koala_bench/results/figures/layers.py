"""Figure of the speedup, the acceptance length and the draft overhead against the number of layers K."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure

from koala_bench.errors import KoalaBenchError
from koala_bench.records.reading import Run, short_names
from koala_bench.records.statistics import Interval
from koala_bench.records.summaries import Summary, summarise
from koala_bench.results.figures import style
from koala_bench.results.figures.style import ROW_INCHES

_CURVE = 3  # numbers of layers
_PANELS = ("speedup (x)", "acceptance length (tokens per step)", "draft overhead (%)")
_VARIANT = re.compile(r"(@\d+|\+layers|\+adversarial|\+koala)$")  # of a method: other layers, another training
_DODGE = 0.07  # curves stand beside each other, so that their intervals can be told apart


@dataclass(frozen=True)
class Curve:
    """A family of methods on one target, which differ in their head's number of layers alone.

    Attributes:
        family: the method that the others are variants of, such as ``eagle2`` of ``eagle2@3``.
        head: what all of them decode with; other families may have the same one.
        adversarial: whether the heads were trained with an adversarial term.
        points: by ascending K.
    """

    target: str
    head: str
    family: str
    adversarial: bool
    points: list[Summary]

    @property
    def label(self) -> str:
        """What the legend says."""
        return f"{self.family}, adversarial" if self.adversarial else self.family


def family_of(method: str) -> str:
    """The method that a method is a variant of; itself if of none."""
    return _VARIANT.sub("", method)


def curves(runs: Sequence[Run], heads: Sequence[str]) -> list[Curve]:
    """The curves over K that records hold, whether one record has all K or each has its own.

    Raises:
        KoalaBenchError: two methods are the same head with the same K, or no head has two K.
    """
    found: dict[tuple[str, str, str, bool], dict[int, Summary]] = {}
    for run in runs:
        for summary in summarise(run):
            method = summary.method
            if method["head"] not in heads or math.isnan(summary.speedup.value):
                continue
            family = summary.target, str(method["head"]), family_of(summary.name), method["adversarial"]
            points = found.setdefault(family, {})
            if method["layers"] in points:
                raise KoalaBenchError(
                    f"{run.path}: {summary.name} has K = {method['layers']}, as {points[method['layers']].name} has.",
                    "Name records with other --layers.",
                )
            points[method["layers"]] = summary
    # Two points, such as of the ablation's adversarial methods, are no curve beside longer ones.
    fewest = min(_CURVE, max((len(points) for points in found.values()), default=0))
    drawn = [Curve(*key, [points[k] for k in sorted(points)]) for key, points in found.items() if len(points) >= fewest]
    if fewest < 2:
        raise KoalaBenchError(
            f"{runs[0].path} has no head with several numbers of layers.",
            "Use `koala-bench reproduce figures`, or name records made with several --layers.",
        )
    return sorted(drawn, key=lambda curve: (curve.target, heads.index(curve.head), curve.family, curve.adversarial))


def has_curves(runs: Sequence[Run], heads: Sequence[str]) -> bool:
    """Whether records hold a head with several numbers of layers."""
    kinds = {
        (run.header["target"]["name"], family_of(method["name"]), method["adversarial"], method["layers"])
        for run in runs
        for method in run.header["methods"]
        if method["head"] in heads
    }
    curves_of = [kind[:3] for kind in kinds]
    return len(curves_of) > len(set(curves_of))


def write_layers(runs: Sequence[Run], out_dir: Path, heads: Sequence[str]) -> list[Path]:
    """Against K the speedup and the acceptance length with their intervals, and the draft overhead."""
    drawn = curves(runs, heads)
    targets = short_names(curve.target for curve in drawn)

    def draw() -> Figure:
        figure, axes = style.panels(len(targets), 3, (ROW_INCHES - 0.2) * len(targets) + 0.3)
        for row, target in zip(axes, targets, strict=True):
            here = [curve for curve in drawn if curve.target == target]
            layers = sorted({point.method["layers"] for curve in here for point in curve.points})
            # without, the darker of the two hues is free for the one there is
            paired = any(curve.adversarial for curve in here)
            looks = style.looks(
                [f"{curve.family}+" if curve.adversarial or not paired else curve.family for curve in here]
            )
            for place, (curve, look) in enumerate(zip(here, looks, strict=True)):
                across = [point.method["layers"] + _DODGE * (place - (len(here) - 1) / 2) for point in curve.points]
                for panel, measured in zip(row, zip(*map(_values, curve.points), strict=True), strict=True):
                    style.curve_with_intervals(panel, across, measured, look, curve.adversarial, curve.label)
            style.vanilla_line(
                row[0], 1.0, 1, xycoords=("axes fraction", "data"), xytext=(0, 2), ha="right", va="baseline"
            )
            prefix = f"{targets[target]}\n" if len(targets) > 1 else ""
            for panel, label in zip(row, _PANELS, strict=True):
                panel.set_ylabel(prefix + label)
                panel.set_xlabel("layers K")
                panel.set_xticks(layers)
                panel.margins(x=0.08, y=0.12)
                style.grid_lines(panel)
            row[0].set_xlim(0.6, 1.22 * layers[-1])  # room for the word at its right
            row[2].set_ylim(bottom=0)
        labels = {
            label: handle for row in axes for handle, label in zip(*row[0].get_legend_handles_labels(), strict=True)
        }
        style.legend_above(figure, list(labels.values()), list(labels))
        return figure

    return style.save(draw, out_dir, "figure-layers")


def _values(point: Summary) -> tuple[Interval, Interval, Interval]:
    """What the three panels show of a method."""
    share = math.nan if point.draft_overhead is None else 100.0 * point.draft_overhead
    return point.speedup, point.acceptance_length, Interval(share, math.nan, math.nan)
