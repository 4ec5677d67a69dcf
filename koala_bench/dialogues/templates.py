"""Chat templates: how a conversation becomes text, what ends an answer in it, and which template a target gets.

Templates come from fschat by name (``vicuna_v1.1``) or from the tokenizer itself (``tokenizer``).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, datetime, time
from functools import cached_property
from typing import TYPE_CHECKING, Any

from koala_bench.common.suggestions import did_you_mean
from koala_bench.dialogues.turns import Dialogue, as_dialogue, messages_of
from koala_bench.errors import KoalaBenchError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

OWN = "tokenizer"  # the tokenizer's own template
AUTO = "auto"  # the tokenizer's own, else the default
USUAL = "vicuna_v1.1"
# The date given to templates that ask for today's, so that a run resumed tomorrow has the same prompts.
PINNED = date(2025, 1, 1)
_CLOCK = re.compile(r"strftime_now\s*\(\s*(['\"])(.*?)\1\s*\)")
# Placeholders that no template contains: the text around them is the template's.
_QUESTION, _ANSWER, _MORE, _SYSTEM = "Q7zq", "A7zq", "M7zq", "S7zq"


@dataclass(frozen=True)
class ChatTemplate:
    """How turns become text.

    Attributes:
        name: an fschat conversation template, or ``tokenizer``.
        render: takes turns that alternate user and assistant; after an odd number the text ends where
            the assistant is to speak.
        own: whether it is the tokenizer's own, which writes all special tokens itself.
        stop_ids, stop_texts: ends of an answer that the template declares.
        date: the date given if it asks for today's; None if it does not ask.
    """

    name: str
    render: Callable[[Sequence[str]], str]
    own: bool = False
    stop_ids: tuple[int, ...] = ()
    stop_texts: tuple[str, ...] = ()
    date: date | None = None

    @property
    def sha256(self) -> str:
        """Hash of the template's rendering of fixed turns: equal hashes mean equal prompts."""
        return hashlib.sha256(self.render(["a", "b", "c"]).encode()).hexdigest()

    @cached_property
    def frame(self) -> tuple[str, str, str, str]:
        """The text before a question, between question and answer, before the next question, and after the last
        answer."""
        asked, after = self.render([_QUESTION]).split(_QUESTION, 1)
        between = self.render([_QUESTION, _ANSWER, _MORE]).partition(_ANSWER)[2].partition(_MORE)[0]
        return asked, after, between, self.end

    @cached_property
    def end(self) -> str:
        """The text after the last answer."""
        return self.render([_QUESTION, _ANSWER]).rpartition(_ANSWER)[2]

    @cached_property
    def shows_system(self) -> bool:
        """Whether a system prompt is rendered; some templates refuse it, others drop it."""
        try:
            return _SYSTEM in self.render(Dialogue([_QUESTION], system=_SYSTEM))
        except KoalaBenchError:
            return False

    def shows_reasoning(self, dialogue: Dialogue) -> bool:
        """Whether the text shows the thinking before the last answer, after the prompt for that answer."""
        thought = dialogue.reasoning.get(len(dialogue) - 1, "")
        prompt, text = self.render(dialogue[:-1]), self.render(dialogue)
        return text.startswith(prompt) and bool(thought.strip()) and thought.strip() in text[len(prompt) :]


def chat_template(
    name: str, tokenizer: PreTrainedTokenizerBase, options: Mapping[str, Any] | None = None, pinned: date | None = None
) -> ChatTemplate:
    """Find a template by name.

    Args:
        options: arguments of the tokenizer's own template, such as ``enable_thinking``.
        pinned: the date given if it asks for today's; ``PINNED`` if None.

    Raises:
        KoalaBenchError: fschat does not know the name, its template is given options, or the tokenizer has no template
            of its own.
    """
    if name == AUTO:
        name = OWN if tokenizer.chat_template else USUAL
    if name == OWN:
        return _own(tokenizer, dict(options or {}), pinned or PINNED)
    if options:
        raise KoalaBenchError(
            f"The chat template '{name}' takes no options ({', '.join(options)}).",
            "Leave out target.template_options, or use --set target.chat_template=tokenizer.",
        )
    return _of_fschat(name)


def _own(tokenizer: PreTrainedTokenizerBase, options: dict[str, Any], pinned: date) -> ChatTemplate:
    if not tokenizer.chat_template:
        raise KoalaBenchError(
            "This tokenizer has no chat template of its own.",
            "Name one of fschat's, e.g. --set target.chat_template=vicuna_v1.1.",
        )

    from jinja2 import TemplateError

    try:
        source, asks_date = _pinned(tokenizer.get_chat_template(), pinned)
    except ValueError as error:  # several by name, and none of them is the default
        raise KoalaBenchError(
            f"This tokenizer has several chat templates, {', '.join(tokenizer.chat_template)}, and no default one.",
            "Name one of fschat's: --set target.chat_template=NAME.",
        ) from error

    def render(turns: Sequence[str]) -> str:
        try:
            given: dict[str, Any] = {
                "chat_template": source,
                "tokenize": False,
                "add_generation_prompt": len(turns) % 2 == 1,
            }
            return str(tokenizer.apply_chat_template(messages_of(turns), **given, **options))
        except (TemplateError, TypeError) as error:
            raise KoalaBenchError(
                f"The tokenizer's own chat template fails: {error}.",
                "Name one of fschat's: --set target.chat_template=NAME.",
            ) from error

    return ChatTemplate(OWN, render, own=True, date=pinned if asks_date else None)


def _pinned(source: str, day: date) -> tuple[str, bool]:
    """The template with this day as today's, and whether it asks for the date."""
    clock = datetime.combine(day, time())
    found, calls = _CLOCK.subn(lambda call: repr(clock.strftime(call[2])), source)
    if re.search(r"strftime_now\s*\(", found):
        raise KoalaBenchError(
            "The tokenizer's own chat template asks for today's date in a form that is not known before it does.",
            "Name one of fschat's: --set target.chat_template=NAME.",
        )
    return found, calls > 0


def _of_fschat(name: str) -> ChatTemplate:
    # Only this module of fschat: fastchat.model would import some forty model adapters.
    from fastchat.conversation import conv_templates, get_conv_template

    if name not in conv_templates:
        usable = "Use a name of fastchat.conversation, or 'tokenizer'."
        raise KoalaBenchError(f"Unknown chat template '{name}'.", did_you_mean(name, conv_templates, usable))

    def render(turns: Sequence[str]) -> str:
        conversation = get_conv_template(name)
        if (system := as_dialogue(turns).system) is not None:
            conversation.set_system_message(system)
        for index, text in enumerate(turns):
            conversation.append_message(conversation.roles[index % 2], text)
        if len(turns) % 2 == 1:
            conversation.append_message(conversation.roles[1], None)
        return str(conversation.get_prompt())

    known = conv_templates[name]
    texts = [known.stop_str] if isinstance(known.stop_str, str) else list(known.stop_str or ())
    return ChatTemplate(name, render, stop_ids=tuple(known.stop_token_ids or ()), stop_texts=tuple(texts))


def stops_of(
    template: ChatTemplate, tokenizer: PreTrainedTokenizerBase, ends: Sequence[int], more: Sequence[str], target: str
) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """Token ids and texts that end an answer: the target's, the template's, and those of ``--stop``.

    Args:
        ends: the target's own end-of-answer ids.
        more: texts asked for with ``--stop``.
        target: its name, for errors.

    Raises:
        KoalaBenchError: answers in the template end with a text that ends no answer of this target.
    """
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    ids = [*ends, *(each for each in template.stop_ids if each in special)]
    texts: list[str] = []

    def add(text: str, whole: bool) -> None:
        tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
        if tokens and tokens[0] in special and (len(tokens) == 1 or not whole):
            ids.append(int(tokens[0]))
        else:
            texts.append(text)

    for text in (*template.stop_texts, *more):
        if text:
            add(text, whole=True)
    ending = template.end.strip()
    tokens = tokenizer(ending, add_special_tokens=False)["input_ids"] if ending else []
    if ending and not (set(tokens) & set(ids) or any(text in ending for text in texts)):
        if not template.own:
            raise KoalaBenchError(
                f"Answers in the chat template '{template.name}' end with {ending!r},"
                f" which ends no answer of {target}.",
                f"Use its own with --set target.chat_template={OWN}, name another one, or add --stop {ending!r}.",
            )
        add(ending, whole=False)
    return tuple(dict.fromkeys(ids)), tuple(dict.fromkeys(texts))
