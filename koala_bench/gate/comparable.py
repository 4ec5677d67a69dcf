"""Which records the gate may compare: the same target, questions, limits and trees, finished, and no run twice."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from koala_bench.errors import KoalaBenchError
from koala_bench.records.reading import Run, differences
from koala_bench.records.schema import Place, RunHeader, TurnLine, place_of
from koala_bench.records.summaries import VANILLA

FEWEST_SEEDS = 3  # with two, one degree of freedom needs margins of dozens of percent

Mode = Literal["fixed", "retrained"]

# Header fields in which comparable runs may differ: names whose content is hashed, training settings, timing.
_FREE = ("preset.", "seed", "target.name", "questions.name", "measure.warmup", "measure.order", "measure.process")
_REMEDIES = {
    "target.": "Evaluate on the baseline's target with its --dtype, --device, --engine and --attention",
    "questions.": "Evaluate with the baseline's --questions and --limit",
    "chat_template.": "Evaluate with the baseline's chat template",
    "limits.": "Evaluate with the baseline's --max-new-tokens and target",
    "acceptance.": "Evaluate with the baseline's acceptance rule",
    "measure.": "Evaluate with the baseline's --repeats",
}
_OR_UPDATE = ", or accept the new record as the baseline with --update."


def _aligned(header: RunHeader, methods: Sequence[str]) -> RunHeader:
    by_name = {method["name"]: method for method in header["methods"]}
    return {**header, "methods": [by_name[name] for name in methods]}


def _refuse_difference(first: Run, run: Run, methods: Sequence[str]) -> None:
    """Raise if two runs measured something else: other target, questions, limits, tree."""
    left, right = _aligned(first.header, methods), _aligned(run.header, methods)
    for place, (here, there) in differences(left, right, circumstances=False).items():
        if place.startswith(_FREE) or (
            place.startswith("methods.") and ".tree" not in place and not place.endswith(".lossless")
        ):
            continue
        name, remedy = place, next((text for start, text in _REMEDIES.items() if place.startswith(start)), "")
        if place.startswith("methods."):
            _, index, field = place.split(".", 2)
            name, remedy = f"the {field} of {methods[int(index)]}", "Evaluate with the baseline's --tree"
        raise KoalaBenchError(
            f"{run.path} and {first.path} cannot be compared: {name} is {there} in the one and {here} in the other.",
            remedy + _OR_UPDATE,
        )


def _refuse_missing_answers(first: Run, run: Run, methods: Sequence[str]) -> None:
    for name in (VANILLA, *methods):
        here, there = set(answers(run, name)), set(answers(first, name))
        if here != there:
            question, turn, repeat = min(here ^ there)
            poorer = run if (question, turn, repeat) in there else first
            raise KoalaBenchError(
                f"{poorer.path} has no answer of {name} to question {question}, turn {turn}, repeat {repeat}, but the"
                " other record has.",
                "See the turn's error in the record, and evaluate again into another --out.",
            )


def consistent(runs: Sequence[Run]) -> list[str]:
    """Check that records are comparable, such as the seeds of a baseline; returns their methods but vanilla.

    Raises:
        KoalaBenchError: a record is unfinished, lacks a method or answer of the first, differs in what it measured,
            or is given twice.
    """
    if not runs:
        raise KoalaBenchError("There is no record to check.", "Name at least one .jsonl file of an evaluation.")
    methods = [name for name in runs[0].methods if name != VANILLA]
    if not methods:
        raise KoalaBenchError(
            f"{runs[0].path} has no method beside vanilla, so there is nothing to compare.",
            "Evaluate with more --methods.",
        )
    if VANILLA not in runs[0].methods:
        raise KoalaBenchError(
            f"{runs[0].path} has no vanilla decoding, which tells whether the answers are the same.",
            "Evaluate with vanilla among --methods.",
        )
    seen: dict[str, Run] = {}
    for run in runs:
        if not run.finished:
            raise KoalaBenchError(
                f"{run.path} is unfinished: it holds {len(run.turns)} turns and no end line.",
                "Start its evaluation again; it goes on where it stopped.",
            )
        if missing := [name for name in (VANILLA, *methods) if name not in run.methods]:
            raise KoalaBenchError(
                f"{run.path} lacks the method {missing[0]}, which {runs[0].path} has.",
                f"Evaluate with --methods {','.join((VANILLA, *methods))}" + _OR_UPDATE,
            )
        if twin := seen.get(run.header["run_id"]):
            raise KoalaBenchError(
                f"{run.path} and {twin.path} are one and the same run, so that nothing would be checked.",
                "Evaluate anew into another --out; a finished record is reused.",
            )
        seen[run.header["run_id"]] = run
        _refuse_difference(runs[0], run, methods)
        _refuse_missing_answers(runs[0], run, methods)
    return methods


def mode_of(method: str, baselines: Sequence[Run], records: Sequence[Run]) -> Mode:
    """Whether a method has the same head weights on both sides, or was trained again; refuses too few seeds."""
    old, new = ([run.methods[method]["weights_sha256"] for run in runs] for runs in (baselines, records))
    if len({*old, *new}) == 1:
        return "fixed"
    if len({*old, *new}) < len(old) + len(new):
        every = [*zip(old, baselines, strict=True), *zip(new, records, strict=True)]
        first, second = next((a, b) for i, (x, a) in enumerate(every) for y, b in every[i + 1 :] if x == y)
        raise KoalaBenchError(
            f"{first.path} and {second.path} have the same weights of {method}, which are one training.",
            "Name one record per training; to check fixed checkpoints, name the one baseline record that was made with"
            " them.",
        )
    if len(baselines) < FEWEST_SEEDS:
        raise KoalaBenchError(
            f"The heads of {method} were trained again; how far training seeds differ cannot be told from fewer than"
            f" {FEWEST_SEEDS} baseline records.",
            f"Give a baseline folder with records of at least {FEWEST_SEEDS} seeds, or evaluate the baseline's own"
            " checkpoints.",
        )
    return "retrained"


def header_changes(old: RunHeader, new: RunHeader) -> list[str]:
    """Fields in which two runs differ, methods matched by name; those that only one run has are named once."""
    names = [method["name"] for method in old["methods"]]
    both = [name for name in names if name in {method["name"] for method in new["methods"]}]
    found = []
    for place in differences(_aligned(old, both), _aligned(new, both)):
        index = place.split(".")[1] if place.startswith("methods.") else ""
        found.append(place.replace(f"methods.{index}", both[int(index)], 1) if index else place)
    return found


def same_machine(runs: Sequence[Run]) -> bool:
    """Whether the hardware that the runs name is the same, so that their times may be shown side by side."""
    names = ("cpu", "cores", "threads", "gpu", "driver")
    return len({tuple(run.header["environment"][name] for name in names) for run in runs}) == 1  # type: ignore[literal-required]


def answers(run: Run, method: str) -> dict[Place, TurnLine]:
    """The turns that a method finished, by place."""
    return {place_of(turn): turn for turn in run.turns_of(method) if turn["error"] is None}


def paired_places(runs: Sequence[Run], methods: Sequence[str]) -> tuple[set[Place], int]:
    """Answers whose prompt and vanilla text are the same in all records, and the number of other answers.

    Rounding on another machine can change the target's own answer. The methods then decode another text, here and in
    later turns, whose prompts contain it, so their step counts are no longer paired.

    Raises:
        KoalaBenchError: fewer than half of the answers are the same.
    """
    vanilla = [answers(run, VANILLA) for run in runs]
    finished = set.intersection(*(set(answers(runs[0], name)) for name in (VANILLA, *methods)))
    changed = {
        place
        for place in vanilla[0]
        if any(each[place]["new_token_ids"] != vanilla[0][place]["new_token_ids"] for each in vanilla[1:])
    }
    paired = {
        (question, turn, repeat)
        for question, turn, repeat in finished
        if not any((question, t, repeat) in changed for t in range(turn + 1))
    }
    if 2 * len(paired) < len(finished):
        raise KoalaBenchError(
            f"The target itself answers otherwise: only {len(paired)} of {len(finished)} answers of vanilla decoding"
            " are the same in all records.",
            "Evaluate with the baseline's versions on a machine like the baseline's, or accept the new record as the"
            " baseline with --update.",
        )
    return paired, len(finished) - len(paired)
