"""From a batch of tokens to a batch of features: the one pass of the target that all heads share."""

from __future__ import annotations

from collections.abc import Iterable

from koala_bench.dialogues.streams import TokenBatch
from koala_bench.engine.target import Target
from koala_bench.heads import FeatureBatch


def features_of(target: Target, batch: TokenBatch, features: tuple[int, ...], seed: int) -> FeatureBatch:
    """The target's states for a batch.

    Args:
        features: which hidden states, as ``DraftHead.features``.
        seed: of whatever noise heads add at this step.
    """
    ids = batch.ids.to(target.device)
    hidden = target.states(ids, features).clone()  # a clone outside of inference mode may enter autograd
    return FeatureBatch(
        ids, batch.supervised.to(target.device), hidden, seed, target.output, batch.lengths.to(target.device)
    )


def features_of_each(
    target: Target, batch: TokenBatch, features: Iterable[tuple[int, ...]], seed: int
) -> dict[tuple[int, ...], FeatureBatch]:
    """The same batch as heads with different ``features`` want it, from one pass of the target.

    Args:
        features: of each head.
        seed: as for ``features_of``.
    """
    wanted = dict.fromkeys(features)
    if len(wanted) == 1:
        (only,) = wanted
        return {only: features_of(target, batch, only, seed)}
    every = (*sorted({index for each in wanted for index in each} - {-1}), -1)
    whole = features_of(target, batch, every, seed)
    return {each: whole.reading([every.index(index) for index in each]) for each in wanted}
