"""Acceptance length by what was asked and by position in the answer: an average hides where a head fails."""

from __future__ import annotations

from dataclasses import replace

from koala_bench.records.summaries import VANILLA, Sample, sample
from koala_bench.results.tables.rendering import NOTHING, Grid, fixed, with_interval

_ACROSS = 8  # methods side by side, for the width of a page
_FIRST = 16  # tokens; each stretch of an answer is as long as all before it


def lengths_by_category(chosen: Sample) -> Grid:
    """A row per category of question and a column per method, with intervals over its questions."""
    categories = list(dict.fromkeys(turn["category"] for turn in chosen.turns(VANILLA)))
    names = chosen.drafting
    rows = []
    for category in categories:
        turns = ([turn for turn in run.turns if turn["category"] == category] for run in chosen.runs)
        within = sample([replace(run, turns=own) for run, own in zip(chosen.runs, turns, strict=True)], names)
        found = (within.interval(within.length(name)) if name in within.totals else None for name in names)
        rows.append([category, *(with_interval(each, 2) for each in found)])
    return _grid("Category", names, rows)


def lengths_by_position(chosen: Sample) -> Grid:
    """A row per stretch of the answer and a column per method, by how many tokens stood there before the step."""
    found = []
    for name in chosen.drafting:
        sums: dict[int, list[int]] = {}
        for turn in chosen.turns(name):
            before = 0
            for accepted in turn["accepted"] or ():
                steps_tokens = sums.setdefault((before // _FIRST).bit_length(), [0, 0])
                steps_tokens[0] += 1
                steps_tokens[1] += 1 + accepted
                before += 1 + accepted
        found.append((name, sums))
    stretches = range(1 + max((stretch for _, sums in found for stretch in sums), default=0))
    starts = [_FIRST << stretch - 1 if stretch else 0 for stretch in stretches]
    rows = [
        [
            f"{start}\N{EN DASH}{max(_FIRST, 2 * start) - 1}",
            *(fixed(sums[each][1] / sums[each][0], 2) if each in sums else NOTHING for _, sums in found),
        ]
        for each, start in zip(stretches, starts, strict=True)
    ]
    return _grid("Tokens before", chosen.drafting, rows)


def in_blocks(table: Grid) -> list[Grid]:
    """The table in parts of about as many methods each, as many as fit side by side."""
    methods = len(table.headings) - 1
    size = -(-methods // max(1, -(-methods // _ACROSS)))
    parts = [[0, *range(first, min(first + size, methods + 1))] for first in range(1, methods + 1, size or 1)]
    return [
        Grid(
            [table.headings[at] for at in part],
            [[row[at] for at in part] for row in table.rows],
            [table.right[at] for at in part],
        )
        for part in parts
    ]


def _grid(of_rows: str, names: list[str], rows: list[list[str]]) -> Grid:
    return Grid([of_rows, *names], rows, [False, *[True] * len(names)])
