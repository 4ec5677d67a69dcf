"""Draft trees that are grown level by level, static ones and EAGLE-2's, for any head whose scores depend on the path.

Such a head implements ``Grows``: ``read`` settles the new tokens and scores the children of the root, ``grow`` takes a
level of nodes and scores their children. What to grow is decided here, for all heads alike.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from koala_bench.decoding.candidates import Pick
from koala_bench.heads import Committed
from koala_bench.tree import DraftTree, DynamicTemplate, Template, TreeShape, TreeTemplate

# A head that drafts as deep as it is asked to; some end is needed to check trees against.
UNBOUNDED = 64


@dataclass(frozen=True)
class Grown:
    """Nodes of one level that are to be grown: their children's scores are wanted.

    Attributes:
        depth: of these nodes, 1 for children of the root. The token of a node at depth d stands d places behind the
            root's.
        tokens: int64 [nodes].
        parents: for each node the index of its parent among the nodes of the ``grow`` call before, int64 [nodes]; all 0
            at depth 1, where the parent is the root and ``read`` came before.
        seen: bool [nodes, before + nodes], which of the nodes grown in this draft, these included, each one attends to:
            those above it and itself. Nodes are counted in the order they were grown in; everything settled is seen
            besides.
        before: number of nodes grown before these in this draft.
    """

    depth: int
    tokens: torch.Tensor
    parents: torch.Tensor
    seen: torch.Tensor
    before: int


class Grows(Protocol):
    """A head whose scores of a token depend on the tokens before it."""

    def read(self, new: Committed) -> torch.Tensor:
        """Settle the new tokens; scores [1, vocab_size] of what follows the last of them, the root."""

    def grow(self, level: Grown) -> torch.Tensor:
        """Scores [nodes, vocab_size] of what follows each node of a level."""


# ------------------------------------------------------------------------------ what a template needs


@dataclass(frozen=True)
class Level:
    """What filling one level of a static template needs.

    Attributes:
        depth: of the nodes that are created, 1 for the root's children.
        ranks: candidates wanted of each inner node above.
        by_rank: where the new nodes' tokens stand in the flattened candidates [inner nodes above * ranks].
        by_turn: the same if candidates are drawn: a template may skip ranks, but the n-th sibling must be the n-th
            draw, or the siblings would not be draws without replacement from one distribution.
        grown: which of the new nodes have children themselves.
        parents, seen, before: of those, as in ``Grown``.
    """

    depth: int
    ranks: int
    by_rank: torch.Tensor
    by_turn: torch.Tensor
    grown: torch.Tensor
    parents: torch.Tensor
    seen: torch.Tensor
    before: int

    @property
    def count(self) -> int:
        """Number of new nodes with children."""
        return len(self.grown)


@dataclass(frozen=True)
class Levels:
    """A template, prepared for a device; made once for all steps by ``levels_of``.

    Attributes:
        template: what it was made of.
        each: levels of a static template from the root's children on; none for a dynamic one.
        rows: most nodes that are grown in a draft, so many key-value rows a head needs besides those of settled tokens.
        widest: most nodes that are grown at once.
    """

    template: Template
    each: tuple[Level, ...]
    rows: int
    widest: int


def levels_of(template: Template, device: torch.device) -> Levels:
    """Prepare a template, once for all steps."""
    if isinstance(template, DynamicTemplate):
        return Levels(template, (), template.expansions * template.width, template.width)
    prefixes = {path[:-1] for path in template.paths}
    levels = []
    inner: list[tuple[int, ...]] = [()]
    drafted: list[tuple[int, ...]] = []
    for depth in range(1, template.depth + 1):
        nodes = [path for path in template.paths if len(path) == depth]
        ranks = 1 + max(path[-1] for path in nodes)
        above = {path: index for index, path in enumerate(inner)}
        by_rank = [above[path[:-1]] * ranks + path[-1] for path in nodes]
        turn = dict.fromkeys(inner, 0)
        by_turn = []
        for path in nodes:
            by_turn.append(above[path[:-1]] * ranks + turn[path[:-1]])
            turn[path[:-1]] += 1
        grown = [path for path in nodes if path in prefixes]
        before = len(drafted)
        drafted += grown
        seen = torch.tensor(
            [[path[: len(row)] == row for row in drafted] for path in grown], dtype=torch.bool, device=device
        )
        places = {path: index for index, path in enumerate(nodes)}
        values = (by_rank, by_turn, [places[path] for path in grown], [above[path[:-1]] for path in grown])
        index = [torch.tensor(each, dtype=torch.int64, device=device) for each in values]
        levels.append(Level(depth, ranks, index[0], index[1], index[2], index[3], seen, before))
        inner = grown
    return Levels(template, tuple(levels), len(drafted), max((level.count for level in levels), default=0))


def draft(head: Grows, new: Committed, levels: Levels, pick: Pick) -> DraftTree:
    """Draft a tree of either kind, see ``fill`` and ``expand``; ``pick`` is for static ones."""
    return (
        expand(head, new, levels.template)
        if isinstance(levels.template, DynamicTemplate)
        else fill(head, new, levels, pick)
    )


# ------------------------------------------------------------------------------ static trees


def fill(head: Grows, new: Committed, levels: Levels, pick: Pick) -> DraftTree:
    """Draft a static tree: every inner node's candidates in the order of their ranks, or as they were drawn."""
    assert isinstance(levels.template, TreeTemplate), "expand() is for dynamic templates"
    logits = head.read(new)
    pieces = [new.tokens[-1:]]
    proposals = []
    for level in levels.each:
        ids, drawn_from = pick(logits, level.ranks)
        if drawn_from is not None:
            proposals.append(drawn_from)
        chosen = ids.flatten().index_select(0, level.by_rank if drawn_from is None else level.by_turn)
        pieces.append(chosen)
        if level.count:
            logits = head.grow(
                Grown(level.depth, chosen.index_select(0, level.grown), level.parents, level.seen, level.before)
            )
    return DraftTree(torch.cat(pieces), levels.template.shape, torch.cat(proposals) if proposals else None)


# ------------------------------------------------------------------------------ dynamic trees


def expand(head: Grows, new: Committed, template: DynamicTemplate) -> DraftTree:
    """Draft a dynamic tree, see ``expanded``. One read from the device."""
    tokens, parents = expanded(head, new, template)
    return DraftTree(tokens, TreeShape((-1, *parents.tolist())))


def expanded(head: Grows, new: Committed, template: DynamicTemplate) -> tuple[torch.Tensor, torch.Tensor]:
    """EAGLE-2's tree (upstream ``Model.topK_genrate``): nodes are ranked by the log-probability of their path.

    Of each level the best ``width`` nodes of all are grown. In the end the best ``drafted`` nodes of all levels are
    kept, in the order in which they were scored: by level, then by parent, then by rank. A node is never less likely
    than what hangs below it, and of equals the earlier is taken, so the parent of a kept node is kept. The candidates
    are not drawn.

    Returns:
        tokens [nodes] and the parents [nodes - 1] of all nodes but the root.
    """
    width = template.width
    found = _log_probabilities(head.read(new)).topk(width, dim=-1)
    tokens, scores = found.indices[0], found.values[0]  # of the nodes to grow, [width]
    own = torch.eye(width, dtype=torch.bool, device=tokens.device)
    above, seen = torch.zeros_like(tokens), own
    # Every node ever scored, level by level: its token and score; and for each ``width`` of them the number of their
    # parent, 0 for the root.
    all_tokens, all_scores, all_parents = [tokens], [scores], [above[:1]]
    numbers = torch.arange(1, width + 1, device=tokens.device)
    first = 1 + width  # number of the next level's first node
    for depth in range(1, template.depth):
        logits = head.grow(Grown(depth, tokens, above, seen, (depth - 1) * width))
        found = _log_probabilities(logits).topk(width, dim=-1)
        reached = (found.values + scores[:, None]).flatten()  # [width * width]
        offered = found.indices.flatten()
        all_tokens.append(offered)
        all_scores.append(reached)
        all_parents.append(numbers)
        if depth < template.expansions:
            scores, places = reached.topk(width)
            tokens, above, numbers = offered[places], places // width, places + first
            seen = torch.cat([seen[above], own], dim=1)
            first += width * width
    best = torch.cat(all_scores).sort(descending=True, stable=True).indices[: template.drafted]
    kept = best.sort().values
    wanted = torch.cat(all_parents)[kept // width]
    # A parent's place in the tree is the count of kept nodes up to it; there are none up to the root.
    return torch.cat([new.tokens[-1:], torch.cat(all_tokens)[kept]]), torch.searchsorted(kept, wanted)


def _log_probabilities(logits: torch.Tensor) -> torch.Tensor:
    """In float32 at least: sums along a path must not be rounded to half precision."""
    return torch.log_softmax(logits, dim=-1, dtype=torch.float64 if logits.dtype == torch.float64 else torch.float32)
