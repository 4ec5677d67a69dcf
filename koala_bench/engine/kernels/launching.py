"""Launch options of all kernels: programmatic dependent launch and shared memory."""

from __future__ import annotations

from typing import Any

import torch
import triton.language as tl

DTYPES = (torch.bfloat16, torch.float16)
_SHARED_MEMORY = 160 << 10
_EARLY = hasattr(tl.extra.cuda, "gdc_wait")


def launching(like: torch.Tensor) -> dict[str, Any]:
    """Launch options: programmatic dependent launch from compute capability 9.0, where a kernel may start before the
    previous one has ended.

    The kernel itself calls ``gdc_wait`` before it touches shared data; that returns when the previous kernel has ended
    and its writes are visible. ``gdc_launch_dependents`` comes after it, so that at most one earlier kernel still runs.
    """
    early = _EARLY and like.device.type == "cuda" and torch.cuda.get_device_capability(like.device)[0] >= 9
    return {"EARLY": True, "launch_pdl": True} if early else {"EARLY": False}


def cramped(like: torch.Tensor) -> bool:
    """Whether a block has less shared memory than the tile sizes chosen on an H200 need, as on consumer cards; not
    tried on one."""
    if like.device.type != "cuda":
        return False
    return (
        getattr(torch.cuda.get_device_properties(like.device), "shared_memory_per_block_optin", _SHARED_MEMORY)
        < _SHARED_MEMORY
    )
