"""Figure of speedup and acceptance length against the draft vocabulary: heads that are cut, beside heads trained on a
cut one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure

from koala_bench.errors import KoalaBenchError
from koala_bench.presets import cut_of
from koala_bench.records.reading import Run, short_names
from koala_bench.records.summaries import Summary, summarise
from koala_bench.results.figures import style
from koala_bench.results.figures.style import ROW_INCHES

_CURVE = 2  # vocabularies that make a curve
_PANELS = ("speedup (x)", "acceptance length (tokens per step)")
_WHOLE = math.inf


@dataclass(frozen=True)
class Curve:
    """One trained head on one target, decoded with on several draft vocabularies.

    Attributes:
        head: the method whose head it is.
        points: by ascending number of drafted tokens, infinite for the whole vocabulary.
        trained: methods of the same kind whose heads were trained on a cut vocabulary, by its size.
    """

    target: str
    head: str
    points: dict[float, Summary]
    trained: dict[float, Summary]


def _size(summary: Summary) -> float:
    return summary.method.get("draft_vocabulary", _WHOLE)


def _kind(summary: Summary) -> tuple[object, ...]:
    method = summary.method
    objective = method["adversarial"], method.get("objective")
    return method["head"], method["layers"], *objective, method["tree"] and method["tree"]["name"]


def _head_of(name: str) -> str:
    """The method whose head another decodes with, cut or not."""
    cut = cut_of(name)
    return cut[0] if cut else name


def vocabulary_curves(runs: Sequence[Run]) -> list[Curve]:
    """The curves that records hold.

    Raises:
        KoalaBenchError: no head was decoded with on several draft vocabularies.
    """
    found = []
    for run in runs:
        every = [each for each in summarise(run) if each.method["head"] and not math.isnan(each.speedup.value)]
        heads: dict[str, dict[float, Summary]] = {}
        for each in every:
            heads.setdefault(_head_of(each.name), {})[_size(each)] = each
        curves = {head: points for head, points in heads.items() if len(points) >= _CURVE}
        for head, points in curves.items():
            one = next(iter(points.values()))
            others = [each for each in every if _head_of(each.name) not in curves and _size(each) < _WHOLE]
            trained = {_size(each): each for each in others if _kind(each) == _kind(one)}
            found.append(Curve(one.target, head, dict(sorted(points.items())), trained))
    if not found:
        raise KoalaBenchError(
            f"{runs[0].path} has no head with several draft vocabularies.",
            "Evaluate methods such as eagle+vocab8k beside eagle, whose head must be of the whole vocabulary.",
        )
    return found


def has_vocabulary_curves(runs: Sequence[Run]) -> bool:
    """Whether records hold a head that was decoded with on several draft vocabularies."""
    return any(len({*map(_head_of, run.methods)}) < len(run.methods) for run in runs)


def write_vocabulary(runs: Sequence[Run], out_dir: Path) -> list[Path]:
    """``figure-vocabulary.pdf`` and ``.png``: a line for each head that is cut, an empty marker for each that was
    trained on a cut vocabulary, with 95 % intervals; vocabularies stand side by side, the whole one at the right.

    Raises:
        KoalaBenchError: see ``vocabulary_curves``.
    """
    drawn = vocabulary_curves(runs)
    targets = short_names(curve.target for curve in drawn)

    def draw() -> Figure:
        figure, axes = style.panels(len(targets), 2, ROW_INCHES * len(targets) + 0.3)
        for row, target in zip(axes, targets, strict=True):
            here = [curve for curve in drawn if curve.target == target]
            sizes = sorted({size for curve in here for size in (*curve.points, *curve.trained)})
            for place, (curve, look) in enumerate(zip(here, style.looks([c.head for c in here]), strict=True)):
                shift = 0.12 * (place - (len(here) - 1) / 2)
                for points, trained in ((curve.points, False), (curve.trained, True)):
                    across = [sizes.index(size) + shift + 0.06 * trained for size in points]
                    label = f"{curve.head}, trained on it" if trained else f"{curve.head}, cut"
                    values = zip(*((each.speedup, each.acceptance_length) for each in points.values()), strict=True)
                    for panel, measured in zip(row, values, strict=False):
                        lines = {"linestyle": "none", "markerfacecolor": "white"} if trained else {"linestyle": "-"}
                        style.error_bars(
                            panel, across, measured, color=look.colour, marker=look.marker, markersize=5, linewidth=1.2,
                            elinewidth=0.9, capsize=2, label=label, **lines,
                        )  # fmt: skip
            prefix = f"{targets[target]}\n" if len(targets) > 1 else ""
            for panel, label in zip(row, _PANELS, strict=True):
                panel.set_ylabel(prefix + label)
                panel.set_xlabel("tokens that a draft can hold")
                panel.set_xticks(range(len(sizes)), ["all" if size == _WHOLE else f"{size:,.0f}" for size in sizes])
                panel.margins(x=0.1, y=0.12)
                style.grid_lines(panel)
        style.legend(figure, axes[0][0])
        return figure

    return style.save(draw, out_dir, "figure-vocabulary")
