"""Processes forked from this one, which has loaded everything: some to be killed at work, some to work together."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from typing import Any

import torch
from accelerate.state import AcceleratorState, GradientState

from koala_bench.training import held_out

# A process with a CUDA context cannot be forked; there each one loads everything again.
CONTEXT = multiprocessing.get_context("spawn" if torch.cuda.is_available() else "fork")


def command(*arguments: str) -> None:
    """Run the entry point in this process, as a shell would; for the functions below."""
    from koala_bench.cli import main

    sys.argv = ["koala-bench", *arguments]
    main()


def killed(ready: Callable[[], bool], function: Callable[..., Any], *arguments: Any) -> bool:
    """Run a function in a process of its own and kill it once it is ``ready``; whether that was before its end."""
    process = _started({}, function, *arguments)
    while process.is_alive() and not ready():
        time.sleep(0.005)
    process.kill()
    process.join()
    assert process.exitcode in (0, -signal.SIGKILL)
    return process.exitcode != 0


def alone(function: Callable[..., Any], *arguments: Any) -> int | None:
    """Run a function in a process of its own; its exit code."""
    process = _started({}, function, *arguments)
    process.join()
    return process.exitcode


def together(count: int, function: Callable[..., Any], *arguments: Any) -> list[int | None]:
    """Run a function in processes that find each other as those of ``torchrun`` do; their exit codes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    sizes = {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    processes = [
        _started({**place, **sizes, "RANK": str(rank), "LOCAL_RANK": str(rank)}, function, *arguments)
        for rank in range(count)
    ]
    for process in processes:
        process.join()
    return [process.exitcode for process in processes]


def _started(environment: dict[str, str], function: Callable[..., Any], *arguments: Any) -> BaseProcess:
    known = (environment, held_out.ANSWER_TOKENS, function, arguments)
    process = CONTEXT.Process(target=_run, args=known, daemon=True)
    process.start()
    return process


def _run(
    environment: dict[str, str], answer_tokens: int, function: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    os.environ.update(environment)
    torch.set_num_threads(1)
    held_out.ANSWER_TOKENS = answer_tokens
    # What accelerate found out about the process that this one was forked from.
    GradientState._reset_state()
    AcceleratorState._reset_state(reset_partial_state=True)
    function(*arguments)
