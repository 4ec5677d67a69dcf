"""The command that decodes several answers at once: batches."""

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
from koala_bench.errors import KoalaBenchError

_PROMPTS = 8


@app.command()
def batches(
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
    sizes: Annotated[
        str, typer.Option("--sizes", help="Comma-separated: how many answers at once; divisors of 8.")
    ] = "1,2,4,8",
    tokens: Annotated[int, typer.Option("--tokens", min=2, help="Length of every answer.")] = 64,
    rounds: Annotated[int, typer.Option("--rounds", min=1, help="How often everything is timed.")] = 2,
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder for batches.md and the figure of speedup against batch size.")
    ] = None,
    settings: Settings = None,
) -> None:
    """Measure throughput and speedup with several answers at once, each keeping as many drafted tokens as it gets;
    greedy and lossless.

    Example: `koala-bench batches --methods vanilla,medusa,eagle --heads results/runs/table1-tiny/heads`.
    """
    from koala_bench.common.files import write_text
    from koala_bench.costs.batches import batch_speeds, in_words
    from koala_bench.costs.figure_batches import write_batches
    from koala_bench.dialogues.encoding import encode_prompt
    from koala_bench.dialogues.questions import bundled_questions, read_questions
    from koala_bench.evaluation.loop import load_methods, select_questions
    from koala_bench.training.experiment import load_preset_target

    counts = [int(each) if each.strip().isdigit() else 0 for each in sizes.split(",")]
    if not counts or any(count < 1 or _PROMPTS % count for count in counts):
        raise KoalaBenchError(f"--sizes {sizes} are not divisors of {_PROMPTS}.", "Use some of 1,2,4,8.")
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
    questions = select_questions(read_questions(bundled_questions()), 1)[:_PROMPTS]
    prompts = [encode_prompt(template, loaded.tokenizer, question.asked()) for question in questions]
    with loaded.computing():
        speeds = batch_speeds(loaded, ready, prompts, counts, tokens, rounds)
    text = in_words(speeds)
    if out is not None:
        write_text(out / "batches.md", text + "\n")
        write_batches(speeds, out)
    print(text)
