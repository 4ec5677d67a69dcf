"""Dialogues as token ids, and the mask of what a draft head is trained on.

The supervised part is found by rendering the dialogue up to an answer with and without that answer, never by counting
tokens, so it is right for any tokenizer that reports character offsets. If a template changes answers (as those that
strip or insert reasoning do), only the last answer is trained on, after the same prompt as in evaluation.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from koala_bench.dialogues.templates import ChatTemplate, chat_template
from koala_bench.dialogues.turns import as_dialogue
from koala_bench.errors import KoalaBenchError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["ChatTemplate", "EncodedDialogue", "chat_template", "encode_dialogues", "encode_prompt"]

# Dialogues per call of the tokenizer, which is multi-threaded. More would take memory: its result per token is a
# hundred times what is kept.
_AT_ONCE = 1024


@dataclass(frozen=True)
class EncodedDialogue:
    """Token ids of a dialogue and which of them the assistant said.

    Attributes:
        ids: token ids, length ``tokens``.
        supervised: 1 where the token belongs to an answer (its end-of-sequence included, but where the answer was cut
            at a limit), else 0; length ``tokens``.
        last_only: whether only the last answer can be trained on with this template.
    """

    ids: Sequence[int]
    supervised: Sequence[int]
    last_only: bool = False


def _starts(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids that a tokenizer prepends to any text. Ids that it appends must not follow a prompt."""
    bare = list(tokenizer("a", add_special_tokens=False)["input_ids"])
    whole = list(tokenizer("a")["input_ids"])
    at = next((index for index in range(len(whole)) if whole[index : index + len(bare)] == bare), 0)
    return whole[:at]


def _before(template: ChatTemplate, tokenizer: PreTrainedTokenizerBase, text: str, starts: list[int]) -> list[int]:
    """The ids to put before a text's own; none if the template writes them itself."""
    if template.own or (tokenizer.bos_token and text.startswith(str(tokenizer.bos_token))):
        return []
    return starts


def encode_prompt(template: ChatTemplate, tokenizer: PreTrainedTokenizerBase, turns: Sequence[str]) -> list[int]:
    """Token ids of a prompt: a conversation that ends with the user's turn, so ``turns`` has an odd length."""
    return encode_text(template, tokenizer, template.render(turns))


def encode_text(template: ChatTemplate, tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of a rendered text, or of a prefix of it."""
    ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    return [*_before(template, tokenizer, text, _starts(tokenizer)), *ids]


def _rendered(template: ChatTemplate, turns: Sequence[str]) -> tuple[str, list[tuple[int, int]], bool]:
    """Rendered text of a dialogue, the spans of its answers, and whether these are the last answer only."""
    dialogue = as_dialogue(turns)
    text = template.render(dialogue)
    spans = []
    for index in range(1, len(dialogue), 2):
        before = template.render(dialogue[:index])
        after = text if index + 1 == len(dialogue) else template.render(dialogue[: index + 1])
        if not (after.startswith(before) and text.startswith(after)):
            break
        said, answer = after[len(before) :], dialogue[index].strip()
        thought = dialogue.reasoning.get(index, "").strip()
        # Whitespace before an answer is the template's; any other added text belongs to another mode.
        at = said.find(answer, said.find(thought) + len(thought))
        if at < 0 or (said[:at].strip() and not (thought and thought in said[:at])):
            break
        ends = len(before) + at + len(answer) if index in dialogue.cut else len(after)
        spans.append((len(before), ends))
    else:
        return text, spans, False
    prompt, last = template.render(dialogue[:-1]), len(dialogue) - 1
    if last in dialogue.reasoning and template.shows_reasoning(dialogue):
        return text, [(len(prompt), len(text))], True
    said = prompt + dialogue[-1]
    text = said + template.end
    return text, [(len(prompt), len(said if last in dialogue.cut else text))], True


def encode_dialogues(
    template: ChatTemplate, tokenizer: PreTrainedTokenizerBase, dialogues: Sequence[Sequence[str]]
) -> list[EncodedDialogue]:
    """Token ids and answer masks of dialogues, each with an even number of turns. Raises KoalaBenchError where the
    tokenizer reports no offsets, or the template fails."""
    if not tokenizer.is_fast:
        raise KoalaBenchError(
            "This tokenizer does not report which characters a token covers.",
            "Use a checkpoint that has a tokenizer.json (a fast tokenizer).",
        )
    if not dialogues:
        return []
    found, own_start = [], _starts(tokenizer)
    for first in range(0, len(dialogues), _AT_ONCE):
        rendered = [_rendered(template, turns) for turns in dialogues[first : first + _AT_ONCE]]
        texts = [text for text, _, _ in rendered]
        encoded = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True)
        for (text, spans, last_only), own, offsets in zip(
            rendered, encoded["input_ids"], encoded["offset_mapping"], strict=True
        ):
            before = _before(template, tokenizer, text, own_start)
            starts, ends = np.asarray(offsets).reshape(-1, 2).T
            supervised = np.zeros(len(own), dtype=np.int8)
            for low, high in spans:
                supervised |= (low <= starts) & (ends <= high)
            supervised &= ends > starts  # special tokens without text have no span
            # Five bytes a token: lists of numbers would take ten times as much, and a corpus has millions.
            mask = array("b", bytes(len(before)) + supervised.tobytes())
            found.append(EncodedDialogue(array("i", [*before, *own]), mask, last_only))
    return found
