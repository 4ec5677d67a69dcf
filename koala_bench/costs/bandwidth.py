"""Memory bandwidth of a device, and the weights that a pass reads: the limit of a decoding step."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch

from koala_bench.engine.processor import kernels
from koala_bench.engine.target import Target
from koala_bench.engine.timing import seconds_of

_COPIES = 20


@dataclass(frozen=True)
class Bandwidth:
    """Measured memory bandwidth of a device, in bytes per second.

    Attributes:
        copied: read and written in a copy, both counted.
        read: read in a sum.
    """

    copied: float
    read: float

    @property
    def most(self) -> float:
        """The higher of both, the limit that decoding is compared with: it reads far more than it writes."""
        return max(self.copied, self.read)


def bandwidth(device: torch.device, size: int) -> Bandwidth:
    """Copy and sum up ``size`` bytes, several times; the medians."""
    source = torch.ones(size // 4, device=device)
    target = torch.empty_like(source)

    def rate(moved: int, run: Callable[[], object]) -> float:
        return moved / statistics.median([seconds_of(device, run) for _ in range(_COPIES + 2)][2:])

    return Bandwidth(rate(2 * size, lambda: target.copy_(source)), rate(size, source.sum))


def bandwidth_of(device: torch.device) -> Bandwidth:
    """``bandwidth`` with more bytes than the device's caches hold."""
    return bandwidth(device, 1 << (30 if device.type == "cuda" else 27))


def weight_bytes(target: Target) -> int:
    """Bytes of the weights that a pass reads at least: of an input embedding that is not the output layer too, only a
    few rows; of float32 weights that are bfloat16 numbers, what the processor's kernels keep of them."""
    embedding, output = target.model.get_input_embeddings().weight, target.model.get_output_embeddings().weight
    shrinks = target.engine == "graph" and (target.device.type, target.dtype) == ("cpu", torch.float32)
    shrinks = shrinks and kernels.available()
    return sum(
        weight.numel() * (2 if shrinks and weight.ndim == 2 and kernels.is_half(weight) else target.dtype.itemsize)
        for weight in target.model.parameters()
        if weight is not embedding or embedding is output
    )
