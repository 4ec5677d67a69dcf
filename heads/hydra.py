"""Hydra (Ankner et al. 2024, arXiv 2402.05109): Medusa's heads made sequential, each reads the tokens drafted before
its own.

Head ``i`` takes the target's state and the embeddings of the root and of the ``i`` tokens drafted after it, and guesses
the token ``i + 2`` places after the state's: a first block from all of them to one width, with a linear layer instead
of the residual path that Medusa's blocks have, K - 1 residual blocks, and a projection to the vocabulary with a bias.
``prefix`` is Hydra++'s: the heads read what a decoder layer of their own makes of all states so far, instead of the
last state itself.

The K blocks are distinct; the official code repeats one block K - 1 times, as Medusa's does. Its ``hydra_lm_head.pt``
holds the same tensors. With a prefix: ``hydra_mlp.{i}.1.linear`` and ``.res_connection`` are here
``heads.{i}.first.linear`` and ``.residual``, ``hydra_mlp.{i}.3.linear`` (and 5, 7, ..., one tensor under several names)
is ``heads.{i}.blocks.{k}.linear``, ``hydra_lm_head.{i}.1`` is ``heads.{i}.output``, ``prefix_embeding_layer.layers.0``
and ``.norm`` are ``prefix.layer`` and ``prefix.norm``. Without one there is no dropout between them:
``hydra_mlp.{i}.0``, ``hydra_mlp.{i}.1`` and on, and ``hydra_lm_head.{i}``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import nn

from heads.common.drafting import CachedHead, KVCache, Scored
from heads.common.growth import LevelNodes
from heads.common.layers import DecoderLayer, LayerShape, RMSNorm
from heads.common.losses import DepthPredictions, loss_of, rows_before
from koala_bench.errors import KoalaBenchError
from koala_bench.heads import Committed, FeatureBatch, HeadLoss, TargetSpec
from koala_bench.tree import DraftTree


class _Block(nn.Module):
    """``x + SiLU(W x + b)``; where several vectors come in, a linear layer takes them to the width of one in the place
    of ``x``.
    """

    def __init__(self, width: int, sources: int = 1) -> None:
        super().__init__()
        self.linear = nn.Linear(sources * width, width)
        self.residual = nn.Linear(sources * width, width) if sources > 1 else nn.Identity()
        nn.init.zeros_(self.linear.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.residual(x) + F.silu(self.linear(x))
        return out


class _Head(nn.Module):
    """One guesser, who knows ``tokens`` tokens: the root and those drafted after it."""

    def __init__(self, output_weight: torch.Tensor, tokens: int, layers: int) -> None:
        super().__init__()
        vocabulary, width = output_weight.shape
        self.first = _Block(width, 1 + tokens)
        self.blocks = nn.ModuleList(_Block(width) for _ in range(layers - 1))
        self.output = nn.Linear(width, vocabulary)
        with torch.no_grad():
            self.output.weight.copy_(output_weight)

    def feature(self, known: torch.Tensor) -> torch.Tensor:
        """What the projection reads, [rows, width], from a state and the tokens' embeddings [rows, (1 + tokens) *
        width].
        """
        x: torch.Tensor = self.first(known)
        for block in self.blocks:
            x = block(x)
        return x


class _Prefix(nn.Module):
    """A decoder layer of the target's shape and a norm, over all states so far."""

    def __init__(self, spec: TargetSpec) -> None:
        super().__init__()
        self.shape = LayerShape.of(spec)
        self.layer = DecoderLayer(self.shape)
        self.norm = RMSNorm(self.shape.width, self.shape.eps)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """What the heads read in the place of whole texts' states [batch, tokens, width]."""
        read: torch.Tensor = self.norm(self.layer(hidden, self.shape.rotary(hidden.shape[1], hidden)))
        return read


class Hydra(CachedHead):
    """``heads`` dependent guessers with ``layers`` blocks each.

    Blocks and projections start as the official code's: the blocks' W at zero, the projections as copies of the
    target's output layer, the linear layer on the residual path as PyTorch draws it. Its dropout of 0.2 is left out.

    Args:
        heads: how many tokens ahead it drafts.
        layers: blocks a head (KOALA's K).
        prefix: whether the heads read states through a decoder layer of the target's shape (Hydra++).
        labels: what they are trained on: ``data``, the data's tokens, as Medusa is and plain Hydra; or ``target``, the
            target's distribution (Hydra++).

    Raises:
        KoalaBenchError: there are no heads, no layers or no such labels.
    """

    features = (-1,)

    def __init__(
        self, spec: TargetSpec, heads: int = 4, layers: int = 1, prefix: bool = False, labels: str = "data"
    ) -> None:
        super().__init__(spec)
        for name, count in (("heads", heads), ("layers", layers)):
            if count < 1:
                raise KoalaBenchError(f"Hydra's number of {name} is {count}.", "It must be at least 1.")
        if labels not in ("data", "target"):
            raise KoalaBenchError(f"Hydra's labels are {labels!r}.", "They must be 'data' or 'target'.")
        self.max_depth, self.labels, self.soft_labels = heads, labels, labels == "target"
        self.heads = nn.ModuleList(_Head(spec.output_weight.detach(), head + 1, layers) for head in range(heads))
        self.prefix = _Prefix(spec) if prefix else None
        self._cached = (self.prefix.shape, 1) if self.prefix is not None else None

    def _head(self, index: int) -> _Head:
        found = self.heads[index]
        assert isinstance(found, _Head)
        return found

    # ------------------------------------------------------------------------------ decoding

    def prefill(self, new: Committed) -> None:
        """Let the prefix layer read a prompt, if there is one."""
        if self.prefix is not None:
            super().prefill(new)

    def draft(self, new: Committed) -> DraftTree:
        """Grow the tree level by level: a node depends on all drafted tokens above it."""
        if self.prefix is None and len(new.tokens) > 1:  # the last state is all that is read
            new = replace(new, tokens=new.tokens[-1:], hidden=new.hidden[-1:])
        return super().draft(new)

    def extend_cache(self, new: Committed, cache: KVCache) -> torch.Tensor:
        """The states that the heads read: the target's, or the prefix layer's, which writes its cache rows."""
        state, count = new.hidden[:, -1], new.tokens.shape[0]
        if self.prefix is None:
            return state
        places = cache.positions(0, count), cache.buffers[0], cache.rows(0, count), cache.causal_mask(count)
        read: torch.Tensor = self.prefix.norm(self.prefix.layer(state[None], *places)[0])
        return read

    def read(self, new: Committed, cache: KVCache) -> Scored:
        """Logits of the root's children; carries the state and the embeddings read so far, concatenated."""
        known = torch.cat([self.extend_cache(new, cache)[-1:], self._embed(new.tokens[-1:])], dim=-1)
        return self._scores(0, known), known

    def score_children(self, level: LevelNodes, carried: torch.Tensor, cache: KVCache) -> Scored:
        """Scores of the children of a level's nodes."""
        known = torch.cat([carried.index_select(0, level.parents), self._embed(level.tokens)], dim=-1)
        return self._scores(level.depth, known), known

    def _scores(self, head: int, known: torch.Tensor) -> torch.Tensor:
        guesser = self._head(head)
        return self._spec.spread(guesser.output(guesser.feature(known)))

    # ------------------------------------------------------------------------------ training

    def loss(self, batch: FeatureBatch) -> HeadLoss:
        """Sum over heads of the cross-entropy on answer tokens, against the data's tokens or the target's distribution.

        The latter is the teacher loss that Hydra++ is trained with (upstream ``hydra/train/train.py`` with a teacher
        weight of 1 and an LM weight of 0). Heads read the data's tokens, whatever was drafted before them.
        """
        return loss_of(self._guesses(batch), self._spec, self._head(0).output.weight.dtype)

    def _guesses(self, batch: FeatureBatch) -> Iterator[DepthPredictions]:
        own = self._head(0).output.weight.dtype
        hidden = batch.hidden[:, :, -1].to(own)
        states = (hidden if self.prefix is None else self.prefix(hidden)).flatten(0, 1)
        embedded, ids = self._embed(batch.ids).to(own).flatten(0, 1), batch.ids.flatten()
        soft = batch.soft_labels(self._spec) if self.labels == "target" else None
        for depth in range(1, self.max_depth + 1):
            guesser, rows = self._head(depth - 1), rows_before(batch.supervised, depth + 1)
            known = torch.cat([states[rows], *(embedded[rows + place] for place in range(1, depth + 1))], dim=-1)
            if soft is None:
                wanted = likeliest = self._spec.labels(ids[rows + depth + 1])
            else:
                wanted, likeliest = soft.probabilities[rows + depth], soft.likeliest[rows + depth]
            yield DepthPredictions(rows, guesser.feature(known), guesser.output, wanted, likeliest)
