"""What heads share that grow a tree token by token: what they remember of a text, and one recorded pass for a whole
draft.

Such a head computes; it keeps nothing. Its ``read`` and ``grow`` get what is remembered as an argument and write new
rows into it, so that from the settled tokens to the tokens of the tree a draft is one function, which ``--engine
graph`` records as a whole.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

import torch

from heads.common.growth import UNBOUNDED, Grown, Levels, draft, expanded, fill, levels_of
from heads.common.layers import LayerShape
from koala_bench.decoding.candidates import Pick, best
from koala_bench.engine.cache import hiding
from koala_bench.heads import Committed, TargetSpec
from koala_bench.tree import DraftTree, DynamicTemplate, Template, TreeShape

Scored = tuple[torch.Tensor, torch.Tensor]
# of which a memory holds a multiple: few different sizes come up, and attention kernels want masks of even sizes
_ROWS = 512


@dataclass(frozen=True)
class Memory:
    """Keys and values of some layers: those of settled tokens, and behind them those of one draft.

    A head that remembers nothing has neither buffers nor a table.

    Attributes:
        buffers: [layers, 2, 1, kv_heads, capacity, head_dim]; each layer takes its own as ``rows``.
        table: what the layers want to know of positions, [any, positions, ...], as the rotary table [2, positions,
            head_dim].
        settled: number of settled rows; a tensor [] where all shapes have to stay the same, see
            ``TargetSpec.fixed_shapes``.
    """

    buffers: Any
    table: Any
    settled: Any

    @classmethod
    def of(cls, shape: LayerShape, layers: int, capacity: int, like: torch.Tensor) -> Memory:
        """An empty one of ``capacity`` rows, where ``like`` is and of its dtype; positions reach as much further as a
        draft can.
        """
        buffers = torch.zeros(
            layers, 2, 1, shape.kv_heads, capacity, shape.head_dim, dtype=like.dtype, device=like.device
        )
        return cls(buffers, shape.rotary(capacity + UNBOUNDED, like), 0)

    def fits(self, capacity: int, dtype: torch.dtype) -> bool:
        """Whether there are as many rows, in this dtype."""
        return self.buffers is not None and self.buffers.shape[-2] >= capacity and self.buffers.dtype == dtype

    def after(self, count: int) -> Memory:
        """With ``count`` more settled rows."""
        return replace(self, settled=self.settled + count)

    def rows(self, first: int, count: int) -> Any:
        """Where ``count`` new rows go, ``first`` behind the settled ones: the number of the first, or the numbers
        [count] as a tensor.
        """
        start = self.settled + first
        return start + torch.arange(count, device=start.device) if isinstance(start, torch.Tensor) else start

    def positions(self, first: int, count: int) -> torch.Tensor:
        """The table's entries [any, count, ...] of as many positions."""
        start = self.settled + first
        if isinstance(start, torch.Tensor):
            return self.table.index_select(1, start + torch.arange(count, device=start.device))
        return self.table[:, start : start + count]

    def causal(self, count: int) -> torch.Tensor | None:
        """Mask [count, settled + count] of tokens settled at once: each sees those up to its own.

        None where no mask is needed: one token sees everything, and behind no rows the attention is plainly causal.
        """
        if not isinstance(self.settled, torch.Tensor) and (
            count == 1 or (isinstance(self.settled, int) and not self.settled)
        ):
            return None
        return self._mask(torch.ones(count, count, dtype=torch.bool, device=self.buffers.device).tril())

    def seeing(self, seen: torch.Tensor) -> torch.Tensor:
        """Mask of a level, from which of the nodes grown in this draft each of its nodes sees, bool [nodes, grown]; see
        ``Grown``.
        """
        return self._mask(seen)

    def _mask(self, seen: torch.Tensor) -> torch.Tensor:
        return hiding(~seen, self.settled, self.buffers.shape[-2], self.buffers.dtype)


class _Scoring(Protocol):
    """The passes of a draft, of a head that keeps nothing itself."""

    def read(self, new: Committed, memory: Memory) -> Scored:
        """Write the rows of newly settled tokens.

        Returns:
            scores [1, vocab_size] of what follows the last of them, the root, and what ``grow`` wants to have of it,
            [1, any].
        """

    def grow(self, level: Grown, carried: torch.Tensor, memory: Memory) -> Scored:
        """Write the rows of a level's nodes behind those grown before.

        Args:
            carried: of the nodes that were grown last, or of the root.
            memory: with the new tokens settled.

        Returns:
            scores [nodes, vocab_size] of what follows each node, and what the next level wants to have of them, [nodes,
            any].
        """


class Remembering(_Scoring, Protocol):
    """A head whose scores of a token depend on the tokens before it, and which keeps nothing itself."""

    def settle(self, new: Committed, memory: Memory) -> torch.Tensor:
        """Write the rows of newly settled tokens; what comes out of each of them, [new, any]."""


class _Live:
    """One draft in the making, for ``heads.common.growth``: what goes from one of its passes to the next."""

    def __init__(self, head: _Scoring, memory: Memory) -> None:
        self._head, self._memory = head, memory

    def read(self, new: Committed) -> torch.Tensor:
        scores, self._carried = self._head.read(new, self._memory)
        self._memory = self._memory.after(new.tokens.shape[0])
        return scores

    def grow(self, level: Grown) -> torch.Tensor:
        scores, self._carried = self._head.grow(level, self._carried, self._memory)
        return scores


@dataclass
class Text:
    """A text that is being continued.

    Attributes:
        levels: of the template of its drafts.
        whole: a whole draft of the best tokens.
        memory: of the tokens that the head has read.
    """

    levels: Levels
    whole: Callable[..., Any]
    memory: Memory


class Drafter:
    """Drafts for a head. Texts apart it keeps nothing but recordings, so that copies of a head may share it.

    Drafts of the best tokens are one pass. Where candidates are drawn, which takes the host's random numbers, each
    level is one.
    """

    def __init__(self, head: Remembering, spec: TargetSpec) -> None:
        self._head, self._record, self._fixed = head, spec.record, spec.fixed_shapes
        self._prepared: dict[tuple[Template, torch.device], tuple[Levels, Callable[..., Any]]] = {}
        self._passes = _Passes(head, spec)

    def begin(
        self,
        text: Text | None,
        template: Template,
        capacity: int,
        like: torch.Tensor,
        empty: Callable[[int], Memory] | None,
    ) -> Text:
        """A text of at most ``capacity`` tokens of which nothing is known yet; buffers of the one before are kept while
        they fit.

        Args:
            like: a tensor of the head's dtype, where the head is.
            empty: makes a memory of so many rows, if the head has any.
        """
        levels, whole = self._for(template, like.device)
        if empty is None:
            return Text(levels, whole, Memory(None, None, 0))
        needed = capacity + levels.rows
        if text is not None and text.memory.fits(needed, like.dtype):
            return Text(levels, whole, replace(text.memory, settled=0))
        return Text(levels, whole, empty(-(-needed // _ROWS) * _ROWS))

    def prefill(self, text: Text, new: Committed) -> None:
        """Read settled tokens without a draft. Not recorded: behind no rows attention is causal and needs no mask."""
        self._head.settle(new, text.memory)
        text.memory = text.memory.after(len(new.tokens))

    def draft(self, text: Text, new: Committed, pick: Pick) -> DraftTree:
        """Read the newly settled tokens and grow the tree."""
        template, count = text.levels.template, len(new.tokens)
        if count > 1 and (not text.memory.settled or (self._fixed and count > template.depth + 1)):
            # A prompt: no count that comes again, and a recorded pass would want a mask of [count, count].
            self.prefill(text, replace(new, tokens=new.tokens[:-1], hidden=new.hidden[:-1]))
            new, count = Committed(new.tokens[-1:], new.hidden[-1:], new.position + count - 1), 1
        memory = text.memory
        text.memory = memory.after(count)
        if pick is not best:
            return draft(_Live(self._passes, memory), new, text.levels, pick)
        found = text.whole(new.tokens, new.hidden, memory.settled, memory.buffers, memory.table)
        if isinstance(template, DynamicTemplate):
            tokens, parents = found
            return DraftTree(tokens, TreeShape((-1, *parents.tolist())))
        return DraftTree(found, template.shape)

    def _for(self, template: Template, device: torch.device) -> tuple[Levels, Callable[..., Any]]:
        key = (template, device)
        if key not in self._prepared:
            levels = levels_of(template, device)
            self._prepared[key] = (
                levels,
                self._record(partial(self._whole, levels), ((0,), (0,), (), (4,), (1,)), (3, 4)),
            )
        return self._prepared[key]

    def _whole(
        self,
        levels: Levels,
        tokens: torch.Tensor,
        hidden: torch.Tensor,
        settled: int,
        buffers: torch.Tensor,
        table: torch.Tensor,
    ) -> Any:
        """Tokens [nodes] of a tree of the best ones, and of a dynamic tree also the nodes' parents."""
        live, new = _Live(self._head, Memory(buffers, table, settled)), Committed(tokens, hidden, 0)
        if isinstance(levels.template, DynamicTemplate):
            return expanded(live, new, levels.template)
        return fill(live, new, levels, best).tokens


class _Passes:
    """A head's passes one by one, each of them recorded."""

    def __init__(self, head: Remembering, spec: TargetSpec) -> None:
        self._head, self._record = head, spec.record
        self._read = spec.record(self._reading, ((0,), (0,), (), (4,), (1,)), (3, 4))
        self._grow: dict[int, Callable[..., Any]] = {}

    def read(self, new: Committed, memory: Memory) -> Scored:
        scores, carried = self._read(new.tokens, new.hidden, memory.settled, memory.buffers, memory.table)
        return scores, carried

    def grow(self, level: Grown, carried: torch.Tensor, memory: Memory) -> Scored:
        if level.depth not in self._grow:
            self._grow[level.depth] = self._record(
                partial(self._growing, level.depth), ((0,), (0,), (0, 1), (0,), (), (4,), (1,)), (5, 6)
            )
        scores, carried = self._grow[level.depth](
            level.tokens, level.parents, level.seen, carried, memory.settled, memory.buffers, memory.table
        )
        return scores, carried

    def _reading(
        self, tokens: torch.Tensor, hidden: torch.Tensor, settled: int, buffers: torch.Tensor, table: torch.Tensor
    ) -> Scored:
        return self._head.read(Committed(tokens, hidden, 0), Memory(buffers, table, settled))

    def _growing(
        self, depth: int, tokens: torch.Tensor, parents: torch.Tensor, seen: torch.Tensor, carried: torch.Tensor, settled: int, buffers: torch.Tensor,
        table: torch.Tensor,
    ) -> Scored:  # fmt: skip
        before = seen.shape[1] - seen.shape[0]
        return self._head.grow(Grown(depth, tokens, parents, seen, before), carried, Memory(buffers, table, settled))
