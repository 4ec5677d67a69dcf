"""The numbers of answer files as Markdown and CSV."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from koala_bench.errors import KoalaBenchError
from koala_bench.interop.traces import DECODING, Trace, is_vanilla
from koala_bench.records import statistics
from koala_bench.records.definitions import LENGTH_DEFINITIONS, Steps, lengths_by_definition
from koala_bench.records.statistics import NO_INTERVAL, Interval
from koala_bench.results.answers.numbers import Row, Versus
from koala_bench.results.tables.bounds import TRACES, trace_bounds
from koala_bench.results.tables.rendering import NOTHING, Note, csv_of, frame_of, grid_of, to_markdown, with_interval

_DEPTHS = 5  # accepted drafts a step that the table shows; chains of speculative sampling are longer
_LEFT = ("System", "Category", "τ is", "Accepted ≥ 1 / ≥ 2 / …")
_DEFINITIONS = Note(
    "Definitions",
    (
        "Acceptance length τ: tokens per verification step, the target's own (bonus) token included; vanilla decoding"
        " has 1.",
        "Accepted ≥ d: share of the steps that accepted at least d drafts, whether or not so many were offered.",
        "Tokens/s: new tokens / seconds, both totalled; in answer files prefill is part of the seconds, in run records"
        " it is not.",
        "Speedup: tokens/s of decoding over the baseline's, on the turns that both finished. Whole answer: the same"
        " with the reading of the prompt by target and head in the seconds; answer files have no other seconds. Times"
        " compare only within one machine. Ratio of means: the mean over questions of tokens/s over the baseline's"
        " mean, as the scripts of EAGLE and Spec-Bench (which recount its tokens). Mean of ratios: of the questions'"
        " own speedups.",
        f"Intervals: 95 %, bootstrap over questions ({statistics.RESAMPLES:,} resamples, seed {statistics.SEED}),"
        " paired where two files are compared.",
        TRACES,
    ),
)


def _number(value: float | None, form: str) -> str:
    return NOTHING if value is None else format(value, form)


def _cells(row: Row) -> dict[str, str]:
    """The row's part of the table, by heading."""
    shares = [f"{share:.2f}" for share in row.at_least[:_DEPTHS]] + ["…"] * (len(row.at_least) > _DEPTHS)
    length = with_interval(row.acceptance_length, 3)
    of = row.speedup
    return {
        "System": row.trace.system,
        "Category": row.category or "all",
        "Questions": f"{row.questions:,}",
        "Turns": f"{row.turns:,}" + (f" (+{row.failed} failed)" if row.failed else ""),
        "Tokens": _number(row.tokens, ","),
        "Steps": _number(row.steps, ","),
        "Tokens/s": _number(row.tokens_per_s, ",.1f"),
        # Vanilla's is 1 by definition and has no spread.
        "Acceptance length τ": length.partition(" ")[0] if is_vanilla(row.trace) else length,
        "τ is": row.trace.length_is or NOTHING,
        "Accepted ≥ 1 / ≥ 2 / …": " / ".join(shares) or NOTHING,
        "Speedup (x)": _speedup(row, of.speedup if of else None, row.trace.clock == DECODING),
        "Whole answer (x)": _speedup(row, of.whole_answer if of else None, any(turn.whole for turn in row.trace.turns)),
    }


def _speedup(row: Row, speedup: Interval | None, known: bool) -> str:
    """A speedup, 1 of a baseline, or a dash where the file has no seconds of that kind."""
    one = row.is_baseline and known and row.tokens_per_s is not None
    return "1.00" if one else with_interval(speedup if known else None, 2)


def _shared(of: Versus) -> dict[str, str]:
    same = NOTHING if of.same_text is None else f"{of.same_text:,}/{of.turns:,}"
    return {"Questions": f"{of.questions:,}", "Turns": f"{of.turns:,}", "Same text": same}


def _speedup_cells(of: Versus) -> dict[str, str]:
    return _shared(of) | {
        "Longest turns (tokens)": f"{of.longest[0]:,} / {of.longest[1]:,}" if of.longest else NOTHING,
        "Ratio of means": _number(of.speedup_of_means, ".3f"),
        "Mean of ratios": _number(of.mean_of_speedups, ".3f"),
    }


def _change_cells(of: Versus) -> dict[str, str]:
    return _shared(of) | {
        "Change of τ": with_interval(of.length_change, 3, sign=True),
        "Change of τ (%)": with_interval(of.length_change_percent, 1, sign=True),
        "Change of tokens/s (%)": with_interval(of.rate_change, 1, sign=True),
    }


def to_text(rows: Sequence[Row]) -> str:
    """The rows as Markdown: the table, speedups and changes between files, what the files are, and definitions."""
    whole = [row for row in rows if row.category is None]
    numbers = {id(row.trace): str(index) for index, row in enumerate(whole, 1)}
    lines = [{"File": numbers[id(row.trace)]} | _cells(row) for row in rows]
    if len(whole) == len(rows):
        for line in lines:
            del line["Category"]

    def name_of(row: Row) -> str:
        return f"{numbers[id(row.trace)]} {row.category or ''}".strip()

    speedups, changes = (
        [{"File": name_of(row), "Against": numbers[id(of.other)]} | cells(of) for row, of in pairs if of is not None]
        for pairs, cells in (
            ([(row, row.speedup) for row in rows if row.speedup and row.speedup.speedup], _speedup_cells),
            ([(row, row.change) for row in rows], _change_cells),
        )
    )
    files: dict[str, list[str]] = {}  # the methods of a record share a line
    for row in whole:
        clock = f"its seconds are of {row.trace.clock}" if row.trace.clock else "no times"
        text = " ".join([f"`{row.trace.path}`: {row.trace.form}; {clock}.", *row.trace.remarks, *row.remarks])
        files.setdefault(text, []).append(numbers[id(row.trace)])
    notes = [Note("Files", tuple(f"{', '.join(which)}: {text}" for text, which in files.items())), _DEFINITIONS]
    further = {"Speedups": speedups, "Changes against the first file": changes}
    tables = [(title, grid_of(each, ())) for title, each in further.items()]
    bounded = [
        (name_of(row), row.acceptance_length, row.speedup.speedup if row.speedup else None, row.at_least)
        for row in rows
        if not is_vanilla(row.trace)
    ]
    tables.append(("What bounds them", trace_bounds(bounded)))
    return to_markdown(grid_of(lines, _LEFT), "Answer files", notes, tables)


def to_csv(rows: Sequence[Row]) -> str:
    """The rows with 12 digits; empty cells for what there is not."""
    lines: list[Mapping[str, object]] = []
    for row in rows:
        speedup, change = row.speedup, row.change
        # Beyond the deepest accepted draft the share is 0; without lengths there is none.
        at_least = [*row.at_least, *[0.0 if row.at_least else None] * _DEPTHS][:_DEPTHS]
        lines.append(
            {"file": row.trace.path, "system": row.trace.system, "format": row.trace.form}
            | {"category": row.category or "all", "questions": row.questions}
            | {"turns": row.turns, "turns_failed": row.failed, "tokens": row.tokens, "steps": row.steps}
            | {"tokens_per_s": row.tokens_per_s, "seconds_of": row.trace.clock}
            | {"acceptance_length_is": row.trace.length_is, "acceptance_length": row.acceptance_length or NO_INTERVAL}
            | {f"steps_accepting_at_least_{depth}": share for depth, share in enumerate(at_least, 1)}
            | {"baseline": speedup and speedup.other.path}
            | {"speedup": (speedup and speedup.speedup) or NO_INTERVAL}
            | {"whole_answer_speedup": (speedup and speedup.whole_answer) or NO_INTERVAL}
            | {"speedup_ratio_of_means": speedup and speedup.speedup_of_means}
            | {"speedup_mean_of_ratios": speedup and speedup.mean_of_speedups}
            | {"changes_against": change and change.other.path}
            | {"acceptance_length_change": (change and change.length_change) or NO_INTERVAL}
            | {"tokens_per_s_change_percent": (change and change.rate_change) or NO_INTERVAL}
        )
    return csv_of(frame_of(lines))


def by_definition(traces: Sequence[Trace]) -> str:
    """Markdown: the acceptance length of every trace as each project defines it, from the tokens of its steps."""
    values = {
        trace.system: lengths_by_definition(_steps_of(trace))
        for trace in traces
        if any(turn.lengths for turn in trace.turns)
    }
    if not values:
        raise KoalaBenchError(
            f"{traces[0].path} does not say what each step committed.",
            "Leave --definitions out, or give a file that has accept_lengths.",
        )
    rows = [
        {"Acceptance length as defined by": name}
        | {system: NOTHING if math.isnan(of[name]) else f"{of[name]:.3f}" for system, of in values.items()}
        | {"Formula": definition.meaning, "Source": definition.source}
        for name, definition in LENGTH_DEFINITIONS.items()
    ]
    left = ("Acceptance length as defined by", "Formula", "Source")
    return to_markdown(grid_of(rows, left), "Definitions of the acceptance length", [])


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
