"""P-EAGLE (Hui et al. 2026, arXiv 2602.01469): EAGLE-3 that drafts all depths in one pass.

Behind the committed tokens are places whose token and state are not known yet. At each the head reads the same
two learnt vectors, a state and an embedding, so that the places differ by their positions and by what they attend to
alone. What comes out of the last committed pair guesses the token after the root, and what comes out of the d-th place
behind it guesses the one d further. So the K layers are paid once for a draft, whatever its depth, where EAGLE pays
them at each level; in return a guess does not know which tokens were drafted before it.

Layers, fusion of the target's states, output layer and loss are EAGLE-3's. The paper uses the embedding of an unused
token; not all targets have one, so ours is learnt too. The paper also drops some places at greater depths in training
(conditional drop-token sampling) to save memory; ours keeps all of them.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import nn

from heads.common.drafting import Drafter, KVCache, OnePass
from heads.eagle3 import Eagle3
from koala_bench.errors import KoalaBenchError
from koala_bench.heads import Committed, TargetSpec
from koala_bench.tree import Template


class PEagle(Eagle3):
    """Draft head whose ``layers`` decoder layers run once for a draft of up to ``depths`` tokens.

    Args:
        layers: decoder layers (KOALA's K; the paper has 4).
        depths: how many tokens ahead it learns to draft, and can (the paper trains 8).
        decay: weight of a depth's loss over that of the depth before (the paper weighs all alike).

    Raises:
        KoalaBenchError: there are no depths; and see ``Eagle3``.
    """

    def __init__(self, spec: TargetSpec, layers: int = 1, depths: int = 4, decay: float = 1.0) -> None:
        if depths < 1:
            raise KoalaBenchError(f"P-EAGLE's number of depths is {depths}.", "It must be at least 1.")
        super().__init__(spec, layers, depths, decay)
        self.max_depth = depths
        # The state stands in for fused ones, behind ``fc``, and is smaller than they are: what a masked place learns
        # comes from what it attends to. Both are normed on their way into the first layer; on its residual path the
        # state is not.
        self.mask_state = nn.Parameter(torch.randn(self.shape.width))
        self.mask_embedding = nn.Parameter(torch.randn(self.shape.width))
        self._drafters: dict[int, Drafter] = {}  # by the depth of the trees

    # ------------------------------------------------------------------------------ decoding

    def begin(self, template: Template, capacity: int) -> None:
        """Forget the sequence; buffers are kept while they fit."""
        template.check(depth=self.max_depth, candidates=self.lm_head.out_features)
        depth = max(template.depth, 1)
        if depth not in self._drafters:
            self._drafters[depth] = Drafter(OnePass(self.extend_cache, partial(self._score_depths, depth)), self._spec)
        self._drafter = self._drafters[depth]
        super().begin(template, capacity)

    def _score_depths(self, depth: int, new: Committed, cache: KVCache) -> torch.Tensor:
        """Scores [depth, vocab_size] of the ``depth`` tokens behind the root, in one pass that writes the rows of
        committed tokens and, behind them, those of the masked places, which the next draft overwrites.
        """
        count, masked = new.tokens.shape[0], depth - 1
        embedded = torch.cat([self._embed(new.tokens), self.mask_embedding.expand(masked, -1)])
        states = torch.cat([self._fused(new.hidden), self.mask_state.expand(masked, -1)])
        total = count + masked
        table, rows, mask = cache.positions(0, total), cache.rows(0, total), cache.causal_mask(total)
        x = self._run(embedded[None], states[None], table, cache.buffers, rows, mask)
        return self._scores(x[0, -depth:])

    # ------------------------------------------------------------------------------ training

    def _inputs(self, step: int, ids: torch.Tensor, state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """At step ``i`` place ``t`` is the i-th masked place of a draft from ``t``. It attends to the pairs up to
        ``t`` and to the masked places of the same draft up to itself.

        No depth reads the output of another, so all depths could be one pass with a mask [depths * tokens, depths *
        tokens], mostly masked. Computing depth by depth over the earlier keys gives the same without that mask; memory
        grows with depths * tokens ** 2.
        """
        if not step:
            return super()._inputs(step, ids, state)
        embedded, masked = self.mask_embedding.to(state.dtype), self.mask_state.to(state.dtype)
        return embedded.expand(*ids.shape, -1), masked.expand(*ids.shape, -1)
