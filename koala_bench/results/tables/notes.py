"""The notes under a table: what is missing, what the intervals say, and how the numbers were measured.

Everything they say comes from the records and from the published values.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from koala_bench.records import statistics
from koala_bench.results.tables.ablation import verdict_lines as ablation_verdicts
from koala_bench.results.tables.ordering import order_lines
from koala_bench.results.tables.published import Claim, Paper, TableSpec, paper_names
from koala_bench.records.reading import Run, differences
from koala_bench.results.tables.rendering import ALPHA, Note, with_interval
from koala_bench.common.provenance import CodeState, Environment
from koala_bench.records.schema import PresetInfo
from koala_bench.records.statistics import Interval
from koala_bench.records.summaries import VANILLA, Sample, Summary, sample
from koala_bench.results.tables.tasks import TaskRows, is_named
from koala_bench.results.tables.tasks import verdict_lines as task_verdicts

_FAILURES_LISTED = 10
_CODE_CHARACTERS = 400  # of a command or an error message


@dataclass(frozen=True)
class Measured:
    """A record under a table: what the notes call it, and one summary per shown method."""

    label: str
    run: Run
    summaries: Sequence[Summary]


def labels(runs: Sequence[Run]) -> list[str]:
    """What to call each record: its target, with its questions or its seed where others have the same."""
    names = [run.header["target"]["name"] for run in runs]
    for mark in (" on {questions[name]}", ", seed {seed}"):
        more = [f"{name}{mark.format_map(run.header)}" for name, run in zip(names, runs, strict=True)]
        unique = [names.count(name) == 1 for name in names]
        if not all(unique) and len(set(more)) > len(set(names)):
            names = [name if alone else longer for name, longer, alone in zip(names, more, unique, strict=True)]
    return names


def counted(number: int, noun: str) -> str:
    """A number with its noun, in the plural where there is not one."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _incomplete(measured: Measured) -> Note | None:
    lines, details = [], []
    label, run, summaries = measured.label, measured.run, measured.summaries
    if not run.finished:
        lines.append(
            f"The record of {label} is unfinished: it holds {counted(len(run.turns), 'turn')} and no end line. "
            "Its numbers will change when the evaluation goes on."
        )
    failed = [turn for summary in summaries for turn in summary.failed]
    if failed:
        counts = ", ".join(f"{summary.name} {len(summary.failed)}" for summary in summaries if summary.failed)
        lines.append(f"{counted(len(failed), 'turn')} of {label} failed ({counts}). A failed turn has no numbers.")
        for turn in failed[:_FAILURES_LISTED]:
            why = f"{turn['error']['type']}: {turn['error']['message']}" if turn["error"] else ""
            details.append(
                f"Failed: {turn['method']}, question {turn['question_id']}, turn {turn['turn']}, repeat"
                f" {turn['repeat']}: {_code(why)}"
            )
        if len(failed) > _FAILURES_LISTED:
            details.append(f"{counted(len(failed) - _FAILURES_LISTED, 'more failure')} in the record.")
    most = max(summary.turns for summary in summaries)
    if summaries[0].counted < most:
        lines.append(
            f"The numbers of {label} are from the {summaries[0].counted} of {most} turns that every method finished."
        )
    lines += [
        f"{summary.name} finished no turn and has no numbers."
        for summary in summaries
        if math.isnan(summary.speedup.value)
    ]
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
    if (
        not summary.is_koala
        or summary.change_x is None
        or summary.change_percent is None
        or summary.length_change is None
    ):
        return []
    x, percent, longer = summary.change_x, summary.change_percent, summary.length_change
    lines = [
        f"{summary.name} against {summary.original} on {summary.target}: the speedup changes by"
        f" {with_interval(x.value, x.low, x.high, 3, True)} x, {statistics.against_zero(x)}"
        f" ({_SIDES[statistics.against_zero(x)]}); the acceptance length changes by"
        f" {with_interval(longer.value, longer.low, longer.high, 3, True)}, {statistics.against_zero(longer)}."
    ]
    for measured, claim, unit, digits in (
        (x, paper.koala.speedup_change_x, "x", 3),
        (percent, paper.koala.speedup_change_percent, "%", 2),
    ):
        verdict = statistics.against_range(measured, claim.low, claim.high)
        how = f"is {verdict} from" if verdict == "not distinguishable" else verdict
        lines.append(
            f"The change of {summary.name} by"
            f" {with_interval(measured.value, measured.low, measured.high, digits, True)} {unit} {how} the paper's"
            f" range of +{claim.low:.2f} to +{claim.high:.2f} {unit}: {_where(measured, claim)}."
        )
    return lines


def _verdict_note(runs: Sequence[Run], summaries: Sequence[Sequence[Summary]], paper: Paper) -> Note | None:
    lines = [line for of_run in summaries for summary in of_run for line in verdicts(summary, paper)]
    if not lines:
        return None
    others = [run.header["target"]["name"] for run in runs if not set(paper.koala.targets) & set(paper_names(run))]
    if others:
        lines.append(
            f"The paper's ranges are over {', '.join(paper.koala.targets)}; "
            f"what is said above about {', '.join(others)} is about this measurement, not about those targets."
        )
    return Note("What the intervals say", tuple(lines))


def draws_line(summaries: Sequence[Summary]) -> str:
    """Why nothing is said of equal answers above temperature 0, and which methods are lossless there."""
    exact = list(
        dict.fromkeys(summary.name for summary in summaries if summary.method["lossless"] and summary.name != VANILLA)
    )
    kept = (
        f"; {', '.join(exact)} {'keeps' if len(exact) == 1 else 'keep'} the target's distribution by speculative"
        " sampling"
        if exact
        else ""
    )
    return f"Answers are draws, so they differ{kept}."


def lossy_lines(summaries: Sequence[Summary], target: str) -> list[str]:
    """Of each lossy method how it accepts, and how far that is from the target's distribution."""
    lines = []
    for summary in (each for each in summaries if not each.method["lossless"]):
        typical = summary.method["typical"]
        how = (
            f" by typical acceptance (threshold {typical['threshold']:g}, {ALPHA} {typical['alpha']:g})"
            if typical
            else ""
        )
        apart = "not recorded" if summary.distance is None else f"{summary.distance:.3f}"
        lines.append(
            f"LOSSY: {summary.name} does not keep the distribution of {target}{how}. Total variation between what it"
            f" settles and the target's distribution, mean over its tokens: {apart} (0 would be lossless, 1 is as far"
            " as can be)."
        )
    return lines


def _equality_note(measured: Sequence[Measured]) -> Note | None:
    lines, details = [], []
    for each_run in measured:
        compared = [summary for summary in each_run.summaries if summary.compared]
        where = f" on {each_run.label}" if len(measured) > 1 else ""
        if compared:
            counts = [
                f"{s.name} {s.compared - len(s.differing)}/{s.compared}"
                f" turns{'' if s.method['lossless'] else ' (lossy by design)'}"
                for s in compared
            ]
            lines.append(f"Answers on {each_run.label} equal to vanilla's, token by token: {', '.join(counts)}.")
        for summary in compared:
            for each in summary.differing if summary.method["lossless"] else ():
                token, vanilla_token = (
                    "end" if token is None else str(token) for token in (each.token, each.vanilla_token)
                )
                gap = "top-2 gap not recorded" if each.top2_gap is None else f"top-2 gap {each.top2_gap:.2e}"
                details.append(
                    f"Different: {summary.name}{where}, question {each.question_id}, turn {each.turn}, repeat"
                    f" {each.repeat}, position {each.position}: token {token}, vanilla {vanilla_token}, {gap}."
                )
    drawn = [each for each in measured if each.run.header["acceptance"]["rule"] != "greedy"]
    if drawn:
        lines.append(draws_line([summary for each in drawn for summary in each.summaries]))
    lines += [line for each in measured for line in lossy_lines(each.summaries, each.label)]
    title = (
        "Losslessness (turns, repeats and positions count from 0; the gap is between the target's two largest logits)"
    )
    lines += (
        [f"{counted(len(details), 'difference')}, each listed in the Markdown version of this table."]
        if details
        else []
    )
    return Note(title, tuple(lines), tuple(details)) if lines else None


def _machine(where: Environment) -> str:
    memory = f", {where['memory_bytes'] / 2**30:.1f} GiB of memory" if where["memory_bytes"] else ""
    driver = f" (driver {where['driver']})" if where["driver"] else ""
    power = f"{counted(where['cores'], 'core')}, {counted(where['threads'], 'thread')}"
    return f"{where['cpu']}, {power}{memory}; {where['gpu'] or 'no GPU'}{driver}; {where['platform']}"


def _code_in_words(code: CodeState) -> str:
    version = f"koala-bench {code['version'] or 'of unknown version'}"
    if code["commit"] is None:
        return f"{version}, commit unknown (not a checkout)"
    return f"{version}, commit {code['commit'][:12]}{' with uncommitted changes' if code['dirty'] else ''}"


def _options(preset: PresetInfo) -> str:
    """The arguments that the chat template was given, such as the mode of a model that can reason."""
    options = preset["resolved"].get("target", {}).get("template_options", {})
    return f" ({', '.join(f'{name} = {value}' for name, value in options.items())})" if options else ""


def _ignored(settings: dict[str, Any]) -> list[str]:
    if not settings:
        return []
    told = ", ".join(f"{name} {value}" for name, value in settings.items())
    return [f"The checkpoint's own generation settings are ignored by all methods alike: {told}."]


def _measurement_note(measured: Measured) -> Note:
    run, summaries, header = measured.run, measured.summaries, measured.run.header
    target, questions, acceptance, measure, preset = (
        header["target"],
        header["questions"],
        header["acceptance"],
        header["measure"],
        header["preset"],
    )
    cuts = [f"top-k {acceptance['top_k']}"] * (acceptance["top_k"] > 0) + [f"top-p {acceptance['top_p']:g}"] * (
        acceptance["top_p"] < 1
    )
    rule = ", ".join(
        [
            acceptance["rule"],
            *([f"temperature {acceptance['temperature']:g}", *cuts] if acceptance["rule"] != "greedy" else []),
        ]
    )
    packages = [f"{name} {version}" for name, version in header["environment"]["packages"].items() if version]
    shared = f"; questions shared out to {measure['processes']} processes" if "processes" in measure else ""
    lines = [
        (
            f"Target: {target['name']}, {target['parameters'] / 1e6:,.2f} M parameters, {target['layers']} layers,"
            f" {target['dtype']} on {target['device']}, attention"
            f" {target['attention']}{', engine graph' if 'engine' in target else ''}."
        ),
        *_ignored(target.get("ignored_settings", {})),
        f"Machine: {_machine(header['environment'])}.",
        f"Versions: Python {header['environment']['python']}, {', '.join(packages)}.",
        (
            f"Questions: {questions['name']} ({counted(questions['count'], 'question')}, sha256"
            f" {questions['sha256'][:12]}), {summaries[0].questions} of them counted; chat template"
            f" {header['chat_template']['name']}{_options(preset)}."
        ),
        (
            f"Decoding: {rule}, at most {header['limits']['max_new_tokens']} new tokens, {measure['warmup']} warm-up,"
            f" {counted(measure['repeats'], 'repeat')}, seed {header['seed']}; methods interleaved question by"
            f" question{shared}."
        ),
    ]
    trained = {
        (each["stream_sha256"], each["order_sha256"], each["tokens"])
        for summary in summaries
        if (each := summary.method["training"])
    }
    for stream, order, tokens in sorted(trained):
        names = [
            s.name
            for s in summaries
            if (each := s.method["training"]) and (each["stream_sha256"], each["order_sha256"]) == (stream, order)
        ]
        lines.append(
            f"Trained on the same {tokens:,} tokens (stream sha256 {stream[:12]}, order {order[:12]}):"
            f" {', '.join(names)}."
        )
    trees = [(summary.name, summary.method["tree"]) for summary in summaries if summary.name != VANILLA]
    in_words = [
        f"{name} {tree['name']} ({counted(tree['nodes'], 'node')}, depth {tree['depth']})"
        for name, tree in trees
        if tree
    ]
    if in_words:
        lines.append(f"Draft trees (nodes with the root): {', '.join(in_words)}.")
    with_speed = [summary for summary in summaries if summary.name != VANILLA and not math.isnan(summary.speedup.value)]
    if with_speed:
        other = ", ".join(
            f"{summary.name} {summary.speedup_of_means:.3f} / {summary.mean_of_speedups:.3f}" for summary in with_speed
        )
        lines.append(
            "Speedup by other definitions (ratio of mean rates, as EAGLE's and Spec-Bench's scripts / mean of the"
            f" questions' ratios): {other}."
        )
    absent = [name for name in run.methods if name not in {summary.name for summary in summaries}]
    if absent:
        lines.append(f"Also in the record, not in this table: {', '.join(absent)}.")
    lines.append(
        f"Run {header['run_id']}, {header['created']}, preset {preset['name']} (sha256 {preset['sha256'][:12]}),"
        f" {_code_in_words(header['code'])}.",
    )
    lines.append(f"Command: {_code(shlex.join(header['command']))}")
    return Note(f"How {measured.label} was measured", tuple(lines))


def _mixture_note(
    measured: Sequence[Measured], looked_at: Sequence[str] = ("environment", "code", "preset")
) -> Note | None:
    """Runs of one table that do not share machine, versions, code or preset, which no reader should have to find out."""
    lines = []
    first = measured[0]
    for each in measured[1:]:
        places = differences(first.run.header, each.run.header)
        kinds = [kind for kind in looked_at if any(place.startswith(f"{kind}.") for place in places)]
        if kinds:
            lines.append(
                f"{first.label} and {each.label} do not share their {' and '.join(kinds)}: speedups compare, times do"
                " not."
            )
    return Note("Not measured alike", tuple(lines)) if lines else None


def _definitions_note(summaries: Sequence[Sequence[Summary]], seeds: int = 1) -> Note:
    lines = [
        (
            "Speedup: tokens per second of decoding (prefill and its token left out) over vanilla's in the same run,"
            " both totalled over the questions."
        ),
        (
            "Acceptance length τ: tokens per verification step, the target's own (bonus) token included; vanilla"
            " decoding has 1."
        ),
        (
            f"Acceptance rate {ALPHA} at a depth: steps that accepted a token there, of those that accepted one above"
            " it and were offered that depth (conditional on the parent)."
        ),
        "Draft overhead: drafting time / (drafting + verification time).",
        (
            "Change: against the original head (same head, neither more layers nor adversarial training), as a"
            " difference of speedups (x) and relative to its speedup (%)."
        ),
        (
            f"Intervals: {100 * statistics.CONFIDENCE:.0f} %, paired expanded percentile bootstrap (Hesterberg 2015)"
            f" over questions ({statistics.RESAMPLES:,} resamples, seed {statistics.SEED})."
        ),
    ]
    if seeds > 1:
        lines[-1] = (
            f"Intervals: {100 * statistics.CONFIDENCE:.0f} %, over {seeds} training seeds and the questions, crossed:"
            " pigeonhole bootstrap (Owen 2007) with the width of a t interval from a two-way analysis of variance"
            f" ({statistics.RESAMPLES:,} resamples, seed {statistics.SEED})."
        )
    if any(of_run[0].questions < 2 for of_run in summaries):
        lines.append("With a single question there are no intervals.")
    return Note("Definitions", tuple(lines))


def _paper_note(measured: Sequence[Measured], spec: TableSpec, paper: Paper) -> Note:
    x, percent, questions = (
        paper.koala.speedup_change_x,
        paper.koala.speedup_change_percent,
        measured[0].run.header["questions"]["name"],
    )
    lines = [
        (
            f"Paper: {paper.koala.citation}. Its change of +{x.low:.2f}x to +{x.high:.2f}x ({x.source}) and of"
            f" {percent.low:.2f} % to {percent.high:.2f} % ({percent.source}) is over all its targets and both heads."
        ),
        "The paper's individual cells are `unknown` until `reproduce/paper.toml` is filled from its PDF.",
    ]
    if spec.questions is not None and questions != spec.questions:
        lines.append(f"The paper's table is on {spec.questions}; these numbers are on {questions}.")
    for each in measured:
        missing = [name for name in spec.methods if name not in {summary.name for summary in each.summaries}]
        if missing:
            lines.append(f"The record of {each.label} has no {', '.join(missing)}.")
        for own in (own for own in paper.own_claims if spec.by == "target" and own.target in paper_names(each.run)):
            value = own.speedup if isinstance(own.speedup, str) else f"{own.speedup:.2f}x"
            lines.append(
                f"Published by its authors for {own.target} on MT-bench: {own.system} {value} (temperature"
                f" {own.temperature}; {own.source})."
            )
    return Note("Published values", tuple(lines))


def _said(title: str, lines: Sequence[str]) -> Note | None:
    return Note(title, tuple(lines)) if lines else None


def table1_notes(measured: Sequence[Measured], spec: TableSpec, paper: Paper) -> list[Note]:
    """All notes of Table 1, in their order."""
    runs, summaries = [each.run for each in measured], [each.summaries for each in measured]
    notes: list[Note | None] = [_incomplete(each) for each in measured]
    notes += [_mixture_note(measured), _verdict_note(runs, summaries, paper), _equality_note(measured)]
    notes += [_measurement_note(each) for each in measured]
    notes += [_definitions_note(summaries), _paper_note(measured, spec, paper)]
    return [note for note in notes if note is not None]


def _orders(rows: Sequence[TaskRows], spec: TableSpec, paper: Paper) -> list[str]:
    whole = {row.summaries[0].target: row for row in rows}  # of each target the last row: all tasks, or the only one
    return [
        line
        for target, row in whole.items()
        if spec.systems
        for line in order_lines(sample([row.run], spec.methods), spec.systems, paper, target)
    ]


def table2_notes(
    measured: Sequence[Measured], rows: Sequence[TaskRows], missing: Sequence[str], spec: TableSpec, paper: Paper
) -> list[Note]:
    """All notes of Table 2, in their order."""
    tasks, files = (
        ", ".join(dict.fromkeys(getattr(task, field) for task in spec.tasks)) for field in ("name", "questions")
    )
    lines = [
        *missing,
        *(
            f"{each.label}: these are the categories of the questions {each.run.header['questions']['name']}, not the"
            f" tasks {tasks}, whose questions ({files}) are looked up in a data folder (`koala-bench data`)."
            for each in measured
            if not is_named(each.run, spec)
        ),
    ]
    notes: list[Note | None] = [_incomplete(each) for each in measured]
    notes += [
        _said("Which tasks these are", lines),
        _mixture_note(measured),
        _said("What the intervals say", task_verdicts(rows)),
    ]
    notes += [
        _said("Which published order of methods this bears out", _orders(rows, spec, paper)),
        _equality_note(measured),
    ]
    notes += [_measurement_note(each) for each in measured]
    notes += [_definitions_note([row.summaries for row in rows]), _paper_note(measured, spec, paper)]
    return [note for note in notes if note is not None]


def table3_notes(
    measured: Sequence[Measured], pooled: Sequence[tuple[Sample, Sequence[Summary]]], spec: TableSpec, paper: Paper
) -> list[Note]:
    """All notes of Table 3, in their order: one entry of ``pooled`` per target, of all its training seeds."""
    verdicts_of = [line for chosen, summaries in pooled for line in ablation_verdicts(chosen, summaries)]
    seeds = max(len(chosen.runs) for chosen, _ in pooled)
    for chosen, summaries in pooled:
        if len(chosen.runs) == 1:
            verdicts_of.append(
                f"The heads of {summaries[0].target} were trained from one seed, {chosen.runs[0].header['seed']}: the"
                " intervals are over questions, and another seed may move the numbers by more."
            )
    notes: list[Note | None] = [_incomplete(each) for each in measured]
    notes += [
        _mixture_note(measured, ("environment", "code")),
        _said("What each part is worth", verdicts_of),
        _equality_note(measured),
    ]
    notes += [_measurement_note(each) for each in measured]
    notes += [_definitions_note([summaries for _, summaries in pooled], seeds), _paper_note(measured, spec, paper)]
    return [note for note in notes if note is not None]
