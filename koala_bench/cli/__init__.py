"""The command line: ``koala-bench COMMAND``. Thin: options come in, one call of another room goes out.

Torch is imported inside the commands, so that --help is instant. Read ``app`` first; ``README.md`` here lists the commands.
"""

from koala_bench.cli import (
    analyse,
    audit,
    batches,
    benchmark,
    check,
    device,
    distill,
    exchange,
    newhead,
    plan,
    profile,
    results,
    runs,
    sweep,
    tools,
    tune,
)  # each adds its commands to the application
from koala_bench.cli.app import app, main

__all__ = [
    "analyse",
    "app",
    "audit",
    "batches",
    "benchmark",
    "check",
    "device",
    "distill",
    "exchange",
    "main",
    "newhead",
    "plan",
    "profile",
    "results",
    "runs",
    "sweep",
    "tools",
    "tune",
]
