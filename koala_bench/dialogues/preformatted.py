"""Conversations given as rendered text: parses the turns back, so that the answers can be masked."""

from __future__ import annotations

from koala_bench.dialogues.templates import ChatTemplate
from koala_bench.dialogues.turns import Dialogue
from koala_bench.errors import KoalaBenchError

_SYSTEM, _QUESTION = "S7zq", "Q7zq"


def parse(template: ChatTemplate, text: str) -> Dialogue | None:
    """The dialogue that this template renders as ``text``, up to whitespace at both ends; None if there is none.

    Nothing is guessed: rendering the result must give the same text.
    """
    try:
        before_question, before_answer, before_next, end = template.frame
        found = _turns(text.strip(), before_question.lstrip(), before_answer, before_next, end.rstrip(), None)
        if found is None and template.shows_system:
            before, _, after = template.render(Dialogue([_QUESTION], system=_SYSTEM)).partition(_SYSTEM)
            before_question = after.partition(_QUESTION)[0]
            head, whole = before.lstrip(), text.strip()
            system, separator, rest = whole.removeprefix(head).partition(before_question)
            if whole.startswith(head) and separator:
                found = _turns(rest, "", before_answer, before_next, end.rstrip(), system)
        return found if found and template.render(found).strip() == text.strip() else None
    except (KoalaBenchError, ValueError):
        return None


def _turns(
    text: str, before_question: str, before_answer: str, before_next: str, end: str, system: str | None
) -> Dialogue | None:
    if not text.startswith(before_question) or not before_answer.strip() or not before_next.strip():
        return None
    rest, turns = text[len(before_question) :], []
    while True:
        question, met, rest = rest.partition(before_answer)
        if not met:
            return None
        answer, more, after = rest.partition(before_next)
        turns += [question.strip(), (answer if more else answer.removesuffix(end)).strip()]
        if not more:
            return Dialogue(turns, system)
        rest = after
