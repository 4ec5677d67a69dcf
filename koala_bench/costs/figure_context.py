"""Figure of step time against context: what a step takes behind more and more tokens, and how much of it is not the
attention.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from koala_bench.costs.scaling import StepCost
from koala_bench.results.figures.style import ROW_INCHES, WIDTH_INCHES, grid_lines, looks, save


def write_context(costs: Sequence[StepCost], out_dir: Path) -> list[Path]:
    """``figure-context.pdf`` and ``.png``: left whole steps, right steps less the attention by itself; a line for each
    number of nodes.
    """
    counts = list(dict.fromkeys(cost.nodes for cost in costs))

    def draw() -> Figure:
        figure = Figure(figsize=(WIDTH_INCHES, ROW_INCHES), layout="constrained")
        whole, rest = figure.subplots(1, 2, sharey=True)
        for count, look in zip(counts, looks([f"nodes-{count}" for count in counts]), strict=True):
            here = [cost for cost in costs if cost.nodes == count]
            across = [cost.context for cost in here]
            label = "one node (vanilla)" if count == 1 else f"{count} nodes"
            for axes, values in (
                (whole, [cost.step_s for cost in here]),
                (rest, [cost.step_s - cost.attention_s for cost in here]),
            ):
                axes.plot(
                    across,
                    [1000 * value for value in values],
                    color=look.colour,
                    marker=look.marker,
                    markersize=4,
                    linewidth=1.2,
                    label=label,
                )
        whole.set_ylabel("milliseconds")
        for axes, title in ((whole, "tokens behind a step"), (rest, "the same, attention itself left out")):
            axes.set_xlabel(title)
            axes.set_ylim(bottom=0)
            grid_lines(axes)
        whole.legend(frameon=False)
        return figure

    return save(draw, out_dir, "figure-context")
