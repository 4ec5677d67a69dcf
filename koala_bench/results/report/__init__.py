"""One self-contained HTML page of a folder of results: what was measured, how, and what to look at twice.

In: records and figures. Out: a page that needs nothing beside it. Read ``outliers`` and ``trees`` for
what is only here.
"""

from __future__ import annotations

import base64
import json
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import cast

from jinja2 import Environment, StrictUndefined

from koala_bench.common.bundled import RECIPES
from koala_bench.common.files import write_text
from koala_bench.dialogues.questions import find_questions, questions_sha256, read_questions
from koala_bench.errors import KoalaBenchError
from koala_bench.records.reading import Run, read_run, read_runs
from koala_bench.records.schema import RunHeader
from koala_bench.records.statistics import change, excludes_zero
from koala_bench.records.summaries import VANILLA, Sample, Summary, evaluations, sample, summaries_of
from koala_bench.results.figures.bars import write_figure1
from koala_bench.results.making import Sources, drawable, make, read_table, sources_in, tabulable
from koala_bench.results.report.outliers import outliers_of
from koala_bench.results.report.trees import draw_trees
from koala_bench.results.report.where import in_blocks, lengths_by_category, lengths_by_position
from koala_bench.results.tables.published import read_table_spec
from koala_bench.results.tables.rendering import label_of, with_interval
from koala_bench.results.tables.tasks import rows_by_task
from koala_bench.training.log import GAP, agreements, read_training

_CAPTIONS = {
    "figure1": "Speedup and acceptance length of every method, with 95 % intervals.",
    "figure-depth": "Acceptance rate by depth, given that the token above was accepted.",
    "figure-layers": "Speedup and draft overhead against the number of layers K.",
    "figure-categories": "Speedup by category of question.",
    "figure-oracle": "From each method's speedup to that of perfect drafts, and of perfect drafts that take no time.",
    "figure-cost": "Acceptance length against the cost of a draft, over the number of layers K.",
    "figure-tokens": "Acceptance length against the tokens read in training.",
    "figure-training": "Training: the heads' losses, their held-out acceptance length, and the discriminators' side.",
}


_KINDS = {"lossless": True, "lossy": False}
_NAMED = 2  # methods that the fastest is not distinguishable from
_OF_ALL_METHODS = ("figure1", "figure-depth", "figure-categories", "figure-oracle")


def write_report(folder: Path, out: Path, data_dir: Path | None = None) -> Path:
    """Write the page of a folder of results; it needs nothing beside it, and no model to be made.

    Args:
        folder: with ``records.jsonl``, or with ``tasks/`` alone, whose records are taken together; records of other
            seeds and tasks and the log of the training are used where they are there.

    Raises:
        KoalaBenchError: there is no record, it is damaged or has nothing to compare.
    """
    sources = sources_in(folder)
    if sources.main is not None:
        runs: Sequence[Run] = [read_run(sources.main), *read_runs(sources.processes)]
    elif sources.tasks:
        runs = _together(read_runs(sources.tasks))
    else:
        raise KoalaBenchError(
            f"{folder} has no records.jsonl to report on, of its own or in tasks/*/.",
            "Name the folder that `reproduce` or `evaluate` wrote.",
        )
    run, chosen = runs[0], sample(runs)
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
        verdict=_verdict(chosen, summaries),
        alarms=_alarms(run, summaries),
        tables=[read_table(name, sources) for name in tabulable(sources)],
        pictures=_pictures(sources, runs, summaries),
        labels={summary.name: label_of(summary) for summary in summaries},
        drawn=run.header["acceptance"]["rule"] != "greedy",
        summaries=[summary for summary in summaries if summary.name != VANILLA],
        trees=draw_trees(run),
        outliers=outliers_of(run, questions),
        lengths=(in_blocks(lengths_by_category(chosen)), in_blocks(lengths_by_position(chosen))),
        questions_found=bool(questions),
        agreements=agreements(log),
        has_log=bool(log),
        gap=GAP,
        resolved=json.dumps(run.header["preset"]["resolved"], indent=1, ensure_ascii=False),
    )
    write_text(out, page)
    return out


def _together(runs: Sequence[Run]) -> Sequence[Run]:
    """Records of several question files as one record, or as one per process: all tasks of Table 2."""
    files = evaluations(runs)
    if len(files) == 1:
        return files[0]
    of = [processes[0].header["questions"] for processes in files]
    several = {
        "name": ", ".join(each["name"] for each in of),
        "sha256": ", ".join(each["sha256"][:12] for each in of),
        "count": sum(each["count"] for each in of),
    }
    finished = all(run.finished for run in runs)
    methods = tuple(dict.fromkeys(name for run in runs for name in run.methods))
    spec = read_table_spec(RECIPES / "table2.toml").model_copy(update={"methods": methods})
    rows, _ = rows_by_task(runs, spec)
    return [
        replace(run, header=cast(RunHeader, {**run.header, "questions": several}), finished=finished)
        for run in rows[-1].sample.runs
    ]


def _verdict(chosen: Sample, summaries: Sequence[Summary]) -> list[str]:
    """What a reader wants to know first, in a line each: the fastest method, lossy ones apart, and what KOALA changes
    and how many answers are vanilla's.
    """
    heads = sorted((each for each in summaries if each.is_measured), key=lambda each: -each.speedup.value)
    kinds = {kind: [each for each in heads if each.method["lossless"] is kept] for kind, kept in _KINDS.items()}
    lines = [_fastest(chosen, kind, among) for kind, among in kinds.items() if among]
    changes = [
        f"{each.original} {with_interval(each.change_percent, 1, sign=True)} %"
        for each in summaries
        if each.is_koala and each.is_measured and each.change_percent is not None
    ]
    exact = [each for each in summaries if each.method["lossless"]]
    compared, differing = sum(each.compared for each in exact), sum(len(each.differing) for each in exact)
    last = [f"Speed with KOALA: {', '.join(changes)}."] if changes else []
    last += [f"{compared - differing} of {compared} answers are vanilla's."] if compared else []
    return [*lines, *([" ".join(last)] if last else [])]


def _fastest(chosen: Sample, kind: str, among: Sequence[Summary]) -> str:
    """The method with the highest speedup, the first of ``among``, and those whose paired difference from it may be
    none.
    """
    best = among[0]
    close = [
        other.name
        for other in among[1:]
        if not excludes_zero(chosen.interval(change(chosen.speedup(best.name), chosen.speedup(other.name))))
    ]
    said = f"{label_of(best)}, {with_interval(best.speedup, 2)} x vanilla"
    if not close:
        return f"Fastest {kind} method: {said}."
    names = " and ".join(close if len(close) <= _NAMED else [close[0], f"{len(close) - 1} more"])
    return f"Highest {kind} speed: {said}, not distinguishable from {names}."


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


def _pictures(sources: Sources, runs: Sequence[Run], summaries: Sequence[Summary]) -> list[dict[str, str]]:
    """All figures that there are records for, drawn anew, figure 1 first; captions name the lossy methods shown."""
    lossy = [label_of(summary) for summary in summaries if not summary.method["lossless"] and summary.counted]
    among = f" Among the methods: {', '.join(lossy)}." if lossy else ""
    captions = {name: text + (among if name in _OF_ALL_METHODS else "") for name, text in _CAPTIONS.items()}
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary)
        first = write_figure1(runs, place) if sources.main is None else make("table1", sources, place)
        files = [*first, *(path for name in drawable(sources) for path in make(name, sources, place))]
        return [
            {"caption": captions[path.stem], "data": base64.b64encode(path.read_bytes()).decode("ascii")}
            for path in files
            if path.suffix == ".png"
        ]
