"""Table 2: which turns belong to which task, all of them together, and what a table of other questions says."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import pytest

from koala_bench.dialogues.questions import find_questions, read_questions
from koala_bench.errors import KoalaBenchError
from koala_bench.records.reading import Run, read_run
from koala_bench.records.schema import TurnLine
from koala_bench.records.summaries import sample, summarise
from koala_bench.results.tables.building import write_table
from koala_bench.results.tables.published import Paper, TableSpec, read_table_spec
from koala_bench.results.tables.tasks import ALL_TASKS, rows_by_task
from tests.support.markdown import table_rows, table_under
from tests.support.synthetic_run import failed, make_header, write_run

REPRODUCE = Path(__file__).parents[3] / "reproduce"


@pytest.fixture
def spec() -> TableSpec:
    return read_table_spec(REPRODUCE / "table2.toml")


CATEGORIES = {81: "writing", 82: "stem", 83: "translation", 84: "translation", 85: "qa", 86: "qa", 87: "rag", 88: "rag"}


def spec_bench(path: Path, target: str = "tiny") -> Run:
    header = make_header(target=target)
    header["questions"] = {"name": "spec_bench", "sha256": "77" * 32, "count": 8}
    return read_run(write_run(path, lambda turn: turn | {"category": CATEGORIES[turn["question_id"]]}, header=header))


def humaneval(path: Path) -> Run:
    def change(turn: TurnLine) -> TurnLine | None:
        return turn | {"category": "code"} if turn["question_id"] < 83 and turn["turn"] == 0 else None

    header = make_header()
    header["questions"] = {"name": "humaneval", "sha256": "88" * 32, "count": 2}
    return read_run(write_run(path, change, header=header))


def test_tasks_gather_their_categories_and_all_of_them_come_last(tmp_path: Path, spec: TableSpec) -> None:
    runs = [humaneval(tmp_path / "h.jsonl"), spec_bench(tmp_path / "s.jsonl")]
    rows, missing = rows_by_task(runs, spec)
    assert [(row.task, row.summaries[0].questions) for row in rows] == [
        ("multi-turn conversation", 2),
        ("translation", 2),
        ("question answering", 2),
        ("retrieval-augmented generation", 2),
        ("code", 2),
        (ALL_TASKS, 10),  # the files number their questions alike, and are different questions all the same
    ]
    absent = ["summarization", "mathematical reasoning", "grade-school mathematics (GSM8K)", "instructions (Alpaca)"]
    assert missing == [f"The records of tiny have no question of the task {name}." for name in absent]
    together, parts = rows[-1].summaries[3], [row.summaries[3] for row in rows[:-1]]
    assert together.name == "eagle"
    assert together.counted == sum(part.counted for part in parts) == 18
    totals = [sample([run]).totals["eagle"] for run in runs]
    assert together.tokens_per_s == pytest.approx(
        sum(each.tokens.sum() for each in totals) / sum(each.seconds.sum() for each in totals)
    )


def test_a_task_is_the_same_as_a_record_of_that_task_alone(tmp_path: Path, spec: TableSpec) -> None:
    rows, _ = rows_by_task([spec_bench(tmp_path / "s.jsonl")], spec)
    alone = read_run(
        write_run(tmp_path / "alone.jsonl", lambda turn: turn if turn["question_id"] in (83, 84) else None)
    )
    (translation,) = [row for row in rows if row.task == "translation"]
    for one, other in zip(translation.summaries, summarise(alone), strict=True):
        assert (one.speedup, one.acceptance_length, one.change_x, one.depths) == (
            other.speedup,
            other.acceptance_length,
            other.change_x,
            other.depths,
        )


def test_other_questions_show_their_own_categories_and_say_so(tmp_path: Path, spec: TableSpec, paper: Paper) -> None:
    run = read_run(write_run(tmp_path / "run.jsonl"))
    markdown, latex, table = (path.read_text(encoding="utf-8") for path in write_table([run], tmp_path, spec, paper))
    assert [row["task"] for row in csv.DictReader(io.StringIO(table))] == ["writing"] * 5 + ["coding"] * 5 + [
        ALL_TASKS
    ] * 5
    own = (
        "Tasks are the categories of the questions bundled: those of the table are of spec_bench, humaneval, gsm8k,"
        " alpaca"
    )
    assert own in markdown
    # Medusa's published chart has these two categories, so its row and not Spec-Bench's stands below.
    published = ["Medusa", "7B", "not stated", "1.95", "2.15", "FasterDecoding/Medusa assets/category_speedup.png"]
    assert published in table_rows(markdown)
    assert "Leaderboard" not in markdown
    assert latex.isascii() and latex.count(r"\begin{tabular}") == 1
    assert latex.count(r"\midrule") == 3, "a rule below the heading and between tasks"


def test_records_of_several_question_files_stand_in_one_table(tmp_path: Path, spec: TableSpec, paper: Paper) -> None:
    runs = [spec_bench(tmp_path / "s.jsonl"), humaneval(tmp_path / "h.jsonl")]
    markdown = write_table(runs, tmp_path, spec, paper)[0].read_text(encoding="utf-8")
    assert "- Questions (tiny on spec_bench): " in markdown and "- Questions (tiny on humaneval): " in markdown
    rows = table_rows(markdown)
    assert ["code", "eagle"] in [row[:2] for row in rows]
    speeds = ["2.75", "2.04", "2.42", "2.16", "2.97", "2.20", "3.39", "2.43"]
    assert ["EAGLE", "vicuna-33b", "A100 80GB", *speeds, "hemingkx/Spec-Bench Leaderboard.md"] in rows
    assert "Tasks are the categories" not in markdown
    assert (
        write_table(runs[::-1], tmp_path / "other", spec, paper)[2].read_bytes()
        == (tmp_path / "table2.csv").read_bytes()
    )


def test_the_papers_speedups_by_task_stand_beside_the_measured_ones(
    tmp_path: Path, spec: TableSpec, paper: Paper
) -> None:
    table2 = tuple(
        (
            each.model_copy(update={"speedup": {**each.speedup, "translation": 2.2}})
            if (each.target, each.method) == ("vicuna-7b", "eagle")
            else each
        )
        for each in paper.table2
    )
    run = spec_bench(tmp_path / "s.jsonl", target="vicuna-7b")
    text = write_table([run], tmp_path, spec, paper.model_copy(update={"table2": table2}))[0].read_text(
        encoding="utf-8"
    )
    rows = [row for row in table_under(text, "More of each method") if row["Method"] == "eagle"]
    assert [(row["Task"], row["Paper: speedup; τ"]) for row in rows] == [
        ("multi-turn conversation", "unknown"),
        ("translation", "2.20"),
        ("question answering", "unknown"),
        ("retrieval-augmented generation", "unknown"),
        (ALL_TASKS, "\N{EN DASH}"),
    ]


def test_a_task_without_a_common_turn_is_named_and_left_out(tmp_path: Path, spec: TableSpec) -> None:
    run = read_run(
        write_run(
            tmp_path / "run.jsonl",
            lambda turn: failed(turn) if turn["category"] == "coding" and turn["method"] == "vanilla" else turn,
        )
    )
    rows, missing = rows_by_task([run], spec)
    assert [row.task for row in rows] == ["writing"]
    assert missing == [f"coding of tiny has no row: {run.path} holds no answer of vanilla decoding to compare with."]
    broken = read_run(
        write_run(tmp_path / "broken.jsonl", lambda turn: failed(turn) if turn["method"] == "vanilla" else turn)
    )
    with pytest.raises(KoalaBenchError, match="no answer of vanilla decoding"):
        rows_by_task([broken], spec)


def test_changes_are_marked_task_by_task(tmp_path: Path, spec: TableSpec, paper: Paper) -> None:
    def change(turn: TurnLine) -> TurnLine:
        slow = turn["method"] == "eagle+koala" and turn["category"] == "coding"
        return turn | {"decode_s": 3 * (turn["decode_s"] or 0)} if slow else turn

    run = read_run(write_run(tmp_path / "run.jsonl", change))
    text = write_table([run], tmp_path, spec, paper)[0].read_text(encoding="utf-8")
    rows = table_under(text, "Change against the original head")
    found = {row["Task"]: row for row in rows if row["Method"] == "eagle+koala"}
    assert found["coding"]["Change (%)"].startswith("**-") and not found["writing"]["Change (%)"].startswith("**-")
    assert all(found[task]["Change of τ"].startswith("**+") for task in ("writing", "coding"))


def test_records_of_one_target_must_be_of_the_same_heads(tmp_path: Path, spec: TableSpec, paper: Paper) -> None:
    header = make_header()
    header["methods"][1]["weights_sha256"] = "ee" * 32
    with pytest.raises(KoalaBenchError, match="differ in the weights_sha256 of medusa"):
        write_table(
            [spec_bench(tmp_path / "s.jsonl"), read_run(write_run(tmp_path / "b.jsonl", header=header))],
            tmp_path,
            spec,
            paper,
        )
    twice = spec_bench(tmp_path / "t.jsonl")
    with pytest.raises(KoalaBenchError, match="same target and questions"):
        write_table([twice, twice], tmp_path, spec, paper)


def test_every_task_is_in_its_question_file(spec: TableSpec, data_dir: Path) -> None:
    for task in spec.tasks:
        categories = {question.category for question in read_questions(find_questions(task.questions, data_dir)[1])}
        assert set(task.categories) <= categories
    covered = {category for task in spec.tasks if task.questions == "spec_bench" for category in task.categories}
    assert covered == {question.category for question in read_questions(find_questions("spec_bench", data_dir)[1])}


def test_the_published_values_are_facts_of_the_data_folder(paper: Paper, data_dir: Path) -> None:
    published = data_dir / "traces" / "published.csv"
    if not published.is_file():
        pytest.skip("no traces/published.csv")
    rows = list(csv.DictReader(published.open(encoding="utf-8")))
    places = {
        "multi-turn conversation": "multi_turn_conversation", "translation": "translation",
        "summarization": "summarization", "question answering": "qa",
        "mathematical reasoning": "math_reasoning", "retrieval-augmented generation": "rag", ALL_TASKS: "overall",
    }  # fmt: skip
    known = {
        (row["system"], row["target"], row["benchmark"], row["metric"], float(row["value"]))
        for row in rows
        if row["metric"] != "not stated"
    }
    for claim in (claim for claim in (*paper.by_task, *paper.leaderboard) if claim.source.endswith("Leaderboard.md")):
        target = f"{claim.target}-v1.3"
        for task, value in claim.speedup.items():
            assert (claim.system, target, f"spec_bench/{places[task]}", "speedup_vs_vanilla", value) in known
        assert claim.acceptance_length is not None
        assert (claim.system, target, "spec_bench/overall", "mean_accepted_tokens", claim.acceptance_length) in known
