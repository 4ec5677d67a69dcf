"""The command that proves or disproves losslessness: audit."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from koala_bench.cli.app import app
from koala_bench.cli.options import (
    DataDir,
    Device,
    Dtype,
    EngineName,
    Limit,
    MaxNewTokens,
    Methods,
    Out,
    PresetName,
    Quick,
    Settings,
    TargetName,
    Tree,
    method_names,
    output_folder,
    preset_of,
    typed_command,
)  # fmt: skip
from koala_bench.errors import KoalaBenchError
from koala_bench.presets import Preset


@app.command()
def audit(
    preset: PresetName = "tiny",
    target: TargetName = None,
    device: Device = None,
    dtype: Dtype = None,
    methods: Methods = None,
    tree: Tree = None,
    engine: EngineName = None,
    max_new_tokens: MaxNewTokens = None,
    tasks: Annotated[
        str | None,
        typer.Option(
            "--tasks", help="Comma-separated question sets, or all of the data folder; the preset's by default."
        ),
    ] = None,
    limit: Limit = None,
    data_dir: DataDir = None,
    heads: Annotated[
        Path | None, typer.Option("--heads", help="Folder of trained heads; that of reproduce table1 by default.")
    ] = None,
    out: Out = None,
    quick: Quick = False,
    settings: Settings = None,
) -> None:
    """Compare every answer with vanilla's and judge each difference: numerical tie, or defect. Exit code 1 on a defect.

    Example: `koala-bench audit --dtype float64 --tasks mt_bench,gsm8k --data-dir data`.
    """
    from koala_bench.common.files import write_text
    from koala_bench.common.progress import say
    from koala_bench.dialogues.questions import find_questions, read_questions
    from koala_bench.engine.target import Target, load_target
    from koala_bench.evaluation.loop import evaluate
    from koala_bench.gate import audit as auditing
    from koala_bench.training.experiment import load_preset_target

    chosen = preset_of(
        preset,
        quick,
        settings,
        target=target,
        device=device,
        dtype=dtype,
        tree=tree,
        max_new_tokens=max_new_tokens,
        limit=limit,
        engine=engine,
    )
    names = method_names(chosen, methods)
    if names == ["vanilla"] or "vanilla" not in names:
        raise KoalaBenchError(
            "An audit compares methods with vanilla.", "Name vanilla and at least one other method in --methods."
        )
    if chosen.evaluation.temperature:
        raise KoalaBenchError(
            "An audit compares answers token by token, and with a temperature they are draws.",
            "Leave evaluation.temperature at 0.",
        )
    sources = {name: find_questions(name, data_dir) for name in _tasks(tasks, chosen, data_dir)}
    questions = {
        name: read_questions(path) for name, (_, path) in sources.items()
    }  # a wrong file should be told before the first hour
    folder = out or output_folder(None, "audit", chosen, quick)
    trained = heads or output_folder(None, "table1", chosen, quick) / "heads"
    loaded, template = load_preset_target(chosen)

    def in_precision(name: str) -> Target:
        wanted = chosen.target
        return load_target(
            wanted.name,
            wanted.device,
            name,
            wanted.revision,
            wanted.attention,
            engine=wanted.engine,
            threads=wanted.threads,
        )

    found = []
    for name, asked in questions.items():
        task = chosen.model_copy(update={"evaluation": chosen.evaluation.model_copy(update={"questions": name})})
        record = folder / f"{sources[name][0]}-{str(loaded.dtype).removeprefix('torch.')}.jsonl"
        run = evaluate(task, preset, names, loaded, template, trained, record, data_dir, typed_command())
        found.append(auditing.audit(run, asked, template, loaded, in_precision))
        say(
            f"{name}: {sum(count.equal for count in found[-1].counts)} of"
            f" {sum(count.compared for count in found[-1].counts)} answers equal to vanilla's."
        )
    text = auditing.to_markdown(found)
    write_text(folder / "audit.md", text)
    print(text)
    say(f"Wrote audit.md and the records to {folder}.")
    raise typer.Exit(1 if any(each.defects for each in found) else 0)


def _tasks(tasks: str | None, preset: Preset, data_dir: Path | None) -> list[str]:
    from koala_bench.dialogues.downloads import data_folder
    from koala_bench.dialogues.questions import names_in

    if tasks is None:
        return [preset.evaluation.questions]
    if tasks == "all":
        folder = data_folder(data_dir)
        if names := names_in(folder):
            return names
        raise KoalaBenchError(
            f"{folder} has no question files.", "Fetch them with `koala-bench data --all`, or name --tasks."
        )
    if names := [name.strip() for name in tasks.split(",") if name.strip()]:
        return list(dict.fromkeys(names))
    raise KoalaBenchError(f"--tasks '{tasks}' names no question set.", "Name some, separated by commas, or all.")
