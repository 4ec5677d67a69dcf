"""Where answers end: at any id that ends one, where a text is complete, and never by a checkpoint's own settings."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import GenerationConfig

from koala_bench.decoding.answering import greedy_answers
from koala_bench.decoding.batching import decode_batch
from koala_bench.decoding.loop import VANILLA_TREE, Vanilla, decode
from koala_bench.decoding.stops import end_of_text, without_end
from koala_bench.engine.loading.targets import load_target
from koala_bench.engine.target import Target
from koala_bench.testing import save_tiny_target, tiny_tokenizer
from koala_bench.tree import load_template
from tests.support.drafters import Oracle

PROMPT = [1, 40, 50, 60, 70]


def answer(target: Target, tokens: int = 24) -> list[int]:
    return decode(target, Vanilla(), VANILLA_TREE, PROMPT, tokens, target.stop_ids).tokens


def text_in(target: Target, tokens: list[int], first: int, last: int) -> str:
    assert target.tokenizer is not None
    return target.tokenizer.decode(tokens[first:last])


def test_every_end_that_model_generation_or_tokenizer_names_ends_an_answer(tmp_path: Path) -> None:
    save_tiny_target(tmp_path)
    GenerationConfig(eos_token_id=[2, 70]).save_pretrained(tmp_path)
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(41)
    tokenizer.save_pretrained(tmp_path)
    target = load_target(str(tmp_path), "cpu")
    assert set(target.stop_ids) == {2, 70, 41}
    assert 9 in replace(target, more_stop_ids=(9,)).stop_ids


def test_a_text_ends_an_answer_at_the_token_that_completes_it(target64: Target) -> None:
    whole = answer(target64)
    end = text_in(target64, whole, 7, 10)
    stopping = replace(target64, stop_texts=(end, "never said"))
    places = [count for count in range(1, 25) if end in text_in(target64, whole, 0, count)]
    found = decode(stopping, Vanilla(), VANILLA_TREE, PROMPT, 24, target64.stop_ids)
    assert (found.tokens, found.stop) == (whole[: places[0]], "eos")
    assert len(found.tokens) == 1 + sum(found.accepted) + len(found.accepted)
    assert greedy_answers(stopping.model, [PROMPT], 24, target64.stop_ids, (end,), target64.tokenizer) == [found.tokens]
    assert decode_batch(stopping, Vanilla(), VANILLA_TREE, [PROMPT], 24, target64.stop_ids).tokens == [found.tokens]


def test_a_step_that_runs_past_the_end_is_cut_there(target64: Target) -> None:
    whole = answer(target64)
    for last in (8, 9, 10, 11):
        stopping = replace(target64, stop_texts=(text_in(target64, whole, last - 3, last),))
        plain = decode(stopping, Vanilla(), VANILLA_TREE, PROMPT, 24, ())
        drafted = decode(stopping, Oracle(whole, 259, right=1.0), load_template("chain-4"), PROMPT, 24, ())
        assert (drafted.tokens, drafted.stop) == (plain.tokens, plain.stop) and plain.stop == "eos"
        assert len(drafted.tokens) == 1 + sum(drafted.accepted) + len(drafted.accepted)
        assert max(drafted.accepted) > 1


def test_an_end_may_begin_before_what_is_new_and_is_no_part_of_the_text() -> None:
    tokenizer = tiny_tokenizer()
    tokens = tokenizer("say END now", add_special_tokens=False)["input_ids"]
    assert end_of_text(tokenizer, tokens[:7], 1, ("END",)) == 7
    assert end_of_text(tokenizer, tokens[:6], 2, ("END",)) is None
    assert end_of_text(tokenizer, tokens, 6, ("END", "say END no")) == 7
    assert without_end("say END now", ("END",)) == "say " and without_end("say", ("END",)) == "say"


@pytest.mark.parametrize(
    "setting", [{"repetition_penalty": 1.8}, {"no_repeat_ngram_size": 1}, {"suppress_tokens": [5]}]
)
def test_generation_settings_of_a_checkpoint_have_no_part_in_any_answer(
    target: Target, target_folder: Path, tmp_path: Path, setting: dict[str, object]
) -> None:
    save_tiny_target(tmp_path)
    GenerationConfig(eos_token_id=2, **setting).save_pretrained(tmp_path)
    penalised, plain = load_target(str(tmp_path), "cpu"), load_target(str(target_folder), "cpu")
    assert penalised.ignored == setting and not plain.ignored
    ids = torch.tensor([PROMPT])
    expected = answer(plain)
    assert answer(penalised) == expected
    assert greedy_answers(penalised.model, [PROMPT], 24, penalised.stop_ids) == [expected]
    said = penalised.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False)
    assert said[0, len(PROMPT) :].tolist() == expected
    penalised.model.generation_config = GenerationConfig(**setting)  # of a model that was not loaded here
    assert greedy_answers(penalised.model, [PROMPT], 24, penalised.stop_ids) == [expected]
