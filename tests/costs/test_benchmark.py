"""Vanilla decoding against generate: the same tokens, both timed on every prompt, and the model left as it was."""

from __future__ import annotations

import pytest

from koala_bench.costs.generate import compare_with_generate
from koala_bench.engine.target import Target

PROMPTS = [[1, 70, 81, 82], [1, 90, 91], [1, 60]]


def test_both_give_the_same_tokens(target64: Target) -> None:
    found = compare_with_generate(target64, PROMPTS, 6, 2)
    assert (found.equal, found.answers) == (6, 6)
    assert found.lowest <= found.ratio <= found.highest
    assert found.vanilla_tokens_per_s > 0 and found.generate_tokens_per_s > 0


def test_answers_are_as_long_as_asked_even_past_an_end_of_sequence(target64: Target) -> None:
    target64.model.generation_config.eos_token_id = list(range(259))  # everything ends an answer
    try:
        found = compare_with_generate(target64, PROMPTS, 4, 1)
        assert (found.equal, found.answers) == (3, 3)
        assert target64.model.generation_config.eos_token_id == list(range(259))
    finally:
        target64.model.generation_config.eos_token_id = 2


def test_progress_counts_prompts(target64: Target, capsys: pytest.CaptureFixture[str]) -> None:
    compare_with_generate(target64, PROMPTS, 2, 2)
    assert "benchmark: 6/6 prompts" in capsys.readouterr().err
