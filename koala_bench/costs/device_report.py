"""The device report: latencies with random weights, the memory's limit, and what published speedups would ask for."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from koala_bench.common.markdown import table
from koala_bench.costs.device import Bandwidth, MethodCost, ModelCost
from koala_bench.errors import KoalaBenchError
from koala_bench.results.tables.published import Paper


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
    """What a method is said to reach with a model of this size: one value, or a range; nothing if there is none."""
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
