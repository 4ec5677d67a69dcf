"""A head's reading of the prompt: apart from its first draft, on a clock of its own, without a mask of T by T."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch

import heads.common.drafting as drafting
from heads.eagle import Eagle
from heads.prompt_lookup import PromptLookup
from koala_bench.decoding.loop import VANILLA_TREE, Vanilla, decode
from koala_bench.engine.loading.targets import load_target
from koala_bench.engine.target import Target
from koala_bench.heads import Committed
from koala_bench.testing import save_tiny_target
from koala_bench.tree import DraftTree, load_template

PROMPT = [1, *range(30, 70), *range(30, 50)]
PAUSE = 0.2


class Draws(Vanilla):
    """Notes what each draft is given."""

    def __init__(self) -> None:
        self.given: list[int] = []

    def draft(self, new: Committed) -> DraftTree:
        self.given.append(len(new.tokens))
        return super().draft(new)


class Reads(Draws):
    """Takes its time to read a prompt."""

    def prefill(self, new: Committed) -> None:
        assert new.first is not None and [*new.first.tolist(), *new.tokens.tolist()] == PROMPT
        assert new.hidden.shape[0] == len(new.tokens)
        time.sleep(PAUSE)


def test_reading_the_prompt_is_no_part_of_decoding(target: Target) -> None:
    head = Reads()
    answer = decode(target, head, VANILLA_TREE, PROMPT, 4, ())
    assert head.given == [1, 1, 1]
    assert answer.draft_prefill_s >= PAUSE > answer.decode_s
    assert answer.draft_s < PAUSE


def test_a_head_that_only_drafts_is_given_the_prompt_with_its_first_draft(target: Target) -> None:
    head = Draws()
    answer = decode(target, head, VANILLA_TREE, PROMPT, 4, ())
    assert head.given == [len(PROMPT), 1, 1]
    assert answer.draft_prefill_s < 0.01


def test_nothing_is_read_for_an_answer_that_ends_with_its_first_token_or_a_prompt_of_one(target: Target) -> None:
    assert decode(target, Reads(), VANILLA_TREE, PROMPT, 1, ()).draft_prefill_s < PAUSE
    head = Reads()
    decode(target, head, VANILLA_TREE, PROMPT[:1], 3, ())
    assert head.given == [1, 1]


@pytest.mark.parametrize("make", [Eagle, lambda spec: Eagle(spec, layers=2), PromptLookup])
@pytest.mark.parametrize("tree", ["chain-3", "3x2x1"])
def test_the_tokens_and_steps_are_those_of_a_head_that_reads_with_its_first_draft(
    target64: Target, make: Any, tree: str
) -> None:
    torch.manual_seed(0)
    head = make(target64.spec()).to(torch.float64)
    found = decode(target64, head, load_template(tree), PROMPT, 30, (), trace=True)
    assert found.tokens == decode(target64, Vanilla(), VANILLA_TREE, PROMPT, 30, ()).tokens
    again = decode(target64, _Only(head), load_template(tree), PROMPT, 30, (), trace=True)
    assert (again.tokens, again.steps) == (found.tokens, found.steps)


class _Only:
    """The part of a head that drafts."""

    def __init__(self, head: Any) -> None:
        self._head, self.features, self.max_depth = head, head.features, head.max_depth

    def begin(self, template: Any, capacity: int) -> None:
        self._head.begin(template, capacity)

    def draft(self, new: Committed) -> DraftTree:
        tree: DraftTree = self._head.draft(new)
        return tree


@pytest.mark.parametrize("only", [False, True])
def test_no_pass_of_a_head_has_a_mask_with_a_row_for_every_token_of_the_prompt(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch, only: bool
) -> None:
    target = load_target(str(save_tiny_target(tmp_path)), "cpu", "float32", engine="graph", tokenizer=False)
    rows: list[int] = []
    attention_mask = drafting.attention_mask

    def noted(hidden: torch.Tensor, *others: Any) -> torch.Tensor:
        rows.append(int(hidden.shape[0]))
        return attention_mask(hidden, *others)

    monkeypatch.setattr(drafting, "attention_mask", noted)
    head: Any = Eagle(target.spec())
    decode(target, _Only(head) if only else head, load_template("3x2x1"), PROMPT, 12, ())
    assert rows and max(rows) <= 6
