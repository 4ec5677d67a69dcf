"""A run in numbers: one summary per method, with intervals, differences from vanilla and changes by KOALA.

All methods of a run are compared on the same turns: those that every one of them finished.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from koala_bench import statistics
from koala_bench.definitions import DepthRate, acceptance_rate_by_depth
from koala_bench.errors import KoalaBenchError
from koala_bench.records import Run
from koala_bench.schema import MethodInfo, TurnLine
from koala_bench.statistics import Interval

VANILLA = "vanilla"
_KOALA = "+koala"


@dataclass(frozen=True)
class Difference:
    """A lossless method's answer that is not vanilla's: where, and how close the target's two best tokens were.

    A token is None where that answer had ended; the gap is None if the record has none.
    """

    question_id: int
    turn: int
    repeat: int
    position: int
    token: int | None
    vanilla_token: int | None
    top2_gap: float | None


@dataclass(frozen=True)
class Summary:
    """One method of one run in numbers; NaN or None stands for what the record does not hold.

    Attributes:
        original: the method that the changes are against, if there is one.
        turns: turn lines, failed ones included.
        counted: turns that the numbers are from; the same for all methods of the run.
        compared, differing: answers compared with vanilla's, and those that differ.
        change_x, change_percent, length_change: against the original head, of the speedup in x and in percent, and
            of the acceptance length in tokens per step.
    """

    target: str
    method: MethodInfo
    original: str | None
    turns: int
    failed: tuple[TurnLine, ...]
    counted: int
    questions: int
    compared: int
    differing: tuple[Difference, ...]
    tokens_per_s: float
    speedup: Interval
    speedup_of_means: float
    mean_of_speedups: float
    acceptance_length: Interval
    depths: tuple[DepthRate, ...]
    draft_overhead: float | None
    change_x: Interval | None
    change_percent: Interval | None
    length_change: Interval | None

    @property
    def name(self) -> str:
        """The method's name."""
        return self.method["name"]

    @property
    def is_koala(self) -> bool:
        """Whether the row is one that KOALA's claims are about."""
        return self.name.endswith(_KOALA)


_Place = tuple[int, int, int]  # question_id, turn, repeat


def _place(turn: TurnLine) -> _Place:
    return turn["question_id"], turn["turn"], turn["repeat"]


def _original(method: MethodInfo, names: Sequence[str]) -> str | None:
    name = method["name"].removesuffix(_KOALA) if method["name"].endswith(_KOALA) else method["head"]
    return name if name in names and name != method["name"] else None


def first_difference(turn: TurnLine, vanilla: TurnLine) -> Difference | None:
    """Compare the tokens themselves; what the run said about the place is only used for the logits."""
    ids, base = turn["new_token_ids"] or [], vanilla["new_token_ids"] or []
    if ids == base:
        return None
    position = next((i for i, (a, b) in enumerate(zip(ids, base, strict=False)) if a != b), min(len(ids), len(base)))
    said = turn["first_difference"]
    gap = said["top2_gap"] if said is not None and said["position"] == position else None
    token, vanilla_token = (tokens[position] if position < len(tokens) else None for tokens in (ids, base))
    return Difference(*_place(turn), position, token, vanilla_token, gap)


def summarise(run: Run, methods: Sequence[str] | None = None) -> list[Summary]:
    """The numbers of a run, one summary per method.

    The numbers come from the turns that every method finished, so that all methods answer the same questions; a
    method without any finished turn is left out of that rule and has no numbers.

    Args:
        methods: which ones, in which order (those that the run does not have are passed over); None takes all.

    Raises:
        KoalaBenchError: none of the methods, no vanilla to compare with, or not one turn that all methods finished.
    """
    names = [name for name in (methods if methods is not None else run.methods) if name in run.methods]
    done = {name: {_place(turn): turn for turn in run.turns_of(name) if turn["error"] is None} for name in {*names, VANILLA}}
    if not names:
        raise KoalaBenchError(f"{run.path} has none of the methods {', '.join(methods or [])}.", f"It has {', '.join(run.methods)}.")
    if not done[VANILLA]:
        raise KoalaBenchError(f"{run.path} has no vanilla decoding to compare with.", "Evaluate with vanilla among --methods.")
    common = set.intersection(*(set(turns) for turns in done.values() if turns))
    if not common:
        raise KoalaBenchError(f"{run.path} has no turn that every method finished.", "Let the evaluation go on; it resumes.")
    kept = {name: [turn for place, turn in turns.items() if place in common] for name, turns in done.items()}
    totals = {name: statistics.totals(turns) for name, turns in kept.items() if turns}
    weights = statistics.resample_weights(len(totals[VANILLA].question_ids))
    speedups = {name: statistics.speedup_of_totals(each, totals[VANILLA]) for name, each in totals.items()}
    lengths = {name: statistics.length(each) for name, each in totals.items()}
    ones = weights[0] * 0 + 1
    nothing = Interval(math.nan, math.nan, math.nan)

    summaries = []
    for name in names:
        method, here, turns = run.methods[name], totals.get(name), kept[name]
        compared = [turn for place, turn in done[name].items() if place in done[VANILLA]] if name != VANILLA else []
        found = [first_difference(turn, done[VANILLA][_place(turn)]) for turn in compared]
        timed = [(turn["draft_s"], turn["verify_s"]) for turn in turns if turn["draft_s"] is not None and turn["verify_s"] is not None]
        draft_s, verify_s = (math.fsum(part) for part in zip(*timed, strict=True)) if timed else (0.0, 0.0)
        original = _original(method, names)
        versus = original if original in totals and here is not None else None
        summaries.append(
            Summary(
                target=run.header["target"]["name"],
                method=method,
                original=original,
                turns=len(run.turns_of(name)),
                failed=tuple(turn for turn in run.turns_of(name) if turn["error"] is not None),
                counted=len(common),
                questions=len(totals[VANILLA].question_ids),
                compared=len(compared),
                differing=tuple(sorted((d for d in found if d is not None), key=lambda d: (d.question_id, d.turn, d.repeat))),
                tokens_per_s=float(here.tokens.sum() / here.decode_s.sum()) if here else math.nan,
                speedup=statistics.interval(speedups[name], weights) if here else nothing,
                speedup_of_means=float(statistics.speedup_of_means(here, totals[VANILLA])(ones)) if here else math.nan,
                mean_of_speedups=float(statistics.mean_of_speedups(here, totals[VANILLA])(ones)) if here else math.nan,
                acceptance_length=statistics.interval(lengths[name], weights) if here else nothing,
                depths=tuple(
                    acceptance_rate_by_depth(
                        [count for turn in turns for count in turn["accepted"] or []],
                        [depth for turn in turns for depth in turn["drafted_depth"] or []],
                    )
                ),
                draft_overhead=statistics.draft_overhead(draft_s, verify_s) if draft_s + verify_s > 0 and method["head"] is not None else None,
                change_x=statistics.interval(statistics.change(speedups[name], speedups[versus]), weights) if versus else None,
                change_percent=statistics.interval(statistics.change_percent(speedups[name], speedups[versus]), weights) if versus else None,
                length_change=statistics.interval(statistics.change(lengths[name], lengths[versus]), weights) if versus else None,
            )
        )
    return summaries
