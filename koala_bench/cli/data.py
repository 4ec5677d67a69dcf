"""Commands for questions and training text: data, distill."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

from koala_bench.cli.app import REPRODUCE, command
from koala_bench.cli.options import PASS, Shared, argument, option
from koala_bench.errors import KoalaBenchError


def named_folder(given: Path | None) -> Path | None:
    """The folder of --data-dir, or the one that the environment names; None without."""
    named = os.environ.get("KOALA_BENCH_DATA")
    return given or (Path(named) if named else None)


@command(REPRODUCE, "data_dir")
def data(
    options: Shared,
    names: Annotated[list[str] | None, argument("Files to download; none lists them.")] = None,
    everything: Annotated[bool, option("--all", "Download every file that can be downloaded.")] = False,
) -> None:
    """List the public question files with their sources, or download and verify them.

    Example: `koala-bench data mt_bench --data-dir data`.
    """
    from koala_bench.dialogues.downloads import DATASETS, fetch, status

    folder = named_folder(options.data_dir)
    if names or everything:
        every = [dataset.name for dataset in DATASETS if dataset.by_hand is None]
        for path in fetch(every if everything else list(names or ()), folder):
            print(path)
        return
    states = {found.dataset.name: found.state for found in status(folder)} if folder is not None else {}
    for dataset in DATASETS:
        print(
            f"{dataset.name:<14}{states.get(dataset.name, 'no data folder set'):<20}{dataset.rows:>4} rows  sha256"
            f" {dataset.sha256 or 'unpinned'}"
        )
        print(f"{'':<14}{dataset.repository}@{dataset.commit[:12]} {dataset.path}")
    if folder is None:
        print("Set --data-dir or KOALA_BENCH_DATA to the folder that holds them.")


@command(REPRODUCE, *PASS, "data_dir", "seed")
def distill(
    options: Shared,
    out: Annotated[Path, option("--out", "File of conversations to write: .jsonl, or .jsonl.gz.")],
    source: Annotated[
        str,
        option(
            "--source",
            "Source of the questions: 'documentation' of installed packages, a file of conversations, or 'self'.",
        ),
    ] = "documentation",
    train: Annotated[int, option("--limit", "Number of dialogues to answer.", min=1)] = 4000,
    held_out: Annotated[int, option("--held-out", "Number of held-out dialogues to answer.", min=1)] = 64,
    max_new_tokens: Annotated[int, option("--max-new-tokens", "Length limit of an answer.", min=1)] = 256,
    rows: Annotated[
        int | None, option("--rows", "Prompts answered at once; by default 32, with 'self' 64.", min=1)
    ] = None,
    turns: Annotated[
        int | None,
        option(
            "--turns",
            "Questions of a dialogue that are answered at most; a long one keeps the others of its batch waiting.",
            min=1,
        ),
    ] = None,
) -> None:
    """Let the target answer the questions of conversations itself, greedily: training data for its heads.

    Example: `koala-bench distill --out answers.jsonl`, then `koala-bench train --set data.source=answers.jsonl`.
    With `--source self` the target writes the questions too, sampled from its own chat template, two turns unless
    --turns says otherwise; none of them repeats a question file of the data folder. Interrupted, the same command goes
    on; OUT.parts can be trained on meanwhile. Several processes (`torchrun --nproc-per-node 2 -m koala_bench.cli
    distill ...`) share out the dialogues.
    """
    from koala_bench.dialogues.distilling.answers import DistillOptions, distill
    from koala_bench.dialogues.distilling.files import SELF, distill_self
    from koala_bench.dialogues.distilling.questions import evaluation_files
    from koala_bench.dialogues.distilling.sampling import SelfOptions
    from koala_bench.pretraining.corpus import read_source
    from koala_bench.training.experiment import load_preset_target

    if source != SELF and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise KoalaBenchError(
            f"distill --source {source} runs in one process.", "Start it without a launcher, or use --source self."
        )
    chosen = options.resolved()
    target, template = load_preset_target(chosen)
    if source == SELF:
        alone = SelfOptions(chosen.training.seed, turns or 2, max_new_tokens, rows or 64)
        evaluation = evaluation_files(named_folder(options.data_dir))
        print(distill_self(target, template, out, alone, train, held_out, evaluation))
        return
    wanted = DistillOptions(train, held_out, max_new_tokens, rows or 32, turns)
    print(distill(target, template, read_source(source, template), out, wanted))
