"""Commands that train heads and decode with them: reproduce, evaluate, train, states."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

from koala_bench.cli.app import REPRODUCE, START, command
from koala_bench.cli.options import (
    EVERYTHING,
    TRAINING,
    DrawSeed,
    Heads,
    KeepStates,
    LogWith,
    Processes,
    Shared,
    argument,
    method_names,
    option,
    typed_command,
)
from koala_bench.errors import KoalaBenchError
from koala_bench.presets import Preset


@command(START, *EVERYTHING)
def reproduce(
    options: Shared,
    what: Annotated[str, argument("table1, table2, table3, objectives, figures, cost, leaderboard or all.")],
    log_with: LogWith = None,
    processes: Processes = 1,
    keep_states: KeepStates = False,
    heads: Heads = None,
) -> None:
    """Train, decode and write tables and figures in one go; finished steps are reused, with a message.

    With --heads nothing is trained. With --layers, recipes that compare several depths (table3, objectives, figures,
    all) change only the methods of several layers.

    Example: `koala-bench reproduce table1 --preset vicuna-7b --data-dir data`.
    """
    from koala_bench.results.recipes import TITLES, layers_of_variants, plan

    if what not in TITLES:
        raise KoalaBenchError(f"There is no recipe '{what}'.", f"Use {', '.join(TITLES)}.")
    if options.layers is not None and what not in ("table1", "table2", "leaderboard"):
        variants = layers_of_variants(options.preset, options.layers)
        options = replace(options, layers=None, settings=[*variants, *(options.settings or [])])
    chosen = options.resolved()
    _refuse_keeping_nothing(chosen, keep_states)
    names = method_names(chosen, options.methods)
    if names == ["vanilla"]:
        raise KoalaBenchError("There is nothing to compare with vanilla decoding.", "Name another method in --methods.")
    folder = options.folder(what, chosen)
    methods = names if options.methods is not None else None
    given, seeds = options.questions is not None, options.seed is None and not options.quick
    planned = plan(
        what, chosen, options.preset, folder, options.data_dir, methods=methods, questions_given=given, seeds=seeds
    )
    from koala_bench.runs.reproduce import reproduce

    written = reproduce(
        planned,
        chosen,
        f"{TITLES[what]} with the preset '{options.preset}' into {folder}",
        options.preset,
        folder,
        data_dir=options.data_dir,
        command=typed_command(),
        quick=options.quick,
        report=what == "all",
        log_with=log_with,
        processes=processes,
        keep_states=keep_states,
        heads=None if heads is None else options.heads(heads, chosen),
    )
    for path in (path for path in written if path.suffix == ".md"):
        print(path.read_text(encoding="utf-8"))


@command(START, *(name for name in EVERYTHING if name != "seed"))
def evaluate(options: Shared, seed: DrawSeed = None, heads: Heads = None) -> None:
    """Decode questions with trained heads and with vanilla decoding, interleaved, into one run record.

    Example: `koala-bench evaluate --methods vanilla,eagle --questions mt_bench --data-dir data`.
    """
    from koala_bench.runs.evaluate import evaluate

    if seed is not None:
        options = replace(options, settings=[f"evaluation.seed={seed}", *(options.settings or [])])
    chosen = options.resolved()
    names = method_names(chosen, options.methods)
    folder = options.folder("table1", chosen)
    record = folder / "records.jsonl"
    trained = folder / "heads" if heads is None else options.heads(heads, chosen)
    evaluate(chosen, options.preset, names, trained, record, options.data_dir, typed_command())
    print(record)


@command(REPRODUCE, *TRAINING)
def train(
    options: Shared,
    states: Annotated[
        Path | None, option("--states", "Folder of `koala-bench states`: the target's layers are not loaded.")
    ] = None,
    keep_states: KeepStates = False,
    log_with: LogWith = None,
) -> None:
    """Train draft heads together on identical data; finished ones are reused, interrupted ones go on.

    Example: `koala-bench train --methods eagle,eagle+koala --set training.steps=200`.
    """
    from koala_bench.runs.states import train_from_states
    from koala_bench.training.experiment import STATES, load_preset_target, train_heads

    chosen = options.resolved()
    names = method_names(chosen, options.methods)
    heads = options.folder("table1", chosen) / "heads"
    if states is not None:
        train_from_states(chosen, names, states, heads, log_with)
    else:
        _refuse_keeping_nothing(chosen, keep_states)
        target, template = load_preset_target(chosen)
        kept = heads / STATES if keep_states else None
        train_heads(chosen, names, target, template, heads, states=kept, log_with=log_with)
    print(heads)


@command(REPRODUCE, *TRAINING)
def states(
    options: Shared,
    device_map: Annotated[
        str | None, option("--device-map", "auto spreads the target over all cards; one process a machine then.")
    ] = None,
) -> None:
    """Write the target's states of the training dialogues, to train heads from with `koala-bench train --states`.

    Processes that are started together share the work; an interrupted command goes on.

    Example: `koala-bench states --preset vicuna-33b --device-map auto --out states`.
    """
    from koala_bench.runs.states import write_training_states
    from koala_bench.training.experiment import STATES

    chosen = options.resolved()
    names = method_names(chosen, options.methods)
    folder = options.out or options.folder("table1", chosen) / STATES
    write_training_states(chosen, names, folder, device_map)
    print(folder)


def _refuse_keeping_nothing(preset: Preset, keep: bool) -> None:
    if keep and not preset.training.stored_states:
        raise KoalaBenchError("--keep-states, and this preset stores none.", "Add --set training.stored_states=true.")
