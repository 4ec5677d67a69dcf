"""The order in which the methods answer a prompt: a random permutation per prompt.

In a rotation a method would always follow the same one, and inherit its effects on processor caches and clock.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence


def drawn_order(
    methods: Sequence[str], seed: int, question: int, turn: int, repeat: int, process: int = 1
) -> list[str]:
    """A permutation of the methods that depends on the seed and the place only, so that resuming changes nothing.

    The methods are sorted by the SHA-256 of ``"{seed} order {question} {turn} {repeat} {process} {method}"``.

    Args:
        process: which of several processes that make the same evaluation, from 1 on.
    """
    place = f"{seed} order {question} {turn} {repeat} {process}"
    return sorted(methods, key=lambda method: hashlib.sha256(f"{place} {method}".encode()).digest())
