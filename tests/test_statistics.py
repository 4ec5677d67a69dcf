"""Statistics against numbers worked out by hand, and the coverage of the intervals."""

from __future__ import annotations

import math

import numpy as np
import pytest
from test_records import TOKENS, failed, make_turn

from koala_bench import statistics
from koala_bench.errors import KoalaBenchError
from koala_bench.statistics import DepthRate, Interval, Totals


def made(tokens: list[float], steps: list[float], decode_s: list[float]) -> Totals:
    return Totals(tuple(range(len(tokens))), np.array(tokens), np.array(steps), np.array(decode_s))


ONES = np.ones(2)
VANILLA = made([100, 50], [100, 50], [10.0, 5.0])  # 10 tokens/s on both questions
HEAD = made([100, 60], [50, 20], [4.0, 4.0])  # 25 and 15 tokens/s


def test_acceptance_length_counts_the_bonus_token() -> None:
    assert statistics.acceptance_length([0, 0, 0]) == 1.0
    assert statistics.acceptance_length([2, 1, 3, 0]) == 2.5
    with pytest.raises(ValueError, match="no step"):
        statistics.acceptance_length([])


def test_acceptance_rate_is_conditional_on_the_parent() -> None:
    # Depth 1: 4 of 5 steps. Depth 2: 3 of those 4. Depth 3: 1 of those 3.
    rates = statistics.acceptance_rate_by_depth([2, 1, 3, 0, 2], [3] * 5)
    assert rates == [DepthRate(1, 4, 5), DepthRate(2, 3, 4), DepthRate(3, 1, 3)]
    assert [rate.rate for rate in rates] == [0.8, 0.75, pytest.approx(1 / 3)]


def test_a_depth_that_was_not_offered_is_no_trial() -> None:
    # The second step was offered one level only, so it says nothing about depth 2; nobody reached depth 3.
    assert statistics.acceptance_rate_by_depth([1, 1, 2], [2, 1, 2]) == [DepthRate(1, 3, 3), DepthRate(2, 1, 2)]
    nobody = statistics.acceptance_rate_by_depth([0, 0], [2, 2])
    assert nobody == [DepthRate(1, 0, 2), DepthRate(2, 0, 0)]
    assert math.isnan(nobody[1].rate)
    assert statistics.acceptance_rate_by_depth([0, 0], [0, 0]) == []
    with pytest.raises(ValueError, match="2 steps in accepted, 1 in drafted_depth"):
        statistics.acceptance_rate_by_depth([0, 0], [1])


def test_draft_overhead() -> None:
    assert statistics.draft_overhead(1.0, 3.0) == 0.25


def test_the_three_definitions_of_speedup() -> None:
    # Totals: 160 tokens in 8 s = 20/s against 150 in 15 s = 10/s.
    assert statistics.speedup_of_totals(HEAD, VANILLA)(ONES) == pytest.approx(2.0)
    uneven = made([100, 50], [100, 50], [10.0, 2.5])  # 10/s and 20/s: 150 tokens in 12.5 s = 12/s
    assert statistics.speedup_of_totals(HEAD, uneven)(ONES) == pytest.approx(20 / 12)
    assert statistics.speedup_of_means(HEAD, uneven)(ONES) == pytest.approx(((25 + 15) / 2) / ((10 + 20) / 2))
    assert statistics.mean_of_speedups(HEAD, uneven)(ONES) == pytest.approx((2.5 + 0.75) / 2)


def test_changes_and_acceptance_length_of_totals() -> None:
    new, old = statistics.speedup_of_totals(HEAD, VANILLA), statistics.speedup_of_totals(VANILLA, VANILLA)
    assert statistics.change(new, old)(ONES) == pytest.approx(1.0)
    assert statistics.change_percent(new, old)(ONES) == pytest.approx(100.0)
    assert statistics.length(HEAD)(ONES) == pytest.approx(160 / 70)


def test_questions_must_be_the_same() -> None:
    with pytest.raises(ValueError, match="not the same questions"):
        statistics.speedup_of_totals(HEAD, made([1], [1], [1.0]))


def test_a_question_without_a_step_has_no_ratio() -> None:
    vanilla, head = made([0, 10], [0, 10], [1e-6, 1.0]), made([0, 10], [0, 5], [1e-6, 0.5])
    assert statistics.mean_of_speedups(head, vanilla)(ONES) == pytest.approx(2.0)
    assert statistics.speedup_of_totals(head, vanilla)(ONES) == pytest.approx(2.0)


def test_turns_and_repeats_are_totalled_within_their_question() -> None:
    turns = [make_turn("eagle", question, turn, repeat) for question in (82, 81) for turn in (0, 1) for repeat in (0, 1)]
    totals = statistics.totals([*turns, failed(make_turn("eagle", 83, 0))])
    assert totals.question_ids == (81, 82)
    assert totals.tokens.tolist() == [4 * TOKENS] * 2
    assert totals.steps.tolist() == [sum(len(turn["accepted"] or []) for turn in turns if turn["question_id"] == question) for question in (81, 82)]
    assert totals.decode_s[0] == pytest.approx(4 * (make_turn("eagle", 81, 0)["decode_s"] or 0))


def test_the_prefills_token_is_not_decoded() -> None:
    apart = make_turn("vanilla", 81, 0, new_token_ids=list(range(TOKENS + 1)))
    assert statistics.totals([apart]).tokens.tolist() == [TOKENS]


def test_rates_that_do_not_exist_are_refused() -> None:
    with pytest.raises(KoalaBenchError, match="Question 81 was decoded in no time"):
        statistics.totals([make_turn("vanilla", 81, 0, decode_s=0.0)])
    with pytest.raises(KoalaBenchError, match="No answer took a decoding step"):
        statistics.totals([make_turn("vanilla", 81, 0, new_token_ids=[2], accepted=[], drafted_depth=[])])


# ---------------------------------------------------------------------------------------------- intervals


def test_resamples_are_seeded_and_draw_as_many_questions() -> None:
    weights = statistics.resample_weights(7, seed=3)
    assert weights.shape == (9999, 7)
    assert (weights.sum(axis=1) == 7).all()
    assert (weights == statistics.resample_weights(7, seed=3)).all()
    assert (weights != statistics.resample_weights(7, seed=4)).any()


def test_an_interval_without_spread_is_the_value() -> None:
    weights = statistics.resample_weights(2)
    # Method and vanilla differ by the same factor on both questions: pairing takes all the spread away.
    steady = made([100, 50], [50, 25], [5.0, 2.5])
    found = statistics.interval(statistics.speedup_of_totals(steady, VANILLA), weights)
    assert (found.value, found.low, found.high) == pytest.approx((2.0, 2.0, 2.0))


def test_interval_ends_are_order_statistics() -> None:
    weights = statistics.resample_weights(2)
    found = statistics.interval(lambda w: w @ np.array([0.0, 1.0]) / 2, weights)
    # Two questions: half of all resamples have a mean of 0.5, a quarter each has 0 and 1.
    assert (found.value, found.low, found.high) == (0.5, 0.0, 1.0)


def test_one_question_has_no_interval() -> None:
    found = statistics.interval(statistics.length(made([4], [2], [1.0])), statistics.resample_weights(1))
    assert found.value == 2.0
    assert math.isnan(found.low)
    assert math.isnan(found.high)


def test_95_percent_intervals_cover_the_truth_about_that_often() -> None:
    generator = np.random.default_rng(0)
    trials, covered = 300, 0
    weights = statistics.resample_weights(80, resamples=999)
    for _ in range(trials):
        # Steps and tokens per step vary from question to question; the truth is 2.4 tokens per step.
        steps = generator.integers(40, 120, 80).astype(float)
        sample = Totals(tuple(range(80)), steps * generator.normal(2.4, 0.4, 80), steps, steps)
        found = statistics.interval(statistics.length(sample), weights)
        covered += found.low <= 2.4 <= found.high
    assert 0.91 <= covered / trials <= 0.98


# ---------------------------------------------------------------------------------------------- verdicts


@pytest.mark.parametrize(
    ("low", "high", "side", "claim"),
    [
        (0.25, 0.40, "above zero", "confirms"),
        (0.30, 0.50, "above zero", "not distinguishable"),
        (0.10, 0.30, "above zero", "not distinguishable"),
        (0.10, 0.60, "above zero", "not distinguishable"),
        (0.05, 0.20, "above zero", "contradicts"),
        (0.45, 0.60, "above zero", "contradicts"),
        (-0.10, 0.20, "not distinguishable from zero", "contradicts"),
        (-0.20, -0.10, "below zero", "contradicts"),
        (math.nan, math.nan, "not distinguishable from zero", "not distinguishable"),
    ],
)
def test_verdicts_follow_from_the_interval(low: float, high: float, side: str, claim: str) -> None:
    measured = Interval((low + high) / 2, low, high)
    assert statistics.against_zero(measured) == side
    assert statistics.against_range(measured, 0.24, 0.41) == claim
