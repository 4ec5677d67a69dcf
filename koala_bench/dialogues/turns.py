"""One conversation: its turns, the system prompt before them, and what is known of its answers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, SupportsIndex, overload


class Dialogue(list[str]):
    """Texts that alternate user and assistant, user first; a list of them, with what templates and masks need besides.

    A slice from the beginning is a dialogue too and keeps the system prompt; any other slice is a plain list.

    Attributes:
        system: the system prompt, None where there is none of its own.
        reasoning: what the assistant thought before an answer, by the answer's index.
        cut: indices of answers that ended at a limit; what ends an answer is not taught behind them.
    """

    def __init__(
        self,
        turns: Iterable[str] = (),
        system: str | None = None,
        reasoning: Mapping[int, str] | None = None,
        cut: Iterable[int] = (),
    ) -> None:
        super().__init__(turns)
        self.system = system
        self.reasoning = dict(reasoning or {})
        self.cut = frozenset(cut)

    @overload
    def __getitem__(self, place: SupportsIndex) -> str: ...

    @overload
    def __getitem__(self, place: slice) -> list[str]: ...

    def __getitem__(self, place: SupportsIndex | slice) -> str | list[str]:
        if not isinstance(place, slice):
            return super().__getitem__(place)
        found = super().__getitem__(place)
        if place.start not in (None, 0) or place.step not in (None, 1):
            return found
        count = len(found)
        reasoning = {index: text for index, text in self.reasoning.items() if index < count}
        return Dialogue(found, self.system, reasoning, (index for index in self.cut if index < count))


def as_dialogue(turns: Sequence[str]) -> Dialogue:
    """The turns as a ``Dialogue``; plain texts become one without a system prompt."""
    return turns if isinstance(turns, Dialogue) else Dialogue(turns)


def messages_of(turns: Sequence[str]) -> list[dict[str, Any]]:
    """The turns as OpenAI's messages, as the chat templates of tokenizers take them."""
    dialogue = as_dialogue(turns)
    messages = [{"role": "system", "content": dialogue.system}] if dialogue.system is not None else []
    for index, text in enumerate(dialogue):
        thought = dialogue.reasoning.get(index)
        messages.append(
            {"role": ("user", "assistant")[index % 2], "content": text}
            | ({} if thought is None else {"reasoning_content": thought})
        )
    return messages
