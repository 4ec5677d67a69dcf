"""Presets: everything that decides a run's numbers, in one strict TOML file per target.

A misspelt key is an error, an override is ``section.key=value``, and the resolved preset is kept with the records
together with its hash.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import tomllib
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from koala_bench.errors import KoalaBenchError

Positive = Annotated[int, Field(gt=0)]
Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Momentum = Annotated[float, Field(ge=0, lt=1)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class TargetPreset(_Strict):
    """The model whose output must not change."""

    name: str  # hub id, folder, or a bundled target
    revision: str | None = None
    chat_template: str = "vicuna_v1.1"
    device: str = "auto"
    dtype: str = "auto"
    attention: str = "sdpa"


class DataPreset(_Strict):
    """What heads are trained on: the documentation corpus, or files of conversations."""

    source: str = "documentation"
    max_tokens: Positive = 2048
    limit: Positive | None = None  # only the first dialogues; the corpus comes shuffled, files in their own order
    held_out: Positive = 64  # dialogues kept for held-out loss
    probes: Positive = 12  # held-out prompts decoded to measure acceptance during training


class TrainingPreset(_Strict):
    """How every head of a run is trained. Rates may be overridden by a method."""

    steps: Positive
    batch_tokens: Positive
    learning_rate: Rate
    warmup_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.05
    final_rate_fraction: Annotated[float, Field(ge=0, le=1)] = 0.0
    betas: tuple[Momentum, Momentum] = (0.9, 0.95)
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    clip_norm: Rate = 1.0
    precision: Literal["no", "bf16", "fp16"] = "no"  # accelerate's mixed precision
    held_out_evaluations: Positive = 4
    checkpoint_every: Positive = 100
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0


class MethodPreset(_Strict):
    """A head with its options, its objective and its tree."""

    head: str
    layers: Positive = 1
    options: dict[str, Any] = {}
    objective: str | None = None
    objective_options: dict[str, Any] = {}
    tree: str
    learning_rate: Rate | None = None


class EvaluationPreset(_Strict):
    """What is decoded and how often."""

    questions: str = "bundled"
    limit: Positive | None = None  # only the first questions of each category
    max_new_tokens: Positive = 1024
    warmup: Annotated[int, Field(ge=0)] = 3
    repeats: Positive = 1


class Preset(_Strict):
    """A whole experiment, from target to table."""

    target: TargetPreset
    data: DataPreset = DataPreset()
    training: TrainingPreset
    evaluation: EvaluationPreset = EvaluationPreset()
    methods: dict[str, MethodPreset]
    quick: tuple[str, ...] = ()  # overrides of --quick, as for --set

    @property
    def sha256(self) -> str:
        """Hash of the resolved values, whatever file and overrides they came from; see ``resolved_sha256``."""
        return resolved_sha256(self.model_dump(mode="json"))

    def method(self, name: str) -> MethodPreset:
        """One method by name.

        Raises:
            KoalaBenchError: the preset has no such method.
        """
        if name not in self.methods:
            known = ["vanilla", *self.methods]
            close = difflib.get_close_matches(name, known, n=3)
            raise KoalaBenchError(f"Unknown method '{name}'.", f"Did you mean {', '.join(close)}?" if close else f"The preset has: {', '.join(known)}.")
        return self.methods[name]


# Where files lie is this machine's business: the hashes of target, questions and training data are in the record.
_PLACES = {("quick",), ("target", "name"), ("data", "source"), ("evaluation", "questions")}


def resolved_sha256(resolved: dict[str, Any]) -> str:
    """Hash of a preset's values as a record keeps them, without the names of files and models."""
    values = {
        section: {key: value for key, value in content.items() if (section, key) not in _PLACES} if isinstance(content, dict) else content
        for section, content in resolved.items()
        if (section,) not in _PLACES
    }
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def preset_names() -> list[str]:
    """Names of the presets that ship with the project."""
    return sorted(path.name.removesuffix(".toml") for path in (resources.files("koala_bench") / "presets").iterdir() if path.name.endswith(".toml"))


def _value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _override(values: dict[str, Any], assignment: str) -> None:
    key, equals, text = assignment.partition("=")
    if not equals or not key.strip():
        raise KoalaBenchError(f"'{assignment}' is not an override.", "Write --set section.key=value, e.g. --set training.steps=200.")
    parts = _key_parts(key.strip())
    for part in parts[:-1]:
        values = values.setdefault(part, {})
        if not isinstance(values, dict):
            raise KoalaBenchError(f"'{key}' goes below a value.", "Write --set section.key=value.")
    values[parts[-1]] = _value(text.strip())


def _key_parts(key: str) -> list[str]:
    # Method names may be quoted as in TOML: methods."eagle+koala".layers
    if '"' not in key:
        return key.split(".")
    try:
        found = tomllib.loads(f"{key} = 0")
    except tomllib.TOMLDecodeError as error:
        raise KoalaBenchError(f"'{key}' is not a key: {error}.", "Quote a method as in --set 'methods.\"eagle+koala\".layers=2'.") from error
    parts = []
    while isinstance(found, dict):
        part, found = next(iter(found.items()))
        parts.append(part)
    return parts


def load_preset(name: str, overrides: Sequence[str] = (), quick: bool = False) -> Preset:
    """Read a bundled preset or a TOML file, apply overrides in order, and check everything.

    Args:
        overrides: assignments ``section.key=value``.
        quick: apply the preset's own overrides for a reduced run first.

    Raises:
        KoalaBenchError: unknown preset, broken TOML, an unknown key or a value of the wrong kind.
    """
    if name.endswith(".toml"):
        try:
            text = Path(name).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise KoalaBenchError(f"Cannot read the preset {name}: {error}.", "Check --preset.") from error
    elif name in preset_names():
        text = (resources.files("koala_bench") / "presets" / f"{name}.toml").read_text(encoding="utf-8")
    else:
        close = difflib.get_close_matches(name, preset_names(), n=3)
        raise KoalaBenchError(
            f"Unknown preset '{name}'.", f"Did you mean {', '.join(close)}?" if close else f"Use {', '.join(preset_names())} or a .toml file."
        )
    try:
        values = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise KoalaBenchError(f"The preset {name} is not valid TOML: {error}.", "Mend the file.") from error
    if quick and not values.get("quick"):
        raise KoalaBenchError(f"The preset {name} has no quick form.", "Leave --quick away, or shrink it with --set and --limit.")
    for assignment in [*(values.get("quick", []) if quick else []), *overrides]:
        _override(values, assignment)
    try:
        return Preset.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise KoalaBenchError(f"Preset {name}, {place}: {first['msg']}.", "Correct the file or the --set option.") from error
