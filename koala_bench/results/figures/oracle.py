"""Figure of each method's distance from its oracle: lengths that were not accepted, and time spent drafting."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from koala_bench.errors import KoalaBenchError
from koala_bench.records.bounds import Bounds, bounds
from koala_bench.records.reading import Run, short_names
from koala_bench.records.summaries import evaluations, sample
from koala_bench.results.figures.style import DASHES, GREY, panels, save

_ROW, _REST = 0.34, 1.0  # inches of a bar, and of a panel beside its bars
_LENGTHS, _DRAFTING = "lengths not accepted", "time spent drafting"
_BAR = 0.62
_TICKS = (0.25, 0.5, 0.75, 1, 1.25, 1.5, 2, 2.5, 3, 4, 5, 6, 8)


def _draw(axes: Axes, found: Sequence[tuple[str, Bounds]]) -> None:
    """From the measured speedup times (oracle's length / length), then times (step / step without drafting). On a
    logarithmic axis a factor is as long wherever it stands, so the order of the two says nothing.
    """
    for place, (_, each) in enumerate(found):
        end = each.free_oracle_speedup or each.oracle_speedup
        axes.barh(place, each.oracle_speedup - each.speedup, _BAR, each.speedup, color="#8CC4E8", label=_LENGTHS)
        axes.barh(place, end - each.oracle_speedup, _BAR, each.oracle_speedup, color="#F2B38A", label=_DRAFTING)
        axes.plot([each.speedup], [place], "o", color="black", markersize=4)
        said = f" {each.speedup:.2f}x of {each.oracle_speedup:.2f}x, {end:.2f}x with free drafts"
        axes.annotate(said, (end, place), va="center", fontsize=7, color=GREY)
    axes.axvline(1.0, color=GREY, linewidth=0.9, linestyle=DASHES, zorder=1)
    axes.set_xscale("log")
    low = min(1.0, *(each.speedup for _, each in found))
    high = max(each.free_oracle_speedup or each.oracle_speedup for _, each in found)
    axes.set_xticks(_TICKS, [f"{tick:g}" for tick in _TICKS])
    axes.set_xticks([], minor=True)
    axes.set_xlim(low / 1.1, high * (high / low) ** 0.6 * 1.2)  # room for the words behind the bars
    axes.set_yticks(range(len(found)), [name for name, _ in found])
    axes.invert_yaxis()
    axes.set_xlabel("speedup (x), logarithmic")


def write_oracle(runs: Sequence[Run], out_dir: Path, methods: Sequence[str]) -> list[Path]:
    """A bar per method from its speedup to its oracle's, and on to an oracle's whose drafts take no time.

    Raises:
        KoalaBenchError: see ``summaries.sample``, or a record without a method that drafts.
    """
    shown = []
    for group in evaluations(runs):
        chosen = sample(group, methods)
        found = [(name, each) for name in chosen.drafting if (each := bounds(chosen.pairs(name))) is not None]
        if not found:
            raise KoalaBenchError(f"{group[0].path} has no method that drafts.", "Evaluate with more --methods.")
        shown.append((group[0].header["target"]["name"], found))

    targets = short_names(target for target, _ in shown)

    def draw() -> Figure:
        heights = [_ROW * len(found) + _REST for _, found in shown]
        figure, each_axes = panels(len(shown), 1, sum(heights), height_ratios=heights)
        for (axes,), (target, found) in zip(each_axes, shown, strict=True):
            _draw(axes, found)
            axes.set_ylabel(targets[target] if len(shown) > 1 else "")
        handles = dict(zip(*reversed(each_axes[0][0].get_legend_handles_labels()), strict=True))
        kinds = (_LENGTHS, _DRAFTING)
        figure.legend([handles[kind] for kind in kinds], kinds, loc="outside upper center", ncols=2, frameon=False)
        return figure

    return save(draw, out_dir, "figure-oracle")
