"""The two steps of a training whose target is too large to lie beside its heads: its states once, then the heads."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from koala_bench.common.files import make_folder
from koala_bench.common.process_group import find_process_group
from koala_bench.dialogues.conversations import read_conversations
from koala_bench.engine.loading.outer_layers import load_outer_layers
from koala_bench.engine.loading.spread import load_spread
from koala_bench.engine.loading.targets import load_target
from koala_bench.errors import KoalaBenchError
from koala_bench.presets import Preset
from koala_bench.training.experiment import load_preset_target, train_heads, trained_methods, training_streams
from koala_bench.training.shared_states import features_read, stored_states_of, target_of_states
from koala_bench.training.states import StoredStates


def write_training_states(
    preset: Preset, methods: Sequence[str], folder: Path, device_map: str | None = None
) -> StoredStates:
    """Write the states of the training dialogues and of what is held out, as the heads of ``methods`` read them;
    processes that were started together share the work, and an interrupted command goes on.

    Args:
        device_map: of transformers, to spread the target over cards; on one device if None.

    Raises:
        KoalaBenchError: a mistake in the data or the methods, or the disk has no room.
    """
    load = load_target if device_map is None else partial(load_spread, device_map=device_map)
    target, template = load_preset_target(preset, load)
    features = features_read(preset, trained_methods(preset, methods, target), target)
    if not features:
        raise KoalaBenchError("None of these methods has a head to train.", "Name others in --methods.")
    conversations = read_conversations(preset.data.source, template)
    stream, _, held_out, _ = training_streams(preset, conversations, target, template)
    make_folder(folder)
    return stored_states_of(target, stream, held_out, features, folder, find_process_group(target.device))


def train_from_states(
    preset: Preset, methods: Sequence[str], states: Path, heads: Path, log_with: str | None = None
) -> None:
    """Train heads beside the target's embedding and output layer alone; what is held out is watched by its loss."""
    preset = preset.model_copy(update={"training": preset.training.model_copy(update={"stored_states": True})})
    target, template = load_preset_target(preset, partial(load_outer_layers, known=target_of_states(states)))
    train_heads(preset, methods, target, template, heads, states=states, log_with=log_with)
