"""Conversations that are text already: the turns are read back out of it, so that the mask of the answers is known."""

from __future__ import annotations

from koala_bench.dialogues.dialogue import Dialogue
from koala_bench.dialogues.templates import ChatTemplate
from koala_bench.errors import KoalaBenchError

_SYSTEM, _QUESTION = "S7zq", "Q7zq"


def parse(template: ChatTemplate, text: str) -> Dialogue | None:
    """The dialogue whose text in this template is ``text``, blanks at both ends left aside; None if there is none.

    Nothing is guessed: the template must make the same text of what was read.
    """
    try:
        asked, answered, between, end = template.frame
        found = _turns(text.strip(), asked.lstrip(), answered, between, end.rstrip(), None)
        if found is None and template.shows_system:
            before, _, after = template.render(Dialogue([_QUESTION], system=_SYSTEM)).partition(_SYSTEM)
            asked = after.partition(_QUESTION)[0]
            head, whole = before.lstrip(), text.strip()
            system, found_asked, rest = whole[len(head) :].partition(asked) if whole.startswith(head) else ("", "", "")
            found = _turns(rest, "", answered, between, end.rstrip(), system) if found_asked else None
        return found if found and template.render(found).strip() == text.strip() else None
    except (KoalaBenchError, ValueError):
        return None


def _turns(text: str, asked: str, answered: str, between: str, end: str, system: str | None) -> Dialogue | None:
    if not text.startswith(asked) or not answered.strip() or not between.strip():
        return None
    rest, turns = text[len(asked) :], []
    while True:
        question, met, rest = rest.partition(answered)
        if not met:
            return None
        answer, more, after = rest.partition(between)
        turns += [question.strip(), (answer if more else answer.removesuffix(end)).strip()]
        if not more:
            return Dialogue(turns, system)
        rest = after
