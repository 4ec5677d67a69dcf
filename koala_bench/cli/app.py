"""The application that the commands join, and the entry point."""

from __future__ import annotations

import os
import sys

import typer

from koala_bench.errors import KoalaBenchError

HELP = "Benchmark and reproduce draft heads of speculative decoding."

app = typer.Typer(add_completion=True, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode="markdown", help=HELP)

_INTERRUPTED = 130  # typer turns Ctrl-C into this exit code


def main() -> None:
    """Entry point: errors of the user end in one line and exit code 2."""
    # Loading weights draws a bar of its own for every tensor; ours say more.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        app()
    except KoalaBenchError as error:
        print(f"koala-bench: {error}", file=sys.stderr)
        sys.exit(2)
    except SystemExit as end:
        if end.code == _INTERRUPTED:
            print("koala-bench: stopped; the same command goes on where it was.", file=sys.stderr)
        raise
