"""EAGLE-1 and EAGLE-2 (Li et al. 2024, arXiv 2401.15077, 2406.16858): an autoregressive head over the target's hidden
states.

The state at ``t`` and the embedding of token ``t + 1`` go through one linear layer and K decoder layers, and come out
as a guess of the state at ``t + 1``; the target's own output layer turns it into token ``t + 2``. Several layers
are upstream's ``num_hidden_layers``: the first has no input norm, the others have one.

With ``forwards`` above 1 it is trained as HASS (Zhang et al. 2024, arXiv 2408.15766): the network and its drafts are
the same, but it also learns from states of its own, as it will have to draft from.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from heads.common.drafting import CachedHead, KVCache, Scored
from heads.common.growth import MAX_DEPTH, LevelNodes
from heads.common.layers import DecoderLayer, LayerShape, Unrolled
from heads.common.losses import scored_in_pieces
from koala_bench.errors import KoalaBenchError
from koala_bench.heads import Committed, FeatureBatch, HeadLoss, Prediction, TargetSpec


class Eagle(CachedHead):
    """Draft head with ``layers`` decoder layers of the target's width.

    Args:
        layers: decoder layers (KOALA's K).
        attention_heads, kv_heads, intermediate, rope_base, norm_eps: shape of a layer; the target's own where None.
        bias: whether the first linear layer has one.
        noise: range of the uniform noise on the input states in training (upstream ``AddUniformNoise``: 0.2).
        checkpointing: in training keep only what goes into each layer and compute the rest again for the gradients, as
            upstream does; costs another forward pass of the layers and saves most of their memory.
        regression_weight, classification_weight: of the smooth-L1 and the soft cross-entropy (upstream: 1.0 and 0.1).
        forwards: passes of a training step, each after the first over states of the pass before (HASS
            ``forward_num_total``: 3); each costs as much as the first.

    Raises:
        KoalaBenchError: there is no forward, or several forwards go with ``checkpointing``.
    """

    features = (-1,)
    max_depth = MAX_DEPTH
    soft_labels = True

    def __init__(
        self, spec: TargetSpec, layers: int = 1, attention_heads: int | None = None, kv_heads: int | None = None,
        intermediate: int | None = None, rope_base: float | None = None, norm_eps: float | None = None,
        bias: bool = True, noise: float = 0.2, regression_weight: float = 1.0, classification_weight: float = 0.1,
        checkpointing: bool = False, forwards: int = 1,
    ) -> None:  # fmt: skip
        super().__init__(spec)
        if forwards < 1:
            raise KoalaBenchError(f"EAGLE's number of forwards is {forwards}.", "It must be at least 1.")
        if forwards > 1 and checkpointing:
            raise KoalaBenchError(
                "EAGLE with several forwards keeps the keys of each, which checkpointing would compute twice.",
                "Leave checkpointing off.",
            )
        width = spec.hidden_size
        self.shape = LayerShape.of(spec, attention_heads, kv_heads, intermediate, norm_eps, rope_base)
        self.fc = nn.Linear(2 * width, width, bias=bias)
        self.layers = nn.ModuleList(DecoderLayer(self.shape, input_norm=index > 0) for index in range(layers))
        self._cached = self.shape, layers
        self.checkpointing = checkpointing
        self.noise, self.regression_weight, self.classification_weight = noise, regression_weight, classification_weight
        self.forwards = forwards

    # ------------------------------------------------------------------------------ decoding

    def extend_cache(self, new: Committed, cache: KVCache) -> torch.Tensor:
        """Write the rows of the committed pairs, which hold true states of the target; the states predicted of them."""
        count = new.tokens.shape[0]
        table, rows, mask = cache.positions(0, count), cache.rows(0, count), cache.causal_mask(count)
        return self._run(new.tokens, new.hidden[:, -1], table, rows, mask, cache.buffers)

    def read(self, new: Committed, cache: KVCache) -> Scored:
        """Commit the pairs; carries the state predicted of the last one."""
        state = self.extend_cache(new, cache)[-1:]
        return self._spec.output(state), state

    def score_children(self, level: LevelNodes, carried: torch.Tensor, cache: KVCache) -> Scored:
        """Write a level's rows after the earlier ones; a node pairs its token with its parent's predicted state."""
        table, rows = cache.positions(level.depth - 1, 1), cache.rows(level.offset, level.tokens.shape[0])
        mask, states = cache.tree_mask(level.tree_mask), carried.index_select(0, level.parents)
        states = self._run(level.tokens, states, table, rows, mask, cache.buffers)
        return self._spec.output(states), states

    def _run(
        self, tokens: torch.Tensor, states: torch.Tensor, table: torch.Tensor, start: Any, mask: torch.Tensor | None,
        buffers: torch.Tensor,
    ) -> torch.Tensor:  # fmt: skip
        """Predicted states [new, width] after (state, next token) pairs; writes their cache rows from ``start`` on."""
        x = self.fc(torch.cat([self._embed(tokens), states], dim=-1))[None]
        for layer, own in zip(self.layers, buffers.unbind(0), strict=True):
            x = layer(x, table, own, start, mask)
        out: torch.Tensor = x[0]
        return out

    # ------------------------------------------------------------------------------ training

    def forward(self, ids: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        """Predicted states [batch, tokens, width] for whole sequences, causal.

        Args:
            ids: int64 [batch, tokens]; ``ids[:, t]`` is the token after the one whose state is ``states[:, t]``.
            states: [batch, tokens, width].
        """
        x = self.fc(torch.cat([self._embed(ids).to(states.dtype), states], dim=-1))
        table = self.shape.rotary(ids.shape[1], x)
        saving = self.checkpointing and torch.is_grad_enabled()
        for layer in self.layers:
            x = checkpoint(layer, x, table, use_reentrant=False) if saving else layer(x, table)
        return x

    def unrolled(self, ids: torch.Tensor, states: torch.Tensor) -> list[torch.Tensor]:
        """Predicted states [batch, tokens, width] of each of ``forwards`` passes, as HASS aligns them.

        In pass ``i`` place ``t`` reads the state that pass ``i - 1`` predicted there, detached, and the token
        ``ids[:, t + i]``. It attends to the pairs with true states up to ``t`` and to its own of the passes so far, as
        drafting from ``t`` would. Places without such a token read token 0; no other place attends to them.

        Args:
            ids, states: as for ``forward``.
        """
        tokens = ids.shape[1]
        positions = self.shape.rotary(tokens + self.forwards, states)
        kept: list[Unrolled] = [[] for _ in self.layers]
        outs: list[torch.Tensor] = []
        for step in range(self.forwards):
            read = F.pad(ids[:, step:], (0, min(step, tokens)))
            given = outs[-1].detach() if outs else states
            x = self.fc(torch.cat([self._embed(read).to(given.dtype), given], dim=-1))
            for layer, own in zip(self.layers, kept, strict=True):
                x = layer(x, positions[:, step : step + tokens], steps=own)
            outs.append(x)
        return outs

    def loss(self, batch: FeatureBatch) -> HeadLoss:
        """Smooth-L1 on the next state and soft cross-entropy on the next distribution (upstream
        ``eagle/train/main.py``), summed over ``forwards``.

        As there, position ``t`` counts where token ``t`` belongs to an answer, and the last token of a dialogue never
        does; at forward ``d`` it counts where token ``t + d - 1`` does.
        """
        hidden = batch.hidden[:, :, -1].float()
        noisy = hidden
        if self.noise and self.training:
            draw = torch.Generator(device=hidden.device).manual_seed(batch.seed)
            scale = self.noise * 512.0 / batch.lengths.float()
            noisy = (
                hidden + (torch.rand(hidden.shape, generator=draw, device=hidden.device) - 0.5) * scale[:, None, None]
            )
        ids, states = batch.ids[:, 1:], noisy[:, :-1]
        outs = self.unrolled(ids, states) if self.forwards > 1 else [self(ids, states)]
        # Behind a row's last token stands padding, which has no state worth predicting.
        counted = batch.supervised[:, :-1] & (
            torch.arange(1, batch.ids.shape[1], device=batch.ids.device) < batch.lengths[:, None]
        )
        regressions, classifications = hidden.new_zeros(()), hidden.new_zeros(())
        parts: dict[str, torch.Tensor] = {}
        predictions = []
        for depth, predicted in enumerate(outs, start=1):
            row, place = counted[:, depth - 1 :].nonzero(as_tuple=True)
            regression, classification, own, prediction = self._judged(
                batch, depth, row * batch.ids.shape[1] + place, predicted[row, place], hidden
            )
            regressions, classifications = regressions + regression, classifications + classification
            parts |= own
            predictions.append(prediction)
        rest = self.regression_weight * regressions
        return HeadLoss(rest + self.classification_weight * classifications, parts, tuple(predictions), rest)

    def _judged(
        self, batch: FeatureBatch, depth: int, rows: torch.Tensor, feature: torch.Tensor, hidden: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor], Prediction]:
        """Regression and classification of one forward, what is logged of them, and what it predicted.

        Args:
            rows, feature: see ``Prediction``.
            hidden: the target's states [batch, tokens, width].
        """
        wanted = hidden.flatten(0, 1)[rows + depth]
        divisor = len(rows) + 1e-5
        regression = F.smooth_l1_loss(feature, wanted, reduction="none").mean(-1).sum() / divisor
        labels = batch.soft_labels(self._spec)

        def judge(logits: torch.Tensor, part: slice) -> tuple[torch.Tensor, torch.Tensor]:
            places, scores = rows[part] + depth, logits.float()
            soft, likeliest = labels.probabilities[places], labels.likeliest[places]
            losses = -(soft * F.log_softmax(scores, dim=-1)).sum(-1)
            return (losses * (likeliest >= 0)).sum(), (scores.detach().argmax(-1) == likeliest).sum()

        summed, agreeing, scored = scored_in_pieces(self._spec.score, feature, self._spec.drafted, judge)
        classification, agreement = summed / divisor, agreeing / max(len(rows), 1)
        ending = f"_{depth}" if depth > 1 else ""
        parts = {
            f"regression{ending}": regression.detach(),
            f"classification{ending}": classification.detach(),
            f"top1_{depth}": agreement,
        }
        prediction = Prediction(
            depth, rows, feature, scored, self._spec.draft_vocabulary, weight=self.classification_weight
        )
        return regression, classification, parts, prediction
