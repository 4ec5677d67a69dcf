"""Both turns of an adversarial objective's step in one call, as the training has them."""

from __future__ import annotations

from typing import Any

import torch

from koala_bench.heads import FeatureBatch, HeadLoss


def turns(
    objective: Any, batch: FeatureBatch, found: HeadLoss, progress: float
) -> tuple[torch.Tensor | None, dict[str, torch.Tensor]]:
    """The discriminator's turn and the head's; what to add to the loss, and the log of both."""
    if not objective.active(progress):
        return None, {}
    learned = objective.learn(batch, found, progress)
    objective.step(progress)
    extra, of_head = objective.term(batch, found, progress)
    return extra, {**learned, **of_head}
