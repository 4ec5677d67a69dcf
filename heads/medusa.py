"""Medusa (Cai et al. 2024, arXiv 2401.10774): parallel heads, each guessing one token further ahead.

Head ``i`` looks at the target's last hidden state and guesses the token ``i + 2`` places later: K residual blocks
``x + SiLU(W x + b)`` and a projection to the vocabulary. KOALA's K layers are K *distinct* blocks here; the official
code repeats one block K times by accident (upstream: ``[ResBlock(h)] * num_layers``).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from koala_bench.heads import Committed, FeatureBatch, HeadLoss, Prediction, TargetSpec
from koala_bench.tree import DraftTree, TreeTemplate


class Medusa(nn.Module):
    """``heads`` independent guessers with ``layers`` residual blocks each.

    The blocks start near the identity (W = 0, b as PyTorch draws it) and the projections as copies of the target's output
    layer, as in Medusa v0.1. All heads' weights are stacked, so that a draft is K + 1 batched products whatever
    the number of heads.
    """

    features = (-1,)

    def __init__(self, spec: TargetSpec, heads: int = 4, layers: int = 1) -> None:
        super().__init__()
        width = spec.hidden_size
        self.max_depth = heads
        self.block_weight = nn.Parameter(torch.zeros(layers, heads, width, width))
        self.block_bias = nn.Parameter(torch.empty(layers, heads, width).uniform_(-(width**-0.5), width**-0.5))
        self.output_weight = nn.Parameter(spec.output_weight.detach().float().cpu().repeat(heads, 1, 1))
        self._template: TreeTemplate | None = None

    def blocks(self, x: torch.Tensor, head: int) -> torch.Tensor:
        """Residual blocks of one head on states [..., hidden_size]."""
        for weight, bias in zip(self.block_weight[:, head], self.block_bias[:, head], strict=True):
            x = x + F.silu(F.linear(x, weight, bias))
        return x

    def begin(self, template: TreeTemplate, capacity: int) -> None:
        """Prepare for a tree; Medusa remembers nothing of the sequence itself."""
        if template is self._template:
            return
        template.check(depth=self.max_depth, candidates=self.output_weight.shape[1])
        self._template = template
        ranks = template.widest_rank
        places = [(len(path) - 1) * ranks + path[-1] for path in template.paths]
        self._places = torch.tensor(places, dtype=torch.int64, device=self.output_weight.device)

    def draft(self, new: Committed) -> DraftTree:
        """Fill the tree with every head's best tokens; a node depends on its depth and rank only."""
        template = self._template
        assert template is not None, "begin() comes before draft()"
        depth = template.depth
        x = new.hidden[-1:, -1].expand(depth, 1, -1)  # [depth, 1, width]
        for weight, bias in zip(self.block_weight[:, :depth], self.block_bias[:, :depth], strict=True):
            x = x + F.silu(torch.baddbmm(bias[:, None], x, weight.transpose(1, 2)))
        logits = torch.stack([F.linear(row, weight) for row, weight in zip(x[:, 0], self.output_weight, strict=False)])
        candidates = logits.topk(template.widest_rank, dim=-1).indices  # [depth, ranks]
        return DraftTree(torch.cat([new.tokens[-1:], candidates.flatten()[self._places]]), template.shape)

    def loss(self, batch: FeatureBatch) -> HeadLoss:
        """Sum over heads of the cross-entropy against the data's token, on answer tokens (Medusa-1, upstream v0.1 ``train.py``)."""
        hidden = batch.hidden[:, :, -1].float()
        total = hidden.new_zeros(())
        parts: dict[str, torch.Tensor] = {}
        predictions = []
        # Taken apart once: the gradient of a slice would be a whole tensor of zeros around it, for every head.
        for head, output_weight in enumerate(self.output_weight.unbind(0)):
            ahead = head + 2
            wanted = torch.zeros_like(batch.supervised)
            wanted[:, :-ahead] = batch.supervised[:, ahead:]
            rows = wanted.flatten().nonzero()[:, 0]
            labels = batch.ids.flatten()[rows + ahead]
            feature = self.blocks(hidden.flatten(0, 1)[rows], head)
            logits = F.linear(feature, output_weight)
            scores = logits.float()  # once: under autocast both users below want it, and argmax is slow in half precision
            # The sum over a count of at least one keeps a batch of very short answers at zero instead of nan.
            loss = F.cross_entropy(scores, labels, reduction="sum") / max(len(rows), 1)
            total = total + loss
            parts[f"cross_entropy_{head + 1}"] = loss.detach()
            parts[f"top1_{head + 1}"] = (scores.detach().argmax(-1) == labels).float().mean() if len(rows) else loss.detach()
            predictions.append(Prediction(head + 1, rows, feature, logits))
        return HeadLoss(total, parts, tuple(predictions))
