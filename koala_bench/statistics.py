"""Numbers from records: the metrics, their definitions, and paired bootstrap intervals over questions.

The question is the unit of everything here: the turns and repeats of a question are totalled first, and
resampling draws whole questions, because the turns of one question share their text. A statistic is a
function of *weights*: how often each question is in the sample. All ones give the value itself, multinomial
counts give a bootstrap resample (Efron and Tibshirani 1993, chapter 20), and one matrix of counts used for
every method makes all comparisons paired.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from koala_bench.errors import KoalaBenchError
from koala_bench.schema import TurnLine

Array = NDArray[np.float64]
# weights [..., questions] -> values [...]
Statistic = Callable[[Array], Array]

RESAMPLES = 9999  # with 9,999 the 2.5 % and 97.5 % points are order statistics, the 250th and the 9,750th
CONFIDENCE = 0.95
SEED = 0


@dataclass(frozen=True)
class Interval:
    """A value with the ends of its confidence interval, which are NaN where there is nothing to resample."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class DepthRate:
    """How often the draft was right at one depth, given that it was right above.

    Attributes:
        depth: 1 for the children of the root.
        accepted: steps that settled a node at this depth.
        trials: steps that settled a node one level up and were offered this depth.
    """

    depth: int
    accepted: int
    trials: int

    @property
    def rate(self) -> float:
        """accepted / trials; NaN without a trial."""
        return self.accepted / self.trials if self.trials else math.nan


# ---------------------------------------------------------------------------------------------- acceptance


def acceptance_length(accepted: Sequence[int]) -> float:
    """Tokens per verification step (tau), bonus token included: vanilla decoding has 1.

    This is Spec-Bench's "#Mean accepted tokens" (the mean of its ``accept_lengths``) and the acceptance length in
    EAGLE's text (SafeAILab/EAGLE#195). The sum of Medusa's ``new_tokens`` over that of its ``idxs``, which users
    compute, is larger, because ``idxs`` counts from 0.

    Args:
        accepted: draft tokens that each step settled.
    """
    if not accepted:
        raise ValueError("no step")
    return sum(accepted) / len(accepted) + 1.0


def acceptance_rate_by_depth(accepted: Sequence[int], drafted_depth: Sequence[int]) -> list[DepthRate]:
    """P(depth d accepted | depth d - 1 accepted and depth d offered), for d = 1 .. the deepest one offered.

    Conditional on the parent, like EAGLE's n-alpha; speculators' unconditional rate at d is the product of the
    rates up to d if every step offers the same depth.

    Args:
        accepted: draft tokens that each step settled.
        drafted_depth: the deepest level that each step was offered.
    """
    settled, offered = np.asarray(accepted, dtype=np.int64), np.asarray(drafted_depth, dtype=np.int64)
    if settled.shape != offered.shape:
        raise ValueError(f"{settled.size} steps in accepted, {offered.size} in drafted_depth")
    rates = []
    for depth in range(1, int(offered.max(initial=0)) + 1):
        trials = int(np.count_nonzero((settled >= depth - 1) & (offered >= depth)))
        rates.append(DepthRate(depth, int(np.count_nonzero(settled >= depth)), trials))
    return rates


def draft_overhead(draft_s: float, verify_s: float) -> float:
    """Share of drafting in the time of a step: draft / (draft + verify), both in seconds."""
    return draft_s / (draft_s + verify_s)


# ---------------------------------------------------------------------------------------------- per question


@dataclass(frozen=True)
class Totals:
    """What one method did, totalled within each question over its turns and repeats.

    Attributes:
        question_ids: ascending, length ``questions``.
        tokens: tokens that the steps settled, [questions]; a token that the prefill gave is not among them.
        steps: verification steps, [questions].
        decode_s: seconds of decoding without prefill, [questions].
    """

    question_ids: tuple[int, ...]
    tokens: Array
    steps: Array
    decode_s: Array


def totals(turns: Iterable[TurnLine]) -> Totals:
    """Add up the turns of one method per question; failed turns count for nothing.

    Raises:
        KoalaBenchError: a question has no decode time, or no question took a step, so that there is no rate.
    """
    sums: dict[int, list[float]] = {}
    for turn in turns:
        accepted, seconds = turn["accepted"], turn["decode_s"]
        if accepted is None or seconds is None:
            continue
        row = sums.setdefault(turn["question_id"], [0.0, 0.0, 0.0])
        for column, amount in enumerate((sum(accepted) + len(accepted), len(accepted), seconds)):
            row[column] += amount
    ordered = sorted(sums)
    table = np.array([sums[question] for question in ordered], dtype=np.float64).reshape(-1, 3)
    if (table[:, 2] <= 0).any():
        question = ordered[int(np.argmin(table[:, 2]))]
        raise KoalaBenchError(f"Question {question} was decoded in no time at all.", "The record's decode_s cannot be right; run the evaluation again.")
    if ordered and not table[:, 1].any():
        raise KoalaBenchError("No answer took a decoding step: each ended with the token of its prefill.", "Evaluate with a larger --max-new-tokens.")
    return Totals(tuple(ordered), table[:, 0], table[:, 1], table[:, 2])


# ---------------------------------------------------------------------------------------------- statistics of weights


def _paired(method: Totals, base: Totals) -> None:
    if method.question_ids != base.question_ids:
        raise ValueError("not the same questions")


def length(method: Totals) -> Statistic:
    """Acceptance length: total tokens / total steps."""
    return lambda weights: (weights @ method.tokens) / (weights @ method.steps)


def speedup_of_totals(method: Totals, base: Totals) -> Statistic:
    """Speedup as a ratio of totals: (tokens / seconds) / (the base's tokens / seconds), each summed over questions.

    The definition of this project's tables: every second counts the same, whichever question it was spent on.
    """
    _paired(method, base)
    return lambda weights: (weights @ method.tokens) * (weights @ base.decode_s) / ((weights @ method.decode_s) * (weights @ base.tokens))


def speedup_of_means(method: Totals, base: Totals) -> Statistic:
    """Speedup as a ratio of means: mean over questions of tokens per second / the base's mean.

    EAGLE's and Spec-Bench's ``speed.py`` compute this (with the base's tokens counted from its text).
    """
    _paired(method, base)
    return lambda weights: (weights @ (method.tokens / method.decode_s)) / (weights @ (base.tokens / base.decode_s))


def mean_of_speedups(method: Totals, base: Totals) -> Statistic:
    """Speedup as a mean of ratios: the mean over questions of each question's own speedup.

    Questions that vanilla answered without a step have no ratio and are left out.
    """
    _paired(method, base)
    usable = base.tokens > 0
    ratios = (method.tokens * base.decode_s)[usable] / (method.decode_s * base.tokens)[usable]
    return lambda weights: (weights[..., usable] @ ratios) / weights[..., usable].sum(axis=-1)


def change(new: Statistic, old: Statistic) -> Statistic:
    """new - old, in the unit of the two."""
    return lambda weights: new(weights) - old(weights)


def change_percent(new: Statistic, old: Statistic) -> Statistic:
    """new relative to old, in percent."""
    return lambda weights: 100.0 * (new(weights) / old(weights) - 1.0)


# ---------------------------------------------------------------------------------------------- bootstrap


def resample_weights(questions: int, seed: int = SEED, resamples: int = RESAMPLES) -> Array:
    """How often each question is drawn in each bootstrap resample, [resamples, questions]; rows sum to ``questions``."""
    generator = np.random.default_rng(seed)
    return generator.multinomial(questions, np.full(questions, 1.0 / questions), size=resamples).astype(np.float64)


def interval(statistic: Statistic, weights: Array, confidence: float = CONFIDENCE) -> Interval:
    """The statistic of the sample with its percentile bootstrap interval.

    The percentile method, not BCa: the statistics are smooth ratios of sums over questions, whose bootstrap
    distributions are nearly symmetric, and it transforms with the statistic (Efron and Tibshirani 1993, chapter
    13), so that the interval of a change in percent and that of a ratio say the same.

    Args:
        weights: [resamples, questions], the same for all methods that are compared.
    """
    questions = weights.shape[-1]
    value = float(statistic(np.ones(questions)))
    if questions < 2:
        return Interval(value, math.nan, math.nan)
    tail = (1.0 - confidence) / 2.0
    low, high = np.quantile(statistic(weights), [tail, 1.0 - tail], method="weibull")
    return Interval(value, float(low), float(high))


# ---------------------------------------------------------------------------------------------- verdicts


def against_zero(measured: Interval) -> Literal["above zero", "below zero", "not distinguishable from zero"]:
    """Which side of zero the whole interval lies on, if it lies on one."""
    if measured.low > 0:
        return "above zero"
    return "below zero" if measured.high < 0 else "not distinguishable from zero"


def against_range(measured: Interval, low: float, high: float) -> Literal["confirms", "contradicts", "not distinguishable"]:
    """Whether a measurement agrees with a claimed range.

    ``confirms``: the whole interval lies in the range. ``contradicts``: it lies outside, on one side.
    ``not distinguishable``: it lies across an end of the range, so that both are possible (also without interval).
    """
    if low <= measured.low and measured.high <= high:
        return "confirms"
    return "contradicts" if measured.high < low or measured.low > high else "not distinguishable"
