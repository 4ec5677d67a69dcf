"""Published values and the shape of a table: strict models of ``reproduce/*.toml``, and reading them."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict

from koala_bench.common.reading import read_toml
from koala_bench.errors import KoalaBenchError
from koala_bench.records.reading import Run
from koala_bench.results.tables.columns import known


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Task(_Strict):
    """A task of Table 2: some or all categories of a question file."""

    name: str
    questions: str  # as for --questions
    categories: tuple[str, ...] = ()  # none: the whole file


class TableSpec(_Strict):
    """What to run for a table and what it shows: ``reproduce/table*.toml``.

    Attributes:
        by: what its rows are grouped by: Table 1 by target, Table 2 by task, Table 3 by part of KOALA; the leaderboard
            has a row per method and a column per task.
        name, title: of its files and above it, for a table besides those four.
        methods: rows of each group, in this order.
        questions: the question set of the paper's table.
        columns: names out of ``COLUMNS``: few, for a text width and a screen.
        more: further columns of the same rows, for a second table.
        changes: columns of the rows that are compared with an original head, for a table of their own.
        tasks: groups of a table by task, columns of one by method.
        limit: questions of each category, by the name of a preset that cannot afford all of them.
        seeds: of the trainings that a table by part is pooled over.
        systems: of a leaderboard, published name -> method that stands for it, to compare their order.
    """

    by: Literal["target", "task", "part", "method"] = "target"
    name: str | None = None
    title: str | None = None
    methods: tuple[str, ...]
    questions: str | None = None
    columns: tuple[str, ...]
    more: tuple[str, ...] = ()
    changes: tuple[str, ...] = ()
    tasks: tuple[Task, ...] = ()
    limit: dict[str, int] = {}
    seeds: tuple[int, ...] = ()
    systems: dict[str, str] = {}

    @property
    def picked(self) -> bool:
        """Whether the table holds its ``columns`` and nothing else, as where they are chosen by hand."""
        return not (self.more or self.changes)

    @property
    def has_tasks(self) -> bool:
        """Whether its numbers are of tasks, each of some question file."""
        return self.by in ("task", "method")


class FigureSpec(_Strict):
    """What to run for a figure and what it draws: ``reproduce/figure-*.toml``.

    Attributes:
        layers: numbers of layers K that each method is run with.
    """

    methods: tuple[str, ...]
    layers: tuple[int, ...] = ()


class Claim(_Strict):
    """A published range and where it stands."""

    low: float
    high: float
    source: str


class KoalaClaims(_Strict):
    """What KOALA claims over all its targets."""

    citation: str
    targets: tuple[str, ...]
    speedup_change_x: Claim
    speedup_change_percent: Claim


Value = float | Literal["unknown"]


class PaperCell(_Strict):
    """KOALA's own numbers for one target and method."""

    target: str
    method: str
    speedup: Value
    acceptance_length: Value | None


class PaperTasks(_Strict):
    """KOALA's own speedups for one target and method, by task."""

    target: str
    method: str
    speedup: dict[str, Value]


class OwnClaim(_Strict):
    """What the authors of a head published for it, on MT-bench."""

    system: str
    target: str
    speedup: Value
    temperature: str
    source: str


class TaskClaim(_Strict):
    """Speedups by task that others than KOALA's authors published; ``all tasks`` is the whole benchmark."""

    system: str
    target: str
    device: str
    speedup: dict[str, float]
    acceptance_length: float | None = None  # over all tasks
    source: str


class Paper(_Strict):
    """Published values: ``reproduce/paper.toml``."""

    koala: KoalaClaims
    table1: tuple[PaperCell, ...]
    table2: tuple[PaperTasks, ...] = ()
    table3: tuple[PaperCell, ...] = ()
    own_claims: tuple[OwnClaim, ...]
    by_task: tuple[TaskClaim, ...] = ()
    leaderboard: tuple[TaskClaim, ...] = ()  # of Spec-Bench's systems that are not in ``by_task``


_REMEDY = "Name a file of the folder reproduce/."


def read_table_spec(path: Path) -> TableSpec:
    """Read a ``reproduce/table*.toml``.

    Raises:
        KoalaBenchError: no such file, not TOML, a misspelt key, a column that does not exist, or a table by task
            without tasks.
    """
    spec = read_toml(path, "recipe", TableSpec, _REMEDY)
    known((*spec.columns, *spec.more, *spec.changes), str(path))
    if not spec.has_tasks and spec.questions is None:
        raise KoalaBenchError(f"{path}: questions: missing.", "Name the question set of the paper's table.")
    if spec.has_tasks != bool(spec.tasks):
        raise KoalaBenchError(
            f'{path}: tasks go with by = "task" or "method", and only with these.', "Correct `by` or `tasks`."
        )
    return spec


def read_figure_spec(path: Path) -> FigureSpec:
    """Read a ``reproduce/figure-*.toml``.

    Raises:
        KoalaBenchError: no such file, not TOML, or a misspelt key.
    """
    return read_toml(path, "recipe", FigureSpec, _REMEDY)


def read_paper(path: Path) -> Paper:
    """Read ``reproduce/paper.toml``.

    Raises:
        KoalaBenchError: no such file, not TOML, a misspelt key, or a value that is neither a number nor "unknown".
    """
    return read_toml(path, "published values", Paper, _REMEDY)


def paper_names(run: Run) -> tuple[str, str]:
    """The names under which published values may list a run's target: its preset's and its own."""
    return run.header["preset"]["name"], run.header["target"]["name"]
