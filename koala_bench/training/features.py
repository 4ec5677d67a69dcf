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
    return features_of_each(target, batch, (features,), seed, stored)[features]


def features_of_each(
    target: Target, batch: TokenBatch, features: Iterable[tuple[int, ...]], seed: int,
    stored: StoredStates | None = None,
) -> dict[tuple[int, ...], FeatureBatch]:  # fmt: skip
    """The same batch as heads with different ``features`` want it, from one pass of the target.

    Args:
        features: of each head.
        seed, stored: as for ``features_of``.
    """
    wanted = list(dict.fromkeys(features))
    every = stored.layers if stored is not None else wanted[0] if len(wanted) == 1 else layers_of(wanted)
    ids, lengths, supervised = (each.to(target.device) for each in (batch.ids, batch.lengths, batch.supervised))
    likeliest = normalizers = None
    if stored is not None:
        hidden, likeliest, normalizers = stored.read(batch, target.device, target.dtype)
    else:
        hidden = target.states(ids, every).clone()  # a clone outside of inference mode may enter autograd
    whole = FeatureBatch(
        ids, supervised, hidden, seed, target.output, lengths,
        known_likeliest=likeliest, known_normalizers=normalizers,
    )  # fmt: skip
    if wanted == [every]:
        return {every: whole}
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
