"""Finding draft heads and training objectives: by installed name, by ``package.module:Class``, or by ``./file.py:Class``.

Installed names come from the entry-point groups ``koala_bench.heads`` and ``koala_bench.objectives``; the bundled ones use
them like anyone's. Listing reads metadata only, nothing is imported until it is asked for.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import inspect
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

from koala_bench.errors import KoalaBenchError

HEADS = "koala_bench.heads"
OBJECTIVES = "koala_bench.objectives"


def installed(group: str) -> dict[str, EntryPoint]:
    """Entry points of a group by name."""
    return {point.name: point for point in entry_points(group=group)}


def load(group: str, name: str) -> type[Any]:
    """Import one head or objective.

    Raises:
        KoalaBenchError: nothing has that name, or the module has no such class.
    """
    what = "head" if group == HEADS else "objective"
    if ":" in name:
        place, _, attribute = name.rpartition(":")
        if place.endswith(".py"):
            path = Path(place)
            spec = importlib.util.spec_from_file_location(path.stem, path)
            if not path.is_file() or spec is None or spec.loader is None:
                raise KoalaBenchError(f"There is no file {place}.", f"Write the {what} as ./file.py:Class.")
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        else:
            try:
                module = importlib.import_module(place)
            except ModuleNotFoundError as error:
                raise KoalaBenchError(f"There is no module '{place}'.", f"Install the package of the {what}, or give ./file.py:Class.") from error
        if not hasattr(module, attribute):
            raise KoalaBenchError(f"{place} has no class '{attribute}'.", f"Write the {what} as package.module:Class.")
        found: type[Any] = getattr(module, attribute)
        return found
    points = installed(group)
    if name not in points:
        close = difflib.get_close_matches(name, points, n=3)
        hint = f"Did you mean {', '.join(close)}?" if close else f"Installed: {', '.join(sorted(points)) or 'none; run pip install -e .'}."
        raise KoalaBenchError(f"Unknown {what} '{name}'.", hint)
    loaded: type[Any] = points[name].load()
    return loaded


def build(group: str, name: str, first: Any, options: dict[str, Any]) -> Any:
    """Make a head (``first`` is the target's spec) or an objective with its options.

    Raises:
        KoalaBenchError: an option is not one of the class's.
    """
    cls = load(group, name)
    known = list(inspect.signature(cls).parameters)[1:]
    for option in options:
        if option not in known:
            close = difflib.get_close_matches(option, known, n=1)
            raise KoalaBenchError(f"'{name}' has no option '{option}'.", f"Did you mean {close[0]}?" if close else f"It has: {', '.join(known)}.")
    return cls(first, **options)
