"""The questions on which a method did worst and best, with the text of their answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from koala_bench.records.reading import Run
from koala_bench.records.schema import TurnLine
from koala_bench.records.summaries import VANILLA, sample


@dataclass(frozen=True)
class Outlier:
    """One question under one method.

    Attributes:
        speedup: of this question alone, over all its turns and repeats.
        turns: what was asked and answered, turn by turn; a question is None where its file is not at hand.
    """

    question_id: int
    category: str
    speedup: float
    acceptance_length: float
    tokens: int
    turns: Sequence[tuple[str | None, str]]


@dataclass(frozen=True)
class Outliers:
    """The slowest and the fastest questions of a method, and where its middle lies."""

    method: str
    median: float
    slowest: Sequence[Outlier]
    fastest: Sequence[Outlier]


def outliers_of(run: Run, questions: Mapping[int, Sequence[str]], most: int = 5) -> list[Outliers]:
    """Of every method but vanilla the questions with the smallest and the largest speedup.

    Args:
        questions: the turns of every question by id; empty if the file is not at hand.
        most: how many of each; fewer where a run has few questions, so that none is on both sides.
    """
    chosen = sample([run])
    base = chosen.totals[VANILLA]
    found = []
    for name in (each for each in chosen.names if each != VANILLA and each in chosen.totals):
        turns: dict[int, list[TurnLine]] = {}
        for turn in sorted(chosen.turns(name), key=lambda turn: (turn["turn"], turn["repeat"])):
            turns.setdefault(turn["question_id"], []).append(turn)
        here = chosen.totals[name]
        usable = (here.steps > 0) & (base.tokens > 0)
        speedups = (here.tokens * base.seconds)[usable] / (here.seconds * base.tokens)[usable]
        columns = (np.array(here.question_ids), here.tokens, here.steps)
        numbers = zip(speedups, *(column[usable] for column in columns), strict=True)
        ranked = [
            Outlier(int(question), turns[question][0]["category"], float(speedup), float(tokens / steps), int(tokens),
                    _texts(turns[question], questions))
            for speedup, question, tokens, steps in sorted(numbers)
        ]  # fmt: skip
        if ranked:
            count = min(most, len(ranked) // 2)
            fastest = ranked[len(ranked) - count :][::-1]
            found.append(Outliers(name, float(np.median(speedups)), ranked[:count], fastest))
    return found


def _texts(turns: Sequence[TurnLine], questions: Mapping[int, Sequence[str]]) -> list[tuple[str | None, str]]:
    """What was asked and answered, the first repeat of each turn."""
    question_turns = questions.get(turns[0]["question_id"], ())
    first = {turn["turn"]: turn for turn in reversed(turns)}
    return [
        (question_turns[place] if place < len(question_turns) else None, first[place]["text"] or "")
        for place in sorted(first)
    ]
