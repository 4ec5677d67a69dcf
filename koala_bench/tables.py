"""Tables as pure functions of run records: record -> data frame -> Markdown, LaTeX and CSV.

Nothing here needs a model, and nothing depends on the time, the machine or the order of a dictionary: the same
record gives the same bytes. The CSV holds the numbers with 12 digits, which hides how a machine's vector units
round the last ones; the Markdown and the LaTeX hold them rounded, with notes that say from the record how they
were measured. All methods of a table are compared on the same turns: those that every one of them finished.
"""

from __future__ import annotations

import math
import re
import shlex
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import pandas as pd
from pydantic import BaseModel, ConfigDict, ValidationError

from koala_bench import statistics
from koala_bench.errors import KoalaBenchError
from koala_bench.files import write_text
from koala_bench.records import CodeState, Environment, MethodInfo, Run, TurnLine, differences
from koala_bench.statistics import DepthRate, Interval

VANILLA = "vanilla"
_KOALA = "+koala"
_NOTHING = "\N{EN DASH}"
_ALPHA = "\N{GREEK SMALL LETTER ALPHA}"
_FAILURES_LISTED = 10
_CODE_CHARACTERS = 400  # of a command or an error message

# ---------------------------------------------------------------------------------------------- what to show


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class TableSpec(_Strict):
    """What a table shows: ``reproduce/table*.toml``.

    Attributes:
        methods: rows of each target, in this order.
        questions: the question set of the paper's table.
        columns: names out of ``COLUMNS``.
    """

    methods: tuple[str, ...]
    questions: str
    columns: tuple[str, ...]


class Claim(_Strict):
    """A published range and where it stands."""

    low: float
    high: float
    source: str


class KoalaClaims(_Strict):
    """What KOALA claims over all its targets."""

    citation: str
    targets: tuple[str, ...]
    speedup_change_x: Claim
    speedup_change_percent: Claim


class PaperCell(_Strict):
    """KOALA's own numbers for one target and method."""

    target: str
    method: str
    speedup: float | Literal["unknown"]
    acceptance_length: float | Literal["unknown"]


class OwnClaim(_Strict):
    """What the authors of a head published for it, on MT-bench."""

    system: str
    target: str
    speedup: float | Literal["unknown"]
    temperature: str
    source: str


class Paper(_Strict):
    """Published values: ``reproduce/paper.toml``."""

    koala: KoalaClaims
    table1: tuple[PaperCell, ...]
    own_claims: tuple[OwnClaim, ...]


_Model = TypeVar("_Model", bound=_Strict)


def _read_toml(path: Path, model: type[_Model]) -> _Model:
    try:
        with open(path, "rb") as handle:
            return model.model_validate(tomllib.load(handle))
    except OSError as error:
        raise KoalaBenchError(f"Cannot read {path}: {error.strerror or error}.", "Name a file of the folder reproduce/.") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise KoalaBenchError(f"{path} is not TOML: {error}.", "Correct that line.") from error
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        raise KoalaBenchError(f"{path}: {place}: {first['msg']}.", "Correct that entry; reproduce/ of the repository has an example.") from error


def read_table_spec(path: Path) -> TableSpec:
    """Read a ``reproduce/table*.toml``.

    Raises:
        KoalaBenchError: no such file, not TOML, a misspelt key, or a column that does not exist.
    """
    spec = _read_toml(path, TableSpec)
    unknown = [name for name in spec.columns if name not in COLUMNS]
    if unknown:
        raise KoalaBenchError(f"{path}: unknown column '{unknown[0]}'.", f"The columns are {', '.join(COLUMNS)}.")
    return spec


def read_paper(path: Path) -> Paper:
    """Read ``reproduce/paper.toml``.

    Raises:
        KoalaBenchError: no such file, not TOML, a misspelt key, or a value that is neither a number nor "unknown".
    """
    return _read_toml(path, Paper)


# ---------------------------------------------------------------------------------------------- summaries


@dataclass(frozen=True)
class Difference:
    """A lossless method's answer that is not vanilla's: where, and how close the target's two best tokens were.

    A token is None where that answer had ended; the gap is None if the record has none.
    """

    question_id: int
    turn: int
    repeat: int
    position: int
    token: int | None
    vanilla_token: int | None
    top2_gap: float | None


@dataclass(frozen=True)
class Summary:
    """One method of one run in numbers; NaN or None stands for what the record does not hold.

    Attributes:
        original: the method that the changes are against, if there is one.
        turns: turn lines, failed ones included.
        counted: turns that the numbers are from; the same for all methods of the run.
        compared, differing: answers compared with vanilla's, and those that differ.
        change_x, change_percent, length_change: against the original head, of the speedup in x and in percent, and
            of the acceptance length in tokens per step.
    """

    target: str
    method: MethodInfo
    original: str | None
    turns: int
    failed: tuple[TurnLine, ...]
    counted: int
    questions: int
    compared: int
    differing: tuple[Difference, ...]
    tokens_per_s: float
    speedup: Interval
    speedup_of_means: float
    mean_of_speedups: float
    acceptance_length: Interval
    depths: tuple[DepthRate, ...]
    draft_overhead: float | None
    change_x: Interval | None
    change_percent: Interval | None
    length_change: Interval | None

    @property
    def name(self) -> str:
        """The method's name."""
        return self.method["name"]

    @property
    def is_koala(self) -> bool:
        """Whether the row is one that KOALA's claims are about."""
        return self.name.endswith(_KOALA)


_Place = tuple[int, int, int]  # question_id, turn, repeat


def _place(turn: TurnLine) -> _Place:
    return turn["question_id"], turn["turn"], turn["repeat"]


def _original(method: MethodInfo, names: Sequence[str]) -> str | None:
    name = method["name"].removesuffix(_KOALA) if method["name"].endswith(_KOALA) else method["head"]
    return name if name in names and name != method["name"] else None


def _difference(turn: TurnLine, vanilla: TurnLine) -> Difference | None:
    """Compare the tokens themselves; what the run said about the place is only used for the logits."""
    ids, base = turn["new_token_ids"] or [], vanilla["new_token_ids"] or []
    if ids == base:
        return None
    position = next((i for i, (a, b) in enumerate(zip(ids, base, strict=False)) if a != b), min(len(ids), len(base)))
    said = turn["first_difference"]
    gap = said["top2_gap"] if said is not None and said["position"] == position else None
    token, vanilla_token = (tokens[position] if position < len(tokens) else None for tokens in (ids, base))
    return Difference(*_place(turn), position, token, vanilla_token, gap)


def summarise(run: Run, methods: Sequence[str] | None = None) -> list[Summary]:
    """The numbers of a run, one summary per method.

    The numbers come from the turns that every method finished, so that all methods answer the same questions; a
    method without any finished turn is left out of that rule and has no numbers.

    Args:
        methods: which ones, in which order (those that the run does not have are passed over); None takes all.

    Raises:
        KoalaBenchError: none of the methods, no vanilla to compare with, or not one turn that all methods finished.
    """
    names = [name for name in (methods if methods is not None else run.methods) if name in run.methods]
    done = {name: {_place(turn): turn for turn in run.turns_of(name) if turn["error"] is None} for name in {*names, VANILLA}}
    if not names:
        raise KoalaBenchError(f"{run.path} has none of the methods {', '.join(methods or [])}.", f"It has {', '.join(run.methods)}.")
    if not done[VANILLA]:
        raise KoalaBenchError(f"{run.path} has no vanilla decoding to compare with.", "Evaluate with vanilla among --methods.")
    common = set.intersection(*(set(turns) for turns in done.values() if turns))
    if not common:
        raise KoalaBenchError(f"{run.path} has no turn that every method finished.", "Let the evaluation go on; it resumes.")
    kept = {name: [turn for place, turn in turns.items() if place in common] for name, turns in done.items()}
    totals = {name: statistics.totals(turns) for name, turns in kept.items() if turns}
    weights = statistics.resample_weights(len(totals[VANILLA].question_ids))
    speedups = {name: statistics.speedup_of_totals(each, totals[VANILLA]) for name, each in totals.items()}
    lengths = {name: statistics.length(each) for name, each in totals.items()}
    ones = weights[0] * 0 + 1
    nothing = Interval(math.nan, math.nan, math.nan)

    summaries = []
    for name in names:
        method, here, turns = run.methods[name], totals.get(name), kept[name]
        compared = [turn for place, turn in done[name].items() if place in done[VANILLA]] if name != VANILLA else []
        found = [_difference(turn, done[VANILLA][_place(turn)]) for turn in compared]
        timed = [(turn["draft_s"], turn["verify_s"]) for turn in turns if turn["draft_s"] is not None and turn["verify_s"] is not None]
        draft_s, verify_s = (math.fsum(part) for part in zip(*timed, strict=True)) if timed else (0.0, 0.0)
        original = _original(method, names)
        versus = original if original in totals and here is not None else None
        summaries.append(
            Summary(
                target=run.header["target"]["name"],
                method=method,
                original=original,
                turns=len(run.turns_of(name)),
                failed=tuple(turn for turn in run.turns_of(name) if turn["error"] is not None),
                counted=len(common),
                questions=len(totals[VANILLA].question_ids),
                compared=len(compared),
                differing=tuple(sorted((d for d in found if d is not None), key=lambda d: (d.question_id, d.turn, d.repeat))),
                tokens_per_s=float(here.tokens.sum() / here.decode_s.sum()) if here else math.nan,
                speedup=statistics.interval(speedups[name], weights) if here else nothing,
                speedup_of_means=float(statistics.speedup_of_means(here, totals[VANILLA])(ones)) if here else math.nan,
                mean_of_speedups=float(statistics.mean_of_speedups(here, totals[VANILLA])(ones)) if here else math.nan,
                acceptance_length=statistics.interval(lengths[name], weights) if here else nothing,
                depths=tuple(
                    statistics.acceptance_rate_by_depth(
                        [count for turn in turns for count in turn["accepted"] or []],
                        [depth for turn in turns for depth in turn["drafted_depth"] or []],
                    )
                ),
                draft_overhead=statistics.draft_overhead(draft_s, verify_s) if draft_s + verify_s > 0 and method["head"] is not None else None,
                change_x=statistics.interval(statistics.change(speedups[name], speedups[versus]), weights) if versus else None,
                change_percent=statistics.interval(statistics.change_percent(speedups[name], speedups[versus]), weights) if versus else None,
                length_change=statistics.interval(statistics.change(lengths[name], lengths[versus]), weights) if versus else None,
            )
        )
    return summaries


# ---------------------------------------------------------------------------------------------- data frame


def _ends(name: str, interval: Interval | None) -> dict[str, float | None]:
    value = interval if interval is not None and not math.isnan(interval.value) else None
    parts = {"": value.value, "_low": value.low, "_high": value.high} if value else {"": None, "_low": None, "_high": None}
    return {name + ending: part for ending, part in parts.items()}


def _number(value: float) -> float | None:
    return None if math.isnan(value) else value


def _paper_names(run: Run) -> tuple[str, str]:
    return run.header["preset"]["name"], run.header["target"]["name"]


def _table1_row(run: Run, summary: Summary, paper: Paper, depth: int) -> dict[str, Any]:
    method = summary.method
    is_vanilla = method["head"] is None
    cell = next((each for each in paper.table1 if each.target in _paper_names(run) and each.method == summary.name), None)
    rates = {each.depth: each for each in summary.depths}
    row: dict[str, Any] = {
        "target": summary.target,
        "method": summary.name,
        "layers": None if is_vanilla else method["layers"],
        "adversarial": None if is_vanilla else method["adversarial"],
        "parameters": None if is_vanilla else method["parameters"],
        **_ends("speedup", summary.speedup),
        "speedup_ratio_of_means": _number(summary.speedup_of_means),
        "speedup_mean_of_ratios": _number(summary.mean_of_speedups),
        **_ends("acceptance_length", summary.acceptance_length),
    }
    for d in range(1, depth + 1):
        row[f"acceptance_rate_given_parent_depth_{d}"] = _number(rates[d].rate) if d in rates else None
        row[f"acceptance_trials_depth_{d}"] = rates[d].trials if d in rates else None
    row |= {"draft_overhead_percent": None if summary.draft_overhead is None else 100.0 * summary.draft_overhead, "original": summary.original}
    row |= _ends("speedup_change_x", summary.change_x) | _ends("speedup_change_percent", summary.change_percent)
    row |= _ends("acceptance_length_change", summary.length_change)
    for name in ("speedup_change_x", "speedup_change_percent"):
        claim: Claim = getattr(paper.koala, name)
        row |= {f"claim_{name}_low": claim.low if summary.is_koala else None, f"claim_{name}_high": claim.high if summary.is_koala else None}
    row |= {"paper_speedup": cell.speedup if cell else None, "paper_acceptance_length": cell.acceptance_length if cell else None}
    row |= {
        "decode_tokens_per_s": _number(summary.tokens_per_s),
        "questions": summary.questions,
        "turns_counted": summary.counted,
        "turns_failed": len(summary.failed),
        "turns_compared_with_vanilla": None if summary.name == VANILLA else summary.compared,
        "turns_equal_to_vanilla": None if summary.name == VANILLA else summary.compared - len(summary.differing),
    }
    return row


def table1_frame(runs: Sequence[Run], spec: TableSpec, paper: Paper) -> pd.DataFrame:
    """Table 1 in full precision, one row per target and method; columns carry their units.

    Raises:
        KoalaBenchError: see ``summarise``; or runs that do not belong into one table.
    """
    return _table1_frame(runs, _summaries(runs, spec), paper)


# What all records of one table must share; the rest may follow from the target.
_SHARED = ("questions.", "acceptance.", "limits.max_new_tokens")


def _summaries(runs: Sequence[Run], spec: TableSpec) -> list[list[Summary]]:
    if not runs:
        raise KoalaBenchError("There is no record to make a table of.", "Name at least one .jsonl file of an evaluation.")
    for index, run in enumerate(runs[1:], 1):
        different = [name for name in differences(runs[0].header, run.header, circumstances=False) if name.startswith(_SHARED)]
        if different:
            raise KoalaBenchError(f"{runs[0].path} and {run.path} do not belong into one table: they differ in {different[0]}.", "Make a table of each.")
        twin = next((other for other in runs[:index] if other.header["target"]["name"] == run.header["target"]["name"]), None)
        if twin:
            raise KoalaBenchError(f"{twin.path} and {run.path} are of the same target.", "Name one record per target.")
    return [summarise(run, spec.methods) for run in runs]


def _table1_frame(runs: Sequence[Run], summaries: Sequence[Sequence[Summary]], paper: Paper) -> pd.DataFrame:
    depth = max((each.depth for rows in summaries for row in rows for each in row.depths), default=0)
    rows = [_table1_row(run, summary, paper, depth) for run, of_run in zip(runs, summaries, strict=True) for summary in of_run]
    # Objects, so that an integer stays one beside an empty cell.
    return pd.DataFrame(rows, dtype=object)


# ---------------------------------------------------------------------------------------------- cells


def _fixed(value: float, digits: int, sign: bool = False) -> str:
    text = f"{value:+.{digits}f}" if sign else f"{value:.{digits}f}"
    return text.replace("-", "+" if sign else "") if float(text) == 0 else text


def _with_interval(value: float, low: float, high: float, digits: int, sign: bool = False) -> str:
    if math.isnan(low) or math.isnan(high):
        return _fixed(value, digits, sign)
    return f"{_fixed(value, digits, sign)} [{_fixed(low, digits, sign)}, {_fixed(high, digits, sign)}]"


def _interval_cell(row: Mapping[str, Any], name: str, digits: int, sign: bool = False) -> str:
    if row[name] is None:
        return _NOTHING
    if row["method"] == VANILLA:
        return _fixed(row[name], digits, sign)  # 1 by definition
    return _with_interval(row[name], row[f"{name}_low"], row[f"{name}_high"], digits, sign)


def _rates_cell(row: Mapping[str, Any]) -> str:
    rates = [value for name, value in row.items() if name.startswith("acceptance_rate_given_parent_depth_") and value is not None]
    return " / ".join(_fixed(rate, 2) for rate in rates) or _NOTHING


def _claim_cell(row: Mapping[str, Any]) -> str:
    if row["claim_speedup_change_x_low"] is None:
        return _NOTHING
    x, percent = ([row[f"claim_speedup_change_{unit}_{end}"] for end in ("low", "high")] for unit in ("x", "percent"))
    return f"+{x[0]:.2f} to +{x[1]:.2f} x; +{percent[0]:.2f} to +{percent[1]:.2f} %"


def _paper_cell(row: Mapping[str, Any]) -> str:
    values = [row["paper_speedup"], row["paper_acceptance_length"]]
    if values == [None, None]:
        return _NOTHING
    if values == ["unknown", "unknown"]:
        return "unknown"
    return "; ".join(value if isinstance(value, str) else f"{value:.2f}" for value in values)


@dataclass(frozen=True)
class Column:
    """A column of the rounded table: its heading, its cell, and whether it is aligned at the right."""

    heading: str
    cell: Callable[[Mapping[str, Any]], str]
    right: bool = True


def _plain(name: str) -> Callable[[Mapping[str, Any]], str]:
    return lambda row: _NOTHING if row[name] is None else str(row[name])


@dataclass(frozen=True)
class ColumnGroup:
    """What a name in a table's file gives: rounded columns, and a pattern of its columns in the CSV."""

    shown: tuple[Column, ...]
    raw: str


def _yes_or_no(row: Mapping[str, Any]) -> str:
    return _NOTHING if row["adversarial"] is None else "yes" if row["adversarial"] else "no"


def _scaled(name: str, factor: float, digits: int) -> Callable[[Mapping[str, Any]], str]:
    return lambda row: _NOTHING if row[name] is None else _fixed(row[name] * factor, digits)


def _interval_of(name: str, digits: int, sign: bool = False) -> Callable[[Mapping[str, Any]], str]:
    return lambda row: _interval_cell(row, name, digits, sign)


_ENDS = "(_low|_high)?"
_CHANGES = (Column("Change (x)", _interval_of("speedup_change_x", 2, sign=True)), Column("Change (%)", _interval_of("speedup_change_percent", 1, sign=True)))

COLUMNS: dict[str, ColumnGroup] = {
    "target": ColumnGroup((Column("Target", _plain("target"), right=False),), "target"),
    "method": ColumnGroup((Column("Method", _plain("method"), right=False),), "method"),
    "layers": ColumnGroup((Column("Layers K", _plain("layers")),), "layers"),
    "adversarial": ColumnGroup((Column("Adversarial", _yes_or_no, right=False),), "adversarial"),
    "parameters": ColumnGroup((Column("Head (M)", _scaled("parameters", 1e-6, 2)),), "parameters"),
    "speedup": ColumnGroup((Column("Speedup (x)", _interval_of("speedup", 2)),), f"speedup({_ENDS}|_ratio_of_means|_mean_of_ratios)"),
    "acceptance_length": ColumnGroup((Column("Acceptance length τ", _interval_of("acceptance_length", 2)),), f"acceptance_length{_ENDS}"),
    "acceptance_rate": ColumnGroup((Column(f"Acceptance rate {_ALPHA}₁ / {_ALPHA}₂ / …", _rates_cell, right=False),), "acceptance_(rate|trials)_.*"),
    "draft_overhead": ColumnGroup((Column("Draft overhead (%)", _scaled("draft_overhead_percent", 1.0, 1)),), "draft_overhead_percent"),
    "change": ColumnGroup(_CHANGES, f"original|(speedup_change_x|speedup_change_percent|acceptance_length_change){_ENDS}"),
    "claim": ColumnGroup((Column("Paper: change", _claim_cell, right=False), Column("Paper: speedup; τ", _paper_cell, right=False)), "(claim|paper)_.*"),
}
# The CSV always says how much its numbers stand on.
_ALWAYS = "decode_tokens_per_s|questions|turns_.*"


@dataclass(frozen=True)
class Grid:
    """A table as text.

    Attributes:
        headings, rows: text of each column and cell.
        right: which columns are aligned at the right.
        best: (row, column) of the cells to emphasise.
        begins: rows that begin a new target, but for the first.
    """

    headings: list[str]
    rows: list[list[str]]
    right: list[bool]
    best: frozenset[tuple[int, int]]
    begins: frozenset[int]


def grid(frame: pd.DataFrame, columns: Sequence[str]) -> Grid:
    """Round a table's frame to what is read; the best speedup of each target is marked."""
    shown = [column for name in columns for column in COLUMNS[name].shown]
    records = frame.to_dict(orient="records")
    best: set[tuple[int, int]] = set()
    if "speedup" in columns:
        place = shown.index(COLUMNS["speedup"].shown[0])
        for target in dict.fromkeys(row["target"] for row in records):
            speeds = {index: row["speedup"] for index, row in enumerate(records) if row["target"] == target and row["speedup"] is not None}
            if speeds:
                best.add((max(speeds, key=lambda index: speeds[index]), place))
    rows = [[column.cell({str(name): value for name, value in row.items()}) for column in shown] for row in records]
    begins = frozenset(index for index in range(1, len(records)) if records[index]["target"] != records[index - 1]["target"])
    return Grid([column.heading for column in shown], rows, [column.right for column in shown], frozenset(best), begins)


def to_csv(frame: pd.DataFrame, columns: Sequence[str]) -> str:
    """The table's numbers with 12 digits; empty cells for what there is not."""
    pattern = re.compile("|".join([*(COLUMNS[name].raw for name in columns), _ALWAYS]))
    chosen = frame[[name for name in frame.columns if pattern.fullmatch(name)]]

    def text(value: Any) -> str:
        if value is None or (isinstance(value, float) and math.isnan(value)):
            return ""
        if isinstance(value, bool):
            return "true" if value else "false"
        return f"{value:.12g}" if isinstance(value, float) else str(value)

    return str(chosen.map(text).to_csv(index=False, lineterminator="\n"))


# ---------------------------------------------------------------------------------------------- notes


@dataclass(frozen=True)
class Note:
    """A paragraph under a table.

    Attributes:
        title, lines: text, in which only `code` is marked up.
        details: more lines, for the Markdown only: a float of LaTeX has to fit on a page.
    """

    title: str
    lines: tuple[str, ...]
    details: tuple[str, ...] = ()


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _incomplete(run: Run, summaries: Sequence[Summary]) -> Note | None:
    lines, details = [], []
    label = run.header["target"]["name"]
    if not run.finished:
        lines.append(
            f"The record of {label} is unfinished: it holds {_count(len(run.turns), 'turn')} and no end line. "
            "Its numbers will change when the evaluation goes on."
        )
    failed = [turn for summary in summaries for turn in summary.failed]
    if failed:
        counts = ", ".join(f"{summary.name} {len(summary.failed)}" for summary in summaries if summary.failed)
        lines.append(f"{_count(len(failed), 'turn')} of {label} failed ({counts}). A failed turn has no numbers.")
        for turn in failed[:_FAILURES_LISTED]:
            why = f"{turn['error']['type']}: {turn['error']['message']}" if turn["error"] else ""
            details.append(f"Failed: {turn['method']}, question {turn['question_id']}, turn {turn['turn']}, repeat {turn['repeat']}: {_code(why)}")
        if len(failed) > _FAILURES_LISTED:
            details.append(f"{_count(len(failed) - _FAILURES_LISTED, 'more failure')} in the record.")
    most = max(summary.turns for summary in summaries)
    if summaries[0].counted < most:
        lines.append(f"The numbers of {label} are from the {summaries[0].counted} of {most} turns that every method finished.")
    lines += [f"{summary.name} finished no turn and has no numbers." for summary in summaries if math.isnan(summary.speedup.value)]
    return Note("This table is incomplete", tuple(lines), tuple(details)) if lines else None


def _code(text: str) -> str:
    words = " ".join(text.replace("`", "'").split())
    return f"`{words if len(words) <= _CODE_CHARACTERS else words[:_CODE_CHARACTERS] + ' ...'}`"


_SIDES = {
    "above zero": "faster than the original head",
    "below zero": "slower than the original head",
    "not distinguishable from zero": "zero is within its interval",
}


def _where(measured: Interval, claim: Claim) -> str:
    if measured.high < claim.low:
        return "the whole interval lies below it"
    if measured.low > claim.high:
        return "the whole interval lies above it"
    if claim.low <= measured.low and measured.high <= claim.high:
        return "the whole interval lies in it"
    return "the interval lies only partly in it" if not math.isnan(measured.low) else "there is no interval"


def verdicts(summary: Summary, paper: Paper) -> list[str]:
    """Sentences on a KOALA row: is the change real, and does it lie in the paper's range? Empty for other rows."""
    if not summary.is_koala or summary.change_x is None or summary.change_percent is None or summary.length_change is None:
        return []
    x, percent, longer = summary.change_x, summary.change_percent, summary.length_change
    lines = [
        f"{summary.name} against {summary.original} on {summary.target}: the speedup changes by {_with_interval(x.value, x.low, x.high, 3, True)} x, "
        f"{statistics.against_zero(x)} ({_SIDES[statistics.against_zero(x)]}); the acceptance length changes by "
        f"{_with_interval(longer.value, longer.low, longer.high, 3, True)}, {statistics.against_zero(longer)}."
    ]
    for measured, claim, unit, digits in ((x, paper.koala.speedup_change_x, "x", 3), (percent, paper.koala.speedup_change_percent, "%", 2)):
        verdict = statistics.against_range(measured, claim.low, claim.high)
        how = f"is {verdict} from" if verdict == "not distinguishable" else verdict
        lines.append(
            f"The change of {summary.name} by {_with_interval(measured.value, measured.low, measured.high, digits, True)} {unit} {how} "
            f"the paper's range of +{claim.low:.2f} to +{claim.high:.2f} {unit}: {_where(measured, claim)}."
        )
    return lines


def _verdict_note(runs: Sequence[Run], summaries: Sequence[Sequence[Summary]], paper: Paper) -> Note | None:
    lines = [line for of_run in summaries for summary in of_run for line in verdicts(summary, paper)]
    if not lines:
        return None
    others = [run.header["target"]["name"] for run in runs if not set(paper.koala.targets) & set(_paper_names(run))]
    if others:
        lines.append(
            f"The paper's ranges are over {', '.join(paper.koala.targets)}; "
            f"what is said above about {', '.join(others)} is about this measurement, not about those targets."
        )
    return Note("What the intervals say", tuple(lines))


def _equality_note(summaries: Sequence[Sequence[Summary]]) -> Note | None:
    lines, details = [], []
    for of_run in summaries:
        compared = [summary for summary in of_run if summary.compared]
        if compared:
            counts = [f"{s.name} {s.compared - len(s.differing)}/{s.compared} turns{'' if s.method['lossless'] else ' (lossy by design)'}" for s in compared]
            lines.append(f"Answers on {of_run[0].target} equal to vanilla's, token by token: {', '.join(counts)}.")
        for summary in compared:
            for each in summary.differing if summary.method["lossless"] else ():
                token, vanilla_token = ("end" if token is None else str(token) for token in (each.token, each.vanilla_token))
                gap = "top-2 gap not recorded" if each.top2_gap is None else f"top-2 gap {each.top2_gap:.2e}"
                details.append(
                    f"Different: {summary.name}, question {each.question_id}, turn {each.turn}, repeat {each.repeat}, position {each.position}: "
                    f"token {token}, vanilla {vanilla_token}, {gap}."
                )
    title = "Losslessness (turns, repeats and positions count from 0; the gap is between the target's two largest logits)"
    lines += [f"{_count(len(details), 'difference')}, each listed in the Markdown version of this table."] if details else []
    return Note(title, tuple(lines), tuple(details)) if lines else None


def _machine(where: Environment) -> str:
    memory = f", {where['memory_bytes'] / 2**30:.1f} GiB of memory" if where["memory_bytes"] else ""
    driver = f" (driver {where['driver']})" if where["driver"] else ""
    return f"{where['cpu']}, {where['cores']} cores, {where['threads']} threads{memory}; {where['gpu'] or 'no GPU'}{driver}; {where['platform']}"


def _code_in_words(code: CodeState) -> str:
    version = f"koala-bench {code['version'] or 'of unknown version'}"
    if code["commit"] is None:
        return f"{version}, commit unknown (not a checkout)"
    return f"{version}, commit {code['commit'][:12]}{' with uncommitted changes' if code['dirty'] else ''}"


def _measurement_note(run: Run, summaries: Sequence[Summary]) -> Note:
    header = run.header
    target, questions, acceptance, measure, preset = header["target"], header["questions"], header["acceptance"], header["measure"], header["preset"]
    rule = "greedy" if acceptance["rule"] == "greedy" else f"{acceptance['rule']}, temperature {acceptance['temperature']:g}"
    packages = [f"{name} {version}" for name, version in header["environment"]["packages"].items() if version]
    lines = [
        f"Target: {target['name']}, {target['parameters'] / 1e6:,.2f} M parameters, {target['layers']} layers, "
        f"{target['dtype']} on {target['device']}, attention {target['attention']}.",
        f"Machine: {_machine(header['environment'])}.",
        f"Versions: Python {header['environment']['python']}, {', '.join(packages)}.",
        f"Questions: {questions['name']} ({_count(questions['count'], 'question')}, sha256 {questions['sha256'][:12]}), "
        f"{summaries[0].questions} of them counted; chat template {header['chat_template']['name']}.",
        f"Decoding: {rule}, at most {header['limits']['max_new_tokens']} new tokens, {measure['warmup']} warm-up, "
        f"{_count(measure['repeats'], 'repeat')}, seed {header['seed']}; methods interleaved question by question.",
    ]
    trees = [(summary.name, summary.method["tree"]) for summary in summaries if summary.name != VANILLA]
    in_words = [f"{name} {tree['name']} ({_count(tree['nodes'], 'node')}, depth {tree['depth']})" for name, tree in trees if tree]
    if in_words:
        lines.append(f"Draft trees (nodes with the root): {', '.join(in_words)}.")
    measured = [summary for summary in summaries if summary.name != VANILLA and not math.isnan(summary.speedup.value)]
    if measured:
        other = ", ".join(f"{summary.name} {summary.speedup_of_means:.3f} / {summary.mean_of_speedups:.3f}" for summary in measured)
        lines.append(f"Speedup by other definitions (ratio of mean rates, as EAGLE's and Spec-Bench's scripts / mean of the questions' ratios): {other}.")
    absent = [name for name in run.methods if name not in {summary.name for summary in summaries}]
    if absent:
        lines.append(f"Also in the record, not in this table: {', '.join(absent)}.")
    lines.append(
        f"Run {header['run_id']}, {header['created']}, preset {preset['name']} (sha256 {preset['sha256'][:12]}), {_code_in_words(header['code'])}.",
    )
    lines.append(f"Command: {_code(shlex.join(header['command']))}")
    return Note(f"How {target['name']} was measured", tuple(lines))


def _definitions_note(summaries: Sequence[Sequence[Summary]]) -> Note:
    lines = [
        "Speedup: tokens per second of decoding (prefill and its token left out) over vanilla's in the same run, both totalled over the questions.",
        "Acceptance length τ: tokens per verification step, the target's own (bonus) token included; vanilla decoding has 1.",
        f"Acceptance rate {_ALPHA} at a depth: steps that accepted a token there, of those that accepted one above it and were offered that depth "
        "(conditional on the parent).",
        "Draft overhead: drafting time / (drafting + verification time).",
        "Change: against the original head (same head, neither more layers nor adversarial training), as a difference of speedups (x) and relative to its "
        "speedup (%).",
        f"Intervals: {100 * statistics.CONFIDENCE:.0f} %, paired percentile bootstrap over questions "
        f"({statistics.RESAMPLES:,} resamples, seed {statistics.SEED}).",
    ]
    if any(of_run[0].questions < 2 for of_run in summaries):
        lines.append("With a single question there are no intervals.")
    return Note("Definitions", tuple(lines))


def _paper_note(runs: Sequence[Run], summaries: Sequence[Sequence[Summary]], spec: TableSpec, paper: Paper) -> Note:
    x, percent, questions = paper.koala.speedup_change_x, paper.koala.speedup_change_percent, runs[0].header["questions"]["name"]
    lines = [
        f"Paper: {paper.koala.citation}. Its change of +{x.low:.2f}x to +{x.high:.2f}x ({x.source}) and of {percent.low:.2f} % to {percent.high:.2f} % "
        f"({percent.source}) is over all its targets and both heads.",
        "The paper's individual cells are `unknown` until `reproduce/paper.toml` is filled from its PDF.",
    ]
    if questions != spec.questions:
        lines.append(f"The paper's table is on {spec.questions}; these numbers are on {questions}.")
    for run, of_run in zip(runs, summaries, strict=True):
        missing = [name for name in spec.methods if name not in {summary.name for summary in of_run}]
        if missing:
            lines.append(f"The record of {run.header['target']['name']} has no {', '.join(missing)}.")
        for own in (own for own in paper.own_claims if own.target in _paper_names(run)):
            value = own.speedup if isinstance(own.speedup, str) else f"{own.speedup:.2f}x"
            lines.append(f"Published by its authors for {own.target} on MT-bench: {own.system} {value} (temperature {own.temperature}; {own.source}).")
    return Note("Published values", tuple(lines))


def _notes(runs: Sequence[Run], summaries: Sequence[Sequence[Summary]], spec: TableSpec, paper: Paper) -> list[Note]:
    notes: list[Note | None] = [_incomplete(run, of_run) for run, of_run in zip(runs, summaries, strict=True)]
    notes += [_verdict_note(runs, summaries, paper), _equality_note(summaries)]
    notes += [_measurement_note(run, of_run) for run, of_run in zip(runs, summaries, strict=True)]
    notes += [_definitions_note(summaries), _paper_note(runs, summaries, spec, paper)]
    return [note for note in notes if note is not None]


# ---------------------------------------------------------------------------------------------- Markdown, LaTeX


def _bold_start(cell: str, mark: Callable[[str], str]) -> str:
    value, _, rest = cell.partition(" ")
    return f"{mark(value)} {rest}".rstrip()


def to_markdown(table: Grid, title: str, notes: Sequence[Note]) -> str:
    """A heading, the table and its notes in GitHub's Markdown."""
    rows = [
        [_bold_start(cell, lambda value: f"**{value}**") if (r, c) in table.best else cell.replace("|", "\\|") for c, cell in enumerate(row)]
        for r, row in enumerate(table.rows)
    ]
    lines = [table.headings, ["--:" if right else ":--" for right in table.right], *rows]
    text = [f"# {title}", "", *("| " + " | ".join(cells) + " |" for cells in lines)]
    for note in notes:
        text += ["", f"**{note.title}**", "", *(f"- {line}" for line in (*note.lines, *note.details))]
    return "\n".join(text) + "\n"


_TEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    **{sign: "\\" + sign for sign in "&%$#_{}"},
    "τ": r"$\tau$",
    _ALPHA: r"$\alpha$",
    "₁": "$_1$",
    "₂": "$_2$",
    "…": r"\ldots{}",
    _NOTHING: "--",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    '"': r"\textquotedbl{}",
}


def tex(text: str) -> str:
    """Plain text with `code` for LaTeX: special characters escaped, signs of numbers set as in mathematics."""
    parts = text.split("`")
    for index, part in enumerate(parts):
        escaped = "".join(_TEX.get(sign, sign) for sign in part)
        if index % 2:
            # A line of text has ligatures and line breaks that a command must not get.
            parts[index] = r"\texttt{" + escaped.replace("-", "-{}").replace("/", r"/\allowbreak{}") + "}"
        else:
            parts[index] = re.sub(r"(?<![\w.-])([+-])(?=\d)", r"$\1$", escaped)
    return "".join(parts).replace("$$_", "_")  # a symbol and its index are one formula


def to_latex(table: Grid, title: str, label: str, notes: Sequence[Note]) -> str:
    """A ``table*`` float with booktabs rules and the notes under it; needs the packages booktabs and graphicx."""
    rows = []
    for r, row in enumerate(table.rows):
        rows += [r"\midrule"] if r in table.begins else []
        cells = [_bold_start(tex(cell), lambda value: rf"\textbf{{{value}}}") if (r, c) in table.best else tex(cell) for c, cell in enumerate(row)]
        rows.append(" & ".join(cells) + r" \\")
    text = [
        r"% Needs \usepackage{booktabs,graphicx}.",
        r"\begin{table*}[t]",
        r"\centering",
        rf"\caption{{{tex(title)}}}",
        rf"\label{{{label}}}",
        r"\resizebox{\textwidth}{!}{%",
        rf"\begin{{tabular}}{{{''.join('r' if right else 'l' for right in table.right)}}}",
        r"\toprule",
        " & ".join(tex(heading) for heading in table.headings) + r" \\",
        r"\midrule",
        *rows,
        r"\bottomrule",
        r"\end{tabular}}",
        r"\par\medskip",
        r"\begin{minipage}{\textwidth}\footnotesize\raggedright",
        *(rf"\textbf{{{tex(note.title)}.}} " + " ".join(tex(line) for line in note.lines) + r"\par" for note in notes),
        r"\end{minipage}",
        r"\end{table*}",
    ]
    return "\n".join(text) + "\n"


# ---------------------------------------------------------------------------------------------- Table 1


def write_table1(runs: Sequence[Run], out_dir: Path, spec: TableSpec, paper: Paper) -> list[Path]:
    """Write ``table1.md``, ``table1.tex`` and ``table1.csv``; the same records give the same bytes.

    Args:
        runs: one record per target, on the same questions.
        spec: of ``reproduce/table1.toml``.
        paper: of ``reproduce/paper.toml``.

    Returns:
        The three paths.

    Raises:
        KoalaBenchError: see ``summarise``; runs that do not belong into one table; or a folder that cannot be written.
    """
    summaries = _summaries(runs, spec)
    frame = _table1_frame(runs, summaries, paper)
    table, notes = grid(frame, spec.columns), _notes(runs, summaries, spec, paper)
    caption = "Speedup and acceptance length by target"
    contents = {
        "table1.md": to_markdown(table, f"Table 1: {caption.lower()}", notes),
        "table1.tex": to_latex(table, f"{caption}. The best speedup of each target is bold; intervals are in brackets.", "tab:table1", notes),
        "table1.csv": to_csv(frame, spec.columns),
    }
    for name, text in contents.items():
        write_text(out_dir / name, text)
    return [out_dir / name for name in contents]
