"""The command that splits a decoding step into its parts: profile."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from koala_bench.cli.app import app
from koala_bench.cli.options import (
    AttentionName,
    Device,
    Dtype,
    EngineName,
    Methods,
    PresetName,
    Settings,
    TargetName,
    Tree,
    method_names,
    preset_of,
)


@app.command()
def profile(
    heads: Annotated[Path, typer.Option("--heads", help="Folder of trained heads.")] = Path(
        "results/runs/table1-tiny/heads"
    ),
    preset: PresetName = "tiny",
    target: TargetName = None,
    device: Device = None,
    dtype: Dtype = None,
    methods: Methods = None,
    tree: Tree = None,
    attention: AttentionName = None,
    engine: EngineName = None,
    tokens: Annotated[int, typer.Option("--tokens", min=2, help="Length of every answer.")] = 64,
    out: Annotated[Path | None, typer.Option("--out", help="Write the table here too, a .md file.")] = None,
    settings: Settings = None,
) -> None:
    """Split a decoding step: draft, the model's own pass, what the harness puts around it, reads from the device.

    Example: `koala-bench profile --methods vanilla,eagle --heads results/runs/table1-tiny/heads`.
    """
    from koala_bench.common.files import write_text
    from koala_bench.costs.profile import in_words
    from koala_bench.costs.profile import profile as measure
    from koala_bench.dialogues.encoding import encode_prompt
    from koala_bench.dialogues.questions import bundled_questions, read_questions
    from koala_bench.evaluation.loop import load_methods, select_questions
    from koala_bench.training.experiment import load_preset_target

    chosen = preset_of(
        preset,
        False,
        settings,
        target=target,
        device=device,
        dtype=dtype,
        tree=tree,
        attention=attention,
        engine=engine,
    )
    loaded, template = load_preset_target(chosen)
    assert loaded.tokenizer is not None
    ready = load_methods(chosen, method_names(chosen, methods), loaded, heads)
    prompts = [
        encode_prompt(template, loaded.tokenizer, question.asked())
        for question in select_questions(read_questions(bundled_questions()), 1)
    ]
    with loaded.computing():
        text = in_words(measure(loaded, ready, prompts, tokens), loaded)
    if out is not None:
        write_text(out, text + "\n")
    print(text)
