"""In which order the methods answer a prompt: a permutation drawn for each of them.

In a rotation every method would always run behind the same one, and inherit what that one leaves in the caches of the
processor and in its clock.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence


def drawn_order(
    methods: Sequence[str], seed: int, question: int, turn: int, repeat: int, process: int = 1
) -> list[str]:
    """A permutation of the methods, which follows from the seed and the place alone: resuming changes nothing.

    The methods are sorted by the SHA-256 of ``"{seed} order {question} {turn} {repeat} {process} {method}"``.

    Args:
        process: which of several processes that make the same evaluation, from 1 on.
    """
    place = f"{seed} order {question} {turn} {repeat} {process}"
    return sorted(methods, key=lambda method: hashlib.sha256(f"{place} {method}".encode()).digest())
