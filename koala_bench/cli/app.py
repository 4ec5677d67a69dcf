"""The application that the commands join, and the entry point."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import NoReturn

import typer

from koala_bench.cli.options import with_shared
from koala_bench.common.files import cannot
from koala_bench.errors import KoalaBenchError

HELP = "Benchmark and reproduce draft heads of speculative decoding."

# What a person wants; --help shows the commands by these, in this order.
START, REPRODUCE, OWN_HEAD = "Start here", "Reproduce", "Your own head"
GATE, INSPECT, EXCHANGE, MACHINE = "Gate", "Inspect", "Exchange", "This machine"

app = typer.Typer(
    add_completion=True, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode="markdown", help=HELP
)

_TOGETHER = ("distill", "states", "train", "evaluate", "reproduce")  # commands that several processes can run together
# Rounds that a thread of libgomp waits for the others before it sleeps. Its own number, 300,000, is milliseconds: two
# threads beside a busy neighbour spend most of their time waiting in turn.
_WAIT_ROUNDS = "1000"
_INTERRUPTED = 130  # typer turns Ctrl-C into this exit code
# typer brings a click of its own from some version on, and the class is public in neither by the same name.
_UsageError: type[typer.BadParameter] = typer.BadParameter.__mro__[1]


def command(panel: str, *shared: str, name: str | None = None) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Decorator that adds a command to the application.

    Args:
        panel: heading of --help that it stands under.
        shared: its fields of ``Shared``; where there are some, the command takes a ``Shared`` first.
        name: if it is not the function's.
    """

    def add(run: Callable[..., None]) -> Callable[..., None]:
        app.command(name, rich_help_panel=panel)(with_shared(run, shared))
        return run

    return add


def main() -> None:
    """Entry point: errors of the user end in one line and exit code 2."""
    # Loading weights draws a bar of its own for every tensor; ours say more.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    if "OMP_WAIT_POLICY" not in os.environ:  # read once, when torch is loaded
        os.environ.setdefault("GOMP_SPINCOUNT", _WAIT_ROUNDS)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        if sys.argv[1:2] and sys.argv[1] not in _TOGETHER:
            _refuse(
                f"{sys.argv[1]} runs in one process. Start it without a launcher; these can be launched:"
                f" {', '.join(_TOGETHER)}."
            )
        if os.environ.get("RANK", "0") != "0":  # the first one prints the result
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    try:
        # Without arguments typer shows the help; with wrong ones it would draw a box of several lines.
        code = app(standalone_mode=len(sys.argv) < 2)
    except KoalaBenchError as error:
        _refuse(str(error))
    except _UsageError as error:
        _refuse(_usage(error))
    except OSError as error:
        if error.filename is None:
            raise
        # What a command does with files says more where it can; this is for places where only a broken disk or folder
        # can fail.
        remedy = "Check the path, its permissions and the space on its disk."
        _refuse(str(cannot("use", error.filename, error, remedy)))
    else:
        if code == _INTERRUPTED:
            print("koala-bench: stopped; the same command goes on where it was.", file=sys.stderr)
        sys.exit(code)


def _refuse(complaint: str) -> NoReturn:
    print(f"koala-bench: {complaint}", file=sys.stderr)
    sys.exit(2)


def _usage(error: typer.BadParameter) -> str:
    """What is wrong with the options as typed, and where their help is."""
    message = " ".join(error.format_message().split())
    command = f" {error.ctx.info_name}" if error.ctx is not None and error.ctx.parent is not None else ""
    return f"{message}{'' if message.endswith(('.', '?')) else '.'} See koala-bench{command} --help."
