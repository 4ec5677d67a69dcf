"""The files of a table: the same bytes each time, a CSV in full, LaTeX for a paper, and the columns asked for."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import pytest

from koala_bench.common.bundled import RECIPES
from koala_bench.records.reading import Run, read_run
from koala_bench.records.summaries import summarise
from koala_bench.results.tables.building import set_table, write_table
from koala_bench.results.tables.columns import COLUMNS
from koala_bench.results.tables.published import Paper, TableSpec, read_table_spec
from koala_bench.results.tables.rendering import Grid, tex, to_latex
from tests.support.commands import Koala
from tests.support.markdown import table_rows, table_under
from tests.support.synthetic_run import QUESTIONS, by_name, make_header, steps_of, write_run


def test_the_same_record_gives_the_same_bytes(tmp_path: Path, run: Run, spec: TableSpec, paper: Paper) -> None:
    first = write_table([run], tmp_path / "one", spec, paper)
    second = write_table([read_run(run.path)], tmp_path / "two", spec, paper)
    assert [path.name for path in first] == ["table1.md", "table1.tex", "table1.csv"]
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]


def test_the_csv_holds_the_numbers_in_full(tmp_path: Path, run: Run, spec: TableSpec, paper: Paper) -> None:
    rows = list(csv.DictReader(io.StringIO(write_table([run], tmp_path, spec, paper)[2].read_text(encoding="utf-8"))))
    koala, row = by_name(summarise(run))["eagle+koala"], rows[4]
    assert [row["method"] for row in rows] == list(spec.methods)
    assert koala.change_percent
    for name, value in {
        "speedup": koala.speedup.value,
        "speedup_low": koala.speedup.low,
        "speedup_high": koala.speedup.high,
        "acceptance_length": koala.acceptance_length.value,
        "acceptance_rate_given_parent_depth_1": koala.depths[0].rate,
        "draft_overhead_percent": 25.0,
        "speedup_change_percent_low": koala.change_percent.low,
        "claim_speedup_change_percent_high": 14.09,
    }.items():
        assert float(row[name]) == pytest.approx(value, rel=1e-11)
    assert (row["layers"], row["adversarial"], row["parameters"], row["original"]) == ("2", "true", "820000", "eagle")
    assert float(row["acceptance_length"]) == pytest.approx(
        sum(sum(steps_of("eagle+koala", q)) + len(steps_of("eagle+koala", q)) for q in QUESTIONS)
        / sum(len(steps_of("eagle+koala", q)) for q in QUESTIONS)
    )
    assert rows[0]["layers"] == rows[0]["speedup_change_x"] == ""


def test_the_markdown_marks_the_best_and_says_how_it_was_measured(
    tmp_path: Path, run: Run, spec: TableSpec, paper: Paper
) -> None:
    text = write_table([run], tmp_path, spec, paper)[0].read_text(encoding="utf-8")
    assert text.startswith("# Table 1: speedup and acceptance length, tiny on bundled\n")
    table = [row for row in table_rows(text) if len(row) == 7]
    ((name, best, *_),) = [row for row in table if row[1].startswith("**")]
    assert name == "eagle+koala" and best.startswith("**2.47** [")
    more = {row["Method"]: row for row in table_under(text, "More of each method")}
    assert (more["eagle+koala"]["Layers K"], more["eagle+koala"]["Head (M)"]) == ("2", "0.82")
    assert more["eagle"]["Draft tree"] == "mc_sim_7b_63 (26 nodes, depth 4)"
    for words in (
        "Machine: Example CPU @ 2.0 GHz, cores 2, threads 2, 8.0 GiB of memory; no GPU",
        "float32 on cpu, attention sdpa",
        "Questions: bundled (8 questions, sha256 444444444444)",
        "greedy, at most 64 new tokens, warm-up 1, repeats 1, processes 1, seed 0",
        "commit 0123456789ab.",
        "Command: `koala-bench evaluate --preset tiny --out 'results/a b'`",
        "the target's own (bonus) token included",
        "conditional on the parent",
        "The paper's table is on mt_bench; these numbers are on bundled.",
        "vicuna-7b, vicuna-13b, vicuna-33b.",
    ):
        assert words in text


def test_a_dirty_or_unknown_commit_is_said(tmp_path: Path, spec: TableSpec, paper: Paper) -> None:
    for commit, dirty, words in (
        ("ab" * 20, True, "commit abababababab with uncommitted changes"),
        (None, None, "commit unknown (not a checkout)"),
    ):
        header = make_header()
        header["code"] |= {"commit": commit, "dirty": dirty}
        path = tmp_path / f"{dirty}.jsonl"
        assert words in write_table([read_run(write_run(path, header=header))], tmp_path, spec, paper)[0].read_text(
            encoding="utf-8"
        )


def test_the_latex_is_balanced_and_escaped(tmp_path: Path, run: Run, spec: TableSpec, paper: Paper) -> None:
    text = write_table([run], tmp_path, spec, paper)[1].read_text(encoding="utf-8")
    plain = text.replace("\\{", "").replace("\\}", "").replace("\\$", "")
    assert plain.count("{") == plain.count("}")
    assert plain.count("$") % 2 == 0
    assert text.count(r"\begin{") == text.count(r"\end{")
    body = text[text.index(r"\toprule") : text.index(r"\bottomrule")]
    assert {line.count("&") for line in body.splitlines() if line.endswith(r"\\")} == {3}  # what fits a page
    assert r"\textbf{2.47} [" in body
    assert "\N{GREEK SMALL LETTER ALPHA}" not in text
    assert text.isascii()


def test_text_is_escaped_for_latex() -> None:
    assert (
        tex("50 % of a_b & {c} #1 ~ ^ \\ -0.05, +0.1 [-1] vicuna-7b")
        == r"50 \% of a\_b \& \{c\} \#1 \textasciitilde{} \textasciicircum{} \textbackslash{} $-$0.05, $+$0.1 [$-$1]"
        r" vicuna-7b"
    )


def test_a_papers_table_holds_no_notes(tmp_path: Path, run: Run, spec: TableSpec, paper: Paper) -> None:
    text = write_table([run], tmp_path, spec, paper)[1].read_text(encoding="utf-8")
    assert text.count(r"\begin{tabular}") == 1 and "Command" not in text
    assert len(text.splitlines()) < 25


def test_columns_are_those_that_the_file_lists(tmp_path: Path, run: Run, spec: TableSpec, paper: Paper) -> None:
    update = {"columns": ("speedup", "method"), "more": (), "changes": (), "methods": ("vanilla", "eagle", "hydra")}
    fewer = spec.model_copy(update=update)
    markdown, latex, table = (path.read_text(encoding="utf-8") for path in write_table([run], tmp_path, fewer, paper))
    assert table_rows(markdown)[0] == ["Speedup (x)", "Method"] and {len(row) for row in table_rows(markdown)} == {2}
    assert "Speedup (x) & Method" in latex
    assert "Not in the record: hydra." in markdown
    assert "Not in this table: medusa, medusa+koala, eagle+koala." in markdown
    assert table.splitlines()[0].startswith("target,method,layers,"), "the CSV always holds everything"
    assert {*spec.columns, *spec.more, *spec.changes} <= set(COLUMNS)


def test_columns_can_be_picked_on_the_command_line(tmp_path: Path, run: Run, koala: Koala) -> None:
    done = koala("table", str(run.path), "--columns", "method, equal,speedup", "--out", str(tmp_path / "out"))
    assert done.code == 0
    rows = table_rows((tmp_path / "out" / "table1.md").read_text(encoding="utf-8"))
    assert rows[0] == ["Method", "Equal answers", "Speedup (x)"]
    wrong = koala("table", str(run.path), "--columns", "method,speed", "--out", str(tmp_path / "none"))
    assert wrong.code == 2 and "unknown column 'speed'. The columns are target, task," in wrong.err
    assert not (tmp_path / "none").exists()


def test_no_column_one_twice_and_a_table_in_place_of_the_records_own_are_refused(run: Run, koala: Koala) -> None:
    before = sorted(run.path.parent.iterdir())
    for columns, words in (
        ("", "names no column"),
        (" , ", "names no column"),
        ("speedup,speedup,method", "speedup more than once"),
        ("method,speedup", "Name another folder with --out"),
    ):
        done = koala("table", str(run.path), "--columns", columns)
        assert done.code == 2 and words in done.err
    assert sorted(run.path.parent.iterdir()) == before


def test_the_latex_defines_what_it_shows(tmp_path: Path, run: Run, spec: TableSpec, paper: Paper) -> None:
    whole = write_table([run], tmp_path, spec, paper)[1].read_text(encoding="utf-8")
    for words in ("Speedup: ", r"$\tau$: ", "Change: ", "In bold the highest point estimate", "over 8 questions."):
        assert words in whole
    assert "Whole answer" not in whole and "Draft overhead" not in whole
    few = spec.model_copy(update={"columns": ("method", "whole_answer"), "more": (), "changes": ()})
    latex = write_table([run], tmp_path / "few", few, paper)[1].read_text(encoding="utf-8")
    assert "Whole answer: " in latex and "over 8 questions." in latex
    assert not any(words in latex for words in ("Speedup: ", r"$\tau$: ", "Change: ", "In bold"))


def test_a_group_is_named_once_over_its_rows_and_many_narrow_columns_have_turned_headings() -> None:
    rows = [["long-name of a task", "a", "1.00"], ["long-name of a task", "b", "1.00"], ["other", "a", "2.00"]]
    grouped = Grid(["Task", "Method", "Speedup (x)"], rows, [False, False, True], begins=frozenset({2}))
    body = to_latex(grouped, "Caption.", "tab:t", "").split("\\midrule\n")
    assert body[1].splitlines() == [r"long-name of a & a & 1.00 \\", r"task & b & 1.00 \\"]
    assert body[2].startswith("other & a & 2.00") and "rotatebox" not in body[0]
    wide = Grid([f"Heading {place}" for place in range(9)], [["1.00 [0.95, 1.05]", *["1.00"] * 8]], [True] * 9)
    heads = to_latex(wide, "Caption.", "tab:t", "").split("\\toprule\n")[1].splitlines()[0].split(" & ")
    assert heads[:2] == ["Heading 0", r"\rotatebox{90}{Heading 1}"]


def test_a_leaderboard_of_picked_columns_has_a_row_per_task_and_method(tmp_path: Path, run: Run, paper: Paper) -> None:
    board = read_table_spec(RECIPES / "leaderboard.toml")
    picked = board.model_copy(update={"columns": ("task", "method", "speedup"), "more": (), "changes": ()})
    table = set_table([run], picked, paper)
    assert table.grid.headings == ["Task", "Method", "Speedup (x)"] and len(table.grid.rows) == 15
