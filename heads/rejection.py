"""Objectives that lower the chance of rejection itself: LK (Samarin et al. 2026, arXiv 2602.23881) and total variation.

A drafted token is accepted with probability ``sum_v min(p(v), q(v))``, p the target's distribution and q the head's.
Both objectives need no more of a head than the predictions that its loss reports. Of a draft vocabulary p is what is
left within it, renormalised.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from heads.common.losses import slices
from koala_bench.errors import KoalaBenchError
from koala_bench.heads import FeatureBatch, HeadLoss, Prediction, TargetSpec

Kind = Literal["log", "hybrid", "variation"]
_STEEPNESS = 3.0  # of the hybrid's weight in the acceptance, as speculators' loss_functions.md has it
_LEAST = 1e-6  # acceptance below which the logarithm grows no further: a fresh head may have none at all


class Rejection(nn.Module):
    """Adds ``weight`` times a measure of the rejection to a head's supervised loss.

    Args:
        kind: ``log``, the negative logarithm of the expected acceptance; ``hybrid``, ``l KL(p, q) + (1 - l) TV(p, q)``
            with ``l = exp(-3 acceptance)``, which is KL for a head that gets little accepted and total variation later;
            ``variation``, the total variation ``1 - acceptance`` alone.
        weight: of the term. Zero leaves the supervised run as it is, bit for bit.

    Raises:
        KoalaBenchError: an unknown kind, or a weight that is negative or not finite.
    """

    learns = False  # it has nothing of its own to train
    soft_labels = True

    def __init__(self, spec: TargetSpec, kind: Kind = "log", weight: float = 1.0) -> None:
        super().__init__()
        if kind not in ("log", "hybrid", "variation"):
            raise KoalaBenchError(f"Unknown kind '{kind}'.", "Use one of log, hybrid, variation.")
        if not 0 <= weight < math.inf:
            raise KoalaBenchError(f"The weight of the rejection is {weight}.", "It must be finite and not negative.")
        self.kind, self.weight, self._spec = kind, weight, spec

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
        """The weighted measure, mean over positions and then over depths, and the expected acceptance for the log.
        Raises KoalaBenchError where the head reports no predictions."""
        predictions = [each for each in found.predictions if len(each.rows)]
        if not predictions:
            if found.predictions:
                return None, {}
            raise KoalaBenchError(
                "This head reports no predictions.",
                "The objective needs HeadLoss.predictions; train the head without it.",
            )
        measures, accepted = zip(*(self._measured(batch, each) for each in predictions), strict=True)
        return self.weight * torch.stack(measures).mean(), {"expected_acceptance": torch.stack(accepted).mean()}

    def _measured(self, batch: FeatureBatch, prediction: Prediction) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean measure over the rows of a prediction, and the mean acceptance without gradients, both []."""
        pieces = list(self._pieces(batch, prediction))
        count = len(prediction.rows)
        measure, accepted, divergence = (torch.stack(each).sum() / count for each in zip(*pieces, strict=True))
        accepted = accepted.detach()
        if self.kind == "hybrid":
            share = torch.exp(-_STEEPNESS * accepted)
            return share * divergence + (1 - share) * measure, accepted
        return measure, accepted

    def _pieces(self, batch: FeatureBatch, prediction: Prediction) -> Iterator[tuple[torch.Tensor, ...]]:
        """Sums over slices of the rows: the measure, the acceptance, the Kullback-Leibler divergence (zero where it is
        not asked for). Rows whose likeliest token the head cannot draft are left out, see ``SoftLabels``.

        Costs one distribution [rows, drafted] of the head; slices bound what is held at a time, and each is computed
        again for its gradients where there are several.
        """
        labels = batch.soft_labels(self._spec)

        def piece(rows: slice) -> tuple[torch.Tensor, ...]:
            places = prediction.rows[rows] + prediction.depth
            p, known = labels.probabilities[places], (labels.likeliest[places] >= 0).float()
            log_q = torch.log_softmax(prediction.drafted(rows, self._spec).float(), dim=-1)
            accepted = torch.minimum(p, log_q.exp()).sum(dim=-1) * known
            if self.kind == "log":
                return -(accepted.clamp(min=_LEAST).log() * known).sum(), accepted.sum(), accepted.new_zeros(())
            divergence = accepted.new_zeros(())
            if self.kind == "hybrid":
                divergence = ((torch.xlogy(p, p) - p * log_q).sum(-1) * known).sum()
            return (known - accepted).sum(), accepted.sum(), divergence

        parts = slices(len(prediction.rows), self._spec.drafted)
        for rows in parts:
            yield piece(rows) if len(parts) == 1 else checkpoint(piece, rows, use_reentrant=False)
