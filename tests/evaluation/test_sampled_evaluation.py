"""Evaluation with a temperature: draws of their own that depend on seed and place alone, methods that share a head,
lossy ones that say so.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from koala_bench.errors import KoalaBenchError
from tests.evaluation.test_evaluation import by_turn, count_decodes, tokens
from tests.support.small_runs import QUESTIONS, Bench

WARM = ("evaluation.temperature=0.7", "evaluation.top_k=20", "evaluation.top_p=0.95")
SHARED = ("methods.wide.head_of=medusa", "methods.wide.tree='3x2'")
LOSSY = ("methods.typical.head_of=medusa", "methods.typical.typical.threshold=0.2")


def test_a_draw_depends_on_the_seed_and_its_place_alone(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = (*WARM, "evaluation.limit=1")
    whole = bench.run(tmp_path / "whole.jsonl", ["vanilla", "medusa", "eagle"], *settings)
    assert whole.header["acceptance"] == {
        "rule": "speculative sampling",
        "temperature": 0.7,
        "top_k": 20,
        "top_p": 0.95,
    }
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        count_decodes(patch, die_at=8)
        bench.run(tmp_path / "broken.jsonl", ["vanilla", "medusa", "eagle"], *settings)
    assert tokens(bench.run(tmp_path / "broken.jsonl", ["vanilla", "medusa", "eagle"], *settings)) == tokens(whole)
    other = bench.run(tmp_path / "other.jsonl", ["vanilla", "eagle"], *settings, "evaluation.seed=1")
    assert tokens(other) != {key: value for key, value in tokens(whole).items() if key[0] != "medusa"}
    assert {turn["distance"] for turn in whole.turns} == {None}
    assert {turn["first_difference"] for turn in whole.turns} == {None}, "draws are not held against vanilla's"


def test_question_turn_and_repeat_each_draw_anew(bench: Bench, tmp_path: Path) -> None:
    # So hot that every token is as likely, whatever the prompt: equal draws would give equal answers.
    hot = ("evaluation.temperature=1e6", "evaluation.repeats=2", "evaluation.max_new_tokens=4")
    run = bench.run(tmp_path / "record.jsonl", ["vanilla"], *hot)
    assert len({tuple(turn["new_token_ids"] or ()) for turn in run.turns}) == len(run.turns) == 2 * 2 * len(QUESTIONS)


def test_a_method_may_decode_with_the_head_of_another(bench: Bench, tmp_path: Path) -> None:
    run = bench.run(tmp_path / "record.jsonl", ["vanilla", "medusa", "wide"], *SHARED)
    medusa, wide = run.methods["medusa"], run.methods["wide"]
    assert (wide["checkpoint"], wide["weights_sha256"], wide["head"]) == (
        medusa["checkpoint"],
        medusa["weights_sha256"],
        "medusa",
    )
    assert wide["tree"] is not None and wide["tree"]["name"] == "3x2"
    for answers in by_turn(run).values():
        assert answers["wide"]["new_token_ids"] == answers["vanilla"]["new_token_ids"]


def test_typical_acceptance_is_called_lossy_and_says_how_far_off_it_is(bench: Bench, tmp_path: Path) -> None:
    run = bench.run(tmp_path / "record.jsonl", ["vanilla", "medusa", "typical"], *LOSSY, "evaluation.temperature=0.7")
    assert (run.methods["typical"]["lossless"], run.methods["typical"]["typical"]) == (
        False,
        {"threshold": 0.2, "alpha": 0.3},
    )
    assert (run.methods["medusa"]["lossless"], run.methods["medusa"]["typical"]) == (True, None)
    for turn in run.turns:
        assert (turn["distance"] is not None) == (turn["method"] == "typical")
        assert turn["distance"] is None or 0 < turn["distance"] < 1
    with pytest.raises(KoalaBenchError, match="typical uses typical acceptance, which needs a temperature"):
        bench.run(tmp_path / "greedy.jsonl", ["vanilla", "typical"], *LOSSY)


def test_where_one_token_is_left_to_sample_each_distance_is_0_or_1(bench: Bench, tmp_path: Path) -> None:
    run = bench.run(
        tmp_path / "record.jsonl", ["vanilla", "typical"], *LOSSY, "evaluation.temperature=0.7", "evaluation.top_k=1"
    )
    turns = [turn for turn in run.turns_of("typical") if turn["distance"] is not None]
    assert len(turns) == len(run.turns_of("typical")) > 0
    for turn in turns:
        differing = (turn["distance"] or 0) * len(turn["new_token_ids"] or [])
        assert differing == pytest.approx(round(differing), abs=1e-9)


def test_every_sampled_answer_has_draws_of_its_own(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from koala_bench.evaluation import answering

    seeds: list[int] = []
    real = answering.SpeculativeSampling

    def noted(sampling: Any, generator: torch.Generator) -> Any:
        seeds.append(generator.initial_seed())
        return real(sampling, generator)

    monkeypatch.setattr(answering, "SpeculativeSampling", noted)
    for seed in (0, 1):
        sampled = ("evaluation.temperature=1.0", "evaluation.repeats=2", f"evaluation.seed={seed}")
        bench.run(tmp_path / f"{seed}.jsonl", ["vanilla", "medusa"], *sampled, "evaluation.max_new_tokens=2")
    assert len(set(seeds)) == 2 * 2 * 2 * sum(len(turns) for _, turns in QUESTIONS), (
        "seeds, methods and repeats, for each turn of each question"
    )
