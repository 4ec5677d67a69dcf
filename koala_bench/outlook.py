"""What ``plan`` prints: the needs of a run and its expected hours, in Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from koala_bench.calibration import Hours, hours_at, least_hours, measure_limits, measure_pace
from koala_bench.experiment import load_preset_target
from koala_bench.presets import Preset
from koala_bench.progress import say
from koala_bench.requirements import Needs, Place, find_target, gibibytes, missing_for, needs_of, turns_of
from koala_bench.target import pick_device, pick_dtype


def outlook(preset: Preset, methods: Sequence[str], data_dir: Path | None, out: Path, seconds: float) -> tuple[str, bool]:
    """The report, and whether the run can begin here.

    Args:
        out: where the run would write.
        seconds: to spend on measuring.

    Raises:
        KoalaBenchError: a mistake in the preset or methods, or the target is unknown.
    """
    place = find_target(preset)
    turns = turns_of(preset, data_dir)
    needs = needs_of(preset, methods, place, turns)
    missing = missing_for(preset, place, needs, turns, out)
    hours, basis = _hours(preset, methods, place, needs, seconds)
    lines = [
        f"# What {preset.target.name} takes with {', '.join(methods)}",
        "",
        f"Target: {needs.target_parameters / 1e6:,.2f} M parameters; {place.words}.",
        "",
    ]
    lines += ["| Head | Trained parameters (M) | Discriminator (M) |", "| :-- | --: | --: |"]
    for head in needs.heads:
        if head.shares:
            lines.append(f"| {head.name} | that of {head.shares} | \u2013 |")
        else:
            counts = [f"{count / 1e6:,.2f}" if count else "\u2013" for count in (head.parameters, head.judge)]
            lines.append(f"| {head.name} | {counts[0]} | {counts[1]} |")
    asked = "160 turns, as MT-bench has" if turns is None else f"{turns:,} turns"
    lines += [
        "",
        f"- Memory: {gibibytes(needs.training_memory)} for training all heads together (target, weights, gradients, moments, states of a micro-batch), "
        f"beside the activations of one head at a time; {gibibytes(needs.decoding_memory)} for decoding.",
        f"- Disk: {gibibytes(needs.disk)} for heads, checkpoint and records{f'; {gibibytes(needs.download)} to download' if needs.download else ''}.",
        f"- Tokens: at most {needs.training_tokens:,} to train on, once for all heads; at most {needs.answer_tokens:,} decoded by each method ({asked}).",
        f"- Time: {_of(hours.training)} of training; {_of(hours.decoding[0])} of decoding if no draft is accepted, {_of(hours.decoding[1])} at an acceptance "
        f"length of 2. {basis}",
        "",
    ]
    if missing:
        lines += ["**Missing here**", "", *(f"- {each}" for each in missing)]
    else:
        lines += ["Nothing is missing: it can run here."]
    return "\n".join(lines), not missing


def _hours(preset: Preset, methods: Sequence[str], place: Place, needs: Needs, seconds: float) -> tuple[Hours, str]:
    wanted = preset.target.device
    here = torch.cuda.is_available() or not wanted.startswith("cuda")
    if place.at_hand and here:
        say(f"Measuring for about {seconds:.0f} seconds ...")
        target, _ = load_preset_target(preset)
        pace = measure_pace(preset, methods, target, seconds)
        return hours_at(pace, preset, needs), f"From steps measured here, on {target.device.type} in {str(target.dtype).removeprefix('torch.')}."
    device = pick_device(wanted if here else "cpu")
    dtype = pick_dtype(preset.target.dtype if here else "float32", device)
    say(f"Measuring the {device.type} for about {min(seconds, 10.0):.0f} seconds ...")
    limits = measure_limits(device, dtype, min(seconds, 10.0))
    which = (
        f"this {'GPU' if device.type == 'cuda' else 'CPU'} copies {limits.bytes_per_s / 1e9:,.0f} GB/s and multiplies {limits.flop_per_s / 1e12:,.2f} TFLOP/s"
    )
    return least_hours(limits, preset, methods, needs), f"At least, by arithmetic: {which}; the weights are not here to be measured."


def _of(hours: float) -> str:
    if hours < 1 / 60:
        return f"{hours * 3600:,.0f} s"
    return f"{hours * 60:,.0f} min" if hours < 2 else f"{hours:,.1f} h"
