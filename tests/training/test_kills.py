"""Killed again and again at random moments, training and evaluation end in the weights, log and records of a run that
nobody disturbed.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from koala_bench.records.reading import read_run
from tests.common.test_process_group import TIMES, train_and_evaluate
from tests.support.processes import killed
from tests.support.small_runs import conversations, write_questions
from tests.training.test_training import equal

KILLS = 20
METHOD = "eagle+koala"


def settings(folder: Path) -> list[str]:
    sizes = [
        "training.batch_tokens=192",
        "training.steps=24",
        "training.checkpoint_every=2",
        "training.held_out_evaluations=2",
    ]
    return [
        *sizes, f"evaluation.questions='{folder / 'questions.jsonl'}'", "evaluation.max_new_tokens=16",
        "evaluation.warmup=0", "evaluation.repeats=2",
    ]  # fmt: skip


def soon_after_a_step(out: Path, draw: random.Random) -> Callable[[], bool]:
    """True from a random moment on after a run has come further: else a slow machine would be killed before its first
    checkpoint each time.
    """

    def written() -> list[tuple[int, int]]:
        found = []
        for path in (out / "checkpoint.pt", out / "records.jsonl"):
            with suppress(FileNotFoundError):  # a checkpoint is moved aside while the next one is written
                found.append((path.stat().st_mtime_ns, path.stat().st_size))
        return found

    before, until = written(), float("inf")

    def ready() -> bool:
        nonlocal until
        if until == float("inf") and written() != before:
            until = time.monotonic() + draw.uniform(0, 0.1)
        return time.monotonic() > until

    return ready


@pytest.mark.slow
def test_twenty_kills_change_nothing(target_folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    conversations(tmp_path)
    write_questions(tmp_path / "questions.jsonl", [("words", [f"count {i}", "go on"]) for i in range(6)])
    whole, draw, kills, finished = tmp_path / "whole", random.Random(0), 0, 0
    train_and_evaluate(target_folder, tmp_path, whole, settings(tmp_path), [METHOD])
    while kills < KILLS or not finished:
        out = tmp_path / f"killed-{finished}"
        ready = soon_after_a_step(out, draw) if kills < KILLS else lambda: False
        if killed(ready, train_and_evaluate, target_folder, tmp_path, out, settings(tmp_path), [METHOD]):
            kills += 1
        else:
            finished += 1
    said = capfd.readouterr().err
    assert "Resuming the training after step" in said and "turns are there" in said, (
        "some kills hit the training, some the evaluation"
    )
    expected = read_run(whole / "records.jsonl")
    for number in range(finished):
        folder = tmp_path / f"killed-{number}"
        assert equal(whole / METHOD, folder / METHOD)
        assert (folder / "training.jsonl").read_text() == (whole / "training.jsonl").read_text()
        found = read_run(folder / "records.jsonl")
        assert found.finished
        assert [without_times(turn) for turn in found.turns] == [without_times(turn) for turn in expected.turns]


def without_times(turn: object) -> str:
    assert isinstance(turn, dict)
    return json.dumps({key: value for key, value in turn.items() if key not in TIMES})
