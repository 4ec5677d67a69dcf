"""Which records may be combined in one table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from koala_bench.errors import KoalaBenchError
from koala_bench.records.reading import Run, differences
from koala_bench.records.schema import MethodInfo
from koala_bench.records.summaries import same_evaluation
from koala_bench.results.tables.published import TableSpec

# Header fields that all records of one table must share; others may depend on the target.
_SHARED = ("acceptance.", "limits.max_new_tokens")
_IDENTITY: tuple[Literal["tree", "layers", "adversarial"], ...] = ("tree", "layers", "adversarial")


def refuse_mixture(runs: Sequence[Run], spec: TableSpec) -> None:
    """Raise if records cannot be combined in one table: different limits or questions, or duplicates."""
    if not runs:
        raise KoalaBenchError(
            "There is no record to make a table of.", "Name at least one .jsonl file of an evaluation."
        )
    for index, run in enumerate(runs[1:], 1):
        different = _different(runs[0], run, _SHARED if spec.has_tasks else ("questions.", *_SHARED))
        target = run.header["target"]["name"]
        for other in (each for each in runs[:index] if each.header["target"]["name"] == target):
            if same_evaluation(other, run):
                continue
            alike, remedy = _alike(other, run, spec)
            if alike is not None:
                raise KoalaBenchError(f"{other.path} and {run.path} are of the same {alike}.", f"Name one {remedy}.")
            different += _other_heads(other, run, spec)
        if different:
            raise KoalaBenchError(
                f"{runs[0].path} and {run.path} cannot share a table: they differ in {different[0]}.",
                "Make a table of each.",
            )


def _different(first: Run, second: Run, looked_at: tuple[str, ...]) -> list[str]:
    found = differences(first.header, second.header, circumstances=False)
    return [name for name in found if name.startswith(looked_at)]


def _alike(first: Run, second: Run, spec: TableSpec) -> tuple[str | None, str]:
    """Why two records of one target would be the same row of a table, if they would, and the remedy."""
    if spec.by == "target":
        return "target", "record per target"
    if spec.has_tasks:
        same = first.header["questions"]["name"] == second.header["questions"]["name"]
        return "target and questions" if same else None, "record per question file"
    remedy = "record per training; `reproduce --processes` repeats an evaluation"
    shared = [name for name in spec.methods if name in first.heads and first.heads[name] == second.heads.get(name)]
    if shared:
        return f"trained head of {shared[0]}, to the weights' hash: one training, not two", remedy
    return "target and training seed" if first.training_seed == second.training_seed else None, remedy


def _other_heads(first: Run, second: Run, spec: TableSpec) -> list[str]:
    """Differences of two runs of one target that forbid pooling; weights are one unless these are seeds."""
    different = _different(first, second, ("target.",))
    for name in spec.methods:
        ours, theirs = first.methods.get(name), second.methods.get(name)
        if (ours is None) != (theirs is None):
            different.append(f"their methods ({name})")
        elif ours is not None and theirs is not None:
            others = _identity(theirs, spec)
            different += [
                f"the {field} of {name}" for field, one in _identity(ours, spec).items() if one != others[field]
            ]
    return different


def _identity(method: MethodInfo, spec: TableSpec) -> dict[str, object]:
    fields: dict[str, object] = {name: method[name] for name in _IDENTITY}
    weights = {"weights_sha256": method["weights_sha256"]} if spec.has_tasks else {}
    return {**fields, **weights, "training steps": method["training"] and method["training"]["steps"]}
