"""Bounds of a method, worked out by hand and as they hang together on a synthetic run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from koala_bench.records.bounds import acceptance_histogram, bounds
from koala_bench.records.reading import read_run
from koala_bench.records.summaries import sample
from tests.support.synthetic_run import write_run


def turn(accepted: list[int], decode_s: float, depth: int = 3, question: int = 1, **others: Any) -> Any:
    found: dict[str, Any] = {
        "question_id": question, "turn": 0, "repeat": 0, "accepted": accepted, "drafted_depth": [depth] * len(accepted),
        "decode_s": decode_s, "draft_s": 0.25 * decode_s, "verify_s": 0.5 * decode_s,
    }  # fmt: skip
    return {**found, **others}


def test_by_hand() -> None:
    """Four tokens in two steps of 3 s, beside four vanilla tokens of 2 s: a step costs 1.5 tokens."""
    found = bounds([(turn([2, 0], 6.0), turn([0, 0, 0, 0], 8.0, depth=0))])
    assert found is not None
    assert (found.steps, found.acceptance_length, found.offered_length, found.break_even) == (2, 2.0, 4.0, 1.5)
    assert (found.speedup, found.oracle_speedup) == (pytest.approx(4 / 3), pytest.approx(8 / 3))
    assert (found.draft_share, found.verify_share) == (0.25, 0.5)
    assert found.free_oracle_speedup == pytest.approx(4.0 / (1.5 * 0.75))


def test_turns_without_a_step_do_not_count() -> None:
    whole = (turn([2, 0], 6.0), turn([0, 0, 0, 0], 8.0))
    failed = {**turn([], 0.0), **dict.fromkeys(["accepted", "drafted_depth", "decode_s", "draft_s", "verify_s"])}
    others = [(failed, turn([0], 9.0)), (turn([], 0.1), turn([0], 9.0)), (turn([1], 1.0), failed)]
    assert bounds([whole, *others]) == bounds([whole])
    assert bounds(others) is None and bounds([]) is None


def test_parts_that_were_not_timed_are_not_known() -> None:
    found = bounds([(turn([2, 0], 6.0, draft_s=None), turn([0, 0, 0, 0], 8.0))])
    assert found is not None and found.draft_share is None and found.free_oracle_speedup is None
    assert found.oracle_speedup == pytest.approx(8 / 3)


def test_a_run_is_bounded_by_its_oracle_and_vanilla_by_itself(tmp_path: Path) -> None:
    chosen = sample([read_run(write_run(tmp_path / "run.jsonl"))])
    eagle, vanilla = (bounds(chosen.pairs(name)) for name in ("eagle", "vanilla"))
    assert eagle is not None and vanilla is not None
    assert 1.0 < eagle.speedup < eagle.oracle_speedup
    assert eagle.speedup == pytest.approx(chosen.value(chosen.speedup("eagle")))
    assert (vanilla.break_even, vanilla.speedup, vanilla.oracle_speedup) == pytest.approx((1.0, 1.0, 1.0))


@given(st.lists(st.integers(0, 6)))
def test_the_histogram_counts_each_step_once(accepted: list[int]) -> None:
    found = acceptance_histogram(accepted)
    assert sum(found) == len(accepted)
    assert sum(number * count for number, count in enumerate(found)) == sum(accepted)
    assert not found or found[-1]
