"""Tables as pure functions of run records: record -> data frame -> Markdown, LaTeX and CSV.

Nothing here needs a model, and nothing depends on the time, the machine or the order of a dictionary: the same
record gives the same bytes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from koala_bench.errors import KoalaBenchError
from koala_bench.results.tables.external import external_table
from koala_bench.common.files import write_text
from koala_bench.results.tables.leaderboard import leaderboard
from koala_bench.results.tables.notes import Measured, labels, table1_notes, table2_notes, table3_notes
from koala_bench.results.tables.published import Claim, Paper, PaperCell, TableSpec, paper_names
from koala_bench.records.reading import Run, differences
from koala_bench.results.tables.rendering import Grid, Note, grid, to_csv, to_latex, to_markdown
from koala_bench.records.statistics import Interval
from koala_bench.records.summaries import VANILLA, Summary, sample, summaries_of, summarise
from koala_bench.results.tables.tasks import rows_by_task

# ---------------------------------------------------------------------------------------------- data frame


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
    cell = _paper_cell(run, summary.name, task, spec, paper)
    rates = {each.depth: each for each in summary.depths}
    row: dict[str, Any] = {
        "target": summary.target,
        **({"task": task} if task is not None else {}),
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


# What all records of one table must share; the rest may follow from the target.
_SHARED = ("acceptance.", "limits.max_new_tokens")


def _refuse_mixture(runs: Sequence[Run], spec: TableSpec) -> None:
    """Raise if records do not belong into one table: other limits or questions, or twice the same."""
    if not runs:
        raise KoalaBenchError(
            "There is no record to make a table of.", "Name at least one .jsonl file of an evaluation."
        )
    shared = _SHARED if spec.has_tasks else ("questions.", *_SHARED)
    for index, run in enumerate(runs[1:], 1):
        different = [
            name for name in differences(runs[0].header, run.header, circumstances=False) if name.startswith(shared)
        ]
        for other in (
            other for other in runs[:index] if other.header["target"]["name"] == run.header["target"]["name"]
        ):
            if spec.by == "target":
                raise KoalaBenchError(
                    f"{other.path} and {run.path} are of the same target.", "Name one record per target."
                )
            if spec.has_tasks and other.header["questions"]["name"] == run.header["questions"]["name"]:
                raise KoalaBenchError(
                    f"{other.path} and {run.path} are of the same target and questions.",
                    "Name one record per question file.",
                )
            if spec.by == "part" and other.header["seed"] == run.header["seed"]:
                raise KoalaBenchError(
                    f"{other.path} and {run.path} are of the same target and training seed.",
                    "Name one record per training.",
                )
            different += _other_heads(other, run, spec)
        if different:
            raise KoalaBenchError(
                f"{runs[0].path} and {run.path} do not belong into one table: they differ in {different[0]}.",
                "Make a table of each.",
            )


def _other_heads(first: Run, second: Run, spec: TableSpec) -> list[str]:
    """In what two runs of one target differ that are to be taken together: the target itself, methods, trees, and heads
    unless these are seeds.
    """
    kept = ("target.",)
    different = [
        name for name in differences(first.header, second.header, circumstances=False) if name.startswith(kept)
    ]
    names = [name for name in spec.methods if name in first.methods or name in second.methods]
    different += [f"their methods ({name})" for name in names if (name in first.methods) != (name in second.methods)]
    fields = ("tree", "layers", "adversarial", *(("weights_sha256",) if spec.has_tasks else ()))
    both = [name for name in names if name in first.methods and name in second.methods]
    different += [f"the {field} of {name}" for name in both for field in fields if first.methods[name][field] != second.methods[name][field]]  # type: ignore[literal-required]
    steps = [
        {name: training["steps"] if (training := run.methods[name]["training"]) else None for name in both}
        for run in (first, second)
    ]
    different += [f"the training steps of {name}" for name in both if steps[0][name] != steps[1][name]]
    return different


@dataclass(frozen=True)
class _Content:
    """A table before it is set: rows as (run, task, summaries), and its notes."""

    groups: list[tuple[Run, str | None, Sequence[Summary]]]
    notes: list[Note]


def _content(runs: Sequence[Run], spec: TableSpec, paper: Paper) -> _Content:
    _refuse_mixture(runs, spec)
    measured = [
        Measured(label, run, summarise(run, spec.methods)) for label, run in zip(labels(runs), runs, strict=True)
    ]
    if spec.by == "target":
        return _Content([(each.run, None, each.summaries) for each in measured], table1_notes(measured, spec, paper))
    if spec.has_tasks:
        rows, missing = rows_by_task(runs, spec)
        return _Content(
            [(row.run, row.task, row.summaries) for row in rows], table2_notes(measured, rows, missing, spec, paper)
        )
    targets = dict.fromkeys(run.header["target"]["name"] for run in runs)
    samples = [
        sample([run for run in runs if run.header["target"]["name"] == target], spec.methods) for target in targets
    ]
    pooled = [(chosen, summaries_of(chosen)) for chosen in samples]
    return _Content(
        [(chosen.runs[0], None, summaries) for chosen, summaries in pooled], table3_notes(measured, pooled, spec, paper)
    )


def _frame(groups: Sequence[tuple[Run, str | None, Sequence[Summary]]], spec: TableSpec, paper: Paper) -> pd.DataFrame:
    depth = max(
        (each.depth for _, _, summaries in groups for summary in summaries for each in summary.depths), default=0
    )
    rows = [_row(run, summary, task, spec, paper, depth) for run, task, summaries in groups for summary in summaries]
    # Objects, so that an integer stays one beside an empty cell.
    return pd.DataFrame(rows, dtype=object)


def table_frame(runs: Sequence[Run], spec: TableSpec, paper: Paper) -> pd.DataFrame:
    """A table in full precision, one row per target or task and method; columns carry their units.

    Raises:
        KoalaBenchError: see ``write_table``.
    """
    return _frame(_content(runs, spec, paper).groups, spec, paper)


# ---------------------------------------------------------------------------------------------- files

# By what a table's rows are grouped -> its name, its caption, and of what the best speedup is marked.
_TABLES = {
    "target": ("Table 1", "Speedup and acceptance length by target", "target"),
    "task": ("Table 2", "Speedup by task", "task"),
    "part": ("Table 3", "What the parts of KOALA are worth", "target"),
    "method": ("Leaderboard", "Speedup by method and task", "task of a target"),
}


def table_name(spec: TableSpec) -> str:
    """The name of a table's files, such as ``table1``."""
    return _TABLES[spec.by][0].lower().replace(" ", "")


@dataclass(frozen=True)
class SetTable:
    """A table as it is read: rounded cells, notes, and a second table of other people's numbers if there is one."""

    name: str
    title: str
    grid: Grid
    notes: Sequence[Note]
    below: tuple[str, Grid] | None


def set_table(runs: Sequence[Run], spec: TableSpec, paper: Paper) -> SetTable:
    """A table with its notes, not yet in any file format; arguments and errors as ``write_table``."""
    return _set(runs, spec, paper)[0]


def _set(runs: Sequence[Run], spec: TableSpec, paper: Paper) -> tuple[SetTable, pd.DataFrame]:
    content = _content(runs, spec, paper)
    frame = _frame(content.groups, spec, paper)
    name, caption, _ = _TABLES[spec.by]
    title = f"{name}: {caption if spec.by == 'part' else caption.lower()}"
    cells = leaderboard(frame) if spec.by == "method" else grid(frame, spec.columns)
    return SetTable(table_name(spec), title, cells, content.notes, external_table(runs, spec, paper)), frame


def write_table(runs: Sequence[Run], out_dir: Path, spec: TableSpec, paper: Paper) -> list[Path]:
    """Write a table as ``table1.md``, ``.tex`` and ``.csv``, or under another table's name; the same records give the
    same bytes.

    Args:
        runs: for Table 1 one record per target, on the same questions; for Table 2 and the leaderboard one per target
            and question file; for Table 3 one per target and training seed.
        spec: of ``reproduce/table*.toml``.
        paper: of ``reproduce/paper.toml``.

    Returns:
        The three paths.

    Raises:
        KoalaBenchError: see ``summarise``; runs that do not belong into one table; or a folder that cannot be written.
    """
    table, frame = _set(runs, spec, paper)
    _, caption, group = _TABLES[spec.by]
    latex_title = f"{caption}. The best speedup of each {group} is bold; intervals are in brackets."
    contents = {
        f"{table.name}.md": to_markdown(table.grid, table.title, table.notes, table.below),
        f"{table.name}.tex": to_latex(table.grid, latex_title, f"tab:{table.name}", table.notes, table.below),
        f"{table.name}.csv": to_csv(frame, spec.columns),
    }
    for file, text in contents.items():
        write_text(out_dir / file, text)
    return [out_dir / file for file in contents]
