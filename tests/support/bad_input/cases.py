"""A case of bad input, and the commands that many cases share; the cases are in the files beside it."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass

from tests.support.bad_input.spoiling import Around, Arrange


@dataclass(frozen=True)
class Case:
    """One mistake.

    Attributes:
        name: what is wrong.
        command: as typed in the room, which ``test_bad_input.furnished`` describes; SMALL and ASK stand for options.
        names: the bad thing, as the line has to name it.
        remedy: words of what to do about it, behind that.
        arrange: spoils the room before the command runs.
        around: holds while it runs.
    """

    name: str
    command: str
    names: str
    remedy: str
    arrange: Arrange = lambda room: None
    around: Around = nullcontext


TRAIN = "train SMALL --methods medusa --out out"
EVALUATE = "evaluate SMALL ASK --methods vanilla,medusa --tree 2x1 --heads done/heads --out out"
REPRODUCE = "reproduce table1 SMALL --methods medusa --out out"
HEAD = "done/heads/medusa/"
LONG = "x" * 300  # longer than any file's name may be
