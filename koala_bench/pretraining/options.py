"""How a small target is shaped and trained: defaults, overrides ``name=value``, and what does not fit together."""

from __future__ import annotations

import difflib
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from koala_bench.errors import KoalaBenchError

SHAPE = ("layers", "width", "intermediate", "attention_heads", "vocabulary", "positions")
_OPTIONS_OF_THEIR_OWN = ("layers", "steps", "seed", "rate", "unlikelihood")
_FEWEST_TOKENS, _MOST_TOKENS = 259, 1 << 16  # all bytes and three special ones; ids are kept in two bytes


@dataclass(frozen=True)
class PretrainOptions:
    """Shape of the target and how it is trained. Sizes are in tokens, layers and units."""

    layers: int = 14
    width: int = 192
    intermediate: int = 512
    attention_heads: int = 3
    vocabulary: int = 4096
    positions: int = 4096
    row_tokens: int = 256  # rows are short while the rate is stable: attention is a third of the cost at 512
    decay_row_tokens: int = 512  # and long while it falls, so that second turns lie at trained positions
    step_tokens: int = 8192
    steps: int = 2000
    warmup_steps: int = 50
    decay_fraction: float = 0.5
    matrix_rate: float = 0.02
    vector_rate: float = 3e-3
    weight_decay: float = 0.01
    rate: float = 1.0  # factor on both rates; less than one where an earlier target goes on
    unlikelihood: float = 0.0  # weight of the unlikelihood of what the target's own answers repeat
    seed: int = 0


_DEFAULTS = PretrainOptions()
SETTABLE = tuple(field.name for field in fields(PretrainOptions) if field.name not in _OPTIONS_OF_THEIR_OWN)


def with_settings(options: PretrainOptions, settings: Sequence[str]) -> PretrainOptions:
    """Options with overrides ``name=value`` in place.

    Raises:
        KoalaBenchError: no such option, no number, or sizes that do not fit together.
    """
    given: dict[str, Any] = {}
    for setting in settings:
        name, equals, text = setting.partition("=")
        if name not in SETTABLE:
            close = difflib.get_close_matches(name, SETTABLE, n=3)
            own = (
                f"It is an option of its own: --{name}."
                if name in _OPTIONS_OF_THEIR_OWN
                else f"Did you mean {', '.join(close)}?"
                if close
                else None
            )
            raise KoalaBenchError(
                f"--set {setting} is no override of the pretraining.",
                own or f"Write name=value with one of {', '.join(SETTABLE)}.",
            )
        if not equals:
            raise KoalaBenchError(f"--set {setting} has no value.", "Write name=value.")
        kind = type(getattr(_DEFAULTS, name))
        try:
            given[name] = kind(text)
        except ValueError as error:
            raise KoalaBenchError(
                f"--set {setting}: '{text}' is no {'whole ' if kind is int else ''}number.", "Write name=value."
            ) from error
    chosen = replace(options, **given)
    _check(chosen)
    return chosen


def deviations(options: dict[str, Any], without: Sequence[str] = ()) -> list[str]:
    """Overrides ``name=value`` that make these options of the usual ones; ``without`` names some that came otherwise."""
    differing = {name: options.get(name, getattr(_DEFAULTS, name)) for name in SETTABLE if name not in without}
    return [f"{name}={value}" for name, value in differing.items() if value != getattr(_DEFAULTS, name)]


def _check(options: PretrainOptions) -> None:
    values = {name: getattr(options, name) for name in SETTABLE}
    for name, value in values.items():
        least = 0 if name == "weight_decay" else None
        if not math.isfinite(value) or value < 0 or value == 0 != least:
            raise KoalaBenchError(
                f"--set {name}={value} is out of range.", f"It must be {'at least 0' if least == 0 else 'above 0'}."
            )
    if options.decay_fraction > 1:
        raise KoalaBenchError(
            f"--set decay_fraction={options.decay_fraction} is out of range.", "It is a share of the steps: at most 1."
        )
    if options.width % (2 * options.attention_heads):
        raise KoalaBenchError(
            f"A width of {options.width} cannot be shared by {options.attention_heads} attention heads.",
            "Each needs the same even number of units.",
        )
    if not _FEWEST_TOKENS <= options.vocabulary <= _MOST_TOKENS:
        raise KoalaBenchError(
            f"--set vocabulary={options.vocabulary} is out of range.",
            f"It must be {_FEWEST_TOKENS} to {_MOST_TOKENS:,}.",
        )
    longest = max(options.row_tokens, options.decay_row_tokens)
    if longest > options.positions or longest > options.step_tokens:
        raise KoalaBenchError(
            f"A row of {longest:,} tokens is longer than positions or step_tokens.",
            "Raise these, or lower row_tokens and decay_row_tokens.",
        )
