"""What a sweep found: its append-only lines, the intervals that follow from them, and the table. Needs no model.

The first line says what all numbers have in common (``sweep``). A ``grid`` line lists the trials and seeds wanted, the
last one counts. ``group`` lines say which heads are trained together, a ``trained`` line what a head's training logged
at its end, and an ``answer`` line how many drafts each step of one decoded prompt accepted.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from koala_bench.common.files import make_folder
from koala_bench.common.reading import complete_lines
from koala_bench.errors import KoalaBenchError
from koala_bench.records import statistics
from koala_bench.records.statistics import Interval, Totals
from koala_bench.results.tables.rendering import Grid, Note, to_markdown, with_interval

SCHEMA = 1
_KINDS = ("sweep", "grid", "group", "trained", "answer")
_NOTHING = "\N{EN DASH}"


@dataclass
class SweepLog:
    """The lines of a sweep; ``append`` adds to the file and to this.

    Attributes:
        header: the first line.
        grid: the last line of kind ``grid``, empty before there is one.
        groups: names of the heads trained together, by seed.
        trained: values logged at the end of a training, by (trial, seed).
        answers: (accepted, decode seconds) by (trial, seed), by prompt.
    """

    path: Path
    header: dict[str, Any]
    grid: dict[str, Any] = field(default_factory=dict)
    groups: dict[int, list[dict[str, Any]]] = field(default_factory=dict)
    trained: dict[tuple[str, int], dict[str, Any]] = field(default_factory=dict)
    answers: dict[tuple[str, int], dict[int, tuple[list[int], float]]] = field(default_factory=dict)

    def append(self, line: dict[str, Any]) -> None:
        """Write a line; it is with the operating system when this returns.

        Raises:
            KoalaBenchError: the file cannot be written, or the disk is full.
        """
        try:
            with open(self.path, "ab") as handle:
                handle.write(_encoded(line))
        except OSError as error:
            raise KoalaBenchError(
                f"Cannot write {self.path}: {error.strerror or error}.",
                "Free space and start again; it goes on where it was.",
            ) from error
        self._take(line)

    def prompts(self, seed: int) -> range:
        """The prompts that are decoded with heads of a training seed."""
        explored = int(self.grid["prompts"])
        return (
            range(explored)
            if seed in self.grid["seeds"]
            else range(explored, explored + int(self.grid["confirm_prompts"]))
        )

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
            self.answers.setdefault((line["trial"], line["seed"]), {})[line["prompt"]] = (
                line["accepted"],
                line["decode_s"],
            )


def _encoded(line: dict[str, Any]) -> bytes:
    return json.dumps(line, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode() + b"\n"


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
    try:
        content = path.read_bytes()
    except OSError as error:
        raise KoalaBenchError(
            f"Cannot read {path}: {error.strerror}.", "Name the sweep.jsonl of a sweep's folder."
        ) from error
    log = None
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
        raise KoalaBenchError(f"{path} holds no sweep.", "Name the sweep.jsonl of a sweep's folder.")
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
    names = (log.grid["baseline"]["name"], best)
    return _stage(
        log,
        [trial for trial in log.grid["trials"] if trial["name"] in names],
        log.grid["confirm_seeds"] if best else [],
    )


def _stage(log: SweepLog, trials: Sequence[dict[str, Any]], seeds: Sequence[int]) -> Stage:
    finished = [seed for seed in seeds if all(log.measured(trial["name"], seed) for trial in trials)]
    if not finished:
        return Stage([], [], 0)
    prompts = log.prompts(finished[0])
    weights = statistics.resample_seeds(len(finished), len(prompts))
    base = log.grid["baseline"]["name"]
    lengths = {
        trial["name"]: statistics.length(statistics.stacked([_totals(log, trial["name"], seed) for seed in finished]))
        for trial in trials
    }
    outcomes = []
    for trial in trials:
        name = trial["name"]
        length = statistics.hierarchical_interval(lengths[name], weights)
        change = (
            None
            if name == base
            else statistics.hierarchical_interval(statistics.change_percent(lengths[name], lengths[base]), weights)
        )
        accuracies = [log.trained.get((name, seed), {}).get("discriminator_accuracy") for seed in finished]
        known = [value for value in accuracies if value is not None]
        outcomes.append(Outcome(name, trial["label"], length, change, math.fsum(known) / len(known) if known else None))
    return Stage(sorted(outcomes, key=lambda outcome: -outcome.length.value), finished, len(prompts))


def _totals(log: SweepLog, trial: str, seed: int) -> Totals:
    prompts = log.prompts(seed)
    answers = [log.answers[trial, seed][prompt] for prompt in prompts]
    counts = np.array(
        [[sum(accepted) + len(accepted), len(accepted), decode_s] for accepted, decode_s in answers], dtype=np.float64
    )
    if not counts[:, 1].any():
        raise KoalaBenchError(
            "No answer took a decoding step: each ended with the token of its prefill.",
            "Decode other prompts, or raise new_tokens.",
        )
    return Totals(tuple(prompts), counts[:, 0], counts[:, 1], counts[:, 2])


# ---------------------------------------------------------------------------------------------- words and tables


def verdict(log: SweepLog) -> str:
    """What the sweep says, in one sentence: of the fresh seeds if there are any, else of the search."""
    grid = log.grid
    search, again = explored(log), confirmed(log)
    if not search.trials:
        return f"{grid['method']}: no seed is finished yet."
    best = search.trials[0]
    if again.trials:
        outcome = again.trials[0]
        where = (
            f"trained again from {_counted(len(again.seeds), 'fresh seed')} and decoded on {again.prompts} fresh"
            " prompts"
        )
        return (
            f"{grid['method']}: the best of {len(search.trials)} trials, {best.label}, {_says(outcome)} against"
            f" {grid['baseline']['label']}, {where}."
        )
    if best.change is not None and best.change.low > 0:
        return (
            f"{grid['method']}: in the search {best.label} {_says(best)} against {grid['baseline']['label']}; "
            "chosen as the best of many, it is not a result before it is confirmed."
        )
    return (
        f"{grid['method']}: no trial helps beyond its interval; the best, {best.label}, {_says(best)} against"
        f" {grid['baseline']['label']}."
    )


def _says(outcome: Outcome) -> str:
    change = outcome.change
    assert change is not None
    value = f"{with_interval(change.value, change.low, change.high, 1, sign=True)} %"
    if math.isnan(change.low):
        return f"changes the acceptance length by {value} (one seed or prompt, so no interval)"
    words = {"above zero": f"helps by {value}", "below zero": f"harms by {value}"}
    return words.get(statistics.against_zero(change), f"makes no difference beyond its interval ({value})")


def _counted(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"


def markdown(log: SweepLog) -> str:
    """The sweep's table with its verdict and what the numbers rest on."""
    search, again = explored(log), confirmed(log)
    grid, identity = log.grid, log.header["identity"]
    trials = len(search.trials)
    notes = [Note("Verdict", (verdict(log),))]
    caution = [
        (
            f"{_counted(trials, 'trial')} and one baseline on the same seeds, batches and prompts. The best of them was"
            " chosen for its number, so that this number and its interval are too good: it is an exploration."
        ),
        statistics.caution(trials) if trials else "",
    ]
    if again.trials:
        caution.append(
            "The fresh seeds and prompts played no part in the choice: theirs is the result, whichever way it goes."
        )
    elif grid["confirm_seeds"]:
        caution.append("The best trial has not been confirmed on fresh seeds yet.")
    else:
        caution.append("The grid names no confirm_seeds, so nothing here is confirmed.")
    basis = [
        (
            f"Acceptance length: tokens per verification step, totalled over {search.prompts} held-out prompts of at"
            f" most {identity['new_tokens']} new tokens, drafted as chains of {identity['depth']}; training seeds"
            f" {', '.join(map(str, search.seeds)) or 'none yet'}."
        ),
        (
            f"Intervals: {100 * statistics.CONFIDENCE:.0f} %, crossed bootstrap over training seeds and prompts;"
            " changes are paired. One seed has no interval."
        ),
        (
            f"Target {log.header['target']}, preset {grid['preset']}; "
            f"{identity['training']['steps']} training steps of {identity['training']['batch_tokens']} tokens."
        ),
    ]
    if len(search.seeds) < len(grid["seeds"]):
        basis.append(
            f"Unfinished: {len(search.seeds)} of {len(grid['seeds'])} seeds count so far; the numbers will change."
        )
    notes += [
        Note("How to read the best number", tuple(line for line in caution if line)),
        Note("What the numbers rest on", tuple(basis)),
    ]
    title = f"Confirmed on fresh seeds {', '.join(map(str, again.seeds))} and fresh prompts: the result"
    below = [(title, _grid(again))] if again.trials else []
    return to_markdown(_grid(search), f"Sweep of {grid['method']} on {log.header['target']}", notes, below)


def _grid(stage: Stage) -> Grid:
    headings = ["Trial", "Acceptance length τ", "Change of τ (%)", "Accuracy of the discriminator"]
    rows = [
        [
            outcome.label if outcome.change else f"{outcome.label} (baseline)",
            with_interval(outcome.length.value, outcome.length.low, outcome.length.high, 3),
            (
                with_interval(outcome.change.value, outcome.change.low, outcome.change.high, 1, sign=True)
                if outcome.change
                else _NOTHING
            ),
            _NOTHING if outcome.accuracy is None else f"{outcome.accuracy:.2f}",
        ]
        for outcome in stage.outcomes
    ]
    return Grid(headings, rows, [False, True, True, True])


def to_csv(log: SweepLog) -> str:
    """The numbers with 12 digits, search and confirmation; empty cells for what there is not."""
    import pandas as pd

    columns = ["stage", "trial", "label", "seeds", "prompts"]
    columns += [name + end for name in ("acceptance_length", "change_percent") for end in ("", "_low", "_high")]
    nothing = Interval(math.nan, math.nan, math.nan)
    rows = [
        [
            *(name, outcome.trial, outcome.label, " ".join(map(str, stage.seeds)), stage.prompts),
            *(end for each in (outcome.length, outcome.change or nothing) for end in (each.value, each.low, each.high)),
            math.nan if outcome.accuracy is None else outcome.accuracy,
        ]
        for name, stage in (("search", explored(log)), ("confirmation", confirmed(log)))
        for outcome in stage.outcomes
    ]
    frame = pd.DataFrame(rows, columns=[*columns, "discriminator_accuracy"])
    return str(frame.to_csv(index=False, float_format="%.12g", lineterminator="\n"))
