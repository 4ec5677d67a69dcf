"""How candidates are selected from a head's logits: the most likely tokens, or samples where the rule needs them."""

from __future__ import annotations

from collections.abc import Callable

import torch

# From logits [rows, vocab_size] and a count: token ids [rows, count], and the distributions [rows, vocab_size] that
# each row's ids were sampled from without replacement, or None if they were not sampled. A head with an attribute
# ``pick`` of this type selects all its candidates with it and passes the distributions on as its trees' ``proposals``;
# a sampling rule sets it. A head without one proposes its tokens with certainty, which is lossless too.
Pick = Callable[[torch.Tensor, int], tuple[torch.Tensor, torch.Tensor | None]]


def best(logits: torch.Tensor, count: int) -> tuple[torch.Tensor, None]:
    """The ``count`` most likely tokens of each row, most likely first: ids [rows, count], not sampled."""
    return logits.topk(count, dim=-1).indices, None
