"""Exceptions of the Hugging Face hub's client and of checkpoint readers, and the first line of an error's message."""

from __future__ import annotations

from huggingface_hub.errors import HfHubHTTPError, StrictDataclassError
from safetensors import SafetensorError

# The hub's client raises the errors of httpx or httpx2, by its version, among which a refused connection is no OSError.
# Its own errors are OSErrors, and an invalid name is a ValueError.
HUB_ERRORS: tuple[type[Exception], ...] = (
    OSError,
    ValueError,
    *(each for each in HfHubHTTPError.__mro__ if each.__name__ == "HTTPError" and issubclass(each, Exception)),
)

# How transformers and what it stands on refuse a checkpoint; which of these it is depends on the family, on the damage
# and on their version.
CHECKPOINT_ERRORS: tuple[type[Exception], ...] = (
    *HUB_ERRORS, ImportError, LookupError, TypeError, AttributeError, ArithmeticError, AssertionError, RuntimeError,
    SafetensorError, StrictDataclassError,
)  # fmt: skip


def first_line(error: Exception) -> str:
    """The first line of an error's message, or its type if it has none."""
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
