"""The command line: ``koala-bench COMMAND``.

In: what a user types. Out: one call into the rooms below, and exit code 0, 1 (a verdict) or 2 (bad input, one line).
Read ``options`` first: the options that commands share. The other files hold the commands by what a person wants, as
``--help`` groups them. Torch is imported inside the commands, so that ``--help`` is instant. ``README.md`` lists
the commands.
"""

from koala_bench.cli.app import app, main

# Each adds its commands; --help shows them in this order.
from koala_bench.cli import reproduce, own_head, gate, data, pretrain, inspect, exchange, machine  # isort: skip

__all__ = ["app", "data", "exchange", "gate", "inspect", "machine", "main", "own_head", "pretrain", "reproduce"]
