"""The command that holds an acceptance length against a baseline: check."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from koala_bench.cli.app import app
from koala_bench.common.progress import say
from koala_bench.errors import KoalaBenchError

if TYPE_CHECKING:
    from koala_bench.records.reading import Run


@app.command()
def check(
    baseline: Annotated[Path, typer.Argument(help="The accepted record, or a folder with one per training seed.")],
    records: Annotated[
        list[Path], typer.Argument(help="The new record; of retrained heads one per seed, or a folder of them.")
    ],
    margin: Annotated[
        float | None,
        typer.Option(
            "--margin", min=0.0, max=50.0, help="Loss of acceptance length to accept, in percent; 3 by default."
        ),
    ] = None,
    junit: Annotated[
        Path | None, typer.Option("--junit", help="Write JUnit XML here, one test case per method.")
    ] = None,
    markdown: Annotated[
        Path | None, typer.Option("--markdown", help="Write the report here, for a comment on a pull request.")
    ] = None,
    update: Annotated[
        bool, typer.Option("--update", help="Accept the records as the new baseline and say what changed.")
    ] = False,
) -> None:
    """Hold the acceptance length of new records against a baseline. Exit code 0, 1 on a regression, 2 on bad input.

    With the same head weights on both sides the questions' own step counts are compared; of retrained heads the spread
    between at least three seeds of the baseline widens the margin. Speedups are shown and never decide.

    Example: `koala-bench check results/regression/baseline.jsonl results/runs/new/records.jsonl --junit check.xml`.
    """
    from koala_bench.common.files import write_texts
    from koala_bench.gate.comparable import consistent
    from koala_bench.gate.junit import headline, to_junit, to_report
    from koala_bench.gate.regression import MARGIN
    from koala_bench.gate.regression import check as compare
    from koala_bench.records.reading import read_runs

    new = read_runs([path for given in records for path in _records_in(given)])
    if update:
        if junit or markdown or margin is not None:
            raise KoalaBenchError(
                "--update accepts the records without a verdict.",
                "Leave out --margin, --junit and --markdown, or check first.",
            )
        consistent(new)
        _accept(baseline, new)
        return
    gate = compare(read_runs(_records_in(baseline)), new, MARGIN if margin is None else margin)
    report = to_report(gate)
    write_texts({place: text for place, text in ((junit, to_junit(gate)), (markdown, report)) if place is not None})
    print(report)
    say(headline(gate) + ".")
    raise typer.Exit(0 if gate.passed else 1)


def _records_in(path: Path) -> list[Path]:
    """The file itself, or the .jsonl files of a folder by name."""
    if not path.is_dir():
        return [path]
    found = sorted(each for each in path.glob("*.jsonl") if each.is_file())
    if not found:
        raise KoalaBenchError(
            f"The folder {path} holds no record: no file in it ends in .jsonl.",
            "Name the .jsonl file that an evaluation wrote.",
        )
    return found


def _accept(baseline: Path, new: Sequence[Run]) -> None:
    """Copy the records over the baseline, each file atomically, and say what changed.

    In a folder the files of the old baseline go last, so that a kill leaves too many records rather than too few; the
    same command then finishes the work.
    """
    from koala_bench.common.files import replacing
    from koala_bench.gate.regression import describe_update
    from koala_bench.records.reading import read_runs

    if len(new) > 1 and baseline.is_file():
        raise KoalaBenchError(
            f"{baseline} is a file, but {len(new)} records are to be the baseline.", "Name a folder as the baseline."
        )
    folder = len(new) > 1 or baseline.is_dir()
    stale = sorted(baseline.glob("*.jsonl")) if baseline.is_dir() else [baseline] if baseline.exists() else []
    try:
        old = read_runs(stale)
    except KoalaBenchError as error:
        say(f"The old baseline cannot be read, so what changed is not known: {error.message}")
        old = []
    changes = describe_update(old, new)
    places = [
        baseline / f"seed-{run.training_seed}-{run.header['run_id'][:8]}.jsonl" if folder else baseline for run in new
    ]
    for run, place in zip(new, places, strict=True):
        with replacing(place) as temporary:
            shutil.copyfile(run.path, temporary)
    for path in stale:
        if path not in places:
            path.unlink()
    print("\n".join([f"{baseline} now holds {len(new)} record{'' if len(new) == 1 else 's'}.", *changes]))
