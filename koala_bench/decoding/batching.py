"""Several answers at once: their trees are one forest, verified in one pass, and each keeps its own accepted tokens.

All sequences share one KV cache, in which a row belongs to one of them; the mask hides the rows of the others, also of
those that have ended. That needs no padding, and costs attention over masked rows: fine for a few sequences.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from koala_bench.decoding.acceptance import GREEDY
from koala_bench.decoding.loop import capacity_for, cut
from koala_bench.decoding.stops import end_of_text
from koala_bench.engine.cache import TreeCache
from koala_bench.engine.target import Target
from koala_bench.engine.timing import synchronise
from koala_bench.errors import KoalaBenchError
from koala_bench.heads import Committed, ObservingHead, read_prompt
from koala_bench.tree import DraftTree, Template


@dataclass
class _Sequence:
    """One unfinished answer; its rows in the cache have its number as their owner."""

    number: int
    head: Any
    new: Committed
    tokens: list[int]
    length: int  # committed tokens, the prompt's included, those of which rows are in the cache
    ended: bool


@dataclass(frozen=True)
class BatchDecoded:
    """What a batch of answers took.

    Attributes:
        tokens: of each answer.
        steps: verification passes; the tokens of each answer but its first come from them.
        decode_s: seconds of all of them, prompts left out.
    """

    tokens: list[list[int]] = field(default_factory=list)
    steps: int = 0
    decode_s: float = 0.0


@torch.inference_mode()
def decode_batch(
    target: Target, head: Any, template: Template, prompts: Sequence[Sequence[int]], max_new_tokens: int,
    stop_ids: Sequence[int],
) -> BatchDecoded:  # fmt: skip
    """Answer several prompts greedily and losslessly, all of them in every pass.

    Args:
        head: one that has not begun to draft; each sequence gets a copy of it, which shares its weights.

    Raises:
        KoalaBenchError: a prompt is empty, or leaves no room for its answer in the target's context or where the
            target computes differently.
    """
    for prompt in prompts:
        if not prompt or len(prompt) + max_new_tokens > target.max_positions:
            raise KoalaBenchError(
                f"A prompt of {len(prompt)} tokens and an answer of {max_new_tokens} do not fit in a context of"
                f" {target.max_positions}.",
                "Use shorter prompts or answers.",
            )
    stops = frozenset(stop_ids)
    rows = [capacity_for(len(prompt), max_new_tokens, template.nodes, target.max_positions) for prompt in prompts]
    room = sum(rows)
    cache = target.new_cache(room, longest=max(rows))
    owners = torch.full((room,), -1, device=target.device)  # of each committed row
    sequences = [
        _begin(target, copy.copy(head), template, prompt, max_new_tokens, stops, cache, owners, number)
        for number, prompt in enumerate(prompts)
    ]
    observing = isinstance(head, ObservingHead)
    synchronise(target.device)
    started, steps = time.perf_counter(), 0
    while active := [each for each in sequences if not each.ended]:
        steps += 1
        trees: list[DraftTree] = [each.head.draft(each.new) for each in active]
        logits, hidden = _verify(target, active, trees, cache, owners)
        path_of_all: list[int] = []
        owner_of_all: list[int] = []
        first = 0
        for one, tree in zip(active, trees, strict=True):
            last = first + tree.shape.nodes
            path, committed, _ = GREEDY.accept(tree, logits[first:last])
            keep, stop = cut(committed, max_new_tokens - len(one.tokens), stops)
            one.tokens += committed[:keep]
            ended = end_of_text(target.tokenizer, one.tokens, keep, target.stop_texts)
            one.tokens = one.tokens[:ended]
            one.ended = stop is not None or ended is not None
            one.new = Committed(tree.tokens.new_tensor(committed), hidden[first:last][list(path)], one.length)
            one.length += len(path)
            if observing:
                one.head.observe(tree, logits[first:last])
            path_of_all += [first + node for node in path]
            owner_of_all += [one.number] * len(path)
            first = last
        owners[cache.past : cache.past + len(path_of_all)] = owners.new_tensor(owner_of_all)
        cache.commit(path_of_all)
    synchronise(target.device)
    return BatchDecoded([each.tokens for each in sequences], steps, time.perf_counter() - started)


def _begin(
    target: Target, head: Any, template: Template, prompt: Sequence[int], limit: int, stops: frozenset[int],
    cache: TreeCache, owners: torch.Tensor, number: int,
) -> _Sequence:  # fmt: skip
    """Read a prompt behind those of the other sequences, as a chain of its tokens."""
    ids = torch.tensor(list(prompt), device=target.device)
    count, past = len(ids), cache.past
    least = torch.finfo(target.dtype).min
    mask = torch.full((count, past + count), least, dtype=target.dtype, device=target.device)
    mask[:, past:].triu_(1)
    positions = torch.arange(count, device=target.device)[None]
    if past:
        logits, hidden = target.run(ids, mask[None, None], positions, cache, head.features)
    else:
        last, hidden = target.prefill(ids, cache, head.features)
        logits = last[None]
    owners[past : past + count] = number
    cache.past = past + count
    head.begin(template, capacity_for(count, limit, template.nodes, target.max_positions))
    bonus = int(logits[-1].argmax())
    new = read_prompt(head, Committed(torch.cat([ids[1:], ids.new_tensor([bonus])]), hidden, 0, ids[:1]))
    said = end_of_text(target.tokenizer, [bonus], 1, target.stop_texts) is not None
    return _Sequence(number, head, new, [bonus], count, said or bonus in stops or limit == 1)


def _verify(
    target: Target, active: Sequence[_Sequence], trees: Sequence[DraftTree], cache: TreeCache, owners: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """One pass over a forest: each node attends to the rows of its own sequence and to the nodes above it."""
    counts = [tree.shape.nodes for tree in trees]
    device, total, past = target.device, sum(counts), cache.past
    owner = torch.tensor([one.number for one in active], device=device).repeat_interleave(
        torch.tensor(counts, device=device)
    )
    seen = torch.zeros(total, past + total, dtype=torch.bool, device=device)
    seen[:, :past] = owners[:past] == owner[:, None]
    first = 0
    for tree in trees:
        last = first + tree.shape.nodes
        seen[first:last, past + first : past + last] = tree.shape.ancestors.to(device)
        first = last
    mask = torch.zeros(seen.shape, dtype=target.dtype, device=device).masked_fill_(~seen, torch.finfo(target.dtype).min)
    depths = [one.length + depth for one, tree in zip(active, trees, strict=True) for depth in tree.shape.depths]
    tokens = torch.cat([tree.tokens for tree in trees])
    return target.run(tokens, mask[None, None], torch.tensor([depths], device=device), cache, active[0].head.features)
