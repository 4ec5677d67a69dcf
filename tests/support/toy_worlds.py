"""Toy targets and drafts over a few tokens, and the acceptance rule on paper: everything it can commit, with its exact
probability.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from koala_bench.decoding.acceptance import Row, after_rejection, chance
from koala_bench.decoding.sampling import Sampling
from koala_bench.tree import TreeShape

Context = tuple[int, int]
Law = dict[tuple[int, ...], float]


# ------------------------------------------------------------------------------------ toy worlds


@dataclass(frozen=True)
class World:
    """A target and a draft over a few tokens, both of which look at the last two tokens, and a tree.

    Attributes:
        target, draft: logits, float64 [vocab, vocab, vocab], by the token before the last, the last, and the next.
        kind: how children are proposed: ``drawn``, the ``best`` ones, or ``listed`` ones, which may repeat.
        listed: tokens to propose, [vocab, vocab, most children].
    """

    target: torch.Tensor
    draft: torch.Tensor
    kind: str
    listed: torch.Tensor
    shape: TreeShape
    sampling: Sampling

    @property
    def vocab(self) -> int:
        return len(self.target)

    @property
    def p(self) -> Row:
        return self.sampling.probabilities(self.target).numpy()

    @property
    def q(self) -> Row:
        return self.sampling.probabilities(self.draft).numpy()


def world(number: int) -> World:
    """One of the random configurations; which kind of tree and of proposals goes round, the rest is drawn."""
    draw = random.Random(number)
    generator = torch.Generator().manual_seed(number)
    kind = ("drawn", "best", "listed", "drawn")[number % 4]
    vocab = draw.randint(3, 6)
    most = vocab if vocab < 5 else 3
    match number // 4 % 3:
        case 0:  # a chain
            parents = list(range(-1, draw.randint(1, 3)))
        case 1:  # wide
            parents = [-1, *[0] * draw.randint(2, most)]
        case _:  # anything
            parents = [-1]
            depths = [0]
            for _ in range(draw.randint(3, 8)):
                node = draw.choice(
                    [node for node, depth in enumerate(depths) if depth < 3 and parents.count(node) < most]
                )
                parents.append(node)
                depths.append(depths[node] + 1)
    sampling = Sampling(
        draw.choice([0.5, 0.7, 1.0, 1.5]), draw.choice([0, 0, 2, 3]), draw.choice([1.0, 1.0, 0.95, 0.8])
    )
    target, noise = 1.2 * torch.randn(2, vocab, vocab, vocab, dtype=torch.float64, generator=generator)
    quality = draw.choice([0.0, 0.5, 0.9, 1.0])
    listed = torch.randint(vocab, (vocab, vocab, most), generator=generator)
    return World(target, quality * target + (1 - quality) * noise, kind, listed, TreeShape(tuple(parents)), sampling)


def cut_world(number: int) -> World:
    """The same with a draft that knows one or two tokens less, as a head of a draft vocabulary does."""
    each = world(number)
    unknown = torch.randperm(each.vocab, generator=torch.Generator().manual_seed(number))[: 1 if each.vocab == 3 else 2]
    return replace(each, draft=each.draft.index_fill(-1, unknown, -torch.inf))


# ------------------------------------------------------------------------------------ the rule on paper


@dataclass(frozen=True)
class Paper:
    """The rule to enumerate. The running code's own two formulas, unless a wrong one is put in.

    Attributes:
        warm: draw a leaf's bonus from the distribution without temperature, top-k and top-p, as EAGLE v1 does.
        judged_by_q: judge proposals that were not drawn as if they had been.
    """

    chance: Callable[[Row, Row | None, int], float] = chance
    after_rejection: Callable[[Row, Row | None, int], tuple[Row, Row | None]] = after_rejection
    warm: bool = False
    judged_by_q: bool = False


class Enumeration:
    """Probabilities of all that verifications can commit, by going through every draw and every decision."""

    def __init__(self, world: World, paper: Paper = Paper()) -> None:
        self.world, self.paper = world, paper
        self.p, self.q = world.p, world.q
        self.unprocessed = torch.softmax(world.target, -1).numpy()
        self._laws: dict[tuple[int, Context], Law] = {}
        self._runs: dict[tuple[Context, int, bool], Any] = {}

    def law(self, context: Context, node: int = 0) -> Law:
        """What is committed below a node, given that it was reached and the last two tokens there."""
        if (node, context) not in self._laws:
            found: Law = Counter()
            q = self.q[context] if self.world.kind == "drawn" or self.paper.judged_by_q else None
            self._siblings(found, node, context, 0, 1.0, self.p[context], q, self.q[context].copy(), [])
            self._laws[node, context] = found
        return self._laws[node, context]

    def _siblings(
        self,
        found: Law,
        node: int,
        context: Context,
        tried: int,
        weight: float,
        p: Row,
        q: Row | None,
        urn: Row,
        used: list[int],
    ) -> None:
        below = self.world.shape.children[node]
        if tried == len(below):
            bonus = self.unprocessed[context] if self.paper.warm and not below else p
            for token in bonus.nonzero()[0]:
                found[(int(token),)] += weight * bonus[token]
            return
        for token, share, rest in self._proposals(context, tried, urn, used):
            accepted = self.paper.chance(p, q, token)
            if accepted > 0:
                for after, each in self.law((context[1], token), below[tried]).items():
                    found[(token, *after)] += weight * share * accepted * each
            if accepted < 1:
                left, without = self.paper.after_rejection(p, q, token)
                self._siblings(
                    found,
                    node,
                    context,
                    tried + 1,
                    weight * share * (1 - accepted),
                    left,
                    without,
                    rest,
                    [*used, token],
                )

    def _proposals(self, context: Context, tried: int, urn: Row, used: list[int]) -> list[tuple[int, float, Row]]:
        """The tokens that a sibling may carry, each with its probability and what is left to draw from."""
        ranked = self.world.draft[context].argsort(descending=True).tolist()
        if self.world.kind == "best":
            return [(ranked[tried], 1.0, urn)]
        if self.world.kind == "listed":
            return [(int(self.world.listed[context][tried]), 1.0, urn)]
        if not urn.any():  # all that can be drawn is drawn: the next best follow
            return [(next(token for token in ranked if token not in used), 1.0, urn)]
        drawn = []
        for token in urn.nonzero()[0]:
            rest = urn.copy()
            rest[token] = 0
            drawn.append((int(token), float(urn[token] / urn.sum()), rest))
        return drawn

    def run(self, context: Context, length: int, steps: bool) -> Any:
        """Probabilities [vocab, ...] of the next ``length`` tokens after one verification, its rest by the target; or
        after as many as it takes.
        """
        if length == 0:
            return np.ones(())
        if (context, length, steps) not in self._runs:
            found = np.zeros((self.world.vocab,) * length)
            for committed, weight in self.law(context).items():
                kept = committed[:length]
                after = (*context, *kept)[-2:]
                rest = self.run(after, length - len(kept), True) if steps else self.truth(after, length - len(kept))
                found[kept] += weight * rest
            self._runs[context, length, steps] = found
        return self._runs[context, length, steps]

    def truth(self, context: Context, length: int) -> Any:
        """Probabilities [vocab, ...] of the next ``length`` tokens of the target alone."""
        if length == 0:
            return np.ones(())
        after = np.stack([self.truth((context[1], token), length - 1) for token in range(self.world.vocab)])
        return self.p[context].reshape(-1, *[1] * (length - 1)) * after

    def apart(self, steps: bool) -> float:
        """Total variation between what is committed and the target's own distribution."""
        length = 4 if steps else min(self.world.shape.depth + 1, 4)
        return float(np.abs(self.run((0, 1), length, steps) - self.truth((0, 1), length)).sum() / 2)
