"""Token Recycling (Luo et al. 2024, arXiv 2408.08696): drafts from a matrix of the last best successors of each token.

What the target holds likely after a token it mostly holds likely again, so its best few successors, of accepted nodes
and of rejected ones, overwrite the token's row at each verification. A draft reads rows level by level into a static
tree. Nothing is trained, and the text is not searched.
"""

from __future__ import annotations

import torch
from torch import nn

from koala_bench.heads import Committed, TargetSpec
from koala_bench.tree import DraftTree, Template


class TokenRecycling(nn.Module):
    """Proposes the best successors of the last token, of those theirs, and so on.

    The matrix is [vocab_size, ranks] with as many ranks as the tree uses (the paper's 8 for its tree of 80 nodes). At
    first it holds the tokens that followed each token in the prompt, the latest first. Rows of unknown tokens are the
    first ids of the vocabulary: the paper has zeros there, but siblings must differ.

    A step costs two small operations for each level of the tree and, for each node, the best few of the vocabulary;
    nothing is read from the device. ``begin`` writes the matrix, ``prefill`` a row for each token of the prompt.

    Args:
        hot_start: keep the matrix from one sequence to the next, as the paper does. Otherwise it is reset, so that what
            a question gains does not depend on the questions before it.
    """

    features = (-1,)
    max_depth = 64
    usual_tree = "4x2x1"

    def __init__(self, spec: TargetSpec, hot_start: bool = False) -> None:
        super().__init__()
        self._device, self._vocab_size, self.hot_start = spec.device, spec.vocab_size, hot_start
        self._template: Template | None = None

    def begin(self, template: Template, capacity: int) -> None:
        """Forget the sequence, and the successors unless they are kept."""
        template.check(depth=self.max_depth, candidates=self._vocab_size)
        kept = self.hot_start and template is self._template
        if template is not self._template:
            paths, self._ranks = template.paths, 1 + max((rank for path in template.paths for rank in path), default=-1)
            index = {path: node for node, path in enumerate(((), *paths))}
            # For each level the places of the parents among the nodes before, and the ranks of the children.
            self._levels = [
                (
                    torch.tensor([index[path[:-1]] for path in level], device=self._device),
                    torch.tensor([path[-1] for path in level], device=self._device),
                )
                for depth in range(1, template.depth + 1)
                if (level := [path for path in paths if len(path) == depth])
            ]
            self._template = template
        if not kept:  # a new one, since copies of a head share what the head holds
            self._successors = torch.arange(self._ranks, device=self._device).repeat(self._vocab_size, 1)
        self._prompt_read = False
        self._before: torch.Tensor | None = None  # the last token read, where a prompt comes in parts

    def prefill(self, new: Committed) -> None:
        """Let what followed each token of a prompt come first in its row."""
        tokens = new.tokens if self._before is None else torch.cat([self._before, new.tokens])
        self._follow((tokens if new.first is None else torch.cat([new.first, tokens])).tolist())
        self._before = new.tokens[-1:].clone()

    def draft(self, new: Committed) -> DraftTree:
        """Read the matrix into the tree."""
        assert self._template is not None, "begin() comes before draft()"
        if not self._prompt_read:
            self.prefill(new)
            self._prompt_read = True
        tokens = new.tokens[-1:]
        for parents, ranks in self._levels:
            tokens = torch.cat([tokens, self._successors[tokens[parents], ranks]])
        return DraftTree(tokens, self._template.shape)

    def observe(self, tree: DraftTree, logits: torch.Tensor) -> None:
        """Overwrite the row of each node's token with the target's best successors there."""
        best = logits.topk(self._successors.shape[1], dim=-1).indices
        # Of nodes with the same token the last one's row stays: it is written for all of them, in whatever order.
        places = torch.arange(len(tree.tokens), device=self._device)
        last = (tree.tokens[:, None] == tree.tokens).mul(places).amax(dim=1)
        self._successors[tree.tokens] = best[last]

    def _follow(self, text: list[int]) -> None:
        """Let what followed each token of a text come first in its row, the latest first."""
        followed: dict[int, dict[int, None]] = {}
        for token, successor in zip(reversed(text[:-1]), reversed(text[1:]), strict=True):
            followed.setdefault(token, {}).setdefault(successor)
        if followed:
            places, ranks = torch.tensor(list(followed), device=self._device), self._successors.shape[1]
            known = zip(followed.values(), self._successors[places].tolist(), strict=True)
            rows = [[*dict.fromkeys([*latest, *before])][:ranks] for latest, before in known]
            self._successors[places] = torch.tensor(rows, device=self._device)
