"""From a batch of tokens to features: one pass of the target that all heads share, or its stored states."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch

from koala_bench.dialogues.streams import TokenBatch
from koala_bench.engine.target import Target
from koala_bench.heads import FeatureBatch
from koala_bench.training.states import StoredStates, layers_of


def features_of(
    target: Target, batch: TokenBatch, features: tuple[int, ...], seed: int, stored: StoredStates | None = None
) -> FeatureBatch:
    """The target's states for a batch.

    Args:
        features: which hidden states, as ``DraftHead.features``.
        seed: of whatever noise heads add at this step.
        stored: where to read them from; else the target computes them.
    """
    if stored is not None:
        return features_of_each(target, batch, (features,), seed, stored)[features]
    ids = batch.ids.to(target.device)
    hidden = target.states(ids, features).clone()  # a clone outside of inference mode may enter autograd
    return FeatureBatch(
        ids, batch.supervised.to(target.device), hidden, seed, target.output, batch.lengths.to(target.device)
    )


def features_of_each(
    target: Target,
    batch: TokenBatch,
    features: Iterable[tuple[int, ...]],
    seed: int,
    stored: StoredStates | None = None,
) -> dict[tuple[int, ...], FeatureBatch]:
    """The same batch as heads with different ``features`` want it, from one pass of the target.

    Args:
        features: of each head.
        seed, stored: as for ``features_of``.
    """
    wanted = dict.fromkeys(features)
    if stored is not None:
        hidden, likeliest = stored.read(batch, target.device, target.dtype)
        ids, lengths = batch.ids.to(target.device), batch.lengths.to(target.device)
        supervised = batch.supervised.to(target.device)
        whole = FeatureBatch(ids, supervised, hidden, seed, target.output, lengths, known_likeliest=likeliest)
        return {each: whole.reading([stored.layers.index(index) for index in each]) for each in wanted}
    if len(wanted) == 1:
        (only,) = wanted
        return {only: features_of(target, batch, only, seed)}
    every = layers_of(list(wanted))
    whole = features_of(target, batch, every, seed)
    return {each: whole.reading([every.index(index) for index in each]) for each in wanted}


def in_host_memory(
    found: Mapping[tuple[int, ...], FeatureBatch], back_to: torch.device | None = None
) -> dict[tuple[int, ...], FeatureBatch]:
    """The same features with their states in the host's memory, or from there back on a device."""
    device = back_to or torch.device("cpu")
    moved = {
        id(each.whole): replace(each.whole, hidden=each.whole.hidden.to(device))
        for each in found.values()
        if each.whole
    }
    return {
        features: replace(each, hidden=each.hidden.to(device), whole=moved.get(id(each.whole)))
        for features, each in found.items()
    }
