"""The command that times the harness itself: benchmark."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from koala_bench.cli.app import app
from koala_bench.cli.options import (
    Device,
    Dtype,
    EngineName,
    Methods,
    PresetName,
    Settings,
    TargetName,
    method_names,
    preset_of,
)

_CONTEXTS, _NODES = (64, 256, 1024, 2048, 4096), (1, 8)


@app.command()
def benchmark(
    preset: PresetName = "tiny",
    target: TargetName = None,
    device: Device = None,
    dtype: Dtype = None,
    engine: EngineName = None,
    methods: Methods = None,
    tokens: Annotated[int, typer.Option("--tokens", min=2, help="Length of every answer.")] = 96,
    rounds: Annotated[int, typer.Option("--rounds", min=1, help="How often every prompt is timed.")] = 3,
    steps: Annotated[int, typer.Option("--steps", min=1, help="Training steps to time.")] = 12,
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder for benchmark.md and the figure of step time against context.")
    ] = None,
    settings: Settings = None,
) -> None:
    """Time vanilla decoding against transformers' generate, steps against context length, and training heads together
    against each alone.

    Example: `koala-bench benchmark --rounds 5`.
    """
    from dataclasses import replace

    from koala_bench.common.files import write_text
    from koala_bench.costs import scaling
    from koala_bench.costs.figure_context import write_context
    from koala_bench.costs.generate import compare_with_generate
    from koala_bench.costs.profile import machine_in_words
    from koala_bench.costs.training import training_speed
    from koala_bench.dialogues.conversations import read_conversations
    from koala_bench.dialogues.encoding import encode_prompt
    from koala_bench.dialogues.questions import bundled_questions, read_questions
    from koala_bench.evaluation.loop import select_questions
    from koala_bench.training.experiment import free_head, load_preset_target, training_streams

    chosen = preset_of(preset, False, settings, target=target, device=device, dtype=dtype, engine=engine)
    names = [name for name in method_names(chosen, methods) if name != "vanilla"]
    loaded, template = load_preset_target(chosen)
    assert loaded.tokenizer is not None
    prompts = [
        encode_prompt(template, loaded.tokenizer, question.asked())
        for question in select_questions(read_questions(bundled_questions()), 1)
    ]
    with loaded.computing():
        place = machine_in_words(loaded)
        found = compare_with_generate(loaded, prompts, tokens, rounds)
        costs = scaling.step_costs(loaded, _CONTEXTS, _NODES)
    eager = replace(loaded, engine="eager")
    trained = [
        name for name in dict.fromkeys(map(chosen.trained_as, names)) if free_head(chosen.method(name), eager) is None
    ]
    stream, *_ = training_streams(chosen, read_conversations(chosen.data.source, template), eager, template)
    speed = training_speed(chosen, trained, eager, stream, steps)
    alone = ", ".join(f"{name} {1000 * seconds:.0f} ms" for name, seconds in speed.alone.items())
    text = "\n".join([
        f"Decoding on {place}.",
        "",
        f"Vanilla decoding {found.vanilla_tokens_per_s:.1f} tokens/s, transformers' generate {found.generate_tokens_per_s:.1f} tokens/s: "
        f"vanilla is {found.ratio:.2f}x as fast as generate (quartiles {found.lowest:.2f} to {found.highest:.2f}); "
        f"{found.equal} of {found.answers} answers have the same tokens.",
        "",
        scaling.in_words(costs),
        "",
        f"A training step of {len(trained)} heads together takes {1000 * speed.together:.0f} ms ({speed.tokens / speed.together:,.0f} tokens/s, "
        f"{speed.target / speed.together:.0%} of it the target's), of each alone {alone}: together {speed.ratio:.2f} of the sum.",
    ])  # fmt: skip
    print(text)
    if out is not None:
        write_text(out / "benchmark.md", text + "\n")
        write_context(costs, out)
