"""What ``plan`` prints: the needs of a run and its expected hours, in Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from koala_bench.common.markdown import table
from koala_bench.common.progress import in_time, log_line
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
from koala_bench.results.tables.rendering import NOTHING
from koala_bench.training.experiment import load_preset_target

_GAP = "\n\n"
# What least_hours counts.
_WITHOUT = (
    "Counted are two operations a parameter and token of the target, six of what is trained, two a weight of the output"
    " layer for the distributions that heads are taught by, and one reading of the target's weights a step; no"
    " drafting."
)


def outlook(
    preset: Preset, methods: Sequence[str], data_dir: Path | None, out: Path, seconds: float
) -> tuple[str, bool]:
    """The report of a run that would write to ``out``, and whether it can begin here; ``seconds`` go into measuring."""
    place = find_target(preset)
    turns = turns_of(preset, data_dir)
    models = find_models(preset, methods)
    needs = needs_of(preset, methods, place, turns, models)
    loaded = load_preset_target(preset) if place.at_hand and not _lacks_gpu(preset) else None
    tokens = tokens_to_store(preset, *loaded) if loaded and preset.training.stored_states else None
    needs = replace(needs, disk=needs.disk + (tokens or 0) * needs.state_bytes)
    missing = missing_for(preset, place, needs, turns, out, models)
    hours, basis = _hours(preset, methods, loaded, models, needs, seconds, tokens)
    turns_in_words = "160 turns, as MT-bench has" if turns is None else f"{turns:,} turns"
    download = f"; {gibibytes(needs.download)} to download" if needs.download else ""
    training, first, second = (in_time(3600 * each) for each in (hours.training, *hours.decoding))
    heads = table(("Head", "Trained parameters (M)", "Discriminator (M)"), (_row(head, needs) for head in needs.heads))
    states = f"{_of_states(needs, tokens)}\n" if preset.training.stored_states else ""
    listed = "\n".join(f"- {each}" for each in missing)
    text = f"""# What {short_name(preset.target.name)} takes with {", ".join(methods)}

Target: {needs.target_parameters / 1e6:,.2f} M parameters; {place.words}.

{heads}

{reads_in_words(draft_reads(preset, methods, place.config))}

- Memory: {gibibytes(needs.training_memory)} for training all heads together (target, weights, gradients, moments, \
states of a step), beside the activations of one head at a time; {gibibytes(needs.decoding_memory)} for decoding.
- Disk: {gibibytes(needs.disk)} at most, for checkpoints (while one is written the last two are there), heads and \
records{download}.
- Tokens: at most {needs.training_tokens:,} to train on, once for all heads; at most {needs.answer_tokens:,} decoded \
by each method ({turns_in_words}).
- Time: {training} of training; {first} of decoding if no draft is accepted, {second} at an acceptance \
length of 2. {basis}
{states}
{f"**Missing here**{_GAP}{listed}" if missing else "Nothing is missing: it can run here."}"""
    return text, not missing


def _lacks_gpu(preset: Preset) -> bool:
    return preset.target.device.startswith("cuda") and not torch.cuda.is_available()


def _of_states(needs: Needs, tokens: int | None) -> str:
    each = f"{needs.state_bytes / 1024:,.1f} KiB a token"
    alone = f"Training from them with `train --states` takes {gibibytes(needs.ends_memory)} of memory."
    if tokens is None:
        unknown = "of the dialogues on disk, which cannot be counted before target and data are here"
        return f"- States: {each} {unknown}. {alone}"
    return (
        f"- States: {gibibytes(tokens * needs.state_bytes)} of the disk until the last training ends, {each} of about"
        f" {tokens:,}; the target reads them once, whatever epochs, seeds and variants. {alone}"
    )


def _row(head: HeadNeeds, needs: Needs) -> tuple[str, str, str]:
    if head.shares:
        return head.name, f"that of {head.shares}", NOTHING
    if head.model:
        count = needs.models.get(head.model)
        size = f"{count / 1e6:,.2f}" if count else "an unknown number"
        return head.name, f"none; {head.model} has {size}", NOTHING
    counts = (head.parameters, head.discriminator)
    trained, discriminator = (f"{count / 1e6:,.2f}" if count else NOTHING for count in counts)
    return head.name, trained, discriminator


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
        return least_hours(limits, preset, methods, needs, tokens), f"{which} {_WITHOUT}"
    if loaded is not None:
        absent = {head.name for head in needs.heads if head.model and not models[head.model].at_hand}
        lacking = absent & set(methods)
        log_line(f"Measuring for about {seconds:.0f} seconds ...")
        target = loaded[0]
        pace = measure_pace(preset, [name for name in methods if name not in lacking], target, seconds)
        without = f" Without {', '.join(sorted(lacking))}, whose model is not here." if lacking else ""
        kind = str(target.dtype).removeprefix("torch.")
        said = f"From steps measured here, on {target.device.type} in {kind}.{without}"
        return hours_at(pace, preset, needs, tokens), said
    device = pick_device(wanted)
    log_line(f"Measuring the {device.type} for about {min(seconds, 10.0):.0f} seconds ...")
    dtype = pick_dtype(preset.target.dtype, device)
    limits = measure_limits(device, dtype, min(seconds, 10.0))
    which = (
        f"this {'GPU' if device.type == 'cuda' else 'CPU'} copies {limits.bytes_per_s / 1e9:,.0f} GB/s and multiplies"
        f" {limits.flop_per_s / 1e9:,.1f} GFLOP/s in {str(dtype).removeprefix('torch.')}"
    )
    said = f"At least, by arithmetic: {which}; the weights are not here to be measured. {_WITHOUT}"
    return least_hours(limits, preset, methods, needs, tokens), said
