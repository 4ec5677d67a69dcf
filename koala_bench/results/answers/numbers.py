"""Answer files in numbers: one row per system, speedups over a baseline, and changes between files.

Two traces are compared on the turns that both finished, by question: a question that one of them lacks, or a turn
that failed in one, counts in neither. Intervals come from ``koala_bench.records.statistics``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from koala_bench.errors import KoalaBenchError
from koala_bench.interop.traces import AnsweredTurn, Trace, is_vanilla, vanilla_stem
from koala_bench.records import statistics
from koala_bench.records.statistics import Array, Interval, Statistic, Totals


@dataclass(frozen=True)
class Versus:
    """One trace against another, on the turns that both finished.

    Attributes:
        same_text: turns with the same text in both; None where a file has no texts.
        longest: new tokens of the longest turn, of the trace and of the other.
        whole_answer: speedup of whole answers, prefills included; None where one of the two lacks the counts or times.
        speedup: ratio of totals by the two files' own seconds, of decoding or of whole answers; this and what follows
            is None too where they are not of the same, see ``Trace.clock``.
        speedup_of_means, mean_of_speedups: the other definitions, see ``koala_bench.records.statistics``.
        rate_change: of tokens per second, in percent.
        length_change, length_change_percent: of the acceptance length, in tokens per step and in percent.
    """

    other: Trace
    questions: int
    turns: int
    same_text: int | None
    longest: tuple[int, int] | None = None
    whole_answer: Interval | None = None
    speedup: Interval | None = None
    speedup_of_means: float | None = None
    mean_of_speedups: float | None = None
    rate_change: Interval | None = None
    length_change: Interval | None = None
    length_change_percent: Interval | None = None


@dataclass(frozen=True)
class Row:
    """One trace, or one category of it, in numbers; None stands for what the file does not hold.

    Attributes:
        category: None for all questions together.
        turns, failed: finished turns, from which the numbers are, and failed ones.
        at_least: share of the steps that accepted at least 1, 2, ... drafts.
        speedup, change: against the baseline, and against the first file.
        is_baseline: of another row.
        remarks: why there is no comparison where one was to be expected.
    """

    trace: Trace
    category: str | None
    questions: int
    turns: int
    failed: int
    tokens: int | None
    steps: int | None
    tokens_per_s: float | None
    acceptance_length: Interval | None
    at_least: tuple[float, ...]
    speedup: Versus | None
    change: Versus | None
    is_baseline: bool
    remarks: tuple[str, ...]


_Weights = Callable[[int], Array]
_Turns = Sequence[AnsweredTurn]


def _sum(values: Iterable[int | float | None]) -> float | None:
    """The sum; None where a turn does not have the number, or all are zero."""
    known = list(values)
    return None if None in known else sum(value or 0 for value in known) or None


def _has_length(turns: _Turns) -> bool:
    return None not in (_sum(turn.steps for turn in turns), _sum(turn.committed for turn in turns))


def _has_rate(turns: _Turns) -> bool:
    return None not in (_sum(turn.tokens for turn in turns), _sum(turn.seconds for turn in turns))


def _has_whole_answers(turns: _Turns) -> bool:
    amounts = [turn.whole or (None, None) for turn in turns]
    return None not in (_sum(tokens for tokens, _ in amounts), _sum(seconds for _, seconds in amounts))


def _of_steps(turns: _Turns) -> Totals:
    return statistics.summed(((turn.question_id, turn.committed or 0, turn.steps or 0, 0.0) for turn in turns), False)


def _of_seconds(trace: Trace, turns: _Turns, whole: bool = False) -> Totals:
    rows = (
        (turn.question_id, tokens or 0, turn.steps or 0, seconds or 0.0)
        for turn in turns
        for tokens, seconds in [(turn.whole or (0, 0.0)) if whole else (turn.tokens, turn.seconds)]
    )
    try:
        return statistics.summed(rows)
    except KoalaBenchError as error:
        raise KoalaBenchError(f"{trace.path}: {error.message}", "The times of this file cannot be right.") from error


def _rate(method: Totals) -> Statistic:
    return lambda weights: (weights @ method.tokens) / (weights @ method.seconds)


def _finished(trace: Trace) -> set[tuple[int, int]]:
    return {turn.place for turn in trace.turns if not turn.failed}


def _difference(trace: Trace, other: Trace) -> str | None:
    """Why two traces cannot be compared by question; None if they can."""
    ours, theirs = ({turn.place: turn.category for turn in each.turns} for each in (trace, other))
    mine, its = ({question: turn + 1 for question, turn in sorted(places)} for places in (ours, theirs))
    common = mine.keys() & its.keys()
    if not common:
        return "no question in common"
    # Benchmarks number their questions alike: 101 is one of MT-bench's and one of others'.
    for place in sorted(ours.keys() & theirs.keys()):
        if None not in (ours[place], theirs[place]) and ours[place] != theirs[place]:
            return f"not the same questions, {place[0]} is of category '{ours[place]}' here and '{theirs[place]}' there"
    if all(mine[question] != its[question] for question in common):
        first = min(common)
        return f"not the same questions, the turns of {first} are {mine[first]} here and {its[first]} there"
    return None if _finished(trace) & _finished(other) else "no turn that both finished"


def _versus(trace: Trace, other: Trace, category: str | None, weights_of: _Weights) -> Versus | None:
    """Compare on common turns; None where a category has none."""
    places = _finished(trace) & _finished(other)
    if category is not None:
        places &= {turn.place for turn in trace.turns if turn.category == category}
    if not places:
        return None
    ours, theirs = ([turn for turn in of.turns if turn.place in places and not turn.failed] for of in (trace, other))
    questions = len({question for question, _ in places})
    weights, ones = weights_of(questions), np.ones(questions)
    numbers: dict[str, Interval | float | tuple[int, int]] = {}
    if _has_rate(ours) and _has_rate(theirs):
        longest = [max(turn.tokens or 0 for turn in turns) for turns in (ours, theirs)]
        numbers["longest"] = (longest[0], longest[1])
        if trace.clock == other.clock:
            new, old = _of_seconds(trace, ours), _of_seconds(other, theirs)
            change = statistics.change_percent(_rate(new), _rate(old))
            numbers["speedup"] = statistics.interval(statistics.speedup_of_totals(new, old), weights)
            numbers["speedup_of_means"] = float(statistics.speedup_of_means(new, old)(ones))
            numbers["mean_of_speedups"] = float(statistics.mean_of_speedups(new, old)(ones))
            numbers["rate_change"] = statistics.interval(change, weights)
    if _has_whole_answers(ours) and _has_whole_answers(theirs):
        new, old = _of_seconds(trace, ours, whole=True), _of_seconds(other, theirs, whole=True)
        numbers["whole_answer"] = statistics.interval(statistics.speedup_of_totals(new, old), weights)
    if _has_length(ours) and _has_length(theirs):
        lengths = [statistics.length(_of_steps(turns)) for turns in (ours, theirs)]
        numbers["length_change"] = statistics.interval(statistics.change(*lengths), weights)
        numbers["length_change_percent"] = statistics.interval(statistics.change_percent(*lengths), weights)
    # The first repeat of each; with sampling, repeats differ among themselves.
    mine, its = ({turn.place: turn.text for turn in reversed(turns)} for turns in (ours, theirs))
    unknown = None in (*mine.values(), *its.values())
    same = None if unknown else sum(mine[place] == its[place] for place in places)
    return Versus(other, questions, len(places), same, **numbers)  # type: ignore[arg-type]


def _baseline_of(trace: Trace, traces: Sequence[Trace]) -> Trace | None:
    """The vanilla trace of the same record, or else of the same folder and target, if there is exactly one."""
    if is_vanilla(trace):
        return None
    fit = [
        each
        for each in traces
        if is_vanilla(each) and each.clock == trace.clock and trace.system.startswith(vanilla_stem(each.system) or "")
    ]
    near = [each for each in fit if each.path == trace.path]
    near = near or [each for each in fit if each.path.parent == trace.path.parent]
    return near[0] if len(near) == 1 else None


def _row(
    trace: Trace, category: str | None, baseline: Trace | None, first: Trace | None, bases: _Bases, weights_of: _Weights
) -> Row:
    here = [turn for turn in trace.turns if category is None or turn.category == category]
    done = [turn for turn in here if not turn.failed]
    questions = len({turn.question_id for turn in done})
    lengths = np.array([count for turn in done for count in turn.lengths or ()])
    remarks = [
        f"Not compared with `{other.path.name}`: {reason}."
        for other in (baseline, first)
        if other is not None and (reason := _difference(trace, other))
    ]
    if baseline is not None and None not in (trace.clock, baseline.clock) and trace.clock != baseline.clock:
        remarks.append(
            f"No speedup of decoding: its seconds are of {trace.clock}, those of {baseline.system} of {baseline.clock}."
        )
    speedup, change = (
        None if other is None or _difference(trace, other) else _versus(trace, other, category, weights_of)
        for other in (baseline, first)
    )
    length = statistics.length(_of_steps(done)) if _has_length(done) else None
    tokens, steps = (_sum(getattr(turn, name) for turn in done) for name in ("tokens", "steps"))
    return Row(
        trace=trace,
        category=category,
        questions=questions,
        turns=len(done),
        failed=len(here) - len(done),
        tokens=None if tokens is None else int(tokens),
        steps=None if steps is None else int(steps),
        tokens_per_s=float(_rate(_of_seconds(trace, done))(np.ones(questions))) if _has_rate(done) else None,
        acceptance_length=length and statistics.interval(length, weights_of(questions)),
        at_least=tuple(float(np.mean(lengths > drafts)) for drafts in range(1, int(lengths.max(initial=0)))),
        speedup=speedup,
        change=change,
        is_baseline=id(trace) in bases,
        remarks=tuple(remarks),
    )


_Bases = set[int]  # ids of the traces that another one's speedup is against


def analyse(traces: Sequence[Trace], baseline: Trace | None = None, by_category: bool = False) -> list[Row]:
    """The traces in numbers, in their order.

    Args:
        baseline: one of the traces, against which all others' speedups are; without it, each trace's speedup is
            against the one vanilla trace of its record, or of its folder and target.
        by_category: a row per category after each trace's row.

    Raises:
        KoalaBenchError: a trace cannot be compared with the ``baseline``, or a question took no time.
    """
    if baseline is not None:
        for trace in traces:
            if trace is not baseline and (reason := _difference(trace, baseline)):
                raise KoalaBenchError(
                    f"{trace.path} and {baseline.path}: {reason}.", "Name a baseline that answered the same questions."
                )
        if not _has_rate([turn for turn in baseline.turns if not turn.failed]):
            lacking = "times" if baseline.clock is None else "token counts"
            raise KoalaBenchError(
                f"The baseline {baseline.path} has no {lacking}.",
                "Without --baseline the files are shown without speedups.",
            )
    chosen = [
        _baseline_of(trace, traces) if baseline is None else None if trace is baseline else baseline for trace in traces
    ]
    bases = {id(each) for each in chosen if each is not None}
    others = [trace for trace in traces if id(trace) not in bases]
    weights_of = functools.cache(statistics.resample_weights)
    rows = []
    for trace, base in zip(traces, chosen, strict=True):
        first = others[0] if id(trace) not in bases and trace is not others[0] else None
        own = dict.fromkeys(turn.category for turn in trace.turns if turn.category is not None) if by_category else {}
        rows += [_row(trace, category, base, first, bases, weights_of) for category in (None, *own)]
    return rows
