"""Trees grown level by level: EAGLE-2's against references that search exhaustively, static ones against drafting path
by path.
"""

from __future__ import annotations

import random
from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from heads.common.drafting import KVCache
from heads.common.growth import LevelNodes, draft, draft_dynamic, draft_static, levels_of
from heads.eagle import Eagle
from heads.medusa import Medusa
from heads.prompt_lookup import PromptLookup
from heads.suffix_lookup import SuffixLookup
from koala_bench.decoding.candidates import best
from koala_bench.decoding.loop import VANILLA_TREE, Vanilla, decode
from koala_bench.engine.cache import TreeCache
from koala_bench.engine.target import Target
from koala_bench.errors import KoalaBenchError
from koala_bench.heads import Committed
from koala_bench.tree import DraftTree, DynamicTemplate, TreeShape, TreeTemplate, load_template

CPU = torch.device("cpu")
ROOT = 3
PROMPT = [1, 70, 81, 82, 90, 33]
UNEVEN = TreeTemplate.of(
    "uneven", [[0], [2], [3], [0, 1], [2, 0], [2, 3], [0, 1, 0], [2, 3, 1], [2, 3, 2], [2, 3, 1, 0]]
)


class Toy:
    """A head over a few tokens whose scores depend on the whole path, and which checks what it is asked to grow."""

    def __init__(self, vocab: int, seed: int = 0, spread: float = 2.0) -> None:
        self.vocab, self.seed, self.spread = vocab, seed, spread

    def scores(self, path: tuple[int, ...]) -> torch.Tensor:
        seed = random.Random(f"{self.seed} {path}").randrange(2**31)
        return self.spread * torch.randn(self.vocab, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))

    def read(self, new: Committed) -> torch.Tensor:
        self.level: list[tuple[int, ...]] = [()]
        self.rows: list[tuple[int, ...]] = []
        return self.scores(())[None]

    def score_children(self, level: LevelNodes) -> torch.Tensor:
        assert level.offset == len(self.rows)
        self.level = [
            (*self.level[parent], token)
            for parent, token in zip(level.parents.tolist(), level.tokens.tolist(), strict=True)
        ]
        self.rows += self.level
        assert all(len(path) == level.depth for path in self.level)
        assert level.tree_mask.tolist() == [[row == path[: len(row)] for row in self.rows] for path in self.level]
        return torch.stack([self.scores(path) for path in self.level])


def committed(vocab: int = 8) -> Committed:
    return Committed(torch.tensor([5 % vocab, ROOT]), torch.zeros(2, 1, 4), 0)


def paths_of(tree: DraftTree) -> list[tuple[int, ...]]:
    """The tokens on the way to each node, the root's left out."""
    tokens = tree.tokens.tolist()
    return [tuple(tokens[node] for node in tree.shape.path_to(at)[1:]) for at in range(tree.shape.nodes)]


def log_probability(head: Toy, path: tuple[int, ...]) -> float:
    return sum(float(torch.log_softmax(head.scores(path[:depth]), -1)[path[depth]]) for depth in range(len(path)))


# ------------------------------------------------------------------------------ EAGLE-2's tree


@pytest.mark.parametrize(("expansions", "width", "drafted"), [(1, 4, 4), (2, 4, 3), (3, 4, 4), (4, 3, 3), (3, 2, 1)])
@pytest.mark.parametrize("seed", range(5))
def test_up_to_its_width_the_tree_holds_the_most_likely_of_all_sequences(
    expansions: int, width: int, drafted: int, seed: int
) -> None:
    """With N <= K nothing that belongs to the best N is ever dropped: what is above it is likelier and so among the
    best N too.
    """
    head = Toy(4, seed)
    every = [path for depth in range(1, expansions + 2) for path in product(range(4), repeat=depth)]
    wanted = sorted(every, key=lambda path: -log_probability(head, path))[:drafted]
    tree = draft_dynamic(head, committed(4), DynamicTemplate.of(expansions, width, drafted))
    assert tree.tokens[0] == ROOT
    assert set(paths_of(tree)[1:]) == set(wanted)


def beam(head: Toy, expansions: int, width: int, drafted: int) -> list[tuple[int, ...]]:
    """EAGLE-2's search with lists: nodes in the order they are scored, of which the best are kept in that order."""
    level: list[tuple[int, ...]] = [()]
    scored: list[tuple[int, ...]] = []
    for _ in range(expansions + 1):
        offered = [(*path, token) for path in level for token in head.scores(path).topk(width).indices.tolist()]
        scored += offered
        level = sorted(offered, key=lambda path: -log_probability(head, path))[:width]
    kept = set(sorted(scored, key=lambda path: -log_probability(head, path))[:drafted])
    return [path for path in scored if path in kept]


@pytest.mark.parametrize(
    ("expansions", "width", "drafted"), [(1, 1, 2), (1, 3, 12), (2, 3, 20), (5, 8, 25), (3, 5, 80), (6, 2, 9)]
)
@pytest.mark.parametrize("spread", [0.5, 4.0])
def test_the_tree_is_that_of_a_search_with_lists_node_by_node(
    expansions: int, width: int, drafted: int, spread: float
) -> None:
    head = Toy(9, 1, spread)
    wanted = beam(head, expansions, width, drafted)
    tree = draft_dynamic(head, committed(9), DynamicTemplate.of(expansions, width, drafted))
    assert len(set(wanted)) == drafted
    # The search lists a level by its grown nodes, the best first, as upstream does; the nodes keep that order.
    assert paths_of(tree) == [(), *wanted]
    assert tree.proposals is None
    assert tree.shape.depth <= expansions + 1


def test_a_certain_child_never_comes_without_its_parent() -> None:
    """Where a path is certain all of it has log-probability 0: a search that breaks ties anyhow could keep a child
    alone.
    """

    class Certain(Toy):
        def scores(self, path: tuple[int, ...]) -> torch.Tensor:
            return torch.full((self.vocab,), -torch.inf).index_fill(0, torch.tensor(len(path) % self.vocab), 0.0)

    for drafted in range(1, 12):
        tree = draft_dynamic(Certain(5), committed(5), DynamicTemplate.of(4, 3, drafted))
        chain = [tuple(depth % 5 for depth in range(length)) for length in range(6)]
        assert set(paths_of(tree)) >= set(chain[: drafted + 1])


@pytest.mark.parametrize(
    "name", ["dynamic-1x1x1", "dynamic-1x4x6", "dynamic-3x5x12", "dynamic-5x8x25", "dynamic-3x10x60"]
)
@pytest.mark.parametrize("head_name", ["eagle", "medusa"])
def test_decoding_with_a_dynamic_tree_is_lossless(target64: Target, name: str, head_name: str) -> None:
    torch.manual_seed(0)
    template = load_template(name)
    head: Any = Eagle(target64.spec(), layers=2) if head_name == "eagle" else Medusa(target64.spec(), heads=6)
    head = head.double().eval()
    vanilla = decode(target64, Vanilla(), VANILLA_TREE, PROMPT, 40, ()).tokens
    for _ in range(2):  # the second time the head must have forgotten the first
        answer = decode(target64, head, template, PROMPT, 40, (), trace=True)
        assert answer.tokens == vanilla
        # Steps at the end of the target's context apart, every tree has its full number of nodes.
        assert {len(step.tree_tokens) for step in answer.steps} == {template.nodes}


def test_the_tree_grown_by_eagle_ranks_what_its_training_pass_predicts(target64: Target) -> None:
    """The same search over whole sequences, without rows kept from step to step and without masks."""
    torch.manual_seed(0)
    head = Eagle(target64.spec(), layers=2).double().eval()
    ids = torch.randint(3, 259, (20,), generator=torch.Generator().manual_seed(1))
    states = target64.states(ids[None])[0, :, 0].clone()

    class Whole(Toy):
        def scores(self, path: tuple[int, ...]) -> torch.Tensor:
            pairs, tokens = list(states[:19]), ids[1:20].tolist()
            for token in path:
                pairs.append(head(torch.tensor([tokens]), torch.stack(pairs)[None])[0, -1])
                tokens.append(token)
            return target64.output(head(torch.tensor([tokens]), torch.stack(pairs)[None])[0, -1])

    template = DynamicTemplate.of(2, 3, 9)
    with torch.no_grad():
        head.begin(template, 64)
        head.draft(Committed(ids[1:12], states[:11, None], 0))  # an earlier step, whose drafts are overwritten
        tree = head.draft(Committed(ids[12:20], states[11:19, None], 11))
        assert paths_of(tree) == [(), *beam(Whole(259), 2, 3, 9)]


# ------------------------------------------------------------------------------ static trees


@pytest.mark.parametrize(
    "template",
    [load_template("chain-4"), load_template("3"), load_template("3x2x2"), load_template("eagle/mc_sim_7b_63"), UNEVEN],
)
def test_filling_a_template_takes_the_candidate_of_each_nodes_rank(template: TreeTemplate) -> None:
    head = Toy(17)
    tree = draft_static(head, committed(17), levels_of(template, CPU), best)
    assert (tree.shape, tree.proposals) == (template.shape, None)
    known: dict[tuple[int, ...], tuple[int, ...]] = {(): ()}
    for path in template.paths:
        above = known[path[:-1]]
        known[path] = (*above, int(head.scores(above).topk(path[-1] + 1).indices[-1]))
    assert paths_of(tree) == list(known.values())


@pytest.mark.parametrize("template", [load_template("3x2x2"), UNEVEN])
def test_siblings_that_are_drawn_are_the_first_draws_whatever_their_ranks(template: TreeTemplate) -> None:
    """A rank that a template skips must not skip a draw: siblings are draws without replacement from one row."""
    head = Toy(17)
    drawn: list[tuple[list[int], torch.Tensor]] = []

    def pick(logits: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        proposals = torch.softmax(logits, -1)
        ids = torch.multinomial(proposals, count, generator=torch.Generator().manual_seed(len(drawn)))
        drawn.extend(zip(ids.tolist(), proposals, strict=True))
        return ids, proposals

    tree = draft(head, committed(17), levels_of(template, CPU), pick)
    assert tree.proposals is not None
    assert len(drawn) == len(tree.shape.inner)
    tokens, paths = tree.tokens.tolist(), paths_of(tree)
    for node, row, (ids, proposals) in zip(tree.shape.inner, tree.proposals, drawn, strict=True):
        children = [tokens[child] for child in tree.shape.children[node]]
        assert children == ids[: len(children)]
        assert torch.equal(row, proposals)
        assert torch.equal(row, torch.softmax(head.scores(paths[node]), -1))


def test_medusa_draws_anew_for_every_inner_node(target: Target) -> None:
    torch.manual_seed(0)
    head = Medusa(target.spec()).eval()
    asked: list[tuple[int, int]] = []

    def pick(logits: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        asked.append((len(logits), count))
        flat = torch.softmax(logits / 20, -1)  # nearly uniform, so that equal draws would be no accident
        return torch.multinomial(flat, count, generator=torch.Generator().manual_seed(0)), flat

    head.pick = pick
    template = load_template("4x2x2")
    with torch.inference_mode():
        head.begin(template, 64)
        tree = head.draft(Committed(torch.tensor([5, ROOT]), target.states(torch.tensor([[4, 5]]))[0], 0))
    assert asked == [(1, 4), (4, 2), (8, 2)]
    assert tree.proposals is not None
    assert tree.proposals.shape == (13, 259)
    tokens, shape = tree.tokens.tolist(), tree.shape
    for depth in (1, 2):
        level = [node for node in shape.inner if shape.depths[node] == depth]
        rows = [tree.proposals[shape.inner.index(node)] for node in level]
        assert all(torch.equal(row, rows[0]) for row in rows)
        assert len({tuple(tokens[child] for child in shape.children[node]) for node in level}) == len(level)


@pytest.mark.parametrize("tree", ["medusa/mc_sim_7b_63", "3x2x1", "chain-4"])
def test_medusas_one_search_finds_what_growing_level_by_level_does(target: Target, tree: str) -> None:
    torch.manual_seed(0)
    head = Medusa(target.spec(), layers=2).eval()
    torch.nn.init.normal_(head.block_weight, std=0.3)
    new = Committed(torch.tensor([5, ROOT]), target.states(torch.tensor([[4, 5]]))[0], 0)
    template = load_template(tree)
    with torch.inference_mode():
        head.begin(template, 64)
        at_once, by_level = head.draft(new), draft_static(head, new, levels_of(template, CPU), best)
    assert at_once.tokens.tolist() == by_level.tokens.tolist()
    assert at_once.shape == by_level.shape


def test_medusa_without_projections_of_its_own_scores_with_the_targets(target: Target) -> None:
    torch.manual_seed(0)
    head = Medusa(target.spec(), heads=3, own_output=False).eval()
    assert [name for name, _ in head.named_parameters()] == ["block_weight", "block_bias"]
    states = target.states(torch.tensor([[4, 5]]))[0].clone()
    template = load_template("2x2x2")
    with torch.no_grad():
        head.begin(template, 64)
        tree = head.draft(Committed(torch.tensor([5, ROOT]), states, 0))
        for node in range(1, tree.shape.nodes):
            logits = target.output(head.blocks(states[-1, 0], tree.shape.depths[node] - 1))
            assert int(tree.tokens[node]) == int(logits.topk(2).indices[template.paths[node - 1][-1]])


# ------------------------------------------------------------------------------ masks


@pytest.mark.parametrize("name", ["3x2x1", "dynamic-3x4x9"])
def test_a_level_sees_what_is_settled_and_what_is_above_it(name: str) -> None:
    template, settled_rows = load_template(name), 5
    levels = levels_of(template, CPU)
    memories = [
        KVCache(torch.zeros(1, 2, 1, 2, 20, 4), torch.arange(30)[None], rows)
        for rows in (settled_rows, torch.tensor(settled_rows))
    ]
    looked = 0

    class Looking(Toy):
        def score_children(self, level: LevelNodes) -> torch.Tensor:
            nonlocal looked
            looked += 1
            seen = torch.cat([torch.ones(len(level.tokens), settled_rows, dtype=torch.bool), level.tree_mask], dim=1)
            mask, wide = (memory.tree_mask(level.tree_mask) for memory in memories)
            assert torch.equal(mask == 0, seen)
            assert torch.equal(wide == 0, F.pad(seen, (0, 20 - seen.shape[1])))
            return super().score_children(level)

    for _ in range(2):
        draft(Looking(9), committed(9), levels, best)
    assert looked == 2 * (template.depth - 1)


def test_tokens_settled_at_once_see_those_before_them() -> None:
    buffers, table = torch.zeros(1, 2, 1, 2, 20, 4), torch.arange(30)[None]
    assert KVCache(buffers, table, 5).causal_mask(1) is None
    assert KVCache(buffers, table, 0).causal_mask(4) is None
    for count in (1, 3, 11):
        seen = torch.ones(count, 5 + count, dtype=torch.bool).tril(5)
        mask, wide = (KVCache(buffers, table, rows).causal_mask(count) for rows in (5, torch.tensor(5)))
        assert count == 1 or (mask is not None and torch.equal(mask == 0, seen))
        assert wide is not None and torch.equal(wide == 0, F.pad(seen, (0, 15 - count)))
    for memory in (KVCache(buffers, table, 5), KVCache(buffers, table, torch.tensor(5))):
        assert memory.positions(2, 3).tolist() == [[7, 8, 9]]
    assert KVCache(buffers, table, 5).rows(2, 3) == 7
    assert KVCache(buffers, table, torch.tensor(5)).rows(2, 3).tolist() == [7, 8, 9]


def test_rows_are_kept_from_text_to_text_while_they_fit(target64: Target) -> None:
    head = Eagle(target64.spec()).double().eval()
    places = []
    for tree, capacity in (("chain-4", 60), ("3x2x1", 60), ("chain-4", 500), ("chain-4", 600), ("3x2x1", 60)):
        head.begin(load_template(tree), capacity)
        assert head._state is not None and head._state.cache.past == 0
        assert head._state.cache.buffers.shape[-2] >= capacity
        places.append(head._state.cache.buffers.data_ptr())
    assert places[0] == places[1] == places[2] != places[3] == places[4]


def test_masks_of_trees_that_change_size_from_step_to_step_are_their_own() -> None:
    cache = TreeCache(1, 30)
    draw = random.Random(0)
    shapes = [TreeShape((-1, *(draw.randrange(node) for node in range(1, draw.choice((2, 7, 12)))))) for _ in range(90)]
    for step, shape in enumerate([*shapes, *shapes[:5]]):
        cache.past = 1 + step % 20
        mask, depths = cache.tree_buffers(shape, torch.float32, CPU)
        assert mask.shape == (1, 1, shape.nodes, cache.past + shape.nodes)
        assert not mask[..., : cache.past].any()
        assert torch.equal(mask[0, 0, :, cache.past :] == 0, shape.ancestors)
        assert tuple(depths[0].tolist()) == shape.depths


# ------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("dynamic-0x1x1", "not the size of a dynamic tree"),
        ("dynamic-5x8", "not the size of a dynamic tree"),
        ("dynamic-5x8x25x1", "not the size of a dynamic tree"),
        ("dynamic", "not the size of a dynamic tree"),
        ("dynamic-5x8x٣", "not the size of a dynamic tree"),
        ("dynamic-5x8x9999", "are only 328"),
        ("dynamic-1x1x3", "are only 2"),
        ("dynamic-64x1x1", "at most 64 nodes can be grown 63 times"),
        ("dynamic-5x65x10", "at most 64 nodes"),
        ("dynamic-999999999x999999999x1", "at most 64 nodes"),
        ("dynamic-9x64x4096", "more than 4096 nodes"),
    ],
)
def test_sizes_that_cannot_be_drafted_are_one_clear_error(name: str, words: str) -> None:
    with pytest.raises(KoalaBenchError, match=words) as caught:
        load_template(name)
    assert "\n" not in str(caught.value)


def test_the_name_of_a_dynamic_tree_says_its_size() -> None:
    template = load_template("dynamic-5x8x25")
    assert template == DynamicTemplate("dynamic-5x8x25", 5, 8, 25)
    assert (template.nodes, template.depth, template.dynamic) == (26, 6, True)
    assert load_template("dynamic-5x8x328").nodes == 329
    assert not load_template("chain-2").dynamic
    with pytest.raises(KoalaBenchError, match="size below 1"):
        DynamicTemplate.of(1, 0, 1)


@pytest.mark.parametrize("head_class", [PromptLookup, SuffixLookup])
def test_a_head_that_fills_static_trees_only_says_so(target: Target, head_class: Any) -> None:
    with pytest.raises(KoalaBenchError, match="takes another shape at each step"):
        decode(target, head_class(target.spec()), load_template("dynamic-2x3x9"), PROMPT, 10, ())


def test_a_dynamic_tree_too_deep_or_too_wide_for_a_head_is_refused(target: Target) -> None:
    head = Medusa(target.spec(), heads=3)
    with pytest.raises(KoalaBenchError, match="4 levels deep, the head drafts only 3"):
        head.begin(load_template("dynamic-3x4x9"), 64)
    head.begin(load_template("dynamic-2x4x9"), 64)
    with pytest.raises(KoalaBenchError, match="needs 12 candidates a node, there are only 9 tokens"):
        load_template("dynamic-2x12x9").check(depth=9, candidates=9)


def test_a_tree_with_too_few_proposals_is_a_defect_of_its_head() -> None:
    with pytest.raises(ValueError, match="2 inner nodes"):
        DraftTree(torch.tensor([1, 2, 3]), TreeShape((-1, 0, 1)), torch.ones(1, 9))
