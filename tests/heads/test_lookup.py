"""Training-free heads: what they propose from the text so far, that they are lossless, and that the suite needs no
training for them.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from heads.common.continuations import drafted
from heads.prompt_lookup import PromptLookup
from heads.suffix_lookup import SuffixAutomaton, SuffixLookup
from koala_bench.contract import check_head
from koala_bench.decoding.loop import VANILLA_TREE, Vanilla, decode
from koala_bench.dialogues.encoding import chat_template
from koala_bench.engine.loading.targets import load_target
from koala_bench.engine.target import Target
from koala_bench.errors import KoalaBenchError
from koala_bench.evaluation.methods import load_methods
from koala_bench.heads import Committed
from koala_bench.presets import with_heads
from koala_bench.training.experiment import free_head, train_heads
from koala_bench.tree import TreeTemplate, load_template
from tests.support.small_runs import conversations, preset_for

CPU = torch.device("cpu")
texts = st.lists(st.integers(0, 3), min_size=1, max_size=40)


def propose(
    head: PromptLookup | SuffixLookup, text: list[int], tree: str = "chain-3", pieces: int = 1
) -> tuple[list[int], tuple[int, ...]]:
    """Tokens and parents that a head drafts after a text, read in several pieces."""
    head.begin(load_template(tree), 100)
    cut = len(text) - pieces
    for part in [text[:cut], *([token] for token in text[cut:])]:
        found = head.draft(Committed(torch.tensor(part), torch.empty(len(part), 1, 4), 0))
    return found.tokens.tolist(), found.shape.parents


@pytest.fixture(params=[PromptLookup, SuffixLookup])
def head(request: pytest.FixtureRequest, target: Target) -> PromptLookup | SuffixLookup:
    made: PromptLookup | SuffixLookup = request.param(target.spec())
    return made


def test_what_followed_before_is_proposed_again(head: PromptLookup | SuffixLookup) -> None:
    assert propose(head, [1, 2, 3, 4, 5, 1, 2]) == ([2, 3, 4, 5], (-1, 0, 1, 2))


def test_a_new_token_proposes_nothing(head: PromptLookup | SuffixLookup) -> None:
    assert propose(head, [1, 2, 3, 4, 9]) == ([9], (-1,))


def test_the_longest_match_wins_and_shorter_ones_fill_the_ranks(head: PromptLookup | SuffixLookup) -> None:
    text = [1, 2, 3, 7, 5, 3, 8, 6, 1, 2, 3]  # "1 2 3" went on with 7, "3" alone also with 8
    assert propose(head, text, "2x1") == ([3, 7, 8, 5, 6], (-1, 0, 0, 1, 2))
    assert propose(head, text, "chain-1") == ([3, 7], (-1, 0))


def test_proposals_end_where_the_text_ends(head: PromptLookup | SuffixLookup) -> None:
    assert propose(head, [4, 5, 4], "chain-3") == ([4, 5, 4], (-1, 0, 1))


def test_nodes_without_a_continuation_are_left_out_with_all_below() -> None:
    template = TreeTemplate.of("t", [[0], [1], [2], [0, 0], [0, 1], [1, 0], [2, 0], [0, 1, 0]])
    text = [1, 2, 3, 1, 2, 4, 1, 5, 6, 1]
    found = drafted(text, [1, 4, 7], template.paths, CPU)  # "1" went on with 2 3, 2 4 and 5 6
    assert found.tokens.tolist() == [1, 2, 5, 3, 4, 6, 1] and found.shape.parents == (-1, 0, 0, 1, 1, 2, 4)
    assert drafted([7], [], template.paths, CPU).tokens.tolist() == [7]


@given(texts)
def test_the_automaton_finds_the_longest_suffix_that_stood_before(text: list[int]) -> None:
    automaton = SuffixAutomaton()
    for place, token in enumerate(text, 1):
        automaton.append(token)
        so_far = text[:place]
        ends = {n: [e for e in range(n, place) if so_far[e - n : e] == so_far[place - n :]] for n in range(1, place)}
        longest = max((n for n, found in ends.items() if found), default=0)
        matches = automaton.matches()
        assert (matches[0][0] if matches else 0) == longest
        assert all(end == ends[length][-1] for length, end in matches)  # the latest occurrence of each
        assert [length for length, _ in matches] == sorted({length for length, _ in matches}, reverse=True)


@given(texts, st.integers(1, 4))
def test_prompt_lookup_proposes_after_the_longest_ngram_the_latest_continuation(text: list[int], ngram: int) -> None:
    class Spec:
        device = CPU

    head = PromptLookup(Spec(), ngram)  # type: ignore[arg-type]
    tokens, _ = propose(head, text, "chain-1", pieces=min(3, len(text) - 1))
    place = next(
        (
            e
            for n in range(min(ngram, len(text)), 0, -1)
            for e in range(len(text) - 1, n - 1, -1)
            if text[e - n : e] == text[len(text) - n :]
        ),
        None,
    )
    assert tokens == [text[-1]] if place is None else tokens == [text[-1], text[place]]


@pytest.mark.parametrize("tree", ["chain-4", "3x2x1", "small/8"])
def test_answers_are_vanillas_and_need_fewer_steps(
    head: PromptLookup | SuffixLookup, target: Target, tree: str
) -> None:
    prompt = [5, 6, 7, 8, 9, 5, 6, 7, 8, 9, 5, 6]
    vanilla = decode(target, Vanilla(), VANILLA_TREE, prompt, 60, ())
    for _ in range(2):  # the second time nothing of the first is left
        found = decode(target, head, load_template(tree), prompt, 60, ())
        assert found.tokens == vanilla.tokens
    assert len(found.accepted) < len(vanilla.accepted)  # a random target soon repeats itself


@pytest.mark.parametrize("name", ["prompt_lookup", "suffix_lookup"])
def test_the_contract_is_kept(name: str) -> None:
    found = check_head(name)
    assert not [result for result in found if result.outcome == "failed"]
    assert {"form", "trees", "forgetting", "losslessness", "determinism"} <= {
        result.name for result in found if result.outcome == "passed"
    }


def test_nothing_is_trained_and_nothing_loaded(target_folder: Path, tmp_path: Path) -> None:
    preset, names = with_heads(
        preset_for(target_folder, conversations(tmp_path), "training.steps=2"), ["vanilla", "prompt_lookup", "eagle"]
    )
    target = load_target(str(target_folder), "cpu", "float32")
    assert target.tokenizer is not None
    train_heads(preset, names, target, chat_template("vicuna_v1.1", target.tokenizer), tmp_path / "out")
    assert (tmp_path / "out" / "eagle").exists() and not (tmp_path / "out" / "prompt_lookup").exists()
    found = {method.name: method.info for method in load_methods(preset, names, target, tmp_path / "out")}[
        "prompt_lookup"
    ]
    assert (
        found["parameters"],
        found["checkpoint"],
        found["weights_sha256"],
        found["training"],
        found["lossless"],
    ) == (0, None, None, None, True)
    assert found["tree"] is not None and found["tree"]["parents"] is None


def test_heads_with_something_to_train_and_objectives_are_not_free(
    target_folder: Path, tmp_path: Path, target: Target
) -> None:
    preset, _ = with_heads(preset_for(target_folder, conversations(tmp_path)), ["prompt_lookup+koala"])
    assert (
        free_head(preset.method("eagle"), target) is None
        and free_head(preset.method("prompt_lookup+koala"), target) is None
    )
    assert target.tokenizer is not None
    with pytest.raises(KoalaBenchError, match="has no loss"):
        train_heads(
            preset, ["prompt_lookup+koala"], target, chat_template("vicuna_v1.1", target.tokenizer), tmp_path / "out"
        )


def test_a_head_may_bring_its_usual_tree_and_an_option_overrides_it(target_folder: Path, tmp_path: Path) -> None:
    listed = preset_for(target_folder, conversations(tmp_path))
    preset = listed.model_copy(
        update={"methods": {name: method for name, method in listed.methods.items() if name != "prompt_lookup"}}
    )
    assert with_heads(preset, ["prompt_lookup"])[0].method("prompt_lookup").tree == PromptLookup.usual_tree
    assert with_heads(preset, ["prompt_lookup"], tree="chain-2")[0].method("prompt_lookup").tree == "chain-2"


@pytest.mark.parametrize("head", [PromptLookup, SuffixLookup])
def test_a_tree_that_only_scores_can_grow_is_refused(
    target: Target, head: type[PromptLookup] | type[SuffixLookup]
) -> None:
    with pytest.raises(KoalaBenchError, match="dynamic-2x2x4"):
        head(target.spec()).begin(load_template("dynamic-2x2x4"), 64)


def test_an_ngram_of_nothing_is_refused(target: Target) -> None:
    with pytest.raises(KoalaBenchError, match="ngram is 0"):
        PromptLookup(target.spec(), 0)


def test_a_suffix_that_is_too_short_proposes_nothing(target: Target) -> None:
    text = [1, 2, 3, 4, 9, 1, 2, 3]
    for least, found in ((1, [3, 4, 9, 1]), (3, [3, 4, 9, 1]), (4, [3])):
        assert propose(SuffixLookup(target.spec(), least), text)[0] == found
    with pytest.raises(KoalaBenchError, match="least is 0"):
        SuffixLookup(target.spec(), 0)
