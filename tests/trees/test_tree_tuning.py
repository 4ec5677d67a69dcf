"""Trees for a machine: ranks that are the head's, searches that find what brute force finds, expectations that follow
from both.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from heads.prompt_lookup import PromptLookup
from heads.token_recycling import TokenRecycling
from koala_bench.decoding.loop import VANILLA_TREE, Vanilla, decode
from koala_bench.errors import KoalaBenchError
from koala_bench.evaluation.methods import load_methods
from koala_bench.heads import Committed
from koala_bench.tree import DraftTree, Template, TreeTemplate, load_template
from koala_bench.trees.rank_profile import RankProfile, measure_ranks
from koala_bench.trees.search import BestTrees, greedy
from koala_bench.trees.tuning import StepTimes, Tuned, in_words, measure_steps, tune
from tests.support.commands import EAGER, Koala
from tests.support.small_runs import Bench

Path_ = tuple[int, ...]
PROMPTS = [[1, 2, 3, 4], [9, 8, 7], [20, 30, 40, 50, 60]]


def trees(nodes: int, depth: int, ranks: int) -> Iterator[set[Path_]]:
    """Every tree of so many drafted nodes, found the slow way."""
    every = [path for length in range(1, depth + 1) for path in itertools.product(range(ranks), repeat=length)]
    for chosen in itertools.combinations(every, nodes):
        tree = set(chosen)
        if all(len(path) == 1 or path[:-1] in tree for path in tree):
            yield tree


def falling(seed: int, depth: int, ranks: int) -> np.ndarray[Any, Any]:
    """Probabilities that fall with the rank, as those of a head do, and add up to less than 1."""
    drawn = np.sort(np.random.default_rng(seed).dirichlet(np.ones(ranks + 1), size=depth)[:, :ranks])[:, ::-1]
    return np.ascontiguousarray(drawn)


# ------------------------------------------------------------------------------ searches


@pytest.mark.parametrize("seed", range(8))
def test_the_program_finds_the_best_tree_of_all(seed: int) -> None:
    p = falling(seed, 3, 2)
    if seed >= 6:  # few positions may have counted a later rank more often
        p = np.ascontiguousarray(p[:, ::-1])
    search = BestTrees(p, 5)
    for nodes in range(1, 6):
        for depth in (1, 2, 3):
            worth = {
                frozenset(tree): sum(
                    float(np.prod([p[level, rank] for level, rank in enumerate(path)])) for path in tree
                )
                for tree in trees(nodes, depth, 2)
            }
            paths, value = search.best(nodes, depth)
            if worth:  # there may be no tree of so many nodes and so few levels
                assert value == pytest.approx(max(worth.values()))
                assert worth[frozenset(paths)] == pytest.approx(value)
            TreeTemplate.of("found", paths)  # a tree at all


def profile_of(seed: int) -> RankProfile:
    ranks = np.random.default_rng(seed).choice([0, 1, 2, -1], p=[0.55, 0.25, 0.1, 0.1], size=(60, 3))
    return RankProfile(ranks.astype(np.int64))


@pytest.mark.parametrize("seed", range(3))
def test_the_greedy_tree_is_the_best_for_the_positions_that_were_counted(seed: int) -> None:
    profile = profile_of(seed)
    for nodes, depth in ((1, 3), (3, 2), (4, 3)):
        found = greedy(profile, nodes, depth, 2)
        assert profile.expected(found) == pytest.approx(
            max(profile.expected(list(tree)) for tree in trees(nodes, depth, 2))
        )


def test_expectations_of_a_few_positions_by_hand() -> None:
    profile = RankProfile(np.asarray([[0, 0], [0, 1], [1, 0], [3, 0], [0, -1]]))
    assert (
        profile.frequency((0,)) == 3 / 5 and profile.frequency((0, 0)) == 1 / 5 and profile.frequency((1, 0)) == 1 / 5
    )
    assert profile.expected([(0,), (1,), (0, 0)]) == pytest.approx(3 / 5 + 1 / 5 + 1 / 5)
    # The fourth position's first token is beyond both candidates: no tree is there at the second level.
    np.testing.assert_allclose(profile.conditional(2), [[3 / 5, 1 / 5], [2 / 4, 1 / 4]])


def test_steps_begin_where_the_one_before_ended() -> None:
    profile = RankProfile(np.asarray([[0, 0], [2, 0], [0, 1], [0, -1], [1, 0], [0, -1]]), (4, 2))
    assert profile.steps([(0,), (0, 0)]).tolist() == [0, 3, 4, 5]  # two, none behind the end, none, one
    assert profile.length([(0,), (0, 0)]) == 6 / 4
    assert profile.length([]) == 1.0
    assert profile.at(np.asarray([0, 4])).length([(0,), (0, 0)]) == 1 + 2 / 2


@pytest.mark.parametrize("method", ["medusa", "eagle"])
def test_the_expected_length_is_that_of_decoding(bench: Bench, method: str) -> None:
    """Ranks are measured along the answers, and the same answers are decoded with the tree: on the same prompts nothing
    is left to chance.
    """
    ready = load_methods(bench.preset(), ["vanilla", method], bench.target, bench.heads)[1]
    template = load_template("150x20")
    assert isinstance(template, TreeTemplate)
    profile = measure_ranks(bench.target, ready.head, PROMPTS, 12, 2, 259, 16)
    answers = [decode(bench.target, ready.head, template, prompt, 12, bench.target.stop_ids) for prompt in PROMPTS]
    assert any(sum(answer.accepted) for answer in answers)
    tokens, steps = sum(len(answer.tokens) - 1 for answer in answers), sum(len(answer.accepted) for answer in answers)
    assert profile.length(template.paths) == pytest.approx(tokens / steps)


# ------------------------------------------------------------------------------ ranks


@pytest.mark.parametrize("method", ["medusa", "eagle"])
def test_ranks_are_those_of_the_trees_that_the_head_would_draft(bench: Bench, method: str) -> None:
    """A wide tree is drafted at every position: the true path is in it exactly as far as the ranks say."""
    ready = load_methods(bench.preset(), ["vanilla", method], bench.target, bench.heads)[1]
    profile = measure_ranks(bench.target, ready.head, PROMPTS, 10, 2, 259, 16)
    template = load_template("4x3")
    row = 0
    for prompt in PROMPTS:
        answer = decode(bench.target, Vanilla(), VANILLA_TREE, prompt, 10, bench.target.stop_ids).tokens
        for place in range(len(answer) - 1):
            # The tokens up to here as a prompt: its first draft is that of a step that ended here.
            known = [*prompt, *answer[:place]]
            found = decode(bench.target, ready.head, template, known, 4, (), trace=True)
            assert found.tokens[0] == answer[place]
            tree, truth = found.steps[0].tree_tokens, answer[place + 1 :]
            first, second = (int(rank) for rank in profile.ranks[row])
            row += 1
            assert (truth[0] in tree[1:5]) == (0 <= first < 4)
            if 0 <= first < 4:
                assert tree[1 + first] == truth[0]
                below = tree[5 + 3 * first : 8 + 3 * first]
                assert second == -1 if len(truth) == 1 else (truth[1] in below) == (second < 3)
    assert row == len(profile.ranks)


class Following:
    """Fills static trees without scores: the child of rank r is the token r + 1 ids behind its parent's."""

    features, max_depth = (-1,), 2

    def __init__(self, vocabulary: int) -> None:
        self._vocabulary, self.observed = vocabulary, list[tuple[int, int]]()

    def begin(self, template: Template, capacity: int) -> None:
        self._template = template

    def draft(self, new: Committed) -> DraftTree:
        tokens = [int(new.tokens[-1])]
        for path, parent in zip(self._template.paths, self._template.shape.parents[1:], strict=True):
            tokens.append((tokens[parent] + path[-1] + 1) % self._vocabulary)
        return DraftTree(torch.tensor(tokens), self._template.shape)

    def observe(self, tree: DraftTree, logits: torch.Tensor) -> None:
        self.observed += zip(tree.tokens.tolist(), logits.argmax(-1).tolist(), strict=True)


def test_ranks_of_a_head_without_scores_are_places_in_its_trees(bench: Bench) -> None:
    size = bench.target.config.vocab_size
    head, row, seen = Following(size), 0, list[tuple[int, int]]()
    profile = measure_ranks(bench.target, head, PROMPTS, 10, 2, size, 3 * size)
    for prompt in PROMPTS:
        answer = decode(bench.target, Vanilla(), VANILLA_TREE, prompt, 10, bench.target.stop_ids).tokens
        seen += itertools.pairwise(answer)
        for place in range(len(answer) - 1):
            expected, filled = list[int](), 1
            for before, token in itertools.pairwise(answer[place : place + 3]):
                rank = (token - before - 1) % size
                filled *= rank + 1
                if filled >= 3 * size:  # so many better siblings fill a tree without it
                    break
                expected.append(rank)
            assert profile.ranks[row].tolist() == [*expected, -1, -1][:2]
            row += 1
    assert row == len(profile.ranks) and (profile.ranks[:, 0] >= 0).all()
    assert head.observed == seen, "what the target said after each token"


def test_trees_are_tuned_for_a_head_that_learns_while_decoding(bench: Bench) -> None:
    head = TokenRecycling(bench.target.spec())
    found = tune(bench.target, head, load_template("2x1"), PROMPTS, tokens=24, most=6, depth=3, widest=4)
    assert all(2 <= each.template.nodes <= 6 and each.measured_length >= 1 for each in found)
    assert max(each.length for each in found) > 1, "the answers repeat themselves"


@pytest.mark.parametrize("head", [Vanilla, PromptLookup])
def test_a_head_without_candidates_of_its_own_is_one_clear_error(bench: Bench, head: Any) -> None:
    made = head() if head is Vanilla else head(bench.target.spec())
    with pytest.raises(KoalaBenchError, match=f"{head.__name__} has no candidates to rank"):
        measure_ranks(bench.target, made, PROMPTS, 8, 2, 4, 16)


# ------------------------------------------------------------------------------ times, and the whole


def test_a_step_costs_its_parts() -> None:
    times = StepTimes(np.asarray([0.0, 1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6]), (0.1, 0.2, 0.01), 0.5)
    assert times.base == 1.5
    assert times.step(load_template("2x2")) == pytest.approx(1.6 + 0.1 + 2 * 0.2 + 2 * 0.01 + 0.5)  # type: ignore[arg-type]


def test_step_times_cover_every_size(bench: Bench) -> None:
    ready = load_methods(bench.preset(), ["vanilla", "eagle"], bench.target, bench.heads)[1]
    times = measure_steps(bench.target, ready.head, 9, 2, 3)
    assert len(times.verify) == 10 and (times.verify[1:] > 0).all() and times.around > 0


def test_tuning_compares_both_searches_with_the_usual_tree(bench: Bench) -> None:
    torch.manual_seed(0)
    ready = load_methods(bench.preset(), ["vanilla", "eagle"], bench.target, bench.heads)[1]
    found = tune(
        bench.target, ready.head, load_template("2x1"), PROMPTS, tokens=10, most=6, depth=3, widest=259
    )  # the heads are bad
    assert {each.found for each in found} == {"dynamic programming", "greedy", "usual (2x1)"}
    assert [each.measured_speedup for each in found] == sorted((each.measured_speedup for each in found), reverse=True)
    for each in found:
        assert 2 <= each.template.nodes <= 6 and each.template.depth <= 3
        assert 1 <= each.length <= 1 + each.template.depth and 1 <= each.measured_length <= 1 + each.template.depth
    assert len(in_words("eagle", found).splitlines()) == 4 + len(found)


def test_a_head_that_is_never_right_is_one_clear_error(bench: Bench) -> None:
    ready = load_methods(bench.preset(), ["vanilla", "eagle"], bench.target, bench.heads)[1]
    with pytest.raises(KoalaBenchError, match="None of the head's best candidates was right"):
        tune(bench.target, ready.head, load_template("2x1"), PROMPTS[:2], tokens=10, most=4, depth=1, widest=1)


def test_the_words_say_how_far_expectation_and_measurement_are_apart() -> None:
    tuned = Tuned("greedy", load_template("2x1"), 2.0, 1.5, 1.9, 1.35)  # type: ignore[arg-type]
    assert in_words("eagle", [tuned]).splitlines()[-1] == "| greedy | 5 | 2 | 2.00 | 1.90 | 1.50 | 1.35 | -10.0 |"


def test_the_command_writes_a_tree_that_can_be_decoded_with(koala: Koala, bench: Bench, tmp_path: Path) -> None:
    at = [
        "--target", str(bench.folder / "target"), "--heads", str(bench.heads), "--set",
        f"data.source={json.dumps(str(bench.folder / 'conversations.jsonl'))}", *EAGER,
    ]  # fmt: skip
    sizes = ["--prompts", "2", "--tokens", "6", "--nodes", "4", "--depth", "2", "--ranks", "256"]
    done = koala("tune-tree", "eagle", "--out", str(tmp_path / "tree.json"), *sizes, *at)
    assert done.code == 0, done.err
    assert load_template(str(tmp_path / "tree.json")).nodes <= 4
    assert "dynamic programming" in done.out
