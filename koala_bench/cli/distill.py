"""The command that lets a target answer the questions heads are trained on."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from koala_bench.cli.app import app
from koala_bench.cli.options import Device, Dtype, PresetName, Settings, TargetName, preset_of


@app.command()
def distill(
    out: Annotated[Path, typer.Option("--out", help="File of conversations to write: .jsonl, or .jsonl.gz.")],
    preset: PresetName = "tiny",
    target: TargetName = None,
    source: Annotated[
        str, typer.Option("--source", help="Whose questions: 'documentation', or a file of conversations.")
    ] = "documentation",
    train: Annotated[int, typer.Option("--limit", min=1, help="Number of dialogues to answer.")] = 4000,
    held_out: Annotated[int, typer.Option("--held-out", min=1, help="Number of held-out dialogues to answer.")] = 64,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1, help="Length limit of an answer.")] = 256,
    rows: Annotated[int, typer.Option("--rows", min=1, help="Prompts answered at once.")] = 32,
    turns: Annotated[
        int | None,
        typer.Option(
            "--turns",
            min=1,
            help="Questions of a dialogue that are answered at most; a long one keeps the others of its batch waiting.",
        ),
    ] = None,
    device: Device = None,
    dtype: Dtype = None,
    settings: Settings = None,
) -> None:
    """Let the target answer the questions of conversations itself, greedily: training data for its heads.

    Example: `koala-bench distill --out answers.jsonl`, then `koala-bench train --set data.source=answers.jsonl`.
    Interrupted, the same command goes on.
    """
    from koala_bench.dialogues.conversations import read_conversations
    from koala_bench.dialogues.distillation import DistillOptions, distill
    from koala_bench.training.experiment import load_preset_target

    loaded, template = load_preset_target(preset_of(preset, False, settings, target=target, device=device, dtype=dtype))
    options = DistillOptions(train, held_out, max_new_tokens, rows, turns)
    print(distill(loaded, template, read_conversations(source, template), out, options))
