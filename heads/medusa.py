"""Medusa (Cai et al. 2024, arXiv 2401.10774): parallel heads, each guessing one token further ahead.

Head ``i`` looks at the target's last hidden state and guesses the token ``i + 2`` places later: K residual blocks
``x + SiLU(W x + b)`` and a projection to the vocabulary. KOALA's K layers are K *distinct* blocks here; the official
code repeats one block K times by accident (upstream: ``[ResBlock(h)] * num_layers``).
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import cast

import torch
import torch.nn.functional as F
from torch import nn

from heads.common.growth import LevelNodes, draft, levels_of
from heads.common.losses import DepthPredictions, loss_of, rows_before
from koala_bench.decoding.candidates import Pick, best
from koala_bench.errors import KoalaBenchError
from koala_bench.heads import Committed, FeatureBatch, HeadLoss, Pass, TargetSpec
from koala_bench.tree import DraftTree, Template, TreeTemplate


class Medusa(nn.Module):
    """``heads`` independent guessers with ``layers`` residual blocks each.

    The blocks start near the identity (W = 0, b as PyTorch draws it) and the projections as copies of the target's
    output layer, as in Medusa v0.1. All heads' weights are stacked, so that a draft is K + 1 batched products whatever
    the number of heads.

    Args:
        heads: tokens that are guessed ahead, one head for each.
        layers: residual blocks of a head (KOALA's K).
        own_output: whether each head has a projection of its own; if not, all go through the target's output layer,
            which stays as it is (upstream's trainer since version 2, where that layer is trained by accident but not
            saved).
        labels: what they are trained on: ``data``, the data's tokens, as upstream; or ``target``, the target's
            distribution, which losses such as LK's compare with.

    Raises:
        KoalaBenchError: there are no such labels.
    """

    features = (-1,)

    def __init__(
        self, spec: TargetSpec, heads: int = 4, layers: int = 1, own_output: bool = True, labels: str = "data"
    ) -> None:
        super().__init__()
        if labels not in ("data", "target"):
            raise KoalaBenchError(f"Medusa's labels are {labels!r}.", "They must be 'data' or 'target'.")
        width = spec.hidden_size
        self.max_depth, self.labels, self.soft_labels = heads, labels, labels == "target"
        self.block_weight = nn.Parameter(torch.zeros(layers, heads, width, width))
        self.block_bias = nn.Parameter(torch.empty(layers, heads, width).uniform_(-(width**-0.5), width**-0.5))
        self.output_weight = (
            nn.Parameter(spec.output_weight.detach().float().cpu().repeat(heads, 1, 1)) if own_output else None
        )
        self._spec = spec
        self._guess = spec.record(self._guessing, ((),))
        self._record = spec.record
        self._fill: dict[TreeTemplate, Pass] = {}  # whole drafts, by their trees
        self.pick: Pick = best
        self._template: Template | None = None

    def blocks(self, x: torch.Tensor, head: int) -> torch.Tensor:
        """Residual blocks of one head on states [..., hidden_size]."""
        for weight, bias in zip(self.block_weight[:, head], self.block_bias[:, head], strict=True):
            x = x + F.silu(F.linear(x, weight, bias))
        return x

    def begin(self, template: Template, capacity: int) -> None:
        """Prepare for a tree; Medusa remembers nothing of the sequence itself."""
        if template is self._template:
            return
        template.check(depth=self.max_depth, candidates=self._spec.drafted)
        self._template = template
        device = self.block_weight.device
        self._levels = levels_of(template, device)
        if isinstance(template, TreeTemplate) and template not in self._fill:
            places = [(len(path) - 1) * template.widest_rank + path[-1] for path in template.paths]
            where = torch.tensor(places, dtype=torch.int64, device=device)
            self._fill[template] = self._record(
                partial(self._filling, template.depth, template.widest_rank, where), ((), ())
            )

    def draft(self, new: Committed) -> DraftTree:
        """Fill the tree with every head's best tokens; a node's scores depend on its depth only."""
        template = self._template
        assert template is not None, "begin() comes before draft()"
        if self.pick is not best or not isinstance(template, TreeTemplate):
            return draft(self, new, self._levels, self.pick)
        return DraftTree(self._fill[template](new.tokens[-1:], new.hidden[-1:, -1]), template.shape)

    def _filling(
        self, depth: int, ranks: int, places: torch.Tensor, root: torch.Tensor, state: torch.Tensor
    ) -> torch.Tensor:
        """Tokens [nodes] of a static tree from the root's [1] and the state before it [1, hidden_size].

        The best tokens are the same below every node of a level, so one search finds them for all; draws would have to
        differ.
        """
        candidates, _ = best(self._guessing(state.expand(depth, 1, -1)), ranks)  # [depth, ranks]
        return torch.cat([root, candidates.flatten().index_select(0, places)])

    def _scores(self, new: Committed, depth: int) -> torch.Tensor:
        """Logits [depth, vocab_size] of the first ``depth`` heads."""
        return cast(torch.Tensor, self._guess(new.hidden[-1:, -1].expand(depth, 1, -1)))

    def _guessing(self, x: torch.Tensor) -> torch.Tensor:
        """Logits [depth, vocab_size] of a state [depth, 1, hidden_size] that stands there once for each head."""
        depth = len(x)
        for weight, bias in zip(self.block_weight[:, :depth], self.block_bias[:, :depth], strict=True):
            x = x + F.silu(torch.baddbmm(bias[:, None], x, weight.transpose(1, 2)))
        if self.output_weight is None:
            return self._spec.output(x[:, 0])
        return self._spec.spread(
            torch.stack([F.linear(row, weight) for row, weight in zip(x[:, 0], self.output_weight, strict=False)])
        )

    def read(self, new: Committed) -> torch.Tensor:
        """Scores of all depths at once; the first are those of the root's children."""
        assert self._template is not None, "begin() comes before read()"
        self._logits = self._scores(new, self._template.depth)
        return self._logits[:1]

    def score_children(self, level: LevelNodes) -> torch.Tensor:
        """The scores of the level below, the same for each of its nodes."""
        return self._logits[level.depth].expand(len(level.tokens), -1)

    def loss(self, batch: FeatureBatch) -> HeadLoss:
        """Sum over heads of the cross-entropy against the data's token, on answer tokens (Medusa-1, upstream v0.1
        ``train.py``), or against the target's distribution there.
        """
        return loss_of(self._guesses(batch), self._spec, torch.float32)

    def _guesses(self, batch: FeatureBatch) -> Iterator[DepthPredictions]:
        hidden, ids = batch.hidden[:, :, -1].float().flatten(0, 1), batch.ids.flatten()
        # Taken apart once: the gradient of a slice would be a whole tensor of zeros around it, for every head.
        own = [None] * self.max_depth if self.output_weight is None else self.output_weight.unbind(0)
        soft = batch.soft_labels(self._spec) if self.labels == "target" else None
        for head, output_weight in enumerate(own):
            rows = rows_before(batch.supervised, head + 2)
            if soft is None:
                labels = likeliest = self._spec.labels(ids[rows + head + 2])
            else:
                labels, likeliest = soft.probabilities[rows + head + 1], soft.likeliest[rows + head + 1]
            score = self._spec.score if output_weight is None else partial(F.linear, weight=output_weight)
            yield DepthPredictions(rows, self.blocks(hidden[rows], head), score, labels, likeliest)
