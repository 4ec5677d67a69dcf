"""Commands that judge: check, audit, parity."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from koala_bench.cli.app import GATE, START, command
from koala_bench.cli.options import DECODING, Heads, Shared, argument, method_names, option, typed_command
from koala_bench.common.progress import log_line
from koala_bench.errors import KoalaBenchError


@command(START)
def check(
    baseline: Annotated[Path, argument("The accepted record, or a folder with one per training seed.")],
    records: Annotated[list[Path], argument("The new record; of retrained heads one per seed, or a folder of them.")],
    margin: Annotated[
        float | None,
        option("--margin", "Loss of acceptance length to accept, in percent; 3 by default.", min=0.0, max=50.0),
    ] = None,
    junit: Annotated[Path | None, option("--junit", "Write JUnit XML here, one test case per method.")] = None,
    markdown: Annotated[
        Path | None, option("--markdown", "Write the report here, for a comment on a pull request.")
    ] = None,
    update: Annotated[bool, option("--update", "Accept the records as the new baseline and say what changed.")] = False,
) -> None:
    """Hold the acceptance length of new records against a baseline. Exit code 0, 1 on a regression, 2 on bad input.

    With the same head weights on both sides the questions' own step counts are compared; of retrained heads the spread
    between at least three seeds of the baseline widens the margin. Speedups are shown and never decide.

    Example: `koala-bench check results/regression/baseline.jsonl results/runs/new/records.jsonl --junit check.xml`.
    """
    from koala_bench.common.files import write_texts
    from koala_bench.gate.baseline import accept, records_in
    from koala_bench.gate.junit import headline, to_junit, to_report
    from koala_bench.gate.regression import MARGIN
    from koala_bench.gate.regression import check as compare
    from koala_bench.records.reading import read_runs

    new = read_runs([path for given in records for path in records_in(given)])
    if update:
        if junit or markdown or margin is not None:
            raise KoalaBenchError(
                "--update accepts the records without a verdict.",
                "Leave out --margin, --junit and --markdown, or check first.",
            )
        print("\n".join(accept(baseline, new)))
        return
    gate = compare(read_runs(records_in(baseline)), new, MARGIN if margin is None else margin)
    report = to_report(gate)
    write_texts({place: text for place, text in ((junit, to_junit(gate)), (markdown, report)) if place is not None})
    print(report)
    log_line(headline(gate) + ".")
    raise typer.Exit(0 if gate.passed else 1)


@command(GATE, *DECODING, "max_new_tokens", "limit", "data_dir", "out", "quick")
def audit(
    options: Shared,
    tasks: Annotated[
        str | None,
        option("--tasks", "Comma-separated question sets, or all of the data folder; the preset's by default."),
    ] = None,
    heads: Heads = None,
) -> None:
    """Compare every answer with vanilla's and judge each difference: numerical tie, or defect. Exit code 1 on a defect.

    Example: `koala-bench audit --dtype float64 --tasks mt_bench,gsm8k --data-dir data`.
    """
    from koala_bench.runs.audit import audit, questions_of

    chosen = options.resolved()
    names = method_names(chosen, options.methods)
    if names == ["vanilla"] or "vanilla" not in names:
        raise KoalaBenchError(
            "An audit compares methods with vanilla.", "Name vanilla and at least one other method in --methods."
        )
    if chosen.evaluation.temperature:
        raise KoalaBenchError(
            "An audit compares answers token by token, which needs greedy decoding.",
            "Leave evaluation.temperature at 0.",
        )
    task_questions = questions_of(chosen, tasks, options.data_dir)
    folder = options.folder("audit", chosen)
    found = options.heads(heads, chosen)
    text, clean = audit(chosen, options.preset, names, task_questions, found, folder, options.data_dir, typed_command())
    print(text)
    log_line(f"Wrote audit.md and the records to {folder}.")
    raise typer.Exit(0 if clean else 1)


@command(GATE)
def parity(folder: Annotated[Path, argument("Fixtures made with the official code.")]) -> None:
    """Compare heads, trees, losses and decoding with fixtures of the official Medusa and EAGLE code. Exit code 0, 1."""
    from koala_bench import parity as checks

    found = checks.check(folder)
    print(checks.report(found))
    raise typer.Exit(0 if checks.ok(found) else 1)
