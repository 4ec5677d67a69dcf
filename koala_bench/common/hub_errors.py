"""What the client of the Hugging Face hub raises, and the first line of it."""

from __future__ import annotations

from huggingface_hub.errors import HfHubHTTPError

# What the client of huggingface_hub raises: httpx's errors or httpx2's, as its version has it, and a refused connection
# among them is no OSError. Its own are OSErrors, and a name that can be none is a ValueError.
HUB_ERRORS: tuple[type[Exception], ...] = (
    OSError, ValueError, *(base for base in HfHubHTTPError.__mro__ if base.__name__ == "HTTPError" and issubclass(base, Exception)),
)  # fmt: skip


def first_line(error: Exception) -> str:
    """What an error says first, or its kind where it says nothing."""
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
