"""Suggestions for a misspelt name."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def did_you_mean(name: str, known: Iterable[str], otherwise: str) -> str:
    """``Did you mean ...?`` with up to three similar known names, or ``otherwise`` if there is none."""
    near = difflib.get_close_matches(name, list(dict.fromkeys(known)), n=3)
    return f"Did you mean {', '.join(near)}?" if near else otherwise
