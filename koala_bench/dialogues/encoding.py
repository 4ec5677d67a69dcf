"""Dialogues as token ids: chat templates, and the mask of what a draft head is trained on.

A dialogue is a list of texts that alternates user and assistant. Templates come from fschat by name
(``vicuna_v1.1``) or from the tokenizer itself (``tokenizer``). The supervised part is found by rendering
the dialogue up to an answer with and without that answer, never by counting tokens, so it is right for any
tokenizer that reports character offsets.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from koala_bench.common.choices import did_you_mean
from koala_bench.errors import KoalaBenchError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Dialogues that are given to a tokenizer together: it works on several threads, and one call each costs more than the
# work. What it returns for a token takes a hundred times what is kept of it.
_AT_ONCE = 1024


@dataclass(frozen=True)
class ChatTemplate:
    """How turns become text.

    Attributes:
        name: an fschat conversation template, or ``tokenizer``.
        render: takes turns that alternate user and assistant; after an odd number the text ends where
            the assistant is to speak.
    """

    name: str
    render: Callable[[Sequence[str]], str]

    @property
    def sha256(self) -> str:
        """Hash of what the template makes of fixed turns: equal hashes mean equal prompts."""
        return hashlib.sha256(self.render(["a", "b", "c"]).encode()).hexdigest()


@dataclass(frozen=True)
class EncodedDialogue:
    """Token ids of a dialogue and which of them the assistant said.

    Attributes:
        ids: token ids, length ``tokens``.
        supervised: 1 where the token belongs to an answer (its end-of-sequence included), else 0; length ``tokens``.
    """

    ids: Sequence[int]
    supervised: Sequence[int]


def chat_template(name: str, tokenizer: PreTrainedTokenizerBase) -> ChatTemplate:
    """Find a template by name.

    Raises:
        KoalaBenchError: fschat does not know the name, or the tokenizer has no template of its own.
    """
    if name == "tokenizer":
        if not tokenizer.chat_template:
            raise KoalaBenchError(
                "This tokenizer has no chat template of its own.",
                "Name one of fschat's, e.g. --set target.chat_template=vicuna_v1.1.",
            )

        from jinja2 import TemplateError

        def render_own(turns: Sequence[str]) -> str:
            messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)]
            try:
                return str(
                    tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=len(turns) % 2 == 1)
                )
            except TemplateError as error:
                raise KoalaBenchError(
                    f"The tokenizer's own chat template fails: {error}.",
                    "Name one of fschat's: --set target.chat_template=NAME.",
                ) from error

        return ChatTemplate(name, render_own)

    # Only this module of fschat: fastchat.model would import some forty model adapters.
    from fastchat.conversation import conv_templates, get_conv_template

    if name not in conv_templates:
        usable = "Use a name of fastchat.conversation, or 'tokenizer'."
        raise KoalaBenchError(f"Unknown chat template '{name}'.", did_you_mean(name, conv_templates, usable))

    def render(turns: Sequence[str]) -> str:
        conversation = get_conv_template(name)
        for index, text in enumerate(turns):
            conversation.append_message(conversation.roles[index % 2], text)
        if len(turns) % 2 == 1:
            conversation.append_message(conversation.roles[1], None)
        return str(conversation.get_prompt())

    return ChatTemplate(name, render)


def _starts_itself(tokenizer: PreTrainedTokenizerBase, text: str) -> bool:
    """Whether the template wrote the begin-of-sequence token, as tokenizers' own often do; it must not come twice."""
    return bool(tokenizer.bos_token) and text.startswith(str(tokenizer.bos_token))


def encode_prompt(template: ChatTemplate, tokenizer: PreTrainedTokenizerBase, turns: Sequence[str]) -> list[int]:
    """Token ids of a conversation whose next word is the assistant's. ``turns`` has an odd length."""
    text = template.render(turns)
    return list(tokenizer(text, add_special_tokens=not _starts_itself(tokenizer, text))["input_ids"])


def _answer_spans(template: ChatTemplate, turns: Sequence[str], text: str) -> list[tuple[int, int]]:
    spans = []
    for index in range(1, len(turns), 2):
        before = template.render(turns[:index])
        after = text if index + 1 == len(turns) else template.render(turns[: index + 1])
        if not (after.startswith(before) and text.startswith(after)):
            raise KoalaBenchError(
                f"The chat template '{template.name}' changes earlier turns when an answer follows.",
                "Train with another template, e.g. --set target.chat_template=vicuna_v1.1.",
            )
        spans.append((len(before), len(after)))
    return spans


def encode_dialogues(
    template: ChatTemplate, tokenizer: PreTrainedTokenizerBase, dialogues: Sequence[Sequence[str]]
) -> list[EncodedDialogue]:
    """Token ids and answer masks of dialogues, each with an even number of turns.

    Raises:
        KoalaBenchError: the template rewrites earlier turns once an answer follows, so that the
            answer's place in the text is not defined; or the tokenizer reports no offsets.
    """
    if not tokenizer.is_fast:
        raise KoalaBenchError(
            "This tokenizer cannot say which characters a token covers.",
            "Use a checkpoint that has a tokenizer.json (a fast tokenizer).",
        )
    if not dialogues:
        return []
    found = []
    for first in range(0, len(dialogues), _AT_ONCE):
        some = dialogues[first : first + _AT_ONCE]
        texts = [template.render(turns) for turns in some]
        encoded = tokenizer(
            texts, add_special_tokens=not _starts_itself(tokenizer, texts[0]), return_offsets_mapping=True
        )
        for turns, text, ids, offsets in zip(some, texts, encoded["input_ids"], encoded["offset_mapping"], strict=True):
            starts, ends = np.asarray(offsets).reshape(-1, 2).T
            supervised = np.zeros(len(ids), dtype=np.int8)
            for low, high in _answer_spans(template, turns, text):
                supervised |= (low <= starts) & (ends <= high)
            supervised &= ends > starts  # special tokens that stand for no text have no place in it
            # Five bytes a token: lists of numbers would take ten times as much, and a corpus has millions.
            found.append(EncodedDialogue(array("i", ids), array("b", supervised.tobytes())))
    return found
