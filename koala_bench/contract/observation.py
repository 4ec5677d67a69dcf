"""Check of heads that learn while decoding: they modify nothing that they are given, and keep copies only."""

from __future__ import annotations

from typing import Any

import torch

from koala_bench.contract.bench import Bench, BrokenError, NotApplicableError, answer, templates_of
from koala_bench.heads import Committed, ObservingHead
from koala_bench.tree import DraftTree, Template


class _Shown:
    """A wrapper that watches ``observe`` and overwrites its arguments afterwards, as the next pass may do."""

    def __init__(self, head: Any, overwrite: bool) -> None:
        self.head, self.features, self.max_depth, self._overwrite = head, head.features, head.max_depth, overwrite
        self.count, self.changed = 0, False

    def begin(self, template: Template, capacity: int) -> None:
        self.head.begin(template, capacity)

    def draft(self, new: Committed) -> DraftTree:
        drafted: DraftTree = self.head.draft(new)
        return drafted

    def observe(self, tree: DraftTree, logits: torch.Tensor) -> None:
        tokens, said = tree.tokens.clone(), logits.clone()
        self.head.observe(tree, logits)
        self.count += 1
        self.changed |= not (torch.equal(tree.tokens, tokens) and torch.equal(logits, said))
        if self._overwrite:
            logits.fill_(0.0)
            tree.tokens.fill_(0)


def observation(bench: Bench) -> str:
    """``observe`` modifies neither trees nor logits, and later drafts do not depend on those buffers."""
    target, head = bench.ready()
    if not isinstance(head, ObservingHead):
        raise NotApplicableError("the head has no observe(), so it never gets the target's logits")
    template = templates_of(head.max_depth)[-1]
    runs = []
    for overwrite in (False, True):
        shown = _Shown(head, overwrite)
        torch.manual_seed(0)  # a head that draws at random is the concern of another check
        runs.append(answer(target, shown, template, 24).steps)
        if shown.changed:
            raise BrokenError("observe() changes the tree or the logits: they are the harness's, work on copies")
    if runs[0] != runs[1]:
        raise BrokenError(
            "drafts differ where the logits are overwritten after observe(): the next pass may write there, keep copies"
        )
    return f"{shown.count} verifications observed, nothing changed or kept"
