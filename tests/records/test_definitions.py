"""Acceptance length by every peer's definition, against numbers worked out by hand."""

from __future__ import annotations

import math

import pytest

from koala_bench.records import definitions
from koala_bench.records.definitions import DepthRate, Steps, lengths_by_definition

# Two questions, the first of two turns: 5 steps that commit 2 + 3 + 1, then 4 + 1, and 2 steps that commit 1 + 2.
# The chain has three levels; the last step of the second turn was offered none, that of the third one level.
ANSWERS = [Steps(81, (1, 2, 0), (3, 3, 3), 1), Steps(81, (3, 0), (3, 0), 1), Steps(82, (0, 1), (3, 1), 1)]


def test_acceptance_length_counts_the_bonus_token() -> None:
    assert definitions.acceptance_length([0, 0, 0]) == 1.0
    assert definitions.acceptance_length([2, 1, 3, 0]) == 2.5
    with pytest.raises(ValueError, match="no step"):
        definitions.acceptance_length([])


def test_repetition_counts_runs_that_stood_before_in_the_same_answer() -> None:
    once, twice = list(range(9)), [1, 2, 3] * 4
    assert definitions.repeated_share([once, once]) == 0.0
    assert definitions.repeated_share([twice]) == 2 / 5  # of five runs of eight the last two stood before
    assert definitions.repeated_share([once, twice]) == 2 / 7
    assert definitions.repeated_share([[1, 2]]) is None


def test_acceptance_rate_is_conditional_on_the_parent() -> None:
    # Depth 1: 4 of 5 steps. Depth 2: 3 of those 4. Depth 3: 1 of those 3.
    rates = definitions.acceptance_rate_by_depth([2, 1, 3, 0, 2], [3] * 5)
    assert rates == [DepthRate(1, 4, 5), DepthRate(2, 3, 4), DepthRate(3, 1, 3)]
    assert [rate.rate for rate in rates] == [0.8, 0.75, pytest.approx(1 / 3)]


def test_a_depth_that_was_not_offered_is_no_trial() -> None:
    # The second step was offered one level only, so it says nothing about depth 2; nobody reached depth 3.
    assert definitions.acceptance_rate_by_depth([1, 1, 2], [2, 1, 2]) == [DepthRate(1, 3, 3), DepthRate(2, 1, 2)]
    nobody = definitions.acceptance_rate_by_depth([0, 0], [2, 2])
    assert nobody == [DepthRate(1, 0, 2), DepthRate(2, 0, 0)]
    assert math.isnan(nobody[1].rate)
    assert definitions.acceptance_rate_by_depth([0, 0], [0, 0]) == []
    with pytest.raises(ValueError, match="2 steps in accepted, 1 in drafted_depth"):
        definitions.acceptance_rate_by_depth([0, 0], [1])


def test_unconditional_rates_are_of_all_steps_that_drafted() -> None:
    # Six of the seven steps drafted; the depth that was not offered counts as not accepted.
    accepted, offered = [1, 2, 0, 3, 0, 0, 1], [3, 3, 3, 3, 0, 3, 1]
    assert definitions.unconditional_rate_by_depth(accepted, offered) == [
        DepthRate(1, 4, 6),
        DepthRate(2, 2, 6),
        DepthRate(3, 1, 6),
    ]
    assert definitions.unconditional_rate_by_depth([0, 0], [0, 0]) == []


def test_of_a_static_chain_the_unconditional_rate_is_the_product_of_the_conditional_ones() -> None:
    accepted, offered = [2, 1, 3, 0, 2], [3] * 5
    product = 1.0
    for given, plain in zip(
        definitions.acceptance_rate_by_depth(accepted, offered),
        definitions.unconditional_rate_by_depth(accepted, offered),
        strict=True,
    ):
        product *= given.rate
        assert plain.rate == pytest.approx(product)


def test_every_definition_against_numbers_worked_out_by_hand() -> None:
    # 7 accepted drafts and 7 steps: 14 tokens committed, 3 more from the prefills.
    assert lengths_by_definition(ANSWERS) == pytest.approx(
        {
            "tokens per step": 14 / 7,
            "drafts per step": 7 / 7,
            "EAGLE": 7 / 7 + 1,
            "Spec-Bench": (2 + 3 + 1 + 4 + 1 + 1 + 2) / 7,
            "Medusa, new_tokens / idxs": 14 / (2 + 1 + 1),
            "SpecForge benchmark": 17 / 7,
            "speculators, NeMo Automodel": 1 + 7 / 6,
            # Given the parent: 4 of 6 steps, then 2 of the 3 that were offered a second level, then 1 of 2.
            "SpecForge evaluator": 4 / 6 + 4 / 6 * 2 / 3 + 4 / 6 * 2 / 3 * 1 / 2,
            "mean over questions": (11 / 5 + 3 / 2) / 2,
        }
    )


def test_where_every_step_drafts_alike_the_definitions_differ_by_the_bonus_token_only() -> None:
    static = [Steps(81, (2, 1, 3), (3, 3, 3), 1), Steps(82, (0, 2, 1), (3, 3, 3), 1)]
    found = lengths_by_definition(static)
    same = {"tokens per step", "EAGLE", "Spec-Bench", "speculators, NeMo Automodel", "mean over questions"}
    assert {found[name] for name in same} == {2.5}
    assert {name: found[name] for name in ("drafts per step", "SpecForge evaluator")} == pytest.approx(
        {"drafts per step": 1.5, "SpecForge evaluator": 1.5}
    )


def test_vanilla_has_one_token_per_step_wherever_the_bonus_token_counts() -> None:
    found = lengths_by_definition([Steps(81, (0,) * 8, (0,) * 8, 0)])
    assert {name for name, value in found.items() if value == 1.0} == {
        "tokens per step",
        "EAGLE",
        "Spec-Bench",
        "SpecForge benchmark",
        "mean over questions",
    }
    assert found["drafts per step"] == 0.0
    assert found["Medusa, new_tokens / idxs"] == pytest.approx(8 / 7)  # what counting from 0 does
    assert math.isnan(found["speculators, NeMo Automodel"])  # no draft at all
    assert math.isnan(found["SpecForge evaluator"])


def test_without_recorded_depths_only_the_definitions_that_need_them_are_lacking() -> None:
    found = lengths_by_definition([Steps(81, (1, 2), None, 0)])
    assert {name for name, value in found.items() if math.isnan(value)} == {
        "speculators, NeMo Automodel",
        "SpecForge evaluator",
    }


def test_an_answer_without_a_step_counts_for_nothing() -> None:
    nothing = Steps(83, (), (), 1)
    found, with_it = lengths_by_definition(ANSWERS), lengths_by_definition([*ANSWERS, nothing])
    assert {name for name in found if found[name] != pytest.approx(with_it[name])} == {
        "SpecForge benchmark"
    }  # it has a token
    assert all(math.isnan(value) for value in lengths_by_definition([nothing]).values())
