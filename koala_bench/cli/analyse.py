"""The command that reads other people's answer files: analyse."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from koala_bench.cli.app import app
from koala_bench.cli.options import DataDir
from koala_bench.errors import KoalaBenchError

if TYPE_CHECKING:
    from koala_bench.interop.traces import Trace


@app.command()
def analyse(
    files: Annotated[
        list[Path],
        typer.Argument(
            help="Answer files of FastChat, Medusa, EAGLE or Spec-Bench, or run records.", show_default=False
        ),
    ],
    baseline: Annotated[
        Path | None,
        typer.Option("--baseline", help="The file of vanilla decoding; by default the one in a file's folder."),
    ] = None,
    by_category: Annotated[bool, typer.Option("--by-category", help="A row per category of questions too.")] = False,
    questions: Annotated[
        str | None,
        typer.Option("--questions", help="Question file or name, for categories that the answers do not have."),
    ] = None,
    data_dir: DataDir = None,
    definitions: Annotated[
        bool,
        typer.Option("--definitions", help="Show the acceptance length as every project defines it, side by side."),
    ] = False,
    csv: Annotated[Path | None, typer.Option("--csv", help="Write the numbers to this file too.")] = None,
) -> None:
    """Acceptance lengths and speedups of published answer files, with intervals; needs no model.

    A second file is compared with the first, by question.

    Example: `koala-bench analyse vicuna-7b-v1.3-eagle-float16-temperature-0.0.jsonl
        vicuna-7b-v1.3-vanilla-float16-temp-0.0.jsonl`.
    """
    from koala_bench.common.files import write_text
    from koala_bench.dialogues.questions import find_questions, read_questions
    from koala_bench.interop.traces import read_traces, with_categories
    from koala_bench.results.analysis import analyse, by_definition, to_csv, to_text

    seen: set[Path] = set()
    for path in files:
        if path.resolve() in seen:
            raise KoalaBenchError(f"{path} is named twice.", "Name each file once.")
        seen.add(path.resolve())
    known = (
        {}
        if questions is None
        else {each.question_id: each.category for each in read_questions(find_questions(questions, data_dir)[1])}
    )
    traces, chosen = [], None
    for path in files:
        named = baseline is not None and path.resolve() == baseline.resolve()
        found = [with_categories(trace, known) for trace in read_traces(path, vanilla=named)]
        traces += found
        chosen = _baseline(path, found) if named else chosen
    if baseline is not None and chosen is None:
        found = [with_categories(trace, known) for trace in read_traces(baseline, vanilla=True)]
        chosen = _baseline(baseline, found)
        traces.insert(0, chosen)
    if by_category and not any(turn.category is not None for trace in traces for turn in trace.turns):
        raise KoalaBenchError(
            f"{files[0]} has no categories.", "Name its questions with --questions, or leave --by-category out."
        )
    rows = analyse(traces, chosen, by_category)
    if csv is not None:
        write_text(csv, to_csv(rows))
    print(to_text(rows), end="")
    if definitions:
        print("\n" + by_definition(traces), end="")


def _baseline(path: Path, found: list[Trace]) -> Trace:
    """The trace of the file of --baseline: its only one, or the vanilla one of a record."""
    from koala_bench.interop.traces import is_vanilla

    fit = found if len(found) == 1 else [trace for trace in found if is_vanilla(trace)]
    if len(fit) != 1:
        raise KoalaBenchError(f"The record {path} has no vanilla decoding.", "Name another --baseline.")
    return fit[0]
