"""Figure of step time against nodes: what verifying larger trees costs, for each model and engine."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import StrMethodFormatter

from koala_bench.costs.device import ModelCost
from koala_bench.results.figures.style import ROW_INCHES, WIDTH_INCHES, grid_lines, looks, save


def write_nodes(models: Sequence[ModelCost], out_dir: Path) -> list[Path]:
    """``figure-nodes.pdf`` and ``.png``: left milliseconds, right in verifications of one node; a line for each model
    and engine.
    """

    def draw() -> Figure:
        figure = Figure(figsize=(WIDTH_INCHES, ROW_INCHES), layout="constrained")
        absolute, relative = figure.subplots(1, 2)
        names = [f"{each.size}+{each.engine}" if each.engine == "graph" else each.size for each in models]
        for each, look in zip(models, looks(names), strict=True):
            across = [step.nodes for step in each.steps]
            times = [1000 * step.step_s for step in each.steps]
            for axes, values in ((absolute, times), (relative, [value / times[0] for value in times])):
                axes.plot(
                    across,
                    values,
                    color=look.colour,
                    marker=look.marker,
                    markersize=4,
                    linewidth=1.2,
                    label=f"{each.size}, {each.engine}",
                )
        absolute.set_ylabel("milliseconds")
        relative.set_ylabel("verifications of one node")
        for axes in (absolute, relative):
            axes.set_xlabel("nodes of the tree")
            axes.set_xscale("log", base=2)
            axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
            axes.set_ylim(bottom=0)
            grid_lines(axes)
        figure.legend(
            *absolute.get_legend_handles_labels(),
            loc="outside upper center",
            ncols=len(models),
            frameon=False,
            columnspacing=1.2,
            handletextpad=0.4,
        )
        return figure

    return save(draw, out_dir, "figure-nodes")
