"""The leaderboard: a row per method and a column per task, the published rows below, and what a lossy or sampled method
is called.
"""

from __future__ import annotations

import csv
import io
from pathlib import Path

import pytest

from koala_bench.records.reading import Run, read_run
from koala_bench.records.schema import TurnLine
from koala_bench.results.tables.building import set_table, write_table
from koala_bench.results.tables.published import TableSpec, read_paper, read_table_spec
from tests.results.tables.test_tasks import CATEGORIES, spec_bench
from tests.support.markdown import table_rows, table_under
from tests.support.synthetic_run import make_header, write_run

REPRODUCE = Path(__file__).parents[3] / "reproduce"
PAPER = read_paper(REPRODUCE / "paper.toml")


@pytest.fixture
def spec() -> TableSpec:
    return read_table_spec(REPRODUCE / "leaderboard.toml")


def sampled(path: Path, lossy: str = "medusa") -> Run:
    """A run at temperature 0.7 in which one method accepts what is typical."""
    header = make_header()
    header["questions"] = {"name": "spec_bench", "sha256": "77" * 32, "count": 8}
    header["acceptance"] = {"rule": "speculative sampling", "temperature": 0.7, "top_k": 40, "top_p": 0.9}
    for method in header["methods"]:
        if method["name"] == lossy:
            method["lossless"], method["typical"] = False, {"threshold": 0.09, "alpha": 0.3}

    def change(turn: TurnLine) -> TurnLine:
        far = {"distance": 0.25 if turn["turn"] else 0.35} if turn["method"] == lossy else {}
        return turn | {
            "category": CATEGORIES[turn["question_id"]],
            "new_token_ids": [turn["question_id"]] * len(turn["new_token_ids"] or []),
            **far,
        }  # type: ignore[return-value]

    return read_run(write_run(path, change, header=header))


def test_a_cell_is_that_of_the_table_by_task(tmp_path: Path, spec: TableSpec) -> None:
    run = spec_bench(tmp_path / "s.jsonl")
    board = set_table([run], spec, PAPER)
    by_task = set_table([run], read_table_spec(REPRODUCE / "table2.toml"), PAPER)
    assert board.grid.headings[:3] == ["Method", "Multi-turn conversation", "Translation"]
    assert board.grid.headings[-3:] == ["Acceptance length τ", "Whole answer (x)", "Overall speedup (x)"]
    assert [row[0] for row in board.grid.rows] == ["vanilla", "medusa", "medusa+koala", "eagle", "eagle+koala"]
    place = by_task.grid.headings.index("Speedup (x)")
    speedups = {(row[0].capitalize(), row[1]): row[place] for row in by_task.grid.rows}
    whole = dict(board.further)["Speedup by task, with intervals"]
    for row, with_intervals in zip(board.grid.rows, whole.rows, strict=True):
        for heading, cell, full in zip(board.grid.headings[1:-3], row[1:-3], with_intervals[1:], strict=True):
            assert full == speedups[heading, row[0]]
            assert cell == full.partition(" ")[0]
        assert row[-1] == speedups["All tasks", row[0]]
    best = {column: board.grid.rows[row][0] for row, column in board.grid.best}
    assert set(best) == {*range(1, len(board.grid.headings) - 3), len(board.grid.headings) - 1}
    assert set(best.values()) == {"eagle+koala"}


def test_intervals_are_over_the_questions_of_all_tasks_in_the_latex_and_of_each_in_the_markdown(
    tmp_path: Path, spec: TableSpec
) -> None:
    """The smallest task has two questions, and every interval of the LaTeX is over all eight."""
    run = spec_bench(tmp_path / "s.jsonl")
    by_task = read_table_spec(REPRODUCE / "table2.toml")
    for table, printed in ((spec, "over 8 questions."), (by_task, "over 2 to 8 questions, by row.")):
        markdown, latex, _ = (path.read_text(encoding="utf-8") for path in write_table([run], tmp_path, table, PAPER))
        assert printed in latex and "over 2 to 8 questions, by row, paired" in markdown


def test_changes_by_task_are_those_of_the_csv(tmp_path: Path, spec: TableSpec) -> None:
    board = set_table([spec_bench(tmp_path / "s.jsonl")], spec, PAPER)
    table = dict(board.further)["Change against the original head: speedup (x)"]
    assert [row[0] for row in table.rows] == ["medusa+koala", "eagle+koala"]
    changes = {(row["task"].capitalize(), row["method"]): row["speedup_change_x"] for _, row in board.frame.iterrows()}
    for row in table.rows:
        for heading, cell in zip(table.headings[1:], row[1:], strict=True):
            task = heading.replace("Overall", "All tasks")
            assert float(cell.partition(" ")[0]) == pytest.approx(changes[task, row[0]], abs=5e-4)


def test_the_files_hold_every_number_and_the_published_rows(tmp_path: Path, spec: TableSpec) -> None:
    files = write_table([spec_bench(tmp_path / "s.jsonl")], tmp_path, spec, PAPER)
    assert [path.name for path in files] == ["leaderboard.md", "leaderboard.tex", "leaderboard.csv"]
    markdown, latex, table = (path.read_text(encoding="utf-8") for path in files)
    rows = list(csv.DictReader(io.StringIO(table)))
    assert {row["task"] for row in rows} == {
        "multi-turn conversation",
        "translation",
        "question answering",
        "retrieval-augmented generation",
        "all tasks",
    }
    assert all(float(row["speedup_low"]) <= float(row["speedup"]) <= float(row["speedup_high"]) for row in rows)
    assert r"\label{tab:leaderboard}" in latex
    below = [row for row in table_rows(markdown) if row[-1] == "hemingkx/Spec-Bench Leaderboard.md"]
    assert {row[0] for row in below} == {"SpS", "PLD", "Medusa", "Hydra", "EAGLE", "EAGLE2", "EAGLE3"}
    for claim in (claim for claim in (*PAPER.leaderboard, *PAPER.by_task) if claim.source.endswith("Leaderboard.md")):
        (line,) = [line for line in below if line[:3] == [claim.system, claim.target, claim.device]]
        assert line[3] == f"{claim.speedup['multi-turn conversation']:.2f}"
        assert line[-3:-1] == [f"{claim.acceptance_length:.2f}", f"{claim.speedup['all tasks']:.2f}"]


def test_the_published_columns_stand_in_the_order_of_the_measured_ones(tmp_path: Path, spec: TableSpec) -> None:
    board = set_table([spec_bench(tmp_path / "s.jsonl")], spec, PAPER)
    published = dict(board.further)["Published elsewhere: speedup (x), not measured here"].headings
    measured = [heading.replace("Overall speedup (x)", "All tasks") for heading in board.grid.headings[1:]]
    measured.remove("Whole answer (x)")  # of which nothing is published here
    assert [heading for heading in published if heading in measured] == measured  # that knows more tasks


def test_a_lossy_method_is_called_so_with_its_distance(tmp_path: Path, spec: TableSpec) -> None:
    run = sampled(tmp_path / "s.jsonl")
    markdown, _, table = (path.read_text(encoding="utf-8") for path in write_table([run], tmp_path, spec, PAPER))
    assert "medusa (lossy, total variation 0.30)" in [row[0] for row in table_rows(markdown)]
    assert markdown.startswith("# Leaderboard: speedup by method and task, tiny on spec_bench, temperature 0.7\n")
    assert "- Lossy, by typical acceptance: medusa (threshold 0.09, \N{GREEK SMALL LETTER ALPHA} 0.3)." in markdown
    assert "speculative sampling, temperature 0.7, top-k 40, top-p 0.9" in markdown
    rows = {row["method"]: row for row in csv.DictReader(io.StringIO(table)) if row["task"] == "all tasks"}
    assert (rows["medusa"]["lossless"], float(rows["medusa"]["total_variation"])) == ("false", pytest.approx(0.3))
    assert (rows["eagle"]["lossless"], rows["eagle"]["total_variation"]) == ("true", "")


def test_draws_are_not_held_against_vanillas(tmp_path: Path, spec: TableSpec) -> None:
    markdown = write_table([sampled(tmp_path / "s.jsonl")], tmp_path, spec, PAPER)[0].read_text(encoding="utf-8")
    assert "differ from vanilla's" not in markdown
    assert {row["Equal answers"] for row in table_under(markdown, "More of each method, over all tasks")} == {
        "\N{EN DASH}"
    }


def test_published_orders_are_held_against_the_measured_ones(tmp_path: Path, spec: TableSpec) -> None:
    """In the synthetic run EAGLE accepts more than Medusa and is faster, as is published; with the names swapped that
    is contradicted.
    """
    run = spec_bench(tmp_path / "s.jsonl")
    for systems, sign in (({"Medusa": "medusa", "EAGLE": "eagle"}, "+"), ({"Medusa": "eagle", "EAGLE": "medusa"}, "-")):
        board = set_table([run], spec.model_copy(update={"systems": systems}), PAPER)
        table = dict(board.further)["Published order of methods, on tiny"]
        (row,) = table.rows
        assert row[:2] == [f"EAGLE ({systems['EAGLE']})", f"Medusa ({systems['Medusa']})"]
        assert [cell[0] for cell in row[2:]] == [sign] * 2 and table.best == {(0, 2), (0, 3)}


def test_systems_whose_order_differs_from_place_to_place_are_no_pair(tmp_path: Path, spec: TableSpec) -> None:
    """EAGLE is faster than Hydra on Vicuna 7B and 33B and slower on 13B."""
    run = spec_bench(tmp_path / "s.jsonl")
    board = set_table([run], spec.model_copy(update={"systems": {"Hydra": "medusa", "EAGLE": "eagle"}}), PAPER)
    ((*_, length, speedup),) = dict(board.further)["Published order of methods, on tiny"].rows
    assert length[0] == "+" and speedup == "\N{EN DASH}"


def test_the_best_is_a_lossless_one(tmp_path: Path, spec: TableSpec) -> None:
    run = sampled(tmp_path / "s.jsonl", lossy="eagle+koala")
    for table in (set_table([run], spec, PAPER), set_table([run], read_table_spec(REPRODUCE / "table2.toml"), PAPER)):
        place = table.grid.headings.index("Method")
        assert {table.grid.rows[row][place] for row, _ in table.grid.best} == {"eagle"}
