"""Answer files in numbers: one row per system, speedups over a baseline, changes between files, and their tables.

Two traces are compared on the turns that both finished, by question: a question that one of them lacks, or a turn
that failed in one, counts in neither. Intervals come from ``koala_bench.records.statistics``.
"""

from __future__ import annotations

import csv
import functools
import io
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from koala_bench.errors import KoalaBenchError
from koala_bench.interop.traces import DECODING, AnsweredTurn, Trace, is_vanilla, vanilla_stem
from koala_bench.records import statistics
from koala_bench.records.definitions import LENGTH_DEFINITIONS, Steps, lengths_by_definition
from koala_bench.records.statistics import Array, Interval, Statistic, Totals
from koala_bench.results.tables.rendering import Grid, Note, to_markdown, with_interval

_DEPTHS = 5  # accepted drafts a step that the table shows; chains of speculative sampling are longer
_NOTHING = "\N{EN DASH}"

# ---------------------------------------------------------------------------------------------- numbers


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
    longest: tuple[int, int] | None
    whole_answer: Interval | None
    speedup: Interval | None
    speedup_of_means: float | None
    mean_of_speedups: float | None
    rate_change: Interval | None
    length_change: Interval | None
    length_change_percent: Interval | None


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


def _all(values: Iterable[int | float | None]) -> bool:
    """Whether every turn has the number and one is not zero."""
    seen = list(values)
    return None not in seen and any(seen)


def _has_length(turns: Sequence[AnsweredTurn]) -> bool:
    return _all(turn.steps for turn in turns) and _all(turn.settled for turn in turns)


def _has_rate(turns: Sequence[AnsweredTurn]) -> bool:
    return _all(turn.tokens for turn in turns) and _all(turn.seconds for turn in turns)


def _has_whole_answers(turns: Sequence[AnsweredTurn]) -> bool:
    return _all(turn.whole and turn.whole[0] for turn in turns)


def _totals(trace: Trace, turns: Sequence[AnsweredTurn], of_steps: bool, whole: bool = False) -> Totals:
    """The turns per question: of the steps and what they settled, or of the new tokens and their seconds."""
    sums: dict[int, list[float]] = {}
    for turn in turns:
        row = sums.setdefault(turn.question_id, [0.0, 0.0, 0.0])
        tokens, seconds = turn.whole or (0, 0.0) if whole else (turn.settled if of_steps else turn.tokens, turn.seconds)
        for column, amount in enumerate((tokens, turn.steps, seconds)):
            row[column] += amount or 0.0
    ordered = sorted(sums)
    table = np.array([sums[question] for question in ordered], dtype=np.float64)
    if not of_steps and not table[:, 2].all():
        question = ordered[int(np.argmin(table[:, 2]))]
        raise KoalaBenchError(
            f"{trace.path}: question {question} was decoded in no time at all.",
            "The times of this file cannot be right.",
        )
    return Totals(tuple(ordered), table[:, 0], table[:, 1], table[:, 2])


def _rate(method: Totals) -> Statistic:
    return lambda weights: (weights @ method.tokens) / (weights @ method.seconds)


def _difference(trace: Trace, other: Trace) -> str | None:
    """Why two traces cannot be compared by question; None if they can."""
    ours, theirs = ({turn.place: turn for turn in each.turns} for each in (trace, other))
    asked = [{question: turn + 1 for question, turn in sorted(places)} for places in (ours, theirs)]
    common = asked[0].keys() & asked[1].keys()
    if not common:
        return "no question in common"
    # Benchmarks number their questions alike: 101 is one of MT-bench's and one of others'.
    for place in sorted(ours.keys() & theirs.keys()):
        mine, its = ours[place].category, theirs[place].category
        if mine is not None and its is not None and mine != its:
            return f"not the same questions, {place[0]} is of category '{mine}' here and '{its}' there"
    if all(asked[0][question] != asked[1][question] for question in common):
        question = min(common)
        return (
            f"not the same questions, the turns of {question} are {asked[0][question]} here and {asked[1][question]}"
            " there"
        )
    finished = [{turn.place for turn in each.turns if not turn.failed} for each in (trace, other)]
    return None if finished[0] & finished[1] else "no turn that both finished"


def _versus(trace: Trace, other: Trace, category: str | None, weights_of: _Weights) -> Versus | None:
    """Compare on common turns; None where a category has none."""
    finished = [{turn.place for turn in each.turns if not turn.failed} for each in (trace, other)]
    places = finished[0] & finished[1]
    if category is not None:
        places &= {turn.place for turn in trace.turns if turn.category == category}
    if not places:
        return None
    ours, theirs = (
        [turn for turn in each.turns if turn.place in places and not turn.failed] for each in (trace, other)
    )
    questions = len({question for question, _ in places})
    weights, ones = weights_of(questions), np.ones(questions)

    whole_answer = speedup = rate_change = length_change = length_percent = None
    of_means = mean_of = None
    if trace.clock == other.clock and _has_rate(ours) and _has_rate(theirs):
        new, old = _totals(trace, ours, False), _totals(other, theirs, False)
        speedup = statistics.interval(statistics.speedup_of_totals(new, old), weights)
        of_means, mean_of = (
            float(each(new, old)(ones)) for each in (statistics.speedup_of_means, statistics.mean_of_speedups)
        )
        rate_change = statistics.interval(statistics.change_percent(_rate(new), _rate(old)), weights)
    if _has_whole_answers(ours) and _has_whole_answers(theirs):
        new, old = _totals(trace, ours, False, whole=True), _totals(other, theirs, False, whole=True)
        whole_answer = statistics.interval(statistics.speedup_of_totals(new, old), weights)
    if _has_length(ours) and _has_length(theirs):
        lengths = [statistics.length(_totals(each, turns, True)) for each, turns in ((trace, ours), (other, theirs))]
        length_change = statistics.interval(statistics.change(*lengths), weights)
        length_percent = statistics.interval(statistics.change_percent(*lengths), weights)
    longest = (
        (max(turn.tokens or 0 for turn in ours), max(turn.tokens or 0 for turn in theirs))
        if _has_rate(ours) and _has_rate(theirs)
        else None
    )
    # The first repeat of each; with sampling, repeats differ among themselves.
    texts = [{turn.place: turn.text for turn in reversed(turns)} for turns in (ours, theirs)]
    same = (
        None
        if None in (*texts[0].values(), *texts[1].values())
        else sum(texts[0][place] == texts[1][place] for place in places)
    )
    return Versus(
        other,
        questions,
        len(places),
        same,
        longest,
        whole_answer,
        speedup,
        of_means,
        mean_of,
        rate_change,
        length_change,
        length_percent,
    )


def _baseline_of(trace: Trace, traces: Sequence[Trace]) -> Trace | None:
    """The vanilla trace of the same record, or else of the same folder and target, if there is exactly one."""
    if is_vanilla(trace):
        return None
    fit = [
        each
        for each in traces
        if is_vanilla(each) and each.clock == trace.clock and trace.system.startswith(vanilla_stem(each.system) or "")
    ]
    for near in (
        [each for each in fit if each.path == trace.path],
        [each for each in fit if each.path.parent == trace.path.parent],
    ):
        if near:
            return near[0] if len(near) == 1 else None
    return None


def _row(
    trace: Trace,
    category: str | None,
    baseline: Trace | None,
    first: Trace | None,
    is_baseline: bool,
    weights_of: _Weights,
) -> Row:
    here = [turn for turn in trace.turns if category is None or turn.category == category]
    done = [turn for turn in here if not turn.failed]
    questions = len({turn.question_id for turn in done})
    has_length, has_rate = _has_length(done), _has_rate(done)
    lengths = np.array([count for turn in done for count in turn.lengths or ()])
    at_least = [float(np.mean(lengths > drafts)) for drafts in range(1, int(lengths.max(initial=0)))]
    compared: dict[str, Versus | None] = {"baseline": None, "first": None}
    remarks = []
    for name, other in (("baseline", baseline), ("first", first)):
        if other is not None:
            reason = _difference(trace, other)
            compared[name] = _versus(trace, other, category, weights_of) if reason is None else None
            remarks += [f"Not compared with `{other.path.name}`: {reason}."] if reason else []
    if baseline is not None and None not in (trace.clock, baseline.clock) and trace.clock != baseline.clock:
        remarks.append(f"No speedup of decoding: its seconds are of {trace.clock}, those of {baseline.system} of {baseline.clock}.")
    return Row(
        trace=trace,
        category=category,
        questions=questions,
        turns=len(done),
        failed=len(here) - len(done),
        tokens=sum(turn.tokens or 0 for turn in done) if _all(turn.tokens for turn in done) else None,
        steps=sum(turn.steps or 0 for turn in done) if _all(turn.steps for turn in done) else None,
        tokens_per_s=float(_rate(_totals(trace, done, False))(np.ones(questions))) if has_rate else None,
        acceptance_length=(
            statistics.interval(statistics.length(_totals(trace, done, True)), weights_of(questions))
            if has_length
            else None
        ),
        at_least=tuple(at_least),
        speedup=compared["baseline"],
        change=compared["first"],
        is_baseline=is_baseline,
        remarks=tuple(remarks),
    )


def analyse(traces: Sequence[Trace], baseline: Trace | None = None, by_category: bool = False) -> list[Row]:
    """The traces in numbers, in their order.

    Args:
        baseline: one of the traces, against which all others' speedups are; without it, each trace's speedup is
            against the one vanilla trace of its record, or of its folder and target.
        by_category: a row per category after each trace's row.

    Raises:
        KoalaBenchError: a trace cannot be compared with the ``baseline``, or a question took no time.
    """
    chosen: dict[int, Trace | None] = {}
    for index, trace in enumerate(traces):
        chosen[index] = _baseline_of(trace, traces) if baseline is None else None if trace is baseline else baseline
        if baseline is not None and trace is not baseline and (reason := _difference(trace, baseline)):
            raise KoalaBenchError(
                f"{trace.path} and {baseline.path}: {reason}.", "Name a baseline that answered the same questions."
            )
    if baseline is not None and not _has_rate([turn for turn in baseline.turns if not turn.failed]):
        lacking = "times" if baseline.clock is None else "token counts"
        raise KoalaBenchError(
            f"The baseline {baseline.path} has no {lacking}.",
            "Without --baseline the files are shown without speedups.",
        )
    bases = [each for each in chosen.values() if each is not None]
    others = [trace for trace in traces if not any(trace is base for base in bases)]
    weights_of = functools.cache(statistics.resample_weights)
    rows = []
    for index, trace in enumerate(traces):
        first = others[0] if others and trace is not others[0] and any(trace is each for each in others) else None
        is_baseline = any(trace is base for base in bases)
        rows.append(_row(trace, None, chosen[index], first, is_baseline, weights_of))
        categories = (
            dict.fromkeys(turn.category for turn in trace.turns if turn.category is not None) if by_category else {}
        )
        rows += [_row(trace, category, chosen[index], first, is_baseline, weights_of) for category in categories]
    return rows


# ---------------------------------------------------------------------------------------------- text


def _count(value: int | None) -> str:
    return _NOTHING if value is None else f"{value:,}"


def _with_ends(value: Interval | None, digits: int, sign: bool = False) -> str:
    return _NOTHING if value is None else with_interval(value.value, value.low, value.high, digits, sign)


def _cells(row: Row) -> dict[str, str]:
    """The row's part of the table, by heading."""
    shares = [f"{share:.2f}" for share in row.at_least[:_DEPTHS]] + ["…"] * (len(row.at_least) > _DEPTHS)
    length = _with_ends(row.acceptance_length, 3)
    return {
        "System": row.trace.system,
        "Category": row.category or "all",
        "Questions": f"{row.questions:,}",
        "Turns": f"{row.turns:,}" + (f" (+{row.failed} failed)" if row.failed else ""),
        "Tokens": _count(row.tokens),
        "Steps": _count(row.steps),
        "Tokens/s": _NOTHING if row.tokens_per_s is None else f"{row.tokens_per_s:,.1f}",
        # Vanilla's is 1 by definition and has no spread.
        "Acceptance length τ": length.partition(" ")[0] if is_vanilla(row.trace) else length,
        "τ is": row.trace.length_is or _NOTHING,
        "Accepted ≥ 1 / ≥ 2 / …": " / ".join(shares) or _NOTHING,
        "Speedup (x)": _speedup_cell(
            row, row.speedup.speedup if row.speedup else None, row.trace.clock == DECODING
        ),
        "Whole answer (x)": _speedup_cell(
            row, row.speedup.whole_answer if row.speedup else None, any(turn.whole for turn in row.trace.turns)
        ),
    }


def _speedup_cell(row: Row, speedup: Interval | None, known: bool) -> str:
    """A speedup, 1 for a baseline, or a dash where the file has not the seconds of that kind."""
    one = row.is_baseline and known and row.tokens_per_s is not None
    return "1.00" if one else _with_ends(speedup if known else None, 2)


def _change_cells(change: Versus) -> dict[str, str]:
    return {
        "Questions": f"{change.questions:,}",
        "Turns": f"{change.turns:,}",
        "Same text": _of(change.same_text, change.turns),
        "Change of τ": _with_ends(change.length_change, 3, sign=True),
        "Change of τ (%)": _with_ends(change.length_change_percent, 1, sign=True),
        "Change of tokens/s (%)": _with_ends(change.rate_change, 1, sign=True),
    }


_LEFT = ("System", "Category", "τ is", "Accepted ≥ 1 / ≥ 2 / …")
_DEFINITIONS = Note(
    "Definitions",
    (
        (
            "Acceptance length τ: tokens per verification step, the target's own (bonus) token included; vanilla"
            " decoding has 1."
        ),
        "Accepted ≥ d: share of the steps that accepted at least d drafts, whether or not so many were offered.",
        (
            "Tokens/s: new tokens / seconds, both totalled; in answer files prefill is part of the seconds, in run"
            " records it is not."
        ),
        (
            "Speedup: tokens/s of decoding over the baseline's, on the turns that both finished. Whole answer: the same"
            " with the reading of the prompt by target and head in the seconds; answer files have no other seconds."
            " Times compare only within one machine."
        ),
        (
            "Ratio of means: the mean over questions of tokens/s over the baseline's mean, as the scripts of EAGLE and"
            " Spec-Bench (which recount its tokens)."
        ),
        (
            f"Intervals: 95 %, bootstrap over questions ({statistics.RESAMPLES:,} resamples, seed {statistics.SEED}),"
            " paired where two files are compared."
        ),
    ),
)


def _grid(lines: Sequence[dict[str, str]]) -> Grid:
    headings = list(lines[0])
    return Grid(
        headings,
        [list(line.values()) for line in lines],
        [name not in _LEFT for name in headings],
        frozenset(),
        frozenset(),
    )


def _of(count: int | None, total: int) -> str:
    return _NOTHING if count is None else f"{count:,}/{total:,}"


def _file_lines(rows: Sequence[Row], number_of: Callable[[Trace], int]) -> list[str]:
    """What each file is; the methods of a record share a line."""
    numbers: dict[str, list[str]] = {}
    for row in rows:
        trace = row.trace
        clock = f"its seconds are of {trace.clock}" if trace.clock else "no times"
        line = " ".join([f"`{trace.path}`: {trace.form}; {clock}.", *trace.remarks, *row.remarks])
        numbers.setdefault(line, []).append(str(number_of(trace)))
    return [f"{', '.join(which)}: {line}" for line, which in numbers.items()]


def _speedup_lines(rows: Sequence[Row], number_of: Callable[[Trace], int]) -> list[str]:
    lines = []
    for row in rows:
        versus = row.speedup
        if versus is None or versus.speedup is None:
            continue
        same = "" if versus.same_text is None else f", the same text in {_of(versus.same_text, versus.turns)} turns"
        longest = (
            f"; the longest turn has {versus.longest[0]:,} tokens, the baseline's {versus.longest[1]:,}"
            if versus.longest
            else ""
        )
        lines.append(
            f"{number_of(row.trace)} against {number_of(versus.other)}: {versus.questions:,} questions,"
            f" {versus.turns:,} turns{same}{longest}; by ratio of means {versus.speedup_of_means:.3f}, by mean of"
            f" ratios {versus.mean_of_speedups:.3f}."
        )
    return lines


def to_text(rows: Sequence[Row]) -> str:
    """The rows as Markdown: the table, what the files are, changes between files, and definitions."""
    whole = [row for row in rows if row.category is None]
    numbers = {id(row.trace): index for index, row in enumerate(whole, 1)}

    def number_of(trace: Trace) -> int:
        return numbers[id(trace)]

    lines = [{"File": str(number_of(row.trace))} | _cells(row) for row in rows]
    if len(whole) == len(rows):
        for line in lines:
            del line["Category"]
    notes = [Note("Files", tuple(_file_lines(whole, number_of)))]
    if speedups := _speedup_lines(whole, number_of):
        notes.append(Note("Speedups", tuple(speedups)))
    changes = [
        {"File": f"{number_of(row.trace)} {row.category or ''}".strip(), "Against": str(number_of(row.change.other))}
        | _change_cells(row.change)
        for row in rows
        if row.change is not None
    ]
    if not changes:
        return to_markdown(_grid(lines), "Answer files", [*notes, _DEFINITIONS])
    return (
        to_markdown(_grid(lines), "Answer files", notes)
        + "\n"
        + to_markdown(_grid(changes), "Changes against the first file", [_DEFINITIONS])
    )


def _ends(name: str, value: Interval | None) -> dict[str, float | None]:
    ends = (None, None, None) if value is None else (value.value, value.low, value.high)
    return dict(zip((name, f"{name}_low", f"{name}_high"), ends, strict=True))


def to_csv(rows: Sequence[Row]) -> str:
    """The rows with 12 digits; empty cells for what there is not."""
    lines: list[dict[str, object]] = []
    for row in rows:
        speedup, change = row.speedup, row.change
        # Beyond the deepest accepted draft the share is 0; without lengths there is none.
        at_least = [*row.at_least, *[0.0 if row.at_least else None] * _DEPTHS][:_DEPTHS]
        lines.append(
            {
                "file": row.trace.path,
                "system": row.trace.system,
                "format": row.trace.form,
                "category": row.category or "all",
            }
            | {
                "questions": row.questions,
                "turns": row.turns,
                "turns_failed": row.failed,
                "tokens": row.tokens,
                "steps": row.steps,
            }
            | {
                "tokens_per_s": row.tokens_per_s,
                "seconds_of": row.trace.clock,
                "acceptance_length_is": row.trace.length_is,
            }
            | _ends("acceptance_length", row.acceptance_length)
            | {f"steps_accepting_at_least_{depth}": share for depth, share in enumerate(at_least, 1)}
            | {"baseline": speedup and speedup.other.path}
            | _ends("speedup", speedup.speedup if speedup else None)
            | _ends("whole_answer_speedup", speedup.whole_answer if speedup else None)
            | {
                "speedup_ratio_of_means": speedup and speedup.speedup_of_means,
                "speedup_mean_of_ratios": speedup and speedup.mean_of_speedups,
            }
            | {"changes_against": change and change.other.path}
            | _ends("acceptance_length_change", change.length_change if change else None)
            | _ends("tokens_per_s_change_percent", change.rate_change if change else None)
        )
    out = io.StringIO()
    writer = csv.DictWriter(out, list(lines[0]), lineterminator="\n")
    writer.writeheader()
    for line in lines:
        writer.writerow({name: _plain(value) for name, value in line.items()})
    return out.getvalue()


def _plain(value: object) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    return f"{value:.12g}" if isinstance(value, float) else str(value)


def by_definition(traces: Sequence[Trace]) -> str:
    """Markdown: the acceptance length of every trace as each project defines it, from the tokens of its steps."""
    values = {
        trace.system: lengths_by_definition(_steps_of(trace))
        for trace in traces
        if any(turn.lengths for turn in trace.turns)
    }
    if not values:
        raise KoalaBenchError(
            f"{traces[0].path} does not say what each step settled.",
            "Leave --definitions out, or give a file that has accept_lengths.",
        )
    lines = [
        f"| Acceptance length as defined by | {' | '.join(values)} | Formula | Source |",
        f"|---|{'--:|' * len(values)}---|---|",
    ]
    for name, definition in LENGTH_DEFINITIONS.items():
        cells = [_NOTHING if math.isnan(of[name]) else f"{of[name]:.3f}" for of in values.values()]
        lines.append(f"| {name} | {' | '.join(cells)} | {definition.meaning} | {definition.source} |")
    return "\n".join(lines) + "\n"


def _steps_of(trace: Trace) -> list[Steps]:
    """The steps of the finished turns; how deep the drafts were is in no answer file."""
    return [
        Steps(
            turn.question_id,
            tuple(length - 1 for length in turn.lengths),
            None,
            max(0, (turn.tokens or 0) - sum(turn.lengths)),
        )
        for turn in trace.turns
        if turn.lengths and not turn.failed
    ]
