"""The notes under a table: what is missing, where answers differ, how the numbers were measured, and definitions."""

from __future__ import annotations

import math
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from koala_bench.common.provenance import CodeState, Environment
from koala_bench.records import statistics
from koala_bench.records.reading import Run, differences
from koala_bench.records.schema import PresetInfo
from koala_bench.records.summaries import VANILLA, Factor, Summary
from koala_bench.results.tables.published import Paper, TableSpec, paper_names
from koala_bench.results.tables.rendering import ALPHA, Note

_FAILURES_LISTED = 10
_CODE_CHARACTERS = 400  # of a command or an error message


@dataclass(frozen=True)
class Measured:
    """A record under a table: what the notes call it, and one summary per shown method."""

    label: str
    run: Run
    summaries: Sequence[Summary]


def labels(runs: Sequence[Run]) -> list[str]:
    """What to call each record: its target, with its questions, its seed or its process where others have the same."""
    names = [run.target for run in runs]
    marks: tuple[Callable[[Run], str], ...] = (
        lambda run: f" on {run.header['questions']['name']}",
        lambda run: f", seed {run.training_seed}",
        lambda run: f", process {run.process}",
    )
    for mark in marks:
        more = [name + mark(run) for name, run in zip(names, runs, strict=True)]
        unique = [names.count(name) == 1 for name in names]
        if not all(unique) and len(set(more)) > len(set(names)):
            names = [name if alone else longer for name, longer, alone in zip(names, more, unique, strict=True)]
    return names


def counted(number: int, noun: str) -> str:
    """A number with its noun, in the plural where there is not one."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def notes_of(
    measured: Sequence[Measured], spec: TableSpec, paper: Paper, remarks: Sequence[str], intervals: str
) -> list[Note]:
    """All notes of a table, in their order.

    Args:
        remarks: what else is to be said of this table.
        intervals: what its intervals are.
    """
    found = [
        Note("This table is incomplete", _incomplete(measured), alarm=True),
        Note("Remarks", (*remarks, *_mixed(measured, spec))),
        Note("Losslessness (turns, repeats and positions count from 0)", _lossless(measured)),
        *(Note(f"How {each.label} was measured", _measurement(each)) for each in measured if each.run.process == 1),
        Note("Definitions", (*DEFINITIONS, intervals)),
        Note("Published values", _published(measured, spec, paper)),
    ]
    return [note for note in found if note.lines]


def _incomplete(measured: Sequence[Measured]) -> tuple[str, ...]:
    return tuple(line for each in measured for line in _incomplete_of(each))


def _incomplete_of(measured: Measured) -> list[str]:
    """What a record lacks: its end, turns that failed, methods without numbers; empty if it is whole."""
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
            place = f"question {turn['question_id']}, turn {turn['turn']}, repeat {turn['repeat']}"
            details.append(f"Failed: {turn['method']}, {place}: {_code(why)}")
        if len(failed) > _FAILURES_LISTED:
            details.append(f"{counted(len(failed) - _FAILURES_LISTED, 'more failure')} in the record.")
    most = max(summary.turns for summary in summaries)
    if summaries[0].counted < most:
        lines.append(
            f"The numbers of {label} are from the {summaries[0].counted} of {most} turns that every method finished."
        )
    empty = [summary.name for summary in summaries if math.isnan(summary.speedup.value)]
    return [*lines, *(f"{name} finished no turn and has no numbers." for name in empty), *details]


def _code(text: str) -> str:
    words = " ".join(text.replace("`", "'").split())
    return f"`{words if len(words) <= _CODE_CHARACTERS else words[:_CODE_CHARACTERS] + ' ...'}`"


def draws_line(summaries: Sequence[Summary]) -> str:
    """Why answers are not compared above temperature 0, and which methods are lossless there."""
    exact = dict.fromkeys(each.name for each in summaries if each.method["lossless"] and each.name != VANILLA)
    keep = f"{', '.join(exact)} {'keeps' if len(exact) == 1 else 'keep'}"
    kept = f"; {keep} the target's distribution by speculative sampling" if exact else ""
    return f"Answers are draws, so they differ{kept}."


def lossy_lines(summaries: Sequence[Summary], target: str) -> list[str]:
    """Of each lossy method how it accepts, and how far that is from the target's distribution."""
    lines = []
    for summary in (each for each in summaries if not each.method["lossless"]):
        typical = summary.method["typical"]
        how = f" (threshold {typical['threshold']:g}, {ALPHA} {typical['alpha']:g})" if typical else ""
        apart = "not recorded" if summary.distance is None else f"{summary.distance:.3f}"
        lines.append(
            f"LOSSY: {summary.name} does not keep the distribution of {target}"
            f"{' by typical acceptance' if typical else ''}{how}. Total variation from the target's distribution, mean"
            f" over its tokens: {apart} (0 is lossless, 1 the largest)."
        )
    return lines


def _lossless(measured: Sequence[Measured]) -> tuple[str, ...]:
    lines, details = [], []
    for each_run in measured:
        where = f" on {each_run.label}" if len(measured) > 1 else ""
        compared = [summary for summary in each_run.summaries if summary.compared]
        if compared:
            counts = [
                f"{s.name} {s.compared - len(s.differing)}/{s.compared}"
                f"{'' if s.method['lossless'] else ' (lossy by design)'}"
                for s in compared
            ]
            lines.append(f"Answers on {each_run.label} equal to vanilla's, token by token: {', '.join(counts)}.")
        for summary in (each for each in compared if each.method["lossless"]):
            for each in summary.differing:
                tokens = ("end" if token is None else str(token) for token in (each.token, each.vanilla_token))
                gap = "not recorded" if each.top2_gap is None else f"{each.top2_gap:.2e}"
                details.append(
                    f"Different: {summary.name}{where}, question {each.question_id}, turn {each.turn}, repeat"
                    f" {each.repeat}, position {each.position}: token {next(tokens)}, vanilla {next(tokens)}, top-2"
                    f" gap {gap}."
                )
    drawn = [each for each in measured if each.run.header["acceptance"]["rule"] != "greedy"]
    if drawn:
        lines.append(draws_line([summary for each in drawn for summary in each.summaries]))
    lines += [line for each in measured for line in lossy_lines(each.summaries, each.label)]
    return (*lines, *details)


def _machine(where: Environment) -> str:
    memory = f", {where['memory_bytes'] / 2**30:.1f} GiB of memory" if where["memory_bytes"] else ""
    driver = f" (driver {where['driver']})" if where["driver"] else ""
    power = f"{counted(where['cores'], 'core')}, {counted(where['threads'], 'thread')}"
    return f"{where['cpu']}, {power}{memory}; {where['gpu'] or 'no GPU'}{driver}; {where['platform']}"


def code_in_words(code: CodeState) -> str:
    """The version and the commit of the code that made a record."""
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


def rule_in_words(run: Run) -> str:
    """The acceptance rule with its temperature."""
    acceptance = run.header["acceptance"]
    if acceptance["rule"] == "greedy":
        return "greedy"
    cuts = [f"top-k {acceptance['top_k']}"] * (acceptance["top_k"] > 0)
    cuts += [f"top-p {acceptance['top_p']:g}"] * (acceptance["top_p"] < 1)
    return ", ".join([acceptance["rule"], f"temperature {acceptance['temperature']:g}", *cuts])


def _measurement(measured: Measured) -> tuple[str, ...]:
    run, summaries, header = measured.run, measured.summaries, measured.run.header
    target, questions, measure = header["target"], header["questions"], header["measure"]
    packages = [f"{name} {version}" for name, version in header["environment"]["packages"].items() if version]
    shared = f"; questions shared out to {measure['processes']} processes" if "processes" in measure else ""
    order = "in an order drawn for each prompt" if "order" in measure else "taking turns"
    engine = ", engine graph" if "engine" in target else ""
    lines = [
        f"Target: {target['name']}, {target['parameters'] / 1e6:,.2f} M parameters, {target['layers']} layers,"
        f" {target['dtype']} on {target['device']}, attention {target['attention']}{engine}.",
        *_ignored(target.get("ignored_settings", {})),
        f"Machine: {_machine(header['environment'])}.",
        f"Versions: Python {header['environment']['python']}, {', '.join(packages)}.",
        f"Questions: {questions['name']} ({counted(questions['count'], 'question')}, sha256"
        f" {questions['sha256'][:12]}), {summaries[0].questions} of them counted; chat template"
        f" {header['chat_template']['name']}{_options(header['preset'])}.",
        f"Decoding: {rule_in_words(run)}, at most {header['limits']['max_new_tokens']} new tokens,"
        f" {measure['warmup']} warm-up, {counted(measure['repeats'], 'repeat')}, seed {header['seed']}; methods"
        f" interleaved question by question, {order}{shared}.",
    ]
    trained: dict[tuple[str, str, int, str], list[str]] = {}
    for summary in summaries:
        if each := summary.method["training"]:
            within = {"bf16": ", in bf16 autocast", "no": ", in float32"}.get(each.get("precision", ""), "")
            stream = each["stream_sha256"], each["order_sha256"], each["tokens"], within
            trained.setdefault(stream, []).append(summary.name)
    lines += [
        f"Trained on the same {tokens:,} tokens (stream sha256 {stream[:12]}, order {order[:12]}){within}:"
        f" {', '.join(names)}."
        for (stream, order, tokens, within), names in sorted(trained.items())
    ]
    absent = [name for name in run.methods if name not in {summary.name for summary in summaries}]
    lines += [f"Also in the record, not in this table: {', '.join(absent)}."] if absent else []
    return (
        *lines,
        f"Run {header['run_id']}, {header['created']}, preset {header['preset']['name']} (sha256"
        f" {header['preset']['sha256'][:12]}),"
        f" {code_in_words(header['code'])}.",
        f"Command: {_code(shlex.join(header['command']))}",
    )


def _mixed(measured: Sequence[Measured], spec: TableSpec) -> list[str]:
    """Records of one table that do not share machine, versions, code or preset."""
    lines, first = [], measured[0]
    looked_at = ("environment", "code", *(("preset",) if spec.by != "part" else ()))
    for each in measured[1:]:
        places = differences(first.run.header, each.run.header)
        kinds = [kind for kind in looked_at if any(place.startswith(f"{kind}.") for place in places)]
        if kinds:
            lines.append(
                f"{first.label} and {each.label} do not share their {' and '.join(kinds)}: speedups compare, times do"
                " not."
            )
    return lines


DEFINITIONS = (
    "Speedup: tokens per second of decoding over vanilla's in the same run, both totalled over the questions. Reading"
    " the prompt and the token it gives are left out, the target's reading and the head's (the latter is part of the"
    " decoding in records of schema 4 and before). Whole answer: the same of everything from the prompt to the last"
    " token. Ratio of means: the ratio of mean rates; EAGLE's and Spec-Bench's scripts have that of whole answers."
    " Mean of ratios: of the questions' ratios.",
    "Acceptance length τ: tokens per verification step, the target's own (bonus) token included; vanilla decoding has"
    " 1.",
    f"Acceptance rate {ALPHA} at a depth: steps that accepted a token there, of those that accepted one above it and"
    " were offered that depth (conditional on the parent).",
    "Draft overhead: drafting time / (drafting + verification time). Draft tree: its nodes include the root.",
    "Equal answers: turns whose tokens are all vanilla's. Top-2 gap: between the target's two largest logits.",
    "Change: against the original head (same head, neither more layers nor adversarial training), as a difference of"
    " speedups (x) and relative to its speedup (%). Bold where the whole interval lies on one side of zero.",
    "Paper's range: confirms if the whole interval of the change lies in it, contradicts if the whole interval lies"
    " outside, not distinguishable otherwise.",
)


def over_in_words(covers: Mapping[Factor, int]) -> str:
    """What intervals are over, such as "3 processes and 80 questions"."""
    return " and ".join(f"{count} {factor}" for factor, count in reversed([*covers.items()]))


def intervals_in_words(covers: Mapping[Factor, int]) -> str:
    """What the intervals of a table are over, and what they are not: questions, processes, training seeds."""
    percent, draws = (
        f"{100 * statistics.CONFIDENCE:.0f} %",
        f"{statistics.RESAMPLES:,} resamples, seed {statistics.SEED}",
    )
    one = {"processes": "one process", "training seeds": "one training of each head"}
    rest = [words for factor, words in one.items() if factor not in covers]
    if "training seeds" in covers:  # each seed was evaluated by itself
        rest = []
    limits = f" They are of {' and '.join(rest)}: another may move the numbers by more." if rest else ""
    if len(covers) > 1:
        return (
            f"Intervals: {percent}, over {over_in_words(covers)}, crossed: pigeonhole bootstrap (Owen 2007) with the"
            f" width of a t interval from a two-way analysis of variance ({draws}).{limits}"
        )
    if covers["questions"] < 2:
        return f"With a single question there are no intervals.{limits}"
    return f"Intervals: {percent}, paired expanded percentile bootstrap (Hesterberg 2015) over questions ({draws}).{limits}"


def _published(measured: Sequence[Measured], spec: TableSpec, paper: Paper) -> tuple[str, ...]:
    x, percent = paper.koala.speedup_change_x, paper.koala.speedup_change_percent
    questions = measured[0].run.header["questions"]["name"]
    others = [each.label for each in measured if not set(paper.koala.targets) & set(paper_names(each.run))]
    about = f"; {', '.join(others)} is none of these" if others else ""
    lines = [
        f"Paper: {paper.koala.citation}. Its change of +{x.low:.2f}x to +{x.high:.2f}x ({x.source}) and of"
        f" {percent.low:.2f} % to {percent.high:.2f} % ({percent.source}) is over both heads and its targets"
        f" {', '.join(paper.koala.targets)}{about}.",
        "The paper's individual cells are `unknown` until `reproduce/paper.toml` is filled from its PDF.",
    ]
    if spec.questions is not None and questions != spec.questions:
        lines.append(f"The paper's table is on {spec.questions}; these numbers are on {questions}.")
    for each in measured:
        missing = [name for name in spec.methods if name not in {summary.name for summary in each.summaries}]
        lines += [f"The record of {each.label} has no {', '.join(missing)}."] if missing else []
    return tuple(lines)
