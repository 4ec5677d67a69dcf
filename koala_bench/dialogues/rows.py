"""One row of a file as a dialogue: the known formats, and why a row is read in part or not at all.

Known are ShareGPT's and FastChat's ``conversations`` (``from``, ``value``), OpenAI's ``messages`` (``role``,
``content``), either name with either keys, Alpaca's ``instruction``, ``input``, ``output``, TRL's ``prompt`` and
``completion``, and ``text`` that a chat template has formatted already.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from koala_bench.dialogues.preformatted import parse
from koala_bench.dialogues.templates import ChatTemplate
from koala_bench.dialogues.turns import Dialogue

# JSON can hold half of a surrogate pair, which neither UTF-8 nor tokenizers accept.
_LONE_SURROGATE = re.compile("[\\ud800-\\udfff]")
_ANSWER_FIRST, _NO_TEXT, _OUT_OF_TURN, _NO_ANSWER, _TOOL = (
    "an answer comes first", "a message is empty or no text", "the speakers do not alternate",
    "the last question has no answer", "a tool is called",
)  # fmt: skip
_NO_FORM, _NO_MESSAGE, _NO_QUESTION = "the row has no form that is known", "there is no message", "nobody asks"
_OTHER_TEMPLATE = "the text was formatted by another chat template"
_NO_SYSTEM, _NO_REASONING = "the chat template shows no system prompt", "the chat template does not show the reasoning"
_USER, _ASSISTANT, _SYSTEM, _TOOLS = range(4)
_ROLES = {
    **dict.fromkeys(("human", "user"), _USER),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "bing", "bard"), _ASSISTANT),
    **dict.fromkeys(("system", "developer"), _SYSTEM),
    **dict.fromkeys(("tool", "function", "function_call", "observation"), _TOOLS),
}


@dataclass(frozen=True)
class _Message:
    """One message; ``role`` is None for an unknown speaker."""

    role: int | None
    text: Any
    reasoning: Any = None
    cut: bool = False


def read_row(row: Any, template: ChatTemplate | None) -> tuple[Dialogue, str | None]:
    """The dialogue of a row from its first question to its last answer, empty if there is no such pair.

    Args:
        template: the chat template, if known; preformatted text needs it, and a row that it cannot show is reported.

    Returns:
        it and why some or all was left out, None if it is whole.
    """
    if isinstance(row, dict) and isinstance(row.get("text"), str) and _messages(row) is None and template is not None:
        found = None if _LONE_SURROGATE.search(row["text"]) else parse(template, row["text"])
        return (Dialogue(), _OTHER_TEMPLATE) if found is None else (found, None)
    dialogue, reason = _dialogue(row)
    if template is None or not dialogue:
        return dialogue, reason
    if dialogue.system is not None and not template.shows_system:
        return Dialogue(), _NO_SYSTEM
    if dialogue.reasoning and not template.shows_reasoning(dialogue):
        return Dialogue(dialogue, dialogue.system, None, dialogue.cut), reason or _NO_REASONING
    return dialogue, reason


def _messages(row: dict[str, Any]) -> list[_Message] | None:
    """The messages of a row in any known format; None if the format is unknown."""
    system = [_Message(_SYSTEM, row["system"])] if isinstance(row.get("system"), str) else []
    if isinstance(row.get("instruction"), str) and "output" in row:
        more = row.get("input")
        question = f"{row['instruction']}\n\n{more}" if isinstance(more, str) and more.strip() else row["instruction"]
        return [*system, _Message(_USER, question), _Message(_ASSISTANT, row["output"])]
    for name in ("conversations", "messages", "conversation"):
        if isinstance(messages := row.get(name), list):
            return [*system, *map(_message, messages)]
    if "prompt" in row and (answer := next((key for key in ("completion", "response") if key in row), None)):
        prompt, completion = row["prompt"], row[answer]
        if isinstance(prompt, list) and isinstance(completion, list):
            return [*system, *map(_message, [*prompt, *completion])]
        return [*system, _Message(_USER, prompt), _Message(_ASSISTANT, completion)]
    return None


def _message(each: Any) -> _Message:
    if not isinstance(each, dict):
        return _Message(None, None)
    role = _ROLES.get(str(each.get("role", each.get("from"))))
    if each.get("tool_calls") or each.get("function_call"):
        role = _TOOLS
    reasoning = each.get("reasoning_content", each.get("reasoning"))
    return _Message(role, _text(each.get("content", each.get("value"))), reasoning, each.get("cut") is True)


def _text(content: Any) -> Any:
    """The parts of an OpenAI message joined, if all of them are text."""
    if (
        isinstance(content, list)
        and content
        and all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in content)
    ):
        return "".join(part["text"] for part in content)
    return content


def _good(text: Any) -> bool:
    return isinstance(text, str) and bool(text.strip()) and not _LONE_SURROGATE.search(text)


def _dialogue(row: Any) -> tuple[Dialogue, str | None]:
    messages = _messages(row) if isinstance(row, dict) else None
    if not messages:
        return Dialogue(), _NO_FORM if messages is None else _NO_MESSAGE
    turns: list[str] = []
    systems: list[str] = []
    reasoning: dict[int, str] = {}
    cut: set[int] = set()
    before = ended = empty = None
    for message in messages:
        good = _good(message.text)
        if message.role == _SYSTEM and not turns:
            systems += [message.text.strip()] if good else []
            empty = empty if good or message.text in (None, "") else _NO_TEXT
        elif message.role == _TOOLS:
            if turns:
                ended = _TOOL
                break
            before = before or _TOOL
        elif good and message.role == len(turns) % 2:
            if _good(message.reasoning):
                reasoning[len(turns)] = message.reasoning.strip()
            cut |= {len(turns)} if message.cut else set()
            turns.append(message.text.strip())
        elif turns:
            ended = _OUT_OF_TURN if good else _NO_TEXT
            break
        else:  # an answer without a question, or nothing
            before = _ANSWER_FIRST if message.role == _ASSISTANT else before
            empty = empty if good else _NO_TEXT
    if len(turns) > 1:
        whole = Dialogue(turns, "\n\n".join(systems) or None, reasoning, cut)
        dialogue = whole[: len(turns) // 2 * 2]
        assert isinstance(dialogue, Dialogue)
        return dialogue, ended or before or empty or (_NO_ANSWER if len(turns) % 2 else None)
    if turns:
        return Dialogue(), ended or _NO_ANSWER
    return Dialogue(), empty or before or _NO_QUESTION
