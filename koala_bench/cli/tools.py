"""Commands that inspect and check: parity, heads, data."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from koala_bench.cli.app import app
from koala_bench.cli.options import DataDir


@app.command()
def parity(folder: Annotated[Path, typer.Argument(help="Fixtures made with the official code.")]) -> None:
    """Compare heads, trees, losses and decoding with fixtures of the official Medusa and EAGLE code. Exit code 0 or 1."""
    from koala_bench import parity as checks

    found = checks.check(folder)
    print(checks.report(found))
    raise typer.Exit(0 if checks.ok(found) else 1)


@app.command()
def heads() -> None:
    """List the installed draft heads, objectives and draft trees."""
    from koala_bench.registry import HEADS, OBJECTIVES, installed
    from koala_bench.tree import load_template, template_names

    for title, group in (("Heads", HEADS), ("Objectives (HEAD+NAME)", OBJECTIVES)):
        print(title)
        for name, point in sorted(installed(group).items()):
            print(f"  {name:<28}{point.value}" + (f"  ({point.dist.name} {point.dist.version})" if point.dist else ""))
    print("Trees")
    for name in template_names():
        tree = load_template(name)
        print(f"  {name:<34}{tree.nodes} nodes with the root, depth {tree.depth}")
    print("  chain-N, WxWxW, or a .json file with a list of child-rank paths")


@app.command()
def data(
    names: Annotated[list[str] | None, typer.Argument(help="Files to download; none lists them.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="Download every file.")] = False,
    data_dir: DataDir = None,
) -> None:
    """List the public question files with their sources, or download and verify them.

    Example: `koala-bench data mt_bench --data-dir data`.
    """
    from koala_bench.dialogues.downloads import DATASETS, fetch, status

    folder = data_dir or (Path(os.environ["KOALA_BENCH_DATA"]) if os.environ.get("KOALA_BENCH_DATA") else None)
    if names or everything:
        for path in fetch([dataset.name for dataset in DATASETS] if everything else list(names or ()), folder):
            print(path)
        return
    states = {found.dataset.name: found.state for found in status(folder)} if folder is not None else {}
    for dataset in DATASETS:
        print(
            f"{dataset.name:<14}{states.get(dataset.name, 'no data folder set'):<20}{dataset.rows:>4} rows  sha256"
            f" {dataset.sha256}"
        )
        print(f"{'':<14}{dataset.repository}@{dataset.commit[:12]} {dataset.path}")
    if folder is None:
        print("Set --data-dir or KOALA_BENCH_DATA to the folder that holds them.")
