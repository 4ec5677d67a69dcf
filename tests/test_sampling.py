"""Sampling with drafts leaves the target's distribution as it is: by enumeration, and by counting what the running code settles."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from toy_worlds import Context, Enumeration, Law, Paper, World, world
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from koala_bench import acceptance
from koala_bench.acceptance import GREEDY, Row, SpeculativeSampling, after_rejection
from koala_bench.candidates import Pick, best
from koala_bench.decoding import VANILLA_TREE, Decoded, Vanilla, decode
from koala_bench.errors import KoalaBenchError
from koala_bench.heads import Committed
from koala_bench.registry import HEADS, build
from koala_bench.sampling import Draws, Sampling
from koala_bench.target import Target, load_target
from koala_bench.testing import save_tiny_target, tiny_config
from koala_bench.tree import DraftTree, TreeShape, TreeTemplate, load_template

CONFIGURATIONS = 60
SAMPLES = 100_000
SIBLINGS = (5, 20, 35, 57)  # configurations that show when the siblings of a node share a random number
LOOPS = (11, 13, 18, 7, 8, 9, 12, 15, 20, 21, 22, 34)  # configurations that are decoded with: chains, wide and mixed trees of each kind
LEAST = 0.001  # smallest p-value that passes; seeds are the configurations' numbers


@pytest.mark.parametrize("number", range(CONFIGURATIONS))
def test_on_paper_the_distribution_of_whole_sequences_is_the_targets(number: int) -> None:
    enumeration = Enumeration(world(number))
    assert sum(enumeration.law((0, 1)).values()) == pytest.approx(1, abs=1e-9)
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
    scarce = [each for each in worlds if each.kind == "drawn" and max(map(len, each.shape.children)) > (each.q > 0).sum(-1).min()]
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


def drafts(world: World, count: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """Draw many trees after the context (0, 1): tokens [count, nodes], proposals [count, inner nodes, vocab], the target's logits [count, nodes, vocab]."""
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


def settle(world: World, rule: SpeculativeSampling, count: int, generator: torch.Generator) -> Counter[tuple[int, ...]]:
    """What a rule settles after (0, 1), counted."""
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
    """The p-value of a chi-square test; 0 if something came that cannot. What is expected less than ten times is taken together."""
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
    for settled, count in counts.items():
        if len(settled) >= length:
            found[settled[:length]] += count
            continue
        p = world.p[(0, 1, *settled)[-2:]]
        for token, times in enumerate(draw.multinomial(count, p)):
            if times:
                found.update(completed(world, Counter({(*settled, token): int(times)}), length, int(draw.integers(2**31))))
    return found


def fits(world: World, rule: SpeculativeSampling, count: int, number: int) -> tuple[float, float]:
    """p-values of what the running code settles: against the target's own distribution, and against the rule's on paper, lengths included."""
    generator = torch.Generator().manual_seed(number)
    rule.generator = generator
    counts = settle(world, rule, count, generator)
    enumeration = Enumeration(world)
    length = min(world.shape.depth + 1, 3)
    truth = {tuple(map(int, at)): float(share) for at, share in np.ndenumerate(enumeration.truth((0, 1), length)) if share > 0}
    return fit(completed(world, counts, length, number), truth), fit(counts, enumeration.law((0, 1)))


def check_running_code(number: int, count: int) -> None:
    each = world(number)
    against_target, against_paper = fits(each, SpeculativeSampling(each.sampling, torch.Generator()), count, number)
    print(f"configuration {number}: p {against_target:.4f} against the target, {against_paper:.4f} against the rule on paper")
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


def test_where_too_few_tokens_can_be_drawn_the_next_best_follow() -> None:
    logits = torch.tensor([[0.0, 5.0, 3.0, 4.0, -math.inf]])
    ids, proposals = Draws(Sampling(1.0, top_k=2), torch.Generator().manual_seed(0))(logits.expand(50, -1), 5)
    assert {tuple(row) for row in ids.tolist()} == {(1, 3, 2, 0, 4), (3, 1, 2, 0, 4)}
    assert (proposals > 0).sum(-1).tolist() == [2] * 50


# ------------------------------------------------------------------------------------ the whole loop


class ToyCache:
    """Nothing is kept: the target looks at two tokens only."""

    capacity = 1 << 30

    def __init__(self) -> None:
        self.past = 0

    def commit(self, path: tuple[int, ...]) -> None:
        self.past += len(path)


class ToyTarget:
    """The part of ``Target`` that decoding uses, over a world's table."""

    device = torch.device("cpu")
    max_positions = 1 << 30
    name = "toy"

    def __init__(self, world: World) -> None:
        self.world = world
        self.last = 0  # token before the root

    def new_cache(self, capacity: int) -> ToyCache:
        return ToyCache()

    def prefill(self, ids: torch.Tensor, cache: ToyCache, features: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
        cache.past = len(ids)
        self.settled = ids.tolist()
        return self.world.target[ids[-2], ids[-1]], torch.zeros(len(ids), 1, 1)

    def verify(self, tree: DraftTree, cache: ToyCache, features: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
        tokens = tree.tokens.tolist()
        above = [self.last if parent < 0 else tokens[parent] for parent in tree.shape.parents]
        return self.world.target[above, tokens], torch.zeros(len(tokens), 1, 1)


class ToyHead:
    """Drafts a world's tree from its table, through ``pick`` where the world draws."""

    features = (-1,)
    max_depth = 64

    def __init__(self, target: ToyTarget) -> None:
        self.target, self.world = target, target.world
        self.before = 0
        if self.world.kind != "listed":
            self.pick: Pick = best

    def begin(self, template: TreeTemplate, capacity: int) -> None:
        self.before = 0

    def draft(self, new: Committed) -> DraftTree:
        settled = [self.before, *new.tokens.tolist()]
        self.before, self.target.last = settled[-1], settled[-2]
        shape = self.world.shape
        tokens, above = [settled[-1]] * shape.nodes, [settled[-2]] * shape.nodes
        proposals = []
        for node in shape.inner:
            context, below = (above[node], tokens[node]), shape.children[node]
            if self.world.kind == "listed":
                ids = self.world.listed[context].tolist()
            else:
                picked, found = self.pick(self.world.draft[context][None], len(below))
                ids = picked[0].tolist()
                proposals += [] if found is None else [found[0]]
            for child, token in zip(below, ids, strict=False):
                tokens[child], above[child] = token, tokens[node]
        return DraftTree(torch.tensor(tokens), shape, torch.stack(proposals) if proposals else None)


def answer(world: World, count: int, rule: acceptance.Rule, prompt: tuple[int, ...] = (0, 1), stops: tuple[int, ...] = ()) -> Decoded:
    target: Any = ToyTarget(world)
    parents = world.shape.parents
    paths: list[tuple[int, ...]] = [()]
    for node in range(1, world.shape.nodes):
        paths.append((*paths[parents[node]], world.shape.children[parents[node]].index(node)))
    return decode(target, ToyHead(target), TreeTemplate.of("toy", paths[1:]), prompt, count, stops, rule=rule)


def check_loop(number: int, count: int) -> None:
    """Given the two tokens before it, every token of one long answer is an independent draw from the target, if all is right."""
    each = world(number)
    found = answer(each, count, SpeculativeSampling(each.sampling, torch.Generator().manual_seed(number)))
    assert len(found.tokens) == count
    assert max(found.accepted) > 0  # drafts are indeed taken
    tokens = [0, 1, *found.tokens]
    counts = Counter(zip(tokens, tokens[1:], tokens[2:], strict=False))
    contexts: Counter[Context] = Counter(itertools.pairwise(tokens[:-1]))
    statistic, freedom = 0.0, 0
    for context, times in contexts.items():
        p = each.p[context]
        assert all(p[token] > 0 for token in range(each.vocab) if counts[*context, token])
        if (expected := p[p > 0] * times).min() >= 5 and len(expected) > 1:
            statistic += float(((np.array([counts[*context, int(token)] for token in p.nonzero()[0]]) - expected) ** 2 / expected).sum())
            freedom += len(expected) - 1
    value = float(stats.chi2.sf(statistic, freedom))
    print(f"configuration {number}: p {value:.4f} with {freedom} degrees of freedom, tau {(count - 1) / len(found.accepted):.2f}")
    assert freedom >= 3
    assert value > LEAST


@pytest.mark.parametrize("number", LOOPS[:3])
def test_a_long_answer_is_a_sample_of_the_target(number: int) -> None:
    check_loop(number, 4_000)


@pytest.mark.exhaustive
@pytest.mark.parametrize("number", LOOPS)
def test_a_very_long_answer_is_a_sample_of_the_target(number: int) -> None:
    check_loop(number, SAMPLES)


def sampled_law(target: Target, sampling: Sampling, prompt: list[int], length: int) -> Law:
    """Probabilities of the next ``length`` tokens, by a pass of the target over each text."""
    law: Law = {(): 1.0}
    for _ in range(length):
        known, law = law, {}
        for before, weight in known.items():
            logits = target.output(target.states(torch.tensor([[*prompt, *before]]))[0, -1, 0])
            p = sampling.probabilities(logits)
            law.update({(*before, int(token)): weight * float(p[token]) for token in p.nonzero()[:, 0]})
    return law


def test_the_first_token_of_an_answer_is_drawn_as_well(target: Target) -> None:
    sampling, prompt = Sampling(2.0, top_k=8), [1, 70, 81, 82, 90]
    rule = SpeculativeSampling(sampling, torch.Generator().manual_seed(0))
    counts = Counter(tuple(decode(target, Vanilla(), VANILLA_TREE, prompt, 1, (), rule=rule).tokens) for _ in range(3_000))
    law = sampled_law(target, sampling, prompt, 1)
    assert max(law.values()) < 0.5  # always the likeliest one would be far off
    assert fit(counts, law) > LEAST


@pytest.fixture(scope="module")
def few_tokens(tmp_path_factory: pytest.TempPathFactory) -> Target:
    """A target of eight tokens: what an untrained head or a lookup drafts is often accepted."""
    folder = save_tiny_target(tmp_path_factory.mktemp("few"), tiny_config(vocab_size=8))
    return load_target(str(folder), "cpu", "float32", tokenizer=False)


@pytest.mark.parametrize(
    ("name", "tree"),
    [
        ("medusa", "3x2x1"), ("hydra", "3x2x1"), ("eagle", "3x2x1"), ("eagle", "chain-3"), ("eagle", "dynamic-2x3x6"), ("eagle3", "3x2x1"),
        ("draft_model", "3x2x1"), ("prompt_lookup", "3x2x1"), ("suffix_lookup", "chain-3"),
    ],
)  # fmt: skip
def test_a_bundled_head_leaves_the_distribution_as_it_is(few_tokens: Target, tmp_path: Path, name: str, tree: str) -> None:
    small = {"model": str(save_tiny_target(tmp_path, tiny_config(vocab_size=8, num_hidden_layers=1), seed=5))} if name == "draft_model" else {}
    torch.manual_seed(0)
    head = build(HEADS, name, few_tokens.spec(), small).eval()
    sampling = Sampling(1.0, top_k=3)
    rule = SpeculativeSampling(sampling, torch.Generator().manual_seed(0))
    prompt = [1, 5, 3, 5, 4, 6, 7, 3, 6, 5]  # every likely token has stood before, for the lookups
    counts: Counter[tuple[int, ...]] = Counter()
    accepted = 0
    for _ in range(300):
        found = decode(few_tokens, head, load_template(tree), prompt, 3, (), rule=rule)
        counts[tuple(found.tokens)] += 1
        accepted += sum(found.accepted)
    value = fit(counts, sampled_law(few_tokens, sampling, prompt, 3))
    print(f"{name} {tree}: p {value:.4f}, {accepted} drafts accepted")
    assert accepted > 10
    assert value > LEAST


def test_an_answer_follows_from_its_seed_alone() -> None:
    each = world(11)
    first, again, other = (answer(each, 200, SpeculativeSampling(each.sampling, torch.Generator().manual_seed(seed))).tokens for seed in (1, 1, 2))
    assert first == again != other
    for limit in (1, 2, 5):
        assert answer(each, limit, SpeculativeSampling(each.sampling, torch.Generator().manual_seed(1))).tokens == first[:limit]


def test_sampling_ends_where_greedy_decoding_would() -> None:
    each = world(11)
    tokens = answer(each, 200, SpeculativeSampling(each.sampling, torch.Generator().manual_seed(1))).tokens
    stop = tokens[20]
    ended = answer(each, 200, SpeculativeSampling(each.sampling, torch.Generator().manual_seed(1)), stops=(stop,))
    assert (ended.tokens, ended.stop) == (tokens[: tokens.index(stop) + 1], "eos")
    assert ended.distances is None


def test_a_head_drafts_as_the_rule_wants_and_greedily_again_afterwards() -> None:
    target: Any = ToyTarget(world(13))
    head = ToyHead(target)
    template = TreeTemplate.of("toy", [(0,), (0, 0)])
    rule = SpeculativeSampling(Sampling(1.0), torch.Generator())
    truth = decode(target, head, template, [0, 1], 30, ()).tokens
    assert head.pick is best
    decode(target, head, template, [0, 1], 30, (), rule=rule)
    assert head.pick is rule.pick
    assert decode(target, head, template, [0, 1], 30, (), rule=GREEDY).tokens == truth
    assert head.pick is best


def test_without_drafts_the_target_samples_alone() -> None:
    each = world(28)
    target: Any = ToyTarget(each)
    rule = SpeculativeSampling(each.sampling, torch.Generator().manual_seed(0))
    counts = Counter(rule.accept(DraftTree(torch.tensor([1]), TreeShape((-1,))), each.target[0, 1][None]).tokens[0] for _ in range(3_000))
    assert stats.chisquare([counts[token] for token in range(3)], 3_000 * each.p[0, 1]).pvalue > LEAST
    assert len(decode(target, Vanilla(), VANILLA_TREE, [0, 1], 50, (), rule=rule).accepted) == 49  # one token a step


def test_what_the_device_holds_is_read_in_one_piece() -> None:
    numbers = torch.Generator().manual_seed(0)
    parts = [
        torch.arange(5),
        torch.randn(5, 7, generator=numbers).half(),
        torch.randn(3, 7, generator=numbers),
        torch.randn(7, 2, generator=numbers).T.double(),
    ]
    for read, part in zip(acceptance.unpacked(acceptance.packed(parts), parts), parts, strict=True):
        assert read.dtype == part.dtype
        assert torch.equal(read, part)


@pytest.mark.cuda
def test_a_gpu_settles_what_the_cpu_does() -> None:
    each = world(11)
    tokens, proposals, logits = drafts(each, 200, torch.Generator().manual_seed(0))
    assert proposals is not None

    def settled(device: str) -> list[acceptance.Accepted]:
        rule = SpeculativeSampling(each.sampling, torch.Generator().manual_seed(0))
        trees = [DraftTree(tokens[i].to(device), each.shape, proposals[i].to(device)) for i in range(200)]
        return [rule.accept(tree, logits[i].to(device)) for i, tree in enumerate(trees)]

    assert settled("cuda") == settled("cpu")
    ids, _ = Draws(each.sampling, torch.Generator())(each.draft[0, 1].cuda().expand(10_000, -1), 1)
    counts = torch.bincount(ids[:, 0].cpu(), minlength=each.vocab)
    assert stats.chisquare(counts, 10_000 * each.q[0, 1]).pvalue > LEAST


# ------------------------------------------------------------------------------------ the distribution


@pytest.mark.parametrize("top_p", [0.3, 0.7, 0.95, 1.0])
@pytest.mark.parametrize("top_k", [0, 1, 5, 100, 400])
def test_the_distribution_is_that_of_the_librarys_own_processors(top_k: int, top_p: float) -> None:
    logits = 3 * torch.randn(6, 300, dtype=torch.float64, generator=torch.Generator().manual_seed(top_k))
    logits[3:] /= 30  # so flat that the nucleus is large
    processors = [TemperatureLogitsWarper(0.7), *([TopKLogitsWarper(top_k)] if top_k else []), *([TopPLogitsWarper(top_p)] if top_p < 1 else [])]
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
        ((0.0,), "temperature is 0"), ((-1.0,), "temperature is -1"), ((math.nan,), "temperature is nan"), ((math.inf,), "temperature is inf"),
        ((1.0, -1), "top-k is -1"), ((1.0, 0, 0.0), "top-p is 0"), ((1.0, 0, 1.1), "top-p is 1.1"), ((1.0, 0, math.nan), "top-p is nan"),
    ],
)  # fmt: skip
def test_what_cannot_be_sampled_from_is_refused(numbers: tuple[float, ...], words: str) -> None:
    with pytest.raises(KoalaBenchError, match=words):
        Sampling(*numbers)  # type: ignore[arg-type]
