"""Our loop against generate: the same tokens, all timed on every prompt, and the model left as it was."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from koala_bench.costs.generate import compare_with_generate, in_words
from koala_bench.engine.target import Target
from koala_bench.errors import KoalaBenchError
from koala_bench.evaluation.methods import Method, load_methods
from koala_bench.presets import MethodPreset, load_preset

PROMPTS = [[1, 70, 81, 82], [1, 90, 91], [1, 60]]


def _methods(target: Target, **presets: MethodPreset) -> list[Method]:
    preset = load_preset("tiny").model_copy(update={"methods": presets})
    return load_methods(preset, list(presets), target, Path())


@pytest.fixture
def assisted(target64: Target, target_folder: Path) -> list[Method]:
    drafts = MethodPreset(head="draft_model", options={"model": str(target_folder)}, tree="chain-3")
    return _methods(target64, lookup=MethodPreset(head="prompt_lookup", tree="chain-4"), drafts=drafts)


def test_all_give_the_same_tokens_and_drafts_that_transformers_can_make_are_timed_there_too(
    target64: Target, assisted: list[Method]
) -> None:
    found = compare_with_generate(target64, assisted, PROMPTS, 6, 2)
    names = ["generate", "vanilla", "lookup", "generate, lookup", "drafts", "generate, drafts"]
    assert [speed.name for speed in found] == names
    assert all((speed.equal, speed.answers) == (6, 6) for speed in found)
    assert all(speed.lowest <= speed.ratio <= speed.highest and speed.tokens_per_s > 0 for speed in found)
    assert found[0].ratio == 1
    assert all(name in in_words(found, 6) for name in names)


def test_transformers_is_asked_for_the_drafts_of_the_method(target64: Target, assisted: list[Method]) -> None:
    _, lookup, drafts = assisted
    assert lookup.head.assisted(lookup.template.depth) == {"prompt_lookup_num_tokens": 4, "max_matching_ngram_size": 3}
    given = drafts.head.assisted(3)["assistant_model"]
    assert given.generation_config.num_assistant_tokens == 3


def test_answers_are_as_long_as_asked_even_past_an_end_of_sequence(target64: Target, assisted: list[Method]) -> None:
    target64.model.generation_config.eos_token_id = list(range(259))  # everything ends an answer
    try:
        found = compare_with_generate(target64, assisted, PROMPTS, 4, 1)
        assert all((speed.equal, speed.answers) == (3, 3) for speed in found)
        assert target64.model.generation_config.eos_token_id == list(range(259))
    finally:
        target64.model.generation_config.eos_token_id = 2


def test_what_does_not_fit_the_target_is_refused(target64: Target) -> None:
    short = replace(target64, max_positions=8)
    with pytest.raises(KoalaBenchError, match="8 positions"):
        compare_with_generate(short, _methods(target64), PROMPTS, 6, 1)


def test_progress_counts_prompts(target64: Target, capsys: pytest.CaptureFixture[str]) -> None:
    compare_with_generate(target64, _methods(target64), PROMPTS, 2, 2)
    assert "benchmark: 6/6 prompts" in capsys.readouterr().err
