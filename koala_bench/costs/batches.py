"""Throughput against batch size: tokens per second of several answers at once, and the remaining speedup."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from koala_bench.common.markdown import table
from koala_bench.common.progress import progress
from koala_bench.decoding.batching import decode_batch
from koala_bench.engine.target import Target
from koala_bench.evaluation.methods import Method


@dataclass(frozen=True)
class BatchSpeed:
    """One method at one batch size.

    Attributes:
        tokens_per_s: of all answers of a batch together, prompts left out.
        speedup: over vanilla at the same batch size.
    """

    method: str
    size: int
    tokens_per_s: float
    speedup: float


def batch_speeds(
    target: Target,
    methods: Sequence[Method],
    prompts: Sequence[Sequence[int]],
    sizes: Sequence[int],
    tokens: int,
    rounds: int,
) -> list[BatchSpeed]:
    """Answer the same prompts with every method in batches of every size, all in turn.

    Args:
        methods: vanilla first; their heads have not begun to draft.
        prompts: a multiple of the largest size.
        tokens: length of every answer; end-of-sequence tokens do not end it.
    """
    spent = {(method.name, size): [0.0, 0] for method in methods for size in sizes}
    with progress("batches", (rounds + 1) * len(sizes) * len(methods), "runs") as advance:
        for turn in range(-1, rounds):  # the first warms up
            for size in sizes:
                for place in range(len(methods)):
                    method = methods[(place + turn) % len(methods)]
                    for first in range(0, len(prompts), size):
                        batch = prompts[first : first + size]
                        found = decode_batch(target, method.head, method.template, batch, tokens, ())
                        if turn >= 0:
                            total = spent[method.name, size]
                            total[0] += found.decode_s
                            total[1] += sum(len(answer) - 1 for answer in found.tokens)
                    advance(1, f"{method.name}, {size} at once")
    rates = {key: committed / seconds for key, (seconds, committed) in spent.items()}
    return [BatchSpeed(*key, rate, rate / rates[methods[0].name, key[1]]) for key, rate in rates.items()]


def in_words(speeds: Sequence[BatchSpeed]) -> str:
    """A table in Markdown: a row for each method, and for each batch size tokens a second and speedup."""
    headings = ["Method"]
    rows: dict[str, list[str]] = {}
    for size in dict.fromkeys(each.size for each in speeds):
        headings += [f"{size} at once: tokens/s", "speedup (x)"]
    for each in speeds:
        rows.setdefault(each.method, [each.method]).extend([f"{each.tokens_per_s:.0f}", f"{each.speedup:.2f}"])
    return table(headings, rows.values())
