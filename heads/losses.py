"""What the losses of heads that guess tokens share: one depth's cross-entropy, and how often its best guess is right."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def token_loss(scores: torch.Tensor, wanted: torch.Tensor, likeliest: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross-entropy of scores [rows, vocab_size], mean over the rows, and the share of rows whose best guess is the wanted one.

    Where a batch of very short answers leaves no row, both are zero instead of nan.

    Args:
        wanted: token ids [rows], or distributions [rows, vocab_size] in the dtype of the scores.
        likeliest: token ids [rows] to compare the best guesses with.

    Returns:
        two scalars; the second is detached.
    """
    loss = F.cross_entropy(scores, wanted, reduction="sum") / max(len(scores), 1)
    right = (scores.detach().argmax(-1) == likeliest).float().mean() if len(scores) else loss.detach()
    return loss, right
