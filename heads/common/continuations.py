"""Shared by look-up heads: a tree of the tokens that followed earlier occurrences of the end of the text."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Sequence
from itertools import islice

import torch
from torch import nn

from koala_bench.errors import KoalaBenchError
from koala_bench.heads import Committed, TargetSpec
from koala_bench.tree import DraftTree, Template, TreeShape

PLACES = 16  # continuations looked at; more than the ranks of any tree that pays


class Lookup(nn.Module):
    """An untrained head that proposes what followed earlier occurrences of the end of prompt and answer.

    ``option`` and ``value`` are its one option. KoalaBenchError where it is less than 1.
    """

    features = (-1,)
    max_depth = 64
    dynamic = True
    usual_tree = "chain-7"  # what followed once mostly follows again: depth pays more than breadth

    def __init__(self, spec: TargetSpec, option: str, value: int) -> None:
        super().__init__()
        if value < 1:
            raise KoalaBenchError(f"The head's {option} is {value}.", "It must be at least 1.")
        self._device = spec.device
        self._paths: tuple[tuple[int, ...], ...] | None = None

    def begin(self, template: Template, capacity: int) -> None:
        """Forget the text."""
        template.check(depth=self.max_depth, candidates=PLACES)
        self._paths = template.paths
        self.forget()

    def prefill(self, new: Committed) -> None:
        """Append a prompt to the text."""
        for token in new.tokens.tolist():
            self.append(token)

    def draft(self, new: Committed) -> DraftTree:
        """Read the committed tokens, then propose what followed them before; the root alone where nothing did."""
        assert self._paths is not None, "begin() comes before draft()"
        self.prefill(new)
        text, places = self.found()
        return drafted(text, list(islice(dict.fromkeys(places), PLACES)), self._paths, self._device)

    @abstractmethod
    def forget(self) -> None:
        """Begin with an empty text."""

    @abstractmethod
    def append(self, token: int) -> None:
        """Append a token to the text."""

    @abstractmethod
    def found(self) -> tuple[Sequence[int], Iterable[int]]:
        """The text, and the places behind earlier occurrences of its end, the best first."""


def drafted(
    text: Sequence[int], places: Sequence[int], paths: Sequence[tuple[int, ...]], device: torch.device
) -> DraftTree:
    """Fill a template with the tokens that followed at ``places``; a node without one is left out, with its
    descendants.

    The children of a node are the different tokens that come next in the continuations through it, in the order of the
    places; the child of rank r gets the r-th of them.

    Args:
        text: all committed tokens, the root of the tree last.
        places: indices in the text at which continuations begin, the best first; none is its length.
        paths: of the template.
    """
    kept: dict[tuple[int, ...], int] = {(): 0}
    tokens, parents = [text[-1]], [-1]
    through: list[Sequence[int]] = [places]
    for path in paths:  # parents before children
        parent = kept.get(path[:-1])
        if parent is None:
            continue
        ahead = len(path) - 1
        followed: dict[int, list[int]] = {}
        for place in through[parent]:
            if place + ahead < len(text):
                followed.setdefault(text[place + ahead], []).append(place)
        if path[-1] < len(followed):
            token = list(followed)[path[-1]]
            kept[path] = len(tokens)
            tokens.append(token)
            parents.append(parent)
            through.append(followed[token])
    return DraftTree(torch.tensor(tokens, device=device), TreeShape(tuple(parents)))
