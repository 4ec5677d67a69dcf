"""Run records: what is written and read, what is refused, resuming, and damaged ones."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from koala_bench.errors import KoalaBenchError
from koala_bench.evaluation.recording import open_record
from koala_bench.records.reading import differences, read_run, read_runs
from koala_bench.records.schema import key_of
from tests.support.synthetic_run import (
    PATTERNS,
    QUESTIONS,
    TOKENS,
    failed,
    make_header,
    make_turn,
    make_turns,
    with_chain,
    write_run,
)

# ---------------------------------------------------------------------------------------------- writing and reading


def test_what_is_written_is_read(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "run.jsonl"))
    assert run.finished
    assert run.header == make_header()
    assert run.turns == make_turns()
    assert list(run.methods) == list(PATTERNS)
    assert [turn["question_id"] for turn in run.turns_of("eagle")] == [
        question for question in QUESTIONS for _ in range(2)
    ]
    assert len(read_runs([run.path, run.path])) == 2


def test_a_turn_is_on_disk_when_append_returns(tmp_path: Path) -> None:
    with open_record(tmp_path / "run.jsonl", make_header()) as writer:
        writer.append(make_turn("vanilla", 81, 0))
        run = read_run(tmp_path / "run.jsonl")
    assert len(run.turns) == 1
    assert not run.finished


def test_the_prefill_token_may_be_no_steps_token(tmp_path: Path) -> None:
    with open_record(tmp_path / "run.jsonl", make_header()) as writer:
        writer.append(make_turn("vanilla", 81, 0, new_token_ids=list(range(TOKENS + 1))))
        writer.append(make_turn("vanilla", 81, 1, new_token_ids=[2], accepted=[], drafted_depth=[], stop="eos"))


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"accepted": [0] * 35}, "drafted_depth: 36 steps, but accepted has 35"),
        ({"new_token_ids": [1]}, "36 steps commit 36 tokens, but new_token_ids has 1"),
        ({"accepted": [1] + [0] * 35, "new_token_ids": list(range(37))}, "more tokens than the draft was deep"),
        ({"decode_s": None}, "decode_s: is null"),
        ({"decode_s": math.nan}, "decode_s: Input should be a finite number"),
        ({"decode_s": -1.0}, "decode_s: Input should be greater than or equal to 0"),
        ({"question_id": "81"}, "question_id: Input should be a valid integer"),
        ({"turn": True}, "turn: Input should be a valid integer"),
        ({"method": "hydra"}, "'hydra' is not among the run's methods"),
        ({"kept_node": [0] * 36}, "kept_node: the run line has no tree for this method"),
        ({"draft_s": 0.1}, "one is null and the other is not"),
        ({"error": {"type": "E", "message": ""}}, "a failed turn has no numbers"),
        ({"tokens": 3}, "tokens: unknown field"),
    ],
)
def test_a_malformed_turn_is_not_written(tmp_path: Path, changes: dict[str, Any], problem: str) -> None:
    with (
        open_record(tmp_path / "run.jsonl", make_header()) as writer,
        pytest.raises(ValueError, match=problem.replace("(", r"\(")),
    ):
        writer.append(make_turn("vanilla", 81, 0) | changes)  # type: ignore[arg-type]
    assert read_run(tmp_path / "run.jsonl").turns == []


def test_kept_nodes_stand_at_the_depths_that_were_accepted(tmp_path: Path) -> None:
    with open_record(tmp_path / "run.jsonl", with_chain(make_header())) as writer:
        right = make_turn("eagle", 81, 0)
        writer.append(right | {"kept_node": right["accepted"]})
        for wrong in (
            [0] * len(right["accepted"] or []),
            (right["accepted"] or [])[1:],
            [5, *(right["accepted"] or [])[1:]],
        ):
            with pytest.raises(ValueError, match="kept_node: not at the depths that accepted says"):
                writer.append(make_turn("eagle", 81, 1) | {"kept_node": wrong})


@pytest.mark.parametrize(
    ("tree", "problem"),
    [
        ({"parents": [0, 0, 1, 2, 3]}, "tree.parents: not a tree"),
        ({"parents": [-1, 0, 3, 2, 3]}, "tree.parents: not a tree"),
        ({"parents": [-1, 0, 1, 2]}, "tree.parents: 4 nodes of depth 3, not 5 of depth 4"),
    ],
)
def test_a_recorded_tree_is_one(tmp_path: Path, tree: dict[str, Any], problem: str) -> None:
    header = with_chain(make_header())
    header["methods"][1]["tree"] |= tree  # type: ignore[operator, typeddict-item]
    with pytest.raises(ValueError, match=problem), open_record(tmp_path / "run.jsonl", header):
        pass


def test_a_turn_is_written_once_and_nothing_follows_the_end(tmp_path: Path) -> None:
    with open_record(tmp_path / "run.jsonl", make_header()) as writer:
        writer.append(make_turn("vanilla", 81, 0))
        with pytest.raises(ValueError, match="already"):
            writer.append(make_turn("vanilla", 81, 0))
        writer.finish(1.0)
        with pytest.raises(ValueError, match="finished"):
            writer.append(make_turn("vanilla", 81, 1))
        with pytest.raises(ValueError, match="finished"):
            writer.finish(1.0)


@pytest.mark.parametrize("field", ["seed", "limits", "target", "methods"])
def test_a_malformed_header_is_not_written(tmp_path: Path, field: str) -> None:
    header = make_header()
    header[field] = "x"  # type: ignore[literal-required]
    with pytest.raises(ValueError, match=field):
        open_record(tmp_path / "run.jsonl", header)
    assert not (tmp_path / "run.jsonl").exists()


# ---------------------------------------------------------------------------------------------- resuming


HALF_LINES = [
    b'{"kind":"turn","method":"ea',
    b'{"kind":"turn","method":"ea\n',
    b'{"kind":"end","status":"finished","turns":33,"wall_s":1.0}',
    b"\xff\xfe\n",
]


@pytest.mark.parametrize("tail", HALF_LINES)
def test_resume_drops_a_half_written_last_line_and_goes_on(tmp_path: Path, tail: bytes) -> None:
    whole = write_run(tmp_path / "whole.jsonl").read_bytes()
    lines = whole.splitlines(keepends=True)
    path = tmp_path / "run.jsonl"
    path.write_bytes(b"".join(lines[:34]) + tail)
    assert not read_run(path).finished
    assert path.read_bytes().endswith(tail), "reading changes nothing"
    with open_record(path, make_header()) as writer:
        assert writer.resumed
        assert len(writer.done) == 33
        for turn in make_turns():
            if key_of(turn) not in writer.done:
                writer.append(turn)
        writer.finish(12.5)
    assert path.read_bytes() == whole


def test_a_header_that_was_half_written_is_written_again(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    path.write_bytes(b'{"kind":"run","schema"')
    with open_record(path, make_header()) as writer:
        assert not writer.resumed
    assert read_run(path).header == make_header()


def test_a_failed_turn_counts_as_done(tmp_path: Path) -> None:
    path = write_run(
        tmp_path / "run.jsonl", lambda turn: failed(turn) if key_of(turn) == ("eagle", 83, 1, 0) else turn, finish=False
    )
    with open_record(path, make_header()) as writer:
        assert ("eagle", 83, 1, 0) in writer.done
    assert len(read_run(path).turns) == len(make_turns())


def test_a_finished_record_is_handed_back_even_to_other_code(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run.jsonl")
    header = make_header()
    header["code"]["commit"] = "f" * 40
    header["run_id"] = "another"
    with open_record(path, header) as writer:
        assert writer.finished
        assert writer.header == make_header()


@pytest.mark.parametrize(
    ("place", "value", "named"),
    [
        (("limits", "max_new_tokens"), 128, "limits.max_new_tokens"),
        (("methods", 4, "weights_sha256"), "cd" * 32, "methods.4.weights_sha256"),
        (("environment", "threads"), 1, "environment.threads"),
        (("environment", "packages", "torch"), "2.14.0", "environment.packages.torch"),
        (("code", "commit"), "f" * 40, "code.commit"),
        (("limits", "stop_ids"), [2, 3], "limits.stop_ids.1"),
    ],
)
def test_another_run_does_not_continue_a_record(
    tmp_path: Path, place: tuple[Any, ...], value: object, named: str
) -> None:
    path = write_run(tmp_path / "run.jsonl", finish=False)
    before = path.read_bytes()
    header: Any = make_header()
    inner = header
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    with pytest.raises(KoalaBenchError, match=f"run.jsonl holds another run; they differ in {named}"):
        open_record(path, header)
    assert path.read_bytes() == before


def test_paths_do_not_make_another_run() -> None:
    header, moved = make_header(), make_header()
    moved["target"]["path"] = "elsewhere"
    moved["methods"][1]["checkpoint"] = "elsewhere"
    moved["created"], moved["run_id"], moved["command"] = "2027-01-01T00:00:00+00:00", "x", []
    assert differences(header, moved) == {}


# ---------------------------------------------------------------------------------------------- damaged records


def edited(path: Path, line: int, edit: Callable[[dict[str, Any]], object]) -> Path:
    """Change one line (counted from 1) of a record."""
    lines = path.read_text(encoding="utf-8").splitlines()
    value = json.loads(lines[line - 1])
    edit(value)
    lines[line - 1] = json.dumps(value)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("line", "edit", "message"),
    [
        (1, lambda value: value.update(seed="0"), ":1: seed: Input should be a valid integer"),
        (1, lambda value: value["target"].pop("dtype"), ":1: target.dtype: Field required"),
        (1, lambda value: value["methods"].append(value["methods"][0]), ":1: methods: 'vanilla' is listed twice"),
        (1, lambda value: value.update(created="yesterday"), ":1: created: not an ISO 8601 time"),
        (1, lambda value: value.update(created="2026-02-03T04:05:06"), ":1: created: has no time zone"),
        (1, lambda value: value.update(kind="turn"), "is not a run record"),
        (
            1,
            lambda value: value.update(schema=1),
            "has record schema 1; this version reads schemas 3, 4, 5 and 6. Read it with koala-bench 0.1.0",
        ),
        (7, lambda value: value.update(accepted=[0]), ":7: drafted_depth: 36 steps, but accepted has 1"),
        (7, lambda value: value.pop("stop"), ":7: stop: Field required"),
        (7, lambda value: value.update(turn=0), ":7: the same method, question, turn and repeat as line 2"),
        (82, lambda value: value.update(turns=3), ":82: the end line counts 3 turns, but there are 80"),
        (82, lambda value: value.update(status="aborted"), ":82: status: Input should be 'finished'"),
    ],
)
def test_a_damaged_line_is_named(
    tmp_path: Path, line: int, edit: Callable[[dict[str, Any]], object], message: str
) -> None:
    path = edited(write_run(tmp_path / "run.jsonl"), line, edit)
    with pytest.raises(KoalaBenchError) as caught:
        read_run(path)
    assert f"{path}" in str(caught.value)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.remedy


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "it has no complete line"),
        (b"{}", "it has no complete line"),
        (b"\x89PNG\r\n\x1a\n\x00\x00", ":1: not a line of JSON"),
        (b"[1]\n", ":1: not a JSON object"),
        (b"[" * 100_000 + b"\n", ":1: not a line of JSON"),
        (b'{"question_id": 81}\n', "its first line is not a 'run' line"),
    ],
)
def test_a_file_that_is_no_record_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "run.jsonl"
    path.write_bytes(content)
    with pytest.raises(KoalaBenchError, match=r"run\.jsonl") as caught:
        read_run(path)
    assert message in str(caught.value)


def test_damage_in_the_middle_is_not_taken_for_an_interrupted_run(tmp_path: Path) -> None:
    lines = write_run(tmp_path / "run.jsonl").read_bytes().splitlines(keepends=True)
    lines[4] = lines[4][:50] + b"\n"
    (tmp_path / "run.jsonl").write_bytes(b"".join(lines))
    with pytest.raises(KoalaBenchError, match=r"run\.jsonl:5: not a line of JSON"):
        open_record(tmp_path / "run.jsonl", make_header())
    assert (tmp_path / "run.jsonl").read_bytes() == b"".join(lines)


def test_lines_after_the_end_are_refused(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run.jsonl")
    with open(path, "a", encoding="utf-8") as handle:
        handle.write(json.dumps(make_turn("vanilla", 81, 0, repeat=1)) + "\n")
    with pytest.raises(KoalaBenchError, match=r"run\.jsonl:83: a line after the end line"):
        read_run(path)


def test_a_missing_file_and_a_folder_are_named(tmp_path: Path) -> None:
    with pytest.raises(KoalaBenchError, match=r"Cannot read the run record .*none\.jsonl: No such file"):
        read_run(tmp_path / "none.jsonl")
    with pytest.raises(KoalaBenchError, match="Is a directory"):
        read_run(tmp_path)
