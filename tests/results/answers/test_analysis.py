"""Answer files in numbers: golden values of published files, pairing, baselines, and the command."""

from __future__ import annotations

import csv
import io
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from koala_bench.cli import app
from koala_bench.dialogues.questions import read_questions
from koala_bench.errors import KoalaBenchError
from koala_bench.interop.answers import write_fastchat_answers
from koala_bench.interop.traces import Trace, read_traces, with_categories
from koala_bench.records.reading import read_run
from koala_bench.records.summaries import summarise
from koala_bench.results.answers.numbers import Row, analyse
from koala_bench.results.answers.pages import by_definition, to_csv, to_text
from tests.interop.test_traces import medusa_row, spec_bench_row, write
from tests.support.markdown import table_under
from tests.support.synthetic_run import failed, make_header, write_run

MEDUSA = "medusa/mt_bench/medusa-vicuna-{}-temperature-0.0-posterior_threshold-0.09-posterior_alpha-0.3.jsonl"
SPEC_BENCH = "spec_bench_forks/{}/spec_bench/vicuna-7b-v1.3-{}.jsonl"
DASH = "\N{EN DASH}"
MEDUSA_ON_SPEC_BENCH = SPEC_BENCH.format("delsiiin", "medusa-float16-temperature-0.0")
EAGLE_ON_SPEC_BENCH = SPEC_BENCH.format("yukiki-jc", "eagle-float16-temperature-0.0")


@pytest.fixture(scope="module")
def published(data_dir: Path) -> Path:
    if not (data_dir / "traces").is_dir():
        pytest.skip("the data folder has no published answer files")
    return data_dir / "traces"


def rows_of(*paths: Path, baseline: int | None = None, by_category: bool = False) -> list[Row]:
    traces = [trace for path in paths for trace in read_traces(path)]
    return analyse(traces, None if baseline is None else traces[baseline], by_category)


def length_of(row: Row) -> float:
    assert row.acceptance_length is not None
    assert row.acceptance_length.low <= row.acceptance_length.value <= row.acceptance_length.high
    return row.acceptance_length.value


def cells_of(text: str, row: int = 0) -> dict[str, str]:
    """A row of the first table of a Markdown text, by heading."""
    lines = [
        [cell.strip() for cell in line.strip("|").split(" | ")] for line in text.splitlines() if line.startswith("|")
    ]
    return dict(zip(lines[0], lines[2 + row], strict=True))


# ---------------------------------------------------------------------------------------------- golden values


@pytest.mark.parametrize(("run_name", "rate"), [("7b-v1.3", 101.304), ("7b-v1.3-1", 102.647), ("7b-v1.3-2", 94.664)])
def test_medusa_7b_settles_2_565_tokens_a_step_counting_idxs_from_1(
    published: Path, run_name: str, rate: float
) -> None:
    (row,) = rows_of(published / MEDUSA.format(run_name))
    assert (row.questions, row.turns, row.failed, row.tokens, row.steps) == (80, 160, 0, 43_754, 17_058)
    assert length_of(row) == pytest.approx(2.565, abs=5e-4)
    assert row.tokens_per_s == pytest.approx(rate, abs=1e-3)
    # What users compute instead: the sum of new_tokens over the sum of idxs, one too few in each turn.
    assert row.tokens is not None
    assert row.steps is not None
    assert row.tokens / (row.steps - row.turns) == pytest.approx(2.589, abs=5e-4)


def test_medusa_13b_has_a_failed_turn_whose_numbers_are_another_turns(published: Path) -> None:
    (row,) = rows_of(published / MEDUSA.format("13b-v1.3"))
    assert (row.questions, row.turns, row.failed) == (80, 159, 1)
    # idxs [379, 379] and new_tokens [1015, 1015] of question 154
    assert (row.tokens, row.steps) == (44_180 - 1_015, 16_743 - 380)
    assert length_of(row) == pytest.approx(2.638, abs=5e-4)
    assert "with them the file has 2.639 tokens a step" in row.trace.remarks[0]


def test_eagle_on_llama_70b_settles_3_62_tokens_a_step_2_91_times_as_fast(published: Path) -> None:
    folder = published / "eagle/mt_bench"
    base, eagle = rows_of(
        *(folder / f"llama-2-chat-70b-fp16-{name}-in-temperature-0.0.jsonl" for name in ("base", "ea"))
    )
    assert (eagle.tokens, eagle.steps, base.tokens, base.steps) == (55_668, 15_377, 48_165, 48_165)
    assert length_of(eagle) == pytest.approx(3.620, abs=5e-4)
    assert eagle.speedup is not None
    assert eagle.speedup.speedup is not None
    assert eagle.speedup.speedup.value == pytest.approx(2.907, abs=5e-4)
    # The figure in EAGLE's README says 3.01, by its script's ratio of means with the baseline's tokens recounted.
    assert eagle.speedup.speedup_of_means == pytest.approx(3.01, rel=0.01)
    assert eagle.speedup.longest == (1_029, 512)


@pytest.mark.parametrize(
    ("path", "system", "length"),
    [
        (EAGLE_ON_SPEC_BENCH, "EAGLE", 3.579),
        (MEDUSA_ON_SPEC_BENCH, "Medusa", 2.306),
        (SPEC_BENCH.format("BNukhkadiev", "sps-68m-float16-temp-0.0"), "SpS", 2.278),
    ],
)
def test_third_party_runs_of_spec_bench_have_the_leaderboards_acceptance_lengths(
    published: Path, path: str, system: str, length: float
) -> None:
    (row,) = rows_of(published / path)
    assert length_of(row) == pytest.approx(length, abs=5e-4)
    with open(published / "published.csv", encoding="utf-8") as file:
        leaderboard = [
            float(line["value"])
            for line in csv.DictReader(file)
            if (line["system"], line["target"], line["metric"]) == (system, "vicuna-7b-v1.3", "mean_accepted_tokens")
            and "A100" in line["device"]
        ]
    assert [round(length_of(row), 2)] == leaderboard


def test_medusa_on_spec_bench_has_2_30_with_the_numbers_of_its_two_failed_turns(published: Path) -> None:
    (row,) = rows_of(published / MEDUSA_ON_SPEC_BENCH)
    assert (row.questions, row.turns, row.failed, row.tokens, row.steps) == (
        478,
        558,
        2,
        91_469 - 153 - 166,
        39_694 - 76 - 85,
    )
    said = (
        "2 of 560 turns failed (recorded as ERROR with the numbers of the turn before) and are left out; with them the"
        " file has 2.304 tokens a step."
    )
    assert row.trace.remarks == (said,)


def test_speedups_on_spec_bench_are_over_the_vanilla_run_of_the_same_folder(published: Path) -> None:
    vanilla = [SPEC_BENCH.format(owner, "vanilla-float16-temp-0.0") for owner in ("delsiiin", "yukiki-jc")]
    rows = rows_of(*(published / path for path in (MEDUSA_ON_SPEC_BENCH, EAGLE_ON_SPEC_BENCH, *vanilla)))
    found = [
        (row.speedup.other.path.parts[-3], row.speedup.questions, row.speedup.speedup) for row in rows if row.speedup
    ]
    assert [(owner, questions) for owner, questions, _ in found] == [("delsiiin", 478), ("yukiki-jc", 480)]
    assert [speedup.value for *_, speedup in found if speedup] == pytest.approx([1.760, 2.432], abs=2e-3)
    assert [row.speedup.speedup_of_means for row in rows if row.speedup] == pytest.approx([1.668, 2.184], abs=2e-3)
    assert [row.is_baseline for row in rows] == [False, False, True, True]
    # The seconds of other machines: EAGLE against Medusa on the 558 turns that both finished.
    assert rows[1].change is not None
    assert (rows[1].change.questions, rows[1].change.turns) == (478, 558)


def test_medusas_rates_by_category_follow_its_figure(published: Path, data_dir: Path) -> None:
    (trace,) = read_traces(published / MEDUSA.format("7b-v1.3"))
    questions = {
        question.question_id: question.category
        for question in read_questions(data_dir / "eval/mt_bench/question.jsonl")
    }
    rows = {row.category: row.tokens_per_s for row in analyse([with_categories(trace, questions)], by_category=True)}
    with open(published / "published.csv", encoding="utf-8") as file:
        figure = {
            line["benchmark"].removeprefix("category "): float(line["value"])
            for line in csv.DictReader(file)
            if "category " in line["benchmark"]
        }
    assert len(figure) == 8
    # Rate / speedup is vanilla's rate, which the categories share.
    vanilla = [(rows[category] or math.nan) / speedup for category, speedup in figure.items()]
    assert np.max(np.abs(np.array(vanilla) / np.median(vanilla) - 1)) < 0.06


# ------------------------------------------------------------------------------------------- the same as our own tables


def test_a_record_gives_the_numbers_of_table_1(tmp_path: Path) -> None:
    path = write_run(tmp_path / "records.jsonl")
    rows, summaries = rows_of(path), summarise(read_run(path))
    for row, summary in zip(rows, summaries, strict=True):
        assert row.trace.system == f"tiny-{summary.name}"
        assert row.acceptance_length == summary.acceptance_length
        assert row.tokens_per_s == pytest.approx(summary.tokens_per_s)
        if summary.name == "vanilla":
            assert row.is_baseline
        else:
            assert row.speedup is not None
            assert row.speedup.speedup == summary.speedup
            assert row.speedup.whole_answer == summary.whole_answer
            assert row.speedup.speedup_of_means == summary.speedup_of_means
            assert row.speedup.mean_of_speedups == summary.mean_of_speedups


def test_our_answer_files_give_the_acceptance_lengths_of_their_record(tmp_path: Path) -> None:
    record = write_run(tmp_path / "records.jsonl")
    answers = write_fastchat_answers(read_run(record), tmp_path / "answers")
    of_record, of_answers = rows_of(record), rows_of(*answers)
    assert [row.acceptance_length for row in of_answers] == [row.acceptance_length for row in of_record]
    assert all(row.speedup is not None and row.speedup.other.system == "tiny-vanilla" for row in of_answers[1:])
    # Prefill is in their seconds.
    assert all((a.tokens_per_s or 0) < (b.tokens_per_s or 0) for a, b in zip(of_answers, of_record, strict=True))


def test_seconds_with_and_without_prefill_are_not_divided_by_each_other(tmp_path: Path) -> None:
    record = write_run(tmp_path / "records.jsonl", header=make_header(["vanilla", "medusa"]))
    answers = write_fastchat_answers(read_run(record), tmp_path / "answers")[1]
    rows = rows_of(record, answers, baseline=0)
    assert rows[1].speedup is not None
    assert rows[1].speedup.speedup is not None
    assert rows[2].speedup is not None
    assert rows[2].speedup.speedup is None
    assert rows[2].speedup.whole_answer == rows[1].speedup.whole_answer
    assert rows[2].remarks == (
        "No speedup of decoding: its seconds are of prefill and decoding, those of tiny-vanilla of decoding.",
    )
    # The steps compare all the same.
    assert rows[2].change is not None
    assert rows[2].change.length_change is not None
    assert rows[2].change.length_change.value == 0


# ---------------------------------------------------------------------------------------------- pairing


def traces_of(tmp_path: Path, **files: list[dict[str, object]]) -> list[Trace]:
    return [trace for name, rows in files.items() for trace in read_traces(write(tmp_path / f"{name}.jsonl", *rows))]


def vanilla_row(question: int = 81, model: str = "vicuna-vanilla", **choice: object) -> dict[str, object]:
    values: dict[str, object] = {"decoding_steps": [6, 5], "accept_lengths": [1] * 11, "wall_time": [1.0, 1.0]}
    return spec_bench_row(question, model, **(values | choice))


def test_a_speedup_counts_the_turns_that_both_finished(tmp_path: Path) -> None:
    error = spec_bench_row(82, turns=["One.", "ERROR"])
    mine, base = (
        [spec_bench_row(81), error, spec_bench_row(84)],
        [vanilla_row(81), vanilla_row(82, wall_time=[2.0, 99.0]), vanilla_row(83)],
    )
    rows = analyse(traces_of(tmp_path, a=mine, b=base))
    assert (rows[0].questions, rows[0].turns, rows[0].failed) == (3, 5, 1)
    versus = rows[0].speedup
    assert versus is not None
    assert versus.speedup is not None
    assert (versus.questions, versus.turns) == (2, 3)
    assert versus.speedup.value == pytest.approx((17 / 1.25) / (17 / 4.0))  # turns 81.0, 81.1 and 82.0
    assert versus.speedup.low <= versus.speedup.value <= versus.speedup.high


def test_repeats_are_pooled_within_their_question(tmp_path: Path) -> None:
    twice = spec_bench_row(81)
    twice["choices"].append({**twice["choices"][0], "index": 1, "wall_time": [1.5, 0.75]})
    row = analyse(traces_of(tmp_path, a=[twice], b=[vanilla_row(81)]))[0]
    assert (row.questions, row.turns, row.tokens) == (1, 4, 22)
    assert row.speedup is not None
    assert row.speedup.speedup is not None
    assert row.speedup.speedup.value == pytest.approx((22 / 3.0) / (11 / 2.0))
    assert math.isnan(row.speedup.speedup.low)  # one question has no interval


def test_two_runs_of_one_system_compare_by_question(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    first, second = [], []
    for question in range(20):
        seconds = [float(value) for value in generator.uniform(0.2, 2.0, 2)]
        first.append(medusa_row(question, "medusa-1", wall_time=seconds))
        second.append(
            medusa_row(
                question, "medusa-2", wall_time=[1.1 * value for value in seconds], turns=[f"One {question}.", "Other."]
            )
        )
    row = analyse(traces_of(tmp_path, a=first, b=second))[1]
    assert row.change is not None
    assert row.change.rate_change is not None
    assert row.change.length_change is not None
    # Each question is slower by the same factor, so the pairing leaves no spread, though the questions differ.
    assert (row.change.rate_change.low, row.change.rate_change.high) == pytest.approx((100 / 1.1 - 100,) * 2)
    assert (row.change.length_change.low, row.change.length_change.value, row.change.length_change.high) == (0, 0, 0)
    assert (row.change.same_text, row.change.turns) == (20, 40)
    assert row.speedup is None


def test_questions_of_two_benchmarks_with_the_same_numbers_are_not_paired(tmp_path: Path) -> None:
    traces = traces_of(tmp_path, a=[spec_bench_row(101)], b=[spec_bench_row(101, category="rank")])
    rows = analyse(traces)
    assert rows[1].change is None
    assert rows[1].remarks == (
        "Not compared with `a.jsonl`: not the same questions, 101 is of category 'rank' here and 'writing' there.",
    )
    short = medusa_row(101, turns=["x"], idxs=[1], new_tokens=[4], wall_time=[0.1])
    assert (
        "the turns of 101 are 1 here and 2 there"
        in analyse(traces_of(tmp_path, a=[medusa_row(101)], b=[short]))[1].remarks[0]
    )


def test_the_baseline_is_the_vanilla_file_of_the_folder_and_of_the_target(tmp_path: Path) -> None:
    eagle = [spec_bench_row(81, "vicuna-eagle")]
    (folder := tmp_path / "other").mkdir()
    elsewhere = read_traces(write(folder / "v.jsonl", vanilla_row(81)))
    other_target = traces_of(tmp_path, w=[vanilla_row(81, "llama-vanilla")])
    two = traces_of(tmp_path, v=[vanilla_row(81)], x=[vanilla_row(81)])
    (trace,) = traces_of(tmp_path, a=eagle)
    assert analyse([trace, *elsewhere])[0].speedup is None
    assert analyse([trace, *other_target])[0].speedup is None
    assert analyse([trace, *two])[0].speedup is None  # which one is not said
    found = analyse([trace, *elsewhere, *other_target, two[0]])[0].speedup
    assert found is not None
    assert found.other is two[0]
    named = analyse([trace, *elsewhere], baseline=elsewhere[0])[0].speedup
    assert named is not None
    assert named.other is elsewhere[0]


def test_what_a_file_cannot_give_is_a_dash(tmp_path: Path) -> None:
    plain = {"question_id": 81, "model_id": "gpt", "choices": [{"turns": ["A.", "B."]}]}
    (row,) = analyse(traces_of(tmp_path, a=[plain]))
    cells = cells_of(to_text([row]))
    assert (cells["Questions"], cells["Turns"]) == ("1", "2")
    names = ("Tokens", "Steps", "Tokens/s", "Acceptance length τ", "τ is", "Accepted ≥ 1 / ≥ 2 / …", "Speedup (x)")
    assert [cells[name] for name in names] == [DASH] * 7
    (timed,) = csv.DictReader(io.StringIO(to_csv([row])))
    assert (timed["tokens"], timed["acceptance_length"], timed["speedup"]) == ("", "", "")


def test_a_vanilla_file_without_times_is_no_baseline_of_one(tmp_path: Path) -> None:
    rows = analyse(traces_of(tmp_path, a=[spec_bench_row(wall_time=[0.0, 0.0])], b=[vanilla_row(wall_time=[0.0, 0.0])]))
    assert [cells_of(to_text(rows), index)["Speedup (x)"] for index in (0, 1)] == [DASH, DASH]


def test_the_share_of_steps_by_accepted_drafts(tmp_path: Path) -> None:
    (row,) = analyse(traces_of(tmp_path, a=[spec_bench_row()]))  # accept_lengths 1, 3, 2, 4, 1
    assert row.at_least == pytest.approx((0.6, 0.4, 0.2))
    assert cells_of(to_text([row]))["Accepted ≥ 1 / ≥ 2 / …"] == "0.60 / 0.40 / 0.20"


def test_categories_have_rows_and_speedups_of_their_own(tmp_path: Path) -> None:
    mine = [spec_bench_row(81), spec_bench_row(91, category="coding", wall_time=[0.25, 0.125])]
    base = [vanilla_row(81), vanilla_row(91) | {"category": "coding"}]
    rows = analyse(traces_of(tmp_path, a=mine, b=base), by_category=True)
    assert [row.category for row in rows] == [None, "writing", "coding"] * 2
    speedups = [row.speedup.speedup.value for row in rows if row.speedup and row.speedup.speedup]
    assert speedups == pytest.approx([(22 / 1.125) / (22 / 4), (11 / 0.75) / (11 / 2), (11 / 0.375) / (11 / 2)])
    assert cells_of(to_text(rows), 1)["Category"] == "writing"


def test_a_failed_record_turn_counts_for_nothing(tmp_path: Path) -> None:
    path = write_run(tmp_path / "records.jsonl", lambda turn: failed(turn) if turn["method"] == "eagle" else turn)
    rows = {row.trace.system: row for row in rows_of(path)}
    eagle = rows["tiny-eagle"]
    assert (eagle.turns, eagle.failed, eagle.tokens, eagle.acceptance_length, eagle.tokens_per_s) == (
        0,
        16,
        None,
        None,
        None,
    )
    assert "Not compared with `records.jsonl`: no turn that both finished." in eagle.remarks
    assert rows["tiny-medusa"].speedup is not None


# ---------------------------------------------------------------------------------------------- the command


def run(*arguments: object) -> str:
    result = CliRunner().invoke(app, ["analyse", *map(str, arguments)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_the_command_prints_markdown_and_writes_the_numbers(tmp_path: Path) -> None:
    paths = [
        write(tmp_path / "eagle.jsonl", *(spec_bench_row(q) for q in (81, 82))),
        write(tmp_path / "v.jsonl", *(vanilla_row(q) for q in (81, 82))),
    ]
    text = run(*paths, "--csv", tmp_path / "out" / "numbers.csv")
    cells = cells_of(text)
    assert cells["System"] == "vicuna-eagle"
    assert cells["Acceptance length τ"] == "2.200 [2.200, 2.200]"
    assert (cells["Speedup (x)"], cells["Whole answer (x)"]) == (DASH, "2.67 [2.67, 2.67]")
    assert cells_of(text, 1)["Whole answer (x)"] == "1.00"
    assert f"1: `{paths[0]}`: Spec-Bench (decoding_steps, new_tokens, wall_time, accept_lengths)" in text
    (speedup,) = table_under(text, "Speedups")
    assert [speedup[name] for name in ("File", "Against", "Questions", "Turns", "Same text")] == [
        "1",
        "2",
        "2",
        "4",
        "4/4",
    ]
    with open(tmp_path / "out" / "numbers.csv", encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    assert [line["system"] for line in lines] == ["vicuna-eagle", "vicuna-vanilla"]
    assert float(lines[0]["speedup"]) == pytest.approx(8 / 3)
    assert float(lines[0]["steps_accepting_at_least_3"]) == pytest.approx(0.2)
    assert run(*paths) == text


def test_a_named_baseline_need_not_be_among_the_files(tmp_path: Path) -> None:
    eagle, base = (
        write(tmp_path / "e.jsonl", medusa_row(81, "ea")),
        write(tmp_path / "b.jsonl", medusa_row(81, "plain", new_tokens=[0, 0])),
    )
    text = run(eagle, "--baseline", base)
    assert [cells_of(text, index)["System"] for index in (0, 1)] == ["plain", "ea"]
    assert cells_of(text, 1)["Whole answer (x)"] == "2.20"  # 11 tokens against 5 in the same time
    assert run(base, eagle, "--baseline", base) == text


def test_the_baseline_may_be_a_run_record(tmp_path: Path) -> None:
    record = write_run(tmp_path / "r" / "records.jsonl", header=make_header(["vanilla", "medusa"]))
    other = write_run(tmp_path / "records.jsonl", header=make_header(["medusa"]))
    cells = cells_of(run(other, "--baseline", record), 1)
    assert DASH not in (cells["Speedup (x)"], cells["Whole answer (x)"])


def test_categories_come_from_a_question_file(tmp_path: Path) -> None:
    answers = write(tmp_path / "a.jsonl", medusa_row(81), medusa_row(82))
    questions = write(
        tmp_path / "question.jsonl", *({"question_id": q, "category": f"kind {q}", "turns": ["x"]} for q in (81, 82))
    )
    text = run(answers, "--by-category", "--questions", questions)
    assert [cells_of(text, index)["Category"] for index in range(3)] == ["all", "kind 81", "kind 82"]


def test_mistakes_on_the_command_line_end_in_one_line(tmp_path: Path) -> None:
    eagle = write(tmp_path / "e.jsonl", spec_bench_row(81))
    record = write_run(tmp_path / "r.jsonl", header=make_header(["eagle", "medusa"]))
    strange = write(tmp_path / "s.jsonl", vanilla_row(999))
    untimed = write(tmp_path / "u.jsonl", vanilla_row(81, wall_time=[0.0, 0.0]))
    failing = write(tmp_path / "f.jsonl", vanilla_row(81, turns=["ERROR", "ERROR"]))
    other = write(tmp_path / "o.jsonl", vanilla_row(81) | {"category": "coding"})
    cases: list[tuple[list[object], str]] = [
        ([eagle, eagle], "e.jsonl is named twice. Name each file once."),
        ([eagle, "--baseline", strange], "s.jsonl: no question in common. Name a baseline"),
        ([eagle, "--baseline", failing], "f.jsonl: no turn that both finished. Name a baseline"),
        ([eagle, "--baseline", other], "not the same questions, 81 is of category 'writing' here and 'coding' there."),
        ([eagle, "--baseline", untimed], "u.jsonl has no times."),
        ([eagle, "--baseline", record], "r.jsonl has no vanilla decoding."),
        ([eagle, "--baseline", tmp_path / "none.jsonl"], "There is no answer file"),
        (
            [write(tmp_path / "m.jsonl", medusa_row()), "--by-category"],
            "m.jsonl has no categories. Name its questions with --questions",
        ),
        ([eagle, "--questions", tmp_path / "none.jsonl"], "There is no question file"),
    ]
    for arguments, says in cases:
        with pytest.raises(KoalaBenchError) as caught:
            run(*arguments)
        assert says in str(caught.value)
        assert "\n" not in str(caught.value)


def test_the_exit_code_of_bad_input_is_2(tmp_path: Path) -> None:
    bad = write(tmp_path / "b.jsonl", "{")
    done = subprocess.run(
        [sys.executable, "-m", "koala_bench.cli", "analyse", str(bad)], check=False, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"koala-bench: {bad}, line 1: not valid JSON")
    assert done.stderr.count("\n") == 1


def test_answer_files_are_read_without_torch() -> None:
    code = "import sys, koala_bench.results.answers.pages, koala_bench.cli.inspect; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_every_definition_of_the_acceptance_length_stands_side_by_side(tmp_path: Path) -> None:
    choice = {
        "index": 0,
        "turns": ["a"],
        "decoding_steps": [3],
        "new_tokens": [6],
        "wall_time": [1.0],
        "accept_lengths": [1, 2, 3],
    }
    line = {"question_id": 81, "model_id": "eagle", "choices": [choice]}
    text = by_definition(read_traces(write(tmp_path / "a.jsonl", json.dumps(line) + "\n")))
    rows = {
        cells[1].strip(): cells[2].strip() for cells in (row.split("|") for row in text.splitlines() if row[:1] == "|")
    }
    assert (rows["tokens per step"], rows["drafts per step"], rows["Medusa, new_tokens / idxs"]) == (
        "2.000",
        "1.000",
        "3.000",
    )
    assert rows["speculators, NeMo Automodel"] == "\N{EN DASH}"  # no file says how deep the drafts were


def test_a_file_without_steps_has_no_definitions_to_show(tmp_path: Path) -> None:
    choice = {"index": 0, "turns": ["a"], "idxs": [2], "new_tokens": [6], "wall_time": [1.0]}
    line = {"question_id": 81, "model_id": "medusa", "choices": [choice]}
    with pytest.raises(KoalaBenchError, match="does not say what each step committed"):
        by_definition(read_traces(write(tmp_path / "a.jsonl", json.dumps(line) + "\n")))
