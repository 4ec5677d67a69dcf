"""One self-contained HTML page of a folder of results: what was measured, how, and what to look at twice.

In: records and figures. Out: a page that needs nothing beside it. Read ``outliers`` and ``trees`` for
what is only here.
"""

from __future__ import annotations

import base64
import json
import tempfile
from collections.abc import Sequence
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
from koala_bench.results.report.where import lengths_by_category, lengths_by_position
from koala_bench.results.tables.rendering import label_of, with_interval
from koala_bench.training.log import GAP, agreements, read_training

_CAPTIONS = {
    "figure1": "Speedup and acceptance length of every method, with 95 % intervals.",
    "figure-depth": "Acceptance rate by depth, given that the token above was accepted.",
    "figure-layers": "Speedup and draft overhead against the number of layers K.",
    "figure-categories": "Speedup by category of question.",
    "figure-oracle": "From each method's speedup to that of perfect drafts, and of perfect drafts that take no time.",
    "figure-cost": "Acceptance length against the cost of a draft, over the number of layers K.",
    "figure-training": "Training: the heads' losses, their held-out acceptance length, and the discriminators' side.",
}


_KINDS = {"lossless": True, "lossy": False}
_OF_ALL_METHODS = ("figure1", "figure-depth", "figure-categories", "figure-oracle")


def write_report(folder: Path, out: Path, data_dir: Path | None = None) -> Path:
    """Write the page of a folder of results; it needs nothing beside it, and no model to be made.

    Args:
        folder: with ``records.jsonl``; records of other seeds and tasks and the log of the training are used where they
            are there.

    Raises:
        KoalaBenchError: there is no record, it is damaged or has nothing to compare.
    """
    sources = sources_in(folder)
    if sources.main is None:
        raise KoalaBenchError(
            f"{folder} has no records.jsonl to report on.", "Name the folder that `reproduce` or `evaluate` wrote."
        )
    run = read_run(sources.main)
    chosen = sample([run, *read_runs(sources.processes)])
    summaries = summaries_of(chosen)
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
        verdict=_verdict(summaries),
        alarms=_alarms(run, summaries),
        tables=[read_table(name, sources) for name in tabulable(sources)],
        pictures=_pictures(sources, summaries),
        labels={summary.name: label_of(summary) for summary in summaries},
        drawn=run.header["acceptance"]["rule"] != "greedy",
        summaries=[summary for summary in summaries if summary.name != VANILLA],
        trees=draw_trees(run),
        outliers=outliers_of(run, questions),
        lengths=(lengths_by_category(chosen), lengths_by_position(chosen)),
        questions_found=bool(questions),
        agreements=agreements(log),
        has_log=bool(log),
        gap=GAP,
        resolved=json.dumps(run.header["preset"]["resolved"], indent=1, ensure_ascii=False),
    )
    write_text(out, page)
    return out


def _verdict(summaries: Sequence[Summary]) -> list[str]:
    """What a reader wants to know first: the fastest methods, losslessness, what KOALA changes, and what is missing."""
    heads = [each for each in summaries if each.is_measured]
    kinds = {kind: [each for each in heads if each.method["lossless"] is kept] for kind, kept in _KINDS.items()}
    lines = [
        f"Fastest {kind} method: {label_of(best)}, {with_interval(best.speedup, 2)} x vanilla decoding,"
        f" {with_interval(best.whole_answer, 2)} x of whole answers, {best.acceptance_length.value:.2f} tokens per"
        " verification."
        for kind, among in kinds.items()
        if (best := max(among, key=lambda each: each.speedup.value, default=None))
    ]
    exact = [each for each in summaries if each.method["lossless"]]
    compared, differing = sum(each.compared for each in exact), sum(len(each.differing) for each in exact)
    if compared:
        lines.append(f"{compared - differing} of {compared} answers are vanilla's, token by token.")
    changes = [
        f"{label_of(each)} {with_interval(each.change_percent, 1, sign=True)} %"
        for each in heads
        if each.is_koala and each.change_percent is not None
    ]
    return [" ".join(lines), *([f"Speed against the head without KOALA: {', '.join(changes)}."] if changes else [])]


def _alarms(run: Run, summaries: Sequence[Summary]) -> list[str]:
    failed = sum(len(summary.failed) for summary in summaries)
    lines = [f"Failed turns, which have no numbers: {failed}."] if failed else []
    return lines if run.finished else [*lines, "The record is unfinished: its numbers will change."]


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


def _pictures(sources: Sources, summaries: Sequence[Summary]) -> list[dict[str, str]]:
    """All figures that there are records for, drawn anew, figure 1 first; captions name the lossy methods shown."""
    lossy = [label_of(summary) for summary in summaries if not summary.method["lossless"] and summary.counted]
    among = f" Among the methods: {', '.join(lossy)}." if lossy else ""
    captions = {name: text + (among if name in _OF_ALL_METHODS else "") for name, text in _CAPTIONS.items()}
    with tempfile.TemporaryDirectory() as temporary:
        files = [path for name in ("table1", *drawable(sources)) for path in make(name, sources, Path(temporary))]
        return [
            {"caption": captions[path.stem], "data": base64.b64encode(path.read_bytes()).decode("ascii")}
            for path in files
            if path.suffix == ".png"
        ]
