"""Figures of two panels: step time against context and against nodes, throughput against batch size."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.figure import Figure
from matplotlib.ticker import StrMethodFormatter

from koala_bench.costs.batches import BatchSpeed
from koala_bench.costs.device import ModelCost
from koala_bench.costs.scaling import StepCost
from koala_bench.results.figures.style import ROW_INCHES, WIDTH_INCHES, grid_lines, looks, save


class _Line(NamedTuple):
    """One line of both panels; ``style`` is a name as ``looks`` takes it."""

    label: str
    style: str
    across: list[int]
    left: list[float]
    right: list[float]


def _write(
    out: Path, name: str, lines: Sequence[_Line], across: Sequence[str], up: Sequence[str], log: bool, shared: bool
) -> list[Path]:
    """Write ``figure-NAME.pdf`` and ``.png``; ``across`` and ``up`` label the axes of the left and the right panel."""

    def draw() -> Figure:
        figure = Figure(figsize=(WIDTH_INCHES, ROW_INCHES), layout="constrained")
        panels = figure.subplots(1, 2, sharey=shared)
        for line, look in zip(lines, looks([line.style for line in lines]), strict=True):
            style = {"color": look.colour, "marker": look.marker, "markersize": 4, "linewidth": 1.2}
            for axes, values in zip(panels, (line.left, line.right), strict=True):
                axes.plot(line.across, values, label=line.label, **style)
        for axes, below, beside in zip(panels, across, up, strict=True):
            axes.set_xlabel(below)
            axes.set_ylabel(beside)
            axes.set_ylim(bottom=0)
            if log:
                axes.set_xscale("log", base=2)
                axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
            grid_lines(axes)
        legend: dict[str, Any] = {"loc": "outside upper center", "ncols": min(6, len(lines)), "columnspacing": 1.2}
        figure.legend(*panels[0].get_legend_handles_labels(), frameon=False, handletextpad=0.4, **legend)
        return figure

    return save(draw, out, f"figure-{name}")


def write_batches(speeds: Sequence[BatchSpeed], out: Path) -> list[Path]:
    """Tokens a second of a whole batch, and the speedup over vanilla at the same batch size."""
    lines = []
    for name in dict.fromkeys(each.method for each in speeds):
        own = [each for each in speeds if each.method == name]
        sizes, rates = [each.size for each in own], [each.tokens_per_s for each in own]
        lines.append(_Line(name, name, sizes, rates, [each.speedup for each in own]))
    up = ("tokens per second, all answers", "speedup over vanilla (x)")
    return _write(out, "batches", lines, ["answers at once"] * 2, up, log=True, shared=False)


def write_context(costs: Sequence[StepCost], out: Path) -> list[Path]:
    """Whole steps, and steps without attention; a line for each number of nodes."""
    lines = []
    for count in dict.fromkeys(cost.nodes for cost in costs):
        own = [cost for cost in costs if cost.nodes == count]
        label = "one node (vanilla)" if count == 1 else f"{count} nodes"
        whole = [1000 * cost.step_s for cost in own]
        rest = [1000 * (cost.step_s - cost.attention_s) for cost in own]
        lines.append(_Line(label, f"nodes-{count}", [cost.context for cost in own], whole, rest))
    across = ("tokens behind a step", "the same, attention itself left out")
    return _write(out, "context", lines, across, ("milliseconds", ""), log=False, shared=True)


def write_nodes(models: Sequence[ModelCost], out: Path) -> list[Path]:
    """Milliseconds of a verification, and in verifications of one node; a line for each model and engine."""
    lines = []
    for each in models:
        style = f"{each.size}+{each.engine}" if each.engine == "graph" else each.size
        times = [1000 * step.step_s for step in each.steps]
        nodes, ratios = [step.nodes for step in each.steps], [value / times[0] for value in times]
        lines.append(_Line(f"{each.size}, {each.engine}", style, nodes, times, ratios))
    up = ("milliseconds", "verifications of one node")
    return _write(out, "nodes", lines, ["nodes of the tree"] * 2, up, log=True, shared=False)
