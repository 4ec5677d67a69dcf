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
from koala_bench.records.reading import Run, short_name
from koala_bench.records.summaries import Factor, Sample, Summary, evaluations, sample, summaries_of, summarise
from koala_bench.results.tables.ablation import effects, effects_grid
from koala_bench.results.tables.columns import changes_grid, grid, grouped, records_of, to_csv
from koala_bench.results.tables.external import external_table
from koala_bench.results.tables.frame import table_frame
from koala_bench.results.tables.leaderboard import changes_by_task, leaderboard, speedups_by_task, whole_rows
from koala_bench.results.tables.mixing import refuse_mixture
from koala_bench.results.tables.notes import Measured, intervals_in_words, labels, notes_of, over_in_words
from koala_bench.results.tables.ordering import order_grid
from koala_bench.results.tables.published import Paper, TableSpec
from koala_bench.results.tables.rendering import Grid, Note, to_latex, to_markdown
from koala_bench.results.tables.tasks import is_named, rows_by_task

# By what a table's rows are grouped -> its name and its caption.
_TABLES = {
    "target": ("Table 1", "Speedup and acceptance length"),
    "task": ("Table 2", "Speedup by task"),
    "part": ("Table 3", "What the parts of KOALA are worth"),
    "method": ("Leaderboard", "Speedup by method and task"),
}


@dataclass(frozen=True)
class SetTable:
    """A table as it is read.

    Attributes:
        name: of its files, such as ``table1``.
        title: with the target and the questions, where these are the same for all rows.
        grid: the columns that matter, rounded.
        further: more columns, changes and published values: each a title and a table.
        frame: all numbers in full precision, one row per target or task and method; columns carry their units.
        covers: what its intervals are over, and how many of each there are.
    """

    name: str
    title: str
    grid: Grid
    further: Sequence[tuple[str, Grid]]
    notes: Sequence[Note]
    frame: pd.DataFrame
    covers: Mapping[Factor, int]


def set_table(runs: Sequence[Run], spec: TableSpec, paper: Paper) -> SetTable:
    """A table with its notes, not yet in any file format; arguments and errors as ``write_table``."""
    refuse_mixture(runs, spec)
    of_runs = zip(labels(runs), runs, strict=True)
    measured = [Measured(label, run, summarise(run, spec.methods)) for label, run in of_runs]
    groups, samples, remarks = _groups(measured, spec)
    frame = table_frame(groups, spec, paper)
    covers = min((summaries[0].covers for _, _, summaries in groups), key=lambda each: each["questions"])
    further, said = ([], []) if spec.picked else _further(records_of(frame), samples, spec, paper)
    if external := external_table(runs, spec, paper):
        further.append(external)
    name, caption = _TABLES[spec.by]
    notes = notes_of(measured, spec, paper, [*remarks, *said], intervals_in_words(covers))
    return SetTable(
        name=name.lower().replace(" ", ""),
        title=f"{name}: {caption[0].lower()}{caption[1:]}{_where(runs)}",
        grid=_without_target(_first(records_of(frame), spec), spec),
        further=[(title, _without_target(table, spec)) for title, table in further if table.rows],
        notes=notes,
        frame=frame,
        covers=covers,
    )


_Groups = list[tuple[Run, str | None, Sequence[Summary]]]


def _groups(measured: Sequence[Measured], spec: TableSpec) -> tuple[_Groups, list[Sample], list[str]]:
    """The rows of a table as (run, task, summaries), the sample of each target, and what is to be said of them."""
    runs = [each.run for each in measured]
    by_target: dict[str, list[Run]] = {run.header["target"]["name"]: [] for run in runs}
    if spec.by == "target":
        samples = [sample(group, spec.methods) for group in evaluations(runs)]
        return [(chosen.runs[0], None, summaries_of(chosen)) for chosen in samples], [], []
    if not spec.has_tasks:
        for run in runs:
            by_target[run.header["target"]["name"]].append(run)
        samples = [sample(of_target, spec.methods) for of_target in by_target.values()]
        remarks = [
            f"The heads of {chosen.runs[0].target} are of one training seed,"
            f" {chosen.runs[0].training_seed}: intervals are over questions, and another seed may move the numbers"
            " by more."
            for chosen in samples
            if "training seeds" not in chosen.covers
        ]
        return [(chosen.runs[0], None, summaries_of(chosen)) for chosen in samples], samples, remarks
    rows, remarks = rows_by_task(runs, spec)
    tasks, files = (
        ", ".join(dict.fromkeys(getattr(each, name) for each in spec.tasks)) for name in ("name", "questions")
    )
    remarks += [
        f"{each.label}: these are the categories of the questions {each.run.header['questions']['name']}, not the tasks"
        f" {tasks}, whose questions ({files}) are looked up in a data folder (`koala-bench data`)."
        for each in measured
        if not is_named(each.run, spec)
    ]
    # Of each target the last row: all tasks, or the only one.
    whole = {row.summaries[0].target: sample(row.runs, spec.methods) for row in rows}
    return [(row.run, row.task, row.summaries) for row in rows], list(whole.values()), remarks


def _first(rows: list[dict[str, Any]], spec: TableSpec) -> Grid:
    return leaderboard(rows) if spec.by == "method" and not spec.picked else grid(rows, spec.columns)


def _further(
    rows: list[dict[str, Any]], samples: Sequence[Sample], spec: TableSpec, paper: Paper
) -> tuple[list[tuple[str, Grid]], list[str]]:
    """More of the measured numbers, each a title and a table, and what is to be said of them."""
    change = "Change against the original head"
    said: list[str] = []
    if spec.by == "method":
        changes = [
            (f"{change}: speedup (x)", changes_by_task(rows, "change_x")),
            (f"{change}: acceptance length", changes_by_task(rows, "length_change")),
        ]
        more = [("Speedup by task, with intervals", speedups_by_task(rows))]
        more.append(("More of each method, over all tasks", grid(whole_rows(rows), ("target", "method", *spec.more))))
    else:
        more = [("More of each method", grid(rows, grouped(spec.columns, spec.more)))] if spec.more else []
        shown = changes_grid(rows, grouped(spec.columns, spec.changes))
        changes = [(change, shown)] if spec.changes else []
    if spec.by == "part":
        of_targets = [(chosen.runs[0].target, effects(chosen, summaries_of(chosen))) for chosen in samples]
        changes = [("What each part is worth", effects_grid(of_targets))]
    count = sum(cell.endswith("]") for _, table in changes for row in table.rows for cell in row)
    said += [statistics.caution(count)] if count else []
    for chosen in samples if spec.systems else ():
        if found := order_grid(chosen, spec.systems, paper):
            changes.append((f"Published order of methods, on {chosen.runs[0].target}", found[0]))
            said += found[1]
    return [*changes, *more], said


def _where(runs: Sequence[Run]) -> str:
    """The target, the questions and the temperature, where there is one of each."""
    targets, questions = ({run.header[kind]["name"] for run in runs} for kind in ("target", "questions"))
    target = f", {short_name(targets.pop())}" if len(targets) == 1 else ""
    on = f" on {questions.pop()}" if target and len(questions) == 1 else ""
    acceptance = runs[0].header["acceptance"]  # the same in all runs of a table
    return target + on + (f", temperature {acceptance['temperature']:g}" if acceptance["rule"] != "greedy" else "")


def _without_target(table: Grid, spec: TableSpec) -> Grid:
    """The table without its first column where that names one target in all rows; the title says which."""
    if spec.picked or table.headings[0] != "Target" or len({row[0] for row in table.rows}) > 1:
        return table
    best = frozenset((row, column - 1) for row, column in table.best)
    return Grid(table.headings[1:], [row[1:] for row in table.rows], table.right[1:], best, table.begins)


def _caption(table: SetTable) -> tuple[str, str]:
    """The caption of the LaTeX, and the line under it."""
    caption = f"{table.title.partition(': ')[2]}. In bold the best speedup of a lossless method."
    if any(note.alarm for note in table.notes):
        caption += f" This table is incomplete: see {table.name}.md."
    over = over_in_words(table.covers)
    legend = (
        "Speedup: decoding tokens per second over vanilla's; whole answer: with the reading of the prompt. τ: tokens per verification step, bonus token included. In"
        f" brackets: {100 * statistics.CONFIDENCE:.0f} % bootstrap intervals over {over}."
    )
    return caption[0].upper() + caption[1:], legend


def write_table(runs: Sequence[Run], out_dir: Path, spec: TableSpec, paper: Paper) -> list[Path]:
    """Write a table as ``table1.md``, ``.tex`` and ``.csv``, or under another table's name; the same records give the
    same bytes. The LaTeX holds the columns that matter and one line of definitions, the Markdown everything.

    Args:
        runs: for Table 1 one record per target, on the same questions; for Table 2 and the leaderboard one per target
            and question file; for Table 3 one per target and training seed; or of each of these one per process.
        spec: of ``reproduce/table*.toml``.
        paper: of ``reproduce/paper.toml``.

    Returns:
        The three paths.

    Raises:
        KoalaBenchError: see ``summarise``; runs that do not belong into one table; or a folder that cannot be written.
    """
    table = set_table(runs, spec, paper)
    caption, legend = _caption(table)
    contents = {
        f"{table.name}.md": to_markdown(table.grid, table.title, table.notes, table.further),
        f"{table.name}.tex": to_latex(table.grid, caption, f"tab:{table.name}", legend),
        f"{table.name}.csv": to_csv(table.frame, (*spec.columns, *spec.more, *spec.changes)),
    }
    for file, text in contents.items():
        write_text(out_dir / file, text)
    return [out_dir / file for file in contents]
