"""The command that says what a preset takes before anything is downloaded or trained: plan."""

from __future__ import annotations

from typing import Annotated

import typer

from koala_bench.cli.app import app
from koala_bench.cli.options import (
    DataDir,
    Device,
    Dtype,
    Layers,
    Limit,
    MaxNewTokens,
    Methods,
    Out,
    PresetName,
    Questions,
    Quick,
    Repeats,
    Settings,
    TargetName,
    method_names,
    output_folder,
    preset_of,
)


@app.command()
def plan(
    preset: PresetName = "tiny",
    target: TargetName = None,
    device: Device = None,
    dtype: Dtype = None,
    methods: Methods = None,
    layers: Layers = None,
    max_new_tokens: MaxNewTokens = None,
    questions: Questions = None,
    limit: Limit = None,
    repeats: Repeats = None,
    data_dir: DataDir = None,
    out: Out = None,
    quick: Quick = False,
    settings: Settings = None,
    seconds: Annotated[
        float, typer.Option("--seconds", min=1, help="How long to measure; longer is more exact.")
    ] = 60.0,
) -> None:
    """Say what a run takes: parameters, memory, disk, tokens, hours on this machine, and what is missing for it.

    Nothing is downloaded but the configurations of the target and of draft models. Exit code 0 if it can run here, 1 if
    something is missing.

    Example: `koala-bench plan --preset vicuna-7b --data-dir data`.
    """
    from koala_bench.planning.outlook import outlook

    chosen = preset_of(
        preset, quick, settings, target=target, device=device, dtype=dtype, layers=layers, max_new_tokens=max_new_tokens, questions=questions,
        limit=limit, repeats=repeats,
    )  # fmt: skip
    names = method_names(chosen, methods)
    text, ready = outlook(chosen, names, data_dir, output_folder(out, "table1", chosen, quick), seconds)
    print(text)
    raise typer.Exit(0 if ready else 1)
