"""What the client of the Hugging Face hub and the readers of checkpoints raise, and the first line of it."""

from __future__ import annotations

from huggingface_hub.errors import HfHubHTTPError, StrictDataclassError
from safetensors import SafetensorError

# What the client of huggingface_hub raises: httpx's errors or httpx2's, as its version has it, and a refused connection
# among them is no OSError. Its own are OSErrors, and a name that can be none is a ValueError.
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
    """What an error says first, or its kind where it says nothing."""
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
