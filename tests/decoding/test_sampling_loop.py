"""Sampling through the whole decoding loop: long answers, first tokens, every kind of head, seeds, ends and devices."""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from koala_bench.decoding import acceptance
from koala_bench.decoding.acceptance import GREEDY, SpeculativeSampling
from koala_bench.decoding.candidates import Pick, best
from koala_bench.decoding.loop import VANILLA_TREE, Decoded, Vanilla, decode
from koala_bench.decoding.sampling import Draws, Sampling
from koala_bench.engine.loading.targets import load_target
from koala_bench.engine.target import Target, drafted_and_likeliest
from koala_bench.heads import Committed
from koala_bench.registry import HEADS, build
from koala_bench.testing import save_tiny_target, tiny_config
from koala_bench.tree import DraftTree, TreeShape, TreeTemplate, load_template
from tests.decoding.test_sampling import LEAST, SAMPLES, drafts, fit
from tests.support.toy_worlds import Context, Law, World, world

LOOPS = (
    11,
    13,
    18,
    7,
    8,
    9,
    12,
    15,
    20,
    21,
    22,
    34,
)  # configurations that are decoded with: chains, wide and mixed trees of each kind


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
    greedy_read = staticmethod(drafted_and_likeliest)
    stop_texts = ()
    tokenizer = None
    config = SimpleNamespace(vocab_size=1 << 30)

    def __init__(self, world: World) -> None:
        self.world = world
        self.last = 0  # token before the root

    def check_rows(self, rows: int) -> None:
        """There is no length at which it changes."""

    def new_cache(self, capacity: int) -> ToyCache:
        return ToyCache()

    def prefill(
        self, ids: torch.Tensor, cache: ToyCache, features: tuple[int, ...]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        cache.past = len(ids)
        self.committed = ids.tolist()
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
        committed = [self.before, *new.tokens.tolist()]
        self.before, self.target.last = committed[-1], committed[-2]
        shape = self.world.shape
        tokens, above = [committed[-1]] * shape.nodes, [committed[-2]] * shape.nodes
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


def answer(
    world: World, count: int, rule: acceptance.Rule, prompt: tuple[int, ...] = (0, 1), stops: tuple[int, ...] = ()
) -> Decoded:
    target: Any = ToyTarget(world)
    parents = world.shape.parents
    paths: list[tuple[int, ...]] = [()]
    for node in range(1, world.shape.nodes):
        paths.append((*paths[parents[node]], world.shape.children[parents[node]].index(node)))
    return decode(target, ToyHead(target), TreeTemplate.of("toy", paths[1:]), prompt, count, stops, rule=rule)


def check_loop(number: int, count: int) -> None:
    """Given the two tokens before it, every token of one long answer is an independent draw from the target, if all is
    right.
    """
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
            statistic += float(
                (
                    (np.array([counts[*context, int(token)] for token in p.nonzero()[0]]) - expected) ** 2 / expected
                ).sum()
            )
            freedom += len(expected) - 1
    value = float(stats.chi2.sf(statistic, freedom))
    print(
        f"configuration {number}: p {value:.4f} with {freedom} degrees of freedom, tau"
        f" {(count - 1) / len(found.accepted):.2f}"
    )
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
    counts = Counter(
        tuple(decode(target, Vanilla(), VANILLA_TREE, prompt, 1, (), rule=rule).tokens) for _ in range(600)
    )
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
        ("medusa", "3x2x1"), ("hydra", "3x2x1"), ("eagle", "3x2x1"), ("eagle", "chain-3"), ("eagle", "dynamic-2x3x6"),
        ("eagle3", "3x2x1"),
        ("draft_model", "3x2x1"), ("prompt_lookup", "3x2x1"), ("suffix_lookup", "chain-3"),
        ("token_recycling", "3x2x1"), ("p_eagle", "3x2x1"), ("p_eagle", "dynamic-2x3x6"), ("dflash", "3x2x1"),
    ],
)  # fmt: skip
def test_a_bundled_head_leaves_the_distribution_as_it_is(
    few_tokens: Target, tmp_path: Path, name: str, tree: str
) -> None:
    small = (
        {"model": str(save_tiny_target(tmp_path, tiny_config(vocab_size=8, num_hidden_layers=1), seed=5))}
        if name == "draft_model"
        else {}
    )
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
    first, again, other = (
        answer(each, 200, SpeculativeSampling(each.sampling, torch.Generator().manual_seed(seed))).tokens
        for seed in (1, 1, 2)
    )
    assert first == again != other
    for limit in (1, 2, 5):
        assert (
            answer(each, limit, SpeculativeSampling(each.sampling, torch.Generator().manual_seed(1))).tokens
            == first[:limit]
        )


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
    counts = Counter(
        rule.accept(DraftTree(torch.tensor([1]), TreeShape((-1,))), each.target[0, 1][None]).tokens[0]
        for _ in range(3_000)
    )
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

    def committed(device: str) -> list[acceptance.Accepted]:
        rule = SpeculativeSampling(each.sampling, torch.Generator().manual_seed(0))
        trees = [DraftTree(tokens[i].to(device), each.shape, proposals[i].to(device)) for i in range(200)]
        return [rule.accept(tree, logits[i].to(device)) for i, tree in enumerate(trees)]

    assert committed("cuda") == committed("cpu")
    ids, _ = Draws(each.sampling, torch.Generator())(each.draft[0, 1].cuda().expand(10_000, -1), 1)
    counts = torch.bincount(ids[:, 0].cpu(), minlength=each.vocab)
    assert stats.chisquare(counts, 10_000 * each.q[0, 1]).pvalue > LEAST
