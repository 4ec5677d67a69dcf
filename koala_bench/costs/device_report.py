"""The device report: latencies with random weights, the bandwidth limit, and what published speedups would need.

It is measured size by size, and written after each.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter

from koala_bench.common.files import write_text
from koala_bench.common.markdown import table
from koala_bench.common.provenance import code_state
from koala_bench.costs.bandwidth import Bandwidth, bandwidth
from koala_bench.costs.device import MethodCost, ModelCost, model_cost, random_model
from koala_bench.costs.figures import write_nodes
from koala_bench.engine.devices import machine, pick_device, pick_dtype, pick_engine
from koala_bench.engine.shapes import SHAPES, VICUNA
from koala_bench.errors import KoalaBenchError
from koala_bench.presets import Preset
from koala_bench.results.tables.published import Paper, read_paper
from koala_bench.training.experiment import methods_with_heads

_NODES = (1, 2, 4, 8, 16, 26, 32, 48, 64, 96, 128)
_COPIED = {"cuda": 1 << 31, "cpu": 1 << 28}  # bytes: far beyond any cache


@dataclass(frozen=True)
class DeviceReport:
    """Everything measured on a device; ``missing`` says why a size was not. Environment and code as in run records."""

    device: str
    dtype: str
    bandwidth: Bandwidth
    environment: dict[str, Any]
    code: dict[str, Any]
    models: tuple[ModelCost, ...]
    missing: dict[str, str]

    def json(self) -> str:
        return json.dumps({"kind": "device-report", "schema": 2, **asdict(self)}, indent=1) + "\n"


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


def read_report(path: Path) -> DeviceReport:
    """Read a ``device-report.json``."""
    try:
        written = json.loads(path.read_text(encoding="utf-8"))
        return TypeAdapter(DeviceReport).validate_python({name: written[name] for name in DeviceReport.__annotations__})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise KoalaBenchError(f"{path} is no device report that can be read.", "Make it again.") from error


def in_words(report: DeviceReport, paper: Paper) -> str:
    """The report in Markdown."""
    versions, rates = report.environment["packages"], report.bandwidth
    counts = sorted({step.nodes for each in report.models for step in each.steps})
    steps: list[tuple[object, ...]] = []
    verifications: list[tuple[object, ...]] = []
    methods: list[tuple[object, ...]] = []
    for each in report.models:
        limit, step, own = each.bytes_per_token / rates.most, each.vanilla_s, (each.size, each.engine)
        times = (f"{1000 * step:.2f}", f"{1 / step:.1f}", f"{1000 * limit:.2f}", f"{100 * limit / step:.0f}")
        steps.append((each.size, f"{each.parameters / 1e9:.2f}", each.engine, *times))
        one = next(step.step_s for step in each.steps if step.nodes == counts[0])
        ratios = ["" if (ratio := each.verification(count)) is None else f"{ratio:.2f}" for count in counts[1:]]
        verifications.append((*own, f"{1000 * one:.2f}", *ratios))
        for method in each.methods:
            speedups = published_speedups(paper, each.size, method)
            claimed, needed = (
                " to ".join(f"{value * factor:.2f}" for value in speedups) or "unknown"
                for factor in (1.0, method.break_even)
            )
            parts = (method.draft_s / method.vanilla_s, method.verify_s / method.vanilla_s, method.break_even)
            numbers = (f"{value:.2f}" for value in parts)
            methods.append((*own, method.method, method.tree, method.nodes, *numbers, claimed, needed))
    steps += [(size, "", f"not measured: {why}", "", "", "", "") for size, why in report.missing.items()]
    step_columns = ("Model", "Parameters (10^9)", "Engine", "Step (ms)", "Tokens/s", "Limit (ms)", "Of the limit (%)")
    method_columns = (
        "Model", "Engine", "Method", "Tree", "Nodes", "Draft", "Verification", "Break-even acceptance length",
        "Published speedup (x)", "Needs acceptance length",
    )  # fmt: skip
    return f"""# Device report

{report.device}, {report.dtype}, torch {versions["torch"]}, transformers {versions["transformers"]}, \
{report.environment["threads"]} host threads. A copy reads and writes {rates.copied / 1e9:,.0f} GB/s, a sum reads \
{rates.read / 1e9:,.0f} GB/s.

Weights are random: these are latencies, and the acceptance lengths that they ask for, not ones that heads reach.

## Vanilla steps

The limit is the time to read the weights and the KV cache once at the higher of these rates.

{table(step_columns, steps)}

## Verification

In verifications of one node, behind 256 tokens.

{table(("Model", "Engine", "One node (ms)", *(f"{count} nodes" for count in counts[1:])), verifications, left=2)}

## Methods

In vanilla steps, of answers interleaved with vanilla's. From the break-even acceptance length on a method is faster \
than vanilla. Published speedups of original heads are their authors' own on MT-bench, KOALA's are these and the \
increase that its abstract claims.

{table(method_columns, methods, left=4)}
"""


def published_speedups(paper: Paper, size: str, method: MethodCost) -> list[float]:
    """Published speedup of a method for a model of this size: one value, or a range; empty if there is none."""
    values = [
        claim.speedup
        for claim in paper.own_claims
        if claim.target == f"vicuna-{size}"
        and re.split("[^a-z]", claim.system.lower())[0] == method.head
        and isinstance(claim.speedup, float)
    ]
    altered = (method.layers > 1) + (method.objective is not None)
    if not values or altered == 1:  # nothing is published of either part of KOALA alone
        return []
    base = max(values)  # of several versions the latest and fastest
    change = paper.koala.speedup_change_x
    return [base + change.low, base + change.high] if altered else [base]
