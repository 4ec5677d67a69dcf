"""Figure of the training: losses of the heads, their held-out acceptance length, and the discriminators' side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from koala_bench.errors import KoalaBenchError
from koala_bench.results.figures.style import DASHES, GREY, grid_lines, legend, looks, panels, save
from koala_bench.training.log import read_training

_ROW_INCHES = 2.2


def _series(lines: Sequence[dict[str, Any]], kind: str, method: str, key: str) -> tuple[list[int], list[float]]:
    rows = [
        (line["step"], line[key])
        for line in lines
        if line["kind"] == kind and line["method"] == method and line.get(key) is not None
    ]
    return [step for step, _ in rows], [value for _, value in rows]


def write_training(log: Path, out_dir: Path, methods: Sequence[str]) -> list[Path]:
    """``figure-training.pdf`` and ``.png``: curves of the heads, and of the discriminators if there are any.

    The supervised loss is shown as a share of its first logged value, because losses of different heads have different
    units; the held-out acceptance length is that of chains over a few prompts.
    """
    lines = read_training(log)
    names = [name for name in methods if any(line["method"] == name for line in lines)]
    if not names:
        known = dict.fromkeys(line["method"] for line in lines)
        raise KoalaBenchError(
            f"{log} has none of the methods {', '.join(methods)}.", f"It has {', '.join(known) or 'none'}."
        )
    styles = dict(zip(names, looks(names), strict=True))
    adversarial = [name for name in names if _series(lines, "step", name, "discriminator_loss")[0]]
    last = max(line["step"] for line in lines)

    def panel(
        axes: Axes, label: str, names: Sequence[str], kind: str, keys: Sequence[str], bottom: float | None = 0
    ) -> None:
        """One panel: of several keys the later ones are dotted; losses of heads are shares of the first."""
        for name in names:
            for key in keys:
                steps, values = _series(lines, kind, name, key)
                look = styles[name]
                shown = [value / values[0] for value in values] if key == "loss" else values
                style = ":" if key != keys[0] else "--" if look.dashed and kind == "step" else "-"
                marker = look.marker if kind == "held_out" or len(steps) == 1 else None
                line: dict[str, Any] = {"marker": marker, "markersize": 4, "linewidth": 1.1, "linestyle": style}
                axes.plot(steps, shown, color=look.colour, label=name, **line)
        axes.set_xlabel("training step")
        axes.set_ylabel(label)
        grid_lines(axes)
        axes.set_ylim(bottom=bottom)
        axes.set_xlim(0, 1.04 * last)

    def draw() -> Figure:
        rows = 2 if adversarial else 1
        figure, axes = panels(rows, 2, _ROW_INCHES * rows + 0.3)
        (losses, lengths) = axes[0]
        panel(losses, "head: supervised loss\n(share of the first step's)", names, "step", ["loss"])
        label = "head: held-out acceptance\nlength (tokens per step)"
        panel(lengths, label, names, "held_out", ["acceptance_length"], None)
        if adversarial:
            accuracy, discriminator = axes[1]
            panel(accuracy, "discriminator: accuracy", adversarial, "step", ["discriminator_accuracy"])
            accuracy.axhline(0.5, color=GREY, linewidth=0.9, linestyle=DASHES)
            accuracy.set_ylim(0, 1.02)
            label = "loss (nats): discriminator's,\nhead's adversarial (dotted)"
            panel(discriminator, label, adversarial, "step", ["discriminator_loss", "adversarial"])
        legend(figure, losses)
        return figure

    return save(draw, out_dir, "figure-training")
