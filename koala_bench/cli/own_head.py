"""Commands for a head of one's own: new-head, check-head, compare, heads, tune-tree, sweep."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from koala_bench.cli.app import OWN_HEAD, START, command
from koala_bench.cli.options import (
    EVERYTHING,
    PASS,
    Heads,
    LogWith,
    Shared,
    argument,
    head_options,
    method_names,
    option,
    split_names,
    typed_command,
)
from koala_bench.common.progress import log_line
from koala_bench.errors import KoalaBenchError
from koala_bench.presets import Preset, usual_methods, with_heads


@command(START, name="new-head")
def new_head(
    name: Annotated[str, argument("Of the head and its package, e.g. my_head.")],
    out: Annotated[Path | None, option("--out", "Folder to be made; ./NAME by default.")] = None,
) -> None:
    """Write a working example package of a draft head: one file with the head, its entry point, a test and a README.

    Example: `koala-bench new-head my_head`.
    """
    from koala_bench.contract.scaffold import new_head

    files = new_head(name, out)
    for path in files:
        print(path)
    log_line(f"Next: pip install -e {files[0].parent}, then koala-bench check-head {name}.")


@command(START, name="check-head")
def check_head(
    name: Annotated[str, argument("An installed head, package.module:Class, or ./file.py:Class.")],
    option: Annotated[list[str] | None, option("--option", "Option of the head, key=value; may be repeated.")] = None,
) -> None:
    """Check a draft head against the contract on tiny random targets; takes seconds. Exit code 0 or 1.

    Example: `koala-bench check-head ./my_head.py:MyHead --option layers=2`.
    """
    from transformers.utils.logging import disable_progress_bar

    from koala_bench.contract import check_head

    disable_progress_bar()  # one for every tiny target
    results = check_head(name, head_options(option or []))
    for result in results:
        print(result)
    raise typer.Exit(1 if any(result.outcome == "failed" for result in results) else 0)


@command(START, *EVERYTHING)
def compare(
    options: Shared,
    head: Annotated[
        list[str] | None,
        option("--head", "Method to judge; may be repeated. All that are not in the paper's table by default."),
    ] = None,
    records: Annotated[Path | None, option("--records", "Judge an existing run record, without training.")] = None,
    log_with: LogWith = None,
) -> None:
    """Train and measure a head of your own beside the baselines on the same data, and judge it against each.

    A method may be an installed head, package.module:Class or ./file.py:Class, each also with +koala. Interrupted, the
    same command goes on.

    Example: `koala-bench compare --methods vanilla,medusa,eagle,my_head,my_head+koala`.
    """
    from koala_bench.gate.comparison import judge_record

    named = split_names(options.methods) if options.methods is not None else None
    if records is not None:
        print(judge_record(records, named, head, options.out))
        return
    chosen, names, compared = _with_own_heads(options, named, head)
    folder = options.folder("compare", chosen)
    reduced = " (quick: sizes are reduced, the numbers mean little)" if options.quick else ""
    log_line(f"Comparing {', '.join(compared)} with the preset '{options.preset}' in {folder}{reduced}.")
    from koala_bench.runs.compare import compare

    print(compare(chosen, options.preset, names, compared, folder, options.data_dir, typed_command(), log_with))
    log_line(f"Wrote verdict.md and records.jsonl to {folder}.")


def _with_own_heads(
    options: Shared, named: list[str] | None, heads: list[str] | None
) -> tuple[Preset, list[str], list[str]]:
    """The preset with the missing methods added, the names of all methods, and of those to compare with the others."""
    from koala_bench.gate.comparison import methods_to_compare

    chosen = options.resolved()
    named = named if named is not None else usual_methods(chosen)
    chosen, called = with_heads(chosen, named, options.layers, options.tree)
    names = method_names(chosen, ",".join(called))
    in_preset = dict(zip(named, called, strict=True))
    return chosen, names, methods_to_compare(names, [in_preset.get(name, name) for name in heads or ()])


@command(OWN_HEAD)
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


@command(OWN_HEAD, *PASS, name="tune-tree")
def tune_tree(
    options: Shared,
    method: Annotated[str, argument("A method with a trained head, such as eagle.")],
    out: Annotated[
        Path, option("--out", "Write the tree to this .json file; use it with --tree, or --set methods.NAME.tree=FILE.")
    ],
    heads: Heads = None,
    prompts: Annotated[
        int, option("--prompts", "Held-out prompts; two thirds are searched on, the others decoded in the end.", min=2)
    ] = 120,
    tokens: Annotated[int, option("--tokens", "Length limit of an answer.", min=4)] = 64,
    most: Annotated[int, option("--nodes", "Nodes of the largest tree, the root included.", min=2, max=256)] = 16,
    depth: Annotated[int, option("--depth", "Levels of the deepest tree.", min=1, max=16)] = 5,
    widest: Annotated[int, option("--ranks", "Candidates of a node to consider.", min=1, max=256)] = 6,
) -> None:
    """Find the draft tree from which most tokens a second are expected on this machine, and compare it with the
    default one.

    Step times are measured, acceptance by rank and depth is counted along the target's own answers to held-out prompts,
    and the tree is found by dynamic programming (Sequoia, arXiv 2402.12374) and greedily (Medusa's way).

    Example: `koala-bench tune-tree eagle --out eagle-tree.json`.
    """
    from koala_bench.common.files import write_text
    from koala_bench.dialogues.conversations import held_out_prompts
    from koala_bench.evaluation.methods import load_methods
    from koala_bench.training.experiment import load_preset_target
    from koala_bench.trees.tuning import in_words, tune

    if out.suffix != ".json":
        raise KoalaBenchError(f"{out} is no name for a tree.", "Let --out end in .json, so that --tree can read it.")
    chosen = options.resolved()
    chosen.method(method)
    target, template = load_preset_target(chosen)
    ready = load_methods(chosen, ["vanilla", method], target, options.heads(heads, chosen))[1]
    room = target.longest - max(most, ready.template.nodes)
    prompt_ids = held_out_prompts(
        target, template, chosen.data.source, prompts, min(chosen.data.max_tokens, room) - tokens
    )
    if len(prompt_ids) < 2:
        raise KoalaBenchError(
            "The data has fewer than two held-out prompts that leave room for an answer.",
            "Lower --tokens, or give other data.source.",
        )
    with target.computing():
        found = tune(target, ready.head, ready.template, prompt_ids, tokens, most, depth, widest)
    tuned = next(each for each in found if each.template.name == "tuned")
    write_text(out, json.dumps([list(path) for path in tuned.template.paths]) + "\n")
    print(in_words(method, found))


@command(OWN_HEAD, "out", "settings")
def sweep(
    options: Shared,
    grid: Annotated[Path | None, argument("The grid, a TOML file such as reproduce/sweeps/eagle.toml.")] = None,
    records: Annotated[
        Path | None, option("--records", "Only write the table of this sweep.jsonl again, without training.")
    ] = None,
) -> None:
    """Try settings of a method over several seeds, and say which helps on held-out prompts, with intervals.

    Interrupted, the same command goes on. The table is exploration; the grid's confirm_seeds give the result.

    Example: `koala-bench sweep reproduce/sweeps/eagle.toml --out results/runs/sweep-eagle`.
    """
    from koala_bench.sweeps.grid import read_grid
    from koala_bench.sweeps.results import markdown, read_sweep, write_pages

    if (grid is None) == (records is None):
        raise KoalaBenchError(
            "A sweep needs a grid to run, or --records to read, not both.", "Give e.g. reproduce/sweeps/eagle.toml."
        )
    if records is not None:
        log = read_sweep(records)
        if options.out is not None:
            write_pages(log, options.out)
        print(markdown(log))
        return
    assert grid is not None
    folder = options.out or Path("results") / "runs" / f"sweep-{grid.stem}"
    wanted = read_grid(grid)
    from koala_bench.sweeps.loop import run_sweep

    log_line(f"Sweep of {wanted.method} against {wanted.baseline} in {folder}.")
    print(markdown(run_sweep(wanted, options.settings or [], folder)))
    log_line(f"Wrote sweep.md, sweep.csv and sweep.jsonl to {folder}.")
