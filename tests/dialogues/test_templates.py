"""Which template a target gets, its date, what ends an answer, and what is trained if it rewrites answers."""

from __future__ import annotations

from dataclasses import replace
from datetime import date
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from koala_bench.dialogues.encoding import encode_dialogues, encode_prompt
from koala_bench.dialogues.templates import ChatTemplate, chat_template, stops_of
from koala_bench.dialogues.turns import Dialogue
from koala_bench.engine.target import Target
from koala_bench.errors import KoalaBenchError
from koala_bench.presets import load_preset
from koala_bench.testing import save_tiny_target, tiny_tokenizer
from koala_bench.training.experiment import load_preset_target

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# As Qwen3's: thoughts of earlier answers go, the last answer gets some, and a prompt may rule them out.
THINKS = (
    "{% for m in messages %}[{{ m.role[0] }}]"
    "{% if m.role == 'assistant' and loop.last %}<think>{{ m.reasoning_content or '' }}</think>{% endif %}"
    "{{ m.content.split('</think>')[-1] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}[a]{% if enable_thinking is defined and not enable_thinking %}<think></think>"
    "{% endif %}{% endif %}"
)
# As R1's: a prompt begins the thoughts, and no answer shows them.
OPENS = (
    "{% for m in messages %}[{{ m.role[0] }}]{{ m.content.split('</think>')[-1] }}{% if m.role == 'assistant' %}</s>"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}[a]<think>{% endif %}"
)
TWO = ["Why?", "So.", "And why?", "Not so."]


def own(source: str, **options: object) -> tuple[ChatTemplate, PreTrainedTokenizerFast]:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = source
    return chat_template("tokenizer", tokenizer, options), tokenizer


def taught(template: ChatTemplate, tokenizer: PreTrainedTokenizerFast, turns: list[str]) -> tuple[str, str]:
    """The text of a dialogue, and what of it is trained on."""
    found = encode_dialogues(template, tokenizer, [turns])[0]
    said = [token for token, answer in zip(found.ids, found.supervised, strict=True) if answer]
    return tokenizer.decode(found.ids), tokenizer.decode(said)


def loaded(folder: Path, template: str | None, *settings: str) -> tuple[Target, ChatTemplate]:
    save_tiny_target(folder)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return load_preset_target(load_preset("tiny", [f"target.name={folder}", *settings]))


# ------------------------------------------------------------------------------ which template


@pytest.mark.parametrize("source", [CHATML, None], ids=["its own", "none of its own"])
def test_auto_takes_the_targets_own_template_where_there_is_one_and_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], source: str | None
) -> None:
    target, template = loaded(tmp_path, source, "target.chat_template=auto")
    said = capsys.readouterr().err
    assert template.name == ("tokenizer" if source else "vicuna_v1.1")
    assert str(tmp_path) in said and ("that" in said if source else "vicuna_v1.1" in said)
    prompt = encode_prompt(template, target.tokenizer, ["why?"])  # type: ignore[arg-type]
    assert ("<|im_start|>" in target.tokenizer.decode(prompt)) == bool(source)  # type: ignore[union-attr]


def test_the_command_lines_target_brings_its_own_template() -> None:
    from koala_bench.cli.options import Shared

    assert Shared(target="elsewhere").resolved().target.chat_template == "auto"
    for target, settings in ((None, None), ("tiny", None), ("elsewhere", ["target.chat_template=vicuna_v1.1"])):
        assert Shared(target=target, settings=settings).resolved().target.chat_template == "vicuna_v1.1"


def test_settings_that_nobody_sets_leave_a_presets_hash_alone() -> None:
    plain, set_otherwise = load_preset("tiny"), load_preset("tiny", ["target.template_options.enable_thinking=false"])
    assert not {"template_options", "template_date"} & plain.model_dump()["target"].keys()
    assert set_otherwise.model_dump(mode="json")["target"]["template_options"] == {"enable_thinking": False}
    assert plain.sha256 != set_otherwise.sha256


def test_a_template_whose_end_ends_no_answer_of_the_target_is_refused(tmp_path: Path) -> None:
    with pytest.raises(KoalaBenchError, match=r"'dolly_v2' end with '### End', which ends no answer of"):
        loaded(tmp_path, None, "target.chat_template=dolly_v2")
    target, _ = load_preset_target(
        load_preset("tiny", [f"target.name={tmp_path}", "target.chat_template=dolly_v2", 'evaluation.stop=["### End"]'])
    )
    assert target.stop_texts == ("### End",)


# ------------------------------------------------------------------------------ what it is told


def test_a_tokenizers_own_template_writes_all_special_tokens_itself() -> None:
    from tokenizers import processors

    for source, expected in ((CHATML, 0), ("{{ bos_token }}" + CHATML, 1)):
        template, tokenizer = own(source)
        tokenizer._tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
        )
        prompt = encode_prompt(template, tokenizer, ["why?"])
        assert prompt.count(1) == expected and 2 not in prompt
        assert encode_dialogues(template, tokenizer, [["why?", "so."]])[0].ids[: len(prompt)].tolist() == prompt  # type: ignore[attr-defined]
        foreign = encode_prompt(chat_template("vicuna_v1.1", tokenizer), tokenizer, ["why?"])
        assert foreign[0] == 1 and foreign.count(1) == 1 and 2 not in foreign


def test_options_are_arguments_of_the_template() -> None:
    assert own(THINKS)[0].render(["Why?"]).endswith("[a]")
    assert own(THINKS, enable_thinking=False)[0].render(["Why?"]).endswith("[a]<think></think>")
    with pytest.raises(KoalaBenchError, match=r"'vicuna_v1\.1' takes no options"):
        chat_template("vicuna_v1.1", tiny_tokenizer(), {"enable_thinking": False})


def test_a_template_that_asks_for_the_date_is_told_the_same_one_always() -> None:
    template, tokenizer = own("{{ strftime_now('%d %b %Y %H:%M') }}" + CHATML)
    assert template.render(["Why?"]).startswith("01 Jan 2025 00:00")
    other = chat_template("tokenizer", tokenizer, pinned=date(2024, 7, 26))
    assert other.render(["Why?"]).startswith("26 Jul 2024") and other.sha256 != template.sha256
    assert own(CHATML)[0].date is None


@pytest.mark.parametrize("name", ["tokenizer", "vicuna_v1.1"])
def test_a_system_prompt_is_kept(name: str) -> None:
    _, tokenizer = own(CHATML)
    template = chat_template(name, tokenizer)
    dialogue = Dialogue(TWO, system="You rhyme.")
    for turns in (dialogue, dialogue[:1], dialogue[:3]):
        assert "You rhyme." in template.render(turns)
    text, said = taught(template, tokenizer, dialogue)
    assert "You rhyme." in text and "You rhyme." not in said and "So." in said and "Not so." in said


# ------------------------------------------------------------------------------ templates that rewrite answers


@pytest.mark.parametrize(
    ("source", "options", "prompt"),
    [
        (THINKS, {}, "[u]Why?</s>[a]"),
        (THINKS, {"enable_thinking": False}, "[u]Why?</s>[a]<think></think>"),
        (OPENS, {}, "[u]Why?[a]<think>"),
    ],
    ids=["thinks", "thinks not", "opens"],
)
@pytest.mark.parametrize("answer", ["So.", "it is</think>So."])
def test_an_answer_is_trained_on_behind_the_prompt_that_is_evaluated(
    source: str, options: dict[str, bool], prompt: str, answer: str
) -> None:
    template, tokenizer = own(source, **options)
    assert template.render(["Why?"]) == prompt
    assert taught(template, tokenizer, ["Why?", answer]) == (f"{prompt}{answer}</s>", f"{answer}</s>")
    text, said = taught(template, tokenizer, ["Why?", answer, "And why?", "Not so."])
    assert text.startswith(template.render(["Why?", answer, "And why?"])) and said.endswith("Not so.</s>")
    assert answer not in said or template.render(["Why?", answer, "And why?"]).startswith(f"{prompt}{answer}")


def test_reasoning_is_trained_on_where_the_template_shows_it() -> None:
    dialogue = Dialogue(["Why?", "So."], reasoning={1: "it is"})
    template, tokenizer = own(THINKS)
    assert template.shows_reasoning(dialogue)
    assert taught(template, tokenizer, dialogue)[1] == "<think>it is</think>So.</s>"
    for source, options in ((THINKS, {"enable_thinking": False}), (OPENS, {})):
        assert not own(source, **options)[0].shows_reasoning(dialogue)


@pytest.mark.parametrize("source", [CHATML, THINKS, OPENS], ids=["chatml", "thinks", "opens"])
def test_an_answer_that_was_cut_is_not_taught_to_end(source: str) -> None:
    template, tokenizer = own(source)
    assert taught(template, tokenizer, Dialogue(TWO, cut=[3]))[1].endswith("Not so.")
    first = taught(template, tokenizer, Dialogue(TWO, cut=[1]))[1]
    assert first.endswith(("Not so.</s>", "Not so.<|im_end|>\n"))
    if source == CHATML:
        assert first.startswith("So.Not")


# ------------------------------------------------------------------------------ ends of answers


def test_all_ends_of_target_template_and_user_are_known() -> None:
    template, tokenizer = own(CHATML)
    ids, texts = stops_of(template, tokenizer, (2, 41), ["STOP", "<unk>"], "x")
    assert ids == (2, 41, 0) and texts == ("STOP", "<|im_end|>")
    tokenizer.add_tokens(["<|im_end|>"], special_tokens=True)
    assert stops_of(template, tokenizer, (2,), [], "x") == ((2, 259), ())
    named = replace(chat_template("zero_shot", tokenizer), stop_ids=(259, 100))
    assert stops_of(named, tokenizer, (2,), [], "x")[0] == (2, 259)  # 100 is a letter in this tokenizer
