"""Shared by autoregressive heads: their KV cache, and one traced function per draft tree.

The head itself is stateless. ``read`` and ``score_children`` get the KV cache as an argument and write new rows into
it, so a whole draft is one function from committed tokens to tree tokens, which ``--engine graph`` traces.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol, cast

import torch
from torch import nn

from heads.common.growth import MAX_DEPTH, LevelNodes, Levels, draft, draft_static, dynamic_nodes, levels_of
from heads.common.layers import LayerShape
from koala_bench.decoding.candidates import Pick, best
from koala_bench.engine.cache import attention_mask
from koala_bench.heads import Committed, TargetSpec
from koala_bench.tree import DraftTree, DynamicTemplate, Template, TreeShape

Scored = tuple[torch.Tensor, torch.Tensor]
_ROW_BLOCK = 512  # cache capacities are multiples of it: few distinct sizes, and masks of even width for kernels


@dataclass(frozen=True)
class KVCache:
    """Keys and values of a head's layers: committed rows first, then the rows of the current draft.

    A head without attention has neither buffers nor a table.

    Attributes:
        buffers: [layers, 2, 1, kv_heads, capacity, head_dim].
        table: what the layers look up by position, [any, positions, ...], such as rotary factors [2, positions,
            head_dim].
        past: number of committed rows, an int; or a tensor [] if shapes are static, see ``TargetSpec.fixed_shapes``.
    """

    buffers: Any
    table: Any
    past: Any

    @classmethod
    def of(cls, shape: LayerShape, layers: int, capacity: int, like: torch.Tensor) -> KVCache:
        """An empty cache with the device and dtype of ``like``; positions extend ``MAX_DEPTH`` past the capacity."""
        size = (layers, 2, 1, shape.kv_heads, capacity, shape.head_dim)
        return cls(torch.zeros(size, dtype=like.dtype, device=like.device), shape.rotary(capacity + MAX_DEPTH, like), 0)

    def fits(self, capacity: int, dtype: torch.dtype) -> bool:
        """Whether the buffers have this capacity and dtype."""
        return self.buffers is not None and self.buffers.shape[-2] >= capacity and self.buffers.dtype == dtype

    def extended(self, count: int) -> KVCache:
        """The same buffers with ``count`` more committed rows."""
        return replace(self, past=self.past + count)

    def rows(self, first: int, count: int) -> Any:
        """Where to write ``count`` rows, ``first`` after the committed ones: index of the first one (int), or the
        indices [count] of all if shapes are static.
        """
        start = self.past + first
        return start + torch.arange(count, device=start.device) if isinstance(start, torch.Tensor) else start

    def positions(self, first: int, count: int) -> torch.Tensor:
        """The table's entries [any, count, ...] for the same rows."""
        start = self.past + first
        if isinstance(start, torch.Tensor):
            return self.table.index_select(1, start + torch.arange(count, device=start.device))
        return self.table[:, start : start + count]

    def causal_mask(self, count: int) -> torch.Tensor | None:
        """Additive mask [count, past + count] for newly committed tokens; None where attention needs no mask, that is
        for one token, or into an empty cache.
        """
        if not isinstance(self.past, torch.Tensor) and (count == 1 or (isinstance(self.past, int) and not self.past)):
            return None
        return self.tree_mask(torch.ones(count, count, dtype=torch.bool, device=self.buffers.device).tril())

    def tree_mask(self, visible: torch.Tensor) -> torch.Tensor:
        """Additive mask of a level, from ``LevelNodes.tree_mask``; all committed rows are attended to."""
        return attention_mask(~visible, self.past, self.buffers.shape[-2], self.buffers.dtype)


class AutoregressiveHead(Protocol):
    """A stateless head whose scores of a token depend on the tokens before it: a ``PathScorer`` given its cache."""

    def read(self, new: Committed, cache: KVCache) -> Scored:
        """Write the rows of newly committed tokens.

        Returns:
            logits [1, vocab_size] after the last of them, the root, and its state for ``score_children``, [1, any].
        """

    def score_children(self, level: LevelNodes, carried: torch.Tensor, cache: KVCache) -> Scored:
        """Write the rows of a level's nodes after those expanded before.

        Args:
            carried: states [parents, any] that the previous call returned.
            cache: with the new tokens committed.

        Returns:
            logits [nodes, vocab_size] after each node, and the nodes' states for the next level, [nodes, any].
        """

    def extend_cache(self, new: Committed, cache: KVCache) -> torch.Tensor:
        """Write the rows of newly committed tokens; the head's output for each, [new, any]."""


@dataclass(frozen=True)
class OnePass:
    """A stateless head that scores all levels of a tree at once, for ``Drafter``; a level's nodes get equal scores.

    Attributes:
        extend_cache: see ``AutoregressiveHead``.
        score_depths: writes the rows of newly committed tokens and scores what follows them, [depths, vocab_size].
    """

    extend_cache: Callable[[Committed, KVCache], torch.Tensor]
    score_depths: Callable[[Committed, KVCache], torch.Tensor]

    def read(self, new: Committed, cache: KVCache) -> Scored:
        """As for ``PathScorer``; the state is the scores of all depths."""
        scores = self.score_depths(new, cache)
        return scores[:1], scores

    def score_children(self, level: LevelNodes, carried: torch.Tensor, cache: KVCache) -> Scored:
        """As for ``PathScorer``; passes the state on unchanged."""
        return carried[level.depth].expand(len(level.tokens), -1), carried


class _DraftPass:
    """The state of one draft in progress, as a ``PathScorer``."""

    def __init__(self, head: AutoregressiveHead | _TracedLevels, cache: KVCache) -> None:
        self._head, self._cache = head, cache

    def read(self, new: Committed) -> torch.Tensor:
        scores, self._carried = self._head.read(new, self._cache)
        self._cache = self._cache.extended(new.tokens.shape[0])
        return scores

    def score_children(self, level: LevelNodes) -> torch.Tensor:
        scores, self._carried = self._head.score_children(level, self._carried, self._cache)
        return scores


@dataclass
class DraftState:
    """State of drafting for one sequence.

    Attributes:
        levels: of the tree template.
        draft_best: traced function that drafts a whole tree of most likely tokens.
        cache: of the tokens that the head has read.
    """

    levels: Levels
    draft_best: Callable[..., Any]
    cache: KVCache


class Drafter:
    """Drafts for a head. Holds traced functions but no sequence state, so copies of a head may share it.

    A draft of the most likely tokens is one traced function. Where candidates are sampled, which takes the host's
    random numbers, each level is one.
    """

    def __init__(self, head: AutoregressiveHead, spec: TargetSpec) -> None:
        self._head, self._record, self._fixed = head, spec.record, spec.fixed_shapes
        self._prepared: dict[tuple[Template, torch.device], tuple[Levels, Callable[..., Any]]] = {}
        self._traced_levels = _TracedLevels(head, spec)

    def begin(
        self, state: DraftState | None, template: Template, capacity: int, like: torch.Tensor,
        empty: Callable[[int], KVCache] | None,
    ) -> DraftState:  # fmt: skip
        """State for a new sequence of at most ``capacity`` tokens; the buffers of the previous ``state`` are reused if
        they fit.

        Args:
            like: a tensor with the head's device and dtype.
            empty: makes an empty cache with so many rows, if the head has one.
        """
        levels, draft_best = self._prepare(template, like.device)
        if empty is None:
            return DraftState(levels, draft_best, KVCache(None, None, 0))
        needed = capacity + levels.rows
        if state is not None and state.cache.fits(needed, like.dtype):
            return DraftState(levels, draft_best, replace(state.cache, past=0))
        return DraftState(levels, draft_best, empty(-(-needed // _ROW_BLOCK) * _ROW_BLOCK))

    def prefill(self, state: DraftState, new: Committed) -> None:
        """Read committed tokens without drafting. Not traced: an empty cache needs no mask for causal attention."""
        self._head.extend_cache(new, state.cache)
        state.cache = state.cache.extended(len(new.tokens))

    def draft(self, state: DraftState, new: Committed, pick: Pick) -> DraftTree:
        """Read newly committed tokens and draft a tree."""
        template, count = state.levels.template, len(new.tokens)
        if count > 1 and (not state.cache.past or (self._fixed and count > template.depth + 1)):
            # A prompt: its length hardly comes again, and a traced pass would need a mask of [count, count].
            self.prefill(state, replace(new, tokens=new.tokens[:-1], hidden=new.hidden[:-1]))
            new, count = Committed(new.tokens[-1:], new.hidden[-1:], new.position + count - 1), 1
        cache = state.cache
        state.cache = cache.extended(count)
        if pick is not best:
            return draft(_DraftPass(self._traced_levels, cache), new, state.levels, pick)
        drafted = state.draft_best(new.tokens, new.hidden, cache.past, cache.buffers, cache.table)
        if isinstance(template, DynamicTemplate):
            tokens, parents = drafted
            return DraftTree(tokens, TreeShape((-1, *parents.tolist())))
        return DraftTree(drafted, template.shape)

    def _prepare(self, template: Template, device: torch.device) -> tuple[Levels, Callable[..., Any]]:
        key = (template, device)
        if key not in self._prepared:
            levels = levels_of(template, device)
            traced = self._record(partial(self._draft_best, levels), ((0,), (0,), (), (4,), (1,)), (3, 4))
            self._prepared[key] = (levels, traced)
        return self._prepared[key]

    def _draft_best(
        self, levels: Levels, tokens: torch.Tensor, hidden: torch.Tensor, past: int, buffers: torch.Tensor,
        table: torch.Tensor,
    ) -> Any:  # fmt: skip
        """Tokens [nodes] of a tree of the most likely tokens, and of a dynamic tree also the nodes' parents."""
        scorer, new = _DraftPass(self._head, KVCache(buffers, table, past)), Committed(tokens, hidden, 0)
        if isinstance(levels.template, DynamicTemplate):
            return dynamic_nodes(scorer, new, levels.template)
        return draft_static(scorer, new, levels, best).tokens


class CachedHead(nn.Module):
    """A draft head with a KV cache of the committed tokens; the ``AutoregressiveHead`` that its drafter drafts for.

    A subclass sets ``_cached``, the shape and number of its layers with a cache, if it has any.
    """

    max_depth: int
    _cached: tuple[LayerShape, int] | None = None

    def __init__(self, spec: TargetSpec) -> None:
        super().__init__()
        self.pick: Pick = best
        # The target's own modules, held where neither state_dict() nor parameters() finds them.
        self._embed, self._spec = spec.embed, spec
        self._drafter = Drafter(cast(AutoregressiveHead, self), spec)
        self._state: DraftState | None = None

    def begin(self, template: Template, capacity: int) -> None:
        """Forget the sequence; buffers are kept while they fit."""
        template.check(depth=self.max_depth, candidates=self._spec.drafted)
        like, cached = next(self.parameters()), self._cached
        empty = None if cached is None else lambda rows: KVCache.of(*cached, rows, like)
        self._state = self._drafter.begin(self._state, template, capacity, like, empty)

    def prefill(self, new: Committed) -> None:
        """Write the rows of a prompt's pairs."""
        assert self._state is not None, "begin() comes before prefill()"
        self._drafter.prefill(self._state, new)

    def draft(self, new: Committed) -> DraftTree:
        """Write the rows of the newly committed pairs, then draft behind the last one."""
        assert self._state is not None, "begin() comes before draft()"
        return self._drafter.draft(self._state, new, self.pick)


class _TracedLevels:
    """A head's ``read`` and ``score_children``, each traced by itself."""

    def __init__(self, head: AutoregressiveHead, spec: TargetSpec) -> None:
        self._head, self._record = head, spec.record
        self._traced_read = spec.record(self._read, ((0,), (0,), (), (4,), (1,)), (3, 4))
        self._traced_depths: dict[int, Callable[..., Any]] = {}

    def read(self, new: Committed, cache: KVCache) -> Scored:
        scores, carried = self._traced_read(new.tokens, new.hidden, cache.past, cache.buffers, cache.table)
        return scores, carried

    def score_children(self, level: LevelNodes, carried: torch.Tensor, cache: KVCache) -> Scored:
        if level.depth not in self._traced_depths:
            dynamic_dims = ((0,), (0,), (0, 1), (0,), (), (4,), (1,))
            scoring = partial(self._score_children, level.depth)
            self._traced_depths[level.depth] = self._record(scoring, dynamic_dims, (5, 6))
        scores, carried = self._traced_depths[level.depth](
            level.tokens, level.parents, level.tree_mask, carried, cache.past, cache.buffers, cache.table
        )
        return scores, carried

    def _read(
        self, tokens: torch.Tensor, hidden: torch.Tensor, past: int, buffers: torch.Tensor, table: torch.Tensor
    ) -> Scored:
        return self._head.read(Committed(tokens, hidden, 0), KVCache(buffers, table, past))

    def _score_children(
        self, depth: int, tokens: torch.Tensor, parents: torch.Tensor, tree_mask: torch.Tensor, carried: torch.Tensor,
        past: int, buffers: torch.Tensor, table: torch.Tensor,
    ) -> Scored:  # fmt: skip
        level = LevelNodes(depth, tokens, parents, tree_mask, tree_mask.shape[1] - tree_mask.shape[0])
        return self._head.score_children(level, carried, KVCache(buffers, table, past))
