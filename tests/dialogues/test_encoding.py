"""Chat templates and label masks: what is supervised, told by decoding it."""

from __future__ import annotations

import pytest

from koala_bench.dialogues.encoding import chat_template, encode_dialogues, encode_prompt
from koala_bench.errors import KoalaBenchError
from koala_bench.testing import tiny_tokenizer

TURNS = ["What is a koala?", "A marsupial.", "And a </s> in text?", "An end, é€ said twice."]


@pytest.mark.parametrize("name", ["vicuna_v1.1", "llama-2", "qwen-7b-chat", "zero_shot"])
def test_exactly_the_answers_and_their_ends_are_supervised(name: str) -> None:
    tokenizer = tiny_tokenizer()
    template = chat_template(name, tokenizer)
    turns = [TURNS[0], TURNS[1], "And then?", TURNS[3]]
    found = encode_dialogues(template, tokenizer, [turns])[0]
    said = tokenizer.decode([i for i, answer in zip(found.ids, found.supervised, strict=True) if answer])
    unsaid = tokenizer.decode([i for i, answer in zip(found.ids, found.supervised, strict=True) if not answer])
    assert all(text in said for text in turns[1::2])
    assert not any(text in said for text in turns[0::2])
    assert all(text in unsaid for text in turns[0::2])


def test_vicuna_answers_end_with_the_end_token() -> None:
    tokenizer = tiny_tokenizer()
    found = encode_dialogues(chat_template("vicuna_v1.1", tokenizer), tokenizer, [TURNS[:2]])[0]
    said = [i for i, answer in zip(found.ids, found.supervised, strict=True) if answer]
    assert tokenizer.decode(said) == " A marsupial.</s>"


def test_a_prompt_is_the_beginning_of_its_dialogue() -> None:
    tokenizer = tiny_tokenizer()
    template = chat_template("vicuna_v1.1", tokenizer)
    whole = list(encode_dialogues(template, tokenizer, [TURNS])[0].ids)
    for turns in (TURNS[:1], TURNS[:3]):
        prompt = encode_prompt(template, tokenizer, turns)
        assert whole[: len(prompt)] == prompt
        assert prompt.count(tokenizer.bos_token_id) == 1


def test_a_tokenizers_own_template_is_used_and_starts_once() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% if m['role'] == 'assistant' %}{{"
        " eos_token }}{% endif %}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    template = chat_template("tokenizer", tokenizer)
    found = encode_dialogues(template, tokenizer, [TURNS[:2]])[0]
    assert found.ids.count(1) == 1
    assert (
        tokenizer.decode([i for i, answer in zip(found.ids, found.supervised, strict=True) if answer])
        == "A marsupial.</s>"
    )


def test_unknown_and_absent_templates_are_refused() -> None:
    with pytest.raises(KoalaBenchError, match=r"vicuna_v1\.1"):
        chat_template("vicuna_v1.l", tiny_tokenizer())
    with pytest.raises(KoalaBenchError, match="no chat template"):
        chat_template("tokenizer", tiny_tokenizer())
