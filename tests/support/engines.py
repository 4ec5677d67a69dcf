"""The same tiny target with either engine, to hold what is recorded against what the models compute."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from koala_bench.engine.loading.targets import load_target
from koala_bench.engine.target import Target
from koala_bench.testing import save_tiny_target


def pair(
    folder: Path,
    config: Any = None,
    attention: str = "sdpa",
    device: str = "cpu",
    dtype: str = "float64",
    fixed: bool = False,
) -> tuple[Target, Target]:
    """A target called as it is, and one with recorded passes: of any size, or of ``fixed`` shapes as on a GPU."""
    save_tiny_target(folder, config)
    eager, graph = (
        load_target(str(folder), device, dtype, attention=attention, engine=engine) for engine in ("eager", "graph")
    )
    return eager, replace(graph, fixed=True) if fixed else graph
