"""A record's numbers against those worked out by hand."""

from __future__ import annotations

from pathlib import Path

import pytest

from koala_bench.records.reading import Run, read_run
from koala_bench.records.schema import TurnLine
from koala_bench.records.statistics import Interval
from koala_bench.records.summaries import summarise
from tests.support.synthetic_run import QUESTIONS, by_name, changed, make_header, write_run


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return read_run(write_run(tmp_path / "run.jsonl"))


def test_numbers_are_those_worked_out_by_hand(tmp_path: Path) -> None:
    # Two questions of one turn. vanilla: 6 tokens in 6 steps, 10 tokens/s. eagle: steps of 1 + 3 and 1 + 1 tokens.
    def change(turn: TurnLine) -> TurnLine | None:
        if turn["question_id"] > 82 or turn["turn"] or turn["method"] not in ("vanilla", "eagle"):
            return None
        vanilla = turn["method"] == "vanilla"
        accepted, seconds = ([0] * 6, 0.6) if vanilla else ([3, 1], 0.2 if turn["question_id"] == 81 else 0.4)
        turn |= {
            "accepted": accepted,
            "drafted_depth": [0] * 6 if vanilla else [4, 4],
            "new_token_ids": [5, 6, 7, 8, 9, 2],
        }
        return turn | {"decode_s": seconds, "draft_s": None if vanilla else 0.1, "verify_s": None if vanilla else 0.3}

    eagle = by_name(summarise(changed(tmp_path / "run.jsonl", change, header=make_header(["vanilla", "eagle"]))))[
        "eagle"
    ]
    assert eagle.speedup.value == pytest.approx((12 / 0.6) / (12 / 1.2))
    assert eagle.tokens_per_s == pytest.approx(20.0)
    assert eagle.speedup_of_means == pytest.approx(((6 / 0.2 + 6 / 0.4) / 2) / 10)
    assert eagle.mean_of_speedups == pytest.approx((3.0 + 1.5) / 2)
    # With two questions a quarter of the resamples are of the first alone (3x) and a quarter of the second (1.5x).
    assert (eagle.speedup.low, eagle.speedup.high) == pytest.approx((1.5, 3.0))
    assert eagle.acceptance_length.value == 3.0
    assert [(rate.depth, rate.accepted, rate.trials) for rate in eagle.depths] == [
        (1, 4, 4),
        (2, 2, 4),
        (3, 2, 2),
        (4, 0, 2),
    ]
    assert eagle.draft_overhead == pytest.approx(0.25)


def test_the_change_is_against_the_same_head_without_koala(run: Run) -> None:
    summaries = by_name(summarise(run))
    assert {name: summary.original for name, summary in summaries.items()} == {
        "vanilla": None,
        "medusa": None,
        "medusa+koala": "medusa",
        "eagle": None,
        "eagle+koala": "eagle",
    }
    eagle, koala = summaries["eagle"], summaries["eagle+koala"]
    assert koala.change_x
    assert koala.change_percent
    assert koala.length_change
    assert koala.change_x.value == pytest.approx(koala.speedup.value - eagle.speedup.value)
    assert koala.change_percent.value == pytest.approx(100 * (koala.speedup.value / eagle.speedup.value - 1))
    assert koala.length_change.value == pytest.approx(koala.acceptance_length.value - eagle.acceptance_length.value)
    assert koala.change_x.low < koala.change_x.value < koala.change_x.high


def test_vanilla_is_one_by_definition(run: Run) -> None:
    vanilla = summarise(run)[0]
    assert vanilla.speedup == Interval(1.0, 1.0, 1.0)
    assert vanilla.acceptance_length == Interval(1.0, 1.0, 1.0)
    assert vanilla.draft_overhead is None


def test_repeats_change_the_total_and_not_the_number_of_questions(tmp_path: Path, run: Run) -> None:
    header = make_header()
    header["measure"]["repeats"] = 2
    path = tmp_path / "repeated.jsonl"
    write_run(path, finish=False, header=header)
    with open(path, "a", encoding="utf-8") as handle:
        handle.write(
            "".join(
                line.replace('"repeat":0', '"repeat":1')
                for line in path.read_text(encoding="utf-8").splitlines(keepends=True)[1:]
            )
        )
    once, twice = summarise(run)[3], summarise(read_run(path))[3]
    assert twice.questions == once.questions == len(QUESTIONS)
    assert twice.counted == 2 * once.counted
    assert (twice.speedup.low, twice.speedup.high) == pytest.approx((once.speedup.low, once.speedup.high))
