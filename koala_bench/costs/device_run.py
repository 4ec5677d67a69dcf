"""The measurements of a device report, size by size: each is written as soon as it is there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from koala_bench.common.files import write_text
from koala_bench.common.provenance import code_state
from koala_bench.costs.device import bandwidth, model_cost, random_model
from koala_bench.costs.device_report import DeviceReport, in_words
from koala_bench.costs.figures import write_nodes
from koala_bench.engine.devices import machine, pick_device, pick_dtype, pick_engine
from koala_bench.engine.shapes import SHAPES, VICUNA
from koala_bench.errors import KoalaBenchError
from koala_bench.presets import Preset
from koala_bench.results.tables.published import read_paper
from koala_bench.training.experiment import methods_with_heads

_NODES = (1, 2, 4, 8, 16, 26, 32, 48, 64, 96, 128)
_COPIED = {"cuda": 1 << 31, "cpu": 1 << 28}  # bytes: far beyond any cache


def measure(
    sizes: Sequence[str] | None,
    engines: Sequence[str],
    preset: Preset,
    methods: Sequence[str],
    out: Path,
    device: str | None,
    dtype: str | None,
    tokens: int,
    rounds: int,
    paper: Path,
) -> str:
    """Measure models with random weights into ``out``, and return the report in Markdown.

    Args:
        sizes: names in ``SHAPES``; None for those that suit the device.
        rounds: answers of each method, and repetitions of each step, that are timed.
    """
    where = pick_device(device or "auto")
    kind = pick_dtype(dtype or ("bfloat16" if where.type == "cuda" else "auto"), where)
    wanted = [each.strip() for each in (sizes or (VICUNA if where.type == "cuda" else SHAPES[:1]))]
    if unknown := [each for each in wanted if each not in SHAPES]:
        raise KoalaBenchError(f"--sizes: '{unknown[0]}' is no size.", f"Use {', '.join(SHAPES)}.")
    picked = [pick_engine(each.strip(), where) for each in engines]
    published = read_paper(paper)
    chosen = {name: (preset.method(name), preset.method(name).tree) for name in methods_with_heads(preset, methods)}
    environment = machine(where)
    name = torch.cuda.get_device_name(where) if where.type == "cuda" else environment["cpu"]
    rates, code = bandwidth(where, _COPIED[where.type]), code_state()
    report = DeviceReport(name, str(kind).removeprefix("torch."), rates, dict(environment), dict(code), (), {})
    for size in wanted:
        try:
            base = random_model(size, where, kind)
            for engine in picked:
                cost = model_cost(replace(base, engine=engine), size, chosen, _NODES, tokens, rounds)
                report = replace(report, models=(*report.models, cost))
            del base
        except (KoalaBenchError, torch.cuda.OutOfMemoryError) as error:
            report = replace(report, missing={**report.missing, size: str(error).splitlines()[0]})
        if where.type == "cuda":
            torch.cuda.empty_cache()
        write_text(out / "device-report.json", report.json())
        write_text(out / "device-report.md", in_words(report, published))
        if report.models:
            write_nodes(report.models, out)
    if not report.models:
        raise KoalaBenchError(
            f"Nothing could be measured: {next(iter(report.missing.values()))}",
            "Use smaller --sizes, or another --device.",
        )
    return in_words(report, published)
