"""Where an answer ends that ends with a text, not with a token of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def end_of_text(tokenizer: Any, tokens: Sequence[int], new: int, texts: Sequence[str]) -> int | None:
    """How many of an answer's tokens there are once the first of ``texts`` is complete, None if none is.

    A token may end in the middle of such a text or begin before it, so the text that was decoded tells, not the ids.
    Only what the last tokens can complete is decoded: a token stands for at least a byte, but for special ones.

    Args:
        tokens: of the answer until now.
        new: how many of them were not looked at before.
    """
    reach = max(len(text.encode()) for text in texts)
    first = max(0, len(tokens) - new - reach)
    if not _holds(tokenizer, tokens[first:], texts):
        return None
    return next(
        count
        for count in range(len(tokens) - new + 1, len(tokens) + 1)
        if _holds(tokenizer, tokens[first:count], texts)
    )


def _holds(tokenizer: Any, tokens: Sequence[int], texts: Sequence[str]) -> bool:
    said = tokenizer.decode(list(tokens), skip_special_tokens=False)
    return any(text in said for text in texts)


def without_end(text: str, texts: Sequence[str]) -> str:
    """An answer without the text that ended it, as it is without the token that ends one."""
    places = [place for each in texts if (place := text.find(each)) >= 0]
    return text[: min(places)] if places else text
