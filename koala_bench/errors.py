"""The one error type that a user sees: what is wrong, and what to do about it."""

from __future__ import annotations


class KoalaBenchError(Exception):
    """A mistake in the input or the environment, for which there is a remedy.

    The command line prints ``message`` and ``remedy`` on one line and exits with status 2.
    Programming errors are left to Python's own exceptions, so that a traceback always means
    a defect of ours.
    """

    def __init__(self, message: str, remedy: str) -> None:
        # Names of files and other people's messages may hold line breaks; what we say is one line.
        self.message = " ".join(message.splitlines())
        if remedy and self.message[-1:] not in ("", *".:!?"):
            self.message += "."
        self.remedy = " ".join(remedy.splitlines())
        super().__init__(f"{self.message} {self.remedy}".strip())

    def __reduce__(self) -> tuple[type[KoalaBenchError], tuple[str, str]]:
        """So that it comes out of another process as it went in."""
        return type(self), (self.message, self.remedy)
