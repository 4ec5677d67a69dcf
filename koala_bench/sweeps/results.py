"""What a sweep found: its append-only lines, the intervals that follow from them, and the table. Needs no model.

The first line says what all numbers have in common (``sweep``). A ``grid`` line lists the trials and seeds wanted, the
last one counts. ``group`` lines say which heads are trained together, a ``trained`` line what a head's training logged
at its end, and an ``answer`` line how many drafts each step of one decoded prompt accepted.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from koala_bench.common.files import cannot, make_folder, write_texts
from koala_bench.common.reading import complete_lines, encode_line, read_bytes
from koala_bench.errors import KoalaBenchError
from koala_bench.records import statistics
from koala_bench.records.statistics import NO_INTERVAL, Interval, Totals
from koala_bench.results.tables.rendering import (
    NOTHING,
    Grid,
    Note,
    csv_of,
    frame_of,
    grid_of,
    to_markdown,
    with_interval,
)

SCHEMA = 1
_KINDS = ("sweep", "grid", "group", "trained", "answer")


_Key = tuple[str, int]  # trial, seed


@dataclass
class SweepLog:
    """The lines of a sweep; ``append`` adds to the file and to this.

    Attributes:
        grid: the last line of kind ``grid``, empty before there is one.
        groups: names of the heads trained together, by seed.
        trained: values logged at the end of a training, by (trial, seed).
        answers: (accepted, decode seconds) by (trial, seed), by prompt.
    """

    path: Path
    header: dict[str, Any]
    grid: dict[str, Any] = field(default_factory=dict)
    groups: dict[int, list[dict[str, Any]]] = field(default_factory=dict)
    trained: dict[_Key, dict[str, Any]] = field(default_factory=dict)
    answers: dict[_Key, dict[int, tuple[list[int], float]]] = field(default_factory=dict)

    def append(self, line: dict[str, Any]) -> None:
        """Write a line; it is with the operating system when this returns.

        Raises:
            KoalaBenchError: the file cannot be written, or the disk is full.
        """
        try:
            with open(self.path, "ab") as handle:
                handle.write(encode_line(line))
        except OSError as error:
            raise cannot("write", self.path, error, "Free space and start again; it goes on where it was.") from error
        self._take(line)

    def prompts(self, seed: int) -> range:
        """The prompts that are decoded with heads of a training seed."""
        first = 0 if seed in self.grid["seeds"] else int(self.grid["prompts"])
        return range(first, first + int(self.grid["confirm_prompts" if first else "prompts"]))

    def measured(self, trial: str, seed: int) -> bool:
        """Whether all prompts of a trial's head of this seed are there."""
        return set(self.prompts(seed)) <= self.answers.get((trial, seed), {}).keys()

    def _take(self, line: dict[str, Any]) -> None:
        kind = line["kind"]
        if kind == "grid":
            self.grid = line
        elif kind == "group":
            self.groups.setdefault(line["seed"], []).append(line)
        elif kind == "trained":
            self.trained[line["trial"], line["seed"]] = line["logged"]
        elif kind == "answer":
            of = self.answers.setdefault((line["trial"], line["seed"]), {})
            of[line["prompt"]] = line["accepted"], line["decode_s"]


def read_sweep(path: Path) -> SweepLog:
    """Read the lines of a sweep; a half-written last line is left out.

    Raises:
        KoalaBenchError: the file is missing or damaged, or ends before it names a trial.
    """
    log = _read(path)
    if not log.grid:
        raise KoalaBenchError(f"{path} names no trial yet.", "Start the sweep again.")
    return log


_REMEDY = "Remove the line and those after it, or choose another --out."


def _read(path: Path) -> SweepLog:
    name_one = "Name the sweep.jsonl of a sweep's folder."
    content, log = read_bytes(path, "sweep", name_one), None
    for number, line in enumerate(complete_lines(path, content, _REMEDY)[0], start=1):
        try:
            if line["kind"] not in _KINDS or (log is None) != (line["kind"] == "sweep"):
                raise ValueError(f"kind {line['kind']!r} is not expected here")
            if log is None:
                if line["schema"] != SCHEMA:
                    raise ValueError(f"schema {line['schema']!r} is not {SCHEMA}")
                log = SweepLog(path, line)
            else:
                log._take(line)
        except (ValueError, KeyError, TypeError) as error:
            raise KoalaBenchError(f"{path}:{number}: damaged, {error}.", _REMEDY) from error
    if log is None:
        raise KoalaBenchError(f"{path} holds no sweep.", name_one)
    return log


def open_sweep(path: Path, header: dict[str, Any]) -> SweepLog:
    """Start the lines of a sweep, or go on with those that are there.

    Raises:
        KoalaBenchError: the file holds numbers that were made otherwise, is damaged, or cannot be written.
    """
    make_folder(path.parent)
    if path.exists() and b"\n" in path.read_bytes():
        log = _read(path)
        different = [key for key, value in header["identity"].items() if log.header["identity"].get(key) != value]
        if different:
            raise KoalaBenchError(
                f"{path} holds another sweep: its {', '.join(different[:3])} differ.",
                "Choose another --out, or delete the folder.",
            )
        with open(path, "r+b") as handle:
            handle.truncate(complete_lines(path, handle.read(), _REMEDY)[1])
        return log
    path.unlink(missing_ok=True)  # a header that a kill left half written
    log = SweepLog(path, header)
    log.append(header)
    return log


# ---------------------------------------------------------------------------------------------- numbers


@dataclass(frozen=True)
class Outcome:
    """One trial over all its seeds.

    Attributes:
        trial, label: its name, and what is particular about it.
        length: acceptance length, tokens per step.
        change: of the length against the baseline, in percent; None for the baseline itself.
        accuracy: of the discriminator at the end of training, mean over seeds; None without one.
    """

    trial: str
    label: str
    length: Interval
    change: Interval | None
    accuracy: float | None


@dataclass(frozen=True)
class Stage:
    """The outcomes of one set of seeds, best first, the baseline among them; empty if no seed is finished."""

    outcomes: list[Outcome]
    seeds: list[int]
    prompts: int

    @property
    def trials(self) -> list[Outcome]:
        """The outcomes but for the baseline's, best first."""
        return [outcome for outcome in self.outcomes if outcome.change is not None]


def explored(log: SweepLog) -> Stage:
    """All trials on the seeds that all of them have finished."""
    return _stage(log, list(log.grid["trials"]), log.grid["seeds"])


def winner(log: SweepLog) -> str | None:
    """Name of the trial that is to be confirmed: the best one, once the search is over."""
    found = explored(log)
    return found.trials[0].trial if found.trials and len(found.seeds) == len(log.grid["seeds"]) else None


def confirmed(log: SweepLog) -> Stage:
    """The best trial and the baseline on the fresh seeds that both have finished."""
    best = winner(log)
    trials = [trial for trial in log.grid["trials"] if trial["name"] in (log.grid["baseline"]["name"], best)]
    return _stage(log, trials, log.grid["confirm_seeds"] if best else [])


def _stage(log: SweepLog, trials: Sequence[dict[str, Any]], seeds: Sequence[int]) -> Stage:
    finished = [seed for seed in seeds if all(log.measured(trial["name"], seed) for trial in trials)]
    if not finished:
        return Stage([], [], 0)
    prompts, base = log.prompts(finished[0]), log.grid["baseline"]["name"]
    interval = partial(statistics.hierarchical_interval, weights=statistics.resample_seeds(len(finished), len(prompts)))
    lengths = {
        trial["name"]: statistics.length(statistics.stacked([_totals(log, trial["name"], seed) for seed in finished]))
        for trial in trials
    }
    outcomes = []
    for trial in trials:
        length = lengths[trial["name"]]
        change = None if trial["name"] == base else interval(statistics.change_percent(length, lengths[base]))
        logged = [log.trained.get((trial["name"], seed), {}).get("discriminator_accuracy") for seed in finished]
        known = [value for value in logged if value is not None]
        accuracy = math.fsum(known) / len(known) if known else None
        outcomes.append(Outcome(trial["name"], trial["label"], interval(length), change, accuracy))
    return Stage(sorted(outcomes, key=lambda outcome: -outcome.length.value), finished, len(prompts))


def _totals(log: SweepLog, trial: str, seed: int) -> Totals:
    answers = ((prompt, *log.answers[trial, seed][prompt]) for prompt in log.prompts(seed))
    found = statistics.summed(
        ((prompt, sum(accepted) + len(accepted), len(accepted), seconds) for prompt, accepted, seconds in answers),
        False,
    )
    if not found.steps.any():
        raise KoalaBenchError(
            "No answer took a decoding step: each ended with the token of its prefill.",
            "Decode other prompts, or raise new_tokens.",
        )
    return found


# ---------------------------------------------------------------------------------------------- tables

_LEGEND = (
    "All trials and the baseline have the same seeds, batches and prompts. The best of them was chosen for its number,"
    " so that this number and its interval are too good: the search is an exploration. The result is that of the fresh"
    " seeds and prompts, which played no part in the choice; without them nothing is confirmed.",
    statistics.CAUTION,
    "Acceptance length: tokens per verification step, totalled over held-out prompts. Change: against the baseline,"
    " paired; bold where the whole interval lies on one side of zero.",
    f"Intervals: {100 * statistics.CONFIDENCE:.0f} %, crossed bootstrap over training seeds and prompts. One seed has"
    " no interval.",
)


def markdown(log: SweepLog) -> str:
    """The tables of search and confirmation, and what the numbers rest on."""
    search, again = explored(log), confirmed(log)
    grid, identity = log.grid, log.header["identity"]
    stages = (("Seeds of the search", search, grid["seeds"]), ("Fresh seeds", again, grid["confirm_seeds"]))
    seeds = ("{}: {} of {} finished ({}), {} prompts".format(
        name, len(stage.seeds), len(wanted), ", ".join(map(str, stage.seeds)) or "none", stage.prompts)
        for name, stage, wanted in stages
    )  # fmt: skip
    basis = (
        *seeds,
        f"Answers of at most {identity['new_tokens']} new tokens, drafted as chains of {identity['depth']}",
        f"Target {log.header['target']}, preset {grid['preset']}; {identity['training']['steps']} training steps of"
        f" {identity['training']['batch_tokens']} tokens",
    )
    notes = [Note("How to read this", _LEGEND), Note("How it was measured", tuple(f"{line}." for line in basis))]
    below = [("Confirmed on fresh seeds and fresh prompts: the result", _grid(again))] if again.trials else []
    title = f"Sweep of {grid['method']} against {grid['baseline']['label']} on {log.header['target']}"
    return to_markdown(_grid(search), title, notes, below)


def _grid(stage: Stage) -> Grid:
    rows = [
        {
            "Trial": outcome.label if outcome.change else f"{outcome.label} (baseline)",
            "Acceptance length τ": with_interval(outcome.length, 3),
            "Change of τ (%)": with_interval(outcome.change, 1, sign=True),
            "Accuracy of the discriminator": NOTHING if outcome.accuracy is None else f"{outcome.accuracy:.2f}",
        }
        for outcome in stage.outcomes
    ] or [{"Trial": "no seed is finished yet"}]
    changes = enumerate(outcome.change for outcome in stage.outcomes)
    real = frozenset((row, 2) for row, change in changes if change and statistics.excludes_zero(change))
    return replace(grid_of(rows, ["Trial"]), best=real)


def to_csv(log: SweepLog) -> str:
    """The numbers with 12 digits, search and confirmation; empty cells for what there is not."""
    rows = [
        {"stage": name, "trial": outcome.trial, "label": outcome.label}
        | {"seeds": " ".join(map(str, stage.seeds)), "prompts": stage.prompts}
        | {"acceptance_length": outcome.length, "change_percent": outcome.change or NO_INTERVAL}
        | {"discriminator_accuracy": outcome.accuracy}
        for name, stage in (("search", explored(log)), ("confirmation", confirmed(log)))
        for outcome in stage.outcomes
    ]
    return csv_of(frame_of(rows))


def write_pages(log: SweepLog, out: Path) -> list[Path]:
    """Write ``sweep.md`` and ``sweep.csv`` into a folder; returns their paths."""
    pages = {out / "sweep.md": markdown(log), out / "sweep.csv": to_csv(log)}
    write_texts(pages)
    return list(pages)
