"""Evaluation: one record for all methods, equal answers, exact resume. What goes wrong is in
test_evaluation_failures.py, what depends on a temperature in test_sampled_evaluation.py.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import koala_bench.evaluation.answering as evaluation
from koala_bench.common.bundled import RECIPES
from koala_bench.decoding.loop import VANILLA_TREE, Decoded, Vanilla, decode
from koala_bench.dialogues.encoding import ChatTemplate, encode_prompt
from koala_bench.dialogues.questions import Question, questions_sha256, read_questions, select_questions
from koala_bench.engine.loading.targets import fingerprint, load_target
from koala_bench.engine.target import Target
from koala_bench.errors import KoalaBenchError
from koala_bench.evaluation.loop import evaluate
from koala_bench.evaluation.methods import load_methods
from koala_bench.evaluation.order import drawn_order
from koala_bench.interop.answers import write_fastchat_answers
from koala_bench.records.reading import Run, read_run
from koala_bench.records.schema import TurnLine, key_of
from koala_bench.results.tables.building import write_table
from koala_bench.results.tables.published import read_paper, read_table_spec
from koala_bench.testing import save_tiny_target
from koala_bench.tree import load_template
from tests.support.small_runs import METHODS, QUESTIONS, TREE, Bench

TABLE1, PAPER = read_table_spec(RECIPES / "table1.toml"), read_paper(RECIPES / "paper.toml")


@pytest.fixture(scope="module")
def run(bench: Bench) -> Run:
    return bench.run(bench.folder / "whole.jsonl")


def by_turn(run: Run) -> dict[tuple[int, int, int], dict[str, TurnLine]]:
    found: dict[tuple[int, int, int], dict[str, TurnLine]] = {}
    for turn in run.turns:
        found.setdefault((turn["question_id"], turn["turn"], turn["repeat"]), {})[turn["method"]] = turn
    return found


# ------------------------------------------------------------------------------ what is recorded


def test_every_method_answers_every_turn_once(run: Run) -> None:
    assert run.finished
    assert len(run.turns) == len(METHODS) * len(QUESTIONS) * 2
    assert {key_of(turn) for turn in run.turns} == {
        (method, 81 + i, turn, 0) for method in METHODS for i in range(len(QUESTIONS)) for turn in (0, 1)
    }
    assert [turn["error"] for turn in run.turns] == [None] * len(run.turns)


def test_every_answer_is_vanillas_in_float64(run: Run) -> None:
    for answers in by_turn(run).values():
        for method in METHODS:
            assert answers[method]["new_token_ids"] == answers["vanilla"]["new_token_ids"], method
            assert answers[method]["text"] == answers["vanilla"]["text"]
            assert answers[method]["first_difference"] is None


def test_decoding_takes_the_threads_of_the_preset_and_says_so(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = torch.get_num_threads()
    taken = set()

    def watched(*rest: Any, **more: Any) -> Decoded:
        taken.add(torch.get_num_threads())
        return decode(*rest, **more)

    monkeypatch.setattr(evaluation, "decode", watched)
    for name, target in (("given", dataclasses.replace(bench.target, threads=before + 1)), ("torch's", bench.target)):
        run = bench.run(
            tmp_path / f"{name}.jsonl",
            ["vanilla", "medusa"],
            "evaluation.limit=1",
            "evaluation.max_new_tokens=3",
            target=target,
        )
        assert taken == {run.header["environment"]["threads"]} == {target.threads or before}
        taken.clear()
    assert torch.get_num_threads() == before


def test_a_record_says_what_open_settings_came_to(bench: Bench, tmp_path: Path) -> None:
    opened = ("training.precision=auto", "target.dtype=auto", "target.chat_template=auto", "evaluation.limit=1")
    run = bench.run(tmp_path / "open.jsonl", ["vanilla", "medusa"], *opened, "evaluation.max_new_tokens=2")
    assert run.header["preset"]["resolved"]["training"]["precision"] == "auto"
    assert run.header["preset"]["settled"] == {
        "target.dtype": "float64",
        "target.engine": bench.target.engine,
        "target.chat_template": bench.template.name,
        "target.threads": run.header["environment"]["threads"],
        "training.precision": "bf16",
    }
    assert run.methods["medusa"]["training"] is not None
    assert run.methods["medusa"]["training"]["precision"] == "bf16"


def test_the_tokens_of_an_answer_are_accounted_for_step_by_step(run: Run) -> None:
    for turn in run.turns:
        assert turn["new_token_ids"] is not None and turn["accepted"] is not None and turn["drafted_depth"] is not None
        assert len(turn["new_token_ids"]) == 1 + sum(turn["accepted"]) + len(turn["accepted"])
        assert all(kept <= depth for kept, depth in zip(turn["accepted"], turn["drafted_depth"], strict=True))
        assert (
            turn["prefill_s"]
            and turn["decode_s"]
            and turn["decode_s"] >= (turn["draft_s"] or 0) + (turn["verify_s"] or 0)
        )


def test_a_record_says_which_node_each_step_kept(run: Run) -> None:
    shapes = {name: load_template(TREE).shape for name in METHODS[1:]}
    for turn in run.turns:
        assert turn["kept_node"] is not None
        if turn["method"] != "vanilla":
            assert [shapes[turn["method"]].depths[node] for node in turn["kept_node"]] == turn["accepted"]
    # In a wide tree some accepted path leaves the best guesses.
    firsts = {node for turn in run.turns for node in turn["kept_node"] or []}
    assert len(firsts) > 4


def test_the_heads_do_draft(run: Run) -> None:
    assert {depth for turn in run.turns if turn["method"] != "vanilla" for depth in turn["drafted_depth"] or []} == {3}
    for method in METHODS[1:]:
        assert sum(sum(turn["accepted"] or []) for turn in run.turns_of(method)) > 0, method


def test_vanilla_accepts_nothing_and_is_the_engines_own(bench: Bench, run: Run) -> None:
    for turn in run.turns_of("vanilla"):
        assert set(turn["accepted"] or []) == set(turn["drafted_depth"] or []) == {0}
    assert bench.target.tokenizer is not None
    for question in read_questions(bench.folder / "questions.jsonl"):
        prompt = encode_prompt(bench.template, bench.target.tokenizer, question.turns[:1])
        answer = decode(bench.target, Vanilla(), VANILLA_TREE, prompt, 12, bench.target.stop_ids)
        line = by_turn(run)[question.question_id, 0, 0]["vanilla"]
        assert (line["new_token_ids"], line["stop"]) == (answer.tokens, answer.stop)


def test_second_turns_show_vanillas_first_answer(bench: Bench, run: Run) -> None:
    assert bench.target.tokenizer is not None
    turns = by_turn(run)
    for question in read_questions(bench.folder / "questions.jsonl"):
        said = turns[question.question_id, 0, 0]["vanilla"]["text"]
        assert said
        expected = len(
            encode_prompt(bench.template, bench.target.tokenizer, [question.turns[0], said, question.turns[1]])
        )
        assert {line["prompt_tokens"] for line in turns[question.question_id, 1, 0].values()} == {expected}


def test_a_head_that_answers_wrongly_does_not_change_anyones_second_prompt(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, list[int]]] = []

    def wrong(target: Target, head: Any, template: Any, prompt: Sequence[int], *rest: Any, **more: Any) -> Decoded:
        answer = decode(target, head, template, prompt, *rest, **more)
        asked.append((type(head).__name__, list(prompt)))
        return answer if isinstance(head, Vanilla) else dataclasses.replace(answer, tokens=[70, *answer.tokens[1:]])

    monkeypatch.setattr(evaluation, "decode", wrong)
    bench.run(tmp_path / "record.jsonl", ["vanilla", "medusa", "eagle"])
    prompts = {name: [prompt for who, prompt in asked if who == name] for name in ("Vanilla", "Medusa", "Eagle")}
    assert prompts["Vanilla"] == prompts["Medusa"] == prompts["Eagle"]
    assert len(prompts["Vanilla"]) == 6


def test_the_lines_stand_in_the_drawn_order_of_the_methods(run: Run) -> None:
    order: dict[tuple[int, int, int], list[str]] = {}
    for turn in run.turns:
        order.setdefault((turn["question_id"], turn["turn"], turn["repeat"]), []).append(turn["method"])
    assert run.header["measure"]["order"] == "drawn"
    assert order == {place: drawn_order(METHODS, run.header["seed"], *place) for place in order}


def test_every_method_runs_behind_every_other_one_and_in_every_place() -> None:
    names = ["vanilla", "medusa", "eagle", "hydra"]
    orders = [drawn_order(names, 0, question, turn, 0) for question in range(100) for turn in (0, 1)]
    assert all(sorted(order) == sorted(names) for order in orders)
    behind = Counter(pair for order in orders for pair in itertools.pairwise(order))
    places = Counter((name, order.index(name)) for order in orders for name in order)
    assert len(behind) == 12 and min(behind.values()) > 25  # of 600 pairs, 50 each
    assert len(places) == 16 and min(places.values()) > 25  # of 800 places, 50 each


@pytest.mark.parametrize("other", [(1, 5, 0, 0, 1), (0, 6, 0, 0, 1), (0, 5, 1, 0, 1), (0, 5, 0, 1, 1), (0, 5, 0, 0, 2)])
def test_seed_question_turn_repeat_and_process_each_draw_another_order(other: tuple[int, int, int, int, int]) -> None:
    names = [str(number) for number in range(20)]
    assert drawn_order(names, *other) != drawn_order(names, 0, 5, 0, 0, 1) == drawn_order(names[::-1], 0, 5, 0, 0, 1)


def test_repeats_ask_again_in_another_order(bench: Bench, tmp_path: Path) -> None:
    run = bench.run(
        tmp_path / "record.jsonl",
        ["vanilla", "eagle"],
        "evaluation.repeats=2",
        "evaluation.limit=1",
        "evaluation.max_new_tokens=4",
    )
    orders = {
        (place, repeat): [
            turn["method"]
            for turn in run.turns
            if (turn["question_id"], turn["turn"], turn["repeat"]) == (*place, repeat)
        ]
        for place in {(turn["question_id"], turn["turn"]) for turn in run.turns}
        for repeat in (0, 1)
    }
    assert any(orders[place, 0] != orders[place, 1] for place, _ in orders)
    assert len(run.turns) == 2 * 2 * 2 * 2  # methods, questions, turns, repeats


def test_warm_up_answers_are_not_recorded(bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = count_decodes(monkeypatch)
    run = bench.run(
        tmp_path / "record.jsonl", ["eagle"], "evaluation.warmup=2", "evaluation.limit=1", "evaluation.max_new_tokens=2"
    )
    assert len(run.turns) == 8
    assert len(calls) == 8 + 2 * 2


def test_the_header_says_what_was_measured(bench: Bench, run: Run) -> None:
    header, prints = run.header, fingerprint(bench.target)
    assert header["command"] == ["koala-bench", "evaluate"]
    assert header["preset"]["sha256"] == bench.preset().sha256
    assert (header["target"]["weights_sha256"], header["target"]["dtype"]) == (prints["weights_sha256"], "float64")
    assert header["questions"] == {
        "name": "questions",
        "sha256": questions_sha256(bench.folder / "questions.jsonl"),
        "count": 3,
    }
    assert header["limits"] == {"max_new_tokens": 12, "stop_ids": [2]}
    assert [(m["name"], m["head"], m["layers"], m["adversarial"]) for m in header["methods"]] == [
        ("vanilla", None, 0, False),
        ("medusa", "medusa", 1, False),
        ("medusa+koala", "medusa", 2, True),
        ("eagle", "eagle", 1, False),
        ("eagle+koala", "eagle", 2, True),
    ]
    parents = list(load_template(TREE).shape.parents)
    tree = {"name": TREE, "nodes": 241, "depth": 3, "parents": parents}
    assert all(m["tree"] == tree and m["parameters"] and m["weights_sha256"] for m in header["methods"][1:])
    assert header["methods"][0]["tree"] == {"name": "root", "nodes": 1, "depth": 0, "parents": [-1]}


def test_heads_of_another_chat_template_are_named(
    bench: Bench, run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    bench.run(tmp_path / "same.jsonl", ["vanilla", "eagle"])
    assert "another chat template" not in capsys.readouterr().err
    other = dataclasses.replace(bench, template=dataclasses.replace(bench.template, render="/".join))
    found = other.run(tmp_path / "other.jsonl", ["vanilla", "eagle", "prompt_lookup"])
    (line,) = (line for line in capsys.readouterr().err.splitlines() if "another chat template" in line)
    assert "eagle" in line and "prompt_lookup" not in line
    table = next(path for path in write_table([found], tmp_path, TABLE1, PAPER) if path.suffix == ".md").read_text()
    assert "- Trained with another chat template: eagle." in table
    write_table([run], tmp_path, TABLE1, PAPER)
    assert "another chat template" not in (tmp_path / "table1.md").read_text()


def test_vanilla_is_measured_even_if_it_is_not_asked_for(bench: Bench, tmp_path: Path) -> None:
    run = bench.run(tmp_path / "record.jsonl", ["eagle"], "evaluation.limit=1", "evaluation.max_new_tokens=2")
    assert list(run.methods) == ["vanilla", "eagle"]


def test_a_limit_takes_the_first_questions_of_each_category() -> None:
    questions = [Question(i, category, ("?",)) for i, category in enumerate("aabbab")]
    assert [q.question_id for q in select_questions(questions, 2)] == [0, 1, 2, 3]
    assert [q.question_id for q in select_questions(questions, None)] == list(range(6))


def test_answers_are_written_as_fastchat_reads_them(run: Run, tmp_path: Path) -> None:
    files = write_fastchat_answers(run, tmp_path)
    assert [path.name for path in files] == [f"target-{method}.jsonl" for method in METHODS]
    for method, path in zip(METHODS, files, strict=True):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        assert [row["question_id"] for row in rows] == [81, 82, 83]
        for row in rows:
            lines = [by_turn(run)[row["question_id"], turn, 0][method] for turn in (0, 1)]
            assert row["choices"][0]["turns"] == [line["text"] for line in lines]
            assert row["choices"][0]["new_tokens"] == [len(line["new_token_ids"] or []) for line in lines]


def test_heads_below_the_working_folder_are_named_from_there(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(bench.heads.parent)
    assert (
        load_methods(bench.preset(), ["eagle"], bench.target, bench.heads.absolute())[1].info["checkpoint"]
        == f"{bench.heads.name}/eagle"
    )
    monkeypatch.chdir(tmp_path)
    assert load_methods(bench.preset(), ["eagle"], bench.target, bench.heads.absolute())[1].info["checkpoint"] == str(
        bench.heads.absolute() / "eagle"
    )


def test_no_time_of_a_record_has_a_recording_in_it(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a warm-up the first answers make recordings; they are given again, and the record has the second ones."""
    target = dataclasses.replace(bench.target, engine="graph")
    made: list[tuple[int, Decoded]] = []

    def counted(*arguments: Any, **named: Any) -> Decoded:
        before = target.recordings
        answer = decode(*arguments, **named)
        made.append((target.recordings - before, answer))
        return answer

    monkeypatch.setattr(evaluation, "decode", counted)
    few = ("evaluation.warmup=0", "evaluation.limit=1")
    run = bench.run(tmp_path / "records.jsonl", ["vanilla", "medusa", "eagle"], *few, target=target)
    clean = {answer.decode_s for count, answer in made if not count}
    assert any(count for count, _ in made)
    assert {turn["decode_s"] for turn in run.turns} <= clean


# ------------------------------------------------------------------------------ stop and go on


def count_decodes(monkeypatch: pytest.MonkeyPatch, die_at: int | None = None) -> list[str]:
    """Count the calls of ``decode``, and have one of them interrupted."""
    calls: list[str] = []

    def counted(target: Target, head: Any, *rest: Any, **more: Any) -> Decoded:
        calls.append(type(head).__name__)
        if len(calls) == die_at:
            raise KeyboardInterrupt
        return decode(target, head, *rest, **more)

    monkeypatch.setattr(evaluation, "decode", counted)
    return calls


def tokens(run: Run) -> dict[Any, Any]:
    return {key_of(turn): (turn["new_token_ids"], turn["accepted"], turn["prompt_tokens"]) for turn in run.turns}


@pytest.mark.parametrize("die_at", [1, 14, 30])
def test_an_interrupted_run_goes_on_where_it_was(
    bench: Bench,
    run: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    die_at: int,
) -> None:
    record = tmp_path / "record.jsonl"
    count_decodes(monkeypatch, die_at)
    with pytest.raises(KeyboardInterrupt):
        bench.run(record)
    half = read_run(record)
    assert not half.finished
    calls = count_decodes(monkeypatch)
    whole = bench.run(record)
    assert whole.finished
    assert whole.turns[: len(half.turns)] == half.turns  # what was there stays, times and all
    assert len(calls) == len(run.turns) - len(half.turns)
    assert tokens(whole) == tokens(run)
    assert len(whole.turns) == len(run.turns)
    assert (f"Resuming {record}: {len(half.turns)} of 30 turns are there." in capsys.readouterr().err) == bool(
        half.turns
    )


def test_a_half_written_line_is_decoded_again(
    bench: Bench, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = tmp_path / "record.jsonl"
    lines = run.path.read_bytes().splitlines(keepends=True)
    record.write_bytes(
        b"".join(lines[:9]) + lines[9][: len(lines[9]) // 2]
    )  # the kill came within a turn of five methods
    calls = count_decodes(monkeypatch)
    whole = bench.run(record)
    assert len(calls) == 30 - 8
    assert tokens(whole) == tokens(run)


def test_a_finished_record_is_reused_and_says_so(
    bench: Bench, run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = run.path.read_bytes()
    calls = count_decodes(monkeypatch)
    again = bench.run(run.path)
    assert calls == []
    assert again == run
    assert run.path.read_bytes() == before
    assert f"Reusing the finished record {run.path}." in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("evaluation.max_new_tokens=5", "limits.max_new_tokens"),
        ("evaluation.limit=1", "questions.count"),
        ("evaluation.seed=1", "seed"),
    ],
)
def test_a_record_of_other_settings_is_refused(bench: Bench, run: Run, change: str, words: str) -> None:
    before = run.path.read_bytes()
    with pytest.raises(KoalaBenchError, match=rf"holds another run.*{words}"):
        bench.run(run.path, METHODS, change)
    assert run.path.read_bytes() == before


def test_a_record_of_another_target_is_refused(bench: Bench, run: Run, tmp_path: Path) -> None:
    before = run.path.read_bytes()
    other = load_target(str(save_tiny_target(tmp_path / "target", seed=1)), "cpu", "float64")
    with pytest.raises(KoalaBenchError, match=r"holds another run.*target\.weights_sha256"):
        bench.run(run.path, target=other)
    assert run.path.read_bytes() == before


def test_a_record_of_the_form_before_is_read_as_greedy(run: Run, tmp_path: Path) -> None:
    lines = [json.loads(line) for line in run.path.read_text().splitlines()]
    lines[0]["schema"] = 3
    for name in ("top_k", "top_p"):
        del lines[0]["acceptance"][name]
    for method in lines[0]["methods"]:
        del method["typical"]
    for line in lines[1:-1]:
        del line["distance"]
    older = tmp_path / "older.jsonl"
    older.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert (read_run(older).header, read_run(older).turns) == (run.header, run.turns)


def test_system_prompts_stops_and_ignored_settings_are_in_prompts_and_record(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"question_id": 1, "category": "a", "turns": ["count 5", "and 6"], "system": "You only rhyme."}]
    (tmp_path / "asked.jsonl").write_text(json.dumps(rows[0]) + "\n")
    target = dataclasses.replace(bench.target, stop_texts=("never said",), ignored={"repetition_penalty": 1.3})
    asked: list[str] = []
    real = evaluation.encode_prompt

    def watched(template: ChatTemplate, tokenizer: Any, turns: Sequence[str]) -> list[int]:
        asked.append(template.render(turns))
        return real(template, tokenizer, turns)

    monkeypatch.setattr(evaluation, "encode_prompt", watched)
    preset = bench.preset(f"evaluation.questions='{tmp_path / 'asked.jsonl'}'")
    run = evaluate(preset, "x", ["vanilla"], target, bench.template, bench.heads, tmp_path / "r.jsonl", None, [])
    assert len(set(asked)) == 2 and all(text.startswith("You only rhyme.") for text in asked)
    assert run.header["limits"]["stop_texts"] == ["never said"]
    assert run.header["target"]["ignored_settings"] == {"repetition_penalty": 1.3}
