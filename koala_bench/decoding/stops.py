"""Stop texts: where an answer ends whose end is a text, not a token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def end_of_text(tokenizer: Any, tokens: Sequence[int], new: int, texts: Sequence[str]) -> int | None:
    """Number of an answer's tokens up to the one that completes a stop text; None if none is complete.

    Stop texts need not align with tokens, so the decoded text is searched, not the ids. Only the last tokens are
    decoded: every token but a special one stands for at least one byte.

    Args:
        tokens: of the answer so far.
        new: how many of them were not searched before.
    """
    if not texts:
        return None
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
    decoded = tokenizer.decode(list(tokens), skip_special_tokens=False)
    return any(text in decoded for text in texts)


def without_end(text: str, texts: Sequence[str]) -> str:
    """An answer without its final stop text."""
    starts = [start for each in texts if (start := text.find(each)) >= 0]
    return text[: min(starts)] if starts else text
