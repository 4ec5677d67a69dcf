"""Build draft trees level by level: static templates and EAGLE-2's dynamic trees.

For any head whose scores depend on the path to a token. Such a head implements ``PathScorer``; which nodes are
expanded is decided here, for all heads alike.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from koala_bench.decoding.candidates import Pick
from koala_bench.heads import Committed
from koala_bench.tree import DraftTree, DynamicTemplate, Template, TreeShape, TreeTemplate

MAX_DEPTH = 64  # of trees for autoregressive heads, which have no limit of their own


@dataclass(frozen=True)
class LevelNodes:
    """The nodes of one level whose children the head scores next.

    Attributes:
        depth: of these nodes, 1 for children of the root. Their position is the root's plus ``depth``.
        tokens: int64 [nodes].
        parents: index of each node's parent among the nodes of the previous call, int64 [nodes]; all 0 at depth 1,
            where the parent is the root.
        tree_mask: bool [nodes, offset + nodes], True where a node attends to a node expanded in this draft: its
            ancestors and itself. Columns are in order of expansion. All committed tokens are attended to besides.
        offset: number of nodes expanded before these in this draft.
    """

    depth: int
    tokens: torch.Tensor
    parents: torch.Tensor
    tree_mask: torch.Tensor
    offset: int


class PathScorer(Protocol):
    """A head whose scores of a token depend on the tokens before it."""

    def read(self, new: Committed) -> torch.Tensor:
        """Read newly committed tokens; logits [1, vocab_size] after the last of them, the root."""

    def score_children(self, level: LevelNodes) -> torch.Tensor:
        """Logits [nodes, vocab_size] after each node of a level."""


# ------------------------------------------------------------------------------ prepared templates


@dataclass(frozen=True)
class Level:
    """One level of a static template as index tensors.

    Attributes:
        depth: of the new nodes, 1 for the root's children.
        ranks: candidates taken for each parent.
        by_rank: index of each new node's token in the flattened candidates [parents * ranks].
        by_draw: the same for sampled candidates: the n-th sibling is the n-th draw, even if the template skips ranks;
            otherwise siblings would not be draws without replacement from one distribution.
        inner: indices of the new nodes that have children.
        parents, tree_mask, offset: of those inner nodes, as in ``LevelNodes``.
    """

    depth: int
    ranks: int
    by_rank: torch.Tensor
    by_draw: torch.Tensor
    inner: torch.Tensor
    parents: torch.Tensor
    tree_mask: torch.Tensor
    offset: int


@dataclass(frozen=True)
class Levels:
    """A template prepared for a device by ``levels_of``.

    Attributes:
        template: its source.
        each: levels of a static template from the root's children on; empty for a dynamic one.
        rows: most nodes expanded in a draft, and so the KV cache rows it needs beyond the committed tokens.
    """

    template: Template
    each: tuple[Level, ...]
    rows: int


def levels_of(template: Template, device: torch.device) -> Levels:
    """Prepare a template, once for all steps."""
    if isinstance(template, DynamicTemplate):
        return Levels(template, (), template.expansions * template.width)
    prefixes = {path[:-1] for path in template.paths}
    levels = []
    parents: list[tuple[int, ...]] = [()]
    expanded: list[tuple[int, ...]] = []
    for depth in range(1, template.depth + 1):
        nodes = [path for path in template.paths if len(path) == depth]
        ranks = 1 + max(path[-1] for path in nodes)
        parent_index = {path: index for index, path in enumerate(parents)}
        draws = dict.fromkeys(parents, 0)
        by_rank, by_draw = [], []
        for path in nodes:
            parent, first = path[:-1], parent_index[path[:-1]] * ranks
            by_rank.append(first + path[-1])
            by_draw.append(first + draws[parent])
            draws[parent] += 1
        inner = [path for path in nodes if path in prefixes]
        offset = len(expanded)
        expanded += inner
        ancestors = [[path[: len(other)] == other for other in expanded] for path in inner]
        node_index = {path: index for index, path in enumerate(nodes)}
        values = (by_rank, by_draw, [node_index[path] for path in inner], [parent_index[path[:-1]] for path in inner])
        index = [torch.tensor(each, dtype=torch.int64, device=device) for each in values]
        tree_mask = torch.tensor(ancestors, dtype=torch.bool, device=device)
        levels.append(Level(depth, ranks, index[0], index[1], index[2], index[3], tree_mask, offset))
        parents = inner
    return Levels(template, tuple(levels), len(expanded))


def draft(head: PathScorer, new: Committed, levels: Levels, pick: Pick) -> DraftTree:
    """Draft a tree of either kind; ``pick`` applies to static ones only."""
    if isinstance(levels.template, DynamicTemplate):
        return draft_dynamic(head, new, levels.template)
    return draft_static(head, new, levels, pick)


# ------------------------------------------------------------------------------ static trees


def draft_static(head: PathScorer, new: Committed, levels: Levels, pick: Pick) -> DraftTree:
    """Fill a static template: each node's candidates by rank, or in the order they were sampled."""
    assert isinstance(levels.template, TreeTemplate), "draft_dynamic() is for dynamic templates"
    logits = head.read(new)
    tokens = [new.tokens[-1:]]
    proposals = []
    for level in levels.each:
        ids, distribution = pick(logits, level.ranks)
        if distribution is not None:
            proposals.append(distribution)
        chosen = ids.flatten().index_select(0, level.by_rank if distribution is None else level.by_draw)
        tokens.append(chosen)
        if len(level.inner):
            inner = chosen.index_select(0, level.inner)
            logits = head.score_children(LevelNodes(level.depth, inner, level.parents, level.tree_mask, level.offset))
    return DraftTree(torch.cat(tokens), levels.template.shape, torch.cat(proposals) if proposals else None)


# ------------------------------------------------------------------------------ dynamic trees


def draft_dynamic(head: PathScorer, new: Committed, template: DynamicTemplate) -> DraftTree:
    """Draft a dynamic tree, see ``dynamic_nodes``. One read from the device."""
    tokens, parents = dynamic_nodes(head, new, template)
    return DraftTree(tokens, TreeShape((-1, *parents.tolist())))


def dynamic_nodes(head: PathScorer, new: Committed, template: DynamicTemplate) -> tuple[torch.Tensor, torch.Tensor]:
    """EAGLE-2's tree (upstream ``Model.topK_genrate``): nodes are ranked by the log-probability of their path.

    The best ``width`` nodes of each level are expanded. Then the best ``drafted`` nodes of all levels are kept, ordered
    by level, parent and rank. A node scores no higher than its parent and ties go to the earlier node, so the parent of
    every kept node is kept. Candidates are never sampled.

    Returns:
        tokens [nodes], and parents [nodes - 1] of all nodes but the root.
    """
    width = template.width
    top = _log_probabilities(head.read(new)).topk(width, dim=-1)
    tokens, scores = top.indices[0], top.values[0]  # of the nodes to expand, [width]
    diagonal = torch.eye(width, dtype=torch.bool, device=tokens.device)
    parents, tree_mask = torch.zeros_like(tokens), diagonal
    # All scored nodes, level by level. Each run of ``width`` siblings shares one entry of all_parents; 0 is the root.
    all_tokens, all_scores, all_parents = [tokens], [scores], [parents[:1]]
    numbers = torch.arange(1, width + 1, device=tokens.device)  # of the nodes to expand, among all scored
    first = 1 + width  # number of the next level's first node
    for depth in range(1, template.depth):
        logits = head.score_children(LevelNodes(depth, tokens, parents, tree_mask, (depth - 1) * width))
        top = _log_probabilities(logits).topk(width, dim=-1)
        path_scores = (top.values + scores[:, None]).flatten()  # [width * width]
        candidates = top.indices.flatten()
        all_tokens.append(candidates)
        all_scores.append(path_scores)
        all_parents.append(numbers)
        if depth < template.expansions:
            scores, index = path_scores.topk(width)
            tokens, parents, numbers = candidates[index], index // width, index + first
            tree_mask = torch.cat([tree_mask[parents], diagonal], dim=1)
            first += width * width
    ranked = torch.cat(all_scores).sort(descending=True, stable=True).indices[: template.drafted]
    kept = ranked.sort().values
    kept_parents = torch.cat(all_parents)[kept // width]
    # A parent's index in the tree is the number of kept nodes up to it; 0 for the root.
    return torch.cat([new.tokens[-1:], torch.cat(all_tokens)[kept]]), torch.searchsorted(kept, kept_parents)


def _log_probabilities(logits: torch.Tensor) -> torch.Tensor:
    """At least float32, so that sums along a path are not rounded to half precision."""
    return torch.log_softmax(logits, dim=-1, dtype=torch.float64 if logits.dtype == torch.float64 else torch.float32)
