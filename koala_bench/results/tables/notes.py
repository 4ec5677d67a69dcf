"""What stands under a table: what is missing, where answers differ, how the numbers were measured, and definitions."""

from __future__ import annotations

import math
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from koala_bench.common.provenance import CodeState
from koala_bench.records import statistics
from koala_bench.records.definitions import repeated_share
from koala_bench.records.reading import Run, short_names
from koala_bench.records.schema import MethodInfo, with_other_template
from koala_bench.records.summaries import VANILLA, Factor, Summary
from koala_bench.results.tables.bounds import LEGEND
from koala_bench.results.tables.published import Paper, TableSpec
from koala_bench.results.tables.rendering import ALPHA, Grid, Note, grid_of

_MOST = 10  # failures that are listed
_CHARACTERS = 400  # of a command or an error message


@dataclass(frozen=True)
class Measured:
    """A record under a table: what the notes call it, and one summary per shown method."""

    label: str
    run: Run
    summaries: Sequence[Summary]


def labels(runs: Sequence[Run]) -> list[str]:
    """What to call each record: its target, with its questions, its seed or its process where others have the same."""
    targets = [run.header["target"]["name"] for run in runs]
    names = [short_names(targets)[target] for target in targets]
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


def notes_of(
    measured: Sequence[Measured],
    spec: TableSpec,
    paper: Paper,
    remarks: Sequence[str],
    covers: Sequence[Mapping[Factor, int]],
) -> list[Note]:
    """All notes of a table, in their order; ``covers`` as for ``over_in_words``, of all that is in its Markdown."""
    notes = [
        Note("This table is incomplete", tuple(line for each in measured for line in incomplete(each)), alarm=True),
        Note("Remarks", tuple(remarks)),
        settings(measured, spec.methods),
        Note("Definitions", (*DEFINITIONS, LEGEND, intervals_in_words(covers), statistics.CAUTION)),
        Note("Published values", _published(measured[0].run, spec, paper)),
    ]
    return [note for note in notes if note.lines]


def incomplete(measured: Measured) -> list[str]:
    """What a record lacks: its end, turns that failed, methods without numbers; empty if it is whole."""
    label, run, summaries = measured.label, measured.run, measured.summaries
    failed = {each.name: len(each.failed) for each in summaries if each.failed}
    most = max(each.turns for each in summaries)
    empty = [each.name for each in summaries if math.isnan(each.speedup.value)]
    lines = [] if run.finished else [f"{label}: unfinished, {len(run.turns)} turns and no end line."]
    if failed:
        counts = ", ".join(f"{name} {count}" for name, count in failed.items())
        lines.append(f"{label}: failed turns, which have no numbers: {counts}.")
    if summaries[0].counted < most:
        lines.append(
            f"{label}: numbers are from the {summaries[0].counted} of {most} turns that every method finished."
        )
    return [*lines, *([f"{label}: without numbers: {', '.join(empty)}."] if empty else [])]


def _code(text: str) -> str:
    words = " ".join(text.replace("`", "'").split())
    return f"`{words if len(words) <= _CHARACTERS else words[:_CHARACTERS] + ' ...'}`"


def exceptions(measured: Sequence[Measured]) -> list[tuple[str, Grid]]:
    """Tables, each with its title, of failed turns and of lossless methods' answers that differ from vanilla's."""
    failed = [
        {"Method": turn["method"], "Record": each.label}
        | {"Question": str(turn["question_id"]), "Turn": str(turn["turn"]), "Repeat": str(turn["repeat"])}
        | {"Error": _code(f"{turn['error']['type']}: {turn['error']['message']}") if turn["error"] else ""}
        for each in measured
        for summary in each.summaries
        for turn in summary.failed
    ]
    differing = [
        {"Method": summary.name, "Record": each.label}
        | {"Question": str(one.question_id), "Turn": str(one.turn), "Repeat": str(one.repeat)}
        | {"Position": str(one.position)}
        | {"Token": "end" if one.token is None else str(one.token)}
        | {"Vanilla's": "end" if one.vanilla_token is None else str(one.vanilla_token)}
        | {"Top-2 gap": "not recorded" if one.top2_gap is None else f"{one.top2_gap:.2e}"}
        for each in measured
        for summary in each.summaries
        if summary.method["lossless"]
        for one in summary.differing
    ]
    shown = f", the first {_MOST} of {len(failed)}" if len(failed) > _MOST else ""
    left = ("Method", "Record", "Error")
    return [
        (f"Failed turns{shown}", grid_of(failed[:_MOST], left)),
        ("Answers that differ from vanilla's (counted from 0)", grid_of(differing, left)),
    ]


def code_in_words(code: CodeState) -> str:
    """The version and the commit of the code that made a record."""
    version = f"koala-bench {code['version'] or 'of unknown version'}"
    if code["commit"] is None:
        return f"{version}, commit unknown (not a checkout)"
    return f"{version}, commit {code['commit'][:12]}{' with uncommitted changes' if code['dirty'] else ''}"


def rule_in_words(run: Run) -> str:
    """The acceptance rule with its temperature."""
    acceptance = run.header["acceptance"]
    if acceptance["rule"] == "greedy":
        return "greedy"
    cuts = [f"top-k {acceptance['top_k']}"] * (acceptance["top_k"] > 0)
    cuts += [f"top-p {acceptance['top_p']:g}"] * (acceptance["top_p"] < 1)
    return ", ".join([acceptance["rule"], f"temperature {acceptance['temperature']:g}", *cuts])


def _pairs(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in settings.items() if value is not None)


def _stream(method: MethodInfo) -> str:
    training = method["training"]
    if training is None:
        return ""
    hashes = f"stream sha256 {training['stream_sha256'][:12]}, order {training['order_sha256'][:12]}"
    within = {"bf16": " in bf16 autocast", "no": " in float32"}.get(training.get("precision", ""), "")
    return f"{training['tokens']:,} tokens ({hashes}){within}"


def _repetition(run: Run) -> str:
    share = repeated_share([turn["new_token_ids"] for turn in run.turns_of(VANILLA) if turn["new_token_ids"]])
    return "" if share is None else f"{100 * share:.1f} % of the 8-grams of vanilla's answers are repeated"


def _settings_of(measured: Measured, wanted: Sequence[str]) -> dict[str, str]:
    """How a record was made, by what a setting is called; empty where there is nothing to say."""
    run, header, shown = measured.run, measured.run.header, [each.name for each in measured.summaries]
    target, questions, measure, where = header["target"], header["questions"], header["measure"], header["environment"]
    memory = f", {where['memory_bytes'] / 2**30:.1f} GiB of memory" if where["memory_bytes"] else ""
    driver = f" (driver {where['driver']})" if where["driver"] else ""
    kernels = f"; kernels compiled by {where['compiler']}" if "compiler" in where else ""
    streams: dict[str, list[str]] = {}
    for each in measured.summaries:
        streams.setdefault(_stream(each.method), []).append(each.name)
    lossy = {each.name: each.method["typical"] for each in measured.summaries if not each.method["lossless"]}
    typical = [f"{name} ({_pairs(rule or {}).replace('alpha', ALPHA)})" for name, rule in lossy.items()]
    return {
        "Target": f"{target['name']}, {target['parameters'] / 1e6:,.2f} M parameters, {target['layers']} layers,"
        f" {target['dtype']} on {target['device']}, attention {target['attention']},"
        f" engine {target.get('engine', 'eager')}",
        "Generation settings of the checkpoint, ignored": _pairs(target.get("ignored_settings", {})),
        "Machine": f"{where['cpu']}, cores {where['cores']}, threads {where['threads']}{memory};"
        f" {where['gpu'] or 'no GPU'}{driver}; {where['platform']}{kernels}",
        "Versions": f"Python {where['python']}, {_pairs(where['packages'])}",
        "Questions": f"{questions['name']} ({questions['count']} questions, sha256 {questions['sha256'][:12]}),"
        f" {measured.summaries[0].questions} of them counted",
        "Chat template": f"{header['chat_template']['name']} "
        f"{_pairs(header['preset']['resolved'].get('target', {}).get('template_options', {}))}".strip(),
        "Decoding": f"{rule_in_words(run)}, at most {header['limits']['max_new_tokens']} new tokens,"
        f" warm-up {measure['warmup']}, repeats {measure['repeats']}, processes {measure.get('processes', 1)}, seed"
        f" {header['seed']}; methods interleaved question by question,"
        f" {'in an order drawn for each prompt' if 'order' in measure else 'taking turns'}",
        "Repetition": _repetition(run),
        "Lossy, by typical acceptance": ", ".join(typical),
        "Training seed": str(run.training_seed),
        "Trained on": "; ".join(f"{stream}: {', '.join(names)}" for stream, names in sorted(streams.items()) if stream),
        "Trained with another chat template": ", ".join(
            with_other_template((each.method for each in measured.summaries), header["chat_template"]["sha256"])
        ),
        "Not in this table": ", ".join(name for name in run.methods if name not in shown),
        "Not in the record": ", ".join(name for name in wanted if name not in run.methods),
        "Run": f"{header['run_id']}, {header['created']}, preset {header['preset']['name']} (sha256"
        f" {header['preset']['sha256'][:12]}), {code_in_words(header['code'])}",
        "Command": _code(shlex.join(header["command"])),
    }


def settings(measured: Sequence[Measured], wanted: Sequence[str]) -> Note:
    """How records were made, a line per setting and value; where records differ it says whose each is.

    Args:
        wanted: methods that are missed where a record lacks them.
    """
    every = [(each.label, _settings_of(each, wanted)) for each in measured]
    lines = []
    for name in dict.fromkeys(name for _, of in every for name in of):
        whose: dict[str, list[str]] = {}
        for label, of in every:
            whose.setdefault(of.get(name, ""), []).append(label)
        for value, who in whose.items():
            mark = f" ({'; '.join(who)})" if len(whose) > 1 else ""
            lines += [f"{name}{mark}: {value}."] if value else []
    return Note("How it was measured", tuple(lines))


DEFINITIONS = (
    "Speedup: tokens per second of decoding over vanilla's in the same run, both totalled over the questions. The"
    " prefill and its token are left out, the target's prefill and the head's (records up to schema 4 count the head's"
    " as decoding). Whole answer: the same with the prefill, from the prompt to the last token. Ratio of means: the"
    " ratio of mean rates; EAGLE's and Spec-Bench's scripts report that of whole answers. Mean of ratios: of the"
    " questions' ratios. Bold: the highest point estimate of a lossless method, which may not be distinguishable from"
    " the next.",
    "Acceptance length τ: tokens per verification step, the target's own (bonus) token included; vanilla decoding has"
    " 1.",
    f"Acceptance rate {ALPHA} at a depth: steps that accepted a token there, of those that accepted one above it and"
    " were offered that depth (conditional on the parent).",
    "Draft overhead: drafting time / (drafting + verification time). Draft tree: its nodes include the root.",
    "Equal answers: turns whose tokens are all vanilla's; above temperature 0 answers are draws and not compared. Top-2"
    " gap: between the target's two largest logits. Lossy: does not keep the target's distribution; total variation"
    " from it, mean over the tokens (0 is lossless, 1 the largest). All other methods keep it.",
    "Change: against the original head (same head, neither more layers nor adversarial training), as a difference of"
    " speedups (x) and relative to its speedup (%). Bold where the whole interval lies on one side of zero.",
    "Paper's range: confirms if the whole interval of the change lies in it, contradicts if the whole interval lies"
    " outside, not distinguishable otherwise. `unknown`: a cell of the paper that `reproduce/paper.toml` does not"
    " have.",
    "Published order: pairs of methods that every publication which has both puts in the same order; the gap is by how"
    " much the published leader leads here.",
)


def over_in_words(covers: Sequence[Mapping[Factor, int]]) -> str:
    """What intervals are over, such as "3 processes and 80 questions", or "4 to 24 questions, by row".

    Args:
        covers: of each group of rows, how many there are of each factor.
    """
    covers = [each for each in covers if each["questions"] > 1] or covers  # of one question there is no interval
    factors = dict.fromkeys(factor for each in covers for factor in reversed([*each]))
    counts = {factor: sorted({each.get(factor, 1) for each in covers}) for factor in factors}
    said = (
        f"{of[0]} {factor}" if len(of) == 1 else f"{of[0]:,} to {of[-1]:,} {factor}" for factor, of in counts.items()
    )
    return " and ".join(said) + (", by row" if any(len(of) > 1 for of in counts.values()) else "")


def intervals_in_words(covers: Sequence[Mapping[Factor, int]]) -> str:
    """How the intervals of a table were made, and over what."""
    crossed = (
        "crossed: pigeonhole bootstrap (Owen 2007) with the width of a t interval from a two-way analysis of variance"
    )
    single = "paired expanded percentile bootstrap (Hesterberg 2015)"
    method = crossed if any(len(each) > 1 for each in covers) else single
    return (
        f"Intervals: {100 * statistics.CONFIDENCE:.0f} %, over {over_in_words(covers)}, {method}"
        f" ({statistics.RESAMPLES:,} resamples, seed {statistics.SEED}). What is not named here (questions, processes,"
        " training seeds) may move the numbers by more. A single question has no interval."
    )


def _published(run: Run, spec: TableSpec, paper: Paper) -> tuple[str, ...]:
    x, percent = paper.koala.speedup_change_x, paper.koala.speedup_change_percent
    questions = run.header["questions"]["name"]
    other = spec.questions is not None and questions != spec.questions
    return (
        f"Paper: {paper.koala.citation}. Its change of +{x.low:.2f}x to +{x.high:.2f}x ({x.source}) and of"
        f" {percent.low:.2f} % to {percent.high:.2f} % ({percent.source}) is over both heads and its targets"
        f" {', '.join(paper.koala.targets)}.",
        *([f"The paper's table is on {spec.questions}; these numbers are on {questions}."] if other else []),
    )
