"""Objectives that lower the chance of rejection itself: LK (Samarin et al. 2026, arXiv 2602.23881) and total variation.

A drafted token is accepted with probability ``sum_v min(p(v), q(v))``, p the target's distribution and q the head's.
Both objectives need no more of a head than the predictions that its loss reports. A head with a draft vocabulary can
only get accepted what p has within it, so p is not renormalised there, as TorchSpec has it after section 4.4 of the
paper; in the Kullback-Leibler divergence it is.
"""

from __future__ import annotations

from typing import Literal

import torch

from heads.common.distributions import Comparison, means_over_rows
from koala_bench.errors import KoalaBenchError
from koala_bench.heads import FeatureBatch, Prediction, TargetSpec

Kind = Literal["log", "hybrid", "variation"]
_STEEPNESS = 3.0  # of the hybrid's weight in the acceptance, as speculators' loss_functions.md has it
_LEAST = 1e-6  # acceptance below which the logarithm grows no further: a fresh head may have none at all


class Rejection(Comparison):
    """Puts a measure of the rejection in the place of a head's token losses, with their weights, as the paper replaces
    the Kullback-Leibler divergence; other losses of the head, such as EAGLE's regression, stay.

    A head that does not report ``HeadLoss.rest`` keeps its token losses, and the measure is added.

    Args:
        kind: ``log``, the negative logarithm of the expected acceptance; ``hybrid``, ``l KL(p, q) + (1 - l) TV(p, q)``
            with ``l = exp(-3 acceptance)`` of each depth, which is KL for a head that gets little accepted and total
            variation later; ``variation``, the total variation ``1 - acceptance`` alone.
        weight: of the measure over that of the token loss.

    Raises:
        KoalaBenchError: an unknown kind; or see ``Comparison``.
    """

    replaces = True

    def __init__(self, spec: TargetSpec, kind: Kind = "log", weight: float = 1.0) -> None:
        super().__init__(spec, weight)
        if kind not in ("log", "hybrid", "variation"):
            raise KoalaBenchError(f"Unknown kind '{kind}'.", "Use one of log, hybrid, variation.")
        self.kind = kind

    def compare(self, batch: FeatureBatch, prediction: Prediction) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Mean measure over the rows of a prediction, and the mean acceptance for the log."""
        shares = batch.drafted_share(self._spec)[prediction.rows + prediction.depth]

        def measured(p: torch.Tensor, log_q: torch.Tensor, rows: slice) -> tuple[torch.Tensor, ...]:
            return self._measured(p, log_q, shares[rows, None])

        measure, accepted, divergence = means_over_rows(batch, prediction, self._spec, measured)
        accepted = accepted.detach()
        if self.kind == "hybrid":
            share = torch.exp(-_STEEPNESS * accepted)
            measure = share * divergence + (1 - share) * measure
        return measure, {"expected_acceptance": accepted}

    def _measured(self, p: torch.Tensor, log_q: torch.Tensor, share: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """By row the measure, the acceptance, and the Kullback-Leibler divergence, zero where it is not asked for.

        Args:
            share: of the target's distribution that p, renormalised, is [rows, 1].
        """
        accepted = torch.minimum(share * p, log_q.exp()).sum(dim=-1)
        if self.kind == "log":
            return -accepted.clamp(min=_LEAST).log(), accepted, torch.zeros_like(accepted)
        if self.kind == "variation":
            return 1 - accepted, accepted, torch.zeros_like(accepted)
        return 1 - accepted, accepted, (torch.xlogy(p, p) - p * log_q).sum(-1)
