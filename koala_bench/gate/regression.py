"""The regression gate: is the acceptance length of new records at most a margin worse than the baseline's?

A non-inferiority test: a method passes if the lower end of the 90 % interval of its change lies above minus the margin,
a one-sided 5 % test of "worse by the margin or more" (Schuirmann 1987, J. Pharmacokin. Biopharm. 15). The gate passes
if every method and all together pass. This is an intersection-union test, so the probability of missing a loss needs no
correction for multiple tests (Berger 1982, Technometrics 24). There are two cases.

*Fixed checkpoints* (the same head weights on both sides): decoding is deterministic on one CPU, so without a change all
step counts are equal and the interval has no width. The interval is a paired bootstrap over questions: would a change
appear on other questions like these?

*Retrained heads* (other weights): trainings with different seeds differ anyway, so the unit is a training. The log
acceptance lengths of N new heads are compared with those of K baseline heads on the same questions. The spread s
between seeds is the baseline's alone, so that a new version cannot widen its own margin. The change has standard error
s sqrt(1/K + 1/N) and a t distribution with K - 1 degrees of freedom. The margin in force is the requested one or, if
larger, the smallest with both error rates: a loss of the margin is missed in at most 5 % of cases, and without a change
at most 1 % raise an alarm, over all verdicts together (Bonferroni). s includes the interaction of seeds and questions,
because all records answer the same questions.

Speedups never decide: times on shared machines are noise.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy.special import stdtrit

from koala_bench.errors import KoalaBenchError
from koala_bench.gate.comparable import (
    FEWEST_SEEDS,
    Mode,
    Place,
    answers,
    consistent,
    header_changes,
    mode_of,
    paired_places,
    same_machine,
)
from koala_bench.records import statistics
from koala_bench.records.reading import Run
from koala_bench.records.schema import RunHeader
from koala_bench.records.statistics import Array, Interval, Statistic, Totals
from koala_bench.records.summaries import VANILLA, Summary, summarise

OVERALL = "overall"
# Percent, chosen from 1 to 4 by the simulation in tests/gate/test_regression.py on 16 questions. False alarms from
# rounding on another machine: 6 of 100 checks at 2, none at 3. A loss of 3 % by one method is found in half of the
# cases at 4, in more than nine of ten at 3. A loss of 5 % is always found.
MARGIN = 3.0
MISSED = 0.05
FALSE_ALARMS = 0.01
CONFIDENCE = 1 - 2 * MISSED
_MOST_SEEDS = 100  # more are not worth a narrower margin
# Gap of the top-2 logits that rounding in each dtype cannot close.
CLEAR_GAP = {"float64": 1e-9, "float32": 1e-3, "float16": 0.1, "bfloat16": 0.5}


@dataclass(frozen=True)
class Line:
    """One verdict, of a method or of all together.

    Attributes:
        baseline, measured: acceptance length in tokens per step; of several records the geometric mean.
        change: in percent of the baseline's, with its 90 % interval.
        margin: in force, percent; in retrained mode possibly wider than requested.
        spread: standard deviation between the baseline's seeds, percent; None in fixed mode.
        seeds: records on either side, baseline first.
        decode_s: seconds of decoding in the new records.
        speedups: baseline's and new, over vanilla; None if the machines differ or for all methods together.
    """

    name: str
    mode: Mode
    baseline: float
    measured: float
    change: Interval
    margin: float
    spread: float | None
    seeds: tuple[int, int]
    decode_s: float
    speedups: tuple[float, float] | None

    @property
    def passed(self) -> bool:
        """Whether the loss is shown to be smaller than the margin; an interval that is not a number shows nothing."""
        return self.change.low >= -self.margin


@dataclass(frozen=True)
class Gate:
    """The outcome of a check.

    Attributes:
        wanted: the requested margin, percent.
        lines: one per method of the baseline, then all together.
        questions, answers: sample size of each method; answers count one record's turns and repeats.
        findings: reported without effect on the verdict: losslessness, changed answers, heads and versions.
        same_machine: whether the speedups of both sides may be compared.
    """

    wanted: float
    baselines: tuple[RunHeader, ...]
    records: tuple[RunHeader, ...]
    lines: tuple[Line, ...]
    questions: int
    answers: int
    findings: tuple[str, ...]
    same_machine: bool

    @property
    def passed(self) -> bool:
        """Whether every line passed."""
        return all(line.passed for line in self.lines)


# ---------------------------------------------------------------------------------------------- the two tests


def length_change(new: Totals, old: Totals) -> Statistic:
    """Change of the acceptance length in percent, paired by question."""
    return statistics.change_percent(statistics.length(new), statistics.length(old))


@dataclass(frozen=True)
class SeedTest:
    """Result of ``retrained_change``, in percent, each [...].

    Attributes:
        value, low, high: the change and the ends of its 90 % interval.
        margin: in force.
        spread: standard deviation between the baseline's seeds.
    """

    value: Array
    low: Array
    high: Array
    margin: Array
    spread: Array


def _widening(old: int, new: int, verdicts: int) -> float:
    """The narrowest margin with both error rates, as a multiple of the spread between seeds."""
    quantiles = stdtrit(old - 1, 1 - MISSED) + stdtrit(old - 1, 1 - FALSE_ALARMS / verdicts)
    return float(quantiles) * math.sqrt(1 / old + 1 / new)


def retrained_change(new: Array, old: Array, wanted: float, verdicts: int) -> SeedTest:
    """Test the acceptance lengths of newly trained heads against those of the baseline's seeds.

    Args:
        new: acceptance lengths of the new records, [..., N].
        old: of the baseline's, [..., K] with K > 1.
        wanted: margin in percent.
        verdicts: number of tests that share the false-alarm rate.
    """
    count, base = np.log(new).shape[-1], np.log(old)
    spread = base.std(axis=-1, ddof=1)
    change = np.log(new).mean(axis=-1) - base.mean(axis=-1)
    half_width = float(stdtrit(base.shape[-1] - 1, 1 - MISSED)) * spread * math.sqrt(1 / base.shape[-1] + 1 / count)
    margin = np.maximum(-math.log1p(-wanted / 100), _widening(base.shape[-1], count, verdicts) * spread)
    return SeedTest(
        value=100 * np.expm1(change),
        low=100 * np.expm1(change - half_width),
        high=100 * np.expm1(change + half_width),
        margin=-100 * np.expm1(-margin),
        spread=100 * spread,
    )


def seeds_needed(spread: float, wanted: float, verdicts: int) -> int | None:
    """Smallest number of seeds per side that keeps the margin at ``wanted`` percent; None above 100."""
    limit = -100 * math.log1p(-wanted / 100)
    return next((n for n in range(FEWEST_SEEDS, _MOST_SEEDS + 1) if _widening(n, n, verdicts) * spread <= limit), None)


# ---------------------------------------------------------------------------------------------- the decision


def _together(parts: Sequence[Totals]) -> Totals:
    """The sums of several methods or records on the same questions."""
    return replace(
        parts[0],
        tokens=np.sum([part.tokens for part in parts], axis=0),
        steps=np.sum([part.steps for part in parts], axis=0),
        seconds=np.sum([part.seconds for part in parts], axis=0),
    )


def _length(part: Totals) -> float:
    return float(part.tokens.sum() / part.steps.sum())


def _means(values: Sequence[float], count: int) -> tuple[float, float]:
    """The means of the first ``count`` values and of the others."""
    return float(np.mean(values[:count])), float(np.mean(values[count:]))


def check(baselines: Sequence[Run], records: Sequence[Run], margin: float = MARGIN) -> Gate:
    """Compare new records with the baseline's: one verdict per method of the baseline, and one over all of them.

    Args:
        baselines: one record, or of retrained heads one per training seed.
        records: the same of the new version.
        margin: tolerated loss of acceptance length, in percent.

    Raises:
        KoalaBenchError: records that cannot be compared (see ``consistent`` and ``mode_of``), or fewer than two
            questions.
    """
    runs = [*baselines, *records]
    methods = consistent(runs)
    common, left_out = paired_places(runs, methods)
    questions = len({place[0] for place in common})
    if questions < 2:
        raise KoalaBenchError(
            f"{records[0].path} and the baseline share {questions} answered question{'' if questions == 1 else 's'}.",
            "Evaluate at least two; 16 or more show small changes.",
        )
    modes: dict[str, Mode] = {name: mode_of(name, baselines, records) for name in methods}
    same = same_machine(runs)
    summaries = [summarise(run, methods) for run in runs]

    def totals_of(run: Run, name: str) -> Totals:
        return statistics.totals(
            turn for turn in run.turns_of(name) if (turn["question_id"], turn["turn"], turn["repeat"]) in common
        )

    by_name = {name: [totals_of(run, name) for run in runs] for name in methods}
    by_name[OVERALL] = [_together([by_name[name][index] for name in methods]) for index in range(len(runs))]
    modes[OVERALL] = "retrained" if "retrained" in modes.values() else "fixed"
    weights = statistics.resample_weights(questions)
    lines = []
    for name, parts in by_name.items():
        old, new = parts[: len(baselines)], parts[len(baselines) :]
        speedups = [each.speedup.value for of_run in summaries for each in of_run if each.name == name]
        if modes[name] == "fixed":
            change = statistics.interval(length_change(_together(new), _together(old)), weights, CONFIDENCE)
            in_force, spread = margin, None
        else:
            lengths = [np.array([_length(part) for part in side]) for side in (new, old)]
            test = retrained_change(lengths[0], lengths[1], margin, len(by_name))
            change = Interval(float(test.value), float(test.low), float(test.high))
            in_force, spread = float(test.margin), float(test.spread)
        before, after = (math.exp(float(np.mean([math.log(_length(part)) for part in side]))) for side in (old, new))
        lines.append(
            Line(
                name=name,
                mode=modes[name],
                baseline=before,
                measured=after,
                change=change,
                margin=in_force,
                spread=spread,
                seeds=(len(old), len(new)),
                decode_s=float(sum(part.seconds.sum() for part in new)),
                speedups=_means(speedups, len(old)) if same and speedups else None,
            )
        )
    new_summaries = zip(records, summaries[len(baselines) :], strict=True)
    findings = [text for run, of_run in new_summaries for text in _lossless(run, of_run)]
    if left_out:
        findings.append(
            "Left out, because the target itself (vanilla decoding) answers otherwise than in the baseline, there or"
            f" in a turn before: {left_out} of {left_out + len(common)} answers. Rounding differs between machines and"
            " versions."
        )
    findings += _findings(baselines, records, modes, lines, common, margin)
    headers = [tuple(run.header for run in side) for side in (baselines, records)]
    return Gate(margin, headers[0], headers[1], tuple(lines), questions, len(common), tuple(findings), same)


# ---------------------------------------------------------------------------------------------- findings


def _lossless(run: Run, summaries: Sequence[Summary]) -> list[str]:
    """Answers that differ from vanilla's where rounding does not explain it, by method."""
    dtype = run.header["target"]["dtype"]
    limit = CLEAR_GAP.get(dtype, 0.0)
    found = []
    for each in summaries:
        differing = each.differing if each.method["lossless"] else ()
        clear = [one for one in differing if one.top2_gap is None or one.top2_gap > limit]
        if clear:
            one = clear[0]
            gap = "no gap recorded" if one.top2_gap is None else f"gap {one.top2_gap:.2g}"
            found.append(
                f"NOT LOSSLESS: {len(clear)} of {each.compared} answers of {each.name}"
                f" {'leaves' if len(clear) == 1 else 'leave'} vanilla's by more than rounding explains (top-2 gap above"
                f" {limit:g} in {dtype}); first: question {one.question_id}, turn {one.turn}, position {one.position},"
                f" {gap}. `koala-bench audit` judges them."
            )
    return found


def _changed_answers(old: Run, new: Run, method: str, common: set[Place]) -> str | None:
    before, after = answers(old, method), answers(new, method)
    changed = sorted(place for place in common if before[place]["new_token_ids"] != after[place]["new_token_ids"])
    if not changed:
        return None
    question, turn, repeat = changed[0]
    return (
        f"CHANGED ANSWERS: {len(changed)} of {len(common)} answers of {method}"
        f" {'differs' if len(changed) == 1 else 'differ'} from the baseline's, though its checkpoint and the target's"
        f" answers are the same; first: question {question}, turn {turn}, repeat {repeat}. `koala-bench audit` tells"
        " ties from defects."
    )


def _findings(
    baselines: Sequence[Run],
    records: Sequence[Run],
    modes: Mapping[str, Mode],
    lines: Sequence[Line],
    common: set[Place],
    margin: float,
) -> list[str]:
    methods = [name for name in modes if name != OVERALL]
    found: list[str] = []
    fixed = [name for name in methods if modes[name] == "fixed"]
    found += [text for name in fixed if (text := _changed_answers(baselines[0], records[0], name, common))]
    for line in lines:
        if line.spread is not None and line.margin > margin + 1e-9:
            enough = seeds_needed(line.spread, margin, len(lines))
            advice = (
                f"{enough} seeds on each side would keep it"
                if enough
                else "no feasible number of seeds would keep it; more questions may"
            )
            found.append(
                f"The margin of {line.name} is widened from {margin:g} % to {line.margin:.1f} %, because the baseline's"
                f" seeds differ by a standard deviation of {line.spread:.2f} %: {advice}."
            )
    known = set(baselines[0].methods)
    if extra := sorted({name for run in records for name in run.methods} - known):
        found.append(f"Not held, because the baseline does not have them: {', '.join(extra)}.")
    if changes := header_changes(baselines[0].header, records[0].header):
        found.append(f"Other than in the baseline: {', '.join(changes)}.")
    return found


def describe_update(old: Sequence[Run], new: Sequence[Run]) -> list[str]:
    """What changes when new records replace old ones, if any: one line per method and one for the headers."""

    def lengths(runs: Sequence[Run]) -> dict[str, float]:
        names = [name for name in runs[0].methods if name != VANILLA] if runs else []
        of = {
            name: [math.log(_length(statistics.totals(run.turns_of(name)))) for run in runs if name in run.methods]
            for name in names
        }
        return {name: math.exp(float(np.mean(each))) for name, each in of.items()}

    before, after = lengths(old), lengths(new)
    lines = []
    for name, value in after.items():
        change = (
            f"{before[name]:.3f} -> {value:.3f} ({100 * (value / before[name] - 1):+.2f} %)"
            if name in before
            else f"{value:.3f} (new)"
        )
        lines.append(f"{name}: acceptance length {change}.")
    lines += [
        f"{name}: no longer held (its acceptance length was {value:.3f})."
        for name, value in before.items()
        if name not in after
    ]
    if len(old) > 0 and (changes := header_changes(old[0].header, new[0].header)):
        lines.append(f"Other than before: {', '.join(changes)}.")
    return lines
