"""DFlash (Chen et al. 2026, arXiv 2602.06036): a block of masked places filled in one pass over the target's states.

The root of the tree and ``depths`` masked places behind it are one block. Its places attend to each other in both
directions, and in every layer to keys and values made of the target's states, fused as EAGLE-3 fuses them. The d-th
masked place guesses the token that stands there, by the target's own output layer. So the K layers are paid once for a
draft, and what was committed before costs only its keys and values.

As in the paper: what attends to what, the target's frozen embedding and output layer, weights that fall with depth.
Ours: layers are the target's kind (the paper's have Qwen3's norms of queries and keys), three fused states (the paper's
are five), a learnt vector for the mask (there the embedding of a token that no text holds), training on the target's
distribution as the other heads here do (there on tokens), and a block behind every token (there behind some, drawn at
random).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import nn

from heads.common.drafting import CachedHead, Drafter, KVCache, OnePass
from heads.common.layers import DecoderLayer, LayerShape, RMSNorm, attend_unrolled
from heads.common.losses import loss_by_depth
from heads.eagle3 import fused_layers
from koala_bench.engine.cache import write_rows
from koala_bench.errors import KoalaBenchError
from koala_bench.heads import Committed, FeatureBatch, HeadLoss, TargetSpec
from koala_bench.tree import Template


class DFlash(CachedHead):
    """Draft head whose ``layers`` decoder layers fill a block of ``depths`` masked places at once.

    Args:
        layers: decoder layers (KOALA's K; the paper has 5).
        depths: masked places, in training and in every draft, however deep its tree (the paper: 15, or 9).
        decay: weight of a depth's loss over that of the depth before (the paper: exp(-1 / gamma)).

    Raises:
        KoalaBenchError: there are no layers or no depths.
    """

    soft_labels = True

    def __init__(self, spec: TargetSpec, layers: int = 1, depths: int = 4, decay: float = 0.8) -> None:
        super().__init__(spec)
        if min(layers, depths) < 1:
            raise KoalaBenchError(f"DFlash with {layers} layers and {depths} depths.", "Both must be at least 1.")
        self.features = fused_layers(spec.layers)
        self.max_depth, self.decay = depths, decay
        self.shape = LayerShape.of(spec)
        width = self.shape.width
        self.fc = nn.Linear(3 * width, width, bias=False)
        self.hidden_norm = RMSNorm(width, self.shape.eps)
        self.layers = nn.ModuleList(DecoderLayer(self.shape) for _ in range(layers))
        self.norm = RMSNorm(width, self.shape.eps)
        # It goes the way of embeddings, so it starts as large as they are.
        with torch.no_grad():
            scale = spec.embed(torch.arange(spec.vocab_size, device=spec.device)).float().std().cpu()
            self.mask_embedding = nn.Parameter(scale * torch.randn(width))
        self._cached = self.shape, layers
        self._drafter = Drafter(OnePass(self._extend_cache, self._score_depths), spec)

    @property
    def _decoders(self) -> Sequence[DecoderLayer]:
        return cast("Sequence[DecoderLayer]", self.layers)

    def _context(self, hidden: torch.Tensor) -> torch.Tensor:
        """Fused states [..., width], which layers attend to, of the target's states [..., features, width]."""
        fused: torch.Tensor = self.hidden_norm(self.fc(hidden[..., :3, :].flatten(-2)))
        return fused

    def _block(self, roots: torch.Tensor) -> torch.Tensor:
        """Inputs of the first layer [..., 1 + depths, width]: roots int64 [...] and the masked places behind them."""
        embedded = self._embed(roots).to(self.mask_embedding.dtype)[..., None, :]
        masked = self.mask_embedding.expand(*roots.shape, self.max_depth, -1)
        return torch.cat([embedded, masked], dim=-2)

    # ------------------------------------------------------------------------------ decoding

    def begin(self, template: Template, capacity: int) -> None:
        """Forget the sequence, with room for the block behind it."""
        super().begin(template, capacity + 1 + self.max_depth)

    def _extend_cache(self, new: Committed, cache: KVCache) -> torch.Tensor:
        """Write the rows of committed states in all layers; what these attend to, [new, width]."""
        count, context = len(new.tokens), self._context(new.hidden)
        table, rows = cache.positions(0, count), cache.rows(0, count)
        for layer, own in zip(self._decoders, cache.buffers.unbind(0), strict=True):
            write_rows(own, rows, *layer.self_attn.keys_values(context[None], table))
        return context

    def _score_depths(self, new: Committed, cache: KVCache) -> torch.Tensor:
        """Scores [depths, vocab_size] of the tokens behind the root; the block's rows are written behind the committed
        ones, where the next draft overwrites them.
        """
        count, x = new.tokens.shape[0], self._block(new.tokens[-1:])
        context, block = self._context(new.hidden)[None], x.shape[1]
        table, rows = cache.positions(0, count + block), cache.rows(0, count + block)
        every = torch.ones(block, block, dtype=torch.bool, device=x.device)
        mask = cache.extended(count).tree_mask(every)
        for layer, own in zip(self._decoders, cache.buffers.unbind(0), strict=True):
            x = layer(x, table, own, rows, mask, context=context)
        return self._spec.output(self.norm(x[0, 1:]))

    # ------------------------------------------------------------------------------ training

    def forward(self, ids: torch.Tensor, hidden: torch.Tensor) -> list[torch.Tensor]:
        """By depth, the last layer's output [batch, tokens, width] at the masked places of a block after each token.

        Memory grows with depths * tokens ** 2, as P-EAGLE's does.

        Args:
            ids: int64 [batch, tokens]; ``ids[:, t]`` is the token after the one whose states are ``hidden[:, t]``.
            hidden: [batch, tokens, features, width].
        """
        tokens, context = ids.shape[1], self._context(hidden)
        x = self._block(ids).flatten(1, 2)  # [batch, tokens * block, width]
        block = 1 + self.max_depth
        positions = self.shape.rotary(tokens + block, x)
        places = torch.arange(tokens, device=x.device)[:, None] + torch.arange(1, 1 + block, device=x.device)
        table = positions[:, places.flatten()]
        for layer in self._decoders:
            assert layer.input_layernorm is not None
            attention, normed = layer.self_attn, layer.input_layernorm(x)
            own = (each.unflatten(2, (-1, block)).unbind(3) for each in attention.keys_values(normed, table))
            steps = [attention.keys_values(context, positions[:, :tokens]), *zip(*own, strict=True)]
            queries = attention.queries(normed, table).unflatten(2, (-1, block)).unbind(3)
            attended = torch.stack([attend_unrolled(each, steps) for each in queries], dim=3).flatten(2, 3)
            x = layer.after(x, attention.joined(attended))
        return list(x.unflatten(1, (-1, block)).unbind(2)[1:])

    def loss(self, batch: FeatureBatch) -> HeadLoss:
        """As EAGLE-3's: cross-entropy against the target's distribution at each depth."""
        own = self.fc.weight.dtype
        outs = self(batch.ids[:, 1:], batch.hidden[:, :-1].to(own))
        return loss_by_depth(outs, batch, self._spec, self.norm, self._spec.score, self.decay, own)
