"""HASS's top-k loss (Zhang et al. 2024, arXiv 2408.15766): cross-entropy over the target's few likeliest tokens alone.

It is added to a head's loss near the end of training: upstream's ``train.sh`` weighs it 0 for 40 epochs and 1 for the
last 10. There these are a run of their own, with a third of the learning rate and a schedule that starts again; here
they are the end of one schedule, whose rates are low by then.
"""

from __future__ import annotations

import torch

from heads.common.distributions import Comparison, means_over_rows
from koala_bench.errors import KoalaBenchError
from koala_bench.heads import FeatureBatch, Prediction, TargetSpec


class Likeliest(Comparison):
    """Adds the cross-entropy over the target's ``count`` likeliest tokens, summed over the depths that a head predicts.

    Args:
        count: of tokens (HASS: 10).
        weight: of the term (HASS: 1).
        begins: fraction of the training after which there is a term (HASS: four fifths).

    Raises:
        KoalaBenchError: there is no token, or ``begins`` is no fraction; or see ``Comparison``.
    """

    def __init__(self, spec: TargetSpec, count: int = 10, weight: float = 1.0, begins: float = 0.8) -> None:
        super().__init__(spec, weight)
        if count < 1:
            raise KoalaBenchError(f"The objective is of {count} likeliest tokens.", "It must be at least 1.")
        if not 0 <= begins < 1:
            raise KoalaBenchError(f"The objective begins after {begins} of the training.", "Use 0 or less than 1.")
        self.count, self.begins = min(count, spec.drafted), begins

    def active(self, progress: float) -> bool:
        """Whether that fraction of the training is done."""
        return super().active(progress) and progress >= self.begins

    def compare(self, batch: FeatureBatch, prediction: Prediction) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Mean over the rows of a prediction; also logged."""
        (value,) = means_over_rows(batch, prediction, self._spec, self._of_likeliest)
        return value, {"of_likeliest": value.detach()}

    def _of_likeliest(self, p: torch.Tensor, log_q: torch.Tensor, rows: slice) -> tuple[torch.Tensor, ...]:
        largest, places = p.topk(self.count, dim=-1)
        return (-(largest * log_q.gather(-1, places)).sum(-1),)
