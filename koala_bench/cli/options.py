"""The options that commands share, each written once, and the preset that they choose together."""

# ruff: noqa: RUF009 - _shared gives a field

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from koala_bench.common.bundled import shipped_heads
from koala_bench.errors import KoalaBenchError
from koala_bench.presets import Preset, load_preset, preset_names, toml_value, usual_methods


def option(name: str, help: str, panel: str | None = None, **limits: Any) -> Any:
    """A command's option: its name, what --help says of it, and under which heading."""
    return typer.Option(name, help=help, rich_help_panel=panel, **limits)


def argument(help: str, **limits: Any) -> Any:
    """A command's positional argument."""
    return typer.Argument(help=help, **limits)


_MODEL, _HEADS, _QUESTIONS, _RUN = "Target", "Methods", "Questions and answers", "Run"

Heads = Annotated[
    Path | None, option("--heads", "Folder of trained heads, or 'shipped': those that come with the preset.", _HEADS)
]
Processes = Annotated[
    int, option("--processes", "How often to evaluate, each time in a fresh process; all are pooled.", _RUN, min=1)
]
DrawSeed = Annotated[
    int | None, option("--seed", "Random seed of the order of methods and of sampling.", _RUN, min=0, max=2**31 - 1)
]
LogWith = Annotated[
    str | None, option("--log-with", "tensorboard or wandb: curves of the training go there too.", _RUN)
]


KeepStates = Annotated[
    bool, option("--keep-states", "Leave the target's stored states on disk for further trainings.", _RUN)
]


def _shared(panel: str, help: str, default: Any = None, name: str = "", **limits: Any) -> Any:
    """A field of ``Shared``: an option that is called like it, unless it has another ``name``."""
    return field(default=default, metadata={"panel": panel, "help": help, "name": name, "limits": limits})


@dataclass(frozen=True, kw_only=True)
class Shared:
    """The shared options as typed. A command has some of them; the others keep their defaults."""

    preset: str = _shared(_MODEL, f"{', '.join(preset_names())}, or a .toml file.", "tiny")
    target: str | None = _shared(
        _MODEL, "Any causal LM in place of the preset's: hub id, folder, FILE.gguf, or package:MODULE/FILE.gguf."
    )
    device: str | None = _shared(_MODEL, "auto, cpu, cuda or cuda:N.")
    dtype: str | None = _shared(_MODEL, "auto, float64, float32, bfloat16 or float16.")
    attention: str | None = _shared(_MODEL, "sdpa or eager.")
    engine: str | None = _shared(
        _MODEL, "eager calls the model, graph replays recorded passes; auto: graph on the CPU."
    )
    methods: str | None = _shared(
        _HEADS, "Comma-separated, e.g. vanilla,eagle,eagle+koala; by default those that the preset marks usual."
    )
    layers: int | None = _shared(_HEADS, "K, the number of layers of every head.", min=1)
    tree: str | None = _shared(
        _HEADS, "Draft tree of every method: a name such as medusa/mc_sim_7b_63, chain-4, 4x2x1, or a .json file."
    )
    questions: str | None = _shared(
        _QUESTIONS,
        "bundled, chat, a name such as mt_bench in the data folder, a file in its format, or A|B: the first available.",
    )
    limit: int | None = _shared(_QUESTIONS, "Only the first questions of each category.", min=1)
    repeats: int | None = _shared(_QUESTIONS, "How often every question is answered.", min=1)
    max_new_tokens: int | None = _shared(_QUESTIONS, "Length limit of an answer.", min=1)
    temperature: float | None = _shared(
        _QUESTIONS, "0 decodes greedily; above, drafts and target are sampled from, losslessly.", min=0
    )
    top_k: int | None = _shared(
        _QUESTIONS, "Above temperature 0, of target and drafts alike: only the k likeliest tokens.", min=0
    )
    top_p: float | None = _shared(
        _QUESTIONS, "Above temperature 0, of target and drafts alike: the fewest tokens that have this probability."
    )
    stop: list[str] | None = _shared(
        _QUESTIONS, "A text that ends an answer, besides the target's and the template's; may be repeated."
    )
    data_dir: Path | None = _shared(_QUESTIONS, "Folder of question files; KOALA_BENCH_DATA by default.")
    seed: int | None = _shared(
        _RUN, "Random seed of the heads' weights, the order of the data and the noise.", min=0, max=2**31 - 1
    )
    out: Path | None = _shared(_RUN, "Folder for heads, records and tables.")
    quick: bool = _shared(_RUN, "Reduced size: only to see that everything works, not for its numbers.", False)
    settings: list[str] | None = _shared(
        _RUN, "Override of the preset, section.key=value; may be repeated.", name="--set"
    )

    def resolved(self) -> Preset:
        """The preset with the options' values in place; an option wins over --quick, --set over both.

        Another target is not the file that the preset pins. It brings its own chat template, unless a preset of the
        user's own names one.
        """
        given = [(key, getattr(self, field)) for field, key in _KEYS.items()]
        overrides = [f"{key}={_toml(value)}" for key, value in given if value not in (None, [])]
        own = {"layers": self.layers, "tree": self.tree}
        of_methods = [f"{key}={_toml(value)}" for key, value in own.items() if value is not None]
        for method in load_preset(self.preset).methods if of_methods else ():
            overrides += [f'methods."{method}".{assignment}' for assignment in of_methods]
        settings = self.settings or []
        if self.target is not None:
            found = load_preset(self.preset, [*overrides, *settings], self.quick)
            overrides += [f"target.name={_toml(self.target)}", *self._of_another(found, self.target)]
        return load_preset(self.preset, [*overrides, *settings], self.quick)

    def _of_another(self, preset: Preset, target: str) -> list[str]:
        """What --target says besides the name: nothing where it names the preset's own target."""
        if preset.target.name == target:
            return []
        named = self.preset.endswith(".toml") and "chat_template" in preset.target.model_fields_set
        return ['target.weights_sha256=""', *([] if named else ["target.chat_template=auto"])]

    def folder(self, kind: str, preset: Preset) -> Path:
        """The folder of --out, or one named after what is run.

        Raises:
            KoalaBenchError: --out names a record.
        """
        if self.out is not None and self.out.suffix == ".jsonl":
            raise KoalaBenchError(
                f"--out {self.out} is the name of a file.", "Name a folder; the record is its records.jsonl."
            )
        return self.out if self.out is not None else default_folder(kind, preset, self.quick)

    def heads(self, given: Path | None, preset: Preset) -> Path:
        """The folder of --heads; that of ``reproduce table1`` by default.

        Raises:
            KoalaBenchError: none ship for the preset.
        """
        if given == Path("shipped"):
            return shipped_heads(self.preset)
        return given or default_folder("table1", preset, self.quick) / "heads"


# Where each option stands in a preset, but for --target, which brings a chat template too.
_KEYS = {
    "device": "target.device",
    "dtype": "target.dtype",
    "attention": "target.attention",
    "engine": "target.engine",
    "seed": "training.seed",
    "max_new_tokens": "evaluation.max_new_tokens",
    "questions": "evaluation.questions",
    "limit": "evaluation.limit",
    "repeats": "evaluation.repeats",
    "temperature": "evaluation.temperature",
    "top_k": "evaluation.top_k",
    "top_p": "evaluation.top_p",
    "stop": "evaluation.stop",
}

# Sets of shared options, by name.
TARGET = ("preset", "target", "device", "settings")
PASS = (*TARGET, "dtype", "attention", "engine")
DECODING = (*PASS, "methods", "tree")
TRAINING = (*TARGET, "dtype", "attention", "seed", "methods", "layers", "out", "quick")
EVERYTHING = tuple(field.name for field in fields(Shared))


def with_shared(run: Callable[..., None], names: Sequence[str]) -> Callable[..., None]:
    """A command with its own options and some fields of ``Shared``, which it takes first, as typer reads it."""
    if not names:
        return run
    own, types = get_type_hints(run, include_extras=True), get_type_hints(Shared)
    first, *rest = inspect.signature(run).parameters.values()
    shared_parameters, hints = [], {each.name: own[each.name] for each in rest}
    for each in (each for each in fields(Shared) if each.name in names):
        said = each.metadata
        name = said["name"] or f"--{each.name.replace('_', '-')}"
        hints[each.name] = Annotated[types[each.name], option(name, said["help"], said["panel"], **said["limits"])]
        shared_parameters.append(inspect.Parameter(each.name, inspect.Parameter.KEYWORD_ONLY, default=each.default))
    if len(hints) < len(rest) + len(shared_parameters) or own[first.name] is not Shared:
        raise TypeError(f"{run.__name__} takes a Shared first, and no option twice")
    parameters = [
        each.replace(annotation=hints[each.name], kind=inspect.Parameter.KEYWORD_ONLY)
        for each in (*rest, *shared_parameters)
    ]

    @wraps(run)
    def command(**values: Any) -> None:
        run(Shared(**{name: values.pop(name) for name in names}), **values)

    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = hints
    return command


def _toml(value: float | str | list[str]) -> str:
    # A JSON string is a TOML string too, unless it spells characters beyond U+FFFF as two.
    return str(value) if isinstance(value, (int, float)) else json.dumps(value, ensure_ascii=False)


def split_names(text: str) -> list[str]:
    """The names of a comma-separated option."""
    return [name.strip() for name in text.split(",") if name.strip()]


def method_names(preset: Preset, methods: str | None) -> list[str]:
    """The methods of --methods, or those that the preset marks usual.

    Raises:
        KoalaBenchError: the preset has no such method, one is named twice, or none is.
    """
    names = split_names(methods) if methods is not None else usual_methods(preset)
    if not names:
        raise KoalaBenchError(
            f"--methods '{methods}' names no method.", f"The preset has: {', '.join(['vanilla', *preset.methods])}."
        )
    if len(set(names)) != len(names):
        raise KoalaBenchError(f"--methods {methods} names a method twice.", "Name each once.")
    for name in names:
        if name != "vanilla":
            preset.method(name)
    return names


def head_options(assignments: Sequence[str]) -> dict[str, Any]:
    """Options of a head from ``key=value``, values as in TOML.

    Raises:
        KoalaBenchError: an assignment is none.
    """
    options = {}
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not equals or not key.strip().isidentifier():
            raise KoalaBenchError(
                f"'{assignment}' is not an option of a head.", "Write --option key=value, e.g. --option layers=2."
            )
        options[key.strip()] = toml_value(text.strip())
    return options


def default_folder(kind: str, preset: Preset, quick: bool) -> Path:
    """Where a run writes that has no --out."""
    target = Path(preset.target.name).name
    usual = ("bundled",) if preset.target.name == "tiny" else ("mt_bench", "mt_bench|chat")  # need no mention
    questions = "" if preset.evaluation.questions in usual else f"-{Path(preset.evaluation.questions).stem}"
    sampled = f"-t{preset.evaluation.temperature:g}" if preset.evaluation.temperature else ""
    return Path("results") / "runs" / f"{kind}-{target}{questions}{sampled}{'-quick' if quick else ''}"


def typed_command() -> list[str]:
    """The command as a user would type it again, without this machine's paths."""
    return [Path(sys.argv[0]).name, *sys.argv[1:]]
