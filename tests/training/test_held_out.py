"""Watching heads in training: what the loss predicts on a finished answer is what decoding accepted."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from koala_bench.decoding.loop import VANILLA_TREE, Vanilla, decode
from koala_bench.engine.target import Target
from koala_bench.heads import FeatureBatch, HeadLoss, Prediction
from koala_bench.training import held_out
from koala_bench.training.held_out import HeldOut, agreement, held_out_acceptance
from tests.heads.test_heads import make

PROMPTS = [list(range(5, 15)), list(range(30, 36)), list(range(40, 60))]


@pytest.fixture(autouse=True)
def _whole_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(held_out, "ANSWER_TOKENS", 64)


def learnt(target: Target, name: str) -> Any:
    """A head that knows the target's answers nearly by heart, so that there is something to accept."""
    head = make(target, name, 1)
    optimiser = torch.optim.AdamW(head.parameters(), lr=3e-3)
    rows = [
        torch.tensor(prompt + decode(target, Vanilla(), VANILLA_TREE, prompt, 64 + 10 - len(prompt), ()).tokens)
        for prompt in PROMPTS
    ]
    ids, width = torch.stack(rows), len(rows[0])
    whole = FeatureBatch(
        ids,
        torch.ones_like(ids, dtype=torch.bool),
        target.states(ids).clone(),
        0,
        target.output,
        torch.full((len(ids),), width),
    )
    for _ in range(60):
        head.loss(whole).total.backward()
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
    return head


@pytest.mark.parametrize(("name", "depths"), [("medusa", 4), ("eagle", 1)])
def test_teacher_forced_acceptance_is_the_decoded_one(target: Target, name: str, depths: int) -> None:
    head = learnt(target, name)
    found = held_out_acceptance(target, head, HeldOut([], PROMPTS))
    assert found["teacher_forced_rate_by_depth"] == found["decoded_rate_by_depth"]
    assert 1 <= len(found["teacher_forced_rate_by_depth"]) <= depths
    assert head.training and found["acceptance_length"] > 1.0


def test_a_head_that_drafts_from_shifted_features_shows_a_gap(target: Target) -> None:
    head = learnt(target, "eagle")
    right = head.draft

    def shifted(new: Any) -> Any:
        return right(type(new)(new.tokens, new.hidden.roll(1, dims=-1), new.position))

    head.draft = shifted
    found = held_out_acceptance(target, head, HeldOut([], PROMPTS))
    assert found["decoded_rate_by_depth"][0] < 0.9 * found["teacher_forced_rate_by_depth"][0]


def test_rates_are_conditional_on_the_depths_before_and_on_a_prediction() -> None:
    steps = [([True, True], 2), ([True, False], 1), ([False, True], 0), ([True], 3)]
    assert agreement(steps) == ([0.75, 0.5], [0.75, 0.5])
    assert agreement([([False, False], 0)]) == ([0.0, None], [0.0, None])
    assert agreement([]) == ([], [])


def test_a_loss_without_predictions_leaves_only_what_was_decoded(target: Target) -> None:
    head = make(target, "medusa", 1)
    whole = head.loss

    def silent(batch: FeatureBatch) -> HeadLoss:
        predictions: tuple[Prediction, ...] = ()
        return HeadLoss(whole(batch).total, {}, predictions)

    head.loss = silent
    found = held_out_acceptance(target, head, HeldOut([], PROMPTS))
    assert found["teacher_forced_rate_by_depth"] == [] and found["acceptance_length"] >= 1.0
