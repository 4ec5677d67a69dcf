"""Tables as pure functions of run records: record -> data frame -> Markdown, LaTeX and CSV.

Nothing here needs a model, and nothing depends on the time, the machine or the order of a dictionary: the same
record gives the same bytes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from koala_bench.common.files import write_text
from koala_bench.records import statistics
from koala_bench.records.reading import Run, short_name, short_names
from koala_bench.records.summaries import Factor, evaluations, summarise
from koala_bench.results.tables.ablation import effects, effects_grid
from koala_bench.results.tables.bounds import bounds_tables
from koala_bench.results.tables.columns import changes_grid, grid, grouped
from koala_bench.results.tables.external import external_table
from koala_bench.results.tables.frame import table_rows
from koala_bench.results.tables.leaderboard import changes_by_task, leaderboard, speedups_by_task, whole_rows
from koala_bench.results.tables.mixing import refuse_mixture
from koala_bench.results.tables.notes import Measured, exceptions, labels, notes_of, over_in_words
from koala_bench.results.tables.ordering import order_grid
from koala_bench.results.tables.published import Paper, TableSpec
from koala_bench.results.tables.rendering import ALPHA, Grid, Note, csv_of, frame_of, to_latex, to_markdown
from koala_bench.results.tables.tasks import TaskRows, is_named, rows_by_task, rows_of

# By what a table's rows are grouped -> the name of its files, and its title.
_TABLES = {
    "target": ("table1", "Table 1: speedup and acceptance length"),
    "task": ("table2", "Table 2: speedup by task"),
    "part": ("table3", "Table 3: what the parts of KOALA are worth"),
    "method": ("leaderboard", "Leaderboard: speedup by method and task"),
}
_MORE = "More of each method"
# Columns of a spec that its LaTeX holds: what fits the text width of an article at the size of its type.
_PRINTED = ("target", "task", "method", "layers", "speedup", "acceptance_length", "change_percent")
# What a heading has -> its definition under the LaTeX.
_LEGEND = {
    "peedup": "Speedup: decoding tokens per second over vanilla's.",
    "Whole answer": "Whole answer: the same with the reading of the prompt.",
    "τ": "τ: tokens per verification step, bonus token included.",
    ALPHA: f"{ALPHA}: steps that accepted a token at a depth, of those that accepted one above it.",
    "Equal answers": "Equal answers: turns whose tokens are all vanilla's.",
    "Draft overhead": "Draft overhead: drafting time / (drafting + verification time).",
    "Change (": "Change: of the speedup, against the original head.",
    "Paper's range": "Paper's range: of the change.",
}


@dataclass(frozen=True)
class SetTable:
    """A table as it is read.

    Attributes:
        name: of its files, such as ``table1``.
        title: with the target and the questions, where these are the same for all rows.
        grid: the columns that matter, rounded.
        printed: those of them that fit the width of a page.
        further: more columns, changes and published values: each a title and a table.
        frame: all numbers in full precision, one row per target or task and method; columns carry their units.
        covers: what the intervals of ``printed`` are over, and how many of each there are, by group of rows.
    """

    name: str
    title: str
    grid: Grid
    printed: Grid
    further: Sequence[tuple[str, Grid]]
    notes: Sequence[Note]
    frame: pd.DataFrame
    covers: Sequence[Mapping[Factor, int]]


def set_table(runs: Sequence[Run], spec: TableSpec, paper: Paper) -> SetTable:
    """A table with its notes, not yet in any file format; arguments and errors as ``write_table``."""
    refuse_mixture(runs, spec)
    of_runs = zip(labels(runs), runs, strict=True)
    measured = [Measured(label, run, summarise(run, spec.methods)) for label, run in of_runs]
    groups, remarks = _groups(runs, spec)
    frame = table_rows(groups, spec, paper)
    names = short_names(row["target"] for row in frame)
    rows = [{**row, "target": names[row["target"]]} for row in frame]
    # A leaderboard has intervals over all tasks alone: of each target the last group, as in ``_further``.
    whole = {row.summaries[0].target: row for row in groups} if spec.by == "method" and not spec.picked else {}
    further = [] if spec.picked else _further(rows, groups, names, spec, paper)
    further += [*external_table(runs, spec, paper), *exceptions(measured)]
    name, title = (own or usual for own, usual in zip((spec.name, spec.title), _TABLES[spec.by], strict=True))
    several = spec.picked or len(names) > 1
    main, printed = _main(rows, spec)
    return SetTable(
        name=name,
        title=title + _where(runs),
        grid=_of_targets(main, several),
        printed=_of_targets(printed, several),
        further=[(title, _of_targets(table, several)) for title, table in further if table.rows],
        notes=notes_of(measured, spec, paper, remarks, [group.sample.covers for group in groups]),
        frame=frame_of(frame),
        covers=[group.sample.covers for group in whole.values() or groups],
    )


def _main(rows: list[dict[str, Any]], spec: TableSpec) -> tuple[Grid, Grid]:
    """The main table, and what of it fits the width of a page; columns chosen by hand are printed as they are."""
    if spec.picked:
        return (main := grid(rows, spec.columns)), main
    if spec.by == "method":
        return leaderboard(rows), leaderboard(rows, printed=True)
    return grid(rows, spec.columns), grid(rows, [name for name in spec.columns if name in _PRINTED])


def _groups(runs: Sequence[Run], spec: TableSpec) -> tuple[list[TaskRows], list[str]]:
    """The rows of a table, and what is to be said of them."""
    if spec.by == "target":
        return [rows_of(None, group, spec) for group in evaluations(runs)], []
    if not spec.has_tasks:
        by_target: dict[str, list[Run]] = {}
        for run in runs:
            by_target.setdefault(run.header["target"]["name"], []).append(run)
        return [rows_of(None, group, spec) for group in by_target.values()], []
    rows, remarks = rows_by_task(runs, spec)
    own = dict.fromkeys(run.header["questions"]["name"] for run in runs if not is_named(run, spec))
    files = ", ".join(dict.fromkeys(task.questions for task in spec.tasks))
    remarks += [
        f"Tasks are the categories of the questions {name}: those of the table are of {files} (`koala-bench data`)."
        for name in own
    ]
    return rows, remarks


def _further(
    rows: list[dict[str, Any]], groups: Sequence[TaskRows], names: Mapping[str, str], spec: TableSpec, paper: Paper
) -> list[tuple[str, Grid]]:
    """More of the measured numbers, each a title and a table."""
    change = "Change against the original head"
    # Of each target the last rows: over all tasks, where there are several.
    whole = {names[group.summaries[0].target]: group for group in groups}
    if spec.by == "method":
        tables = [
            (f"{change}: speedup (x)", changes_by_task(rows, "change_x")),
            (f"{change}: acceptance length", changes_by_task(rows, "length_change")),
        ]
    elif spec.by == "part":
        found = [(target, effects(group.sample, group.summaries)) for target, group in whole.items()]
        tables = [("What each part is worth", effects_grid(found))]
    else:
        tables = [(change, changes_grid(rows, grouped(spec.columns, spec.changes)))] if spec.changes else []
    for target, group in whole.items() if spec.systems else ():
        title = f"Published order of methods, on {target}"
        tables.append((title, order_grid(group.sample, spec.systems, paper)))
    tables += bounds_tables({target: group.sample for target, group in whole.items()})
    if spec.by == "method":
        more = grid(whole_rows(rows), ("target", "method", *spec.more))
        tables += [("Speedup by task, with intervals", speedups_by_task(rows)), (f"{_MORE}, over all tasks", more)]
    elif spec.more:
        tables.append((_MORE, grid(rows, grouped(spec.columns, spec.more))))
    return tables


def _where(runs: Sequence[Run]) -> str:
    """The target, the questions and the temperature, where there is one of each."""
    targets, questions = ({run.header[kind]["name"] for run in runs} for kind in ("target", "questions"))
    target = f", {short_name(targets.pop())}" if len(targets) == 1 else ""
    on = f" on {questions.pop()}" if target and len(questions) == 1 else ""
    acceptance = runs[0].header["acceptance"]  # the same in all runs of a table
    return target + on + (f", temperature {acceptance['temperature']:g}" if acceptance["rule"] != "greedy" else "")


def _of_targets(table: Grid, several: bool) -> Grid:
    """The table, without the column of its target where there is only one, which the title names."""
    if several or table.headings[0] != "Target":
        return table
    best = frozenset((row, column - 1) for row, column in table.best)
    return Grid(table.headings[1:], [row[1:] for row in table.rows], table.right[1:], best, table.begins)


def _caption(table: SetTable) -> tuple[str, str]:
    """The caption of the LaTeX, and the line under it."""
    caption = f"{table.title.rpartition(': ')[2]}."
    if table.printed.best:
        caption += " In bold the highest point estimate of a lossless method, which may not be distinguishable from"
        caption += " the next."
    if any(note.alarm for note in table.notes):
        caption += f" This table is incomplete: see {table.name}.md."
    headings = " ".join(table.printed.headings)
    legend = [text for part, text in _LEGEND.items() if part in headings]
    if any("[" in cell for row in table.printed.rows for cell in row):
        over = over_in_words(table.covers)
        legend.append(f"In brackets: {100 * statistics.CONFIDENCE:.0f} % bootstrap intervals over {over}.")
    return caption[0].upper() + caption[1:], " ".join(legend)


def write_table(runs: Sequence[Run], out_dir: Path, spec: TableSpec, paper: Paper) -> list[Path]:
    """Write a table as ``table1.md``, ``.tex`` and ``.csv``, or under another table's name; the same records give the
    same bytes. The LaTeX holds the columns that fit a page and definitions of these, the Markdown everything.
    Errors as ``sample``, or runs that do not belong into one table.

    Args:
        runs: for Table 1 one record per target, on the same questions; for Table 2 and the leaderboard one per target
            and question file; for Table 3 one per target and training seed; or of each of these one per process.
    """
    table = set_table(runs, spec, paper)
    caption, legend = _caption(table)
    contents = {
        f"{table.name}.md": to_markdown(table.grid, table.title, table.notes, table.further),
        f"{table.name}.tex": to_latex(table.printed, caption, f"tab:{table.name}", legend),
        f"{table.name}.csv": csv_of(table.frame),
    }
    for file, text in contents.items():
        write_text(out_dir / file, text)
    return [out_dir / file for file in contents]
