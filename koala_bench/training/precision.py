"""Default precision of training: the one in which this machine multiplies faster."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Literal

import torch

from koala_bench.common.process_group import find_process_group
from koala_bench.presets import Preset
from koala_bench.training.checkpoints import read_manifest, state_identity

Precision = Literal["no", "bf16"]
# How much faster a product has to be: what a step does besides gains nothing from it.
_WORTH = 1.2
_ROWS, _WIDE, _NARROW, _RUNS = 512, 1024, 512, 9
_FINE_S = 1e-4  # Windows counts a thread's time in steps of 16 ms


def resolve(name: str, device: torch.device) -> Precision:
    """``no`` and ``bf16`` unchanged; for ``auto`` the faster one on this machine, measured once per process."""
    if name != "auto":
        return "bf16" if name == "bf16" else "no"
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "no"
    return "bf16" if _gain_on_cpu() >= _WORTH else "no"


def settle_precision(
    preset: Preset, names: Sequence[str], out: Path, device: torch.device, beside: Sequence[Path] = ()
) -> Preset:
    """The preset with a precision in place of ``auto``: that of the finished heads or of the interrupted training in
    ``out``, or else of those beside, which will be compared with them; or else the faster one on this machine.

    So a head is trained in one precision from start to end, recorded in its manifest, and finished heads are reused on
    any machine. All processes of a group use the first one's measurement.

    Args:
        names: of the methods that are trained together.
        beside: folders of the other trainings of the run.
    """
    if preset.training.precision != "auto":
        return preset
    found = next((known for folder in (out, *beside) if (known := _known(folder, names))), None)
    if found is None:
        prefers_bf16 = find_process_group(device).agree(lambda: float(resolve("auto", device) == "bf16"))
        found = "bf16" if prefers_bf16 else "no"
    return preset.model_copy(update={"training": preset.training.model_copy(update={"precision": found})})


def _known(folder: Path, names: Sequence[str]) -> str | None:
    """The precision of the heads in a folder; None if there are none or they differ."""
    manifests = [read_manifest(folder / name) for name in names]
    if any(manifest is None for manifest in manifests):
        manifests = [state_identity(folder / "checkpoint.pt")]
    found = {(manifest or {}).get("training", {}).get("precision") for manifest in manifests}
    (only,) = found if len(found) == 1 else (None,)
    return only if only in ("no", "bf16") else None


@cache
def _gain_on_cpu() -> float:
    """Processor time of a matrix product in float32, as a multiple of that in bfloat16 autocast, casts included.

    On one thread, whose own time a neighbour on the machine does not lengthen; of several runs in turn the fastest of
    each kind count.
    """
    draw = torch.Generator().manual_seed(0)
    weight, states = torch.randn(_WIDE, _NARROW, generator=draw), torch.randn(_ROWS, _NARROW, generator=draw)
    best = {False: float("inf"), True: float("inf")}
    clock = time.thread_time if time.get_clock_info("thread_time").resolution < _FINE_S else time.perf_counter
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for _ in range(_RUNS):
            for half in (False, True):
                before = clock()
                with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=half):
                    torch.nn.functional.linear(states, weight)
                best[half] = min(best[half], clock() - before)
    finally:
        torch.set_num_threads(threads)
    return best[False] / best[True]
