"""One self-contained HTML page of a folder of results: what was measured, how, and what to look at twice.

Comes in: records and figures. Goes out: a page that needs nothing beside it. Read ``outliers`` and ``trees`` for what is only here.
"""

from __future__ import annotations

import base64
import json
import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from jinja2 import Environment, StrictUndefined

from koala_bench.common.files import write_text
from koala_bench.dialogues.questions import find_questions, questions_sha256, read_questions
from koala_bench.errors import KoalaBenchError
from koala_bench.records.reading import Run, read_run, read_runs
from koala_bench.records.summaries import VANILLA, Summary, sample, summaries_of
from koala_bench.results.making import Sources, drawable, make, read_table, sources_in, tabulable
from koala_bench.results.report.outliers import outliers_of
from koala_bench.results.report.trees import draw_trees
from koala_bench.results.tables.notes import counted, draws_line, lossy_lines
from koala_bench.results.tables.rendering import label_of, with_interval
from koala_bench.training.log import GAP, agreements, read_training

_CAPTIONS = {
    "figure1": "Speedup and acceptance length of every method, with 95 % intervals.",
    "figure-depth": "Acceptance rate by depth, given that the token above was accepted.",
    "figure-layers": "Speedup and draft overhead against the number of layers K.",
    "figure-categories": "Speedup by category of question.",
    "figure-training": "Training: the heads' losses, their held-out acceptance length, and the discriminators' side.",
}


_OF_ALL_METHODS = ("figure1", "figure-depth", "figure-categories")


@dataclass(frozen=True)
class Picture:
    """A figure inside the page: PNG in base64, and what it shows."""

    caption: str
    data: str


def write_report(folder: Path, out: Path, data_dir: Path | None = None) -> Path:
    """Write the page of a folder of results; it needs nothing beside it, and no model to be made.

    Args:
        folder: with ``records.jsonl``; records of other seeds and tasks and the log of the training are used where they
            are there.
        out: the HTML file.
        data_dir: where the questions are looked for, to be shown beside the answers.

    Raises:
        KoalaBenchError: there is no record, it is damaged or has nothing to compare.
    """
    sources = sources_in(folder)
    if sources.main is None:
        raise KoalaBenchError(
            f"{folder} has no records.jsonl to report on.", "Name the folder that `reproduce` or `evaluate` wrote."
        )
    run = read_run(sources.main)
    summaries = summaries_of(sample([run, *read_runs(sources.processes)]))
    if len(summaries) < 2:
        raise KoalaBenchError(f"{run.path} has no method beside vanilla.", "Evaluate with more --methods.")
    questions = _questions(run, data_dir)
    log = read_training(sources.log) if sources.log else []
    template = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    ).from_string((resources.files("koala_bench.results.report") / "page.html.jinja").read_text(encoding="utf-8"))
    page = template.render(
        run=run,
        header=run.header,
        verdict=_verdict(run, summaries),
        alarms=_alarms(run, summaries),
        tables=[read_table(name, sources) for name in tabulable(sources)],
        pictures=_pictures(sources, summaries),
        labels={summary.name: label_of(summary) for summary in summaries},
        drawn=_is_drawn(run),
        lossy=lossy_lines(summaries, run.target),
        summaries=[summary for summary in summaries if summary.name != VANILLA],
        trees=draw_trees(run),
        outliers=outliers_of(run, questions),
        questions_found=bool(questions),
        agreements=agreements(log),
        has_log=bool(log),
        gap=GAP,
        resolved=json.dumps(run.header["preset"]["resolved"], indent=1, ensure_ascii=False),
    )
    write_text(out, page)
    return out


def _is_drawn(run: Run) -> bool:
    return run.header["acceptance"]["rule"] != "greedy"


def _verdict(run: Run, summaries: Sequence[Summary]) -> list[str]:
    """What a reader wants to know first, in two lines: the fastest method with its losslessness, and what KOALA changes."""
    heads = [each for each in summaries if each.name != VANILLA and not math.isnan(each.speedup.value)]
    best, lossy = (
        max(
            (each for each in heads if each.method["lossless"] is kept),
            key=lambda each: each.speedup.value,
            default=None,
        )
        for kept in (True, False)
    )
    if best and lossy and lossy.speedup.value <= best.speedup.value:
        lossy = None
    first = [f"The fastest {'lossless ' if lossy else ''}method is {_in_numbers(best)}."] if best else []
    if lossy:
        first.append(f"{'Faster' if best else 'No lossless method has numbers; the fastest'} is {_in_numbers(lossy)}.")
    exact = [summary for summary in summaries if summary.method["lossless"]]
    compared, differing = sum(summary.compared for summary in exact), sum(len(summary.differing) for summary in exact)
    if _is_drawn(run):
        first.append(draws_line(summaries))
    elif compared:
        first.append(f"{compared - differing} of {compared} answers are vanilla's, token by token.")
    changes = [
        f"{label_of(each)} {with_interval(change.value, change.low, change.high, 1, sign=True)} %"
        for each in heads
        if each.is_koala and (change := each.change_percent) is not None
    ]
    second = [f"Speed against the head without KOALA: {', '.join(changes)}."] if changes else []
    return [" ".join(first), *second]


def _alarms(run: Run, summaries: Sequence[Summary]) -> list[str]:
    failed = sum(len(summary.failed) for summary in summaries)
    lines = [f"{counted(failed, 'turn')} failed and {'has' if failed == 1 else 'have'} no numbers."] if failed else []
    if not run.finished:
        lines.append("The record is unfinished: its numbers will change when the evaluation goes on.")
    return lines


def _in_numbers(summary: Summary) -> str:
    speed, whole, length = summary.speedup, summary.whole_answer, summary.acceptance_length
    return (
        f"{label_of(summary)}: {speed.value:.2f}x vanilla decoding [{speed.low:.2f}, {speed.high:.2f}] ({whole.value:.2f}x"
        f" of whole answers [{whole.low:.2f}, {whole.high:.2f}]), with"
        f" {length.value:.2f} tokens per verification"
    )


def _questions(run: Run, data_dir: Path | None) -> dict[int, tuple[str, ...]]:
    """The turns of every question by id; empty where the file is not at hand or is another one."""
    wanted = run.header["questions"]
    try:
        _, path = find_questions(wanted["name"], data_dir)
        if questions_sha256(path) != wanted["sha256"]:
            return {}
        return {question.question_id: question.turns for question in read_questions(path)}
    except KoalaBenchError:
        return {}


def _pictures(sources: Sources, summaries: Sequence[Summary]) -> list[Picture]:
    """All figures that there are records for, drawn anew, figure 1 first; captions name the lossy methods shown."""
    lossy = [label_of(summary) for summary in summaries if not summary.method["lossless"] and summary.counted]
    among = f" Among the methods: {', '.join(lossy)}." if lossy else ""
    with tempfile.TemporaryDirectory() as temporary:
        files = [path for name in ("table1", *drawable(sources)) for path in make(name, sources, Path(temporary))]
        return [
            Picture(
                _CAPTIONS[path.stem] + (among if path.stem in _OF_ALL_METHODS else ""),
                base64.b64encode(path.read_bytes()).decode("ascii"),
            )
            for path in files
            if path.suffix == ".png"
        ]
