"""Acceptance rules: which path of a verified tree is kept, and the token that the target itself adds.

Pure functions of a tree and the target's logits at its nodes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from koala_bench.tree import DraftTree


class Accepted(NamedTuple):
    """The outcome of a verification.

    Attributes:
        path: node indices from the root to the deepest accepted node.
        tokens: tokens of the path without the root, then the bonus token; as many as the path has nodes.
    """

    path: tuple[int, ...]
    tokens: list[int]


def greedy(tree: DraftTree, logits: torch.Tensor) -> Accepted:
    """Follow the tree as long as a child carries the target's own most likely token.

    Walking from the root needs no padded candidate rows, so no padding can be mistaken for a token. Of siblings
    with the same token the first is followed. One read from the device.

    Args:
        logits: [nodes, vocab_size].
    """
    drafted, best = torch.stack([tree.tokens, logits.argmax(dim=-1)]).tolist()
    children = tree.shape.children
    path, node = [0], 0
    while True:
        wanted = best[node]
        node = next((child for child in children[node] if drafted[child] == wanted), -1)
        if node < 0:
            return Accepted(tuple(path), [*(drafted[i] for i in path[1:]), wanted])
        path.append(node)
