"""What to suggest where a name is not among those that are known."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def did_you_mean(name: str, known: Iterable[str], otherwise: str) -> str:
    """``Did you mean ...?`` with up to three of the known names that are near, or ``otherwise`` where none is."""
    near = difflib.get_close_matches(name, list(dict.fromkeys(known)), n=3)
    return f"Did you mean {', '.join(near)}?" if near else otherwise
