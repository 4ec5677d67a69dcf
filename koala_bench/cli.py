"""The command line: ``koala-bench COMMAND``. Thin, and torch is imported inside the commands, so that --help is instant."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from koala_bench.errors import KoalaBenchError
from koala_bench.presets import Preset, load_preset, preset_names
from koala_bench.progress import say

if TYPE_CHECKING:
    from koala_bench.records import Run

app = typer.Typer(add_completion=True, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode="markdown", help=__doc__)

_TABLES = Path(__file__).parent.parent / "reproduce"
_INTERRUPTED = 130  # typer turns Ctrl-C into this exit code

PresetName = Annotated[str, typer.Option("--preset", help=f"{', '.join(preset_names())}, or a .toml file.")]
TargetName = Annotated[str | None, typer.Option("--target", help="Hub id or folder of any causal LM, in place of the preset's.")]
Device = Annotated[str | None, typer.Option("--device", help="auto, cpu, cuda or cuda:N.")]
Dtype = Annotated[str | None, typer.Option("--dtype", help="auto, float64, float32, bfloat16 or float16.")]
Seed = Annotated[int | None, typer.Option("--seed", min=0, max=2**31 - 1, help="Of the heads' weights, the order of the data and the noise.")]
Methods = Annotated[str | None, typer.Option("--methods", help="Comma-separated, e.g. vanilla,eagle,eagle+koala; all of the preset by default.")]
Layers = Annotated[int | None, typer.Option("--layers", min=1, help="K, the number of layers of every head.")]
Tree = Annotated[str | None, typer.Option("--tree", help="Draft tree of every method: a name such as medusa/mc_sim_7b_63, chain-4, 4x2x1, or a .json file.")]
MaxNewTokens = Annotated[int | None, typer.Option("--max-new-tokens", min=1, help="Length limit of an answer.")]
Questions = Annotated[str | None, typer.Option("--questions", help="bundled, a name such as mt_bench in the data folder, or a file in MT-bench's format.")]
Limit = Annotated[int | None, typer.Option("--limit", min=1, help="Only the first questions of each category.")]
Repeats = Annotated[int | None, typer.Option("--repeats", min=1, help="How often every question is answered.")]
DataDir = Annotated[Path | None, typer.Option("--data-dir", help="Folder of question files; KOALA_BENCH_DATA by default.")]
Out = Annotated[Path | None, typer.Option("--out", help="Folder for heads, records and tables.")]
Settings = Annotated[list[str] | None, typer.Option("--set", help="Override of the preset, section.key=value; may be repeated.")]
Quick = Annotated[bool, typer.Option("--quick", help="The same at reduced size: shows that everything works, no more.")]
AttentionName = Annotated[str | None, typer.Option("--attention", help="sdpa or eager.")]


def _preset(
    name: str,
    quick: bool,
    settings: list[str] | None,
    *,
    target: str | None = None,
    device: str | None = None,
    dtype: str | None = None,
    seed: int | None = None,
    layers: int | None = None,
    tree: str | None = None,
    max_new_tokens: int | None = None,
    questions: str | None = None,
    limit: int | None = None,
    repeats: int | None = None,
    attention: str | None = None,
) -> Preset:
    """The preset with the options' values in place; an option wins over --quick, --set over both."""
    direct = {
        "target.name": target,
        "target.device": device,
        "target.dtype": dtype,
        "target.attention": attention,
        "training.seed": seed,
        "evaluation.max_new_tokens": max_new_tokens,
        "evaluation.questions": questions,
        "evaluation.limit": limit,
        "evaluation.repeats": repeats,
    }
    overrides = [f"{key}={value}" if isinstance(value, int) else f"{key}={_quoted(value)}" for key, value in direct.items() if value is not None]
    methods = load_preset(name).methods if layers is not None or tree is not None else {}
    for method in methods:
        overrides += [f'methods."{method}".layers={layers}'] if layers is not None else []
        overrides += [f'methods."{method}".tree={_quoted(tree)}'] if tree is not None else []
    return load_preset(name, [*overrides, *(settings or [])], quick)


def _quoted(text: str) -> str:
    # A JSON string is a TOML string too, unless it spells characters beyond U+FFFF as two.
    return json.dumps(text, ensure_ascii=False)


def _method_names(preset: Preset, methods: str | None) -> list[str]:
    names = [name.strip() for name in methods.split(",") if name.strip()] if methods is not None else ["vanilla", *preset.methods]
    if not names:
        raise KoalaBenchError(f"--methods '{methods}' names no method.", f"The preset has: {', '.join(['vanilla', *preset.methods])}.")
    if len(set(names)) != len(names):
        raise KoalaBenchError(f"--methods {methods} names a method twice.", "Name each once.")
    for name in names:
        if name != "vanilla":
            preset.method(name)
    return names


def _folder(out: Path | None, kind: str, preset: Preset, quick: bool) -> Path:
    if out is not None:
        return out
    target = Path(preset.target.name).name
    questions = "" if preset.evaluation.questions == load_preset_questions(preset) else f"-{Path(preset.evaluation.questions).stem}"
    return Path("results") / "runs" / f"{kind}-{target}{questions}{'-quick' if quick else ''}"


def load_preset_questions(preset: Preset) -> str:
    """Question set that needs no mention in a folder's name."""
    return "bundled" if preset.target.name == "tiny" else "mt_bench"


@app.command()
def pretrain(
    out: Annotated[Path, typer.Option("--out", help="Folder for the finished target; its checkpoint lies in OUT/work.")],
    device: Device = None,
    steps: Annotated[int, typer.Option("--steps", min=1, help="Steps of 8,192 tokens. May be changed during the first half of a run.")] = 2000,
    seed: Seed = None,
    start: Annotated[Path | None, typer.Option("--start", help="An earlier target to begin with: its weights, shape and tokenizer.")] = None,
    compiled: Annotated[bool, typer.Option("--compile", help="Train through torch.compile; 1.3 times as fast on two CPU cores, needs a C++ compiler.")] = False,
) -> None:
    """Train a small target on the documentation of the installed packages.

    Example: `koala-bench pretrain --out my-target --steps 2000`. Interrupted, the same command goes on.
    """
    from koala_bench.corpus import cached_corpus
    from koala_bench.files import make_folder
    from koala_bench.pretraining import PretrainOptions, pretrain
    from koala_bench.target import pick_device

    options = PretrainOptions(steps=steps, **({} if seed is None else {"seed": seed}))
    where = pick_device("auto" if device is None else device)
    make_folder(out)  # reading the corpus takes a minute; a wrong --out should not wait for it
    pretrain(cached_corpus(), options, out, where, start=start, compiled=compiled)
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
    from koala_bench.experiment import load_preset_target, train_heads

    chosen = _preset(preset, quick, settings, target=target, device=device, dtype=dtype, seed=seed, layers=layers, attention=attention)
    names = _method_names(chosen, methods)
    folder = _folder(out, "table1", chosen, quick)
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
    data_dir: DataDir = None,
    attention: AttentionName = None,
    heads: Annotated[Path | None, typer.Option("--heads", help="Folder of trained heads; OUT/heads by default.")] = None,
    out: Out = None,
    quick: Quick = False,
    settings: Settings = None,
) -> None:
    """Decode questions with trained heads and with vanilla decoding, interleaved, into one run record.

    Example: `koala-bench evaluate --methods vanilla,eagle --questions mt_bench --data-dir data`.
    """
    chosen = _preset(
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
        attention=attention,
    )
    folder = _folder(out, "table1", chosen, quick)
    _evaluate(chosen, preset, _method_names(chosen, methods), heads or folder / "heads", folder / "records.jsonl", data_dir)
    print(folder / "records.jsonl")


def _evaluate(chosen: Preset, name: str, methods: list[str], heads: Path, record: Path, data_dir: Path | None) -> Run:
    from koala_bench.evaluation import evaluate
    from koala_bench.experiment import load_preset_target
    from koala_bench.interop.answers import write_fastchat_answers

    loaded, template = load_preset_target(chosen)
    run = evaluate(chosen, name, methods, loaded, template, heads, record, data_dir, _command())
    write_fastchat_answers(run, record.parent / "answers")
    return run


@app.command()
def table(
    records: Annotated[list[Path], typer.Argument(help="Run records, one per target.")],
    spec: Annotated[Path, typer.Option("--spec", help="What the table shows.")] = _TABLES / "table1.toml",
    paper: Annotated[Path, typer.Option("--paper", help="Published values.")] = _TABLES / "paper.toml",
    out: Annotated[Path | None, typer.Option("--out", help="Folder; the first record's by default.")] = None,
) -> None:
    """Make Table 1 (Markdown, LaTeX, CSV) and its figure from run records; needs no model.

    Example: `koala-bench table results/runs/table1-tiny/records.jsonl`.
    """
    from koala_bench.records import read_runs

    for path in _table1(read_runs(records), spec, paper, out or records[0].parent):
        print(path)


def _table1(runs: list[Run], spec: Path, paper: Path, out: Path) -> list[Path]:
    from koala_bench.figures import write_figure1
    from koala_bench.published import read_paper, read_table_spec
    from koala_bench.tables import write_table1

    wanted = read_table_spec(spec)
    # A head of the user's own is not named in reproduce/; it stands below the paper's methods.
    others = [name for run in runs for name in run.methods if name not in wanted.methods]
    wanted = wanted.model_copy(update={"methods": (*wanted.methods, *dict.fromkeys(others))})
    for run in runs:  # before anything is written: a table without its figure helps nobody
        if set(run.methods) <= {"vanilla"}:
            raise KoalaBenchError(f"{run.path} has no method beside vanilla.", "Evaluate with more --methods.")
    return [*write_table1(runs, out, wanted, read_paper(paper)), *write_figure1(runs, out, wanted.methods)]


@app.command()
def reproduce(
    what: Annotated[str, typer.Argument(help="table1.")],
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
    data_dir: DataDir = None,
    attention: AttentionName = None,
    out: Out = None,
    quick: Quick = False,
    settings: Settings = None,
) -> None:
    """Train, decode and write a table in one go; whatever is done already is reused, and said so.

    Example: `koala-bench reproduce table1 --preset vicuna-7b --data-dir data`.
    """
    import resource
    import time

    started = time.perf_counter()
    if what != "table1":
        raise KoalaBenchError(f"There is no recipe '{what}'.", "Use table1.")
    chosen = _preset(
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
        attention=attention,
    )
    names = _method_names(chosen, methods)
    if names == ["vanilla"]:
        raise KoalaBenchError("There is nothing to compare with vanilla decoding.", "Name another method in --methods.")
    folder = _folder(out, what, chosen, quick)
    say(f"Table 1 with the preset '{preset}' into {folder}{' (quick: sizes are reduced, the numbers mean little)' if quick else ''}.")
    from koala_bench.experiment import load_preset_target, train_heads
    from koala_bench.questions import find_questions, read_questions

    read_questions(find_questions(chosen.evaluation.questions, data_dir)[1])  # a wrong --questions should not wait for the training
    loaded, template = load_preset_target(chosen)
    train_heads(chosen, names, loaded, template, folder / "heads")
    del loaded
    run = _evaluate(chosen, preset, names, folder / "heads", folder / "records.jsonl", data_dir)
    written = _table1([run], _TABLES / f"{what}.toml", _TABLES / "paper.toml", folder)
    print((folder / "table1.md").read_text(encoding="utf-8"))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # KiB on Linux
    minutes = (time.perf_counter() - started) / 60
    say(f"Wrote {', '.join(path.name for path in written)} and records.jsonl to {folder}; {minutes:.1f} minutes, at most {peak:.1f} GiB of memory.")


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
    from koala_bench.datasets import DATASETS, fetch, status

    folder = data_dir or (Path(os.environ["KOALA_BENCH_DATA"]) if os.environ.get("KOALA_BENCH_DATA") else None)
    if names or everything:
        for path in fetch([dataset.name for dataset in DATASETS] if everything else list(names or ()), folder):
            print(path)
        return
    states = {found.dataset.name: found.state for found in status(folder)} if folder is not None else {}
    for dataset in DATASETS:
        print(f"{dataset.name:<14}{states.get(dataset.name, 'no data folder set'):<20}{dataset.rows:>4} rows  sha256 {dataset.sha256}")
        print(f"{'':<14}{dataset.repository}@{dataset.commit[:12]} {dataset.path}")
    if folder is None:
        print("Set --data-dir or KOALA_BENCH_DATA to the folder that holds them.")


@app.command()
def benchmark(
    preset: PresetName = "tiny",
    target: TargetName = None,
    device: Device = None,
    dtype: Dtype = None,
    tokens: Annotated[int, typer.Option("--tokens", min=2, help="Length of every answer.")] = 96,
    rounds: Annotated[int, typer.Option("--rounds", min=1, help="How often every prompt is timed.")] = 3,
) -> None:
    """Time vanilla decoding against transformers' generate, interleaved on eight prompts.

    Example: `koala-bench benchmark --rounds 5`.
    """
    from koala_bench.benchmark import compare_with_generate
    from koala_bench.dialogues import encode_prompt
    from koala_bench.evaluation import select_questions
    from koala_bench.experiment import load_preset_target
    from koala_bench.questions import bundled_questions, read_questions

    loaded, template = load_preset_target(_preset(preset, False, None, target=target, device=device, dtype=dtype))
    assert loaded.tokenizer is not None
    prompts = [encode_prompt(template, loaded.tokenizer, question.turns[:1]) for question in select_questions(read_questions(bundled_questions()), 1)]
    found = compare_with_generate(loaded, prompts, tokens, rounds)
    print(f"vanilla   {found.vanilla_tokens_per_s:8.1f} tokens/s")
    print(f"generate  {found.generate_tokens_per_s:8.1f} tokens/s")
    print(f"vanilla is {found.ratio:.2f}x as fast as generate (quartiles {found.lowest:.2f} to {found.highest:.2f})")
    print(f"{found.equal} of {found.answers} answers have the same tokens")


def _command() -> list[str]:
    """The command as a user would type it again, without this machine's paths."""
    return [Path(sys.argv[0]).name, *sys.argv[1:]]


def main() -> None:
    """Entry point: errors of the user end in one line and exit code 2."""
    # Loading weights draws a bar of its own for every tensor; ours say more.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        app()
    except KoalaBenchError as error:
        print(f"koala-bench: {error}", file=sys.stderr)
        sys.exit(2)
    except SystemExit as end:
        if end.code == _INTERRUPTED:
            print("koala-bench: stopped; the same command goes on where it was.", file=sys.stderr)
        raise


if __name__ == "__main__":
    main()
