"""The device report: what was measured with random weights, beside the device's own limit and what published speedups
would ask for.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from koala_bench.costs.device import Bandwidth, MethodCost, ModelCost
from koala_bench.errors import KoalaBenchError
from koala_bench.results.tables.published import Paper


@dataclass(frozen=True)
class DeviceReport:
    """A report.

    Attributes:
        device: its name.
        bandwidth: of its memory.
        environment, code: as in run records.
        models: what was measured, a model and an engine each.
        missing: sizes that were not measured, and why.
    """

    device: str
    dtype: str
    bandwidth: Bandwidth
    environment: dict[str, Any]
    code: dict[str, Any]
    models: tuple[ModelCost, ...]
    missing: dict[str, str]

    def json(self) -> str:
        """Everything, for whoever calculates with it."""
        return json.dumps({"kind": "device-report", "schema": 2, **asdict(self)}, indent=1) + "\n"


def read_report(path: Path) -> DeviceReport:
    """Read a ``device-report.json``.

    Raises:
        KoalaBenchError: there is no such file, or it is damaged.
    """
    try:
        written = json.loads(path.read_text(encoding="utf-8"))
        return TypeAdapter(DeviceReport).validate_python({name: written[name] for name in DeviceReport.__annotations__})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise KoalaBenchError(f"{path} is no device report that can be read.", "Make it again.") from error


def limit_s(report: DeviceReport, model: ModelCost) -> float:
    """Seconds that a vanilla step takes at least, if memory alone limits it."""
    return model.bytes_per_token / report.bandwidth.most


def in_words(report: DeviceReport, paper: Paper) -> str:
    """The report in Markdown."""
    versions = report.environment["packages"]
    lines = [
        "# Device report",
        "",
        (
            f"{report.device}, {report.dtype}, torch {versions['torch']}, transformers {versions['transformers']},"
            f" {report.environment['threads']} host threads. A copy reads and writes"
            f" {report.bandwidth.copied / 1e9:,.0f} GB/s, a sum reads {report.bandwidth.read / 1e9:,.0f} GB/s."
        ),
        "",
        (
            "Weights are random, so acceptance means nothing here and is not reported: these are latencies, and what"
            " acceptance length they ask for."
        ),
        "",
        "## Vanilla steps",
        "",
        "The limit is the time to read the weights and the cache once at the higher of these rates.",
        "",
        "| Model | Parameters (10^9) | Engine | Step (ms) | Tokens/s | Limit (ms) | Share of the limit (%) |",
        "| :-- | --: | :-- | --: | --: | --: | --: |",
    ]
    for each in report.models:
        limit = limit_s(report, each)
        lines.append(
            f"| {each.size} | {each.parameters / 1e9:.2f} | {each.engine} | {1000 * each.vanilla_s:.2f} |"
            f" {1 / each.vanilla_s:.1f} | {1000 * limit:.2f} | {100 * limit / each.vanilla_s:.0f} |"
        )
    lines += [f"| {size} | | not measured: {why} | | | | |" for size, why in report.missing.items()]
    lines += ["", "## Verification", "", "In verifications of one node, behind 256 tokens.", ""]
    counts = sorted({step.nodes for each in report.models for step in each.steps})
    lines += [
        "| Model | Engine | One node (ms) | " + " | ".join(f"{count} nodes" for count in counts[1:]) + " |",
        "| :-- | :-- |" + " --: |" * len(counts),
    ]
    for each in report.models:
        one = next(step.step_s for step in each.steps if step.nodes == counts[0])
        ratios = " | ".join(f"{ratio:.2f}" if (ratio := each.verification(count)) else "" for count in counts[1:])
        lines.append(f"| {each.size} | {each.engine} | {1000 * one:.2f} | {ratios} |")
    lines += [
        "",
        "## Methods",
        "",
        (
            "In vanilla steps, of answers interleaved with vanilla's. The break-even acceptance length is the whole"
            " step: from there on the method is faster than vanilla. Beside it what published speedups would need here:"
            " an original head's is its authors' own on MT-bench, KOALA's that and the increase that its abstract"
            " claims."
        ),
        "",
        (
            "| Model | Engine | Method | Tree | Nodes | Draft | Verification | Break-even acceptance length | Published"
            " speedup (x) | Needs acceptance length |"
        ),
        "| :-- | :-- | :-- | :-- | --: | --: | --: | --: | --: | --: |",
    ]
    for each in report.models:
        for method in each.methods:
            speedups = published_speedups(paper, each.size, method)
            claimed = " to ".join(f"{value:.2f}" for value in speedups) or "unknown"
            needed = " to ".join(f"{value * method.break_even:.2f}" for value in speedups) or "unknown"
            lines.append(
                f"| {each.size} | {each.engine} | {method.method} | {method.tree} | {method.nodes} |"
                f" {method.draft_s / method.vanilla_s:.2f} | {method.verify_s / method.vanilla_s:.2f} |"
                f" {method.break_even:.2f} | {claimed} | {needed} |"
            )
    return "\n".join(lines) + "\n"


def published_speedups(paper: Paper, size: str, method: MethodCost) -> list[float]:
    """What a method is said to reach with a model of this size: one value, or a range; nothing if there is none."""
    own = [
        claim
        for claim in paper.own_claims
        if claim.target == f"vicuna-{size}" and re.split("[^a-z]", claim.system.lower())[0] == method.head
    ]
    values = [claim.speedup for claim in own if isinstance(claim.speedup, float)]
    altered = (method.layers > 1) + (method.objective is not None)
    if not values or altered == 1:  # nothing is published of either part of KOALA alone
        return []
    base = max(values)  # of several versions the latest and fastest
    change = paper.koala.speedup_change_x
    return [base + change.low, base + change.high] if altered else [base]
