"""Residual blocks that the official code makes as one module repeated: which heads of a file have equal copies.

Blocks are given as [head][block] tuples of tensors; ``behind`` says which blocks of a head they are.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

Blocks = Sequence[Sequence[tuple[torch.Tensor, ...]]]


def tied_heads(blocks: Blocks) -> list[int]:
    """Heads with several blocks that are all equal."""
    return [
        head
        for head, each in enumerate(blocks)
        if len(each) > 1
        and all(torch.equal(one, other) for block in each[1:] for one, other in zip(each[0], block, strict=True))
    ]


def note_of_import(blocks: Blocks, behind: str = "") -> list[str]:
    """What there is to say about the blocks of a file."""
    count, tied = len(blocks[0]), tied_heads(blocks)
    what = f"The {count} residual blocks{behind}"
    if count < 2:
        return []
    if len(tied) == len(blocks):
        return [f"{what} of every head are identical copies: upstream applies one block {count} times."]
    if tied:
        return [f"{what} are identical copies in heads {', '.join(map(str, tied))} and distinct in the others."]
    return [f"{what} of every head are distinct."]


def note_of_export(blocks: Blocks, behind: str = "") -> tuple[str, ...]:
    """What the official loader cannot do with these blocks."""
    count, tied = len(blocks[0]), tied_heads(blocks)
    distinct = [str(head) for head in range(len(blocks)) if head not in tied]
    if count < 2 or not distinct:
        return ()
    which = f"the distinct ones of heads {', '.join(distinct)}" if tied else f"these {count} distinct ones"
    return (f"Upstream's model applies one block {count} times{behind}: its own loader cannot use {which}.",)
