"""Sequence length up to which tree verification is exact: sliding windows, chosen rows, rotary factors.

Tree attention assumes that every row is attended to and rotated alike, which holds up to the shortest such limit.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

# Names under which configurations keep the width of local attention.
_WINDOWS = ("sliding_window", "window_size", "attention_window_size", "attention_window", "attention_chunk_size")
_CHOSEN = ("keep_window_size",)  # and how many rows are chosen to be attended to where there are more
_LOCAL = ("sliding_attention", "local_attention", "chunked_attention", "local")


@dataclass(frozen=True)
class Limit:
    """``rows`` is the longest exact sequence; ``reason`` is the predicate of a sentence about the target."""

    rows: int
    reason: str


def limit_of(config: Any) -> Limit | None:
    """The shortest limit of a model with this text configuration, or None."""
    return min((*_windows(config), *_choices(config), *_rotations(config)), key=lambda limit: limit.rows, default=None)


def _windows(config: Any) -> Iterator[Limit]:
    kinds = getattr(config, "layer_types", None) or getattr(config, "attention_layers", None)
    if (kinds and not set(kinds) & set(_LOCAL)) or not getattr(config, "use_sliding_window", True):
        return
    for name in _WINDOWS:
        window = getattr(config, name, None)
        if isinstance(window, int) and not isinstance(window, bool) and window > 0:
            yield Limit(window, f"attends only to the last {window} tokens in some layers")


def _choices(config: Any) -> Iterator[Limit]:
    """Limit of sparse attention, which selects some of the rows: in a tree it would select among all nodes."""
    for name in _CHOSEN:
        if isinstance(rows := getattr(config, name, None), int) and rows > 0:
            yield Limit(rows, f"attends to a choice of {rows} tokens where there are more")


def _rotations(config: Any) -> Iterator[Limit]:
    """Rotary factors that depend on the sequence length, also for rows already in the cache."""
    parameters = getattr(config, "rope_parameters", None) or {}
    # One set of them, or one for each kind of layer.
    every = [parameters, *(each for each in parameters.values() if isinstance(each, dict))]
    for each in every:
        if each.get("rope_type") == "longrope":
            rows = each.get("original_max_position_embeddings") or config.original_max_position_embeddings
            yield Limit(int(rows), f"rotates by other factors in sequences of more than {rows} tokens")
