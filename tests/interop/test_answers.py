"""Answer files in FastChat's format: what FastChat, Medusa and Spec-Bench read from them."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest

from koala_bench.evaluation.recording import open_record
from koala_bench.interop.answers import write_fastchat_answers
from koala_bench.records.reading import read_run
from koala_bench.records.schema import key_of
from tests.support.synthetic_run import PATTERNS, QUESTIONS, TOKENS, failed, make_header, make_turn, steps_of, write_run


def test_fastchat_answers_hold_what_fastchat_medusa_and_spec_bench_read(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "run.jsonl"))
    paths = write_fastchat_answers(run, tmp_path / "answers")
    assert [path.name for path in paths] == [f"tiny-{method}.jsonl" for method in PATTERNS]
    rows = [json.loads(line) for line in paths[3].read_text(encoding="utf-8").splitlines()]
    assert [row["question_id"] for row in rows] == list(QUESTIONS)
    assert len({row["answer_id"] for row in rows}) == len(rows)
    first, turns = rows[0], [make_turn("eagle", 81, 0), make_turn("eagle", 81, 1)]
    assert first["model_id"] == "tiny-eagle"
    assert first["tstamp"] == 1770091506.0  # 2026-02-03T04:05:06 UTC
    (choice,) = first["choices"]
    assert choice["index"] == 0
    assert choice["turns"] == [turn["text"] for turn in turns]
    steps = steps_of("eagle", 81)
    assert choice["idxs"] == [len(steps) - 1] * 2
    assert choice["decoding_steps"] == [len(steps)] * 2
    assert choice["new_tokens"] == [TOKENS, TOKENS]
    parts = ("prefill_s", "draft_prefill_s", "decode_s")
    assert choice["wall_time"] == pytest.approx([sum(turn[part] or 0 for part in parts) for turn in turns])
    assert choice["accept_lengths"] == [count + 1 for count in steps] * 2
    assert sum(choice["accept_lengths"]) == sum(choice["new_tokens"])


def test_fastchat_answers_are_the_same_bytes_again(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "run.jsonl"))
    first = [path.read_bytes() for path in write_fastchat_answers(run, tmp_path / "one")]
    assert first == [path.read_bytes() for path in write_fastchat_answers(run, tmp_path / "two")]


def test_a_failed_answer_is_left_out_of_the_fastchat_file(tmp_path: Path) -> None:
    run = read_run(
        write_run(tmp_path / "run.jsonl", lambda turn: failed(turn) if key_of(turn) == ("eagle", 83, 1, 0) else turn)
    )
    rows = [
        json.loads(line) for line in (write_fastchat_answers(run, tmp_path)[3]).read_text(encoding="utf-8").splitlines()
    ]
    assert [row["question_id"] for row in rows] == [question for question in QUESTIONS if question != 83]


def test_repeats_are_choices_in_the_fastchat_file(tmp_path: Path) -> None:
    header = copy.deepcopy(make_header(["vanilla"]))
    header["measure"]["repeats"] = 2
    with open_record(tmp_path / "run.jsonl", header) as writer:
        for repeat in (0, 1):
            for turn in (0, 1):
                writer.append(make_turn("vanilla", 81, turn, repeat))
    (path,) = write_fastchat_answers(read_run(tmp_path / "run.jsonl"), tmp_path)
    assert [choice["index"] for choice in json.loads(path.read_text(encoding="utf-8"))["choices"]] == [0, 1]
