"""Tree attention: rotary embedding, KV cache write, and attention over the rows in use, not all that are allocated."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from koala_bench.engine.kernels.launching import cramped, launching

WIDTHS = (16, 32, 64, 128, 256)  # of heads
# By rows of a query tile: cache rows of each split of a head, rows of a key tile, warps, stages.
_SHARES = {16: (128, 128, 4, 1), 32: (512, 64, 4, 3), 64: (512, 64, 4, 3)}
_HEADS = 8  # rotated by one program
_ROW = 128  # cache rows of each split of a head, for a single query


@triton.jit
def _rotate(
    x, x_head, x_row, v, v_head, v_row, cosine, cosine_row, sine, sine_row, numbers, queries, keys, key_head, key_row,
    values, value_head, value_row, heads, kv_heads, shift, WIDTH: tl.constexpr, HEADS: tl.constexpr,
    SIGNED: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    row, part, at = tl.program_id(0), tl.program_id(1), tl.arange(0, WIDTH)[None, :]
    turning = tl.cdiv(heads + kv_heads, HEADS)  # parts that are turned; the others are copied
    if EARLY:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    number = tl.load(numbers + row)
    if part < turning:
        head = (part * HEADS + tl.arange(0, HEADS))[:, None]
        there = head < heads + kv_heads
        value = tl.load(x + head * x_head + row * x_row + at, mask=there, other=0.0)
        other = tl.load(x + head * x_head + row * x_row + (at + WIDTH - shift) % WIDTH, mask=there, other=0.0)
        straight = value.to(tl.float32) * tl.load(cosine + row * cosine_row + at).to(tl.float32)
        straight = straight.to(value.dtype).to(tl.float32)  # as two operations round it
        sign = tl.load(sine + row * sine_row + at).to(tl.float32)
        if not SIGNED:
            sign = tl.where(at < WIDTH // 2, -sign, sign)
        turned = (straight + other.to(tl.float32) * sign).to(value.dtype)
        tl.store(queries + (row * heads + head) * WIDTH + at, turned, mask=head < heads)
        tl.store(keys + (head - heads) * key_head + number * key_row + at, turned, mask=(head >= heads) & there)
    else:
        head = ((part - turning) * HEADS + tl.arange(0, HEADS))[:, None]
        tl.store(
            values + head * value_head + number * value_row + at,
            tl.load(v + head * v_head + row * v_row + at, mask=head < kv_heads),
            mask=head < kv_heads,
        )


def rotate(
    x: torch.Tensor, v: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor, signed: bool, shift: int,
    numbers: torch.Tensor, keys: torch.Tensor, values: torch.Tensor,
) -> torch.Tensor:  # fmt: skip
    """Apply the rotary embedding to queries and keys, and write keys and values to the KV cache.

    Args:
        x: [1, heads + kv_heads, rows, head_dim], queries and behind them keys.
        v: [1, kv_heads, rows, head_dim].
        cosine, sine: [..., rows or 1, head_dim]; x becomes ``x * cosine + roll(x, shift) * sine``.
        signed: whether the sines of the first half are negated already.
        numbers: rows of ``keys`` and ``values`` [1, kv_heads, capacity, head_dim] to write, int64 [rows].

    Returns:
        the queries [1, heads, rows, head_dim], row by row in memory.
    """
    x, v, cosine, sine = (each if each.stride(-1) == 1 else each.contiguous() for each in (x, v, cosine, sine))
    kv_heads, rows, width = keys.shape[1], x.shape[2], x.shape[3]
    heads = x.shape[1] - kv_heads
    queries = torch.empty(1, rows, heads, width, dtype=x.dtype, device=x.device)
    turn, sign = (0 if each.shape[-2] == 1 else each.stride(-2) for each in (cosine, sine))
    parts = triton.cdiv(heads + kv_heads, _HEADS) + triton.cdiv(kv_heads, _HEADS)
    _rotate[(rows, parts)](
        x, x.stride(1), x.stride(2), v, v.stride(1), v.stride(2), cosine, turn, sine, sign, numbers, queries,
        keys, keys.stride(1), keys.stride(2), values, values.stride(1), values.stride(2), heads, kv_heads, shift,
        WIDTH=width, HEADS=_HEADS, SIGNED=signed, num_warps=4, **launching(x),
    )  # fmt: skip
    return queries.transpose(1, 2)


@triton.jit
def _attend(
    q, q_head, q_row, keys, key_head, key_row, values, value_head, value_row, tree_mask, mask_row, past, out, high,
    mass, rows, columns, heads, scale, GROUP: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr, SPLITS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    head, split = tl.program_id(0), tl.program_id(2)
    row, at, each = tl.program_id(1) * ROWS + tl.arange(0, ROWS), tl.arange(0, WIDTH), tl.arange(0, BLOCK)
    keys += head // GROUP * key_head
    values += head // GROUP * value_head
    if EARLY:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    committed = tl.load(past).to(tl.int32)
    every = committed + columns
    length = tl.cdiv(tl.cdiv(every, SPLITS), BLOCK) * BLOCK
    query = tl.load(q + head * q_head + row[:, None] * q_row + at[None, :], mask=row[:, None] < rows, other=0.0)
    best = tl.full((ROWS,), float("-inf"), tl.float32)
    sums = tl.zeros((ROWS,), tl.float32)
    found = tl.zeros((ROWS, WIDTH), tl.float32)
    first, last = split * length, tl.minimum((split + 1) * length, every)
    plain = tl.maximum(first, first + (tl.minimum(last, committed) - first) // BLOCK * BLOCK)  # up to there all see all
    for start in range(first, plain, BLOCK):
        key = tl.load(keys + (start + each)[None, :] * key_row + at[:, None])
        value = tl.load(values + (start + each)[:, None] * value_row + at[None, :])
        score = tl.dot(query, key) * scale
        higher = tl.maximum(best, tl.max(score, 1))
        weight = tl.exp(score - higher[:, None])
        fade = tl.exp(best - higher)
        sums = sums * fade + tl.sum(weight, 1)
        found = found * fade[:, None] + tl.dot(weight.to(value.dtype), value)
        best = higher
    for start in range(plain, last, BLOCK):
        place = start + each
        there = place < last
        key = tl.load(keys + place[None, :] * key_row + at[:, None], mask=there[None, :], other=0.0)
        value = tl.load(values + place[:, None] * value_row + at[None, :], mask=there[:, None], other=0.0)
        drafted = (row[:, None] < rows) & (there & (place >= committed))[None, :]
        masked = tl.load(tree_mask + row[:, None] * mask_row + (place - committed)[None, :], mask=drafted, other=0)
        score = tl.where(there[None, :] & (masked == 0), tl.dot(query, key) * scale, float("-inf"))
        higher = tl.maximum(best, tl.max(score, 1))
        base = tl.where(higher == float("-inf"), 0.0, higher)
        weight = tl.exp(score - base[:, None])
        fade = tl.exp(best - base)
        sums = sums * fade + tl.sum(weight, 1)
        found = found * fade[:, None] + tl.dot(weight.to(value.dtype), value)
        best = higher
    target = (split * rows + row) * heads + head
    if SPLITS == 1:
        result = (found / sums[:, None]).to(out.dtype.element_ty)
        tl.store(out + target[:, None] * WIDTH + at[None, :], result, mask=row[:, None] < rows)
    else:
        tl.store(out + target[:, None] * WIDTH + at[None, :], found, mask=row[:, None] < rows)
        tl.store(high + target, best, mask=row < rows)
        tl.store(mass + target, sums, mask=row < rows)


@triton.jit
def _gather(found, high, mass, out, count, WIDTH: tl.constexpr, SPLITS: tl.constexpr, EARLY: tl.constexpr):
    place, at, split = tl.program_id(0), tl.arange(0, WIDTH), tl.arange(0, SPLITS)
    if EARLY:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    best = tl.load(high + split * count + place)
    weight = tl.exp(best - tl.max(best, 0))
    parts = tl.load(found + (split[:, None] * count + place) * WIDTH + at[None, :])
    whole = tl.sum(weight * tl.load(mass + split * count + place), 0)
    tl.store(out + place * WIDTH + at, (tl.sum(parts * weight[:, None], 0) / whole).to(out.dtype.element_ty))


def attend(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    tree_mask: torch.Tensor,
    past: torch.Tensor,
    scale: float | None = None,
) -> torch.Tensor:
    """Attention of a tree's nodes to all committed rows and to those drafted rows that the tree mask leaves.

    Args:
        q: [1, heads, rows, head_dim].
        keys, values: [1, kv_heads, capacity, head_dim]; heads is a multiple of kv_heads.
        tree_mask: bool [rows, columns], True where a node must not attend; column 0 is the first row after the
            committed ones.
        past: number of committed rows, int64 [].
        scale: of the products; ``head_dim ** -0.5`` if None.

    Returns:
        [1, heads, rows, head_dim], row by row in memory.
    """
    heads, rows, width = q.shape[1:]
    most = 16 if rows <= 16 else 32 if rows <= 32 else 64
    split, block, warps, stages = _SHARES[most]
    if cramped(q):
        block, stages = min(block, 64), 1
    splits = triton.next_power_of_2(triton.cdiv(keys.shape[2], split))
    out = torch.empty(1, rows, heads, width, dtype=q.dtype, device=q.device)
    found, high, mass = out, out, out
    if splits > 1:
        found = q.new_empty(splits, rows, heads, width, dtype=torch.float32)
        high, mass = q.new_empty(2, splits, rows, heads, dtype=torch.float32)
    tree_mask = tree_mask.contiguous().view(torch.uint8)
    _attend[(heads, triton.cdiv(rows, most), splits)](
        q, q.stride(1), q.stride(2), keys, keys.stride(1), keys.stride(2), values, values.stride(1), values.stride(2),
        tree_mask, tree_mask.stride(0), past, found, high, mass, rows, tree_mask.shape[1], heads,
        width**-0.5 if scale is None else scale, GROUP=heads // keys.shape[1], WIDTH=width, ROWS=most,
        BLOCK=block if width <= 128 else 32, SPLITS=splits, num_warps=warps, num_stages=stages, **launching(q),
    )  # fmt: skip
    if splits > 1:
        _gather[(rows * heads,)](
            found, high, mass, out, rows * heads, WIDTH=width, SPLITS=splits, num_warps=1, **launching(q)
        )
    return out.transpose(1, 2)


@triton.jit
def _attend_row(
    x, x_head, v, v_head, cosine, sine, numbers, keys, key_head, key_row, values, value_head, value_row, tree_mask,
    past, out, found, high, mass, arrived, columns, heads, shift, scale, GROUP: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK: tl.constexpr, SPLITS: tl.constexpr, SIGNED: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    head, split, at, each = tl.program_id(0), tl.program_id(1), tl.arange(0, WIDTH), tl.arange(0, BLOCK)
    own = head // GROUP
    keys += own * key_head
    values += own * value_head
    if EARLY:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    committed = tl.load(past).to(tl.int32)
    number = tl.load(numbers).to(tl.int32)
    every = committed + columns
    parts = tl.cdiv(every, BLOCK)
    if split < parts:
        place = split * BLOCK + each
        there = (place < every) & (place != number)
        key = tl.load(keys + place[:, None] * key_row + at[None, :], mask=there[:, None], other=0.0).to(tl.float32)
        value = tl.load(values + place[:, None] * value_row + at[None, :], mask=there[:, None], other=0.0)
        value = value.to(tl.float32)
        masked = tl.load(tree_mask + (place - committed), mask=there & (place >= committed), other=0)
        turn, sign = tl.load(cosine + at).to(tl.float32), tl.load(sine + at).to(tl.float32)
        other = (at + WIDTH - shift) % WIDTH
        if not SIGNED:
            sign = tl.where(at < WIDTH // 2, -sign, sign)
        query = tl.load(x + head * x_head + at)
        straight = (query.to(tl.float32) * turn).to(query.dtype).to(tl.float32)  # as two operations round it
        turned = (straight + tl.load(x + head * x_head + other).to(tl.float32) * sign).to(query.dtype)
        turned = turned.to(tl.float32) * scale
        score = tl.where(there & (masked == 0), tl.sum(key * turned[None, :], 1), float("-inf"))
        best, last, new = tl.max(score, 0), float("-inf"), tl.zeros((WIDTH,), tl.float32)
        if split == number // BLOCK:
            made = tl.load(x + (heads + own) * x_head + at)
            straight = (made.to(tl.float32) * turn).to(made.dtype).to(tl.float32)
            made = (straight + tl.load(x + (heads + own) * x_head + other).to(tl.float32) * sign).to(made.dtype)
            given = tl.load(v + own * v_head + at)
            if head % GROUP == 0:
                tl.store(keys + number * key_row + at, made)
                tl.store(values + number * value_row + at, given)
            if tl.load(tree_mask + (number - committed)) == 0:
                last = tl.sum(made.to(tl.float32) * turned, 0)
            new = given.to(tl.float32)
            best = tl.maximum(best, last)
        base = tl.where(best == float("-inf"), 0.0, best)
        weight, extra = tl.exp(score - base), tl.exp(last - base)
        sums = tl.sum(weight, 0) + extra
        result = tl.sum(value * weight[:, None], 0) + new * extra
        target = split * heads + head
        if parts == 1:
            tl.store(out + head * WIDTH + at, (result / sums).to(out.dtype.element_ty))
        else:
            tl.store(found + target * WIDTH + at, result)
            tl.store(high + target, best)
            tl.store(mass + target, sums)
            tl.debug_barrier()  # all threads of this program have written before it is counted
            if tl.atomic_add(arrived + head, 1, sem="acq_rel") == parts - 1:  # the last one puts the parts together
                tl.store(arrived + head, 0)
                part = tl.arange(0, SPLITS)
                present = part < parts
                highs = tl.load(high + part * heads + head, mask=present, other=float("-inf"), cache_modifier=".cg")
                weights = tl.exp(highs - tl.max(highs, 0))
                masses = tl.load(mass + part * heads + head, mask=present, other=0.0, cache_modifier=".cg")
                own_part = found + (part * heads + head)[:, None] * WIDTH + at[None, :]
                whole = tl.load(own_part, mask=present[:, None], other=0.0, cache_modifier=".cg")
                total = tl.sum(whole * weights[:, None], 0) / tl.sum(weights * masses, 0)
                tl.store(out + head * WIDTH + at, total.to(out.dtype.element_ty))


def attend_row(
    x: torch.Tensor, v: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor, signed: bool, shift: int,
    numbers: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, tree_mask: torch.Tensor, past: torch.Tensor,
    scale: float | None, arrived: torch.Tensor,
) -> torch.Tensor:  # fmt: skip
    """``rotate`` and ``attend`` fused for a single row.

    Args:
        arrived: zeros, int32 [heads], and zeros again afterwards; for one call at a time.
        others: as there, with one row.
    """
    x, v, cosine, sine = (each if each.stride(-1) == 1 else each.contiguous() for each in (x, v, cosine, sine))
    width, kv_heads = x.shape[3], keys.shape[1]
    heads = x.shape[1] - kv_heads
    splits = triton.next_power_of_2(triton.cdiv(keys.shape[2], _ROW))
    out = torch.empty(1, 1, heads, width, dtype=x.dtype, device=x.device)
    found = torch.empty(splits, heads, width, dtype=torch.float32, device=x.device)
    high, mass = torch.empty(2, splits, heads, dtype=torch.float32, device=x.device)
    _attend_row[(heads, splits)](
        x, x.stride(1), v, v.stride(1), cosine, sine, numbers, keys, keys.stride(1), keys.stride(2), values,
        values.stride(1), values.stride(2), tree_mask.contiguous().view(torch.uint8), past, out, found, high, mass,
        arrived, tree_mask.shape[1], heads, shift, width**-0.5 if scale is None else scale, GROUP=heads // kv_heads,
        WIDTH=width, BLOCK=_ROW, SPLITS=splits, SIGNED=signed, num_warps=8, **launching(x),
    )  # fmt: skip
    return out.transpose(1, 2)
