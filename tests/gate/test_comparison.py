"""compare: verdicts follow from the intervals, and the command goes from a file with a head to a verdict."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from koala_bench.contract.scaffold import new_head
from koala_bench.errors import KoalaBenchError
from koala_bench.gate.comparison import compare_heads, refuse_changed_code, verdict_table
from koala_bench.presets import load_preset
from koala_bench.records import statistics
from koala_bench.records.reading import Run, read_run
from koala_bench.testing import save_tiny_target
from tests.support.commands import Koala, decoding, settings
from tests.support.markdown import table_rows
from tests.support.small_runs import conversations, write_questions
from tests.support.synthetic_run import PATTERNS, failed, make_header, write_run, write_sampled

MINE = ["vanilla", "medusa", "eagle", "mine", "mine+koala"]


@pytest.fixture(autouse=True)
def patterns(monkeypatch: pytest.MonkeyPatch) -> None:
    """``mine`` is EAGLE under another name; with koala it drafts better and takes longer."""
    monkeypatch.setitem(PATTERNS, "mine", PATTERNS["eagle"])
    monkeypatch.setitem(PATTERNS, "mine+koala", ([4, 3, 4, 4], 0.030))


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return read_run(write_run(tmp_path / "run.jsonl", header=make_header(MINE)))


def tau(run: Run, method: str) -> float:
    accepted = [count for turn in run.turns_of(method) for count in turn["accepted"] or []]
    return sum(accepted) / len(accepted) + 1


# ---------------------------------------------------------------------------------------------- verdicts


def test_each_head_is_judged_against_each_baseline_and_its_plain_form(run: Run) -> None:
    found = compare_heads(run, ["mine", "mine+koala"])
    assert [(each.head.name, each.baseline.name) for each in found] == [
        ("mine", "vanilla"), ("mine", "medusa"), ("mine", "eagle"),
        ("mine+koala", "vanilla"), ("mine+koala", "medusa"), ("mine+koala", "eagle"), ("mine+koala", "mine"),
    ]  # fmt: skip
    verdicts = {(each.head.name, each.baseline.name): (each.length_verdict, each.speed_verdict) for each in found}
    assert verdicts["mine", "vanilla"] == ("better", "better")
    assert verdicts["mine", "eagle"] == ("not distinguishable", "not distinguishable")
    assert verdicts["mine+koala", "mine"] == ("better", "worse")


def test_the_changes_are_those_of_the_record(run: Run) -> None:
    (found,) = (each for each in compare_heads(run, ["mine+koala"]) if each.baseline.name == "medusa")
    assert found.length.value == pytest.approx(100 * (tau(run, "mine+koala") / tau(run, "medusa") - 1))
    seconds = {
        name: math.fsum(turn["decode_s"] or 0 for turn in run.turns_of(name)) for name in ("mine+koala", "medusa")
    }
    assert found.speed.value == pytest.approx(
        100 * (seconds["medusa"] / seconds["mine+koala"] - 1)
    )  # both give the same tokens
    assert found.length.low < found.length.value < found.length.high


def test_only_turns_that_all_compared_methods_finished_count(tmp_path: Path) -> None:
    def breaks(turn):  # type: ignore[no-untyped-def]
        return failed(turn) if turn["method"] == "medusa" and turn["question_id"] < 84 else turn

    run = read_run(write_run(tmp_path / "run.jsonl", breaks, header=make_header(MINE)))
    assert {each.head.counted for each in compare_heads(run, ["mine"])} == {10}
    assert {each.head.counted for each in compare_heads(run, ["mine"], ["eagle"])} == {16}


def test_a_single_question_distinguishes_nothing(tmp_path: Path) -> None:
    run = read_run(
        write_run(
            tmp_path / "run.jsonl", lambda turn: turn if turn["question_id"] == 81 else None, header=make_header(MINE)
        )
    )
    assert {(each.length_verdict, each.speed_verdict) for each in compare_heads(run, ["mine+koala"])} == {
        ("not distinguishable", "not distinguishable")
    }


def test_what_cannot_be_compared_is_one_clear_error(run: Run, tmp_path: Path) -> None:
    with pytest.raises(KoalaBenchError, match=r"has no method 'hawk'\. It has vanilla, medusa"):
        compare_heads(run, ["hawk"])
    with pytest.raises(KoalaBenchError, match="nothing to compare"):
        compare_heads(run, ["vanilla", "eagle"], ["eagle"])
    broken = read_run(
        write_run(
            tmp_path / "broken.jsonl",
            lambda turn: failed(turn) if turn["method"] == "mine" else turn,
            header=make_header(MINE),
        )
    )
    with pytest.raises(KoalaBenchError, match="mine finished no turn"):
        compare_heads(broken, ["mine"])


def test_the_table_can_be_pasted_and_says_what_it_rests_on(run: Run) -> None:
    text = verdict_table(run, compare_heads(run, ["mine", "mine+koala"]))
    rows = [line for line in text.split("\n\n**")[0].splitlines() if line.startswith("|")]
    assert len(rows) == 2 + 7 and {row.count("|") for row in rows} == {10}
    cells = table_rows(text)
    assert ["mine+koala", "mine"] in [row[:2] for row in cells]
    assert {"better", "worse"} <= {cell for row in cells for cell in row}
    for words in (statistics.CAUTION, "Training seed: 0.", "8 of them counted", "tiny-0001", "Example CPU", "bundled"):
        assert words in text
    assert ["mine", "16/16", "16/16"] in cells and "unfinished" not in text
    assert text == verdict_table(run, compare_heads(run, ["mine", "mine+koala"]))


def test_an_unfinished_record_is_said_to_be(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "run.jsonl", finish=False, header=make_header(MINE)))
    assert "tiny: unfinished, " in verdict_table(run, compare_heads(run, ["mine"]))


def test_a_lossy_method_is_called_so_with_its_distance(tmp_path: Path) -> None:
    run = read_run(write_sampled(tmp_path / "run.jsonl", "mine", MINE))
    text = verdict_table(run, compare_heads(run, ["mine", "mine+koala"]))
    label = "mine (lossy, total variation 0.30)"
    assert text.startswith(f"# {label}, mine+koala on tiny\n")
    pairs = [row[:2] for row in table_rows(text)]
    assert (
        [label, "eagle"] in pairs and ["mine+koala", label] in pairs and not [pair for pair in pairs if "mine" in pair]
    )
    assert "Lossy, by typical acceptance: mine (threshold " in text
    assert "0/0" not in text


# -------------------------------------------------------------------------------------------- on a record that is there


def test_the_command_judges_a_finished_record(koala: Koala, run: Run, tmp_path: Path) -> None:
    result = koala(
        "compare", "--records", str(run.path), "--methods", "vanilla,eagle,mine", "--out", str(tmp_path / "out")
    )
    assert result.code == 0
    assert [row[:2] for row in table_rows(result.out)[1:3]] == [["mine", "vanilla"], ["mine", "eagle"]]
    assert (tmp_path / "out" / "verdict.md").read_text() == result.out[:-1]
    chosen = koala("compare", "--records", str(run.path), "--head", "eagle", "--methods", "medusa,eagle").out
    assert [row[:2] for row in table_rows(chosen)[1:3]] == [["eagle", "vanilla"], ["eagle", "medusa"]]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--methods", "vanilla,medusa"], "None of the methods vanilla, medusa is a head of your own"),
        (["--methods", "mine,hawk"], "no method 'hawk'"),
        (["--methods", "mine,eagle", "--head", "hawk"], "--head hawk is not one of --methods"),
        (["--head", "vanilla"], "Vanilla decoding is what the others are compared with"),
    ],
)
def test_wrong_options_are_one_clear_error(koala: Koala, run: Run, options: list[str], words: str) -> None:
    result = koala("compare", "--records", str(run.path), *options)
    assert (result.code, result.out) == (2, "")
    assert words in result.complaint


# --------------------------------------------------------------------------------------------- from a file to a verdict


def test_the_command_trains_measures_and_judges_a_head_in_a_file(
    koala: Koala, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    save_tiny_target(tmp_path / "target")
    conversations(tmp_path)
    write_questions(tmp_path / "questions.jsonl", [("a", ["count 5"]), ("b", ["spell it"])])
    code = tmp_path / "my_own" / "my_own.py"
    new_head("my_own")
    command = [
        "compare",
        *settings(tmp_path),
        *decoding(tmp_path),
        "--methods",
        "vanilla,medusa,./my_own/my_own.py:MyOwnHead,./my_own/my_own.py:MyOwnHead+koala",
    ]

    result = koala(*command)
    assert result.code == 0, result.err
    out = tmp_path / "results" / "runs" / "compare-target-questions"
    assert (out / "verdict.md").read_text() in result.out
    assert [row[:2] for row in table_rows(result.out) if row[0].startswith("My") and len(row) == 9] == [
        ["MyOwnHead", "vanilla"], ["MyOwnHead", "medusa"],
        ["MyOwnHead+koala", "vanilla"], ["MyOwnHead+koala", "medusa"], ["MyOwnHead+koala", "MyOwnHead"],
    ]  # fmt: skip
    run = read_run(out / "records.jsonl")
    assert {name: (each["layers"], each["adversarial"]) for name, each in run.methods.items()} == {
        "vanilla": (0, False), "medusa": (1, False), "MyOwnHead": (1, False), "MyOwnHead+koala": (2, True),
    }  # fmt: skip
    # One training: the manifests agree on data and order, and name all the methods.
    manifests = [
        json.loads((out / "heads" / name / "training.json").read_text())
        for name in ("medusa", "MyOwnHead", "MyOwnHead+koala")
    ]
    assert len({json.dumps({**manifest, "method": None}) for manifest in manifests}) == 1

    again = koala(*command)
    assert again.code == 0 and again.out == result.out
    assert "Reusing the trained heads" in again.err and "Reusing the finished record" in again.err

    code.write_text(code.read_text() + "\n# changed\n")
    refused = koala(*command)
    assert refused.code == 2
    assert "The code of MyOwnHead, MyOwnHead+koala is not the one that was trained" in refused.complaint


def test_a_damaged_note_of_the_code_is_one_clear_error(tmp_path: Path) -> None:
    preset = load_preset("tiny")
    refuse_changed_code(preset, ["vanilla", "eagle"], tmp_path)()
    refuse_changed_code(preset, ["medusa"], tmp_path)()
    assert json.loads((tmp_path / "sources.json").read_text()).keys() == {"eagle", "medusa"}
    for text in ("{", "[]"):
        (tmp_path / "sources.json").write_text(text)
        with pytest.raises(KoalaBenchError, match=r"sources\.json is damaged"):
            refuse_changed_code(preset, ["eagle"], tmp_path)
