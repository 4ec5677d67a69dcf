"""The grid file of a sweep: a preset, a baseline, a method, and the settings to try."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from koala_bench.common.reading import first_problem, read_toml
from koala_bench.errors import KoalaBenchError
from koala_bench.presets import MethodPreset, Positive, Preset

Seed = Annotated[int, Field(ge=0, lt=2**31)]


class SweepGrid(BaseModel):
    """Contents of a grid file.

    Attributes:
        preset, overrides: shared by all heads; overrides as for ``--set``.
        baseline, method: methods of the preset; every trial is ``method`` with changed settings.
        seeds: training seeds of every trial.
        confirm_seeds: further seeds for the best trial and the baseline.
        prompts, confirm_prompts: numbers of held-out prompts for the search, and of others for confirmation.
        new_tokens, depth: limit of an answer, and depth of the drafted chains.
        arms: heads trained together; by default as many as free memory allows.
        axes: values of each setting, tried in every combination.
        trial: settings tried one by one.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    preset: str
    overrides: tuple[str, ...] = ()
    baseline: str
    method: str
    seeds: Annotated[tuple[Seed, ...], Field(min_length=1)]
    confirm_seeds: tuple[Seed, ...] = ()
    prompts: Positive = 40
    confirm_prompts: Positive = 40
    new_tokens: Positive = 64
    depth: Positive = 4
    arms: Positive | None = None
    axes: dict[str, Any] = {}
    trial: tuple[dict[str, Any], ...] = ()


@dataclass(frozen=True)
class Trial:
    """One method that is trained.

    Attributes:
        name: contains a hash of all settings, so that a changed grid recognises the trial.
        label: its changed settings.
    """

    name: str
    label: str
    preset: MethodPreset


def read_grid(path: Path) -> SweepGrid:
    """Read a grid file.

    Raises:
        KoalaBenchError: the file is missing, is no TOML, or an entry is unknown or of the wrong kind.
    """
    grid = read_toml(path, "grid", SweepGrid, "Name a file such as reproduce/sweeps/eagle.toml.")
    every = [*grid.seeds, *grid.confirm_seeds]
    if twice := sorted({seed for seed in every if every.count(seed) > 1}):
        raise KoalaBenchError(
            f"Grid {path}: seed {twice[0]} is there twice.", "Confirm on seeds that the search has not seen."
        )
    return grid


def trials_of(grid: SweepGrid, preset: Preset) -> tuple[Trial, list[Trial]]:
    """The baseline, and the trials in the order of the file: single ones first, then the product of the axes.

    Raises:
        KoalaBenchError: nothing to try, a setting that a method has not, or the same trial twice.
    """
    baseline = _named(preset.method(grid.baseline), grid.baseline, "baseline")
    base = preset.method(grid.method)
    trials: dict[str, Trial] = {}
    for settings in _settings(grid):
        trial = _named(_changed(base, settings), _label(settings), "trial")
        if trial.name in trials:
            raise KoalaBenchError(f"The grid has the trial '{trial.label}' twice.", "Leave one of them out.")
        trials[trial.name] = trial
    if not trials:
        raise KoalaBenchError("The grid has nothing to try.", "Give [axes] or [[trial]] tables.")
    return baseline, list(trials.values())


def _settings(grid: SweepGrid) -> Iterator[dict[str, Any]]:
    yield from (dict(_flat(trial)) for trial in grid.trial)
    axes = dict(_flat(grid.axes))
    for key, values in axes.items():
        if not isinstance(values, list) or not values:
            raise KoalaBenchError(f"The axis '{key}' is {values!r}.", "Give a list of the values to try.")
    if axes:
        yield from (dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values()))


def _flat(table: dict[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """Settings by dotted key, whether the file quotes the key, dots it or nests tables."""
    for key, value in table.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{above}{key}.")
        else:
            yield f"{above}{key}", value


def _changed(base: MethodPreset, settings: dict[str, Any]) -> MethodPreset:
    values = base.model_dump()
    for key, value in settings.items():
        place, parts = values, key.split(".")
        known = parts[0] in MethodPreset.model_fields and parts[0] != "tree"
        if not known or len(parts) != (2 if parts[0].endswith("options") else 1):
            raise KoalaBenchError(
                f"'{key}' is not a setting of a method that can be tried.",
                "Use layers, learning_rate, objective, options.X or objective_options.X; what is the same for all goes"
                " to overrides.",
            )
        for part in parts[:-1]:
            place = place[part]
        place[parts[-1]] = value
    try:
        return MethodPreset.model_validate(values)
    except ValidationError as error:
        raise KoalaBenchError(
            f"The trial '{_label(settings)}', {first_problem(error, 'setting')}.", "Correct the grid."
        ) from error


def _label(settings: dict[str, Any]) -> str:
    parts = (
        f"{key.rpartition('.')[2]} = {value if isinstance(value, str) else json.dumps(value)}"
        for key, value in settings.items()
    )
    return ", ".join(parts) or "as in the preset"


def _named(method: MethodPreset, label: str, kind: str) -> Trial:
    """The tree is not part of a trial: nothing is decoded with it."""
    content = json.dumps(method.model_dump(mode="json", exclude={"tree"}), sort_keys=True)
    return Trial(f"{kind}-{hashlib.sha256(content.encode()).hexdigest()[:8]}", label, method)
