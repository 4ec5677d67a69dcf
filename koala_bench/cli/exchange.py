"""Commands that read and write the heads of other systems: import, export."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from koala_bench.cli.app import EXCHANGE, command
from koala_bench.cli.options import TARGET, Shared, argument, option
from koala_bench.common.progress import log_line
from koala_bench.errors import KoalaBenchError

if TYPE_CHECKING:
    from koala_bench.engine.target import Target


def _target_of(options: Shared) -> Target:
    """The target of the command, with the engine eager: nothing is decoded, so no pass need be recorded."""
    from koala_bench.training.experiment import load_preset_target

    preset = options.resolved()
    eager = preset.target.model_copy(update={"engine": "eager"})
    return load_preset_target(preset.model_copy(update={"target": eager}))[0]


@command(EXCHANGE, *TARGET, name="import")
def import_(
    options: Shared,
    folder: Annotated[Path, argument("A downloaded Medusa, Hydra, EAGLE-1 or EAGLE-3 head: its folder.")],
    out: Annotated[
        Path,
        option(
            "--out", "Folder of the head here; HEADS/medusa makes it the method medusa of `evaluate --heads HEADS`."
        ),
    ],
) -> None:
    """Read a released Medusa, Hydra, EAGLE-1 or EAGLE-3 head strictly: whatever is missing, too many or made for
    another target is named.

    Example: `koala-bench import medusa-vicuna-7b-v1.3 --preset vicuna-7b --out released/medusa`, then
    `koala-bench evaluate --preset vicuna-7b --methods vanilla,medusa --heads released`.
    """
    from koala_bench.interop.layouts import import_head

    target = _target_of(options)
    imported = import_head(folder, target, out)
    values = (
        f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in imported.options.items()
    )
    log_line(f"A head '{imported.head}': {', '.join(values)}.")
    for note in imported.notes:
        log_line(note)
    print(out)


@command(EXCHANGE, *TARGET)
def export(
    options: Shared,
    head: Annotated[Path, argument("Folder of a trained head, such as results/runs/table1-tiny/heads/eagle.")],
    out: Annotated[Path, option("--out", "Folder to write.")],
    layout: Annotated[str, option("--layout", "official, vllm, sglang or koala-bench.")] = "official",
    dtype: Annotated[
        str | None,
        option("--dtype", "Dtype of the tensors: float32, bfloat16 or float16; by default as they are stored."),
    ] = None,
) -> None:
    """Write a trained Medusa, Hydra, EAGLE-1 or EAGLE-3 head as the official code reads it, or one of Medusa, EAGLE-1
    or EAGLE-3 as vLLM does, or of EAGLE-3 as SGLang does. Layout koala-bench copies any head, with a card.

    Example: `koala-bench export heads/medusa --layout vllm --dtype float16 --out medusa-for-vllm`.
    """
    import torch

    from koala_bench.engine.devices import pick_dtype
    from koala_bench.interop.layouts import LAYOUTS, export_head
    from koala_bench.training.shipping import ship_head

    if layout == "koala-bench":
        written = ship_head(head, out, None if dtype is None else pick_dtype(dtype, torch.device("cpu")))
    elif layout in LAYOUTS:
        target = _target_of(options)
        written = export_head(head, target, layout, out, None if dtype is None else pick_dtype(dtype, target.device))
    else:
        raise KoalaBenchError(f"There is no layout '{layout}'.", f"Use {', '.join(LAYOUTS)} or koala-bench.")
    for path in written:
        print(path)
