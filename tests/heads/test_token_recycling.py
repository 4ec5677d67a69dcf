"""Token Recycling: the matrix holds what the target said last, the prompt's bigrams before that, and nothing else is
read.
"""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from heads.token_recycling import TokenRecycling
from koala_bench.contract import check_head
from koala_bench.contract.bench import Bench, circle_ids
from koala_bench.decoding.batching import decode_batch
from koala_bench.decoding.loop import VANILLA_TREE, Vanilla, decode
from koala_bench.engine.target import Target
from koala_bench.errors import KoalaBenchError
from koala_bench.heads import Committed, ObservingHead
from koala_bench.presets import MethodPreset
from koala_bench.tree import ROOT_ONLY, DraftTree, TreeTemplate, load_template

VOCABULARY = 9


class Spec:
    device, vocab_size = torch.device("cpu"), VOCABULARY


def committed(tokens: list[int], first: int | None = None) -> Committed:
    return Committed(
        torch.tensor(tokens), torch.empty(len(tokens), 1, 4), 0, None if first is None else torch.tensor([first])
    )


def begun(tree: TreeTemplate) -> TokenRecycling:
    head = TokenRecycling(Spec())  # type: ignore[arg-type]
    head.begin(tree, 100)
    return head


def test_what_followed_in_the_prompt_is_proposed_the_latest_first() -> None:
    head = begun(load_template("3x2"))
    # After 1 came 5, then 6; the prompt's first token counts too. Unknown ranks are the first ids, 0 before 1 before 2.
    tree = head.draft(committed([5, 1, 6, 4, 1], first=1))
    assert tree.tokens.tolist() == [1, 6, 5, 0, 4, 0, 1, 0, 0, 1]


def test_what_the_target_says_overwrites_rows_of_all_nodes() -> None:
    tree = TreeTemplate.of("t", [(0,), (1,), (0, 0)])
    head = begun(tree)
    head.draft(committed([3, 7]))
    logits = torch.zeros(4, VOCABULARY)
    for node, best in enumerate([(4, 6), (8, 3), (2, 5), (1, 7)]):
        logits[node, best[0]], logits[node, best[1]] = 2.0, 1.0
    verified = DraftTree(torch.tensor([7, 4, 8, 4]), tree.shape)
    kept = logits.clone()
    head.observe(verified, logits)
    assert torch.equal(logits, kept)
    # 7 -> 4, 6. Of the two nodes with token 4 the last one counts: 4 -> 1, 7.
    assert head.draft(committed([7])).tokens.tolist() == [7, 4, 6, 1]
    assert head.draft(committed([8])).tokens.tolist() == [8, 2, 5, 0]
    head.begin(tree, 100)
    assert head.draft(committed([7])).tokens.tolist() == [7, 0, 1, 0]


def test_a_hot_start_keeps_what_earlier_answers_said_and_the_new_prompt_comes_first() -> None:
    tree = TreeTemplate.of("t", [(0,), (1,)])
    head = TokenRecycling(Spec(), hot_start=True)  # type: ignore[arg-type]
    head.begin(tree, 100)
    logits = torch.zeros(1, VOCABULARY)
    logits[0, 4], logits[0, 6] = 2.0, 1.0
    head.observe(DraftTree(torch.tensor([7]), ROOT_ONLY), logits)
    head.begin(tree, 100)
    assert head.draft(committed([7])).tokens.tolist() == [7, 4, 6]
    head.begin(tree, 100)
    assert head.draft(committed([7, 3, 7], first=1)).tokens.tolist() == [7, 3, 4]
    head.begin(TreeTemplate.of("wider", [(0,), (1,), (2,)]), 100)
    assert head.draft(committed([7])).tokens.tolist() == [7, 0, 1, 2], "a matrix of another width begins anew"


@given(st.lists(st.lists(st.integers(0, VOCABULARY - 1), min_size=4, max_size=4), max_size=6), st.integers(0, 1000))
def test_the_matrix_is_that_of_a_dictionary_of_rows(steps: list[list[int]], seed: int) -> None:
    """Whatever is verified; siblings are always different tokens."""
    tree = TreeTemplate.of("t", [(0,), (2,), (0, 1)])
    head, draw = begun(tree), torch.Generator().manual_seed(seed)
    rows: dict[int, list[int]] = {}
    for tokens in steps:
        logits = torch.randn(4, VOCABULARY, generator=draw)
        head.observe(DraftTree(torch.tensor(tokens), tree.shape), logits)
        rows |= {token: row.topk(3).indices.tolist() for token, row in zip(tokens, logits, strict=True)}
    for root in range(VOCABULARY):
        found = head.draft(committed([root])).tokens.tolist()
        first = rows.get(root, [0, 1, 2])
        assert found == [root, first[0], first[2], rows.get(first[0], [0, 1, 2])[1]]


def test_copies_learn_apart(target: Target) -> None:
    """As in a batch, where each sequence has a copy of the head."""
    tree = load_template("chain-1")
    one = TokenRecycling(target.spec())
    other = copy.copy(one)
    one.begin(tree, 10)
    other.begin(tree, 10)
    one.observe(DraftTree(torch.tensor([5, 6]), tree.shape), torch.eye(259)[[70, 71]])
    assert [head.draft(committed([5])).tokens.tolist() for head in (one, other)] == [[5, 70], [5, 0]]


@pytest.mark.parametrize("tree", ["chain-4", "4x2x1", "small/8"])
def test_answers_are_vanillas_and_need_fewer_steps(target64: Target, tree: str) -> None:
    prompt = [5, 6, 7, 8, 9, 5, 6, 7, 8, 9, 5, 6]
    vanilla = decode(target64, Vanilla(), VANILLA_TREE, prompt, 60, ())
    head = TokenRecycling(target64.spec())
    for _ in range(2):  # the second time nothing of the first is left
        found = decode(target64, head, load_template(tree), prompt, 60, ())
        assert found.tokens == vanilla.tokens
    assert len(found.accepted) < len(vanilla.accepted)
    batch = decode_batch(target64, head, load_template(tree), [prompt, prompt[:5]], 24, ())
    assert batch.tokens[0] == vanilla.tokens[:24]


def test_what_was_seen_once_is_drafted_ever_after(tmp_path: Path) -> None:
    """A target that counts in a circle of 13: the first round takes single steps, the next ones a chain each."""
    target = Bench(MethodPreset(head="token_recycling", tree="chain-1"), tmp_path).target("circle")
    prompt = circle_ids(1, 5)[0].tolist()
    found = decode(target, TokenRecycling(target.spec()), load_template("chain-4"), prompt, 60, ())
    assert found.accepted[:-1] == [
        *[0] * found.accepted.index(4),
        *[4] * (len(found.accepted) - 1 - found.accepted.index(4)),
    ]
    assert found.accepted.index(4) <= 13


def test_it_observes_and_other_heads_are_left_alone(target: Target) -> None:
    assert isinstance(TokenRecycling(target.spec()), ObservingHead) and not isinstance(Vanilla(), ObservingHead)


def test_a_tree_that_only_scores_can_grow_is_refused(target: Target) -> None:
    with pytest.raises(KoalaBenchError, match="dynamic-2x2x4"):
        TokenRecycling(target.spec()).begin(load_template("dynamic-2x2x4"), 64)


def test_the_contract_is_kept() -> None:
    found = check_head("token_recycling")
    assert [str(result) for result in found if result.outcome == "failed"] == []
    assert {"trees", "forgetting", "losslessness", "observation", "determinism"} <= {
        result.name for result in found if result.outcome == "passed"
    }
