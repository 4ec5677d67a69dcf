"""Evaluation: what goes wrong ends no run, or ends it in one clear line before it starts."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import MistralConfig
from typer.testing import CliRunner

import koala_bench.evaluation.answering as evaluation
from koala_bench.cli import app
from koala_bench.decoding.loop import Decoded, decode
from koala_bench.dialogues.encoding import encode_prompt
from koala_bench.dialogues.questions import read_questions
from koala_bench.engine.loading.targets import load_target
from koala_bench.engine.target import Target
from koala_bench.errors import KoalaBenchError
from koala_bench.evaluation.methods import load_methods
from koala_bench.records.reading import read_run
from koala_bench.records.summaries import summarise
from koala_bench.testing import save_tiny_target, tiny_config
from tests.evaluation.test_evaluation import by_turn, count_decodes
from tests.support.small_runs import METHODS, Bench, write_questions


def test_a_prompt_that_is_too_long_fails_its_turns_and_the_run_goes_on(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = "word " * 120  # the context is 512 tokens of one byte each
    asked = write_questions(
        tmp_path / "asked.jsonl", [("a", [long, "second"]), ("b", ["first", long]), ("c", ["first", "second"])]
    )
    settings = (f"evaluation.questions='{asked}'", "evaluation.max_new_tokens=4")
    run = bench.run(tmp_path / "record.jsonl", ["vanilla", "medusa", "eagle"], *settings)
    failed = {(turn["question_id"], turn["turn"]) for turn in run.turns if turn["error"]}
    assert run.finished
    assert failed == {(81, 0), (81, 1), (82, 1)}
    assert len(run.turns) == 3 * 3 * 2
    for turn in run.turns:
        if turn["error"]:
            assert [turn[name] for name in ("new_token_ids", "accepted", "text", "prefill_s", "decode_s")] == [None] * 5  # type: ignore[literal-required]
    first, later = (by_turn(run)[81, turn, 0]["eagle"] for turn in (0, 1))
    assert (
        first["error"]
        and first["error"]["type"] == "KoalaBenchError"
        and "has a context of 512" in first["error"]["message"]
        and first["prompt_tokens"]
    )
    assert (
        later["error"]
        and "Vanilla decoding gave no answer" in later["error"]["message"]
        and later["prompt_tokens"] is None
    )

    calls = count_decodes(monkeypatch)
    bench.run(tmp_path / "record.jsonl", ["vanilla", "medusa", "eagle"], *settings)
    assert calls == []  # failed turns are not tried over and over

    assert CliRunner().invoke(app, ["table", str(run.path), "--out", str(tmp_path)]).exit_code == 0
    table = (tmp_path / "table1.md").read_text()
    assert "failed turns, which have no numbers: vanilla 3, medusa 3, eagle 3" in table
    assert "has a context of 512" in table


def test_answers_end_where_the_context_does(bench: Bench, tmp_path: Path) -> None:
    asked = write_questions(tmp_path / "asked.jsonl", [("a", ["word " * 66])])
    run = bench.run(
        tmp_path / "record.jsonl", METHODS, f"evaluation.questions='{asked}'", "evaluation.max_new_tokens=400"
    )
    assert {turn["stop"] for turn in run.turns} == {"context"}
    assert len({tuple(turn["new_token_ids"] or []) for turn in run.turns}) == 1
    assert {(turn["prompt_tokens"] or 0) + len(turn["new_token_ids"] or []) for turn in run.turns} == {
        513
    }  # the last token needs no position


def spoil(monkeypatch: pytest.MonkeyPatch, name: str, change: Any) -> None:
    """Pass every answer of one kind of head through ``change``."""

    def spoilt(target: Target, head: Any, *rest: Any, **more: Any) -> Decoded:
        answer = decode(target, head, *rest, **more)
        return change(answer) if type(head).__name__ == name else answer

    monkeypatch.setattr(evaluation, "decode", spoilt)


def test_a_different_answer_is_recorded_with_its_place_and_the_targets_gap(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def change(answer: Decoded) -> Decoded:
        return dataclasses.replace(
            answer, tokens=[*answer.tokens[:4], (answer.tokens[4] + 1) % 259, *answer.tokens[5:]]
        )

    spoil(monkeypatch, "Eagle", change)
    run = bench.run(tmp_path / "record.jsonl", ["vanilla", "medusa", "eagle"])
    assert bench.target.tokenizer is not None
    for answers in by_turn(run).values():
        truth, found = answers["vanilla"]["new_token_ids"], answers["eagle"]["first_difference"]
        assert truth and found
        assert (found["position"], found["token"], found["vanilla_token"]) == (4, (truth[4] + 1) % 259, truth[4])
        assert found["top2_gap"] > 0
        assert answers["medusa"]["first_difference"] is answers["vanilla"]["first_difference"] is None
    # The gap once more, by the stock model.
    question = read_questions(bench.folder / "questions.jsonl")[0]
    prompt = encode_prompt(bench.template, bench.target.tokenizer, question.turns[:1])
    line = by_turn(run)[81, 0, 0]
    logits = bench.target.model(
        input_ids=torch.tensor([[*prompt, *(line["vanilla"]["new_token_ids"] or [])[:4]]])
    ).logits[0, -1]
    best = logits.topk(2).values
    assert line["eagle"]["first_difference"]
    assert line["eagle"]["first_difference"]["top2_gap"] == pytest.approx(float(best[0] - best[1]), rel=1e-9)


def test_an_answer_that_stops_elsewhere_is_a_defect_not_a_tie(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(monkeypatch, "Medusa", lambda answer: dataclasses.replace(answer, tokens=answer.tokens[:-1]))
    run = bench.run(tmp_path / "record.jsonl", ["vanilla", "medusa"])
    _, medusa = summarise(run)
    assert len(medusa.differing) == medusa.compared > 0
    assert {(found.position, found.token, found.top2_gap) for found in medusa.differing} == {(11, None, None)}


@pytest.mark.parametrize("name", ["Eagle", "Vanilla"])
def test_a_method_without_memory_fails_alone(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    def fail(answer: Decoded) -> Decoded:
        raise RuntimeError("out of memory\nwith many details")

    spoil(monkeypatch, name, fail)
    with pytest.raises(KoalaBenchError, match=rf"{name.lower()}: no turn of \d succeeded: out of memory"):
        bench.run(tmp_path / "record.jsonl", ["vanilla", "medusa", "eagle"], "evaluation.max_new_tokens=3")
    run = read_run(tmp_path / "record.jsonl")
    reasons = {(turn["method"], turn["turn"]): turn["error"] for turn in run.turns}
    assert run.finished
    out_of_memory = {"type": "RuntimeError", "message": "out of memory"}
    if name == "Eagle":
        assert {key for key, error in reasons.items() if error} == {("eagle", 0), ("eagle", 1)}
        assert reasons["eagle", 1] == out_of_memory
    else:  # without vanilla's answer nobody has a second prompt
        assert {key for key, error in reasons.items() if error} == {
            ("vanilla", 0),
            ("vanilla", 1),
            ("medusa", 1),
            ("eagle", 1),
        }
        assert reasons["vanilla", 0] == out_of_memory


def test_a_run_without_any_answer_ends_with_the_reason(bench: Bench, tmp_path: Path) -> None:
    asked = write_questions(tmp_path / "asked.jsonl", [("a", ["word " * 120]), ("b", ["word " * 130])])
    for _ in range(2):  # a finished record of failures is no success either
        with pytest.raises(KoalaBenchError, match=r"vanilla: no turn of 2 succeeded: .*has a context of 512"):
            bench.run(tmp_path / "record.jsonl", ["medusa"], f"evaluation.questions='{asked}'", "evaluation.warmup=1")


def test_some_failures_are_counted_at_the_end(bench: Bench, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = write_questions(tmp_path / "asked.jsonl", [("a", ["word " * 120]), ("b", ["short"])])
    settings = (f"evaluation.questions='{asked}'", "evaluation.max_new_tokens=3", "evaluation.warmup=1")
    assert bench.run(tmp_path / "record.jsonl", ["vanilla", "medusa"], *settings).finished
    said = capsys.readouterr().err
    assert "vanilla: 1 of 2 turns failed" in said and "medusa: 1 of 2 turns failed" in said


@pytest.mark.parametrize(("reason", "stops"), [("a head's defect", True), ("out of memory", False)])
def test_a_failing_warm_up_stops_at_once_unless_it_is_memory(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reason: str, stops: bool
) -> None:
    calls: list[int] = []

    def fail_first(answer: Decoded) -> Decoded:
        calls.append(1)
        if stops or len(calls) == 1:
            raise RuntimeError(reason)
        return answer

    spoil(monkeypatch, "Medusa", fail_first)
    settings = ("evaluation.warmup=1", "evaluation.max_new_tokens=3")
    if stops:
        with pytest.raises(KoalaBenchError, match=f"medusa cannot answer: {reason}"):
            bench.run(tmp_path / "record.jsonl", ["medusa"], *settings)
        assert len(calls) == 1
    else:
        assert all(turn["error"] is None for turn in bench.run(tmp_path / "record.jsonl", ["medusa"], *settings).turns)


def test_room_is_held_against_a_window_before_it_is_rounded(bench: Bench, tmp_path: Path) -> None:
    """What is needed fits into the window, what is taken at a time does not."""
    config = MistralConfig(**{**tiny_config().to_dict(), "sliding_window": 200, "model_type": "mistral"})
    target = load_target(str(save_tiny_target(tmp_path / "target", config)), "cpu", "float64")
    asked = write_questions(tmp_path / "asked.jsonl", [("a", ["hello"]), ("b", ["word " * 40])])
    settings = (f"evaluation.questions='{asked}'", "evaluation.max_new_tokens=3", "evaluation.warmup=1")
    run = bench.run(tmp_path / "record.jsonl", ["vanilla"], *settings, target=target)
    short, long = run.turns
    assert short["error"] is None
    assert long["error"] is not None and "last 200 tokens" in long["error"]["message"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("methods.medusa.tree='chain-5'", "5 levels deep, the head drafts only 4"),
        ("methods.medusa.tree='260x1'", "needs 260 candidates"),
        ("methods.medusa.tree='oak'", "oak"),
    ],
)
def test_a_tree_that_a_head_cannot_fill_is_refused(bench: Bench, tmp_path: Path, change: str, words: str) -> None:
    with pytest.raises(KoalaBenchError, match=words):
        bench.run(tmp_path / "record.jsonl", ["medusa"], change)
    assert not (tmp_path / "record.jsonl").exists()


def test_a_head_that_is_not_there_is_one_clear_error(bench: Bench, tmp_path: Path) -> None:
    with pytest.raises(KoalaBenchError, match=r"no trained head in .*nowhere.eagle"):
        load_methods(bench.preset(), ["eagle"], bench.target, tmp_path / "nowhere")


def test_a_head_of_other_weights_is_used_but_not_silently(
    bench: Bench, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = load_target(str(save_tiny_target(tmp_path / "target", seed=1)), "cpu", "float64")
    run = bench.run(
        tmp_path / "record.jsonl", ["eagle"], "evaluation.limit=1", "evaluation.max_new_tokens=4", target=other
    )
    assert "eagle was trained on other weights" in capsys.readouterr().err
    assert all(
        len({tuple(turn["new_token_ids"] or []) for turn in answers.values()}) == 1 for answers in by_turn(run).values()
    )
    load_methods(bench.preset(), ["eagle"], bench.target, bench.heads)
    assert capsys.readouterr().err == ""
