"""The command that finds the draft tree for a head on this machine: tune-tree."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from koala_bench.cli.app import app
from koala_bench.cli.options import (
    AttentionName,
    Device,
    Dtype,
    EngineName,
    PresetName,
    Settings,
    TargetName,
    preset_of,
)
from koala_bench.errors import KoalaBenchError


@app.command("tune-tree")
def tune_tree(
    method: Annotated[str, typer.Argument(help="A method with a trained head, such as eagle.")],
    out: Annotated[
        Path,
        typer.Option("--out", help="The tree as a .json file; use it with --tree, or --set methods.NAME.tree=FILE."),
    ],
    heads: Annotated[Path, typer.Option("--heads", help="Folder of trained heads.")] = Path(
        "results/runs/table1-tiny/heads"
    ),
    preset: PresetName = "tiny",
    target: TargetName = None,
    device: Device = None,
    dtype: Dtype = None,
    attention: AttentionName = None,
    engine: EngineName = None,
    prompts: Annotated[
        int,
        typer.Option(
            "--prompts", min=2, help="Held-out prompts; two thirds are searched on, the others decoded in the end."
        ),
    ] = 120,
    tokens: Annotated[int, typer.Option("--tokens", min=4, help="Length limit of an answer.")] = 64,
    most: Annotated[
        int, typer.Option("--nodes", min=2, max=256, help="Nodes of the largest tree, the root included.")
    ] = 16,
    depth: Annotated[int, typer.Option("--depth", min=1, max=16, help="Levels of the deepest tree.")] = 5,
    widest: Annotated[int, typer.Option("--ranks", min=1, max=256, help="Candidates of a node to consider.")] = 6,
    settings: Settings = None,
) -> None:
    """Find the draft tree from which most tokens a second are expected on this machine, and compare it with the usual
    one.

    Step times are measured, acceptance by rank and depth is counted along the target's own answers to held-out prompts,
    and the tree is found by dynamic programming (Sequoia, arXiv 2402.12374) and greedily (Medusa's way).

    Example: `koala-bench tune-tree eagle --heads results/runs/table1-tiny/heads --out eagle-tree.json`.
    """
    from koala_bench.common.files import write_text
    from koala_bench.dialogues.conversations import held_out_prompts
    from koala_bench.evaluation.loop import load_methods
    from koala_bench.training.experiment import load_preset_target
    from koala_bench.trees.tuning import in_words, tune

    if out.suffix != ".json":
        raise KoalaBenchError(f"{out} is no name for a tree.", "Let --out end in .json, so that --tree can read it.")
    chosen = preset_of(
        preset, False, settings, target=target, device=device, dtype=dtype, attention=attention, engine=engine
    )
    chosen.method(method)
    loaded, template = load_preset_target(chosen)
    ready = load_methods(chosen, ["vanilla", method], loaded, heads)[1]
    asked = held_out_prompts(
        loaded, template, chosen.data.source, prompts, min(chosen.data.max_tokens, loaded.max_positions) - tokens
    )
    if len(asked) < 2:
        raise KoalaBenchError(
            "The data has fewer than two held-out prompts that leave room for an answer.",
            "Lower --tokens, or give other data.source.",
        )
    with loaded.computing():
        found = tune(loaded, ready.head, ready.template, asked, tokens, most, depth, widest)
    tuned = next(each for each in found if each.template.name == "tuned")
    write_text(out, json.dumps([list(path) for path in tuned.template.paths]) + "\n")
    print(in_words(method, found))
