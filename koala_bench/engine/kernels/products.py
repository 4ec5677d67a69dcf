"""Matrix-vector product fused with the norm before and the bias, residual and gate after it; norms and gates alone."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from koala_bench.engine.kernels.launching import launching

# Rows and columns of a weight tile, and warps; plain and gated. The fastest of those tried on an H200.
TILES = {False: (2, 1024, 4), True: (1, 1024, 4)}


@triton.jit
def _rms_norm(x, gain, out, eps, width, BLOCK: tl.constexpr, EARLY: tl.constexpr):
    row, at = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    scale = tl.load(gain + at, mask=at < width, other=0.0).to(tl.float32)
    if EARLY:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    value = tl.load(x + row * width + at, mask=at < width, other=0.0).to(tl.float32)
    value = value * tl.rsqrt(tl.sum(value * value) / width + eps) * scale
    tl.store(out + row * width + at, value.to(out.dtype.element_ty), mask=at < width)


def rms_norm(x: torch.Tensor, gain: torch.Tensor, eps: float) -> torch.Tensor:
    """Root mean square norm of x [..., width], scaled by ``gain`` [width]."""
    x, width = x.contiguous(), x.shape[-1]
    out, block = torch.empty_like(x), triton.next_power_of_2(width)
    _rms_norm[(x.numel() // width,)](
        x, gain, out, eps, width, BLOCK=block, num_warps=min(16, max(1, block // 256)), **launching(x)
    )
    return out


@triton.jit
def _row_product(
    x, weight, out, bias, residual, gain, eps, count, WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    GATED: tl.constexpr, NORM: tl.constexpr, BIAS: tl.constexpr, ADD: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    row, at = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK)
    own = row < count
    start_of = weight + row.to(tl.int64)[:, None] * WIDTH + at[None, :]
    start_of_up = start_of + count * WIDTH
    # Prefetch the first weights before waiting for the vector.
    part = tl.load(start_of, mask=own[:, None] & (at < WIDTH)[None, :], other=0.0)
    up_part = tl.load(start_of_up, mask=own[:, None] & (at < WIDTH)[None, :], other=0.0) if GATED else part
    if EARLY:
        tl.extra.cuda.gdc_wait()  # no launch_dependents: the next kernel's blocks would compete with these
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    up_total = tl.zeros((ROWS, BLOCK), tl.float32)
    squares = tl.zeros((BLOCK,), tl.float32)
    for start in tl.static_range(0, WIDTH, BLOCK):
        place = start + at
        value = tl.load(x + place, mask=place < WIDTH, other=0.0).to(tl.float32)
        if NORM:
            squares += value * value
            value *= tl.load(gain + place, mask=place < WIDTH, other=0.0).to(tl.float32)
        here, there = part, up_part
        if start + BLOCK < WIDTH:
            known = own[:, None] & (place + BLOCK < WIDTH)[None, :]
            part = tl.load(start_of + (start + BLOCK), mask=known, other=0.0)
            if GATED:
                up_part = tl.load(start_of_up + (start + BLOCK), mask=known, other=0.0)
        total += here.to(tl.float32) * value[None, :]
        if GATED:
            up_total += there.to(tl.float32) * value[None, :]
    result = tl.sum(total, 1)
    if NORM:
        scale = tl.rsqrt(tl.sum(squares) / WIDTH + eps)
        result *= scale
    if GATED:
        up = tl.sum(up_total, 1)
        if NORM:
            up *= scale
        result = result / (1 + tl.exp(-result)) * up
    if BIAS:
        result += tl.load(bias + row, mask=own, other=0.0).to(tl.float32)
    if ADD:
        result += tl.load(residual + row, mask=own, other=0.0).to(tl.float32)
    tl.store(out + row, result.to(out.dtype.element_ty), mask=own)


def row_product(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, residual: torch.Tensor | None = None,
    gain: torch.Tensor | None = None, eps: float = 0.0, gated: bool = False,
) -> torch.Tensor:  # fmt: skip
    """``weight @ norm(x) + bias + residual`` for a single row x [..., width].

    Args:
        weight: [rows, width].
        residual: [..., rows].
        gain: weight of an RMS norm of x with ``eps``; no norm if None.
        gated: SwiGLU without bias: SiLU of the first half of the outputs times the second half.

    Returns:
        [..., rows], or half of them if gated.
    """
    x, weight = x.contiguous(), weight.contiguous()
    width, count = x.shape[-1], len(weight) // 2 if gated else len(weight)
    out = torch.empty(*x.shape[:-1], count, dtype=x.dtype, device=x.device)
    rows, stretch, warps = TILES[gated]
    block = min(stretch, triton.next_power_of_2(width))
    _row_product[(triton.cdiv(count, rows),)](
        x, weight, out, weight if bias is None else bias, weight if residual is None else residual.contiguous(),
        weight if gain is None else gain, eps, count, WIDTH=width, ROWS=rows, BLOCK=block, GATED=gated,
        NORM=gain is not None, BIAS=bias is not None, ADD=residual is not None,
        num_warps=max(1, warps * block // stretch), **launching(x),
    )  # fmt: skip
    return out


def product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, residual: torch.Tensor) -> torch.Tensor:
    """``x @ weight.T + bias + residual`` for any number of rows x [..., width], by ``addmm``."""
    rows = residual if bias is None else residual + bias
    return torch.addmm(rows.reshape(-1, len(weight)), x.reshape(-1, x.shape[-1]), weight.t()).view(residual.shape)


def product_(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, residual: torch.Tensor) -> torch.Tensor:
    """``product`` in place of the residual, which saves a copy of it."""
    if bias is not None or not residual.is_contiguous():
        return product(x, weight, bias, residual)
    residual.view(-1, len(weight)).addmm_(x.reshape(-1, x.shape[-1]), weight.t())
    return residual


@triton.jit
def _gate(x, out, width, BLOCK: tl.constexpr, EARLY: tl.constexpr):
    row, at = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    if EARLY:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    gate = tl.load(x + row * 2 * width + at, mask=at < width, other=0.0).to(tl.float32)
    up = tl.load(x + row * 2 * width + width + at, mask=at < width, other=0.0).to(tl.float32)
    tl.store(out + row * width + at, (gate / (1 + tl.exp(-gate)) * up).to(out.dtype.element_ty), mask=at < width)


def gate(x: torch.Tensor) -> torch.Tensor:
    """SiLU of the first half of x [..., 2 * width] times its second half."""
    x, width = x.contiguous(), x.shape[-1] // 2
    out = torch.empty(*x.shape[:-1], width, dtype=x.dtype, device=x.device)
    _gate[(out.numel() // width, triton.cdiv(width, 1024))](x, out, width, BLOCK=1024, num_warps=4, **launching(x))
    return out
