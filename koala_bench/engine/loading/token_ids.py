"""Tokens of a tokenizer without an embedding in the model: harmless until a text has one, which is refused."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from koala_bench.errors import KoalaBenchError


def unknown_id(ids: Sequence[int], vocabulary: int) -> int | None:
    """The largest of the ids if the model has no embedding for it; else None.

    Args:
        vocabulary: number of ids that the model knows.
    """
    largest = max(ids, default=-1)
    return largest if largest >= vocabulary else None


def refuse_unknown_ids(name: str, tokenizer: Any, ids: Sequence[int], vocabulary: int, where: str) -> None:
    """Refuse token ids without an embedding, such as those of tokens added to the tokenizer only.

    Args:
        name: of the target.
        where: what holds them, for the message.

    Raises:
        KoalaBenchError: there is one.
    """
    if (found := unknown_id(ids, vocabulary)) is not None:
        token = "" if tokenizer is None else f"the token {tokenizer.convert_ids_to_tokens(found)!r} with "
        raise KoalaBenchError(
            f"{where} has {token}id {found}, and {name} knows only {vocabulary} ids.",
            "Use the tokenizer that belongs to the model or another chat template, or leave such text out.",
        )
