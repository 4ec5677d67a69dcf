"""Objectives without parameters that compare what a head predicts with the target's distribution, row by row."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from heads.common.losses import slices
from koala_bench.errors import KoalaBenchError
from koala_bench.heads import FeatureBatch, HeadLoss, Prediction, TargetSpec

Measure = Callable[[torch.Tensor, torch.Tensor, slice], tuple[torch.Tensor, ...]]


def means_over_rows(
    batch: FeatureBatch, prediction: Prediction, spec: TargetSpec, measure: Measure
) -> tuple[torch.Tensor, ...]:
    """Means over the rows of a prediction, each []. Rows whose likeliest token the head cannot draft count as zero, see
    ``SoftLabels``.

    Costs one distribution [rows, drafted] of the head; slices bound what is held at a time, and each is computed again
    for its gradients where there are several.

    Args:
        measure: from the target's probabilities and the head's log-probabilities, [rows, drafted] each, and which
            of the prediction's rows they are, values [rows].
    """
    labels = batch.soft_labels(spec)

    def piece(rows: slice) -> tuple[torch.Tensor, ...]:
        places = prediction.rows[rows] + prediction.depth
        known = (labels.likeliest[places] >= 0).float()
        log_q = torch.log_softmax(prediction.drafted(rows, spec).float(), dim=-1)
        return tuple((each * known).sum() for each in measure(labels.probabilities[places], log_q, rows))

    parts = slices(len(prediction.rows), spec.drafted)
    sums = [piece(rows) if len(parts) == 1 else checkpoint(piece, rows, use_reentrant=False) for rows in parts]
    return tuple(torch.stack(each).sum() / len(prediction.rows) for each in zip(*sums, strict=True))


class Comparison(nn.Module, ABC):
    """An objective with nothing of its own to train; what it measures of a prediction, subclasses say in ``compare``.

    Args:
        weight: of the term. Zero leaves the supervised run as it is, bit for bit.

    Raises:
        KoalaBenchError: the weight is negative or not finite.
    """

    learns = False
    soft_labels = True
    replaces = False

    def __init__(self, spec: TargetSpec, weight: float) -> None:
        super().__init__()
        if not 0 <= weight < math.inf:
            raise KoalaBenchError(f"The weight of the objective is {weight}.", "It must be finite and not negative.")
        self.weight, self._spec = weight, spec

    @abstractmethod
    def compare(self, batch: FeatureBatch, prediction: Prediction) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """What to minimise of a prediction that has rows, [], and values for the log."""

    def active(self, progress: float) -> bool:
        """Whether there is a term: from the first step on, unless its weight is zero."""
        return self.weight > 0

    def learn(self, batch: FeatureBatch, found: HeadLoss, progress: float, share: float) -> dict[str, torch.Tensor]:
        """Nothing: the objective has no parameters."""
        return {}

    def step(self, progress: float) -> None:
        """Nothing to move."""

    def term(
        self, batch: FeatureBatch, found: HeadLoss, progress: float, agree: Callable[..., Any]
    ) -> tuple[torch.Tensor | None, dict[str, torch.Tensor]]:
        """The weighted sum over depths, where it replaces the token loss with that one's weights; and the means over
        depths of what is logged. Raises KoalaBenchError where the head reports no predictions."""
        predictions = [each for each in found.predictions if len(each.rows)]
        if not predictions:
            if found.predictions:
                return None, {}
            raise KoalaBenchError(
                "This head reports no predictions.",
                "The objective needs HeadLoss.predictions; train the head without it.",
            )
        values, logs = zip(*(self.compare(batch, each) for each in predictions), strict=True)
        weights = [each.weight if self.replaces else 1.0 for each in predictions]
        total = torch.stack([weight * value for weight, value in zip(weights, values, strict=True)]).sum()
        return self.weight * total, {name: torch.stack([log[name] for log in logs]).mean() for name in logs[0]}
