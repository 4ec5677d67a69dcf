"""Interrupt a run in the middle, for tests of resuming."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest


def interrupt_at(monkeypatch: pytest.MonkeyPatch, module: ModuleType, name: str, call: int) -> None:
    """Let the ``call``-th call, counted from 1, of a module's function end as Ctrl-C does."""
    real, calls = getattr(module, name), 0

    def dies(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(module, name, dies)
