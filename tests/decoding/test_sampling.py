"""Sampling with drafts leaves the target's distribution as it is: by enumeration, and by counting what the running code
commits.
"""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from koala_bench.common.draft_vocabulary import DraftVocabulary
from koala_bench.decoding import acceptance
from koala_bench.decoding.acceptance import Row, SpeculativeSampling, after_rejection
from koala_bench.decoding.sampling import Draws, Sampling
from koala_bench.errors import KoalaBenchError
from koala_bench.tree import DraftTree
from tests.support.toy_worlds import Enumeration, Law, Paper, World, cut_world, world

CONFIGURATIONS = 60
SAMPLES = 100_000
SIBLINGS = (5, 20, 35, 57)  # configurations that show when the siblings of a node share a random number
LEAST = 0.001  # smallest p-value that passes; seeds are the configurations' numbers


@pytest.mark.parametrize("number", range(CONFIGURATIONS))
def test_on_paper_the_distribution_of_whole_sequences_is_the_targets(number: int) -> None:
    enumeration = Enumeration(world(number))
    assert sum(enumeration.law((0, 1)).values()) == pytest.approx(1, abs=1e-9)
    assert enumeration.apart(steps=False) < 1e-6
    assert enumeration.apart(steps=True) < 1e-6


@pytest.mark.parametrize("number", range(0, CONFIGURATIONS, 2))
def test_on_paper_drafts_of_a_cut_vocabulary_leave_the_distribution_as_it_is(number: int) -> None:
    """What a head cannot draft, the target still says, as often as it would."""
    each = cut_world(number)
    assert (each.q == 0).any(-1).all() and (each.p > each.q).any()
    enumeration = Enumeration(each)
    assert enumeration.apart(steps=False) < 1e-6
    assert enumeration.apart(steps=True) < 1e-6


def test_the_configurations_cover_what_matters() -> None:
    worlds = [world(number) for number in range(CONFIGURATIONS)]
    assert Counter(each.kind for each in worlds) == {"drawn": 30, "best": 15, "listed": 15}
    for kind in ("drawn", "best", "listed"):
        shapes = {each.shape for each in worlds if each.kind == kind}
        assert any(shape.depth > 1 and max(map(len, shape.children)) == 1 for shape in shapes)  # chains
        assert any(shape.depth == 1 and shape.nodes > 2 for shape in shapes)
        assert any(shape.depth > 1 and max(map(len, shape.children)) > 1 for shape in shapes)
    scarce = [
        each
        for each in worlds
        if each.kind == "drawn" and max(map(len, each.shape.children)) > (each.q > 0).sum(-1).min()
    ]
    assert len(scarce) >= 3  # more children than tokens to draw
    listed = [each.listed[0, 1, : len(each.shape.children[0])].tolist() for each in worlds if each.kind == "listed"]
    assert any(len(set(tokens)) < len(tokens) for tokens in listed)  # siblings with the same token
    assert {each.sampling.top_k for each in worlds} == {0, 2, 3}
    assert {each.sampling.top_p for each in worlds} == {1.0, 0.95, 0.8}


def _no_residual(p: Row, q: Row | None, token: int) -> tuple[Row, Row | None]:
    return p, after_rejection(p, q, token)[1]


def _q_keeps_what_was_drawn(p: Row, q: Row | None, token: int) -> tuple[Row, Row | None]:
    return after_rejection(p, q, token)[0], q


def _q_not_renormalised(p: Row, q: Row | None, token: int) -> tuple[Row, Row | None]:
    left, without = after_rejection(p, q, token)
    return left, without if without is None or q is None else np.where(without > 0, q, 0)


BROKEN = {
    "no residual": Paper(after_rejection=_no_residual),
    "q keeps what was drawn": Paper(after_rejection=_q_keeps_what_was_drawn),
    "q not renormalised": Paper(after_rejection=_q_not_renormalised),
    "bonus without temperature": Paper(warm=True),
    "best candidates judged by q": Paper(judged_by_q=True),
    "everything accepted": Paper(chance=lambda p, q, token: 1.0),
}


@pytest.mark.parametrize("name", BROKEN)
def test_the_same_check_finds_a_wrong_rule(name: str) -> None:
    apart = [Enumeration(world(number), BROKEN[name]).apart(steps=False) for number in range(0, CONFIGURATIONS, 2)]
    assert max(apart) > 0.01


# ------------------------------------------------------------------------------------ the running code


def drafts(
    world: World, count: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """Draw many trees after the context (0, 1): tokens [count, nodes], proposals [count, inner nodes, vocab], the
    target's logits [count, nodes, vocab].
    """
    shape = world.shape
    pick = Draws(world.sampling, generator)
    tokens = torch.full((count, shape.nodes), 1)
    before = torch.zeros(count, shape.nodes, dtype=torch.int64)  # the token above each node
    proposals = []
    for node in shape.inner:
        below = shape.children[node]
        context = before[:, node], tokens[:, node]
        if world.kind == "drawn":
            ids, found = pick(world.draft[context], len(below))
            proposals.append(found)
        else:
            ids = world.draft[context].argsort(-1, descending=True) if world.kind == "best" else world.listed[context]
        for child, token in zip(below, ids.T, strict=False):
            tokens[:, child], before[:, child] = token, tokens[:, node]
    return tokens, torch.stack(proposals, 1) if proposals else None, world.target[before, tokens]


class Remembering:
    """A ``Sampling`` that processes each row of logits once; the rows stay where they are."""

    def __init__(self, sampling: Sampling) -> None:
        self.sampling = sampling
        self.known: dict[int, torch.Tensor] = {}

    def probabilities(self, logits: torch.Tensor) -> torch.Tensor:
        if (found := self.known.get(logits.data_ptr())) is None:
            found = self.known[logits.data_ptr()] = self.sampling.probabilities(logits)
        return found


def commit(world: World, rule: SpeculativeSampling, count: int, generator: torch.Generator) -> Counter[tuple[int, ...]]:
    """What a rule commits after (0, 1), counted."""
    tokens, proposals, logits = drafts(world, count, generator)
    # Scores and proposals follow from the tokens: trees with the same tokens are made once.
    different, which = tokens.unique(dim=0, return_inverse=True)
    first = torch.full((len(different),), count).scatter_reduce(0, which, torch.arange(count), "amin").tolist()
    trees = [DraftTree(tokens[i], world.shape, None if proposals is None else proposals[i]) for i in first]
    scores = [logits[i] for i in first]
    remembering: Any = Remembering(world.sampling)
    rule.sampling = remembering
    return Counter(tuple(rule.accept(trees[i], scores[i]).tokens) for i in which.tolist())


def fit(counts: Counter[tuple[int, ...]], law: Law) -> float:
    """The p-value of a chi-square test; 0 if something came that cannot. What is expected less than ten times is taken
    together.
    """
    if any(law.get(each, 0.0) < 1e-12 for each in counts):
        return 0.0
    total = sum(counts.values())
    often = [each for each, share in law.items() if share * total >= 10]
    seen = [counts[each] for each in often]
    expected = [law[each] * total for each in often]
    if (rest := total - sum(expected)) >= 10:
        seen, expected = [*seen, total - sum(seen)], [*expected, rest]
    elif rest > 1e-6:  # too little for a place of its own
        at = expected.index(min(expected))
        seen[at], expected[at] = seen[at] + total - sum(seen), expected[at] + rest
    return float(stats.chisquare(seen, expected).pvalue) if len(seen) > 1 else 1.0


def completed(world: World, counts: Counter[tuple[int, ...]], length: int, seed: int) -> Counter[tuple[int, ...]]:
    """Sequences cut to a length; shorter ones are continued by sampling from the target."""
    draw = np.random.default_rng(seed)
    found: Counter[tuple[int, ...]] = Counter()
    for committed, count in counts.items():
        if len(committed) >= length:
            found[committed[:length]] += count
            continue
        p = world.p[(0, 1, *committed)[-2:]]
        for token, times in enumerate(draw.multinomial(count, p)):
            if times:
                found.update(
                    completed(world, Counter({(*committed, token): int(times)}), length, int(draw.integers(2**31)))
                )
    return found


def fits(world: World, rule: SpeculativeSampling, count: int, number: int) -> tuple[float, float]:
    """p-values of what the running code commits: against the target's own distribution, and against the rule's on
    paper, lengths included.
    """
    generator = torch.Generator().manual_seed(number)
    rule.generator = generator
    counts = commit(world, rule, count, generator)
    enumeration = Enumeration(world)
    length = min(world.shape.depth + 1, 3)
    truth = {
        tuple(map(int, at)): float(share)
        for at, share in np.ndenumerate(enumeration.truth((0, 1), length))
        if share > 0
    }
    return fit(completed(world, counts, length, number), truth), fit(counts, enumeration.law((0, 1)))


def check_running_code(number: int, count: int) -> None:
    each = world(number)
    against_target, against_paper = fits(each, SpeculativeSampling(each.sampling, torch.Generator()), count, number)
    print(
        f"configuration {number}: p {against_target:.4f} against the target, {against_paper:.4f} against the rule on"
        " paper"
    )
    assert against_target > LEAST
    assert against_paper > LEAST


@pytest.mark.parametrize("number", range(0, CONFIGURATIONS, 5))
def test_the_running_code_settles_the_targets_distribution(number: int) -> None:
    check_running_code(number, 5_000)


@pytest.mark.parametrize("number", SIBLINGS)
def test_each_sibling_has_a_random_number_of_its_own(number: int) -> None:
    check_running_code(number, 40_000)  # with 5,000 only one of them shows


@pytest.mark.exhaustive
@pytest.mark.parametrize("number", range(CONFIGURATIONS))
def test_the_running_code_settles_the_targets_distribution_in_many_samples(number: int) -> None:
    check_running_code(number, SAMPLES)


class Warm(SpeculativeSampling):
    """Forgets the processor at a leaf."""

    def accept(self, tree: DraftTree, logits: torch.Tensor) -> acceptance.Accepted:
        path, tokens, _ = super().accept(tree, logits)
        if tree.shape.children[path[-1]]:
            return acceptance.Accepted(path, tokens)
        bonus = torch.multinomial(torch.softmax(logits[path[-1]], -1), 1, generator=self.generator)
        return acceptance.Accepted(path, [*tokens[:-1], int(bonus)])


@pytest.mark.parametrize("name", ["no residual", "q keeps what was drawn", "bonus without temperature"])
def test_the_same_count_finds_a_wrong_rule(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = BROKEN[name]
    monkeypatch.setattr(acceptance, "after_rejection", wrong.after_rejection)
    worst = max(range(0, CONFIGURATIONS, 4), key=lambda number: Enumeration(world(number), wrong).apart(steps=False))
    rule = (Warm if wrong.warm else SpeculativeSampling)(world(worst).sampling, torch.Generator())
    assert fits(world(worst), rule, 5_000, worst)[0] < 1e-6


def test_drawn_candidates_come_without_replacement_in_the_order_of_their_turns() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0, -9.0]]).double()
    p = torch.softmax(logits[0], -1).tolist()
    ids, proposals = Draws(Sampling(1.0), torch.Generator().manual_seed(0))(logits.expand(SAMPLES, -1), 3)
    assert torch.allclose(proposals[0], torch.softmax(logits[0], -1))
    law = {
        (a, b, c): p[a] * p[b] / (1 - p[a]) * p[c] / (1 - p[a] - p[b])
        for a in range(5) for b in range(5) for c in range(5) if len({a, b, c}) == 3
    }  # fmt: skip
    assert fit(Counter(map(tuple, ids.tolist())), law) > LEAST


def test_a_draft_vocabulary_is_drawn_from_as_if_there_were_no_other_tokens() -> None:
    ids = torch.tensor([3, 7, 8, 20])
    scores = torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    cut, few = Draws(Sampling(0.7), torch.Generator().manual_seed(1))(scores, 3)
    spread = DraftVocabulary(ids, 40).spread(scores)
    whole, many = Draws(Sampling(0.7), torch.Generator().manual_seed(1))(spread, 3)
    assert torch.equal(whole, ids[cut])
    assert torch.equal(many[:, ids], few)
    assert torch.equal(many.count_nonzero(-1), few.count_nonzero(-1))


def test_where_too_few_tokens_can_be_drawn_the_next_best_follow() -> None:
    logits = torch.tensor([[0.0, 5.0, 3.0, 4.0, -math.inf]])
    ids, proposals = Draws(Sampling(1.0, top_k=2), torch.Generator().manual_seed(0))(logits.expand(50, -1), 5)
    assert {tuple(row) for row in ids.tolist()} == {(1, 3, 2, 0, 4), (3, 1, 2, 0, 4)}
    assert (proposals > 0).sum(-1).tolist() == [2] * 50


# ------------------------------------------------------------------------------------ the distribution


@pytest.mark.parametrize("top_p", [0.3, 0.7, 0.95, 1.0])
@pytest.mark.parametrize("top_k", [0, 1, 5, 100, 400])
def test_the_distribution_is_that_of_the_librarys_own_processors(top_k: int, top_p: float) -> None:
    logits = 3 * torch.randn(6, 300, dtype=torch.float64, generator=torch.Generator().manual_seed(top_k))
    logits[3:] /= 30  # so flat that the nucleus is large
    processors = [
        TemperatureLogitsWarper(0.7),
        *([TopKLogitsWarper(top_k)] if top_k else []),
        *([TopPLogitsWarper(top_p)] if top_p < 1 else []),
    ]
    scores = logits
    for processor in processors:
        scores = processor(torch.zeros(6, 1, dtype=torch.int64), scores)
    found = Sampling(0.7, top_k, top_p).probabilities(logits)
    assert torch.allclose(found, torch.softmax(scores, -1), atol=1e-12)
    assert torch.allclose(found.sum(-1), torch.ones(6, dtype=torch.float64))


def test_half_precision_is_processed_in_single_precision() -> None:
    assert Sampling(1.0).probabilities(torch.zeros(2, 5, dtype=torch.bfloat16)).dtype == torch.float32


def test_tokens_as_likely_as_the_last_one_kept_are_kept() -> None:
    logits = torch.tensor([0.5, 0.2, 0.2, 0.1]).log()
    assert Sampling(1.0, top_k=2).probabilities(logits).tolist() == pytest.approx([5 / 9, 2 / 9, 2 / 9, 0])
    assert Sampling(1.0, top_p=0.6).probabilities(logits).tolist() == pytest.approx([5 / 9, 2 / 9, 2 / 9, 0])


@pytest.mark.parametrize(
    ("numbers", "words"),
    [
        ((0.0,), "temperature is 0"), ((-1.0,), "temperature is -1"), ((math.nan,), "temperature is nan"),
        ((math.inf,), "temperature is inf"),
        ((1.0, -1), "top-k is -1"), ((1.0, 0, 0.0), "top-p is 0"), ((1.0, 0, 1.1), "top-p is 1.1"),
        ((1.0, 0, math.nan), "top-p is nan"),
    ],
)  # fmt: skip
def test_what_cannot_be_sampled_from_is_refused(numbers: tuple[float, ...], words: str) -> None:
    with pytest.raises(KoalaBenchError, match=words):
        Sampling(*numbers)  # type: ignore[arg-type]
