"""A draft tree out of a text's own continuations: places where the text went on before fill the ranks of a template."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from koala_bench.tree import DraftTree, TreeShape


def drafted(
    text: Sequence[int], places: Sequence[int], paths: Sequence[tuple[int, ...]], device: torch.device
) -> DraftTree:
    """Fill a template with what followed at ``places``; nodes for which nothing followed are left out, with what hangs
    below.

    The children of a node are the different tokens that come next in the continuations through it, in the order of the
    places; the child of rank r gets the r-th of them.

    Args:
        text: all settled tokens, the root of the tree last.
        places: where continuations begin in it, the best first; each before its end.
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
