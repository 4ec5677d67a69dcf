"""Files that ship with the project: presets, questions, targets, and the recipes of ``reproduce/``."""

from __future__ import annotations

from pathlib import Path

from koala_bench.errors import KoalaBenchError

PACKAGE = Path(__file__).parents[1]
_CHECKOUT = PACKAGE.parent / "reproduce"
# A wheel carries the recipes inside of the package; see the package-dir table of pyproject.toml.
RECIPES = _CHECKOUT if (_CHECKOUT / "paper.toml").is_file() else PACKAGE / "reproduce"


def shipped_heads(preset: str) -> Path:
    """The folder of the trained heads that ship for a preset's target.

    Raises:
        KoalaBenchError: none ship for it.
    """
    folder = PACKAGE / "targets" / preset / "heads"
    if not folder.is_dir():
        others = ", ".join(sorted(path.parent.name for path in (PACKAGE / "targets").glob("*/heads")))
        raise KoalaBenchError(
            f"No trained heads ship for the preset '{preset}'.",
            f"Train them, or use --preset {others or 'of another'}.",
        )
    return folder
