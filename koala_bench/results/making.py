"""Tables and figures from run records: what ``table``, ``figure``, ``reproduce`` and ``verify`` make alike.

A folder of results has the record of its main run, those of other training seeds and of Table 2's question files below
it, and the log of the training; what a table or figure in it is made from follows from that alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from koala_bench.common.bundled import RECIPES
from koala_bench.common.suggestions import did_you_mean
from koala_bench.errors import KoalaBenchError
from koala_bench.records.reading import Run, read_runs
from koala_bench.records.summaries import VANILLA
from koala_bench.results.figures import bars, categories, cost, depth, layers, oracle, tokens, training, vocabulary
from koala_bench.results.tables.building import SetTable, set_table, write_table
from koala_bench.results.tables.columns import known
from koala_bench.results.tables.published import TableSpec, read_figure_spec, read_paper, read_table_spec

RECORD = "records.jsonl"
_OF_PARTS = ("table3", "table-layers", "table-objectives", "table-vocabulary")
TABLES = ("table1", "table2", *_OF_PARTS, "leaderboard")
FIGURES = ("depth", "layers", "categories", "training", "oracle", "cost", "tokens", "vocabulary")
_KINDS = {".md", ".tex", ".csv", ".pdf", ".png"}


@dataclass(frozen=True)
class Sources:
    """The files that the tables and figures of a folder are made from.

    Attributes:
        main: the record of the folder itself, if there is one; on the preset's own questions.
        processes: records of the same evaluation in further processes, pooled with the main one in Table 1.
        seeds: records of other training seeds, for tables by part.
        tasks: records of the question files of Table 2 or the leaderboard; where there are none, the main record takes
            their place.
        log: of the training of the main record's heads.
    """

    main: Path | None
    processes: tuple[Path, ...] = ()
    seeds: tuple[Path, ...] = ()
    tasks: tuple[Path, ...] = ()
    log: Path | None = None

    @property
    def records(self) -> list[Path]:
        """All records."""
        return [*([self.main] if self.main else []), *self.processes, *self.seeds, *self.tasks]

    def of(self, name: str) -> list[Path]:
        """The files that a table or figure is made from; empty if they are not there."""
        if name == "training":
            return [self.log] if self.log else []
        main = [self.main] if self.main else []
        if name in ("table2", "leaderboard", "categories"):
            pooled = name in TABLES  # a figure is of one process
            return [path for path in self.tasks if pooled or not path.parent.name.startswith("process-")] or main
        if name in ("table1", *_OF_PARTS):
            main += self.processes
        return [*main, *self.seeds] if name in _OF_PARTS else main


def _each_process(folder: Path) -> tuple[Path, ...]:
    """The record of a folder, and those of further processes below it in their order."""
    of_processes = (path / RECORD for path in folder.glob("process-*"))
    further = sorted(of_processes, key=lambda path: (len(path.parent.name), path.parent.name))
    return tuple(path for path in (folder / RECORD, *further) if path.is_file())


def recipe_of(spec: Path) -> Path:
    """The file of a table's specification: a table's name, or a file. Raises KoalaBenchError where it is no name of a
    table and no such file."""
    if str(spec) in TABLES:
        return RECIPES / f"{spec}.toml"
    if spec.suffix != ".toml" and not spec.exists():
        others = f"The tables are {', '.join(TABLES)}; or name a .toml file."
        raise KoalaBenchError(f"There is no table '{spec}'.", did_you_mean(str(spec), TABLES, others))
    return spec


def sources_in(folder: Path) -> Sources:
    """What a folder of results holds to make tables and figures from."""
    main, logs = folder / RECORD, (folder / "training.jsonl", folder / "heads" / "training.jsonl")
    return Sources(
        main if main.is_file() else None,
        _each_process(folder)[1:] if main.is_file() else (),
        tuple(path for seed in sorted(folder.glob("seed-*")) for path in _each_process(seed)),
        tuple(path for task in sorted(folder.glob("tasks/*")) for path in _each_process(task)),
        next((log for log in logs if log.is_file()), None),
    )


def make_table(
    runs: Sequence[Run],
    out: Path,
    spec: Path,
    paper: Path = RECIPES / "paper.toml",
    columns: Sequence[str] | None = None,
) -> list[Path]:
    """Write a table (Markdown, LaTeX, CSV), and beside Table 1 its figure (PDF, PNG); returns the files.

    Args:
        spec: what the table shows. Methods of a record that no recipe names stand below the others in Tables 1 and 2.
        columns: the only columns, in this order, in place of the spec's.

    Raises:
        KoalaBenchError: there is no such column, a record has nothing to compare, or see ``write_table``.
    """
    wanted = _with_others(read_table_spec(spec), runs)
    if columns is not None:
        wanted = wanted.model_copy(update={"columns": known(columns, "--columns"), "more": (), "changes": ()})
    for run in runs:  # before anything is written: a table without its figure helps nobody
        if set(run.methods) <= {VANILLA}:
            raise KoalaBenchError(f"{run.path} has no method beside vanilla.", "Evaluate with more --methods.")
    written = write_table(runs, out, wanted, read_paper(paper))
    return [*written, *bars.write_figure1(runs, out, wanted.methods)] if wanted.by == "target" else written


def _with_others(spec: TableSpec, runs: Sequence[Run]) -> TableSpec:
    return spec if spec.by == "part" else spec.model_copy(update={"methods": _and_others(spec.methods, runs)})


def _and_others(methods: Sequence[str], runs: Sequence[Run]) -> tuple[str, ...]:
    """The methods, and those of the records that belong to no recipe: heads of one's own, no part of KOALA, no @K."""
    known = {*methods, *read_table_spec(RECIPES / "table3.toml").methods}
    every = dict.fromkeys(name for run in runs for name in run.methods)
    return (*methods, *(name for name in every if name not in known and "@" not in name))


def make_figure(name: str, paths: Sequence[Path], out: Path) -> list[Path]:
    """Write a figure (PDF, PNG) from records, or from a training's log; returns the files.

    Raises:
        KoalaBenchError: there is no such figure, or see the figure's function.
    """
    if name not in FIGURES:  # before a record is read
        raise KoalaBenchError(f"There is no figure '{name}'.", f"The figures are {', '.join(FIGURES)}.")
    if name in ("tokens", "vocabulary"):  # of whatever heads differ in this alone, so no file lists them
        return (tokens.write_tokens if name == "tokens" else vocabulary.write_vocabulary)(read_runs(paths), out)
    spec = read_figure_spec(RECIPES / f"figure-{name}.toml")
    if name == "training":
        if len(paths) != 1:
            raise KoalaBenchError(
                f"The figure of the training is of one log, not of {len(paths)} files.", "Name one training.jsonl."
            )
        return training.write_training(paths[0], out, spec.methods)
    runs = read_runs(paths)
    if name in ("layers", "cost"):
        return (layers.write_layers if name == "layers" else cost.write_cost)(runs, out, spec.methods)
    methods = _and_others(spec.methods, runs)
    if name == "categories":
        return categories.write_categories(runs, out, read_table_spec(RECIPES / "table2.toml"), methods)
    return (oracle.write_oracle if name == "oracle" else depth.write_depth)(runs, out, methods)


def make(name: str, sources: Sources, out: Path) -> list[Path]:
    """Write a table or figure of a folder of results; returns the files.

    Raises:
        KoalaBenchError: there is nothing to make it from, or see ``make_table`` and ``make_figure``.
    """
    paths = sources.of(name)
    if not paths and name in (*TABLES, *FIGURES):
        raise KoalaBenchError(
            f"There is nothing to make {name} from.", "Use `koala-bench reproduce`, or name the records."
        )
    if name in TABLES:
        return make_table(read_runs(paths), out, RECIPES / f"{name}.toml")
    return make_figure(name, paths, out)


def drawable(sources: Sources) -> list[str]:
    """The figures that there are records for: curves over K need several K, those over tokens several trainings.

    Raises:
        KoalaBenchError: a record is damaged, or there is none.
    """
    names = [name for name in FIGURES if sources.of(name)]
    if not names:
        raise KoalaBenchError("There is no record and no training log to draw.", "Name a folder with a records.jsonl.")
    runs = read_runs([sources.main] if sources.main else [])
    curves = {"layers": layers.has_curves, "cost": cost.has_cost_curves}
    drawn = {name: has(runs, read_figure_spec(RECIPES / f"figure-{name}.toml").methods) for name, has in curves.items()}
    drawn |= {"tokens": tokens.has_token_curves(runs), "vocabulary": vocabulary.has_vocabulary_curves(runs)}
    return [name for name in names if drawn.get(name, True)]


def tabulable(sources: Sources) -> list[str]:
    """The tables that there are records for: Table 2 needs its question files, Table 3 a part of KOALA alone.

    Raises:
        KoalaBenchError: a record is damaged.
    """
    usual, parts = (set(read_table_spec(RECIPES / f"{name}.toml").methods) for name in ("table1", "table3"))
    has_parts = any((parts - usual) & set(run.methods) for run in read_runs(sources.of("table3")))
    there = {"table1": sources.main is not None, "table2": bool(sources.tasks), "table3": has_parts}
    return [name for name, is_there in there.items() if is_there]  # the leaderboard is Table 2 turned round


def read_table(name: str, sources: Sources) -> SetTable:
    """A table of a folder of results, to be set elsewhere than in a file of its own; errors as ``make_table``."""
    runs = read_runs(sources.of(name))
    return set_table(
        runs, _with_others(read_table_spec(RECIPES / f"{name}.toml"), runs), read_paper(RECIPES / "paper.toml")
    )


def made_in(folder: Path) -> list[str]:
    """The tables and figures that lie in a folder, in whole or in part."""
    files = {path.stem for path in folder.iterdir() if path.suffix in _KINDS} if folder.is_dir() else set()
    return [
        name
        for name in (*TABLES, *FIGURES)
        if {name, f"figure-{name}", *(["figure1"] if name == "table1" else [])} & files
    ]
