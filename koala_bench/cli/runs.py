"""Commands that train and decode: pretrain, train, evaluate, reproduce."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

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
    Stop,
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
from koala_bench.presets import Preset

if TYPE_CHECKING:
    from koala_bench.records.reading import Run


@app.command()
def pretrain(
    out: Annotated[
        Path, typer.Option("--out", help="Folder for the finished target; its checkpoint lies in OUT/work.")
    ],
    source: Annotated[
        str, typer.Option("--source", help="Text: 'documentation', or a file or folder of conversations.")
    ] = "documentation",
    device: Device = None,
    steps: Annotated[
        int,
        typer.Option(
            "--steps", min=1, help="Steps of 8,192 tokens (step_tokens). May be changed during the first half of a run."
        ),
    ] = 2000,
    seed: Seed = None,
    start: Annotated[
        Path | None, typer.Option("--start", help="An earlier target to begin with: its weights, shape and tokenizer.")
    ] = None,
    rate: Annotated[
        float,
        typer.Option(
            "--rate", min=1e-3, max=10, help="Factor on the learning rates; 0.5 suits a run that goes on from --start."
        ),
    ] = 1.0,
    unlikelihood: Annotated[
        float,
        typer.Option(
            "--unlikelihood",
            min=0,
            help="Weight of the unlikelihood of what the target's own answers repeat; 1 ends most loops.",
        ),
    ] = 0.0,
    layers: Annotated[
        int | None,
        typer.Option("--layers", min=1, max=128, help="Decoder layers; 14 by default, 1 or 2 for a draft model."),
    ] = None,
    imitate: Annotated[
        str | None,
        typer.Option(
            "--imitate",
            help=(
                "Train a draft model for this target, a bundled one or a folder: with its tokenizer, on its"
                " distributions."
            ),
        ),
    ] = None,
    answers: Annotated[
        str | None,
        typer.Option(
            "--answers",
            help="With --imitate: 'bundled' or a file of `distill`, half of the text while the learning rate falls.",
        ),
    ] = None,
    compiled: Annotated[
        bool,
        typer.Option(
            "--compile", help="Train through torch.compile; 1.3 times as fast on two CPU cores, needs a C++ compiler."
        ),
    ] = False,
    checkpoint_every: Annotated[
        int, typer.Option("--checkpoint-every", min=1, help="Steps between two checkpoints.")
    ] = 50,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            help=(
                "Shape and training otherwise than usual, name=value, such as width=512 or vocabulary=8192; may be"
                " repeated."
            ),
        ),
    ] = None,
) -> None:
    """Train a small target on the documentation of the installed packages or on conversations, or with --imitate a
    draft model for one.

    Example: `koala-bench pretrain --out my-target --steps 2000`. Interrupted, the same command goes on.
    """
    from koala_bench.common.files import make_folder
    from koala_bench.dialogues.conversations import corpus_of
    from koala_bench.engine.target import pick_device
    from koala_bench.pretraining.imitation import load_imitated
    from koala_bench.pretraining.loop import pretrain
    from koala_bench.pretraining.options import SHAPE, PretrainOptions, with_settings

    settled = {setting.partition("=")[0] for setting in settings or ()}
    if start is not None and (layers is not None or settled & set(SHAPE)):
        raise KoalaBenchError(
            "--start brings its own shape.",
            "Leave out --layers." if layers is not None else f"Leave out --set {min(settled & set(SHAPE))}.",
        )
    if imitate is not None and settled & {"vocabulary", "positions"}:
        raise KoalaBenchError(
            "A draft model has its target's vocabulary and positions.",
            f"Leave out --set {min(settled & {'vocabulary', 'positions'})}.",
        )
    if imitate is not None and unlikelihood:
        raise KoalaBenchError("A draft model learns from its target not to repeat itself.", "Leave out --unlikelihood.")
    if answers is not None and imitate is None:
        raise KoalaBenchError("--answers are those of a target.", "Name it with --imitate.")
    given = {name: value for name, value in (("seed", seed), ("layers", layers)) if value is not None}
    options = with_settings(PretrainOptions(steps=steps, rate=rate, unlikelihood=unlikelihood, **given), settings or ())
    where = pick_device("auto" if device is None else device)
    if start is not None and not (start / "pretraining.json").is_file():
        raise KoalaBenchError(
            f"{start} is no target of `koala-bench pretrain`.", "Give a folder that command has written."
        )
    imitated = None if imitate is None else load_imitated(imitate, answers, where)
    corpus = None if source == "documentation" else corpus_of(source)
    make_folder(out)  # reading the documentation takes a minute; a wrong --out should not wait for it
    pretrain(
        corpus or corpus_of(source),
        options,
        out,
        where,
        checkpoint_every=checkpoint_every,
        start=start,
        compiled=compiled,
        imitate=imitated,
    )
    print(out)


@app.command()
def train(
    preset: PresetName = "tiny",
    target: TargetName = None,
    device: Device = None,
    dtype: Dtype = None,
    seed: Seed = None,
    methods: Methods = None,
    layers: Layers = None,
    attention: AttentionName = None,
    out: Out = None,
    quick: Quick = False,
    settings: Settings = None,
) -> None:
    """Train draft heads together on identical data; finished ones are reused, interrupted ones go on.

    Example: `koala-bench train --methods eagle,eagle+koala --set training.steps=200`.
    """
    from koala_bench.training.experiment import load_preset_target, train_heads

    chosen = preset_of(
        preset,
        quick,
        settings,
        target=target,
        device=device,
        dtype=dtype,
        seed=seed,
        layers=layers,
        attention=attention,
    )
    names = method_names(chosen, methods)
    folder = output_folder(out, "table1", chosen, quick)
    loaded, template = load_preset_target(chosen)
    train_heads(chosen, names, loaded, template, folder / "heads")
    print(folder / "heads")


@app.command()
def evaluate(
    preset: PresetName = "tiny",
    target: TargetName = None,
    device: Device = None,
    dtype: Dtype = None,
    seed: Seed = None,
    methods: Methods = None,
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
    stop: Stop = None,
    heads: Annotated[
        Path | None, typer.Option("--heads", help="Folder of trained heads; OUT/heads by default.")
    ] = None,
    out: Out = None,
    quick: Quick = False,
    settings: Settings = None,
) -> None:
    """Decode questions with trained heads and with vanilla decoding, interleaved, into one run record.

    Example: `koala-bench evaluate --methods vanilla,eagle --questions mt_bench --data-dir data`.
    """
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
        stop=stop,
    )
    folder = output_folder(out, "table1", chosen, quick)
    _evaluate(
        chosen, preset, method_names(chosen, methods), heads or folder / "heads", folder / "records.jsonl", data_dir
    )
    print(folder / "records.jsonl")


def _evaluate(chosen: Preset, name: str, methods: list[str], heads: Path, record: Path, data_dir: Path | None) -> Run:
    from koala_bench.evaluation.loop import evaluate
    from koala_bench.interop.answers import write_fastchat_answers
    from koala_bench.training.experiment import load_preset_target

    loaded, template = load_preset_target(chosen)
    run = evaluate(chosen, name, methods, loaded, template, heads, record, data_dir, typed_command())
    write_fastchat_answers(run, record.parent / "answers")
    return run


@app.command()
def reproduce(
    what: Annotated[str, typer.Argument(help="table1, table2, table3, figures, leaderboard or all.")],
    preset: PresetName = "tiny",
    target: TargetName = None,
    device: Device = None,
    dtype: Dtype = None,
    seed: Seed = None,
    methods: Methods = None,
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
    stop: Stop = None,
    out: Out = None,
    quick: Quick = False,
    settings: Settings = None,
) -> None:
    """Train, decode and write tables and figures in one go; whatever is done already is reused, and said so.

    With --layers, only the methods that have several layers get others where originals stand beside them (table3,
    figures, all).

    Example: `koala-bench reproduce table1 --preset vicuna-7b --data-dir data`.
    """
    import resource
    import time

    from koala_bench.results.making import make, sources_in
    from koala_bench.results.recipes import RECIPE_NAMES, layers_of_variants, plan

    started = time.perf_counter()
    if what not in RECIPE_NAMES:
        raise KoalaBenchError(f"There is no recipe '{what}'.", f"Use {', '.join(RECIPE_NAMES)}.")
    by_part = what not in ("table1", "table2", "leaderboard")
    chosen = preset_of(
        preset,
        quick,
        [*(layers_of_variants(preset, layers) if by_part and layers is not None else []), *(settings or [])],
        target=target,
        device=device,
        dtype=dtype,
        seed=seed,
        layers=None if by_part else layers,
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
        stop=stop,
    )
    names = method_names(chosen, methods)
    if names == ["vanilla"]:
        raise KoalaBenchError("There is nothing to compare with vanilla decoding.", "Name another method in --methods.")
    folder = output_folder(out, what, chosen, quick)
    titles = {"figures": "All figures", "leaderboard": "The leaderboard", "all": "All tables and figures"}
    title = titles.get(what, f"Table {what[-1]}")
    say(
        f"{title} with the preset '{preset}' into"
        f" {folder}{' (quick: sizes are reduced, the numbers mean little)' if quick else ''}."
    )
    planned = plan(
        what,
        chosen,
        preset,
        folder,
        data_dir,
        methods=names if methods is not None else None,
        asked=questions is not None,
        seeds=seed is None and not quick,
    )
    for line in planned.remarks:
        say(line)
    from koala_bench.dialogues.questions import find_questions, read_questions
    from koala_bench.evaluation.loop import evaluate
    from koala_bench.interop.answers import write_fastchat_answers
    from koala_bench.results.report import write_report
    from koala_bench.training.experiment import load_preset_target, train_heads

    for job in planned.jobs:  # a wrong --questions should not wait for the training
        read_questions(find_questions(job.preset.evaluation.questions, data_dir)[1])
    for heads, (settled, trained) in planned.trainings.items():
        loaded, template = load_preset_target(settled)
        train_heads(settled, trained, loaded, template, heads)
        del loaded
    loaded, template = load_preset_target(chosen)
    for job in planned.jobs:
        run = evaluate(
            job.preset, preset, job.methods, loaded, template, job.heads, job.record, data_dir, typed_command()
        )
        write_fastchat_answers(run, job.record.parent / "answers")
    sources = sources_in(folder)
    if missing := [name for name in planned.products if not sources.of(name)]:
        say(f"Not made: {', '.join(missing)}, for {folder} has no log of the training (its heads come from elsewhere).")
    written = [path for name in planned.products if name not in missing for path in make(name, sources, folder)]
    if what == "all":
        written.append(write_report(folder, folder / "report.html", data_dir))
    for path in (path for path in written if path.suffix == ".md"):
        print(path.read_text(encoding="utf-8"))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # KiB on Linux
    minutes = (time.perf_counter() - started) / 60
    names_of = (
        f"{', '.join(path.name for path in written)} and"
        f" {', '.join(str(job.record.relative_to(folder)) for job in planned.jobs)}"
    )
    say(f"Wrote {names_of} to {folder}; {minutes:.1f} minutes, at most {peak:.1f} GiB of memory.")
