"""Bounds of a method: the acceptance length from which it pays, and the speedup if every draft were accepted.

All from a record's turns. A method's speedup is its acceptance length divided by the break-even length, which is what a
step of it costs in steps of vanilla decoding; so the distance from the oracle is lengths that were not accepted, and
what is left of the oracle's distance from its length is time.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from koala_bench.records.schema import TurnLine


@dataclass(frozen=True)
class Bounds:
    """What bounds a method over some turns, pooled: sums are divided, not averages of answers.

    Attributes:
        steps: verifications.
        acceptance_length: tokens per step, bonus token included.
        offered_length: the same if every draft were accepted as deep as its tree was: that of the oracle.
        break_even: seconds of a step / seconds of a vanilla token: the acceptance length at which the method is as fast
            as vanilla decoding.
        draft_share, verify_share: shares of a step's seconds; None if the parts were not timed. The rest is acceptance
            and bookkeeping.
    """

    steps: int
    acceptance_length: float
    offered_length: float
    break_even: float
    draft_share: float | None
    verify_share: float | None

    @property
    def speedup(self) -> float:
        """Tokens per second / vanilla's, over the same turns."""
        return self.acceptance_length / self.break_even

    @property
    def oracle_speedup(self) -> float:
        """The speedup of perfect drafts of the same trees at the measured cost of a step: the most it could have, where
        its trees have one depth. A look-up's trees are as deep as what it finds behind text drafted less well."""
        return self.offered_length / self.break_even

    @property
    def free_oracle_speedup(self) -> float | None:
        """The oracle's speedup if its drafts also took no time; None where the parts were not timed."""
        return None if self.draft_share is None else self.oracle_speedup / (1 - self.draft_share)


def bounds(pairs: Iterable[tuple[TurnLine, TurnLine]]) -> Bounds | None:
    """Bounds over some turns; None where no pair has a step of the method, and one of vanilla's.

    Args:
        pairs: a turn of the method, and vanilla's of the same question, turn and repeat in the same run.
    """
    steps = accepted = offered = tokens = 0
    seconds = vanilla_seconds = draft = verify = 0.0
    timed = True
    for turn, other in pairs:
        depths, kept, time_s = turn["drafted_depth"], turn["accepted"], turn["decode_s"]
        if depths is None or time_s is None or not kept:
            continue
        if (other_time := other["decode_s"]) is None or not other["accepted"]:
            continue
        steps += len(kept)
        accepted += sum(kept)
        offered += sum(depths)
        seconds += time_s
        tokens += len(other["accepted"]) + sum(other["accepted"])
        vanilla_seconds += other_time
        timed &= turn["draft_s"] is not None and turn["verify_s"] is not None
        draft += turn["draft_s"] or 0.0
        verify += turn["verify_s"] or 0.0
    if not steps or not vanilla_seconds:
        return None
    return Bounds(
        steps=steps,
        acceptance_length=1 + accepted / steps,
        offered_length=1 + offered / steps,
        break_even=(seconds / steps) / (vanilla_seconds / tokens),
        draft_share=draft / seconds if timed and seconds else None,
        verify_share=verify / seconds if timed and seconds else None,
    )


def acceptance_histogram(accepted: Sequence[int]) -> list[int]:
    """How many steps accepted 0, 1, 2, ... draft tokens, up to the most that any did; empty without a step."""
    counts = Counter(accepted)
    return [counts[number] for number in range(max(counts, default=-1) + 1)]
