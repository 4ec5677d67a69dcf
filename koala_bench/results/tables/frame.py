"""A table in full precision: one row per target or task and method, in columns that carry their units."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pandas as pd

from koala_bench.records.reading import Run
from koala_bench.records.statistics import Interval
from koala_bench.records.summaries import VANILLA, Summary
from koala_bench.results.tables.published import Claim, Paper, PaperCell, TableSpec, paper_names


def _ends(name: str, interval: Interval | None) -> dict[str, float | None]:
    value = interval if interval is not None and not math.isnan(interval.value) else None
    parts = (
        {"": value.value, "_low": value.low, "_high": value.high} if value else {"": None, "_low": None, "_high": None}
    )
    return {name + ending: part for ending, part in parts.items()}


def _number(value: float) -> float | None:
    return None if math.isnan(value) else value


def _paper_cell(run: Run, method: str, task: str | None, spec: TableSpec, paper: Paper) -> PaperCell | None:
    """What KOALA's paper has for a row, if it may have anything for it."""
    if not spec.has_tasks:
        return next(
            (
                each
                for each in (paper.table1 if spec.by == "target" else paper.table3)
                if each.target in paper_names(run) and each.method == method
            ),
            None,
        )
    known = next(
        (each.speedup for each in paper.table2 if each.target in paper_names(run) and each.method == method), {}
    )
    return PaperCell(target="", method=method, speedup=known[task], acceptance_length=None) if task in known else None


def _row(run: Run, summary: Summary, task: str | None, spec: TableSpec, paper: Paper, depth: int) -> dict[str, Any]:
    method = summary.method
    is_vanilla = method["head"] is None
    tree = None if is_vanilla else method["tree"]
    cell = _paper_cell(run, summary.name, task, spec, paper)
    rates = {each.depth: each for each in summary.depths}
    row: dict[str, Any] = {
        "target": summary.target,
        **({"task": task} if task is not None else {}),
        "method": summary.name,
        "layers": None if is_vanilla else method["layers"],
        "adversarial": None if is_vanilla else method["adversarial"],
        "parameters": None if is_vanilla else method["parameters"],
        "tree": tree["name"] if tree else None,
        "tree_nodes": tree["nodes"] if tree else None,  # the root included
        "tree_depth": tree["depth"] if tree else None,
        **_ends("speedup", summary.speedup),
        "speedup_ratio_of_means": _number(summary.speedup_of_means),
        "speedup_mean_of_ratios": _number(summary.mean_of_speedups),
        **_ends("whole_answer_speedup", summary.whole_answer),
        "whole_answer_speedup_ratio_of_means": _number(summary.whole_answer_of_means),
        **_ends("acceptance_length", summary.acceptance_length),
    }
    for d in range(1, depth + 1):
        row[f"acceptance_rate_given_parent_depth_{d}"] = _number(rates[d].rate) if d in rates else None
        row[f"acceptance_trials_depth_{d}"] = rates[d].trials if d in rates else None
    row |= {
        "draft_overhead_percent": None if summary.draft_overhead is None else 100.0 * summary.draft_overhead,
        "original": summary.original,
    }
    row |= _ends("speedup_change_x", summary.change_x) | _ends("speedup_change_percent", summary.change_percent)
    row |= _ends("acceptance_length_change", summary.length_change)
    for name in ("speedup_change_x", "speedup_change_percent"):
        claim: Claim = getattr(paper.koala, name)
        row |= {
            f"claim_{name}_low": claim.low if summary.is_koala else None,
            f"claim_{name}_high": claim.high if summary.is_koala else None,
        }
    row |= {
        "paper_speedup": cell.speedup if cell else None,
        "paper_acceptance_length": cell.acceptance_length if cell else None,
    }
    row |= {
        "decode_tokens_per_s": _number(summary.tokens_per_s),
        "questions": summary.questions,
        "turns_counted": summary.counted,
        "turns_failed": len(summary.failed),
        "turns_compared_with_vanilla": None if summary.name == VANILLA else summary.compared,
        "turns_equal_to_vanilla": None if summary.name == VANILLA else summary.compared - len(summary.differing),
        "lossless": method["lossless"],
        "total_variation": summary.distance,
    }
    return row


def table_frame(
    groups: Sequence[tuple[Run, str | None, Sequence[Summary]]], spec: TableSpec, paper: Paper
) -> pd.DataFrame:
    """The rows of groups of (run, task, summaries); None where there is no number."""
    depth = max(
        (each.depth for _, _, summaries in groups for summary in summaries for each in summary.depths), default=0
    )
    rows = [_row(run, summary, task, spec, paper, depth) for run, task, summaries in groups for summary in summaries]
    # Objects, so that an integer stays one beside an empty cell.
    return pd.DataFrame(rows, dtype=object)
