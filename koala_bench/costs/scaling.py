"""Time of a step against context length and nodes verified, and the share of attention."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F

from koala_bench.common.markdown import table
from koala_bench.common.progress import progress
from koala_bench.engine.target import Target
from koala_bench.engine.timing import seconds_of
from koala_bench.tree import DraftTree, TreeShape


@dataclass(frozen=True)
class StepCost:
    """One verification.

    Attributes:
        context: committed tokens behind which it ran.
        nodes: of the tree, a chain; 1 is a vanilla step.
        step_s: seconds of the whole pass, median.
        attention_s: of the attention of all layers by itself, over the same keys and values, median.
    """

    context: int
    nodes: int
    step_s: float
    attention_s: float


@torch.inference_mode()
def step_costs(target: Target, contexts: Sequence[int], nodes: Sequence[int], rounds: int = 9) -> list[StepCost]:
    """Time verifications behind prefixes of one text drawn at random, all sizes in turn, ``rounds`` times."""
    draw = torch.Generator().manual_seed(0)
    longest = min(max(contexts), target.longest - max(nodes))
    places = sorted({min(context, longest) for context in contexts})
    ids = torch.randint(target.config.vocab_size, (longest,), generator=draw).to(target.device)
    cache = target.new_cache(longest + max(nodes))
    target.prefill(ids, cache)
    chains = {count: DraftTree(ids[:count].clone(), TreeShape(tuple(range(-1, count - 1)))) for count in nodes}
    steps: dict[tuple[int, int], list[float]] = {(context, count): [] for context in places for count in nodes}
    attention: dict[tuple[int, int], list[float]] = {key: [] for key in steps}
    with progress("steps", rounds + 1, "rounds") as advance:
        for turn in range(rounds + 1):  # the first warms up
            for context in places:
                cache.past = context  # the rows after it are another text's tree, which serves as well
                for count, chain in chains.items():
                    for _ in range(2):  # the second call finds the processor's cache as in decoding
                        spent = seconds_of(target.device, lambda chain=chain: target.verify(chain, cache))  # type: ignore[misc]
                    alone = seconds_of(target.device, partial(_attend, target, cache.storage, context, count))
                    if turn:
                        steps[context, count].append(spent)
                        attention[context, count].append(alone)
            advance(1)
    return [StepCost(*key, statistics.median(steps[key]), statistics.median(attention[key])) for key in steps]


def _attend(target: Target, storage: torch.Tensor, context: int, nodes: int) -> None:
    """The attention of every layer, on queries that are all zero."""
    heads = target.config.num_attention_heads
    queries = storage.new_zeros(1, heads, nodes, storage.shape[-1])
    mask = storage.new_zeros(nodes, context + nodes) if nodes > 1 else None
    for layer in storage[:, :, :, : context + nodes]:
        F.scaled_dot_product_attention(queries, layer[0:1], layer[1:2], mask, enable_gqa=heads != storage.shape[2])


def in_words(costs: Sequence[StepCost]) -> str:
    """A table in Markdown."""
    headings = ("Tokens behind", "Nodes", "Step (ms)", "Attention alone (ms)", "The rest (ms)")
    rows = []
    for each in costs:
        times = (each.step_s, each.attention_s, each.step_s - each.attention_s)
        rows.append([f"{each.context:,}", each.nodes, *(f"{1000 * seconds:.2f}" for seconds in times)])
    return table(headings, rows, left=0)
