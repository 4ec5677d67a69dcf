"""How a head takes the candidates of a node out of its scores: the best ones, or whatever an acceptance rule wants
drawn.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

# Takes logits [rows, vocab_size] and a count; returns token ids [rows, count], and the distributions [rows, vocab_size]
# that each row's ids were drawn from one after the other without replacement, or None where they were not drawn. A head
# that has an attribute of this kind called ``pick`` takes all its candidates through it and hands the distributions on
# in its trees; a rule that samples puts its own there. A head without one proposes its tokens for certain, which is
# lossless too.
Pick = Callable[[torch.Tensor, int], tuple[torch.Tensor, torch.Tensor | None]]


def best(logits: torch.Tensor, count: int) -> tuple[torch.Tensor, None]:
    """The ``count`` most likely tokens of each row, the best first: ids [rows, count], not drawn."""
    return logits.topk(count, dim=-1).indices, None
