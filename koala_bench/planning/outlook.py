"""What ``plan`` prints: the needs of a run and its expected hours, in Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from koala_bench.common.progress import say
from koala_bench.dialogues.encoding import ChatTemplate
from koala_bench.engine.devices import pick_device, pick_dtype
from koala_bench.engine.target import Target
from koala_bench.planning.calibration import (
    FLOP_SHARE,
    NAMED_GPU,
    Hours,
    hours_at,
    least_hours,
    limits_of_named_gpu,
    measure_limits,
    measure_pace,
)
from koala_bench.planning.draft_reads import draft_reads, reads_in_words
from koala_bench.planning.requirements import (
    HeadNeeds,
    Needs,
    Place,
    dtype_of,
    find_models,
    find_target,
    gibibytes,
    missing_for,
    needs_of,
    turns_of,
)
from koala_bench.planning.stored import tokens_to_store
from koala_bench.presets import Preset
from koala_bench.records.reading import short_name
from koala_bench.training.experiment import load_preset_target

# What least_hours counts.
_WITHOUT = (
    "Counted are two operations a parameter and token of the target, six of what is trained, and one reading of the"
    " target's weights a step; no drafting."
)


def outlook(
    preset: Preset, methods: Sequence[str], data_dir: Path | None, out: Path, seconds: float
) -> tuple[str, bool]:
    """The report, and whether the run can begin here.

    Args:
        out: where the run would write.
        seconds: to spend on measuring.

    Raises:
        KoalaBenchError: a mistake in the preset or methods, or the target is unknown.
    """
    place = find_target(preset)
    turns = turns_of(preset, data_dir)
    models = find_models(preset, methods)
    needs = needs_of(preset, methods, place, turns, models)
    loaded = load_preset_target(preset) if place.at_hand and not _lacks_gpu(preset) else None
    tokens = tokens_to_store(preset, *loaded) if loaded and preset.training.stored_states else None
    needs = replace(needs, disk=needs.disk + (tokens or 0) * needs.state_bytes)
    missing = missing_for(preset, place, needs, turns, out, models)
    hours, basis = _hours(preset, methods, loaded, models, needs, seconds, tokens)
    lines = [
        f"# What {short_name(preset.target.name)} takes with {', '.join(methods)}",
        "",
        f"Target: {needs.target_parameters / 1e6:,.2f} M parameters; {place.words}.",
        "",
    ]
    lines += ["| Head | Trained parameters (M) | Discriminator (M) |", "| :-- | --: | --: |"]
    lines += [_row(head, needs) for head in needs.heads]
    lines += ["", reads_in_words(draft_reads(preset, methods, place.config))]
    asked = "160 turns, as MT-bench has" if turns is None else f"{turns:,} turns"
    lines += [
        "",
        (
            f"- Memory: {gibibytes(needs.training_memory)} for training all heads together (target, weights, gradients,"
            " moments, states of a step), beside the activations of one head at a time;"
            f" {gibibytes(needs.decoding_memory)} for decoding."
        ),
        (
            f"- Disk: {gibibytes(needs.disk)} at most, for checkpoints (while one is written the last two are there),"
            f" heads and records{f'; {gibibytes(needs.download)} to download' if needs.download else ''}."
        ),
        (
            f"- Tokens: at most {needs.training_tokens:,} to train on, once for all heads; at most"
            f" {needs.answer_tokens:,} decoded by each method ({asked})."
        ),
        (
            f"- Time: {_of(hours.training)} of training; {_of(hours.decoding[0])} of decoding if no draft is accepted,"
            f" {_of(hours.decoding[1])} at an acceptance length of 2. {basis}"
        ),
        "",
    ]
    if preset.training.stored_states:
        lines.insert(-1, _of_states(needs, tokens))
    if missing:
        lines += ["**Missing here**", "", *(f"- {each}" for each in missing)]
    else:
        lines += ["Nothing is missing: it can run here."]
    return "\n".join(lines), not missing


def _lacks_gpu(preset: Preset) -> bool:
    return preset.target.device.startswith("cuda") and not torch.cuda.is_available()


def _of_states(needs: Needs, tokens: int | None) -> str:
    """The line on stored states."""
    each = f"{needs.state_bytes / 1024:,.1f} KiB a token"
    alone = f"Training from them with `train --states` takes {gibibytes(needs.ends_memory)} of memory."
    if tokens is None:
        return (
            f"- States: {each} of the dialogues on disk, which cannot be counted before target and data are here."
            f" {alone}"
        )
    return (
        f"- States: {gibibytes(tokens * needs.state_bytes)} of the disk until the last training ends, {each} of about"
        f" {tokens:,}; the target reads them once, whatever epochs, seeds and variants. {alone}"
    )


def _row(head: HeadNeeds, needs: Needs) -> str:
    if head.shares:
        return f"| {head.name} | that of {head.shares} | \u2013 |"
    if head.model:
        count = needs.models.get(head.model)
        return (
            f"| {head.name} | none; {head.model} has {f'{count / 1e6:,.2f}' if count else 'an unknown number'} |"
            " \u2013 |"
        )
    counts = [f"{count / 1e6:,.2f}" if count else "\u2013" for count in (head.parameters, head.judge)]
    return f"| {head.name} | {counts[0]} | {counts[1]} |"


def _hours(
    preset: Preset,
    methods: Sequence[str],
    loaded: tuple[Target, ChatTemplate] | None,
    models: Mapping[str, Place],
    needs: Needs,
    seconds: float,
    tokens: int | None,
) -> tuple[Hours, str]:
    wanted = preset.target.device
    if _lacks_gpu(preset):
        limits = limits_of_named_gpu(dtype_of(preset))
        which = (
            f"Not measured, for there is no GPU here: at least so long on one {NAMED_GPU}, by arithmetic from its data"
            f" sheet, if all of {limits.bytes_per_s / 1e12:.1f} TB/s and {FLOP_SHARE:.0%} of"
            f" {limits.flop_per_s / FLOP_SHARE / 1e12:,.0f} TFLOP/s are got."
        )
        return least_hours(limits, preset, methods, needs), f"{which} {_WITHOUT}"
    if loaded is not None:
        lacking = {
            name
            for name in (head.name for head in needs.heads if head.model and not models[head.model].at_hand)
            if name in methods
        }
        say(f"Measuring for about {seconds:.0f} seconds ...")
        target = loaded[0]
        pace = measure_pace(preset, [name for name in methods if name not in lacking], target, seconds)
        without = f" Without {', '.join(sorted(lacking))}, whose model is not here." if lacking else ""
        return (
            hours_at(pace, preset, needs, tokens),
            (
                f"From steps measured here, on {target.device.type} in"
                f" {str(target.dtype).removeprefix('torch.')}.{without}"
            ),
        )
    device = pick_device(wanted)
    say(f"Measuring the {device.type} for about {min(seconds, 10.0):.0f} seconds ...")
    dtype = pick_dtype(preset.target.dtype, device)
    limits = measure_limits(device, dtype, min(seconds, 10.0))
    which = (
        f"this {'GPU' if device.type == 'cuda' else 'CPU'} copies {limits.bytes_per_s / 1e9:,.0f} GB/s and multiplies"
        f" {limits.flop_per_s / 1e9:,.1f} GFLOP/s in {str(dtype).removeprefix('torch.')}"
    )
    return (
        least_hours(limits, preset, methods, needs),
        f"At least, by arithmetic: {which}; the weights are not here to be measured. {_WITHOUT}",
    )


def _of(hours: float) -> str:
    if hours < 1 / 60:
        return f"{hours * 3600:,.0f} s"
    return f"{hours * 60:,.0f} min" if hours < 2 else f"{hours:,.1f} h"
