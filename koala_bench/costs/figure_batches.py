"""Figure of speedup against batch size: what drafting is worth when the target has other answers to work on as well."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from koala_bench.costs.batches import BatchSpeed
from koala_bench.results.figures.style import GREY, ROW_INCHES, WIDTH_INCHES, grid_lines, looks, save


def write_batches(speeds: Sequence[BatchSpeed], out_dir: Path) -> list[Path]:
    """``figure-batches.pdf`` and ``.png``: left tokens a second of a whole batch, right the speedup over vanilla at the
    same batch size.
    """
    names = list(dict.fromkeys(each.method for each in speeds))
    sizes = list(dict.fromkeys(each.size for each in speeds))

    def draw() -> Figure:
        figure = Figure(figsize=(WIDTH_INCHES, ROW_INCHES), layout="constrained")
        rate, speedup = figure.subplots(1, 2)
        styles = dict(zip(names[1:], looks(names[1:]), strict=True))
        for name in names:
            here = [each for each in speeds if each.method == name]
            look = styles.get(name)
            colour, marker = (look.colour, look.marker) if look else (GREY, ".")
            line = {
                "color": colour,
                "marker": marker,
                "markersize": 4,
                "linewidth": 1.2,
                "linestyle": "--" if look is None else "-",
            }
            rate.plot(sizes, [each.tokens_per_s for each in here], label=name, **line)
            speedup.plot(sizes, [each.speedup for each in here], **line)
        for axes, label in ((rate, "tokens per second, all answers"), (speedup, "speedup over vanilla (x)")):
            axes.set_xscale("log", base=2)
            axes.set_xticks(sizes, [str(size) for size in sizes])
            axes.set_xlabel("answers at once")
            axes.set_ylabel(label)
            axes.set_ylim(bottom=0)
            grid_lines(axes)
        rate.legend(frameon=False)
        return figure

    return save(draw, out_dir, "figure-batches")
