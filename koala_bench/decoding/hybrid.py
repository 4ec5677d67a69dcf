"""Two heads in one method: the first one's draft if it proposes anything, else the second one's.

The idea of SAM decoding (Hu et al. 2024, arXiv 2411.10666), for any two heads: a nearly free lookup that rarely
proposes but is then mostly right, backed by a head that always proposes.
"""

from __future__ import annotations

import copy
from typing import Any

import torch

from koala_bench.decoding.candidates import Pick
from koala_bench.heads import Committed, ObservingHead, ReadingHead
from koala_bench.tree import DraftTree, Template


class _Member:
    """One of the two heads, with the pairs that it has not read yet."""

    def __init__(self, head: Any, template: Template, features: tuple[int, ...]) -> None:
        self.head, self.template = head, template
        self._places = [features.index(feature) for feature in head.features]
        self._all = self._places == list(range(len(features)))
        self._waiting: list[Committed] = []

    def begin(self, capacity: int) -> None:
        self.head.begin(self.template, capacity)
        self._waiting = []

    def keep(self, new: Committed) -> None:
        """Queue these pairs for its next draft; copied, since the next pass may overwrite them."""
        own = self._own(new)
        self._waiting.append(Committed(own.tokens, own.hidden.clone(), own.position, own.first))

    def prefill(self, new: Committed) -> None:
        """Prefill the head if it has ``prefill``; else it reads the prompt with its first draft."""
        if isinstance(self.head, ReadingHead):
            self.head.prefill(self._own(new))
        else:
            self.keep(new)

    def draft(self, new: Committed) -> DraftTree:
        """Its draft after all queued pairs."""
        given = [*self._waiting, self._own(new)]
        self._waiting = []
        if len(given) > 1:
            tokens, hidden = torch.cat([each.tokens for each in given]), torch.cat([each.hidden for each in given])
            given = [Committed(tokens, hidden, given[0].position, given[0].first)]
        tree: DraftTree = self.head.draft(given[0])
        return tree

    def _own(self, new: Committed) -> Committed:
        """The same pairs with only the states that it reads."""
        return new if self._all else Committed(new.tokens, new.hidden[:, self._places], new.position, new.first)


class Hybrid:
    """A draft head made of two, each with a template of its own.

    The first drafts at each step. The second drafts if the first proposes only the root, after it has read all tokens
    committed since its last draft. Both are lossless, hence so is this.

    Args:
        first, second: draft heads.
        templates: of either.
    """

    dynamic = True

    def __init__(self, first: Any, second: Any, templates: tuple[Template, Template]) -> None:
        read = dict.fromkeys([*first.features, *second.features])
        self.features = (*(feature for feature in read if feature != -1), -1)
        self.max_depth: int = max(first.max_depth, second.max_depth)
        self.first, self.second = first, second
        self._templates = templates
        pairs = zip((first, second), templates, strict=True)
        self._members = [_Member(head, template, self.features) for head, template in pairs]

    @property
    def template(self) -> Template:
        """The larger of the two templates, by which cache rows are reserved."""
        return max(self._templates, key=lambda template: template.nodes)

    @property
    def pick(self) -> Pick | None:
        """How heads with a ``pick`` select candidates."""
        return next((each.head.pick for each in self._members if hasattr(each.head, "pick")), None)

    @pick.setter
    def pick(self, pick: Pick) -> None:
        for each in self._members:
            if hasattr(each.head, "pick"):
                each.head.pick = pick

    def begin(self, template: Template, capacity: int) -> None:
        """Forget the sequence. Trees follow the heads' own templates; the given one is ignored."""
        for each in self._members:
            each.begin(capacity)

    def prefill(self, new: Committed) -> None:
        """Let both read a prompt."""
        for each in self._members:
            each.prefill(new)

    def draft(self, new: Committed) -> DraftTree:
        """The first one's proposal, if there is any."""
        first, second = self._members
        tree = first.draft(new)
        if tree.shape.nodes > 1:
            second.keep(new)
            return tree
        return second.draft(new)

    def observe(self, tree: DraftTree, logits: torch.Tensor) -> None:
        """Pass the target's logits on to both, whichever drafted the tree."""
        for each in self._members:
            if isinstance(each.head, ObservingHead):
                each.head.observe(tree, logits)

    def __copy__(self) -> Hybrid:
        """Of a head that has not begun to draft: with copies of both heads, which share their weights."""
        return Hybrid(copy.copy(self.first), copy.copy(self.second), self._templates)
