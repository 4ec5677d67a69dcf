"""What drafting needs between its products: the best candidates, and embeddings of tokens beside states."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from koala_bench.engine.kernels.launching import launching

MOST_RANKS = 32
_PART = 2048  # logits of which one program finds the best


@triton.jit
def _best_of_part(x, values, places, width, COUNT: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr):
    part, row, own = tl.program_id(0), tl.program_id(1), tl.arange(0, BLOCK)
    at = part * BLOCK + own
    if EARLY:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    value = tl.load(x + row.to(tl.int64) * width + at, mask=at < width, other=float("-inf")).to(tl.float32)
    target = (row * tl.num_programs(0) + part) * COUNT
    for rank in range(COUNT):
        best, place = tl.max(value, 0, return_indices=True, return_indices_tie_break_left=True)
        tl.store(values + target + rank, best)
        tl.store(places + target + rank, part * BLOCK + place)
        value = tl.where(own == place, float("-inf"), value)


@triton.jit
def _best_of_parts(
    values, places, best_values, best_places, count, COUNT: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr
):
    row, own = tl.program_id(0), tl.arange(0, BLOCK)
    if EARLY:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    value = tl.load(values + row * count + own, mask=own < count, other=float("-inf"))
    for rank in range(COUNT):
        best, place = tl.max(value, 0, return_indices=True, return_indices_tie_break_left=True)
        tl.store(best_values + row * COUNT + rank, best.to(best_values.dtype.element_ty))
        tl.store(best_places + row * COUNT + rank, tl.load(places + row * count + place).to(tl.int64))
        value = tl.where(own == place, float("-inf"), value)


def topk(x: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The ``count`` largest of each row of x [..., width] in falling order, of equal ones the first: values and places,
    int64, [..., count]."""
    x, width = x.contiguous(), x.shape[-1]
    rows, parts = x.numel() // width, triton.cdiv(width, _PART)
    values = torch.empty(rows, parts * count, dtype=torch.float32, device=x.device)
    places = torch.empty(rows, parts * count, dtype=torch.int32, device=x.device)
    best_values = torch.empty(*x.shape[:-1], count, dtype=x.dtype, device=x.device)
    best_places = torch.empty(*x.shape[:-1], count, dtype=torch.int64, device=x.device)
    _best_of_part[(parts, rows)](x, values, places, width, COUNT=count, BLOCK=_PART, num_warps=4, **launching(x))
    block = triton.next_power_of_2(parts * count)
    _best_of_parts[(rows,)](
        values, places, best_values, best_places, parts * count, COUNT=count, BLOCK=block, num_warps=1, **launching(x)
    )
    return best_values, best_places


@triton.jit
def _paired(
    embeddings, tokens, places, states, state_row, parents, out, WIDTH: tl.constexpr, OTHER: tl.constexpr,
    PLACED: tl.constexpr, PICKED: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    row, at = tl.program_id(0), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    if EARLY:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    place, parent = row.to(tl.int64), row.to(tl.int64)
    if PLACED:
        place = tl.load(places + row)
    if PICKED:
        parent = tl.load(parents + row)
    token = tl.load(tokens + place)
    first = tl.load(embeddings + token * WIDTH + at, mask=at < WIDTH, other=0.0)
    second = tl.load(states + parent * state_row + (at - WIDTH), mask=(at >= WIDTH) & (at < WIDTH + OTHER), other=0.0)
    tl.store(out + row * (WIDTH + OTHER) + at, tl.where(at < WIDTH, first, second), mask=at < WIDTH + OTHER)


def paired(
    embeddings: torch.Tensor,
    tokens: torch.Tensor,
    places: torch.Tensor | None,
    states: torch.Tensor,
    parents: torch.Tensor | None,
) -> torch.Tensor:
    """Embeddings of ``tokens[places]`` [rows, width] beside ``states[parents]`` [rows, other], in one tensor; all where
    no places or parents are given."""
    states = states if states.stride(-1) == 1 else states.contiguous()
    rows = len(tokens) if places is None else len(places)
    width, other = embeddings.shape[1], states.shape[1]
    out = torch.empty(rows, width + other, dtype=states.dtype, device=states.device)
    _paired[(rows, triton.cdiv(width + other, 1024))](
        embeddings.contiguous(), tokens, tokens if places is None else places, states, states.stride(0),
        tokens if parents is None else parents, out, WIDTH=width, OTHER=other, PLACED=places is not None,
        PICKED=parents is not None, BLOCK=1024, num_warps=4, **launching(states),
    )  # fmt: skip
    return out
