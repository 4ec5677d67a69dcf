"""Tokens that a tokenizer has and its model has not: served while no text needs one, else refused in a line."""

from __future__ import annotations

from pathlib import Path

import pytest

from koala_bench.decoding.loop import VANILLA_TREE, Vanilla, decode
from koala_bench.dialogues.conversations import encode_all
from koala_bench.dialogues.encoding import encode_prompt
from koala_bench.errors import KoalaBenchError
from koala_bench.presets import load_preset
from koala_bench.testing import save_tiny_target, tiny_tokenizer
from koala_bench.training.experiment import load_preset_target

_TURNS = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% if m.role == 'assistant' %}END{% endif %}{% endfor %}"


def save(folder: Path, template: str) -> Path:
    """A target of 259 tokens with a tokenizer of 261."""
    save_tiny_target(folder)
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "<pad>", "additional_special_tokens": ["<new>"]})
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return folder


def test_tokens_that_no_text_needs_are_harmless(tmp_path: Path) -> None:
    folder = save(tmp_path, _TURNS.replace("END", "{{ eos_token }}"))
    target, template = load_preset_target(load_preset("tiny", [f"target.name='{folder}'", "target.chat_template=auto"]))
    assert target.tokenizer is not None and len(target.tokenizer) > target.config.vocab_size
    assert max(target.stop_ids) < target.config.vocab_size
    prompt = encode_prompt(template, target.tokenizer, ["why?"])
    assert decode(target, Vanilla(), VANILLA_TREE, prompt, 4, target.stop_ids).tokens
    assert encode_all(target, template, [["why?", "so."]])
    with pytest.raises(KoalaBenchError, match="The prompt has the token '<new>' with id 2"):
        decode(target, Vanilla(), VANILLA_TREE, encode_prompt(template, target.tokenizer, ["<new>?"]), 4, ())
    with pytest.raises(KoalaBenchError, match=r"The dialogue that begins 'why\?' has the token '<new>'"):
        encode_all(target, template, [["a", "b"], ["why?", "<new>"]])


def test_a_template_that_needs_one_is_refused(tmp_path: Path) -> None:
    folder = save(tmp_path, _TURNS.replace("END", "<new>"))
    with pytest.raises(KoalaBenchError, match="The chat template 'tokenizer' has the token '<new>'"):
        load_preset_target(load_preset("tiny", [f"target.name='{folder}'", "target.chat_template=auto"]))
