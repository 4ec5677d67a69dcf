"""One self-contained HTML page of a folder of results: what was measured, how, and what to look at twice.

Comes in: records and figures. Goes out: a page that needs nothing beside it. Read ``outliers`` and ``trees`` for what is only here.
"""

from __future__ import annotations

import base64
import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from jinja2 import Environment, StrictUndefined

from koala_bench.errors import KoalaBenchError
from koala_bench.common.files import write_text
from koala_bench.results.tables.notes import counted, draws_line, lossy_lines
from koala_bench.dialogues.questions import find_questions, questions_sha256, read_questions
from koala_bench.records.reading import Run, read_run
from koala_bench.results.tables.rendering import label_of
from koala_bench.results.report.outliers import outliers_of
from koala_bench.results.report.trees import draw_trees
from koala_bench.results.making import drawable, make, read_table, sources_in, tabulable
from koala_bench.records.summaries import VANILLA, Summary, summarise
from koala_bench.training.log import GAP, agreements, read_training

_CAPTIONS = {
    "figure1": "Speedup and acceptance length of every method, with 95 % intervals.",
    "figure-depth": "Acceptance rate by depth, given that the token above was accepted.",
    "figure-layers": "Speedup and draft overhead against the number of layers K.",
    "figure-categories": "Speedup by category of question.",
    "figure-training": "Training: the heads' losses, their held-out acceptance length, and the discriminators' side.",
    "figure-prediction": "Speedup predicted from acceptance length and step times, against the measured one.",
}


_OF_ALL_METHODS = ("figure1", "figure-depth", "figure-categories", "figure-prediction")


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
    summaries = summarise(run)
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
        headline=_headline(run, summaries),
        tables=[read_table(name, sources) for name in tabulable(sources)],
        pictures=_pictures(folder, summaries),
        labels={summary.name: label_of(summary) for summary in summaries},
        drawn=_is_drawn(run),
        lossy=lossy_lines(summaries, run.header["target"]["name"]),
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


def _headline(run: Run, summaries: Sequence[Summary]) -> list[str]:
    """What a reader wants to know first, in sentences."""
    heads = [
        summary for summary in summaries if summary.name != VANILLA and summary.speedup.value == summary.speedup.value
    ]
    lines = []
    fastest = {
        kept: max((s for s in heads if s.method["lossless"] is kept), key=lambda s: s.speedup.value, default=None)
        for kept in (True, False)
    }
    best, lossy = fastest[True], fastest[False]
    if best and lossy and lossy.speedup.value <= best.speedup.value:
        lossy = None
    if best:
        lines.append(f"The fastest {'lossless ' if lossy else ''}method is {_in_numbers(best)}.")
    if lossy:
        lines.append(f"{'Faster' if best else 'No lossless method has numbers; the fastest'} is {_in_numbers(lossy)}.")
    exact = [summary for summary in summaries if summary.method["lossless"]]
    compared, differing = sum(summary.compared for summary in exact), sum(len(summary.differing) for summary in exact)
    if _is_drawn(run):
        lines.append(draws_line(summaries))
    elif compared:
        lines.append(f"{compared - differing} of {compared} answers are vanilla's, token by token.")
    failed = sum(len(summary.failed) for summary in summaries)
    if failed:
        lines.append(f"{counted(failed, 'turn')} failed and {'has' if failed == 1 else 'have'} no numbers.")
    if not run.finished:
        lines.append("The record is unfinished: its numbers will change when the evaluation goes on.")
    return lines


def _in_numbers(summary: Summary) -> str:
    speed, length = summary.speedup, summary.acceptance_length
    return (
        f"{label_of(summary)}: {speed.value:.2f}x vanilla decoding [{speed.low:.2f}, {speed.high:.2f}], with"
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


def _pictures(folder: Path, summaries: Sequence[Summary]) -> list[Picture]:
    """All figures that the folder has the records for, drawn anew; captions name the lossy methods that are shown."""
    sources = sources_in(folder)
    lossy = [label_of(summary) for summary in summaries if not summary.method["lossless"] and summary.counted]
    among = f" Among the methods: {', '.join(lossy)}." if lossy else ""
    captions = {name: caption + (among if name in _OF_ALL_METHODS else "") for name, caption in _CAPTIONS.items()}
    with tempfile.TemporaryDirectory() as temporary:
        files = [path for name in ("table1", *drawable(sources)) for path in make(name, sources, Path(temporary))]
        return [
            Picture(captions[path.stem], base64.b64encode(path.read_bytes()).decode("ascii"))
            for path in files
            if path.suffix == ".png"
        ]
