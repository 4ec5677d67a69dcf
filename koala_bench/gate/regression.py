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
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import stdtrit

from koala_bench.errors import KoalaBenchError
from koala_bench.gate.comparable import (
    FEWEST_SEEDS,
    Mode,
    answers,
    consistent,
    header_changes,
    mode_of,
    paired_places,
    same_machine,
)
from koala_bench.records import statistics
from koala_bench.records.reading import Run
from koala_bench.records.schema import Place, RunHeader
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
    """

    wanted: float
    baselines: tuple[RunHeader, ...]
    records: tuple[RunHeader, ...]
    lines: tuple[Line, ...]
    questions: int
    answers: int
    findings: tuple[str, ...]

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
    sums = (np.sum([getattr(part, name) for part in parts], axis=0) for name in ("tokens", "steps", "seconds"))
    return Totals(parts[0].question_ids, *sums)


def _length(part: Totals) -> float:
    return float(part.tokens.sum() / part.steps.sum())


def _geometric_mean(parts: Sequence[Totals]) -> float:
    return math.exp(float(np.mean([math.log(_length(part)) for part in parts])))


def check(baselines: Sequence[Run], records: Sequence[Run], margin: float = MARGIN) -> Gate:
    """Compare new records with the baseline's: one verdict per method of the baseline, and one over all of them.

    Args:
        baselines: one record, or of retrained heads one per training seed.
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
    modes[OVERALL] = "retrained" if "retrained" in modes.values() else "fixed"
    by_name = {
        name: [statistics.totals(turn for place, turn in answers(run, name).items() if place in common) for run in runs]
        for name in methods
    }
    by_name[OVERALL] = [_together([by_name[name][index] for name in methods]) for index in range(len(runs))]
    summaries = [{each.name: each for each in summarise(run, methods)} for run in runs]
    same, count = same_machine(runs), len(baselines)
    weights = statistics.resample_weights(questions)
    lines = []
    for name, parts in by_name.items():
        old, new = parts[:count], parts[count:]
        in_force, spread = margin, None
        if modes[name] == "fixed":
            change = statistics.interval(length_change(_together(new), _together(old)), weights, CONFIDENCE)
        else:
            after, before = (np.array([_length(part) for part in side]) for side in (new, old))
            test = retrained_change(after, before, margin, len(by_name))
            change = Interval(float(test.value), float(test.low), float(test.high))
            in_force, spread = float(test.margin), float(test.spread)
        speedups = [of[name].speedup.value for of in summaries if name in of]
        lines.append(
            Line(
                name=name,
                mode=modes[name],
                baseline=_geometric_mean(old),
                measured=_geometric_mean(new),
                change=change,
                margin=in_force,
                spread=spread,
                seeds=(len(old), len(new)),
                decode_s=float(sum(part.seconds.sum() for part in new)),
                speedups=(
                    (float(np.mean(speedups[:count])), float(np.mean(speedups[count:]))) if same and speedups else None
                ),
            )
        )
    findings = [
        text for run, of in zip(records, summaries[count:], strict=True) for text in _lossless(run, of.values())
    ]
    if left_out:
        findings.append(
            f"Left out: {left_out} of {left_out + len(common)} answers, where vanilla decoding itself answers otherwise"
            " than in the baseline, there or in a turn before."
        )
    findings += _findings(baselines, records, modes, lines, common, margin)
    headers = [tuple(run.header for run in side) for side in (baselines, records)]
    return Gate(margin, headers[0], headers[1], tuple(lines), questions, len(common), tuple(findings))


# ---------------------------------------------------------------------------------------------- findings


def _lossless(run: Run, summaries: Iterable[Summary]) -> list[str]:
    """Answers that differ from vanilla's where rounding does not explain it, by method."""
    limit = CLEAR_GAP.get(run.header["target"]["dtype"], 0.0)
    found = []
    for each in (summary for summary in summaries if summary.method["lossless"]):
        clear = [one for one in each.differing if one.top2_gap is None or one.top2_gap > limit]
        if clear:
            one = clear[0]
            gap = "no gap recorded" if one.top2_gap is None else f"gap {one.top2_gap:.2g}"
            found.append(
                f"NOT LOSSLESS: {len(clear)} of {each.compared} answers of {each.name} leave vanilla's at a top-2 gap"
                f" above {limit:g}; first: question {one.question_id}, turn {one.turn}, position {one.position}, {gap}."
                " `koala-bench audit` judges them."
            )
    return found


def _findings(
    baselines: Sequence[Run],
    records: Sequence[Run],
    modes: Mapping[str, Mode],
    lines: Sequence[Line],
    common: set[Place],
    margin: float,
) -> list[str]:
    found: list[str] = []
    for name in (each for each in modes if each != OVERALL and modes[each] == "fixed"):
        before, after = (answers(side[0], name) for side in (baselines, records))
        changed = sorted(place for place in common if before[place]["new_token_ids"] != after[place]["new_token_ids"])
        if changed:
            found.append(
                f"CHANGED ANSWERS: {len(changed)} of {len(common)} answers of {name} by the same checkpoint; first:"
                " question {}, turn {}, repeat {}. `koala-bench audit` tells ties from defects.".format(*changed[0])
            )
    for line in lines:
        if line.spread is not None and line.margin > margin + 1e-9:
            enough = seeds_needed(line.spread, margin, len(lines)) or f"more than {_MOST_SEEDS}"
            found.append(
                f"The margin of {line.name} is widened from {margin:g} % to {line.margin:.1f} %: the baseline's seeds"
                f" differ by a standard deviation of {line.spread:.2f} %. Seeds on each side that would keep it:"
                f" {enough}."
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
        with_it = {name: [run for run in runs if name in run.methods] for name in names}
        return {
            name: _geometric_mean([statistics.totals(run.turns_of(name)) for run in of]) for name, of in with_it.items()
        }

    before, after = lengths(old), lengths(new)
    lines = []
    for name in dict.fromkeys([*after, *before]):
        ends = [f"{of[name]:.3f}" if name in of else None for of in (before, after)]
        change = f" ({100 * (after[name] / before[name] - 1):+.2f} %)" if None not in ends else ""
        lines.append(f"{name}: acceptance length {ends[0] or '(new)'} -> {ends[1] or '(no longer held)'}{change}.")
    if old and (changes := header_changes(old[0].header, new[0].header)):
        lines.append(f"Other than before: {', '.join(changes)}.")
    return lines
