"""Heads for tests of the harness: they know what is coming, or they do not."""

from __future__ import annotations

import random
from collections.abc import Sequence

from koala_bench.heads import Committed
from koala_bench.tree import DraftTree, TreeTemplate


class Oracle:
    """Places the true continuation somewhere in the tree, under shuffled ranks, with noise everywhere else.

    The accepted nodes of a tree are therefore rarely its first ones, which is what committing rows must survive.
    """

    features = (-1,)
    max_depth = 64

    def __init__(self, truth: Sequence[int], vocab_size: int, right: float = 0.7, seed: int = 0) -> None:
        self.truth, self.vocab_size, self.right = list(truth), vocab_size, right
        self.draw = random.Random(seed)

    def begin(self, template: TreeTemplate, capacity: int) -> None:
        self.template, self.committed = template, 0

    def draft(self, new: Committed) -> DraftTree:
        # The first call commits the prompt and one token of the truth.
        self.committed = 1 if new.position == 0 else self.committed + len(new.tokens)
        shape = self.template.shape
        tokens = [int(new.tokens[-1])]
        on_path = {0}
        lucky: dict[int, int] = {}  # of each node's children the one that may be right
        for node in range(1, shape.nodes):
            parent = shape.parents[node]
            index = self.committed + shape.depths[node] - 1
            siblings = shape.children[parent]
            if node == siblings[0]:
                lucky[parent] = siblings[self.draw.randrange(len(siblings))]
            if (
                parent in on_path
                and node == lucky[parent]
                and index < len(self.truth)
                and self.draw.random() < self.right
            ):
                tokens.append(self.truth[index])
                on_path.add(node)
            else:
                tokens.append(self.draw.randrange(self.vocab_size))
        return DraftTree(new.tokens.new_tensor(tokens), shape)
