"""Reading answer files: what each format gives, what it cannot give, its traps, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from koala_bench.errors import KoalaBenchError
from koala_bench.interop.answers import write_fastchat_answers
from koala_bench.interop.traces import (
    DECODING,
    PREFILL_AND_DECODING,
    Trace,
    is_vanilla,
    read_traces,
    vanilla_stem,
    with_categories,
)
from koala_bench.records.reading import read_run
from tests.support.synthetic_run import failed, make_header, write_run

Row = dict[str, Any]


def medusa_row(question: int = 81, model: str = "medusa-7b", **choice: Any) -> Row:
    """A line as Medusa and EAGLE write it: 2 turns of 3 and 2 steps."""
    values = {
        "index": 0,
        "turns": [f"One {question}.", "Two."],
        "idxs": [2, 1],
        "new_tokens": [6, 5],
        "wall_time": [0.5, 0.25],
    } | choice
    return {"question_id": question, "answer_id": "x", "model_id": model, "choices": [values], "tstamp": 1.0}


def spec_bench_row(question: int = 81, model: str = "vicuna-eagle", category: str = "writing", **choice: Any) -> Row:
    """A line as Spec-Bench writes it: 2 turns of 3 and 2 steps."""
    values: Row = {
        "index": 0,
        "turns": [f"One {question}.", "Two."],
        "decoding_steps": [3, 2],
        "new_tokens": [6, 5],
        "wall_time": [0.5, 0.25],
    }
    values |= {"accept_lengths": [1, 3, 2, 4, 1]} | choice
    return {
        "question_id": question,
        "category": category,
        "answer_id": "x",
        "model_id": model,
        "choices": [values],
        "tstamp": 1.0,
    }


def write(path: Path, *rows: Row | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), encoding="utf-8"
    )
    return path


def read_one(path: Path, *rows: Row | str, vanilla: bool = False) -> Trace:
    (trace,) = read_traces(write(path, *rows), vanilla)
    return trace


# ---------------------------------------------------------------------------------------------- what the formats give


def test_idxs_of_medusa_and_eagle_is_the_index_of_the_last_step(tmp_path: Path) -> None:
    trace = read_one(tmp_path / "a.jsonl", medusa_row())
    assert [(turn.place, turn.tokens, turn.steps, turn.seconds) for turn in trace.turns] == [
        ((81, 0), 6, 3, 0.5),
        ((81, 1), 5, 2, 0.25),
    ]
    assert trace.system == "medusa-7b"
    assert trace.form == "Medusa or EAGLE (idxs, new_tokens, wall_time)"
    assert trace.length_is == "new_tokens / (idxs + 1)"
    assert trace.clock == PREFILL_AND_DECODING
    assert trace.remarks == ()


def test_accept_lengths_of_spec_bench_are_divided_among_the_turns(tmp_path: Path) -> None:
    trace = read_one(tmp_path / "a.jsonl", spec_bench_row())
    assert [turn.lengths for turn in trace.turns] == [(1, 3, 2), (4, 1)]
    assert [turn.committed for turn in trace.turns] == [6, 5]
    assert {turn.category for turn in trace.turns} == {"writing"}
    assert trace.form.startswith("Spec-Bench (decoding_steps, ")
    assert trace.length_is == "mean of accept_lengths"


def test_spec_bench_answers_without_accept_lengths_still_have_steps(tmp_path: Path) -> None:
    row = spec_bench_row()
    del row["choices"][0]["accept_lengths"]
    trace = read_one(tmp_path / "a.jsonl", row)
    assert trace.length_is == "new_tokens / decoding_steps"
    assert [(turn.steps, turn.committed, turn.lengths) for turn in trace.turns] == [(3, 6, None), (2, 5, None)]


def test_a_plain_fastchat_file_gives_turns_and_no_numbers(tmp_path: Path) -> None:
    trace = read_one(
        tmp_path / "a.jsonl", {"question_id": 81, "model_id": "gpt", "choices": [{"index": 0, "turns": ["A.", "B."]}]}
    )
    assert trace.form == "FastChat (turns alone)"
    assert (trace.length_is, trace.clock) == (None, None)
    assert [(turn.tokens, turn.steps, turn.committed, turn.seconds, turn.lengths) for turn in trace.turns] == [
        (None,) * 5
    ] * 2


def test_choices_are_repeats(tmp_path: Path) -> None:
    row = medusa_row()
    row["choices"].append({**row["choices"][0], "index": 1, "idxs": [4, 4]})
    assert [(turn.turn, turn.repeat, turn.steps) for turn in read_one(tmp_path / "a.jsonl", row).turns] == [
        (0, 0, 3),
        (1, 0, 2),
        (0, 1, 5),
        (1, 1, 5),
    ]


def test_blank_lines_windows_ends_a_byte_order_mark_and_unicode_line_ends_are_read(tmp_path: Path) -> None:
    rows = [json.dumps(medusa_row(q, turns=["a\u2028b", "c\u0085d"]), ensure_ascii=False) for q in (81, 82)]
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n\r\n".join(rows).encode())
    (trace,) = read_traces(path)
    assert [turn.question_id for turn in trace.turns] == [81, 81, 82, 82]
    assert trace.turns[0].text == "a\u2028b"


def test_the_order_of_the_lines_does_not_matter(tmp_path: Path) -> None:
    rows = [medusa_row(82), medusa_row(81)]
    assert set(read_one(tmp_path / "a.jsonl", *rows).turns) == set(read_one(tmp_path / "b.jsonl", *rows[::-1]).turns)


# ---------------------------------------------------------------------------------------------- our own files


def test_a_run_record_gives_a_trace_per_method(tmp_path: Path) -> None:
    path = write_run(
        tmp_path / "records.jsonl",
        lambda turn: failed(turn) if (turn["method"], turn["question_id"], turn["turn"]) == ("eagle", 82, 1) else turn,
    )
    traces = read_traces(path)
    assert [trace.system for trace in traces] == [
        "tiny-vanilla",
        "tiny-medusa",
        "tiny-medusa+koala",
        "tiny-eagle",
        "tiny-eagle+koala",
    ]
    eagle = traces[3]
    assert [turn.place for turn in eagle.turns if turn.failed] == [(82, 1)]
    turn, original = eagle.turns[0], read_run(path).turns_of("eagle")[0]
    assert original["accepted"] is not None
    assert (turn.steps, turn.committed) == (
        len(original["accepted"]),
        sum(original["accepted"]) + len(original["accepted"]),
    )
    assert turn.seconds == original["decode_s"]
    assert {trace.clock for trace in traces} == {DECODING}
    assert [is_vanilla(trace) for trace in traces] == [True, False, False, False, False]


def test_an_unfinished_record_says_so(tmp_path: Path) -> None:
    traces = read_traces(write_run(tmp_path / "records.jsonl", finish=False, header=make_header(["vanilla", "medusa"])))
    assert all(trace.remarks == ("The run is not finished.",) for trace in traces)


def test_our_answer_files_give_the_steps_of_the_record_they_were_made_from(tmp_path: Path) -> None:
    path = write_run(tmp_path / "records.jsonl")
    for of_record, answers in zip(
        read_traces(path), write_fastchat_answers(read_run(path), tmp_path / "answers"), strict=True
    ):
        (of_answers,) = read_traces(answers)
        assert of_answers.form.startswith("koala-bench's answers (idxs, decoding_steps, ")
        assert of_answers.system == of_record.system
        assert [(turn.place, turn.lengths, turn.text) for turn in of_answers.turns] == [
            (turn.place, turn.lengths, turn.text) for turn in of_record.turns
        ]
        assert all(
            a.seconds > b.seconds
            for a, b in zip(of_answers.turns, of_record.turns, strict=True)
            if a.seconds and b.seconds
        )  # prefill


def test_an_answer_of_the_prefills_token_alone_took_no_step(tmp_path: Path) -> None:
    row = spec_bench_row(idxs=[-1, 1], decoding_steps=[0, 2], new_tokens=[1, 6], accept_lengths=[4, 1])
    trace = read_one(tmp_path / "a.jsonl", row)
    assert [(turn.steps, turn.committed, turn.tokens) for turn in trace.turns] == [(0, 0, 1), (2, 5, 6)]


# ---------------------------------------------------------------------------------------------- traps


def test_vanilla_files_of_eagle_count_their_tokens_by_steps(tmp_path: Path) -> None:
    trace = read_one(
        tmp_path / "a.jsonl", medusa_row(model="llama-2-chat-70b-fp16-base-in-temperature-0.0", new_tokens=[0, 0])
    )
    assert [turn.tokens for turn in trace.turns] == [3, 2]
    assert trace.length_is == "1 by definition, vanilla decoding"
    assert (
        "new_tokens is 0 throughout (not filled): vanilla decoding makes one token a step, so idxs + 1 counts them."
        in trace.remarks
    )


def test_tokens_that_were_not_filled_in_are_not_guessed_unless_the_user_says_vanilla(tmp_path: Path) -> None:
    row = medusa_row(model="llama-ea", new_tokens=[0, 0])
    trace = read_one(tmp_path / "a.jsonl", row)
    assert [turn.tokens for turn in trace.turns] == [None, None]
    assert trace.length_is is None
    assert "the tokens are not known" in trace.remarks[0]
    assert [turn.tokens for turn in read_one(tmp_path / "a.jsonl", row, vanilla=True).turns] == [3, 2]


def test_times_that_were_not_filled_in_are_no_times(tmp_path: Path) -> None:
    trace = read_one(tmp_path / "a.jsonl", medusa_row(wall_time=[0.0, 0]))
    assert trace.clock is None
    assert [turn.seconds for turn in trace.turns] == [None, None]


def test_a_turn_that_failed_loses_the_numbers_it_repeats(tmp_path: Path) -> None:
    row = spec_bench_row(
        82, turns=["One.", "ERROR"], decoding_steps=[3, 3], new_tokens=[6, 6], accept_lengths=[1, 3, 2, 1, 3, 2]
    )
    trace = read_one(tmp_path / "a.jsonl", spec_bench_row(81), row)
    assert [turn.failed for turn in trace.turns] == [False, False, False, True]
    assert (trace.turns[3].tokens, trace.turns[3].steps, trace.turns[3].seconds, trace.turns[3].lengths) == (None,) * 4
    assert trace.turns[2].lengths == (1, 3, 2)
    said = (
        "1 of 4 turns failed (recorded as ERROR with the numbers of the turn before) and is left out; with them the"
        " file has 2.091 tokens a step."
    )
    assert trace.remarks == (said,)  # (6 + 5 + 6 + 6) / (3 + 2 + 3 + 3)


def test_accept_lengths_that_do_not_fit_the_steps_are_not_used(tmp_path: Path) -> None:
    trace = read_one(tmp_path / "a.jsonl", spec_bench_row(), spec_bench_row(82, accept_lengths=[1, 3]))
    assert trace.length_is == "new_tokens / decoding_steps"
    assert trace.turns[0].lengths is None
    assert "another number of steps than decoding_steps in 1 of 2 answers" in trace.remarks[0]


def test_a_run_that_was_pieced_together_says_so(tmp_path: Path) -> None:
    rows = [medusa_row(81), medusa_row(82) | {"tstamp": 35 * 86_400.0}]
    assert "their time stamps span 35 days" in read_one(tmp_path / "a.jsonl", *rows).remarks[0]
    assert read_one(tmp_path / "b.jsonl", rows[0], medusa_row(82) | {"tstamp": 60.0}).remarks == ()


@pytest.mark.parametrize(
    ("system", "stem"),
    [
        ("vicuna-7b-v1.3-vanilla-float16-temp-0.0", "vicuna-7b-v1.3-"),
        ("llama-2-chat-70b-fp16-base-in-temperature-0.0", "llama-2-chat-70b-fp16-"),
        ("Tiny-Vanilla", "Tiny-"),
        ("ess-vicuna-baseline", "ess-vicuna-"),
        ("vanilla", ""),
        ("codebase-7b-medusa", None),
        ("vicuna-7b-eagle", None),
    ],
)
def test_vanilla_is_recognised_by_a_whole_word(system: str, stem: str | None) -> None:
    assert vanilla_stem(system) == stem


def test_a_head_on_a_base_model_is_not_vanilla(tmp_path: Path) -> None:
    assert not is_vanilla(read_one(tmp_path / "a.jsonl", medusa_row(model="llama-2-7b-base-medusa")))
    assert is_vanilla(read_one(tmp_path / "b.jsonl", medusa_row(model="llama-2-7b-base", new_tokens=[3, 2])))


def test_categories_of_a_question_file_fill_what_is_missing(tmp_path: Path) -> None:
    trace = with_categories(read_one(tmp_path / "a.jsonl", medusa_row(81), medusa_row(82)), {81: "writing"})
    assert [turn.category for turn in trace.turns] == ["writing", "writing", None, None]
    assert {
        turn.category for turn in with_categories(read_one(tmp_path / "b.jsonl", spec_bench_row()), {81: "other"}).turns
    } == {"writing"}


# ---------------------------------------------------------------------------------------------- bad input


def _without(row: Row, key: str) -> Row:
    return {name: value for name, value in row.items() if name != key}


BAD: dict[str, tuple[list[Row | str], str]] = {
    "empty": ([], "a.jsonl has no answers: it is empty."),
    "blank": (["", "  "], "a.jsonl has no answers: it is empty."),
    "cut": ([medusa_row(), '{"question_id": 82, "cho'], "a.jsonl, line 2: not valid JSON (Unterminated string"),
    "nested": (["[" * 100_000], "a.jsonl, line 1: JSON that Python cannot read"),
    "digits": (['{"question_id": ' + "9" * 5000 + "}"], "a.jsonl, line 1: JSON that Python cannot read"),
    "list": (["[1]"], "a.jsonl, line 1: a JSON value that is not an object."),
    "nul": (["\x00\x01\x02"], "a.jsonl, line 1: not valid JSON"),
    "question": (
        [{"question_id": 81, "category": "writing", "turns": ["Hello?"]}],
        "a.jsonl, line 1: a question, not an answer. Name the file of answers",
    ),
    "judgment": (
        [{"question_id": 81, "model": "x", "judge": ["gpt-4"]}],
        "unknown format: there are no 'choices' (fields: question_id, model, judge)",
    ),
    "object": ([{}], "unknown format: there are no 'choices' (fields: none)"),
    "no id": ([_without(medusa_row(), "question_id")], "a.jsonl, line 1: question_id: Field required."),
    "text id": (
        [medusa_row() | {"question_id": "81"}],
        "a.jsonl, line 1: question_id: Input should be a valid integer.",
    ),
    "no model": ([_without(medusa_row(), "model_id")], "a.jsonl, line 1: model_id: Field required."),
    "no choice": ([medusa_row() | {"choices": []}], "a.jsonl, line 1: choices: List should have at least 1 item"),
    "choices": (
        [medusa_row() | {"choices": {"turns": ["x"]}}],
        "a.jsonl, line 1: choices: Input should be a valid list.",
    ),
    "turns": ([medusa_row(turns="One.")], "a.jsonl, line 1: choices.0.turns: Input should be a valid list."),
    "no turn": ([medusa_row(turns=[])], "a.jsonl, line 1: choices.0.turns: List should have at least 1 item"),
    "turn": ([medusa_row(turns=["One.", None])], "a.jsonl, line 1: choices.0.turns.1: Input should be a valid string."),
    "text tokens": (
        [medusa_row(new_tokens=[6, "5"])],
        "a.jsonl, line 1: choices.0.new_tokens.1: Input should be a valid integer.",
    ),
    "broken tokens": (
        [medusa_row(new_tokens=[6, 5.5])],
        "a.jsonl, line 1: choices.0.new_tokens.1: Input should be a valid integer.",
    ),
    "negative tokens": (
        [medusa_row(new_tokens=[6, -5])],
        "a.jsonl, line 1: choices.0.new_tokens.1: Input should be greater than or equal to 0.",
    ),
    "true": ([medusa_row(idxs=[True, 1])], "a.jsonl, line 1: choices.0.idxs.0: Input should be a valid integer."),
    "negative index": (
        [medusa_row(idxs=[-2, 1])],
        "a.jsonl, line 1: choices.0.idxs.0: Input should be greater than or equal to -1.",
    ),
    "nan": (
        [medusa_row(wall_time=[0.5, float("nan")])],
        "a.jsonl, line 1: choices.0.wall_time.1: Input should be a finite number.",
    ),
    "negative time": (
        [medusa_row(wall_time=[0.5, -1])],
        "a.jsonl, line 1: choices.0.wall_time.1: Input should be greater than or equal to 0.",
    ),
    "no time": ([medusa_row(), medusa_row(82, wall_time=[0.5, 0.0])], "a.jsonl, line 2: 'wall_time' of turn 2 is 0."),
    "few times": (
        [medusa_row(wall_time=[0.5])],
        "a.jsonl, line 1: 'wall_time' has 1 numbers for 2 turns. It has one a turn.",
    ),
    "many steps": (
        [spec_bench_row(decoding_steps=[3, 2, 1])],
        "a.jsonl, line 1: 'decoding_steps' has 3 numbers for 2 turns.",
    ),
    "contradiction": ([spec_bench_row(idxs=[3, 2])], "a.jsonl, line 1: 'decoding_steps' is not idxs + 1."),
    "twice": (
        [medusa_row(81), medusa_row(82), medusa_row(81)],
        "a.jsonl, line 3: question 81 was answered in line 1 already. Keep one of the two",
    ),
    "two models": (
        [medusa_row(81), medusa_row(82, "other")],
        "a.jsonl, line 2: of model 'other', but line 1 is of 'medusa-7b'. Split the file by model.",
    ),
    "two formats": (
        [medusa_row(81), spec_bench_row(82, "medusa-7b")],
        "a.jsonl, line 2: 'accept_lengths' is in some answers and not in others.",
    ),
    "numbers later": (
        [{"question_id": 81, "model_id": "m", "choices": [{"turns": ["x"]}]}, medusa_row(82, "m")],
        "a.jsonl, line 2: 'idxs' is in some answers and not in others.",
    ),
    "headless record": (
        [{"kind": "turn", "method": "vanilla"}],
        "a.jsonl is not a run record: its first line is not a 'run' line.",
    ),
    "old record": ([{"kind": "run", "schema": 99}], "a.jsonl has record schema 99"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_wrong_file_ends_in_one_line_with_file_line_and_remedy(case: str, tmp_path: Path) -> None:
    rows, says = BAD[case]
    path = write(tmp_path / "a.jsonl", *rows)
    with pytest.raises(KoalaBenchError) as caught:
        read_traces(path)
    assert f"{tmp_path}/{says}" in str(caught.value) or (
        f"{tmp_path}/a.jsonl" in str(caught.value) and says in str(caught.value)
    )
    assert "\n" not in str(caught.value)
    assert caught.value.remedy


BAD_PLACES: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda path: None, "There is no answer file"),
    "folder": (lambda path: path.mkdir(), "is a folder, no answer file."),
    "gzip": (
        lambda path: path.write_bytes(b"\x1f\x8b\x08\x00" + bytes(range(128, 256))),
        "line 1: not UTF-8 text. Unpack it",
    ),
    "latin-1": (
        lambda path: path.write_bytes(json.dumps(medusa_row()).encode() + b"\n\xe4\n"),
        "line 2: not UTF-8 text.",
    ),
}


@pytest.mark.parametrize("case", BAD_PLACES)
def test_a_file_that_cannot_be_read_is_named(case: str, tmp_path: Path) -> None:
    make, says = BAD_PLACES[case]
    make(tmp_path / "a.jsonl")
    with pytest.raises(KoalaBenchError, match=r"a\.jsonl") as caught:
        read_traces(tmp_path / "a.jsonl")
    assert says in str(caught.value)
