"""What all kernels share: where they can be used, and how they are launched."""

from __future__ import annotations

from typing import Any

import torch
import triton.language as tl

DTYPES = (torch.bfloat16, torch.float16)
_ENOUGH = 160 << 10
_EARLY = hasattr(tl.extra.cuda, "gdc_wait")


def launching(like: torch.Tensor) -> dict[str, Any]:
    """Options of a launch: whether a kernel may start before the one before it has ended, where that is (compute
    capability 9.0).

    Such a kernel waits itself before it reads or writes what others write or read: ``gdc_wait`` returns when the kernel
    before has ended and all it wrote is there. ``gdc_launch_dependents`` comes after that, so that whoever starts then
    finds all but the last kernel ended.
    """
    early = _EARLY and like.device.type == "cuda" and torch.cuda.get_device_capability(like.device)[0] >= 9
    return {"EARLY": True, "launch_pdl": True} if early else {"EARLY": False}


def cramped(like: torch.Tensor) -> bool:
    """Whether a program gets less shared memory than the sizes chosen on an H200 take, as on cards for desks; not tried
    on one.
    """
    if like.device.type != "cuda":
        return False
    return getattr(torch.cuda.get_device_properties(like.device), "shared_memory_per_block_optin", _ENOUGH) < _ENOUGH
