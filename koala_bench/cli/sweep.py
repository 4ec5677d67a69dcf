"""Command of the search over settings of a method: sweep."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from koala_bench.cli.app import app
from koala_bench.cli.options import Out, Settings
from koala_bench.common.progress import say
from koala_bench.errors import KoalaBenchError


@app.command()
def sweep(
    grid: Annotated[
        Path | None, typer.Argument(help="The grid, a TOML file such as reproduce/sweeps/eagle.toml.")
    ] = None,
    records: Annotated[
        Path | None, typer.Option("--records", help="Write the table of this sweep.jsonl again, and train nothing.")
    ] = None,
    out: Out = None,
    settings: Settings = None,
) -> None:
    """Try settings of a method over several seeds, and say which helps on held-out prompts, with intervals.

    Interrupted, the same command goes on. The table is exploration; the grid's confirm_seeds give the result.

    Example: `koala-bench sweep reproduce/sweeps/eagle.toml --out results/runs/sweep-eagle`.
    """
    from koala_bench.common.files import write_text
    from koala_bench.sweeps.grid import read_grid
    from koala_bench.sweeps.results import markdown, read_sweep, to_csv

    if (grid is None) == (records is None):
        raise KoalaBenchError(
            "A sweep needs a grid to run, or --records to read, not both.", "Give e.g. reproduce/sweeps/eagle.toml."
        )
    if records is not None:
        log = read_sweep(records)
        text = markdown(log)
        if out is not None:
            write_text(out / "sweep.md", text)
            write_text(out / "sweep.csv", to_csv(log))
        print(text)
        return
    assert grid is not None
    folder = out if out is not None else Path("results") / "runs" / f"sweep-{grid.stem}"
    wanted = read_grid(grid)
    from koala_bench.sweeps.loop import run_sweep

    say(f"Sweep of {wanted.method} against {wanted.baseline} in {folder}.")
    print(markdown(run_sweep(wanted, settings or [], folder)))
    say(f"Wrote sweep.md, sweep.csv and sweep.jsonl to {folder}.")
