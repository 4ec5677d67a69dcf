"""Commands for a head of one's own: new-head, check-head, compare."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from koala_bench.cli.app import app
from koala_bench.cli.options import (
    AttentionName,
    DataDir,
    Device,
    Dtype,
    EngineName,
    Layers,
    Limit,
    MaxNewTokens,
    Methods,
    Out,
    PresetName,
    Questions,
    Quick,
    Repeats,
    Seed,
    Settings,
    TargetName,
    Temperature,
    TopK,
    TopP,
    Tree,
    method_names,
    output_folder,
    preset_of,
    typed_command,
)
from koala_bench.common.progress import say
from koala_bench.errors import KoalaBenchError
from koala_bench.presets import toml_value, usual_methods, with_heads


@app.command("new-head")
def new_head(
    name: Annotated[str, typer.Argument(help="Of the head and its package, e.g. my_head.")],
    out: Annotated[Path | None, typer.Option("--out", help="Folder to be made; ./NAME by default.")] = None,
) -> None:
    """Write a working example package of a draft head: one file with the head, its entry point, a test and a README.

    Example: `koala-bench new-head my_head`.
    """
    from koala_bench.contract.scaffold import new_head

    files = new_head(name, out)
    for path in files:
        print(path)
    say(f"Next: pip install -e {files[0].parent}, then koala-bench check-head {name}.")


@app.command("check-head")
def check_head(
    name: Annotated[str, typer.Argument(help="An installed head, package.module:Class, or ./file.py:Class.")],
    option: Annotated[
        list[str] | None, typer.Option("--option", help="Option of the head, key=value; may be repeated.")
    ] = None,
) -> None:
    """Check a draft head against the contract on tiny random targets; takes seconds. Exit code 0 or 1.

    Example: `koala-bench check-head ./my_head.py:MyHead --option layers=2`.
    """
    from transformers.utils.logging import disable_progress_bar

    from koala_bench.contract import check_head

    disable_progress_bar()  # one for every tiny target
    results = check_head(name, _options(option or []))
    for result in results:
        print(result)
    raise typer.Exit(1 if any(result.outcome == "failed" for result in results) else 0)


def _options(assignments: list[str]) -> dict[str, Any]:
    options = {}
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not equals or not key.strip().isidentifier():
            raise KoalaBenchError(
                f"'{assignment}' is not an option of a head.", "Write --option key=value, e.g. --option layers=2."
            )
        options[key.strip()] = toml_value(text.strip())
    return options


@app.command()
def compare(
    methods: Methods = None,
    head: Annotated[
        list[str] | None,
        typer.Option(
            "--head", help="Method to judge; may be repeated. All that are not in the paper's table by default."
        ),
    ] = None,
    records: Annotated[
        Path | None, typer.Option("--records", help="Judge a run record that is there, and train nothing.")
    ] = None,
    preset: PresetName = "tiny",
    target: TargetName = None,
    device: Device = None,
    dtype: Dtype = None,
    seed: Seed = None,
    layers: Layers = None,
    tree: Tree = None,
    max_new_tokens: MaxNewTokens = None,
    questions: Questions = None,
    limit: Limit = None,
    repeats: Repeats = None,
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    data_dir: DataDir = None,
    attention: AttentionName = None,
    engine: EngineName = None,
    out: Out = None,
    quick: Quick = False,
    settings: Settings = None,
) -> None:
    """Train and measure a head of your own beside the baselines on the same data, and judge it against each.

    A method may be an installed head, package.module:Class or ./file.py:Class, each also with +koala. Interrupted, the
    same command goes on.

    Example: `koala-bench compare --methods vanilla,medusa,eagle,my_head,my_head+koala`.
    """
    from koala_bench.common.bundled import RECIPES
    from koala_bench.common.files import write_text
    from koala_bench.gate.comparison import compare_heads, refuse_changed_code, verdict_table
    from koala_bench.records.reading import read_run
    from koala_bench.results.tables.published import read_table_spec

    asked = [name.strip() for name in methods.split(",") if name.strip()] if methods is not None else None
    paper = read_table_spec(RECIPES / "table1.toml").methods
    if records is not None:
        run = read_run(records)
        text = verdict_table(run, compare_heads(run, _judged(asked or list(run.methods), head, paper), asked))
        if out is not None:
            write_text(out / "verdict.md", text)
        print(text)
        return

    chosen = preset_of(
        preset,
        quick,
        settings,
        target=target,
        device=device,
        dtype=dtype,
        seed=seed,
        layers=layers,
        tree=tree,
        max_new_tokens=max_new_tokens,
        questions=questions,
        limit=limit,
        repeats=repeats,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        attention=attention,
        engine=engine,
    )
    asked = asked if asked is not None else usual_methods(chosen)
    chosen, called = with_heads(chosen, asked, layers, tree)
    names = method_names(chosen, ",".join(called))
    given = dict(zip(asked, called, strict=True))
    judged = _judged(names, [given.get(name, name) for name in head or ()], paper)
    folder = output_folder(out, "compare", chosen, quick)
    say(
        f"Comparing {', '.join(judged)} with the preset '{preset}' in"
        f" {folder}{' (quick: sizes are reduced, the numbers mean little)' if quick else ''}."
    )
    from koala_bench.dialogues.questions import find_questions, read_questions
    from koala_bench.evaluation.loop import evaluate
    from koala_bench.interop.answers import write_fastchat_answers
    from koala_bench.training.experiment import load_preset_target, train_heads

    read_questions(
        find_questions(chosen.evaluation.questions, data_dir)[1]
    )  # a wrong --questions should not wait for the training
    loaded, template = load_preset_target(chosen)
    note_code = refuse_changed_code(chosen, names, folder)
    train_heads(chosen, names, loaded, template, folder / "heads", note_code)
    run = evaluate(
        chosen, preset, names, loaded, template, folder / "heads", folder / "records.jsonl", data_dir, typed_command()
    )
    write_fastchat_answers(run, folder / "answers")
    text = verdict_table(run, compare_heads(run, judged, names))
    write_text(folder / "verdict.md", text)
    print(text)
    say(f"Wrote verdict.md and records.jsonl to {folder}.")


def _judged(methods: list[str], heads: list[str] | None, paper: tuple[str, ...]) -> list[str]:
    """The methods that are compared with the others: the chosen ones, or those that are not the paper's."""
    if unknown := [head for head in heads or () if head not in methods]:
        raise KoalaBenchError(f"--head {unknown[0]} is not one of --methods.", f"They are {', '.join(methods)}.")
    judged = heads or [name for name in methods if name not in paper]
    if not judged:
        raise KoalaBenchError(
            "Every one of the methods is in the paper's table.",
            "Name a head of your own in --methods, or choose one with --head.",
        )
    if "vanilla" in judged:
        raise KoalaBenchError("Vanilla decoding is what the others are compared with.", "Choose another --head.")
    return judged
