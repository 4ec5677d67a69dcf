"""Rank of the target's token among a head's candidates at every draft depth, given a correct path: the input of tree
search.

A head that selects through ``pick`` drafts a chain along the target's own answer. Each candidate is replaced by the
target's token (teacher forcing), and that token's rank among the head's logits is recorded. A head that fills trees
from something else than scores drafts a wide one, in which the target's tokens are looked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from koala_bench.common.progress import progress
from koala_bench.decoding.candidates import best
from koala_bench.decoding.loop import VANILLA_TREE, Vanilla, capacity_for, decode
from koala_bench.engine.target import Target
from koala_bench.errors import KoalaBenchError
from koala_bench.heads import Committed, ObservingHead
from koala_bench.tree import ROOT_ONLY, DraftTree, TreeTemplate, load_template

NOWHERE = -1


@dataclass(frozen=True)
class RankProfile:
    """Ranks of the target's tokens.

    Attributes:
        ranks: int [positions, depth]; ``NOWHERE`` after the answer's end, and where no candidate is the target's token.
            A draft can begin at every position.
        answers: number of positions of each answer in order; if empty, positions are independent.
    """

    ranks: np.ndarray[Any, np.dtype[np.int64]]
    answers: tuple[int, ...] = ()

    @property
    def depth(self) -> int:
        """Deepest draft depth measured."""
        return int(self.ranks.shape[1])

    def conditional(self, widest: int) -> np.ndarray[Any, np.dtype[np.float64]]:
        """Probability [depth, widest] that the candidate of each rank is right, given that the ``widest`` best
        candidates held the target's token at all shallower depths; otherwise no tree would have reached this depth."""
        p = np.zeros((self.depth, widest))
        reached = np.ones(len(self.ranks), dtype=bool)
        for depth in range(self.depth):
            here = self.ranks[reached, depth]
            if not len(here):
                break
            p[depth] = [(here == rank).mean() for rank in range(widest)]
            reached &= (self.ranks[:, depth] >= 0) & (self.ranks[:, depth] < widest)
        return p

    def frequency(self, path: Sequence[int]) -> float:
        """Fraction of positions at which a node is on the target's path."""
        return float((self.ranks[:, : len(path)] == np.asarray(path)).all(axis=1).mean())

    def expected(self, paths: Sequence[Sequence[int]]) -> float:
        """Expected number of accepted draft tokens of a tree with these paths, mean over all positions."""
        return sum(self.frequency(path) for path in paths)

    def steps(self, paths: Sequence[Sequence[int]]) -> np.ndarray[Any, np.dtype[np.int64]]:
        """Positions at which steps begin when the answers are decoded with a tree of these paths.

        They are harder than average: a step begins where the previous draft failed.
        """
        tree = {tuple(path) for path in paths}
        begins, first = [], 0
        for length in self.answers or (1,) * len(self.ranks):
            at = first
            while at < first + length:
                begins.append(at)
                path: tuple[int, ...] = ()
                for rank in self.ranks[at].tolist():
                    if (*path, rank) not in tree:
                        break
                    path = (*path, rank)
                at += len(path) + 1
            first += length
        return np.asarray(begins, dtype=np.int64)

    def length(self, paths: Sequence[Sequence[int]]) -> float:
        """Acceptance length when the answers are decoded with a tree of these paths, bonus token included."""
        return len(self.ranks) / len(self.steps(paths)) if self.answers else 1 + self.expected(paths)

    def at(self, positions: np.ndarray[Any, np.dtype[np.int64]]) -> RankProfile:
        """The profile of some of the positions, taken as independent."""
        return RankProfile(self.ranks[positions])


def measure_ranks(
    target: Target, head: Any, prompts: Sequence[Sequence[int]], tokens: int, depth: int, widest: int, most: int
) -> RankProfile:
    """Ranks along the target's own greedy answers.

    Args:
        depth: deepest draft depth; capped at the head's ``max_depth``.
        widest, most: candidates of a node, and nodes of the largest tree, that will be searched for. A head without
            ``pick`` is asked for no others.

    Raises:
        KoalaBenchError: the head neither selects through ``pick`` nor fills static trees, or no answer is long enough.
    """
    scored, depth = hasattr(head, "pick"), min(depth, head.max_depth)
    if not scored and (depth < 1 or getattr(head, "dynamic", False)):
        raise KoalaBenchError(
            f"{type(head).__name__} has no candidates to rank.",
            "Tune the tree of a head that takes its candidates through an attribute 'pick', or fills static trees.",
        )
    template = load_template(f"chain-{depth}") if scored else _every_tree(depth, widest, most)
    ranks: list[list[int]] = []
    counts = []
    with progress("ranks", len(prompts), "answers") as advance:
        for prompt in prompts:
            answer = decode(target, Vanilla(), VANILLA_TREE, prompt, tokens, target.stop_ids)
            rows = _ranks_along(target, head, template, prompt, answer.tokens)
            ranks += rows
            counts += [len(rows)] if rows else []
            advance(1)
    if scored:
        head.pick = best
    if not ranks:
        raise KoalaBenchError(
            "The answers to the held-out prompts are too short to rank anything.", "Give more --prompts or --tokens."
        )
    return RankProfile(np.asarray(ranks, dtype=np.int64), tuple(counts))


def _every_tree(depth: int, widest: int, most: int) -> TreeTemplate:
    """The nodes that any good tree of at most ``most`` nodes can have: one whose better siblings, and theirs at each
    level, fill more is in none.
    """
    paths: list[tuple[int, ...]] = []
    level: list[tuple[tuple[int, ...], int]] = [((), 1)]
    for _ in range(depth):
        level = [
            ((*path, rank), filled * (rank + 1))
            for path, filled in level
            for rank in range(widest)
            if filled * (rank + 1) < most
        ]
        paths += [path for path, _ in level]
    return TreeTemplate.of("every", paths)


@torch.inference_mode()
def _ranks_along(
    target: Target, head: Any, template: Any, prompt: Sequence[int], answer: Sequence[int]
) -> list[list[int]]:
    """Ranks at each position of one answer but the last, as if every step had committed one token.

    A head that learns while decoding observes what follows the committed tokens: of drafted nodes there are none, so in
    decoding it knows more.
    """
    whole = torch.tensor([*prompt, *answer], device=target.device)
    hidden = target.states(whole[None], head.features)[0]
    scored, observing = hasattr(head, "pick"), isinstance(head, ObservingHead)
    seen = target.states(whole[None])[0] if observing else hidden
    depth, rows = template.depth, []
    head.begin(template, capacity_for(len(prompt), len(answer), template.nodes, target.max_positions))
    first = len(prompt)  # of the answer's tokens
    for place in range(first, len(whole) - 1):
        begin = 0 if place == first else place - 1
        new = Committed(whole[begin + 1 : place + 1], hidden[begin:place], begin, whole[:1] if begin == 0 else None)
        truth = whole[place + 1 : place + 1 + depth]
        if scored:
            pick = _TeacherForcing(truth)
            head.pick = pick
            head.draft(new)
            ranks = pick.ranks
        else:
            ranks = _places_in(head.draft(new), truth.tolist())
        if observing:
            head.observe(DraftTree(whole[place : place + 1], ROOT_ONLY), target.output(seen[place : place + 1, -1]))
        rows.append((ranks + [NOWHERE] * depth)[:depth])
    return rows


def _places_in(tree: DraftTree, truth: Sequence[int]) -> list[int]:
    """Among its siblings, the place of each token of the true path that a tree holds."""
    tokens, node, places = tree.tokens.tolist(), 0, list[int]()
    for token in truth:
        below = {tokens[child]: (place, child) for place, child in enumerate(tree.shape.children[node])}
        if token not in below:
            break
        place, node = below[token]
        places.append(place)
    return places


class _TeacherForcing:
    """Selects the target's token at every level and records its rank."""

    def __init__(self, truth: torch.Tensor) -> None:
        self.truth, self.ranks = truth, list[int]()
        self._level = 0

    def __call__(self, logits: torch.Tensor, count: int) -> tuple[torch.Tensor, None]:
        level, self._level = self._level, self._level + 1
        if level >= len(self.truth):
            return best(logits, count)
        token = self.truth[level]
        row = logits[0].float()
        self.ranks.append(int((row > row[token]).sum()))
        return token.reshape(1, 1), None
