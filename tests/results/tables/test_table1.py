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
from koala_bench.records.reading import Run
from koala_bench.records.schema import TurnLine, key_of
from koala_bench.records.statistics import Interval
from koala_bench.records.summaries import summarise
from koala_bench.results.tables.building import write_table
from koala_bench.results.tables.columns import COLUMNS
from koala_bench.results.tables.published import Paper, TableSpec
from tests.support.markdown import table_rows, table_under
from tests.support.synthetic_run import by_name, changed, failed, make_header


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
    markdown, _, table = (path.read_text(encoding="utf-8") for path in write_table([run], tmp_path, spec, paper))
    assert "15/16" in markdown
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
        (Interval(0.1, 0.05, 0.15), "contradicts (below)"),
        (Interval(0.5, 0.45, 0.55), "contradicts (above)"),
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
