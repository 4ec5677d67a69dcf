"""A run in numbers: one summary per method, with intervals, differences from vanilla and changes by KOALA.

All methods of a run are compared on the same turns: those that every one of them finished. Runs of several training
seeds, or of one evaluation in several processes, are summarised together, on the turns that every method finished in
every run.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from koala_bench.errors import KoalaBenchError
from koala_bench.records import statistics
from koala_bench.records.definitions import DepthRate, acceptance_rate_by_depth
from koala_bench.records.reading import Run, differences
from koala_bench.records.schema import MethodInfo, Place, TurnLine, place_of
from koala_bench.records.statistics import NO_INTERVAL, Interval, SeedWeights, Statistic, Totals

VANILLA = "vanilla"
_KOALA = "+koala"

Factor = Literal["questions", "training seeds", "processes"]


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
    """One method of one run, or of runs that are taken together, in numbers; NaN or None stands for what the record
    does not hold.

    Attributes:
        speedup: of decoding, the prefills of target and head left out.
        whole_answer: speedup of whole answers, both prefills included, and the same as the ratio of mean rates, which
            is what the scripts of EAGLE and Spec-Bench print.
        original: the method that the changes are against, if there is one.
        turns: turn lines, failed ones included.
        counted: turns that the numbers are from; the same for all methods.
        compared, differing: answers compared with vanilla's, and those that differ.
        change_x, change_percent, length_change: against the original head, of the speedup in x and in percent, and
            of the acceptance length in tokens per step.
        distance: of a lossy method, how far what it commits is from the target's distribution: total variation, mean
            over the turns.
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
    depths: tuple[DepthRate, ...]
    draft_overhead: float | None
    distance: float | None
    tokens_per_s: float = math.nan
    speedup: Interval = NO_INTERVAL
    whole_answer: Interval = NO_INTERVAL
    whole_answer_of_means: float = math.nan
    speedup_of_means: float = math.nan
    mean_of_speedups: float = math.nan
    acceptance_length: Interval = NO_INTERVAL
    change_x: Interval | None = None
    change_percent: Interval | None = None
    length_change: Interval | None = None

    @property
    def name(self) -> str:
        """The method's name."""
        return self.method["name"]

    @property
    def is_measured(self) -> bool:
        """Whether it is another method than vanilla, and finished a turn."""
        return self.name != VANILLA and not math.isnan(self.speedup.value)

    @property
    def is_koala(self) -> bool:
        """Whether the row is one that KOALA's claims are about."""
        return self.name.endswith(_KOALA)


def _original(name: str, methods: Mapping[str, MethodInfo], names: Sequence[str]) -> str | None:
    """The method that the changes of another are against: its name without ``+koala``, the one called like its head,
    or of the same head the first one without an objective that has the fewest layers."""
    method = methods[name]
    if name.endswith(_KOALA):
        found = name.removesuffix(_KOALA)
    elif method["head"] in names:
        found = str(method["head"])
    else:
        plain = [each for each in names if methods[each]["head"] == method["head"] and not _objective(methods[each])]
        found = min(plain, key=lambda each: methods[each]["layers"], default=name)
    return found if found in names and found != name else None


def _objective(method: MethodInfo) -> bool:
    return method["adversarial"] or "objective" in method


def first_difference(turn: TurnLine, vanilla: TurnLine) -> Difference | None:
    """Compare the tokens themselves; what the run said about the place is only used for the logits."""
    ids, base = turn["new_token_ids"] or [], vanilla["new_token_ids"] or []
    if ids == base:
        return None
    position = next((i for i, (a, b) in enumerate(zip(ids, base, strict=False)) if a != b), min(len(ids), len(base)))
    said = turn["first_difference"]
    gap = said["top2_gap"] if said is not None and said["position"] == position else None
    token, vanilla_token = (tokens[position] if position < len(tokens) else None for tokens in (ids, base))
    return Difference(*place_of(turn), position, token, vanilla_token, gap)


@dataclass(frozen=True)
class Sample:
    """The turns that numbers are from, and how they are resampled.

    Attributes:
        names: the methods that were asked for, in that order.
        finished: of each run, the turns that each method finished, by place.
        common: places of the turns that every method finished in every run.
        totals: of each method that finished anything, per question; stacked are the trainings, or the processes where
            there is one training.
        whole: the same of whole answers.
        factor: what is stacked, if there is more than one.
        weights: of the questions, or of the stacked runs and questions.
    """

    runs: tuple[Run, ...]
    names: tuple[str, ...]
    finished: tuple[dict[str, dict[Place, TurnLine]], ...]
    common: frozenset[Place]
    totals: dict[str, Totals]
    whole: dict[str, Totals]
    factor: Factor | None
    weights: NDArray[np.float64] | SeedWeights

    @property
    def covers(self) -> dict[Factor, int]:
        """What the intervals are over, and how many of each there are."""
        among: dict[Factor, int] = {"questions": self.questions}
        if self.factor is not None:
            among[self.factor] = len(self.totals[VANILLA].question_ids) // self.questions
        return among

    @property
    def questions(self) -> int:
        """How many questions the numbers are from, however often they were answered."""
        return len({question for question, _, _ in self.common})

    @property
    def drafting(self) -> list[str]:
        """The methods besides vanilla that finished a turn."""
        return [name for name in self.names if name != VANILLA and name in self.totals]

    def turns(self, name: str) -> list[TurnLine]:
        """The turns of a method that its numbers are from."""
        return [turn for finished in self.finished for place, turn in finished[name].items() if place in self.common]

    def pairs(self, name: str) -> list[tuple[TurnLine, TurnLine]]:
        """The same turns, each with vanilla's."""
        return [
            (turn, finished[VANILLA][place])
            for finished in self.finished
            for place, turn in finished[name].items()
            if place in self.common
        ]

    def interval(self, statistic: Statistic) -> Interval:
        """A statistic with its interval over the questions, and over trainings or processes where there are several."""
        if isinstance(self.weights, SeedWeights):
            return statistics.hierarchical_interval(statistic, self.weights)
        return statistics.interval(statistic, self.weights)

    def value(self, statistic: Statistic) -> float:
        """A statistic of the sample itself."""
        return float(statistic(np.ones(len(self.totals[VANILLA].question_ids))))

    def speedup(self, name: str) -> Statistic:
        """The speedup of a method over vanilla."""
        return statistics.speedup_of_totals(self.totals[name], self.totals[VANILLA])

    def whole_answer(self, name: str) -> Statistic:
        """The speedup of whole answers over vanilla's."""
        return statistics.speedup_of_totals(self.whole[name], self.whole[VANILLA])

    def length(self, name: str) -> Statistic:
        """The acceptance length of a method."""
        return statistics.length(self.totals[name])


def sample(runs: Sequence[Run], methods: Sequence[str] | None = None) -> Sample:
    """Choose the turns that every method finished, so that all methods answer the same questions.

    A method without any finished turn is left out of that rule and has no numbers.

    Args:
        runs: which answer the same questions with the same methods: one, or one per training, each in one or more
            processes. Processes of one of several trainings count as repeats of its answers, and what they add to the
            spread is in that between the trainings.
        methods: which ones, in which order (those that the first run does not have are passed over); None takes all.

    Raises:
        KoalaBenchError: none of the methods, no vanilla to compare with, or not one turn that all methods finished.
    """
    first = runs[0]
    names = [name for name in (methods if methods is not None else first.methods) if name in first.methods]
    if not names:
        raise KoalaBenchError(
            f"{first.path} has none of the methods {', '.join(methods or [])}.", f"It has {', '.join(first.methods)}."
        )
    done = []
    for run in runs:
        finished = {
            name: {place_of(turn): turn for turn in run.turns_of(name) if turn["error"] is None}
            for name in {*names, VANILLA}
        }
        if not finished[VANILLA]:
            has = "holds no answer of vanilla decoding" if VANILLA in run.methods else "has no vanilla decoding"
            raise KoalaBenchError(f"{run.path} {has} to compare with.", "Evaluate to the end, vanilla among --methods.")
        done.append(finished)
    answered = [name for name in {*names, VANILLA} if all(finished[name] for finished in done)]
    common = frozenset(set.intersection(*(set(finished[name]) for finished in done for name in answered)))
    if not common:
        raise KoalaBenchError(
            f"{first.path} has no turn that every method finished.", "Run the same evaluation again; it resumes."
        )
    trainings: dict[tuple[tuple[str, str], ...], list[int]] = {}
    for index, run in enumerate(runs):
        trainings.setdefault(tuple(sorted(run.heads.items())), []).append(index)
    groups = list(trainings.values()) if len(trainings) > 1 else [[index] for index in range(len(runs))]

    def stacked(name: str, whole: bool) -> Totals:
        parts = [
            statistics.totals(
                (turn for index in group for place, turn in done[index][name].items() if place in common), whole
            )
            for group in groups
        ]
        return parts[0] if len(parts) == 1 else statistics.stacked(parts)

    totals, whole = ({name: stacked(name, kind) for name in answered} for kind in (False, True))
    questions = len(totals[VANILLA].question_ids) // len(groups)
    factor: Factor | None = None if len(groups) == 1 else "training seeds" if len(trainings) > 1 else "processes"
    weights = (
        statistics.resample_weights(questions) if factor is None else statistics.resample_seeds(len(groups), questions)
    )
    return Sample(tuple(runs), tuple(names), tuple(done), common, totals, whole, factor, weights)


def evaluations(runs: Sequence[Run]) -> list[tuple[Run, ...]]:
    """The runs that are processes of one and the same evaluation together, in the order of the first of each."""
    groups: list[list[Run]] = []
    for run in runs:
        mates = (each for each in groups if all(same_evaluation(other, run) for other in each))
        if (group := next(mates, None)) is None:
            groups.append(group := [])
        group.append(run)
    return [tuple(sorted(group, key=lambda run: run.process)) for group in groups]


def same_evaluation(one: Run, other: Run) -> bool:
    """Whether two runs differ in nothing but the process that made them, and the machine and code of it."""
    apart = set(differences(one.header, other.header, circumstances=False))
    return one.process != other.process and apart <= {"measure.process"}


def summarise(run: Run, methods: Sequence[str] | None = None) -> list[Summary]:
    """The numbers of a run, one summary per method; arguments and errors as ``sample``."""
    return summaries_of(sample([run], methods))


def summaries_of(chosen: Sample) -> list[Summary]:
    """The numbers of a sample, one summary per method."""
    return [_summary(chosen, name) for name in chosen.names]


def _summary(chosen: Sample, name: str) -> Summary:
    runs, method, turns = chosen.runs, chosen.runs[0].methods[name], chosen.turns(name)
    greedy = runs[0].header["acceptance"]["rule"] == "greedy"  # draws are not expected to be equal
    pairs = [
        (turn, of[VANILLA][place])
        for of in chosen.finished
        for place, turn in of[name].items()
        if greedy and name != VANILLA and place in of[VANILLA]
    ]
    differing = [each for pair in pairs if (each := first_difference(*pair)) is not None]
    every = [turn for run in runs for turn in run.turns_of(name)]
    distances = [turn["distance"] for turn in turns if turn["distance"] is not None]
    return Summary(
        target=runs[0].header["target"]["name"],
        method=method,
        original=_original(name, runs[0].methods, chosen.names),
        turns=len(every),
        failed=tuple(turn for turn in every if turn["error"] is not None),
        counted=len(chosen.common) * len(runs),
        questions=chosen.questions,
        compared=len(pairs),
        differing=tuple(sorted(differing, key=lambda each: (each.question_id, each.turn, each.repeat))),
        depths=tuple(
            acceptance_rate_by_depth(
                [count for turn in turns for count in turn["accepted"] or []],
                [depth for turn in turns for depth in turn["drafted_depth"] or []],
            )
        ),
        draft_overhead=None if method["head"] is None else _overhead(turns),
        distance=math.fsum(distances) / len(distances) if distances else None,
        **_intervals(chosen, name, _original(name, runs[0].methods, chosen.names)),
    )


def _overhead(turns: Sequence[TurnLine]) -> float | None:
    """Share of drafting in the time of a step, draft / (draft + verify), of the turns whose parts were timed."""
    timed = [turn for turn in turns if turn["draft_s"] is not None and turn["verify_s"] is not None]
    draft_s, verify_s = (math.fsum(turn[part] or 0.0 for turn in timed) for part in ("draft_s", "verify_s"))
    return draft_s / (draft_s + verify_s) if draft_s + verify_s > 0 else None


def _intervals(chosen: Sample, name: str, original: str | None) -> dict[str, Any]:
    """The fields of ``Summary`` that a method has which finished a turn, and those of its change against another."""
    if name not in chosen.totals:
        return {}
    here, base, whole = chosen.totals[name], chosen.totals[VANILLA], chosen.whole
    speedup, length = chosen.speedup(name), chosen.length(name)
    numbers = {
        "tokens_per_s": float(here.tokens.sum() / here.seconds.sum()),
        "speedup": chosen.interval(speedup),
        "whole_answer": chosen.interval(chosen.whole_answer(name)),
        "whole_answer_of_means": chosen.value(statistics.speedup_of_means(whole[name], whole[VANILLA])),
        "speedup_of_means": chosen.value(statistics.speedup_of_means(here, base)),
        "mean_of_speedups": chosen.value(statistics.mean_of_speedups(here, base)),
        "acceptance_length": chosen.interval(length),
    }
    if original in chosen.totals:
        was = chosen.speedup(original)
        numbers["change_x"] = chosen.interval(statistics.change(speedup, was))
        numbers["change_percent"] = chosen.interval(statistics.change_percent(speedup, was))
        numbers["length_change"] = chosen.interval(statistics.change(length, chosen.length(original)))
    return numbers
