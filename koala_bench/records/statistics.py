"""Numbers from records: the metrics, their definitions, and paired bootstrap intervals over questions and seeds.

The question is the unit of everything here: the turns and repeats of a question are totalled first, and
resampling draws whole questions, because the turns of one question share their text. A statistic is a
function of *weights*: how often each question is in the sample. All ones give the value itself, multinomial
counts give a bootstrap resample (Efron and Tibshirani 1993, chapter 20), and one matrix of counts used for
every method makes all comparisons paired. Several training seeds are one more factor: the cells of the table
seeds x questions take the questions' place. What peers call acceptance length is in ``definitions``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr, ndtri, stdtrit

from koala_bench.errors import KoalaBenchError
from koala_bench.records.schema import TurnLine, answer_s

Array = NDArray[np.float64]
# weights [..., questions] -> values [...], or [..., samples] where the totals are [questions, samples]
Statistic = Callable[[Array], Array]

RESAMPLES = 9999
CONFIDENCE = 0.95
SEED = 0


@dataclass(frozen=True)
class Interval:
    """A value with the ends of its confidence interval, which are NaN where there is nothing to resample."""

    value: float
    low: float
    high: float


NO_INTERVAL = Interval(math.nan, math.nan, math.nan)


# ---------------------------------------------------------------------------------------------- per question


@dataclass(frozen=True)
class Totals:
    """What one method did, totalled within each question over its turns and repeats.

    Attributes:
        question_ids: ascending, length ``questions``.
        tokens: tokens that the steps committed, [questions]; a token that the prefill gave is not among them. Of whole
            answers all their tokens.
        steps: verification steps, [questions].
        seconds: of decoding without the prefills, or of whole answers, [questions].
    """

    question_ids: tuple[int, ...]
    tokens: Array
    steps: Array
    seconds: Array


def summed(rows: Iterable[tuple[int, float, float, float]], timed: bool = True) -> Totals:
    """Add up (question, tokens, steps, seconds) per question.

    Args:
        timed: whether every question must have taken some time.

    Raises:
        KoalaBenchError: one took none.
    """
    table = np.array([*rows], dtype=np.float64).reshape(-1, 4)
    questions, place = np.unique(table[:, 0].astype(np.int64), return_inverse=True)
    sums = (np.bincount(place, column, len(questions)).astype(np.float64) for column in table[:, 1:].T)
    tokens, steps, seconds = sums
    if timed and (seconds <= 0).any():
        raise KoalaBenchError(
            f"Question {questions[np.argmin(seconds)]} has a decoding time of 0.",
            "The record's times are wrong; run the evaluation again.",
        )
    return Totals(tuple(questions.tolist()), tokens, steps, seconds)


def totals(turns: Iterable[TurnLine], whole: bool = False) -> Totals:
    """Add up the turns of one method per question; failed turns count for nothing.

    Args:
        whole: take whole answers, what reading the prompt cost and gave included; else decoding alone.

    Raises:
        KoalaBenchError: a question has no decode time, or no question took a step, so that there is no rate.
    """

    def amounts(turn: TurnLine) -> tuple[int, float, float, float]:
        accepted, ids = turn["accepted"] or [], turn["new_token_ids"] or []
        tokens = len(ids) if whole else sum(accepted) + len(accepted)
        return turn["question_id"], tokens, len(accepted), answer_s(turn) if whole else turn["decode_s"] or 0.0

    found = summed(amounts(turn) for turn in turns if turn["error"] is None)
    if found.question_ids and not found.steps.any():
        raise KoalaBenchError(
            "No answer took a decoding step: each ended with the token of its prefill.",
            "Evaluate with a larger --max-new-tokens.",
        )
    return found


# ---------------------------------------------------------------------------------------------- statistics of weights


def _paired(method: Totals, base: Totals) -> None:
    if method.question_ids != base.question_ids:
        raise ValueError("not the same questions")


def length(method: Totals) -> Statistic:
    """Acceptance length as a ratio of totals: total tokens / total steps, so that every step counts the same.

    The ratio of means is the same number: mean tokens per question / mean steps per question.
    """
    return lambda weights: (weights @ method.tokens) / (weights @ method.steps)


def speedup_of_totals(method: Totals, base: Totals) -> Statistic:
    """Speedup as a ratio of totals: (tokens / seconds) / (the base's tokens / seconds), each summed over questions.

    The definition of this project's tables: every second counts the same, whichever question it was spent on.
    """
    _paired(method, base)
    return lambda weights: (
        (weights @ method.tokens) * (weights @ base.seconds) / ((weights @ method.seconds) * (weights @ base.tokens))
    )


def speedup_of_means(method: Totals, base: Totals) -> Statistic:
    """Speedup as a ratio of means: mean over questions of tokens per second / the base's mean.

    EAGLE's and Spec-Bench's ``speed.py`` compute this (with the base's tokens counted from its text).
    """
    _paired(method, base)
    return lambda weights: (weights @ (method.tokens / method.seconds)) / (weights @ (base.tokens / base.seconds))


def mean_of_speedups(method: Totals, base: Totals) -> Statistic:
    """Speedup as a mean of ratios: the mean over questions of each question's own speedup.

    Questions that vanilla answered without a step have no ratio and are left out.
    """
    _paired(method, base)
    usable = base.tokens > 0
    ratios = (method.tokens * base.seconds)[usable] / (method.seconds * base.tokens)[usable]
    return lambda weights: (weights[..., usable] @ ratios) / weights[..., usable].sum(axis=-1)


def change(new: Statistic, old: Statistic) -> Statistic:
    """new - old, in the unit of the two."""
    return lambda weights: new(weights) - old(weights)


def change_percent(new: Statistic, old: Statistic) -> Statistic:
    """new relative to old, in percent."""
    return lambda weights: 100.0 * (new(weights) / old(weights) - 1.0)


# ---------------------------------------------------------------------------------------------- bootstrap


def _drawn(generator: np.random.Generator, count: int, resamples: int) -> Array:
    return generator.multinomial(count, np.full(count, 1.0 / count), size=resamples).astype(np.float64)


def resample_weights(questions: int, seed: int = SEED, resamples: int = RESAMPLES) -> Array:
    """Counts of each question in each bootstrap resample, [resamples, questions]; rows sum to ``questions``."""
    return _drawn(np.random.default_rng(seed), questions, resamples)


def _expanded_tail(questions: int, confidence: float) -> float:
    """The level of the lower end: below (1 - confidence) / 2 for the spread and the tails that a small sample lacks."""
    quantile = stdtrit(questions - 1, (1.0 - confidence) / 2.0)
    return float(ndtr(math.sqrt(questions / (questions - 1)) * quantile))


def interval_ends(statistic: Statistic, weights: Array, confidence: float = CONFIDENCE) -> Array:
    """Both ends of the expanded percentile bootstrap interval over questions, [2] or [2, samples]; at least two
    questions.

    Resampling n questions gives a spread that is too small by sqrt((n - 1) / n), and normal tails. The expanded
    percentile interval puts both right: it goes out to the levels Phi(+-sqrt(n / (n - 1)) t), with the quantile t of n
    - 1 degrees of freedom (Hesterberg 2015, The American Statistician 69, section 3.3). It transforms with the
    statistic, so that the interval of a change in percent and that of a ratio say the same. Chosen by simulation: on
    the per-question numbers of an earlier Table 1 it covers 94 to 96 % with 20 to 160 questions, where the plain
    percentile and BCa (Efron 1987) cover 91 to 93 % with 20; on a skewed population 93 to 95 %, BCa 89 to 93 % (it
    estimates the skewness from the same few questions), bootstrap-t no better at many times the work.
    ``tests/records/test_statistics.py`` repeats it. It cannot help where a question in a hundred decides: of
    Spec-Bench's six tasks mixed, 20 random questions cover the acceptance length in 85 of 100 cases, 160 in 93.

    Args:
        weights: [resamples, questions], the same for all methods that are compared.
    """
    tail = _expanded_tail(weights.shape[-1], confidence)
    return np.quantile(statistic(weights), [tail, 1.0 - tail], axis=0, method="weibull")


def interval(statistic: Statistic, weights: Array, confidence: float = CONFIDENCE) -> Interval:
    """The statistic of the sample with its interval over questions; see ``interval_ends``."""
    questions = weights.shape[-1]
    low, high = interval_ends(statistic, weights, confidence) if questions > 1 else (math.nan, math.nan)
    return Interval(float(statistic(np.ones(questions))), float(low), float(high))


# ---------------------------------------------------------------------------------------------- bootstrap over seeds


@dataclass(frozen=True)
class SeedWeights:
    """How often each training seed and each question is drawn, [resamples, seeds] and [resamples, questions]."""

    seeds: Array
    questions: Array


def stacked(seeds: Sequence[Totals]) -> Totals:
    """The totals of one method from several training seeds as one, seed after seed, for ``hierarchical_interval``.

    Every statistic takes it; its value is then that of all seeds together. A method that was not trained (vanilla)
    is stacked too: once per run, or the same totals as often as there are seeds.
    """
    for each in seeds:
        _paired(each, seeds[0])
    tokens, steps, seconds = (
        np.concatenate(parts)
        for parts in zip(*((each.tokens, each.steps, each.seconds) for each in seeds), strict=True)
    )
    return Totals(seeds[0].question_ids * len(seeds), tokens, steps, seconds)


def resample_seeds(seeds: int, questions: int, seed: int = SEED, resamples: int = RESAMPLES) -> SeedWeights:
    """Draw seeds, then questions; every seed and method has the same questions drawn, as all answered the same."""
    generator = np.random.default_rng(seed)
    return SeedWeights(*(_drawn(generator, count, resamples) for count in (seeds, questions)))


_BLOCK = 4_000_000  # weights at a time, 32 MB


def _resampled(statistic: Statistic, weights: SeedWeights) -> Array:
    """The statistic of each resample; a cell is drawn as often as its seed times as often as its question."""
    cells = weights.seeds.shape[1] * weights.questions.shape[1]
    rows = max(1, _BLOCK // cells)
    starts = range(0, len(weights.seeds), rows)
    blocks = (
        (weights.seeds[i : i + rows, :, None] * weights.questions[i : i + rows, None, :]).reshape(-1, cells)
        for i in starts
    )
    return np.concatenate([statistic(block) for block in blocks])


def _influence(statistic: Statistic, cells: int) -> Array:
    """Jackknife influence of each cell, [cells, ...], mean 0 (Efron and Tibshirani 1993, chapter 11)."""
    rows = max(1, _BLOCK // cells)
    without = np.concatenate([statistic(1.0 - np.eye(min(rows, cells - i), cells, k=i)) for i in range(0, cells, rows)])
    return (cells - 1) * (without.mean(axis=0) - without)


def _half_width(influence: Array, confidence: float) -> Array:
    """Half the width of a t interval from the influence of each cell, [seeds, questions, ...] -> [...].

    The mean squares of seeds, questions and rest are those of a two-way analysis of variance. What seeds add beyond
    the rest is known with ``seeds - 1`` degrees of freedom, the remainder with ``questions - 1``; the quantile is
    the mean of both, weighted by their variances (Cochran and Cox 1957, section 4.14). Satterthwaite's degrees of
    freedom, the usual choice, cover 92 to 93 % where this covers 94 to 96 %.
    """
    seeds, questions = influence.shape[:2]
    of_seeds, of_questions = influence.mean(axis=1), influence.mean(axis=0)
    rest = influence - of_seeds[:, None] - of_questions[None]
    square_seeds = questions * (of_seeds**2).sum(axis=0) / (seeds - 1)
    square_questions = seeds * (of_questions**2).sum(axis=0) / (questions - 1)
    square_rest = (rest**2).sum(axis=(0, 1)) / ((seeds - 1) * (questions - 1))
    extra = np.maximum(square_seeds - square_rest, 0.0)
    by_seeds, by_questions = (-stdtrit(count - 1, (1.0 - confidence) / 2.0) for count in (seeds, questions))
    total = extra + square_questions
    weighted = np.divide(
        extra * by_seeds + square_questions * by_questions, np.sqrt(total), out=np.zeros_like(total), where=total > 0
    )
    return weighted / math.sqrt(seeds * questions)


def hierarchical_ends(statistic: Statistic, weights: SeedWeights, confidence: float = CONFIDENCE) -> Array:
    """Both ends of the interval over training seeds and questions, [2] or [2, samples]; at least two of each.

    Seeds and questions are crossed, not nested: every seed answers the same questions, so drawing other questions
    for each seed (Davison and Hinkley 1997, section 3.8; Ren et al. 2010, J. Appl. Stat. 37) would count them as
    new ones. Both factors are resampled and a cell's counts multiplied (the pigeonhole bootstrap: Owen 2007,
    Ann. Appl. Stat. 1). That counts noise within the cells about three times, and with few seeds falls short of
    their spread: three seeds that differ by much cover 75 to 85 % instead of 95 %. So only the shape of the interval
    comes from the resamples; its width is set by ``_half_width``. With 3 or 5 seeds the outcome covers 93.5 to 97 %
    in simulation, whether seeds differ by nothing or by 15 %; with 2 seeds 89 to 97 %.
    """
    seeds, questions = weights.seeds.shape[1], weights.questions.shape[1]
    value = np.asarray(statistic(np.ones(seeds * questions)))
    influence = _influence(statistic, seeds * questions)
    width = _half_width(influence.reshape(seeds, questions, *influence.shape[1:]), confidence)
    resampled = _resampled(statistic, weights)
    tail = (1.0 - confidence) / 2.0
    ends = np.quantile(resampled, [tail, 1.0 - tail], axis=0, method="weibull")
    spread = -ndtri(tail) * resampled.std(axis=0)
    return value + np.divide(width, spread, out=np.zeros_like(width), where=spread > 0) * (ends - value)


def hierarchical_interval(statistic: Statistic, weights: SeedWeights) -> Interval:
    """The statistic of all seeds together with its interval over seeds and questions; see ``hierarchical_ends``.

    With one seed the ends are NaN: how far seeds differ is not known.
    """
    seeds, questions = weights.seeds.shape[1], weights.questions.shape[1]
    low, high = hierarchical_ends(statistic, weights) if min(seeds, questions) > 1 else (math.nan, math.nan)
    return Interval(float(statistic(np.ones(seeds * questions))), float(low), float(high))


# ---------------------------------------------------------------------------------------------- verdicts

CAUTION = "Intervals are not corrected for multiple comparisons: where nothing differs, about one in 20 excludes zero."


def excludes_zero(measured: Interval) -> bool:
    """Whether the whole interval lies on one side of zero."""
    return measured.low > 0 or measured.high < 0


def against_range(
    measured: Interval, low: float, high: float
) -> Literal["confirms", "contradicts", "not distinguishable"]:
    """Whether a measurement agrees with a claimed range.

    ``confirms``: the whole interval lies in the range. ``contradicts``: it lies outside, on one side.
    ``not distinguishable``: it lies across an end of the range, so that both are possible (also without interval).
    """
    if low <= measured.low and measured.high <= high:
        return "confirms"
    return "contradicts" if measured.high < low or measured.low > high else "not distinguishable"
