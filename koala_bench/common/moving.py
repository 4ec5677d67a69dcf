"""Moving modules to a device, if they are not there yet."""

from __future__ import annotations

import torch
from torch import nn


def moved(module: nn.Module, device: torch.device) -> nn.Module:
    """The module on a device. One that is there stays untouched: fake tensors, which ``plan`` counts, cannot be moved."""
    tensors = (*module.parameters(), *module.buffers())
    return module if all(tensor.device == device for tensor in tensors) else module.to(device)
