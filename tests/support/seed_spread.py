"""How much acceptance differs between trainings: written from run records, read by the simulation of the regression
gate.

    python -m tests.support.seed_spread RECORD.jsonl ... > results/seeds-tiny/acceptance.csv

One line per method that all records have, training seed and question: tokens committed and verification steps, over all
its turns.
"""

from __future__ import annotations

import csv
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from koala_bench.records.reading import read_run
from koala_bench.records.statistics import totals

FIELDS = ("method", "seed", "question_id", "tokens", "steps")


@dataclass(frozen=True)
class Spread:
    """Standard deviations of the logarithm of a method's acceptance length.

    Attributes:
        between: trainings, over all questions together. What the questions at hand add by chance is part of it, so it
            is rather too large.
        interaction: what a training moves on one question beyond what it moves on all.
        seeds: trainings that both are from.
    """

    between: float
    interaction: float
    seeds: int


def read_spread(path: Path) -> dict[str, Spread]:
    """The spread of each method in a file that this script wrote."""
    with open(path, newline="", encoding="utf-8") as handle:
        rows = list(csv.DictReader(handle))
    found = {}
    for method in dict.fromkeys(row["method"] for row in rows):
        mine = [row for row in rows if row["method"] == method]
        seeds, questions = (sorted({int(row[field]) for row in mine}) for field in ("seed", "question_id"))
        tokens, steps = np.zeros((2, len(seeds), len(questions)))
        for row in mine:
            place = seeds.index(int(row["seed"])), questions.index(int(row["question_id"]))
            tokens[place], steps[place] = float(row["tokens"]), float(row["steps"])
        assert steps.all(), f"{method}: not every seed answered every question"
        whole = np.log(tokens.sum(axis=1) / steps.sum(axis=1))
        apart = np.log(tokens / steps) - whole[:, None]
        apart -= apart.mean(axis=0)  # what a question has of its own, whatever the training
        freedom = (len(seeds) - 1) * (len(questions) - 1)
        found[method] = Spread(float(whole.std(ddof=1)), math.sqrt(float((apart**2).sum()) / freedom), len(seeds))
    return found


def main(records: list[str]) -> None:
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(FIELDS)
    runs = [read_run(Path(path)) for path in records]
    for run in runs:
        for name, method in run.methods.items():
            if method["head"] is None or any(name not in other.methods for other in runs):
                continue
            here = totals(turn for turn in run.turns_of(name) if turn["error"] is None)
            for question, tokens, steps in zip(here.question_ids, here.tokens, here.steps, strict=True):
                writer.writerow([name, run.header["seed"], question, int(tokens), int(steps)])


if __name__ == "__main__":
    main(sys.argv[1:])
