"""The tasks of Table 2: which turns of which record belong to each, and all of them together.

A task is some categories of a question file. A record of another file, such as the bundled one, has its own categories.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from koala_bench.errors import KoalaBenchError
from koala_bench.records.reading import Run, short_names
from koala_bench.records.summaries import Sample, Summary, evaluations, sample, summaries_of
from koala_bench.results.tables.published import TableSpec

ALL_TASKS = "all tasks"


@dataclass(frozen=True)
class TaskRows:
    """Rows of a table: a task of a target, or all of its answers where ``task`` is None."""

    task: str | None
    sample: Sample
    summaries: list[Summary]

    @property
    def run(self) -> Run:
        """The first of its records: its part of the task, where there is one."""
        return self.sample.runs[0]


def rows_of(task: str | None, runs: Sequence[Run], spec: TableSpec) -> TaskRows:
    """The numbers of records that are taken together; errors as ``sample``."""
    chosen = sample(runs, spec.methods)
    return TaskRows(task, chosen, summaries_of(chosen))


def is_named(run: Run, spec: TableSpec) -> bool:
    """Whether a record is of a question file that the table's tasks come from."""
    return run.header["questions"]["name"] in {task.questions for task in spec.tasks}


def _split(run: Run, spec: TableSpec) -> dict[str, Run]:
    """The record's part of each task, in the order of the table, or of the record for its own categories."""
    present = list(dict.fromkeys(turn["category"] for turn in run.turns))
    if is_named(run, spec):
        wanted = {
            task.name: task.categories or tuple(present)
            for task in spec.tasks
            if task.questions == run.header["questions"]["name"]
        }
    else:
        wanted = {category: (category,) for category in present}
    parts = {
        name: replace(run, turns=[turn for turn in run.turns if turn["category"] in categories])
        for name, categories in wanted.items()
    }
    return {name: part for name, part in parts.items() if part.turns}


def _together(parts: Sequence[tuple[Run, ...]]) -> tuple[Run, ...]:
    """Several parts as one record, or one of each process that made all of them.

    Question files number their questions as they like, so they are numbered anew.
    """
    places: dict[tuple[str, int], int] = {}
    found = []
    for process in zip(*parts, strict=False):
        turns = []
        for run in process:
            file = run.header["questions"]["sha256"]
            for turn in run.turns:
                number = places.setdefault((file, turn["question_id"]), len(places))
                turns.append({**turn, "question_id": number})
        found.append(replace(process[0], turns=turns))
    return tuple(found)


def rows_by_task(runs: Sequence[Run], spec: TableSpec) -> tuple[list[TaskRows], list[str]]:
    """The tasks of each target in the table's order, all of them together last, and sentences on what has no rows.

    Args:
        runs: of one or several targets, each of a question file of its own per target, or a process of that.

    Raises:
        KoalaBenchError: not one task has a turn that every method finished.
    """
    order = [task.name for task in spec.tasks]
    rows: list[TaskRows] = []
    missing: list[str] = []
    names = short_names(run.header["target"]["name"] for run in runs)
    for target, shown_as in names.items():
        parts = []
        for of_processes in evaluations([run for run in runs if run.header["target"]["name"] == target]):
            splits = [_split(run, spec) for run in of_processes]
            parts += [(name, tuple(each[name] for each in splits if name in each)) for name in splits[0]]
        parts.sort(key=lambda pair: order.index(pair[0]) if pair[0] in order else len(order))
        shown = []
        for name, part in parts:
            try:
                rows.append(rows_of(name, part, spec))
            except KoalaBenchError as error:
                missing.append(f"{name} of {shown_as} has no row: {error.message}")
                continue
            shown.append(part)
        if len(shown) > 1:
            rows.append(rows_of(ALL_TASKS, _together(shown), spec))
        if any(is_named(run, spec) for run in runs):
            missing += [
                f"The records of {shown_as} have no question of the task {name}."
                for name in order
                if name not in dict(parts)
            ]
    if not rows:
        raise KoalaBenchError(
            missing[0] if missing else "There is no turn to make a table of.",
            "Run the same evaluation again; it resumes.",
        )
    return rows, missing
