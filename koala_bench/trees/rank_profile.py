"""At which rank a head has the token that the target says, at every depth below true tokens: what a draft tree can hope
for.

The head drafts a chain along the target's own answer: whatever it would have proposed, its first candidate is replaced
by the true token, and the rank of that token among its scores is noted. Any head that takes its candidates through
``pick`` can be asked.
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
from koala_bench.heads import Committed
from koala_bench.tree import load_template

NOWHERE = -1


@dataclass(frozen=True)
class RankProfile:
    """Ranks of true tokens.

    Attributes:
        ranks: int [positions, depth]; ``NOWHERE`` behind the answer's end. A position is a token of an answer after
            which a draft could begin.
        answers: number of positions of each answer, one after the other; every position stands for itself if not given.
    """

    ranks: np.ndarray[Any, np.dtype[np.int64]]
    answers: tuple[int, ...] = ()

    @property
    def depth(self) -> int:
        """How far ahead was looked."""
        return int(self.ranks.shape[1])

    def conditional(self, widest: int) -> np.ndarray[Any, np.dtype[np.float64]]:
        """Probability [depth, widest] that a candidate of a rank is the true token, where all above it were among the
        ``widest`` best.

        Where the path above was further down, no tree would have come this far.
        """
        found = np.zeros((self.depth, widest))
        reached = np.ones(len(self.ranks), dtype=bool)
        for depth in range(self.depth):
            here = self.ranks[reached, depth]
            if not len(here):
                break
            found[depth] = [(here == rank).mean() for rank in range(widest)]
            reached &= (self.ranks[:, depth] >= 0) & (self.ranks[:, depth] < widest)
        return found

    def frequency(self, path: Sequence[int]) -> float:
        """Share of the positions at which a node is on the true path."""
        return float((self.ranks[:, : len(path)] == np.asarray(path)).all(axis=1).mean())

    def expected(self, paths: Sequence[Sequence[int]]) -> float:
        """Drafted tokens that a tree of these paths gets accepted at a position, mean over all of them."""
        return sum(self.frequency(path) for path in paths)

    def steps(self, paths: Sequence[Sequence[int]]) -> np.ndarray[Any, np.dtype[np.int64]]:
        """The positions at which steps begin if the answers are decoded with a tree of these paths.

        They are harder than the others: a step begins where the one before it could not go on.
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
        """Tokens a step if the answers are decoded with a tree of these paths, the bonus token included."""
        return len(self.ranks) / len(self.steps(paths)) if self.answers else 1 + self.expected(paths)

    def at(self, positions: np.ndarray[Any, np.dtype[np.int64]]) -> RankProfile:
        """Some of the positions, each by itself."""
        return RankProfile(self.ranks[positions])


def measure_ranks(target: Target, head: Any, prompts: Sequence[Sequence[int]], tokens: int, depth: int) -> RankProfile:
    """Ranks along the target's own greedy answers.

    Args:
        prompts: token ids, held-out ones.
        tokens: length limit of an answer.
        depth: how far ahead to look; at most what the head drafts.

    Raises:
        KoalaBenchError: the head does not take its candidates through ``pick``, or there is no answer to look at.
    """
    if not hasattr(head, "pick"):
        raise KoalaBenchError(
            f"{type(head).__name__} has no scores of candidates to rank.",
            "Tune the tree of a head that takes its candidates through an attribute 'pick'.",
        )
    depth = min(depth, head.max_depth)
    template = load_template(f"chain-{depth}")
    found: list[list[int]] = []
    counts = []
    with progress("ranks", len(prompts), "answers") as advance:
        for prompt in prompts:
            answer = decode(target, Vanilla(), VANILLA_TREE, prompt, tokens, target.stop_ids)
            along = _along(target, head, template, prompt, answer.tokens)
            found += along
            counts += [len(along)] if along else []
            advance(1)
    head.pick = best
    if not found:
        raise KoalaBenchError(
            "The answers to the held-out prompts are too short to rank anything.", "Give more --prompts or --tokens."
        )
    return RankProfile(np.asarray(found, dtype=np.int64), tuple(counts))


@torch.inference_mode()
def _along(target: Target, head: Any, template: Any, prompt: Sequence[int], answer: Sequence[int]) -> list[list[int]]:
    """Ranks at each position of one answer but the last; a position is a step that settled one token."""
    whole = torch.tensor([*prompt, *answer], device=target.device)
    hidden = target.states(whole[None], head.features)[0]
    depth, rows = template.depth, []
    head.begin(template, capacity_for(len(prompt), len(answer), template.nodes, target.max_positions))
    first = len(prompt)  # of the answer's tokens
    for place in range(first, len(whole) - 1):
        begin = 0 if place == first else place - 1
        new = Committed(whole[begin + 1 : place + 1], hidden[begin:place], begin, whole[:1] if begin == 0 else None)
        guide = _Guide(whole[place + 1 : place + 1 + depth])
        head.pick = guide
        head.draft(new)
        rows.append((guide.ranks + [NOWHERE] * depth)[:depth])
    return rows


class _Guide:
    """Takes the true tokens as candidates, one level after the other, and notes their ranks."""

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
