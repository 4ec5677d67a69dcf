"""Files that ship with the project: presets, questions, targets, and the recipes of ``reproduce/``."""

from __future__ import annotations

from pathlib import Path

PACKAGE = Path(__file__).parents[1]
_CHECKOUT = PACKAGE.parent / "reproduce"
# A wheel carries the recipes inside of the package; see the package-dir table of pyproject.toml.
RECIPES = _CHECKOUT if (_CHECKOUT / "paper.toml").is_file() else PACKAGE / "reproduce"
