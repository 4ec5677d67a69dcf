"""Commands that read records and answers: table, figure, report, analyse, verify."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from koala_bench.cli.app import INSPECT, command
from koala_bench.cli.options import Shared, argument, option
from koala_bench.common.bundled import RECIPES
from koala_bench.errors import KoalaBenchError


@command(INSPECT)
def table(
    records: Annotated[
        list[Path],
        argument("Run records: one per target; for Table 2 per question file, for Table 3 per training seed."),
    ],
    spec: Annotated[
        Path,
        option(
            "--spec", "table1, table2, table3, leaderboard, table-layers, -objectives, -vocabulary, or a .toml file."
        ),
    ] = Path("table1"),
    paper: Annotated[Path, option("--paper", "Published values.")] = RECIPES / "paper.toml",
    columns: Annotated[
        str | None,
        option("--columns", "Comma-separated: the only columns, in this order, e.g. method,speedup; needs --out."),
    ] = None,
    out: Annotated[Path | None, option("--out", "Folder; the first record's by default.")] = None,
) -> None:
    """Make a table (Markdown, LaTeX, CSV), with Table 1 its figure, from run records; needs no model.

    Example: `koala-bench table results/runs/table3-tiny/records.jsonl --spec table3`.
    """
    from koala_bench.records.reading import read_runs
    from koala_bench.results.making import make_table, recipe_of

    recipe = recipe_of(spec)
    picked = None if columns is None else _picked(columns, records[0].parent, out)
    for path in make_table(read_runs(records), out or records[0].parent, recipe, paper, picked):
        print(path)


def _picked(columns: str, folder: Path, out: Path | None) -> list[str]:
    """The columns of ``--columns``.

    Raises:
        KoalaBenchError: there is none, one stands twice, or the table would replace that of the record's folder.
    """
    picked = [name.strip() for name in columns.split(",") if name.strip()]
    if not picked:
        raise KoalaBenchError("--columns names no column.", "Name some, e.g. --columns method,speedup.")
    twice = [name for name in dict.fromkeys(picked) if picked.count(name) > 1]
    if twice:
        raise KoalaBenchError(f"--columns: {', '.join(twice)} more than once.", "Name each column once.")
    if out is None:  # `verify` would call it different
        raise KoalaBenchError(
            f"--columns without --out would replace the whole table in {folder}.", "Name another folder with --out."
        )
    return picked


@command(INSPECT)
def figure(
    name: Annotated[str, argument("depth, layers, categories, training, oracle, cost, tokens, vocabulary, or all.")],
    paths: Annotated[list[Path], argument("Run records, for training its training.jsonl; or a folder of results.")],
    out: Annotated[Path | None, option("--out", "Folder; that of the first path by default.")] = None,
) -> None:
    """Draw a figure (PDF, PNG) from records; needs no model. Of a folder, `all` draws every figure that it has the
    records for.

    Example: `koala-bench figure categories results/all-tiny`.
    """
    from koala_bench.results.making import FIGURES, drawable, make, make_figure, sources_in

    if len(paths) == 1 and paths[0].is_dir():
        sources = sources_in(paths[0])
        for each in drawable(sources) if name == "all" else [name]:
            for path in make(each, sources, out or paths[0]):
                print(path)
        return
    if name == "all":
        raise KoalaBenchError(
            "All figures are drawn from a folder of results.", f"Name one folder, or one of {', '.join(FIGURES)}."
        )
    for path in make_figure(name, paths, out or paths[0].parent):
        print(path)


@command(INSPECT, "data_dir")
def report(
    options: Shared,
    folder: Annotated[
        Path, argument("Folder with records.jsonl, its own or those of tasks/, as `reproduce` or `evaluate` wrote it.")
    ],
    out: Annotated[Path | None, option("--out", "The HTML file; report.html in the folder by default.")] = None,
) -> None:
    """Write one HTML page that needs nothing beside it: tables, figures, losslessness, draft trees, outliers,
    environment.

    Example: `koala-bench report results/all-tiny --out report.html`.
    """
    from koala_bench.results.report import write_report

    print(write_report(folder, out or folder / "report.html", options.data_dir))


@command(INSPECT, "data_dir")
def analyse(
    options: Shared,
    files: Annotated[
        list[Path],
        argument("Answer files of FastChat, Medusa, EAGLE or Spec-Bench, or run records.", show_default=False),
    ],
    baseline: Annotated[
        Path | None, option("--baseline", "The file of vanilla decoding; by default the one in a file's folder.")
    ] = None,
    by_category: Annotated[bool, option("--by-category", "Also one row per category of questions.")] = False,
    questions: Annotated[
        str | None, option("--questions", "Question file or name, for categories that the answers do not have.")
    ] = None,
    definitions: Annotated[
        bool, option("--definitions", "Show the acceptance length as every project defines it, side by side.")
    ] = False,
    csv: Annotated[Path | None, option("--csv", "Write the numbers to this file too.")] = None,
) -> None:
    """Acceptance lengths and speedups of published answer files, with intervals; needs no model.

    A second file is compared with the first, by question.

    Example: `koala-bench analyse vicuna-7b-v1.3-eagle-float16-temperature-0.0.jsonl
        vicuna-7b-v1.3-vanilla-float16-temp-0.0.jsonl`.
    """
    from koala_bench.common.files import write_text
    from koala_bench.dialogues.questions import find_questions, read_questions
    from koala_bench.interop.traces import read_all
    from koala_bench.results.answers.numbers import analyse
    from koala_bench.results.answers.pages import by_definition, to_csv, to_text

    known = {}
    if questions is not None:
        with_categories = read_questions(find_questions(questions, options.data_dir)[1])
        known = {each.question_id: each.category for each in with_categories}
    traces, chosen = read_all(files, baseline, known)
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


@command(INSPECT, "data_dir")
def verify(
    options: Shared,
    folder: Annotated[Path, argument("Folder with records.jsonl and what was made from it, or of such folders.")],
    update: Annotated[
        bool, option("--update", "First regenerate tables, figures and pages; records stay unchanged.")
    ] = False,
) -> None:
    """Recompute the hashes and tables of results and compare them with their records: every file of one folder, or a
    line per folder below, those without a record too. Exit code 0; 1 if anything differs; 2 if a record is damaged.

    Example: `koala-bench verify results`.
    """
    from koala_bench.results.integrity import verify as checked
    from koala_bench.results.integrity import verify_below
    from koala_bench.results.making import sources_in

    alone = bool(sources_in(folder).records) or not folder.is_dir()
    if update or not alone:
        makers = {"sweep.jsonl": _sweep_pages, "device-report.json": _device_pages}
        codes = {"matches": 0, "no record": 0, "differs": 1, "damaged": 2}
        worst = 0
        for each in verify_below(folder, options.data_dir, makers, update):
            print(f"{each.state:<10}{each.folder!s:<34} {each.detail}", flush=True)
            worst = max(worst, codes[each.state])
        raise typer.Exit(worst)
    run, checks = checked(folder, options.data_dir)
    for check in checks:
        print(f"{check.state:<10}{check.subject:<34} {check.detail}")
    code = run.header["code"]
    commit = f"{code['commit'] or 'unknown'}{' with uncommitted changes' if code['dirty'] else ''}"
    print(f"Measured {run.header['created']} on {run.header['environment']['cpu']}, commit {commit}.")
    raise typer.Exit(1 if any(check.state == "differs" for check in checks) else 0)


def _sweep_pages(log: Path, out: Path) -> list[Path]:
    from koala_bench.sweeps.results import read_sweep, write_pages

    return write_pages(read_sweep(log), out)


def _device_pages(log: Path, out: Path) -> list[Path]:
    from koala_bench.common.files import write_text
    from koala_bench.costs.device_report import in_words, read_report
    from koala_bench.costs.figures import write_nodes
    from koala_bench.results.tables.published import read_paper

    report = read_report(log)
    write_text(out / "device-report.md", in_words(report, read_paper(RECIPES / "paper.toml")))
    return [out / "device-report.md", *write_nodes(report.models, out)]
