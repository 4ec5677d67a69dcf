"""Figure of the training: losses of the heads, their held-out acceptance length, and the discriminators' side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from koala_bench.errors import KoalaBenchError
from koala_bench.results.figures.style import GREY, WIDTH_INCHES, Look, grid_lines, looks, save
from koala_bench.training.log import read_training

_ROW_INCHES = 2.2


def _series(lines: Sequence[dict[str, Any]], kind: str, method: str, key: str) -> tuple[list[int], list[float]]:
    rows = [
        (line["step"], line[key])
        for line in lines
        if line["kind"] == kind and line["method"] == method and line.get(key) is not None
    ]
    return [step for step, _ in rows], [value for _, value in rows]


def _panel(axes: Axes, label: str) -> None:
    axes.set_xlabel("training step")
    axes.set_ylabel(label)
    grid_lines(axes)


def write_training(log: Path, out_dir: Path, methods: Sequence[str]) -> list[Path]:
    """``figure-training.pdf`` and ``.png``: curves of the heads, and of the discriminators if there are any.

    The supervised loss is shown as a share of its first logged value, because losses of different heads have different
    units; the held-out acceptance length is that of chains over a few prompts.

    Args:
        log: ``training.jsonl``.
        methods: which ones, in which order; those that were not trained are passed over.

    Raises:
        KoalaBenchError: see ``read_training``, or the log has none of the methods.
    """
    lines = read_training(log)
    names = [name for name in methods if any(line["method"] == name for line in lines)]
    if not names:
        known = dict.fromkeys(line["method"] for line in lines)
        raise KoalaBenchError(
            f"{log} has none of the methods {', '.join(methods)}.", f"It has {', '.join(known) or 'none'}."
        )
    styles: dict[str, Look] = dict(zip(names, looks(names), strict=True))
    adversarial = [name for name in names if _series(lines, "step", name, "discriminator_loss")[0]]

    def curve(axes: Axes, name: str, kind: str, key: str, relative: bool = False, dotted: bool = False) -> None:
        steps, values = _series(lines, kind, name, key)
        look = styles[name]
        marker = look.marker if kind == "held_out" or len(steps) == 1 else None
        style = ":" if dotted else "--" if look.dashed and kind == "step" else "-"
        shown = [value / values[0] for value in values] if relative else values
        axes.plot(
            steps, shown, color=look.colour, marker=marker, markersize=4, linewidth=1.1, linestyle=style, label=name
        )

    last = max(line["step"] for line in lines)

    def draw() -> Figure:
        figure = Figure(figsize=(WIDTH_INCHES, _ROW_INCHES * (2 if adversarial else 1) + 0.3), layout="constrained")
        panels = figure.subplots(2 if adversarial else 1, 2, squeeze=False)
        for name in names:
            curve(panels[0][0], name, "step", "loss", relative=True)
            curve(panels[0][1], name, "held_out", "acceptance_length")
        _panel(panels[0][0], "head: supervised loss\n(share of the first step's)")
        panels[0][0].set_ylim(bottom=0)
        _panel(panels[0][1], "head: held-out acceptance\nlength (tokens per step)")
        if adversarial:
            for name in adversarial:
                curve(panels[1][0], name, "step", "discriminator_accuracy")
                curve(panels[1][1], name, "step", "discriminator_loss")
                curve(panels[1][1], name, "step", "adversarial", dotted=True)
            _panel(panels[1][0], "discriminator: accuracy")
            panels[1][0].axhline(0.5, color=GREY, linewidth=0.9, linestyle=(0, (4, 3)))
            panels[1][0].set_ylim(0, 1.02)
            _panel(panels[1][1], "loss (nats): discriminator's,\nhead's adversarial (dotted)")
            panels[1][1].set_ylim(bottom=0)
        for axes in panels.flat:
            axes.set_xlim(0, 1.04 * last)
        figure.legend(
            *panels[0][0].get_legend_handles_labels(), loc="outside upper center", ncols=len(names), frameon=False
        )
        return figure

    return save(draw, out_dir, "figure-training")
