"""Stored states that several trainings share, or that one command writes and another trains from."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from koala_bench.common.process_group import ProcessGroup
from koala_bench.dialogues.streams import Stream
from koala_bench.engine.loading.outer_layers import OuterLayers, fingerprint_of
from koala_bench.engine.target import Target
from koala_bench.errors import KoalaBenchError
from koala_bench.presets import Preset
from koala_bench.training.held_out import HeldOut
from koala_bench.training.loop import build_head
from koala_bench.training.states import StoredStates, layers_of, open_states, read_states_manifest, write_states


def features_read(preset: Preset, names: Sequence[str], target: Target) -> list[tuple[int, ...]]:
    """Which hidden states the heads of methods read.

    Args:
        names: of methods with a head to train.
    """
    heads: list[Any] = [build_head(target, preset.method(name), preset.training.seed) for name in names]
    return [head.features for head in heads]


def stored_states_of(
    target: Target,
    stream: Stream,
    held_out: HeldOut,
    features: Sequence[tuple[int, ...]],
    folder: Path,
    group: ProcessGroup,
) -> StoredStates:
    """The states of a training's dialogues, read from the folder; those missing are computed into it first.

    A target without its inner layers cannot compute any. Raises KoalaBenchError where states cannot be written, or
    cannot be computed and are missing or unusable.
    """
    dialogues, layers = [*stream.dialogues, *held_out.dialogues], layers_of(features)
    fingerprint = fingerprint_of(target)
    if isinstance(target, OuterLayers):
        return open_states(dialogues, stream.max_tokens, layers, folder, fingerprint)
    return write_states(target, dialogues, stream.max_tokens, layers, folder, fingerprint, group)


def target_of_states(folder: Path) -> dict[str, str]:
    """Hashes of the target whose states lie in a folder. Raises KoalaBenchError where there are none, or they are not
    complete."""
    found = (read_states_manifest(folder) or {}).get("target")
    if not isinstance(found, dict):
        raise KoalaBenchError(
            f"There are no finished states in {folder}.", "Write them first: koala-bench states --out DIR."
        )
    return {str(key): str(value) for key, value in found.items()}
