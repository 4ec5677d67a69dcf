"""Table 1 with its figure from run records: what ``table``, ``reproduce`` and ``verify`` make alike."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from koala_bench.errors import KoalaBenchError
from koala_bench.figures import write_figure1
from koala_bench.published import read_paper, read_table_spec
from koala_bench.records import Run
from koala_bench.summaries import VANILLA
from koala_bench.tables import write_table1

RECIPES = Path(__file__).parent.parent / "reproduce"


def make_table1(runs: Sequence[Run], out: Path, spec: Path = RECIPES / "table1.toml", paper: Path = RECIPES / "paper.toml") -> list[Path]:
    """Write Table 1 (Markdown, LaTeX, CSV) and its figure (PDF, PNG); returns the files.

    Args:
        spec: what the table shows. Methods of a record that it does not name stand below the others.
        paper: published values.

    Raises:
        KoalaBenchError: a record has nothing to compare, or see ``write_table1``.
    """
    wanted = read_table_spec(spec)
    others = [name for run in runs for name in run.methods if name not in wanted.methods]
    wanted = wanted.model_copy(update={"methods": (*wanted.methods, *dict.fromkeys(others))})
    for run in runs:  # before anything is written: a table without its figure helps nobody
        if set(run.methods) <= {VANILLA}:
            raise KoalaBenchError(f"{run.path} has no method beside vanilla.", "Evaluate with more --methods.")
    return [*write_table1(runs, out, wanted, read_paper(paper)), *write_figure1(runs, out, wanted.methods)]
