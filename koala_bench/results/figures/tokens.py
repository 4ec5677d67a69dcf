"""Figure of the acceptance length against the tokens that a head was trained on."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from koala_bench.errors import KoalaBenchError
from koala_bench.records.reading import Run, short_names
from koala_bench.records.statistics import Interval
from koala_bench.records.summaries import evaluations, sample
from koala_bench.results.figures import style
from koala_bench.results.figures.style import ROW_INCHES

_CURVE = 2  # amounts of training that make a curve
Point = tuple[int, Interval]  # tokens that the training read, prompts and repetitions counted, and the length


def _alike(run: Run, name: str) -> str:
    """What methods that differ in their training alone have in common."""
    method = run.methods[name]
    settings = run.header["preset"]["resolved"].get("methods", {})
    head = settings.get(name, {}).get("head_of") or name
    shared = {key: method.get(key) for key in ("head", "layers", "objective", "draft_vocabulary", "parameters", "tree")}
    return json.dumps([shared, {**settings.get(head, {}).get("options", {})}], sort_keys=True)


def _by_kind(run: Run) -> list[list[str]]:
    """The methods of a run that differ in their training alone, where they read several amounts of tokens, fewest
    first."""
    kinds: dict[str, dict[int, str]] = {}
    for name, method in run.methods.items():
        if (training := method["training"]) is not None:
            kinds.setdefault(_alike(run, name), {}).setdefault(training["tokens"], name)
    return [[names[tokens] for tokens in sorted(names)] for names in kinds.values() if len(names) >= _CURVE]


def has_token_curves(runs: Sequence[Run]) -> bool:
    """Whether a record holds one kind of head trained on several amounts of tokens."""
    return any(_by_kind(run) for run in runs)


def token_curves(runs: Sequence[Run]) -> list[tuple[str, str, list[Point]]]:
    """Target, the method of the longest training, and the points by ascending tokens.

    Raises:
        KoalaBenchError: see ``summaries.sample``, or no kind of head was trained on several amounts of tokens.
    """
    curves = []
    for group in evaluations(runs):
        chosen, methods = sample(group), group[0].methods
        for names in _by_kind(group[0]):
            trained = [(methods[name]["training"], name) for name in names if name in chosen.totals]
            points = [(each["tokens"], chosen.interval(chosen.length(name))) for each, name in trained if each]
            if len(points) >= _CURVE:
                curves.append((group[0].header["target"]["name"], names[-1], points))
    if not curves:
        raise KoalaBenchError(
            f"{runs[0].path} has no method that differs from another in the tokens of its training alone.",
            "Evaluate heads of several trainings together, each by a name of its own.",
        )
    return curves


def write_tokens(runs: Sequence[Run], out_dir: Path) -> list[Path]:
    """``figure-tokens.pdf`` and ``.png``: a curve for each kind of head, with 95 % intervals of the length, on an axis
    of millions of tokens by their logarithm.

    Raises:
        KoalaBenchError: see ``token_curves``.
    """
    drawn = token_curves(runs)
    targets = short_names(target for target, _, _ in drawn)

    def draw() -> Figure:
        figure, panels = style.panels(len(targets), 1, ROW_INCHES * len(targets))
        for (axes,), target in zip(panels, targets, strict=True):
            here = [(method, points) for each, method, points in drawn if each == target]
            for (method, points), look in zip(here, style.looks([method for method, _ in here]), strict=True):
                across = [tokens / 1e6 for tokens, _ in points]
                style.curve_with_intervals(axes, across, [length for _, length in points], look, look.dashed, method)
            axes.set_xscale("log")
            ticks = sorted({tokens / 1e6 for _, points in here for tokens, _ in points})
            axes.set_xticks(ticks, [f"{tick:.2g}" for tick in ticks])
            axes.minorticks_off()
            axes.set_xlabel("tokens read in training (millions; prompts and repetitions counted)")
            several = f"{targets[target]}\nacceptance length"
            axes.set_ylabel(several if len(targets) > 1 else "acceptance length (tokens per step)")
            style.grid_lines(axes)
            axes.legend(loc="best", facecolor="white", framealpha=1, edgecolor="white")
        return figure

    return style.save(draw, out_dir, "figure-tokens")
