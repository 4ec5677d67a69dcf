"""Statistics against numbers worked out by hand, and the coverage of the intervals."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from koala_bench.errors import KoalaBenchError
from koala_bench.records import statistics
from koala_bench.records.reading import read_run
from koala_bench.records.statistics import Array, Interval, Statistic, Totals
from tests.support.synthetic_run import TOKENS, failed, make_turn


def made(tokens: list[float], steps: list[float], decode_s: list[float]) -> Totals:
    return Totals(tuple(range(len(tokens))), np.array(tokens), np.array(steps), np.array(decode_s))


ONES = np.ones(2)
VANILLA = made([100, 50], [100, 50], [10.0, 5.0])  # 10 tokens/s on both questions
HEAD = made([100, 60], [50, 20], [4.0, 4.0])  # 25 and 15 tokens/s


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
    turns = [
        make_turn("eagle", question, turn, repeat) for question in (82, 81) for turn in (0, 1) for repeat in (0, 1)
    ]
    totals = statistics.totals([*turns, failed(make_turn("eagle", 83, 0))])
    assert totals.question_ids == (81, 82)
    assert totals.tokens.tolist() == [4 * TOKENS] * 2
    assert totals.steps.tolist() == [
        sum(len(turn["accepted"] or []) for turn in turns if turn["question_id"] == question) for question in (81, 82)
    ]
    assert totals.seconds[0] == pytest.approx(4 * (make_turn("eagle", 81, 0)["decode_s"] or 0))


def test_the_prefills_token_is_not_decoded() -> None:
    apart = make_turn("vanilla", 81, 0, new_token_ids=list(range(TOKENS + 1)))
    assert statistics.totals([apart]).tokens.tolist() == [TOKENS]


def test_rates_that_do_not_exist_are_refused() -> None:
    with pytest.raises(KoalaBenchError, match="Question 81 has a decoding time of 0"):
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
    method = made([100, 50], [50, 25], [5.0, 2.5])
    found = statistics.interval(statistics.speedup_of_totals(method, VANILLA), weights)
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


def test_an_interval_is_wider_than_the_percentile_interval_as_a_small_sample_needs() -> None:
    values = np.random.default_rng(0).normal(size=12)
    weights = statistics.resample_weights(12)
    found = statistics.interval(lambda w: w @ values / 12, weights)
    # Of a mean, the exact interval is the t interval; the percentile's is narrower by sqrt(11 / 12) * 1.96 / 2.20.
    half = 2.201 * values.std(ddof=1) / math.sqrt(12)
    assert (found.high - found.low) / 2 == pytest.approx(half, rel=0.06)
    assert np.ptp(np.quantile(weights @ values / 12, [0.025, 0.975])) / 2 < 0.9 * half


def test_an_interval_follows_the_statistic_through_a_transformation() -> None:
    weights = statistics.resample_weights(12, resamples=999)
    values = np.random.default_rng(0).lognormal(size=12)
    plain = statistics.interval(lambda w: w @ values / 12, weights)
    logs = statistics.interval(lambda w: np.log(w @ values / 12), weights)
    assert (math.exp(logs.low), math.exp(logs.high)) == pytest.approx((plain.low, plain.high), rel=1e-2)


# ---------------------------------------------------------------------------------------------- seeds


def of_seeds(*lengths: float, questions: int = 6) -> Totals:
    """One seed per acceptance length, the questions differing alike in all."""
    steps = np.arange(10.0, 10.0 + questions)
    return statistics.stacked(
        [
            Totals(tuple(range(questions)), steps * each * (1 + 0.01 * np.arange(questions)), steps, steps)
            for each in lengths
        ]
    )


def test_seeds_are_stacked_one_after_the_other() -> None:
    both = statistics.stacked([VANILLA, HEAD])
    assert both.question_ids == (0, 1, 0, 1)
    assert both.tokens.tolist() == [100, 50, 100, 60]
    assert both.steps.tolist() == [100, 50, 50, 20]
    assert both.seconds.tolist() == [10.0, 5.0, 4.0, 4.0]
    with pytest.raises(ValueError, match="not the same questions"):
        statistics.stacked([VANILLA, made([1], [1], [1.0])])


def test_seeds_and_questions_are_both_drawn() -> None:
    weights = statistics.resample_seeds(3, 7, resamples=50)
    assert (weights.seeds.shape, weights.questions.shape) == ((50, 3), (50, 7))
    assert (weights.seeds.sum(axis=1) == 3).all()
    assert (weights.questions.sum(axis=1) == 7).all()
    assert np.ptp(weights.seeds) > 0


def test_seeds_that_agree_add_nothing_and_seeds_that_differ_do() -> None:
    questions = statistics.interval(statistics.length(of_seeds(2.0)), statistics.resample_weights(6))
    agree, differ = (
        statistics.hierarchical_interval(statistics.length(of_seeds(*each)), statistics.resample_seeds(3, 6))
        for each in ((2, 2, 2), (1.8, 2, 2.2))
    )
    assert agree.value == pytest.approx(questions.value)
    assert agree.high - agree.low == pytest.approx(questions.high - questions.low, rel=0.1)
    # Seeds at -10 %, 0 and +10 % have a standard error of 10 % / sqrt(3), and t with two degrees of freedom is 4.30.
    assert (differ.high - differ.low) / 2 == pytest.approx(4.303 * 0.1 / math.sqrt(3) * differ.value, rel=0.06)


def test_pairing_takes_away_what_seeds_and_questions_share() -> None:
    new, old = of_seeds(2.2, 1.1, 3.3), of_seeds(2.0, 1.0, 3.0)
    found = statistics.hierarchical_interval(
        statistics.change_percent(statistics.length(new), statistics.length(old)), statistics.resample_seeds(3, 6)
    )
    assert (found.value, found.low, found.high) == pytest.approx((10.0, 10.0, 10.0))


def test_many_cells_are_resampled_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = statistics.resample_seeds(3, 6, resamples=100)
    statistic = statistics.length(of_seeds(1.8, 2, 2.2))
    whole = statistics.hierarchical_ends(statistic, weights)
    monkeypatch.setattr(statistics, "_BLOCK", 100)
    assert statistics.hierarchical_ends(statistic, weights) == pytest.approx(whole, rel=1e-12)


def test_one_seed_has_no_interval_over_seeds() -> None:
    found = statistics.hierarchical_interval(statistics.length(of_seeds(2.0)), statistics.resample_seeds(1, 6))
    assert found.value > 2.0
    assert math.isnan(found.low)
    assert math.isnan(found.high)


# ---------------------------------------------------------------------------------------------- coverage

METHODS = ("vanilla", "eagle", "eagle+koala")
Population = dict[str, Array]  # tokens, steps and seconds of many questions by method, [questions, 3]
RECORD = Path(__file__).parents[2] / "results" / "all-tiny" / "records.jsonl"


def recorded() -> Population:
    """The questions of the tiny Table 1, as they were measured."""
    run = read_run(RECORD)
    found = {
        method: statistics.totals(turn for turn in run.turns_of(method) if turn["error"] is None) for method in METHODS
    }
    return {method: np.stack([each.tokens, each.steps, each.seconds], axis=1) for method, each in found.items()}


def skewed() -> Population:
    """Answers of very different lengths (skewness 4), acceptance lengths that vary by a third, an outlier in many."""
    generator = np.random.default_rng(5)
    normal = generator.standard_normal((20_000, 7))
    tokens, machine, ease = (
        np.ceil(40 * np.exp(0.8 * normal[:, 0])),
        np.exp(0.1 * normal[:, 1]),
        np.exp(0.35 * normal[:, 2]),
    )
    steps = [
        tokens,
        *(np.ceil(tokens / (1 + gain * ease * np.exp(0.1 * normal[:, i]))) for i, gain in ((3, 1.1), (4, 1.2))),
    ]
    costs = [
        0.0100 * np.exp(0.03 * normal[:, 5]),
        0.0130 * np.exp(0.05 * normal[:, 6]),
        0.0137 * np.exp(0.05 * normal[:, 5]),
    ]
    return {
        method: np.stack([tokens, steps[i], steps[i] * costs[i] * machine], axis=1) for i, method in enumerate(METHODS)
    }


def statistics_of(population: Population, seeds: int = 1) -> dict[str, Statistic]:
    """Of arrays [cells, 3], or [cells, samples, 3]."""
    totals = {
        method: Totals(tuple(range(len(each))), each[..., 0], each[..., 1], each[..., 2])
        for method, each in population.items()
    }
    vanilla, old, new = (totals[method] for method in METHODS)
    lengths, speedups = (
        [of(each) for each in (old, new)]
        for of in (statistics.length, lambda each: statistics.speedup_of_totals(each, vanilla))
    )
    return {
        "length": lengths[0],
        "speedup": speedups[0],
        "length change": statistics.change(lengths[1], lengths[0]),
        "speedup change %": statistics.change_percent(speedups[1], speedups[0]),
    }


def truths(population: Population) -> dict[str, float]:
    return {
        name: float(statistic(np.ones(len(population["vanilla"]))))
        for name, statistic in statistics_of(population).items()
    }


def held(ends: Array, truth: float) -> int:
    return int(np.count_nonzero((ends[0] <= truth) & (truth <= ends[1])))


def said(case: str, coverage: dict[str, float]) -> dict[str, float]:
    """Print the coverage for those who run with -s, and give it back."""
    print(f"{case:42}" + "  ".join(f"{name} {100 * each:.1f} %" for name, each in coverage.items()))
    return coverage


SAMPLES, AT_ONCE = 4000, 500


def slack(samples: int) -> float:
    """Twice the binomial standard error of a coverage of 95 %: how far chance may take it beyond 93 and 97 %."""
    return 2 * math.sqrt(0.95 * 0.05 / samples)


def coverage_over_questions(
    population: Population, questions: int, plain: bool = False, samples: int = SAMPLES
) -> dict[str, float]:
    """How often the intervals of samples of some questions hold the population's value."""
    generator, truth = np.random.default_rng(questions), truths(population)
    count = dict.fromkeys(truth, 0)
    for part in range(samples // AT_ONCE):
        drawn = generator.integers(0, len(population["vanilla"]), (questions, AT_ONCE))
        weights = statistics.resample_weights(questions, seed=part, resamples=999)
        for name, statistic in statistics_of({method: each[drawn] for method, each in population.items()}).items():
            ends = (
                np.quantile(statistic(weights), [0.025, 0.975], axis=0)
                if plain
                else statistics.interval_ends(statistic, weights)
            )
            count[name] += held(ends, truth[name])
    return {name: each / samples for name, each in count.items()}


@pytest.mark.parametrize("make", [recorded, skewed])
@pytest.mark.parametrize("questions", [20, *(pytest.param(n, marks=pytest.mark.exhaustive) for n in (40, 80, 160))])
def test_95_percent_intervals_over_questions_cover_93_to_97_percent(
    make: Callable[[], Population], questions: int
) -> None:
    """Few questions are the hardest, and the cheapest."""
    coverage = said(f"{make.__name__}, {questions} questions:", coverage_over_questions(make(), questions))
    assert all(0.93 - slack(SAMPLES) <= each <= 0.97 + slack(SAMPLES) for each in coverage.values())


def test_the_plain_percentile_interval_would_not_pass() -> None:
    found = said(
        "skewed, 20 questions, plain percentile:", coverage_over_questions(skewed(), 20, plain=True, samples=2000)
    )
    assert max(found.values()) < 0.93


def seeds_of(
    population: Population, drawn: Array, seeds: int, spread: float, generator: np.random.Generator
) -> Population:
    """The drawn questions answered by heads of some seeds, whose steps differ by ``spread``; 5 % more on each question,
    3 % in time.

    The factors have mean 1, so that the population's statistics stay the truth.
    """

    def factors(scale: float, *shape: int) -> Array:
        return np.exp(scale * generator.standard_normal((*shape, drawn.shape[1])) - scale**2 / 2)

    machine, found = factors(0.03, seeds, len(drawn)), {}
    for method, each in population.items():
        tokens, steps, decode_s = (
            np.broadcast_to(column, (seeds, *drawn.shape)) for column in np.moveaxis(each[drawn], -1, 0)
        )
        more = 1.0 if method == "vanilla" else factors(spread, seeds, 1) * factors(0.05, seeds, len(drawn))
        cells = np.stack([tokens, steps * more, decode_s * more * machine * factors(0.03, seeds, len(drawn))], axis=-1)
        found[method] = cells.reshape(seeds * len(drawn), drawn.shape[1], 3)
    return found


def coverage_over_seeds(
    seeds: int, questions: int, spread: float, samples: int, naive: bool = False
) -> dict[str, float]:
    """How often the intervals of some seeds' answers to some questions hold the population's value."""
    population, generator = recorded(), np.random.default_rng(seeds * questions)
    truth = truths(population)
    count = dict.fromkeys(truth, 0)
    for part in range(samples // 250):
        drawn = generator.integers(0, len(population["vanilla"]), (questions, 250))
        weights = statistics.resample_seeds(seeds, questions, seed=part, resamples=499)
        for name, statistic in statistics_of(seeds_of(population, drawn, seeds, spread, generator)).items():
            if naive:
                both = (weights.seeds[:, :, None] * weights.questions[:, None, :]).reshape(len(weights.seeds), -1)
                ends = np.quantile(statistic(both), [0.025, 0.975], axis=0)
            else:
                ends = statistics.hierarchical_ends(statistic, weights)
            count[name] += held(ends, truth[name])
    return {name: each / samples for name, each in count.items()}


def check_coverage_over_seeds(seeds: int, questions: int, spread: float, samples: int) -> None:
    coverage = coverage_over_seeds(seeds, questions, spread, samples=samples)
    found = said(f"{seeds} seeds apart by {spread:.0%}, {questions} questions:", coverage)
    assert all(0.93 - slack(samples) <= each <= 0.97 + slack(samples) for each in found.values())


@pytest.mark.parametrize(("seeds", "spread"), [(3, 0.02), (3, 0.1), (5, 0.02)])
def test_95_percent_intervals_over_seeds_cover_93_to_97_percent(seeds: int, spread: float) -> None:
    check_coverage_over_seeds(seeds, 20, spread, 1000)


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("seeds", "questions", "spread"), [(3, 20, 0.02), (3, 80, 0.0), (3, 80, 0.02), (3, 80, 0.1), (5, 80, 0.02)]
)
def test_they_do_so_whatever_the_spread(seeds: int, questions: int, spread: float) -> None:
    check_coverage_over_seeds(seeds, questions, spread, 4000)


def test_resampling_three_seeds_alone_would_not_pass() -> None:
    found = said(
        "3 seeds apart by 10%, 20 questions, uncorrected:", coverage_over_seeds(3, 20, 0.1, naive=True, samples=1000)
    )
    assert max(found.values()) < 0.90


# ---------------------------------------------------------------------------------------------- verdicts


@pytest.mark.parametrize(
    ("low", "high", "apart", "claim"),
    [
        (0.25, 0.40, True, "confirms"),
        (0.30, 0.50, True, "not distinguishable"),
        (0.10, 0.30, True, "not distinguishable"),
        (0.10, 0.60, True, "not distinguishable"),
        (0.05, 0.20, True, "contradicts"),
        (0.45, 0.60, True, "contradicts"),
        (-0.10, 0.20, False, "contradicts"),
        (-0.20, -0.10, True, "contradicts"),
        (math.nan, math.nan, False, "not distinguishable"),
    ],
)
def test_verdicts_follow_from_the_interval(low: float, high: float, apart: bool, claim: str) -> None:
    measured = Interval((low + high) / 2, low, high)
    assert statistics.excludes_zero(measured) == apart
    assert statistics.against_range(measured, 0.24, 0.41) == claim
