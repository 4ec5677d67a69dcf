"""Killed again and again at random moments, training and evaluation end in the weights, log and records of a run that
nobody disturbed.
"""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from koala_bench.records.reading import read_run
from tests.common.test_process_group import METHODS, TIMES, train_and_evaluate
from tests.support.small_runs import conversations, write_questions
from tests.training.test_training import equal

KILLS = 20


def settings(folder: Path) -> list[str]:
    sizes = [
        "training.batch_tokens=192",
        "training.steps=30",
        "training.checkpoint_every=3",
        "training.held_out_evaluations=3",
    ]
    return [
        *sizes,
        f"evaluation.questions='{folder / 'questions.jsonl'}'",
        "evaluation.max_new_tokens=24",
        "evaluation.warmup=0",
        "evaluation.repeats=2",
    ]


@pytest.mark.slow
def test_twenty_kills_change_nothing(target_folder: Path, tmp_path: Path) -> None:
    conversations(tmp_path)
    write_questions(tmp_path / "questions.jsonl", [("words", [f"count {i}", "go on"]) for i in range(6)])
    whole = tmp_path / "whole"
    train_and_evaluate(target_folder, tmp_path, whole, settings(tmp_path))
    # One process loads everything and forks those that are killed, so that they are killed at work and not while they
    # import torch.
    script = textwrap.dedent(f"""
        import os, random, signal, sys, time
        import torch
        torch.set_num_threads(1)
        sys.path.insert(0, {str(Path(__file__).parents[2])!r})
        from pathlib import Path
        from tests.training.test_kills import settings
        from tests.common.test_process_group import train_and_evaluate
        folder, draw, kills, finished, out = Path({str(tmp_path)!r}), random.Random(0), 0, [], 0
        def written(place):
            return [(path.stat().st_mtime_ns, path.stat().st_size) for name in ("checkpoint.pt", "records.jsonl") if (path := place / name).exists()]
        while kills < {KILLS} or not finished:
            child = os.fork()
            if child == 0:
                code = 1
                try:
                    train_and_evaluate(Path({str(target_folder)!r}), folder, folder / f"killed-{{out}}", settings(folder))
                    code = 0
                finally:
                    os._exit(code)
            # A moment after it has come a step further: else a slow machine would be killed before its first checkpoint
            # each time.
            before, until, status = written(folder / f"killed-{{out}}"), None, None
            while status is None and (until is None or time.monotonic() < until):
                time.sleep(0.005)
                if until is None and kills < {KILLS} and written(folder / f"killed-{{out}}") != before:
                    until = time.monotonic() + draw.uniform(0, 0.3)
                done, found = os.waitpid(child, os.WNOHANG)
                status = found if done else None
            if status is None:
                os.kill(child, signal.SIGKILL)
                assert os.waitpid(child, 0)[1] == signal.SIGKILL
                kills += 1
            else:
                assert status == 0, status
                finished.append(out)
                out += 1
        print(kills, len(finished))
        """)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    kills, finished = map(int, done.stdout.split()[-2:])
    assert kills == KILLS and finished >= 1
    assert "Resuming the training after step" in done.stderr and "turns are there" in done.stderr, (
        "some kills hit the training, some the evaluation"
    )
    expected = read_run(whole / "records.jsonl")
    for number in range(finished):
        folder = tmp_path / f"killed-{number}"
        for method in METHODS:
            assert equal(whole / method, folder / method)
        assert (folder / "training.jsonl").read_text() == (whole / "training.jsonl").read_text()
        found = read_run(folder / "records.jsonl")
        assert found.finished
        assert [without_times(turn) for turn in found.turns] == [without_times(turn) for turn in expected.turns]


def without_times(turn: object) -> str:
    assert isinstance(turn, dict)
    return json.dumps({key: value for key, value in turn.items() if key not in TIMES})
