"""The losslessness audit: what it calls a tie, what a defect, and that a defect cannot pass."""

from __future__ import annotations

import dataclasses
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from koala_bench.decoding.loop import VANILLA_TREE, Vanilla, decode
from koala_bench.dialogues.encoding import chat_template, encode_prompt
from koala_bench.dialogues.questions import Question
from koala_bench.engine.target import Target
from koala_bench.gate.audit import audit, judge, to_markdown
from koala_bench.records.reading import Run
from koala_bench.records.summaries import Difference
from koala_bench.testing import tiny_target
from tests.evaluation.test_evaluation_failures import spoil
from tests.support.commands import Koala, decoding, settings
from tests.support.markdown import table_rows
from tests.support.synthetic_run import make_header, make_turn

CONTEXT = [1, 70, 81, 82, 90]
QUESTION = Question(81, "a", ("count 5", "and 6"))


def difference(token: int | None, vanilla_token: int | None) -> Difference:
    return Difference(81, 0, 0, 4, token, vanilla_token, None)


@pytest.fixture
def near_tie(tmp_path: Path) -> tuple[Target, Target, int, int]:
    """A target in float32 and float64 whose two best tokens after CONTEXT are the same but for less than float32 can
    see; and the two.
    """
    exact = tiny_target(tmp_path / "tie", dtype="float64")
    single = tiny_target(tmp_path / "tie", dtype="float32")
    ids = torch.tensor([CONTEXT])
    best = int(exact.model(input_ids=ids).logits[0, -1].argmax())
    twin = 200 if best != 200 else 201
    for target in (exact, single):
        weight = target.model.get_output_embeddings().weight.data
        weight[twin] = weight[best]
        if target is exact:
            weight[twin] *= 1 - 1e-9
    return single, exact, best, twin


def test_two_tokens_within_the_rounding_error_are_a_tie(near_tie: tuple[Target, Target, int, int]) -> None:
    single, exact, best, twin = near_tie
    found = judge("eagle", difference(twin, best), CONTEXT, single, None, exact)
    assert found.verdict == "numerical tie"
    assert found.gap == 0.0 and 0 < found.exact_gap < found.rounding < 1e-4
    assert found.between == pytest.approx(found.exact_gap)


def test_a_third_token_is_a_defect_even_beside_a_tie(near_tie: tuple[Target, Target, int, int]) -> None:
    single, exact, best, twin = near_tie
    third = next(token for token in range(3, 259) if token not in (best, twin))
    assert judge("eagle", difference(third, best), CONTEXT, single, None, exact).verdict == "defect"


def test_in_float64_the_same_gap_is_a_defect(near_tie: tuple[Target, Target, int, int]) -> None:
    # A billionth of a logit is far beyond what float64 rounds away.
    single, exact, best, twin = near_tie
    found = judge("eagle", difference(twin, best), CONTEXT, exact, single, exact)
    assert found.verdict == "defect"
    assert 0 < found.rounding < 1e-12


def test_two_clearly_different_tokens_are_a_defect(target: Target, target64: Target) -> None:
    best, second = target64.model(input_ids=torch.tensor([CONTEXT])).logits[0, -1].topk(2).indices.tolist()
    found = judge("eagle", difference(second, best), CONTEXT, target, None, target64)
    assert found.verdict == "defect"
    assert found.exact_gap == pytest.approx(found.between) and found.between > 100 * found.rounding


def test_an_answer_that_ends_elsewhere_is_a_defect(target: Target, target64: Target) -> None:
    found = judge("eagle", difference(None, 70), CONTEXT, target, None, target64)
    assert found.verdict == "defect" and math.isnan(found.between)


def run_of(target: Target, changed: dict[tuple[str, int], list[int]]) -> Run:
    """Two turns by vanilla and two methods, all equal but for what is changed."""
    template = chat_template("vicuna_v1.1", target.tokenizer)
    turns, shown = [], []
    for number, text in enumerate(QUESTION.turns):
        shown.append(text)
        answer = decode(target, Vanilla(), VANILLA_TREE, encode_prompt(template, target.tokenizer, shown), 8, ())
        shown.append(target.tokenizer.decode(answer.tokens, skip_special_tokens=True).strip())
        for method in ("vanilla", "medusa", "eagle"):
            ids = changed.get((method, number), answer.tokens)
            fields = {
                "new_token_ids": ids,
                "text": shown[-1],
                "accepted": [0] * (len(ids) - 1),
                "drafted_depth": [0] * (len(ids) - 1),
            }
            turns.append(make_turn(method, 81, number, **fields))
    return Run(Path("record.jsonl"), make_header(["vanilla", "medusa", "eagle"]), turns, True)


def test_answers_are_counted_per_method_and_each_difference_is_judged_at_its_own_place(
    target: Target, target64: Target
) -> None:
    assert target.tokenizer is not None
    template = chat_template("vicuna_v1.1", target.tokenizer)
    plain = run_of(target, {})
    second = plain.turns_of("vanilla")[1]["new_token_ids"] or []
    other = (second[3] + 1) % 259
    loaded: list[str] = []

    def in_precision(name: str) -> Target:
        loaded.append(name)
        return target64

    nothing = audit(plain, [QUESTION], template, target, in_precision)
    assert (
        [(c.compared, c.equal, c.defects) for c in nothing.counts] == [(2, 2, 0)] * 2
        and not nothing.differences
        and not loaded
    )
    found = audit(
        run_of(target, {("eagle", 1): [*second[:3], other, *second[4:]]}), [QUESTION], template, target, in_precision
    )
    assert {c.method: (c.compared, c.equal, c.ties, c.defects, c.failed) for c in found.counts} == {
        "medusa": (2, 2, 0, 0, 0),
        "eagle": (2, 1, 0, 1, 0),
    }
    assert loaded == ["float64"] and found.defects == 1
    (differences,) = found.differences
    assert (differences.method, differences.difference.turn, differences.difference.position) == ("eagle", 1, 3)
    # The place was rebuilt with vanilla's first answer before it: there the target's best token is vanilla's.
    assert differences.between > 0
    text = to_markdown([nothing, found])
    assert ["bundled", "float32", "eagle", "2", "1", "0", "1", "0"] in table_rows(text)
    assert ["**all**", "", "", "8", "7", "0", "1", "0"] in table_rows(text)


def test_a_failed_turn_counts_as_failed_not_as_equal(target: Target, target64: Target) -> None:
    from tests.support.synthetic_run import failed

    assert target.tokenizer is not None
    run = run_of(target, {})
    run = dataclasses.replace(
        run, turns=[failed(turn) if turn["method"] == "eagle" and turn["turn"] == 1 else turn for turn in run.turns]
    )
    found = audit(run, [QUESTION], chat_template("vicuna_v1.1", target.tokenizer), target, lambda name: target64)
    assert {c.method: (c.compared, c.failed) for c in found.counts} == {"medusa": (2, 0), "eagle": (1, 1)}


# ------------------------------------------------------------------------------ the command


def command(cli_folder: Path, finished_run: Path, out: Path, *more: str) -> list[str]:
    small = settings(cli_folder)
    return [
        "audit",
        *small,
        *decoding(cli_folder)[2:],
        "--tasks",
        str(cli_folder / "questions.jsonl"),
        "--heads",
        str(finished_run / "heads"),
        "--out",
        str(out),
        *more,
    ]


def test_the_command_ends_in_0_without_a_difference(
    koala: Koala, cli_folder: Path, finished_run: Path, tmp_path: Path
) -> None:
    result = koala(*command(cli_folder, finished_run, tmp_path / "audit", "--dtype", "float64"))
    assert result.code == 0, result.err
    rows = table_rows((tmp_path / "audit" / "audit.md").read_text())
    assert ["**all**", "", "", "16", "16", "0", "0", "0"] in rows
    assert (tmp_path / "audit" / "questions-float64.jsonl").is_file()


def test_the_command_ends_in_1_with_a_defect(
    koala: Koala, cli_folder: Path, finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def change(answer: Any) -> Any:
        return dataclasses.replace(answer, tokens=[*answer.tokens[:-1], (answer.tokens[-1] + 1) % 259])

    spoil(monkeypatch, "Eagle", change)
    result = koala(*command(cli_folder, finished_run, tmp_path / "audit"))
    assert result.code == 1, result.err
    assert "defect" in result.out
    shutil.rmtree(tmp_path / "audit")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--tasks", ","], "names no question set"),
        (["--tasks", "nowhere.jsonl"], "There is no question file"),
        (["--tasks", "all"], "data folder"),
        (["--methods", "eagle"], "compares methods with vanilla"),
        (["--methods", "vanilla"], "compares methods with vanilla"),
        (["--dtype", "float31"], "float31"),
    ],
)
def test_bad_input_ends_in_one_line(
    koala: Koala, cli_folder: Path, tmp_path: Path, options: list[str], words: str
) -> None:
    result = koala("audit", *settings(cli_folder), "--out", str(tmp_path / "audit"), *options)
    assert result.code == 2
    assert words in result.err and result.err.strip().count("\n") == 0
    assert not (tmp_path / "audit").exists()
