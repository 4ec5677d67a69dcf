"""Commands that read records: table."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from koala_bench.cli.app import app
from koala_bench.errors import KoalaBenchError

if TYPE_CHECKING:
    from koala_bench.records import Run

TABLES = Path(__file__).parents[2] / "reproduce"


@app.command()
def table(
    records: Annotated[list[Path], typer.Argument(help="Run records, one per target.")],
    spec: Annotated[Path, typer.Option("--spec", help="What the table shows.")] = TABLES / "table1.toml",
    paper: Annotated[Path, typer.Option("--paper", help="Published values.")] = TABLES / "paper.toml",
    out: Annotated[Path | None, typer.Option("--out", help="Folder; the first record's by default.")] = None,
) -> None:
    """Make Table 1 (Markdown, LaTeX, CSV) and its figure from run records; needs no model.

    Example: `koala-bench table results/runs/table1-tiny/records.jsonl`.
    """
    from koala_bench.records import read_runs

    for path in make_table1(read_runs(records), spec, paper, out or records[0].parent):
        print(path)


def make_table1(runs: list[Run], spec: Path, paper: Path, out: Path) -> list[Path]:
    """Write Table 1 and its figure; returns the files."""
    from koala_bench.figures import write_figure1
    from koala_bench.published import read_paper, read_table_spec
    from koala_bench.tables import write_table1

    wanted = read_table_spec(spec)
    # A head of the user's own is not named in reproduce/; it stands below the paper's methods.
    others = [name for run in runs for name in run.methods if name not in wanted.methods]
    wanted = wanted.model_copy(update={"methods": (*wanted.methods, *dict.fromkeys(others))})
    for run in runs:  # before anything is written: a table without its figure helps nobody
        if set(run.methods) <= {"vanilla"}:
            raise KoalaBenchError(f"{run.path} has no method beside vanilla.", "Evaluate with more --methods.")
    return [*write_table1(runs, out, wanted, read_paper(paper)), *write_figure1(runs, out, wanted.methods)]
