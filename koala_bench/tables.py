"""Tables as pure functions of run records: record -> data frame -> Markdown, LaTeX and CSV.

Nothing here needs a model, and nothing depends on the time, the machine or the order of a dictionary: the same
record gives the same bytes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from koala_bench.errors import KoalaBenchError
from koala_bench.files import write_text
from koala_bench.notes import table1_notes
from koala_bench.published import Claim, Paper, TableSpec, paper_names
from koala_bench.records import Run, differences
from koala_bench.rendering import grid, to_csv, to_latex, to_markdown
from koala_bench.statistics import Interval
from koala_bench.summaries import VANILLA, Summary, summarise

# ---------------------------------------------------------------------------------------------- data frame


def _ends(name: str, interval: Interval | None) -> dict[str, float | None]:
    value = interval if interval is not None and not math.isnan(interval.value) else None
    parts = {"": value.value, "_low": value.low, "_high": value.high} if value else {"": None, "_low": None, "_high": None}
    return {name + ending: part for ending, part in parts.items()}


def _number(value: float) -> float | None:
    return None if math.isnan(value) else value


def _table1_row(run: Run, summary: Summary, paper: Paper, depth: int) -> dict[str, Any]:
    method = summary.method
    is_vanilla = method["head"] is None
    cell = next((each for each in paper.table1 if each.target in paper_names(run) and each.method == summary.name), None)
    rates = {each.depth: each for each in summary.depths}
    row: dict[str, Any] = {
        "target": summary.target,
        "method": summary.name,
        "layers": None if is_vanilla else method["layers"],
        "adversarial": None if is_vanilla else method["adversarial"],
        "parameters": None if is_vanilla else method["parameters"],
        **_ends("speedup", summary.speedup),
        "speedup_ratio_of_means": _number(summary.speedup_of_means),
        "speedup_mean_of_ratios": _number(summary.mean_of_speedups),
        **_ends("acceptance_length", summary.acceptance_length),
    }
    for d in range(1, depth + 1):
        row[f"acceptance_rate_given_parent_depth_{d}"] = _number(rates[d].rate) if d in rates else None
        row[f"acceptance_trials_depth_{d}"] = rates[d].trials if d in rates else None
    row |= {"draft_overhead_percent": None if summary.draft_overhead is None else 100.0 * summary.draft_overhead, "original": summary.original}
    row |= _ends("speedup_change_x", summary.change_x) | _ends("speedup_change_percent", summary.change_percent)
    row |= _ends("acceptance_length_change", summary.length_change)
    for name in ("speedup_change_x", "speedup_change_percent"):
        claim: Claim = getattr(paper.koala, name)
        row |= {f"claim_{name}_low": claim.low if summary.is_koala else None, f"claim_{name}_high": claim.high if summary.is_koala else None}
    row |= {"paper_speedup": cell.speedup if cell else None, "paper_acceptance_length": cell.acceptance_length if cell else None}
    row |= {
        "decode_tokens_per_s": _number(summary.tokens_per_s),
        "questions": summary.questions,
        "turns_counted": summary.counted,
        "turns_failed": len(summary.failed),
        "turns_compared_with_vanilla": None if summary.name == VANILLA else summary.compared,
        "turns_equal_to_vanilla": None if summary.name == VANILLA else summary.compared - len(summary.differing),
    }
    return row


def table1_frame(runs: Sequence[Run], spec: TableSpec, paper: Paper) -> pd.DataFrame:
    """Table 1 in full precision, one row per target and method; columns carry their units.

    Raises:
        KoalaBenchError: see ``summarise``; or runs that do not belong into one table.
    """
    return _table1_frame(runs, _summaries(runs, spec), paper)


# What all records of one table must share; the rest may follow from the target.
_SHARED = ("questions.", "acceptance.", "limits.max_new_tokens")


def _summaries(runs: Sequence[Run], spec: TableSpec) -> list[list[Summary]]:
    if not runs:
        raise KoalaBenchError("There is no record to make a table of.", "Name at least one .jsonl file of an evaluation.")
    for index, run in enumerate(runs[1:], 1):
        different = [name for name in differences(runs[0].header, run.header, circumstances=False) if name.startswith(_SHARED)]
        if different:
            raise KoalaBenchError(f"{runs[0].path} and {run.path} do not belong into one table: they differ in {different[0]}.", "Make a table of each.")
        twin = next((other for other in runs[:index] if other.header["target"]["name"] == run.header["target"]["name"]), None)
        if twin:
            raise KoalaBenchError(f"{twin.path} and {run.path} are of the same target.", "Name one record per target.")
    return [summarise(run, spec.methods) for run in runs]


def _table1_frame(runs: Sequence[Run], summaries: Sequence[Sequence[Summary]], paper: Paper) -> pd.DataFrame:
    depth = max((each.depth for rows in summaries for row in rows for each in row.depths), default=0)
    rows = [_table1_row(run, summary, paper, depth) for run, of_run in zip(runs, summaries, strict=True) for summary in of_run]
    # Objects, so that an integer stays one beside an empty cell.
    return pd.DataFrame(rows, dtype=object)


# ---------------------------------------------------------------------------------------------- Table 1


def write_table1(runs: Sequence[Run], out_dir: Path, spec: TableSpec, paper: Paper) -> list[Path]:
    """Write ``table1.md``, ``table1.tex`` and ``table1.csv``; the same records give the same bytes.

    Args:
        runs: one record per target, on the same questions.
        spec: of ``reproduce/table1.toml``.
        paper: of ``reproduce/paper.toml``.

    Returns:
        The three paths.

    Raises:
        KoalaBenchError: see ``summarise``; runs that do not belong into one table; or a folder that cannot be written.
    """
    summaries = _summaries(runs, spec)
    frame = _table1_frame(runs, summaries, paper)
    table, notes = grid(frame, spec.columns), table1_notes(runs, summaries, spec, paper)
    caption = "Speedup and acceptance length by target"
    contents = {
        "table1.md": to_markdown(table, f"Table 1: {caption.lower()}", notes),
        "table1.tex": to_latex(table, f"{caption}. The best speedup of each target is bold; intervals are in brackets.", "tab:table1", notes),
        "table1.csv": to_csv(frame, spec.columns),
    }
    for name, text in contents.items():
        write_text(out_dir / name, text)
    return [out_dir / name for name in contents]
