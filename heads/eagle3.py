"""EAGLE-3 (Li et al. 2025, arXiv 2503.01840): an autoregressive head that reads three layers of the target and predicts
tokens alone.

The target's states of a low, a middle and a high layer at ``t`` are fused by one linear layer; with the embedding of
token ``t + 1`` they go through a decoder layer that attends from both, K - 1 ordinary ones, a norm and an output layer
of the head's own, which guesses token ``t + 2``. What comes out of the last layer takes the place of the fused states
at drafted tokens. No loss asks it to resemble a state of the target; instead training unrolls the head over its own
output, as drafting does (training-time test).

Published heads hold the same tensors: ``fc``, ``norm``, ``lm_head`` and ``midlayer.{self_attn.*_proj, mlp.*_proj,
hidden_norm, input_layernorm, post_attention_layernorm}`` under these names. Many draft only the 32,000 commonest tokens
of a larger vocabulary; their ids, which ``d2t`` and ``t2d`` say there, are those of the draft vocabulary here.
``layers`` is this project's, for K above 1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from heads.common.drafting import CachedHead, KVCache, Scored
from heads.common.growth import MAX_DEPTH, LevelNodes
from heads.common.layers import DecoderLayer, LayerShape, PairLayer, RMSNorm, Unrolled
from heads.common.losses import loss_by_depth
from koala_bench.errors import KoalaBenchError
from koala_bench.heads import Committed, FeatureBatch, HeadLoss, TargetSpec

_FUSED = 3


def fused_layers(layers: int) -> tuple[int, ...]:
    """Which hidden states of a target to read: three to be fused, and at the end the last state, as the harness asks of
    every head.

    The input of layers 2, n/2 and n - 3 (upstream ``modeling_llama_kv.py``). With fewer than seven layers there are no
    such three in order; then the states after about a third and two thirds of the layers, and the last one.
    """
    if layers >= 7:
        return 2, layers // 2, layers - 3, -1
    return layers // 3, 2 * layers // 3, -1


def _checked(ids: Sequence[int], layers: int) -> tuple[int, ...]:
    if len(ids) != _FUSED or not all(type(each) is int and 0 <= each < layers for each in ids):
        raise KoalaBenchError(
            f"EAGLE-3's layer_ids are {list(ids)}.", f"They must be {_FUSED} layers from 0 to {layers - 1}."
        )
    return tuple(ids)


class Eagle3(CachedHead):
    """Draft head whose ``layers`` decoder layers have the shape of the target's.

    The output layer starts as a copy of the target's, as Medusa's do (upstream draws it at random).

    Args:
        layers: decoder layers (KOALA's K); the first attends from embedding and state.
        steps: how far training unrolls (upstream: 7, for trees 8 deep; each costs as much as the first).
        decay: weight of a step's loss over that of the step before (upstream: 0.8).
        attention_heads, kv_heads, intermediate, rope_base, norm_eps: shape of a layer; the target's own where None.
        head_dim, rope_scaling: width of an attention head and stretched positions, see ``LayerShape``.
        layer_ids: which three of the target's states are fused, each the input of that layer; see ``fused_layers``.
        norm_before_residual: whether the first layer's residual path carries the normed state.
        biases: linear layers that have one, such as ``fc`` and ``midlayer.self_attn.q_proj``.

    Raises:
        KoalaBenchError: there are no layers, no steps, or no such three layers.
    """

    max_depth = MAX_DEPTH
    soft_labels = True

    def __init__(
        self, spec: TargetSpec, layers: int = 1, steps: int = 4, decay: float = 0.8, attention_heads: int | None = None,
        kv_heads: int | None = None, intermediate: int | None = None, rope_base: float | None = None,
        norm_eps: float | None = None, head_dim: int | None = None, rope_scaling: Mapping[str, Any] | None = None,
        layer_ids: Sequence[int] | None = None, norm_before_residual: bool = False, biases: Sequence[str] = (),
    ) -> None:  # fmt: skip
        super().__init__(spec)
        for name, count in (("layers", layers), ("steps", steps)):
            if count < 1:
                raise KoalaBenchError(f"EAGLE-3's number of {name} is {count}.", "It must be at least 1.")
        usual = fused_layers(spec.layers)
        self.features = usual if layer_ids is None else (*_checked(layer_ids, spec.layers), -1)
        self.own_layers = self.features != usual
        self.steps, self.decay = steps, decay
        self.shape = LayerShape.of(spec, attention_heads, kv_heads, intermediate, norm_eps, rope_base)
        self.shape = replace(self.shape, head_width=head_dim, rope_scaling=rope_scaling)
        width = self.shape.width
        self.fc = nn.Linear(_FUSED * width, width, bias=False)
        self.midlayer = PairLayer(self.shape, norm_before_residual)
        self.layers = nn.ModuleList(DecoderLayer(self.shape) for _ in range(layers - 1))
        for name in biases:
            linear = self.get_submodule(name)
            assert isinstance(linear, nn.Linear)
            linear.bias = nn.Parameter(torch.zeros(linear.out_features))
        self.norm = RMSNorm(width, self.shape.eps)
        self.lm_head = nn.Linear(width, spec.drafted, bias=False)
        with torch.no_grad():
            self.lm_head.weight.copy_(spec.output_weight.detach())
        self._cached = self.shape, layers

    def _fused(self, hidden: torch.Tensor) -> torch.Tensor:
        """States [..., features, width] of three layers as one [..., width]."""
        fused: torch.Tensor = self.fc(hidden[..., :_FUSED, :].flatten(-2))
        return fused

    # ------------------------------------------------------------------------------ decoding

    def extend_cache(self, new: Committed, cache: KVCache) -> torch.Tensor:
        """Write the rows of committed tokens from fused states of the target; what came out of each."""
        count, embedded, states = new.tokens.shape[0], self._embed(new.tokens), self._fused(new.hidden)
        table, rows, mask = cache.positions(0, count), cache.rows(0, count), cache.causal_mask(count)
        return self._run(embedded[None], states[None], table, cache.buffers, rows, mask)[0]

    def read(self, new: Committed, cache: KVCache) -> Scored:
        """Commit the tokens; carries what came out of the last one."""
        x = self.extend_cache(new, cache)[-1:]
        return self._scores(x), x

    def score_children(self, level: LevelNodes, carried: torch.Tensor, cache: KVCache) -> Scored:
        """Write the rows of a level; a node pairs its token with what came out above it."""
        table, rows = cache.positions(level.depth - 1, 1), cache.rows(level.offset, level.tokens.shape[0])
        mask, states = cache.tree_mask(level.tree_mask), carried.index_select(0, level.parents)
        x = self._run(self._embed(level.tokens)[None], states[None], table, cache.buffers, rows, mask)[0]
        return self._scores(x), x

    def _run(
        self, embedded: torch.Tensor, states: torch.Tensor, table: torch.Tensor, buffers: torch.Tensor | None = None,
        start: Any = 0, mask: torch.Tensor | None = None, steps: Sequence[Unrolled | None] | None = None,
    ) -> torch.Tensor:  # fmt: skip
        """What the last layer makes of embeddings and states, each [batch, new, width].

        Args:
            buffers: of a cache, a layer each, whose rows are written from ``start`` on.
            steps: of an unrolled pass, a layer each, see ``Attention``.
        """
        none = [None] * (1 + len(self.layers))
        own, kept = none if buffers is None else buffers.unbind(0), steps or none
        x: torch.Tensor = self.midlayer(embedded, states, table, own[0], start, mask, kept[0])
        for layer, rows, step in zip(self.layers, own[1:], kept[1:], strict=True):
            x = layer(x, table, rows, start, mask, step)
        return x

    def _scores(self, states: torch.Tensor) -> torch.Tensor:
        return self._spec.spread(self.lm_head(self.norm(states)))

    # ------------------------------------------------------------------------------ training

    def forward(self, ids: torch.Tensor, hidden: torch.Tensor) -> list[torch.Tensor]:
        """What the last layer makes of whole sequences [batch, tokens, width], at each step of the unrolled pass.

        At step ``i`` place ``t`` reads its own output of step ``i - 1`` and token ``ids[:, t + i]``, and attends to the
        pairs of the target's states up to ``t`` and to its own of the steps since: to what drafting from ``t`` on would
        see along the text. Places without such a token read token 0 and come out as whatever; no other place sees them.

        Args:
            ids: int64 [batch, tokens]; ``ids[:, t]`` is the token after the one whose states are ``hidden[:, t]``.
            hidden: [batch, tokens, features, width].
        """
        tokens = ids.shape[1]
        x = self._fused(hidden)
        positions = self.shape.rotary(tokens + self.steps, x)
        kept: list[Unrolled] = [[] for _ in range(1 + len(self.layers))]
        outs = []
        for step in range(self.steps):
            embedded, x = self._inputs(step, ids, x)
            x = self._run(embedded, x, positions[:, step : step + tokens], steps=kept)
            outs.append(x)
        return outs

    def _inputs(self, step: int, ids: torch.Tensor, state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Embeddings and states [batch, tokens, width] that places read at a step; ``state`` is of the step before."""
        return self._embed(F.pad(ids[:, step:], (0, min(step, ids.shape[1])))).to(state.dtype), state

    def loss(self, batch: FeatureBatch) -> HeadLoss:
        """Cross-entropy against the target's distribution at each step, weighted by powers of ``decay`` (upstream
        ``traineagle3``).

        As there, a prediction from ``t`` at step ``i`` counts where token ``t + i`` belongs to an answer. Here the mean
        is over those that count, there over all places of the batch. Also as there, a smaller draft vocabulary learns
        the target's distribution restricted to it, and nothing where the target's likeliest token is outside.
        """
        own = self.fc.weight.dtype
        outs = self(batch.ids[:, 1:], batch.hidden[:, :-1].to(own))
        return loss_by_depth(outs, batch, self._spec, self.norm, self.lm_head, self.decay, own)
