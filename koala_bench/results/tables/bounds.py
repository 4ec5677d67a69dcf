"""Under a table: what bounds each method (its oracle and break-even length), and how deep its drafts are accepted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from koala_bench.records.bounds import Bounds, acceptance_histogram, bounds
from koala_bench.records.definitions import DepthRate, acceptance_rate_by_depth, unconditional_rate_by_depth
from koala_bench.records.statistics import Interval
from koala_bench.records.summaries import Sample
from koala_bench.results.tables.rendering import NOTHING, Grid, fixed

ORACLE = "Oracle of each method: perfect drafts of its trees at its measured cost"
ACCEPTED = "Drafts accepted per step, and by position"
LEGEND = (
    "Oracle: speedup if every draft were accepted as deep as its tree is, at the measured seconds per step; with free"
    " drafts: if drafting also took no time. Break-even length: seconds of a step / seconds of a vanilla token, so a"
    " method is faster than vanilla where its τ is larger. Jointly: share of the steps that drafted which accepted this"
    " position and all before it; given the one before: of those that accepted that and were offered this one."
)
_HEADINGS = ["Target", "Method", "τ", "Break-even length", "Oracle's τ", "Speedup (x)", "Oracle (x)"]
_FREE = ["Oracle, free drafts (x)", "Drafting (% of a step)", "Target's pass (% of a step)"]
_ACCEPTED = ["Target", "Method", "Steps", "Accepting 0 / 1 / 2 / … (%)", "Given the one before", "Jointly"]


def bounds_tables(samples: Mapping[str, Sample]) -> list[tuple[str, Grid]]:
    """Both tables with their titles, a row per method that drafts of each target, by what the table calls it."""
    oracles, accepted = [], []
    for target, chosen in samples.items():
        for name in chosen.drafting:
            if (found := bounds(chosen.pairs(name))) is None:
                continue
            where = [target, name]
            oracles.append([*where, *_cells(found)])
            turns = chosen.turns(name)
            steps = [count for turn in turns for count in turn["accepted"] or ()]
            depths = [depth for turn in turns for depth in turn["drafted_depth"] or ()]
            histogram = [fixed(100 * count / len(steps), 1) for count in acceptance_histogram(steps)]
            rates = (of(steps, depths) for of in (acceptance_rate_by_depth, unconditional_rate_by_depth))
            accepted.append([*where, f"{len(steps):,}", " / ".join(histogram), *map(_rates, rates)])
    texts = [False, False]
    headings = [*_HEADINGS, *_FREE]
    return [
        (ORACLE, Grid(headings, oracles, [*texts, *[True] * (len(headings) - 2)])),
        (ACCEPTED, Grid(_ACCEPTED, accepted, [*texts, True, False, False, False])),
    ]


def _cells(found: Bounds) -> list[str]:
    lengths = (found.acceptance_length, found.break_even, found.offered_length, found.speedup, found.oracle_speedup)
    shares = [NOTHING if each is None else fixed(100 * each, 1) for each in (found.draft_share, found.verify_share)]
    free = found.free_oracle_speedup
    return [*(fixed(each, 2) for each in lengths), NOTHING if free is None else fixed(free, 2), *shares]


def _rates(rates: Sequence[DepthRate]) -> str:
    return " / ".join(fixed(each.rate, 2) for each in rates if each.trials) or NOTHING


TRACES = (
    "Break-even length: acceptance length / speedup (of whole answers in answer files), which is what a step costs in"
    " the baseline's tokens. Oracle: as if every step were as long as the longest of the file, which says no more of"
    " how deep drafts are; at least that."
)


def trace_bounds(rows: Sequence[tuple[str, Interval | None, Interval | None, Sequence[float]]]) -> Grid:
    """What answer files say of bounds; no row where they say nothing.

    Args:
        rows: of each file its label, acceptance length, speedup, and the shares of its steps that accepted at least 1,
            2, ... drafts.
    """
    found = []
    for label, length, speedup, at_least in rows:
        if not at_least:
            continue
        exactly = [more - most for more, most in zip([1.0, *at_least], [*at_least, 0.0], strict=True)]
        histogram = " / ".join(fixed(100 * share, 1) for share in exactly)
        costs = [NOTHING, NOTHING]
        if length is not None and speedup is not None:
            break_even = length.value / speedup.value
            costs = [fixed(break_even, 2), fixed((1 + len(at_least)) / break_even, 2)]
        found.append([label, *costs, histogram])
    headings = ["File", "Break-even length", "Oracle (x)", "Accepting 0 / 1 / 2 / … (%)"]
    return Grid(headings, found, [False, True, True, False])
