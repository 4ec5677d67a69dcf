"""From a batch of tokens to a batch of features: the one pass of the target that all heads share."""

from __future__ import annotations

from koala_bench.heads import FeatureBatch
from koala_bench.streams import TokenBatch
from koala_bench.target import Target


def features_of(target: Target, batch: TokenBatch, features: tuple[int, ...], seed: int) -> FeatureBatch:
    """The target's states for a batch.

    Args:
        features: which hidden states, as ``DraftHead.features``.
        seed: of whatever noise heads add at this step.
    """
    ids = batch.ids.to(target.device)
    hidden = target.states(ids, features).clone()  # a clone outside of inference mode may enter autograd
    return FeatureBatch(ids, batch.supervised.to(target.device), hidden, seed, target.output, batch.lengths.to(target.device))
