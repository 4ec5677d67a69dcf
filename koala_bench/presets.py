"""Presets: everything that decides a run's numbers, in one strict TOML file per target.

A misspelt key is an error, an override is ``section.key=value``, and the resolved preset is kept with the records
together with its hash.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import re
import tomllib
from collections import Counter
from collections.abc import Sequence
from datetime import date
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)

from koala_bench.common.reading import first_problem, nearest_known
from koala_bench.common.suggestions import did_you_mean
from koala_bench.errors import KoalaBenchError
from koala_bench.registry import HEADS, OBJECTIVES, installed, load

Positive = Annotated[int, Field(gt=0)]
Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]
_LATER = "added later"
Momentum = Annotated[float, Field(ge=0, lt=1)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    @model_serializer(mode="wrap")
    def _without_unset(self, values: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out later fields at their defaults, so that adding a field does not change the hash of old presets."""
        later = {name for name, field in type(self).model_fields.items() if _LATER in field.metadata}
        found: dict[str, Any] = values(self)
        return {
            key: value
            for key, value in found.items()
            if key not in later or getattr(self, key) != type(self).model_fields[key].get_default()
        }


class TargetPreset(_Strict):
    """The model whose output must not change."""

    name: str  # hub id, folder, a bundled target, or a GGUF file, see koala_bench.engine.loading.gguf
    weights_sha256: str = ""  # of the GGUF file that the preset was made for; another one is refused
    revision: str | None = None
    # A name of fschat's, tokenizer for its own, or auto for that where there is one.
    chat_template: str = "vicuna_v1.1"
    template_options: Annotated[dict[str, Any], _LATER] = {}  # arguments of its own template, such as enable_thinking
    # Told to a template that asks for today's; a fixed day if None.
    template_date: Annotated[date | None, _LATER] = None
    device: str = "auto"
    dtype: str = "auto"
    attention: str = "sdpa"
    engine: str = "auto"
    threads: Positive | None = None  # of the CPU while decoding; see koala_bench.engine.devices.pick_threads


class DataPreset(_Strict):
    """What heads are trained on: conversations, see ``koala_bench.dialogues.conversations``."""

    source: str = "bundled"  # what the bundled target answered, for its heads alone
    max_tokens: Positive = 2048
    limit: Positive | None = None  # only the first dialogues of the file
    held_out: Positive = 64  # dialogues kept for held-out loss
    probes: Positive = 12  # held-out prompts decoded to measure acceptance during training


class TrainingPreset(_Strict):
    """How every head of a run is trained. Rates may be overridden by a method."""

    steps: Positive
    batch_tokens: Positive
    micro_batches: Positive = 1  # of batch_tokens each, in one step; processes that train together share them out
    learning_rate: Rate
    warmup_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.05
    final_rate_fraction: Annotated[float, Field(ge=0, le=1)] = 0.0
    betas: tuple[Momentum, Momentum] = (0.9, 0.95)
    weight_decay: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    clip_norm: Rate = 1.0
    # Accelerate's mixed precision; auto: what this machine does faster, see koala_bench.training.precision.
    precision: Literal["auto", "no", "bf16"] = "auto"
    # The target's states are written to disk once, in half precision, and read from there.
    stored_states: Annotated[bool, _LATER] = False
    held_out_evaluations: Positive = 4
    checkpoint_every: Positive = 100
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0


class TypicalPreset(_Strict):
    """Medusa's typical acceptance, which is not lossless; at the temperature of the evaluation."""

    threshold: Annotated[float, Field(gt=0, le=1)] = 0.09
    alpha: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 0.3


class FirstPreset(_Strict):
    """A head with nothing to train that is asked before a method's own, see ``koala_bench.decoding.hybrid``."""

    head: str
    options: dict[str, Any] = {}
    tree: str


class MethodPreset(_Strict):
    """A head with its options, its objective and its tree."""

    head: str
    layers: Positive = 1
    options: dict[str, Any] = {}
    objective: str | None = None
    objective_options: dict[str, Any] = {}
    tree: str
    # How many of the target's tokens it can draft, the commonest of the training answers; all by default.
    draft_vocabulary: Annotated[Positive | None, _LATER] = None
    learning_rate: Rate | None = None
    head_of: str | None = None  # another method whose trained head this one decodes with
    # Drafts where it proposes something; the method's own head does elsewhere.
    first: Annotated[FirstPreset | None, _LATER] = None
    typical: TypicalPreset | None = None
    usual: bool = True  # whether a run takes it that names no methods


class EvaluationPreset(_Strict):
    """What is decoded and how often."""

    questions: str = "bundled"
    limit: Positive | None = None  # only the first questions of each category
    max_new_tokens: Positive = 1024
    warmup: Annotated[int, Field(ge=0)] = 3
    repeats: Positive = 1
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0  # of the order of the methods and of what is drawn while decoding
    temperature: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0  # 0 is greedy
    top_k: Annotated[int, Field(ge=0)] = 0  # 0 keeps all tokens
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    stop: Annotated[tuple[str, ...], _LATER] = ()  # texts that end an answer, besides what ends one anyhow

    @model_validator(mode="after")
    def _cut_of_a_distribution(self) -> Self:
        if self.temperature == 0 and (self.top_k or self.top_p < 1):
            raise ValueError("top_k and top_p cut a distribution, and temperature 0 has none")
        return self


class Preset(_Strict):
    """A whole experiment, from target to table."""

    target: TargetPreset
    data: DataPreset = DataPreset()
    training: TrainingPreset
    evaluation: EvaluationPreset = EvaluationPreset()
    methods: dict[str, MethodPreset]
    quick: tuple[str, ...] = ()  # overrides of --quick, as for --set

    @model_validator(mode="before")
    @classmethod
    def _same_head(cls, values: Any) -> Any:
        """A method that decodes with another's head has all of that one's settings, but for its tree and its
        acceptance.
        """
        methods = values.get("methods") if isinstance(values, dict) else None
        if not isinstance(methods, dict):
            return values
        filled = {name: _with_head_of(name, method, methods) for name, method in methods.items()}
        return {**values, "methods": filled}

    def trained_as(self, name: str) -> str:
        """The method whose trained head a method decodes with: its own, or that of ``head_of``."""
        return self.method(name).head_of or name

    @property
    def sha256(self) -> str:
        """Hash of the resolved values, whatever file and overrides they came from; see ``resolved_sha256``."""
        return resolved_sha256(self.model_dump(mode="json"))

    def method(self, name: str) -> MethodPreset:
        """One method by name; ``NAME+vocab8k`` is NAME's head, cut to the 8,192 commonest tokens of its training
        answers. Raises KoalaBenchError where the preset has no such method, or the head is of a cut vocabulary already.
        """
        if name not in self.methods and (cut := cut_of(name)) is not None:
            owner = self.method(cut[0])
            if owner.draft_vocabulary is not None:
                raise KoalaBenchError(
                    f"The head of {cut[0]} drafts {owner.draft_vocabulary:,} tokens already.",
                    "Cut a head of the whole vocabulary.",
                )
            return owner.model_copy(update={"head_of": owner.head_of or cut[0], "draft_vocabulary": cut[1]})
        if name not in self.methods:
            known = ["vanilla", *self.methods]
            raise KoalaBenchError(
                f"Unknown method '{name}'.", did_you_mean(name, known, f"The preset has: {', '.join(known)}.")
            )
        return self.methods[name]


_CUT = re.compile(r"(?P<base>.+)\+vocab(?P<count>[1-9]\d{0,8})(?P<thousands>k?)")


def cut_of(name: str) -> tuple[str, int] | None:
    """Base method and number of tokens of a method called ``BASE+vocabN`` or ``BASE+vocabNk``; None for other names."""
    found = _CUT.fullmatch(name)
    return None if found is None else (found["base"], int(found["count"]) * (1024 if found["thousands"] else 1))


_OF_TRAINING = ("head", "layers", "options", "objective", "objective_options", "learning_rate")


def _with_head_of(name: str, method: Any, methods: dict[str, Any]) -> Any:
    if not isinstance(method, dict) or method.get("head_of") is None:
        return method
    owner = methods.get(method["head_of"]) if isinstance(method["head_of"], str) else None
    if not isinstance(owner, dict) or owner.get("head_of") is not None:
        raise ValueError(f"{name}: head_of is {method['head_of']!r}, which is no method with a head of its own")
    own = {key: owner[key] for key in _OF_TRAINING if key in owner}
    if other := [key for key in _OF_TRAINING if key in method and method[key] != own.get(key)]:
        raise ValueError(f"{name} decodes with the head of {method['head_of']} and has another {other[0]}")
    drafted = owner.get("draft_vocabulary")
    if drafted is not None and method.get("draft_vocabulary", drafted) != drafted:
        raise ValueError(f"{name} cuts the vocabulary of {method['head_of']}, whose head was trained on a cut one")
    return {**own, "tree": owner.get("tree"), "draft_vocabulary": drafted, **method}


# Where files lie is this machine's business: the hashes of target, questions and training data are in the record.
_PLACES = {
    ("quick",),
    ("target", "name"),
    ("target", "weights_sha256"),
    ("data", "source"),
    ("evaluation", "questions"),
}


def resolved_sha256(resolved: dict[str, Any]) -> str:
    """Hash of a preset's values as a record keeps them, without the names of files and models."""
    values = {
        section: {key: value for key, value in content.items() if (section, key) not in _PLACES}
        if isinstance(content, dict)
        else content
        for section, content in resolved.items()
        if (section,) not in _PLACES
    }
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def preset_names() -> list[str]:
    """Names of the presets that ship with the project."""
    return sorted(
        path.name.removesuffix(".toml")
        for path in (resources.files("koala_bench") / "presets").iterdir()
        if path.name.endswith(".toml")
    )


def usual_methods(preset: Preset) -> list[str]:
    """The methods that a run takes where none is named: vanilla and those of the preset that it calls usual."""
    return ["vanilla", *(name for name, method in preset.methods.items() if method.usual)]


def with_heads(
    preset: Preset, names: Sequence[str], layers: int | None = None, tree: str | None = None
) -> tuple[Preset, list[str]]:
    """Let methods be named that the preset does not list: any head, alone or with ``+OBJECTIVE``.

    Where neither an option nor a listed sibling says otherwise, they get what the preset's own methods have in common:
    their usual tree, or a smaller one for a head that drafts less deep, and the layers and options that go with the
    objective.

    Args:
        names: of methods; a head is an installed name, ``package.module:Class`` or ``./file.py:Class``, and the method
            of the latter two is named after the class.
        layers, tree: of the added methods.

    Returns:
        the preset with these methods, and what ``names`` are called in it.

    Raises:
        KoalaBenchError: no such head or objective, or a class with the name of another method.
    """
    methods, called = dict(preset.methods), []
    for name in names:
        place, colon, rest = name.rpartition(":")
        if (
            name == "vanilla"
            or name in preset.methods
            or cut_of(name)
            or not (colon or _is_head(preset, rest.partition("+")[0]))
        ):
            called.append(name)  # whether it is known is asked later
            continue
        base, plus, objective = rest.partition("+")
        sibling = None if colon else methods.get(base)
        added = _added(preset, sibling, place + colon + base, objective if plus else None, layers, tree)
        if rest == "vanilla" or methods.get(rest, added) != added:
            raise KoalaBenchError(f"There is a method '{rest}' besides {name}.", "Give the class another name.")
        methods[rest] = added
        called.append(rest)
    return preset.model_copy(update={"methods": methods}), called


def _is_head(preset: Preset, name: str) -> bool:
    return name in preset.methods or name in installed(HEADS)


def _added(
    preset: Preset, sibling: MethodPreset | None, head: str, objective: str | None, layers: int | None, tree: str | None
) -> MethodPreset:
    """Settings of a method that the preset does not list; ``sibling`` is the same head without the objective, if
    listed.
    """
    from koala_bench.tree import load_template  # with torch, like the head itself

    if objective is not None:
        load(OBJECTIVES, objective)
    cls = load(HEADS, sibling.head if sibling else head)
    alike = [method for method in preset.methods.values() if method.objective == objective]
    if layers is None and "layers" in inspect.signature(cls).parameters:
        layers = Counter(method.layers for method in alike).most_common(1)[0][0] if alike else None
    # Of those that a run takes anyhow, if there are any: rivals that a preset also lists must not change the default.
    common = [method.tree for method in preset.methods.values() if method.usual]
    usual = [tree for tree, _ in Counter(common or [each.tree for each in preset.methods.values()]).most_common(1)]
    depth = getattr(cls, "max_depth", None)  # heads that only know it once they are made must fit the usual tree
    if not usual or (isinstance(depth, int) and load_template(usual[0]).depth > depth):
        usual = ["x".join(["3", *"1" * ((depth if isinstance(depth, int) else 2) - 1)])]
    settings = [method.objective_options for method in alike] if objective else []
    return MethodPreset(
        head=sibling.head if sibling else head,
        layers=layers or 1,
        options=sibling.options if sibling else {},
        objective=objective,
        objective_options={
            key: value for key, value in settings[0].items() if all(each.get(key) == value for each in settings)
        }
        if settings
        else {},
        tree=tree or (sibling.tree if sibling else str(getattr(cls, "usual_tree", usual[0]))),
        learning_rate=sibling.learning_rate if sibling else None,
    )


def toml_value(text: str) -> Any:
    """A value as TOML writes it, or the text itself where that is no TOML: ``4``, ``[1, 2]``, ``'x'`` and ``x``."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except (ValueError, RecursionError):  # no TOML, thousands of digits or of brackets
        return text


def _override(values: dict[str, Any], assignment: str) -> None:
    key, equals, text = assignment.partition("=")
    if not equals or not key.strip():
        raise KoalaBenchError(
            f"'{assignment}' is not an override.", "Write --set section.key=value, e.g. --set training.steps=200."
        )
    parts = _key_parts(key.strip())
    for part in parts[:-1]:
        values = values.setdefault(part, {})
        if not isinstance(values, dict):
            raise KoalaBenchError(f"'{key}' goes below a value.", "Write --set section.key=value.")
    values[parts[-1]] = toml_value(text.strip())


def _key_parts(key: str) -> list[str]:
    # Method names may be quoted as in TOML: methods."eagle+koala".layers
    if '"' not in key:
        return key.split(".")
    try:
        found = tomllib.loads(f"{key} = 0")
    except tomllib.TOMLDecodeError as error:
        raise KoalaBenchError(
            f"'{key}' is not a key: {error}.", "Quote a method as in --set 'methods.\"eagle+koala\".layers=2'."
        ) from error
    parts = []
    while isinstance(found, dict):
        part, found = next(iter(found.items()))
        parts.append(part)
    return parts


def _tables(name: str, above: tuple[str, ...] = ()) -> dict[str, Any]:
    """The tables of a preset, over those of the one it is ``based_on``; ``above`` are the presets based on it."""
    if name.endswith(".toml"):
        try:
            text = Path(name).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise KoalaBenchError(f"Cannot read the preset {name}: {error}.", "Check --preset.") from error
    elif name in preset_names():
        text = (resources.files("koala_bench") / "presets" / f"{name}.toml").read_text(encoding="utf-8")
    else:
        known = preset_names()
        raise KoalaBenchError(
            f"Unknown preset '{name}'.", did_you_mean(name, known, f"Use {', '.join(known)} or a .toml file.")
        )
    try:
        values = tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # no TOML, thousands of digits or of brackets
        raise KoalaBenchError(f"The preset {name} is not valid TOML: {error}.", "Mend the file.") from error
    base = values.pop("based_on", None)
    if base is None:
        return values
    if not isinstance(base, str) or base in (name, *above):
        raise KoalaBenchError(
            f"The preset {name} is based on {base!r}.", "Name another preset or .toml file that is not based on it."
        )
    return _over(_tables(base, (name, *above)), values)


def _over(below: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """Tables with the values of others in place of their own, key by key."""
    for key, value in values.items():
        own = below.get(key)
        below[key] = _over(own, value) if isinstance(own, dict) and isinstance(value, dict) else value
    return below


def load_preset(name: str, overrides: Sequence[str] = (), quick: bool = False) -> Preset:
    """Read a bundled preset or a TOML file, apply overrides in order, and check everything.

    A file with ``based_on = "PRESET"`` holds only what differs from that preset.

    Args:
        overrides: assignments ``section.key=value``.
        quick: apply the preset's own overrides for a reduced run first.

    Raises:
        KoalaBenchError: unknown preset, broken TOML, an unknown key or a value of the wrong kind.
    """
    values = _tables(name)
    if quick and not values.get("quick"):
        raise KoalaBenchError(
            f"The preset {name} has no quick form.", "Leave --quick away, or shrink it with --set and --limit."
        )
    own = values.get("quick", []) if quick else []
    if not isinstance(own, list) or not all(isinstance(assignment, str) for assignment in own):
        raise KoalaBenchError(
            f"Preset {name}: quick is no list of overrides.", 'Write quick = ["section.key=value", ...].'
        )
    for assignment in [*own, *overrides]:
        _override(values, assignment)
    try:
        return Preset.model_validate(values)
    except ValidationError as error:
        raise KoalaBenchError(
            f"Preset {name}, {first_problem(error, 'setting')}.",
            f"{nearest_known(error, Preset)}Correct the file or the --set option.",
        ) from error
