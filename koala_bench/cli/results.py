"""Commands that read records: table, verify."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from koala_bench.cli.app import app
from koala_bench.cli.options import DataDir

_RECIPES = Path(__file__).parents[2] / "reproduce"


@app.command()
def table(
    records: Annotated[list[Path], typer.Argument(help="Run records, one per target.")],
    spec: Annotated[Path, typer.Option("--spec", help="What the table shows.")] = _RECIPES / "table1.toml",
    paper: Annotated[Path, typer.Option("--paper", help="Published values.")] = _RECIPES / "paper.toml",
    out: Annotated[Path | None, typer.Option("--out", help="Folder; the first record's by default.")] = None,
) -> None:
    """Make Table 1 (Markdown, LaTeX, CSV) and its figure from run records; needs no model.

    Example: `koala-bench table results/runs/table1-tiny/records.jsonl`.
    """
    from koala_bench.records import read_runs
    from koala_bench.reproduction import make_table1

    for path in make_table1(read_runs(records), out or records[0].parent, spec, paper):
        print(path)


@app.command()
def verify(
    folder: Annotated[Path, typer.Argument(help="Folder with records.jsonl and what was made from it.")],
    data_dir: DataDir = None,
) -> None:
    """Compute hashes and tables of a folder of results once more and say whether they match its record. Exit code 0 or 1.

    Example: `koala-bench verify results/table1-tiny`.
    """
    from koala_bench.integrity import verify as checked

    run, checks = checked(folder, data_dir)
    for check in checks:
        print(f"{check.state:<10}{check.subject:<34} {check.detail}")
    code = run.header["code"]
    commit = f"{code['commit'] or 'unknown'}{' with uncommitted changes' if code['dirty'] else ''}"
    print(f"Measured {run.header['created']} on {run.header['environment']['cpu']}, commit {commit}.")
    raise typer.Exit(1 if any(check.state == "differs" for check in checks) else 0)
