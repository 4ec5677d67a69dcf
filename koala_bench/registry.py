"""Finding draft heads and training objectives: by installed name, by ``package.module:Class``, or by
``./file.py:Class``.

Installed names come from the entry-point groups ``koala_bench.heads`` and ``koala_bench.objectives``; bundled heads use
them like a third party's. Listing reads metadata only; modules are imported on use.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

from koala_bench.common.suggestions import did_you_mean
from koala_bench.errors import KoalaBenchError

HEADS = "koala_bench.heads"
OBJECTIVES = "koala_bench.objectives"


@cache
def installed(group: str) -> dict[str, EntryPoint]:
    """Entry points of a group by name; what every installed package says of itself is read once."""
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
            spec = importlib.util.spec_from_file_location(f"koala_bench_file_{path.stem}", path)
            if not path.is_file() or spec is None or spec.loader is None:
                raise KoalaBenchError(f"There is no file {place}.", f"Write the {what} as ./file.py:Class.")
            try:  # without running it: what a file raises while it runs is for its author to see
                compile(path.read_bytes(), place, "exec")
            except (SyntaxError, ValueError) as error:  # the latter of null bytes, in Python 3.11.2
                line, reason = getattr(error, "lineno", None) or 1, getattr(error, "msg", error)
                raise KoalaBenchError(f"{place}, line {line} is not Python: {reason}.", "Mend the file.") from error
            module = importlib.util.module_from_spec(spec)
            sys.modules[spec.name] = module  # dataclasses look their module up there
            spec.loader.exec_module(module)
        else:
            try:
                if not all(map(str.isidentifier, place.split("."))):
                    raise ModuleNotFoundError(
                        name=place
                    )  # empty or relative, which import_module() takes for our mistake
                module = importlib.import_module(place)
            except ModuleNotFoundError as error:
                if error.name != place and not place.startswith(f"{error.name}."):
                    raise KoalaBenchError(
                        f"'{place}' needs the module '{error.name}', which is not installed.", "Install it."
                    ) from error
                raise KoalaBenchError(
                    f"There is no module '{place}'.", f"Install the package of the {what}, or give ./file.py:Class."
                ) from error
        found = getattr(module, attribute, None)
        if not isinstance(found, type):
            raise KoalaBenchError(f"{place} has no class '{attribute}'.", f"Write the {what} as package.module:Class.")
        return found
    points = installed(group)
    if name not in points:
        known = f"Installed: {', '.join(sorted(points)) or 'none; run pip install -e .'}."
        raise KoalaBenchError(f"Unknown {what} '{name}'.", did_you_mean(name, points, known))
    loaded: type[Any] = points[name].load()
    return loaded


def build(group: str, name: str, first: Any, options: dict[str, Any]) -> Any:
    """Make a head (``first`` is the target's spec) or an objective with its options.

    Raises:
        KoalaBenchError: an option is not one of the class's, or has a value that the class refuses.
    """
    cls = load(group, name)
    parameters = inspect.signature(cls).parameters
    known = list(parameters)[1:]
    for option, value in options.items():
        if option not in known:
            raise KoalaBenchError(
                f"'{name}' has no option '{option}'.", did_you_mean(option, known, f"It has: {', '.join(known)}.")
            )
        if not _is_like(value, parameters[option].default):
            raise KoalaBenchError(
                f"'{name}': {option} is {value!r}, its default is {parameters[option].default!r}.",
                "Give a value of the same kind.",
            )
    try:
        return cls(first, **options)
    except (TypeError, ValueError, RuntimeError) as error:
        if not options:
            raise  # then it is a defect of the class
        given = ", ".join(f"{option}={value!r}" for option, value in options.items())
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise KoalaBenchError(f"'{name}' cannot be made with {given}: {reason[0]}", "Correct its options.") from error


def _is_like(value: Any, default: Any) -> bool:
    """Whether an option's value has the type of its default; any value fits a default that is None or missing."""
    if default is None or default is inspect.Parameter.empty:
        return True
    if isinstance(default, bool) or isinstance(value, bool):
        return isinstance(default, bool) and isinstance(value, bool)
    return isinstance(
        value,
        (int, float)
        if isinstance(default, float)
        else (list, tuple)
        if isinstance(default, (list, tuple))
        else type(default),
    )
