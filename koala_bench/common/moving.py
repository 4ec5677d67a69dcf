"""Moves modules to a device."""

from __future__ import annotations

import torch
from torch import nn


def moved(module: nn.Module, device: torch.device) -> nn.Module:
    """The module on a device; unchanged if it is there already, since ``plan``'s fake tensors cannot be moved."""
    tensors = (*module.parameters(), *module.buffers())
    return module if all(tensor.device == device for tensor in tensors) else module.to(device)
