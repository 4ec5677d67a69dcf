"""Dialogues as token ids: chat templates, and the mask of what a draft head is trained on.

A dialogue is a list of texts that alternates user and assistant. Templates come from fschat by name
(``vicuna_v1.1``) or from the tokenizer itself (``tokenizer``). The supervised part is found by rendering
the dialogue up to an answer with and without that answer, never by counting tokens, so it is right for any
tokenizer that reports character offsets.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from koala_bench.errors import KoalaBenchError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


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
        supervised: whether the token belongs to an answer (its end-of-sequence included), length ``tokens``.
    """

    ids: list[int]
    supervised: list[bool]


def chat_template(name: str, tokenizer: PreTrainedTokenizerBase) -> ChatTemplate:
    """Find a template by name.

    Raises:
        KoalaBenchError: fschat does not know the name, or the tokenizer has no template of its own.
    """
    if name == "tokenizer":
        if not tokenizer.chat_template:
            raise KoalaBenchError("This tokenizer has no chat template of its own.", "Name one of fschat's with --chat-template, e.g. vicuna_v1.1.")

        def render_own(turns: Sequence[str]) -> str:
            messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)]
            return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=len(turns) % 2 == 1))

        return ChatTemplate(name, render_own)

    # Only this module of fschat: fastchat.model would import some forty model adapters.
    from fastchat.conversation import conv_templates, get_conv_template

    if name not in conv_templates:
        import difflib

        close = difflib.get_close_matches(name, conv_templates, n=3)
        raise KoalaBenchError(
            f"Unknown chat template '{name}'.", f"Did you mean {', '.join(close)}?" if close else "Use a name of fastchat.conversation, or 'tokenizer'."
        )

    def render(turns: Sequence[str]) -> str:
        conversation = get_conv_template(name)
        for index, text in enumerate(turns):
            conversation.append_message(conversation.roles[index % 2], text)
        if len(turns) % 2 == 1:
            conversation.append_message(conversation.roles[1], None)
        return str(conversation.get_prompt())

    return ChatTemplate(name, render)


def _encode(tokenizer: PreTrainedTokenizerBase, text: str, offsets: bool) -> tuple[list[int], list[tuple[int, int]]]:
    # Templates of tokenizers often write the begin-of-sequence token themselves; it must not come twice.
    own_start = bool(tokenizer.bos_token) and text.startswith(str(tokenizer.bos_token))
    encoded = tokenizer(text, add_special_tokens=not own_start, return_offsets_mapping=offsets)
    return list(encoded["input_ids"]), [tuple(pair) for pair in encoded["offset_mapping"]] if offsets else []


def encode_prompt(template: ChatTemplate, tokenizer: PreTrainedTokenizerBase, turns: Sequence[str]) -> list[int]:
    """Token ids of a conversation whose next word is the assistant's. ``turns`` has an odd length."""
    return _encode(tokenizer, template.render(turns), offsets=False)[0]


def encode_dialogue(template: ChatTemplate, tokenizer: PreTrainedTokenizerBase, turns: Sequence[str]) -> EncodedDialogue:
    """Token ids and answer mask of a dialogue with an even number of turns.

    Raises:
        KoalaBenchError: the template rewrites earlier turns once an answer follows, so that the
            answer's place in the text is not defined; or the tokenizer reports no offsets.
    """
    text = template.render(turns)
    spans = []
    for index in range(1, len(turns), 2):
        before, after = template.render(turns[:index]), template.render(turns[: index + 1])
        if not (after.startswith(before) and text.startswith(after)):
            raise KoalaBenchError(
                f"The chat template '{template.name}' changes earlier turns when an answer follows.",
                "Train with another template, e.g. --chat-template vicuna_v1.1.",
            )
        spans.append((len(before), len(after)))
    if not tokenizer.is_fast:
        raise KoalaBenchError("This tokenizer cannot say which characters a token covers.", "Use a checkpoint that has a tokenizer.json (a fast tokenizer).")
    ids, offsets = _encode(tokenizer, text, offsets=True)
    supervised = [end > start and any(low <= start and end <= high for low, high in spans) for start, end in offsets]
    return EncodedDialogue(ids, supervised)
