"""The command that trains a small target or draft model: pretrain."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from koala_bench.cli.app import REPRODUCE, command
from koala_bench.cli.options import Shared, option
from koala_bench.errors import KoalaBenchError


@command(REPRODUCE, "device", "seed")
def pretrain(
    options: Shared,
    out: Annotated[Path, option("--out", "Folder for the finished target; its checkpoint lies in OUT/work.")],
    source: Annotated[
        str, option("--source", "Text: 'documentation', or a file or folder of conversations.")
    ] = "documentation",
    steps: Annotated[int, option("--steps", "Steps of 8,192 tokens (step_tokens).", min=1)] = 2000,
    start: Annotated[
        Path | None, option("--start", "An earlier target to begin with: its weights, shape and tokenizer.")
    ] = None,
    rate: Annotated[
        float,
        option("--rate", "Factor on the learning rates; 0.5 suits a run that goes on from --start.", min=1e-3, max=10),
    ] = 1.0,
    layers: Annotated[
        int | None, option("--layers", "Decoder layers; 14 by default, 1 or 2 for a draft model.", min=1, max=128)
    ] = None,
    imitate: Annotated[
        str | None,
        option(
            "--imitate",
            "Train a draft model for this target, a bundled one or a folder: with its tokenizer, on its distributions.",
        ),
    ] = None,
    answers: Annotated[
        str | None,
        option(
            "--answers",
            "With --imitate: 'bundled' or a file of `distill`, half of the text while the learning rate falls.",
        ),
    ] = None,
    settings: Annotated[
        list[str] | None,
        option(
            "--set", "Override of shape or training, name=value, such as width=512 or vocabulary=8192; may be repeated."
        ),
    ] = None,
) -> None:
    """Train a small target on the documentation of the installed packages or on conversations, or with --imitate a
    draft model for one.

    Example: `koala-bench pretrain --out my-target --steps 2000`. Interrupted, the same command goes on.
    """
    from koala_bench.common.files import make_folder
    from koala_bench.engine.devices import pick_device
    from koala_bench.pretraining.corpus import DOCUMENTATION, read_corpus
    from koala_bench.pretraining.imitation import load_imitated
    from koala_bench.pretraining.loop import pretrain
    from koala_bench.pretraining.options import SHAPE, PretrainOptions, with_settings

    named = {setting.partition("=")[0] for setting in settings or []} | ({"layers"} if layers is not None else set())
    if start is not None and (fixed := named & set(SHAPE)):
        raise KoalaBenchError("--start brings its own shape.", f"Leave out {min(fixed)}.")
    if imitate is not None and (fixed := named & {"vocabulary", "positions"}):
        raise KoalaBenchError(
            "A draft model has its target's vocabulary and positions.", f"Leave out --set {min(fixed)}."
        )
    if answers is not None and imitate is None:
        raise KoalaBenchError("--answers are those of a target.", "Name it with --imitate.")
    given = {name: value for name, value in (("seed", options.seed), ("layers", layers)) if value is not None}
    wanted = with_settings(PretrainOptions(steps=steps, rate=rate, **given), settings or [])
    where = pick_device("auto" if options.device is None else options.device)
    if start is not None and not (start / "pretraining.json").is_file():
        raise KoalaBenchError(
            f"{start} is no target of `koala-bench pretrain`.", "Give a folder that command has written."
        )
    imitated = None if imitate is None else load_imitated(imitate, answers, where)
    corpus = None if source == DOCUMENTATION else read_corpus(source)
    make_folder(out)  # reading the documentation takes half a minute; a wrong --out should not wait for it
    print(pretrain(corpus or read_corpus(source), wanted, out, where, start=start, imitate=imitated))
