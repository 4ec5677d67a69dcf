"""Linear layers, attention, norms and gates of few rows in float32, as C kernels on PyTorch's tensors.

Each row gets the same bits alone and among up to 64, behind its own cache rows and behind a tree's. So a verification
gives the scores that vanilla decoding gives, and two nearly equal ones never fall the other way.
"""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F

from koala_bench.engine.processor.compiling import compiled

_MOST_QUERIES = 64  # from some number of queries on, torch's attention is faster
_SOURCES = tuple(Path(__file__).with_name(name) for name in ("products.c", "attention.c", "rows.c"))
_POINTER, _LONG, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_long, ctypes.c_int, ctypes.c_float


class _Place(ctypes.Structure):
    """Strides of a tensor [sequences, heads, rows, width]."""

    _fields_ = (("sequence", _LONG), ("head", _LONG), ("row", _LONG))


_SIGNATURES = {
    "linear": (_POINTER, _LONG, _LONG, _POINTER, _INT, _LONG, _POINTER, _POINTER, _POINTER, _INT),
    "attend": (*(_POINTER, _Place) * 5, *(_LONG,) * 6, _FLOAT, _INT),
    "rms_norm": (_POINTER, _POINTER, _FLOAT, _POINTER, _LONG, _LONG),
    "gate": (_POINTER, _POINTER, _LONG, _LONG),
}  # fmt: skip


@cache
def _library() -> ctypes.CDLL | None:
    if (library := compiled(_SOURCES)) is None:
        return None
    for name, types in _SIGNATURES.items():
        kernel = getattr(library, name)
        kernel.argtypes, kernel.restype = types, None
    return library


def available() -> bool:
    """Whether the kernels could be compiled on this machine; the functions below need it."""
    return _library() is not None


def lanes() -> int:
    """Numbers in a vector of this processor."""
    return int(_library().lanes())  # type: ignore[union-attr]


def is_half(weight: torch.Tensor) -> bool:
    """Whether each number of a float32 tensor is one of bfloat16 too, as those of most checkpoints are."""
    few = weight.flatten()[:64]
    return all(torch.equal(each.bfloat16().float(), each) for each in (few, weight))  # most others differ in the few


def in_blocks(weight: torch.Tensor) -> torch.Tensor:
    """A float32 weight [count, width] as ``linear`` reads it: blocks of outputs, [blocks, width, lanes], the last one
    filled with zeros; in bfloat16, of which there is half as much to read, where that loses nothing."""
    weight = weight.bfloat16() if is_half(weight) else weight
    size, (count, width) = lanes(), weight.shape
    whole = count // size
    found = weight.new_zeros((-(-count // size), width, size))
    found[:whole].copy_(weight[: whole * size].view(whole, size, width).transpose(1, 2))
    if whole < len(found):
        found[whole, :, : count - whole * size].copy_(weight[whole * size :].t())
    return found


def linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, other: torch.Tensor | None, count: int
) -> torch.Tensor:
    """``x @ weight.T + bias + other``, float32 [..., count].

    Args:
        x: float32 [..., width].
        weight: of ``in_blocks``, [blocks, width, lanes].
        bias: float32 [count].
        other: float32 [..., count].
    """
    x, width = x.contiguous(), x.shape[-1]
    out = x.new_empty((*x.shape[:-1], count))
    if other is not None:
        other = other.contiguous()
    _library().linear(  # type: ignore[union-attr]
        x.data_ptr(), x.numel() // width, width, weight.data_ptr(), weight.dtype == torch.bfloat16, count,
        None if bias is None else bias.data_ptr(), None if other is None else other.data_ptr(), out.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip
    return out


def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, scale: float
) -> torch.Tensor:
    """Scaled dot product attention with grouped queries, float32 [sequences, heads, rows, width]; torch's own for more
    than 64 rows, whose bits differ.

    Args:
        query: float32 [sequences, heads, rows, width]; ``width`` is a multiple of ``lanes()``.
        key, value: float32 [sequences, groups, keys, width]; ``groups`` divides ``heads``.
        mask: float32 [sequences, 1, rows, keys], added to the scores.
    """
    sequences, heads, rows, width = query.shape
    groups, keys = key.shape[1:3]
    if rows > _MOST_QUERIES:
        return F.scaled_dot_product_attention(query, key, value, mask, scale=scale, enable_gqa=heads != groups)
    query, key, value = (each if each.stride(3) == 1 else each.contiguous() for each in (query, key, value))
    mask = mask if mask is None or mask.stride(3) == 1 else mask.contiguous()
    out = query.new_empty((sequences, rows, heads, width)).transpose(1, 2)
    _library().attend(  # type: ignore[union-attr]
        *_placed(query), *_placed(key), *_placed(value), *_placed(mask), *_placed(out),
        sequences, heads, heads // groups, rows, keys, width, scale, torch.get_num_threads(),
    )  # fmt: skip
    return out


def _placed(tensor: torch.Tensor | None) -> tuple[int | None, _Place]:
    return (None, _Place()) if tensor is None else (tensor.data_ptr(), _Place(*tensor.stride()[:3]))


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """``weight * x / sqrt(mean(x ** 2) + eps)`` of float32 x [..., width], with weight [width]."""
    x, width = x.contiguous(), x.shape[-1]
    out = torch.empty_like(x)
    _library().rms_norm(  # type: ignore[union-attr]
        x.data_ptr(), weight.data_ptr(), eps, out.data_ptr(), x.numel() // width, width
    )
    return out


def gate(x: torch.Tensor) -> torch.Tensor:
    """``silu(a) * b`` of float32 [a, b] = x [..., 2 * width]; ``width`` is a multiple of ``lanes()``."""
    x, width = x.contiguous(), x.shape[-1] // 2
    out = x.new_empty((*x.shape[:-1], width))
    _library().gate(x.data_ptr(), out.data_ptr(), x.numel() // (2 * width), width)  # type: ignore[union-attr]
    return out
