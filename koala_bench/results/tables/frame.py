"""A table in full precision: one row per target or task and method; names carry their units."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from koala_bench.records.reading import Run
from koala_bench.records.statistics import NO_INTERVAL
from koala_bench.records.summaries import VANILLA, Summary
from koala_bench.results.tables.published import Claim, Paper, TableSpec, Value, paper_names
from koala_bench.results.tables.tasks import TaskRows


def _number(value: float) -> float | None:
    return None if math.isnan(value) else value


def _published(run: Run, method: str, task: str | None, spec: TableSpec, paper: Paper) -> dict[str, Value | None]:
    """What KOALA's paper has for a row; None where it has no such row."""
    cells = {"target": paper.table1, "part": paper.table3}.get(spec.by, ())
    cell = next((each for each in cells if each.target in paper_names(run) and each.method == method), None)
    by_task = (each.speedup for each in paper.table2 if each.target in paper_names(run) and each.method == method)
    return {
        "paper_speedup": cell.speedup if cell else next(by_task, {}).get(task or ""),
        "paper_acceptance_length": cell.acceptance_length if cell else None,
    }


def _row(run: Run, summary: Summary, task: str | None, spec: TableSpec, paper: Paper, depth: int) -> dict[str, Any]:
    method, is_vanilla = summary.method, summary.name == VANILLA
    tree = None if is_vanilla else method["tree"]
    rates = {each.depth: each for each in summary.depths}
    row: dict[str, Any] = {
        "target": summary.target,
        **({"task": task} if task is not None else {}),
        "method": summary.name,
        "layers": None if is_vanilla else method["layers"],
        "adversarial": None if is_vanilla else method["adversarial"],
        "parameters": None if is_vanilla else method["parameters"],
        "tree": tree and tree["name"],
        "tree_nodes": tree and tree["nodes"],  # the root included
        "tree_depth": tree and tree["depth"],
        "speedup": summary.speedup,
        "speedup_ratio_of_means": _number(summary.speedup_of_means),
        "speedup_mean_of_ratios": _number(summary.mean_of_speedups),
        "whole_answer_speedup": summary.whole_answer,
        "whole_answer_speedup_ratio_of_means": _number(summary.whole_answer_of_means),
        "acceptance_length": summary.acceptance_length,
    }
    for d in range(1, depth + 1):
        row[f"acceptance_rate_given_parent_depth_{d}"] = _number(rates[d].rate) if d in rates else None
        row[f"acceptance_trials_depth_{d}"] = rates[d].trials if d in rates else None
    row |= {
        "draft_overhead_percent": None if summary.draft_overhead is None else 100.0 * summary.draft_overhead,
        "original": summary.original,
        "speedup_change_x": summary.change_x or NO_INTERVAL,
        "speedup_change_percent": summary.change_percent or NO_INTERVAL,
        "acceptance_length_change": summary.length_change or NO_INTERVAL,
    }
    for name in ("speedup_change_x", "speedup_change_percent"):
        claim: Claim | None = getattr(paper.koala, name) if summary.is_koala else None
        row |= {f"claim_{name}_low": claim and claim.low, f"claim_{name}_high": claim and claim.high}
    return row | {
        **_published(run, summary.name, task, spec, paper),
        "decode_tokens_per_s": _number(summary.tokens_per_s),
        "questions": summary.questions,
        "turns_counted": summary.counted,
        "turns_failed": len(summary.failed),
        "turns_compared_with_vanilla": None if is_vanilla else summary.compared,
        "turns_equal_to_vanilla": None if is_vanilla else summary.compared - len(summary.differing),
        "lossless": method["lossless"],
        "total_variation": summary.distance,
    }


def table_rows(groups: Sequence[TaskRows], spec: TableSpec, paper: Paper) -> list[dict[str, Any]]:
    """The rows of all groups; None where there is no number."""
    depth = max((rate.depth for group in groups for each in group.summaries for rate in each.depths), default=0)
    return [_row(group.run, each, group.task, spec, paper, depth) for group in groups for each in group.summaries]
