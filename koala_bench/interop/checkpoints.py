"""Checkpoints of the official implementations: what all readers of them share.

A reader is strict: every tensor of the file is accounted for, by name and by shape, before anything is built. The
official loaders are not (``strict=False``), so a file of another layout passes there unnoticed.
"""

from __future__ import annotations

import json
import math
import re
import reprlib
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field, TypeAdapter, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file

from koala_bench.common.draft_vocabulary import BUFFER
from koala_bench.common.files import cannot
from koala_bench.common.reading import first_problem
from koala_bench.errors import KoalaBenchError
from koala_bench.heads import TargetSpec
from koala_bench.training.checkpoints import DAMAGE, build_head_of

_WEIGHTS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)  # coarser ones mean nothing without scales
_LARGEST = 2**31 - 1
_MISSING: Any = object()
_AGAIN = "Copy or download the file again."
INDEX = ".index.json"  # how the names of indices end that say which shard holds which tensor
_NAMED = 4  # names listed in an error before it says how many more there are


@dataclass(frozen=True)
class Imported:
    """A checkpoint in the layout of this project.

    Attributes:
        options: the head's options, as the file and its configuration imply them.
        tensors: what fills the head's ``state_dict``, weights in float32.
        notes: what a person may want to know about the file, a sentence each.
    """

    head: str
    options: dict[str, Any]
    tensors: dict[str, torch.Tensor]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Exported:
    """A head in another system's format.

    Attributes:
        file: name of the file of tensors; what it ends in says how it is written.
        tensors: by the names of that system.
        config: contents of its ``config.json``.
        notes: what a person has to know to use it, a sentence each.
    """

    file: str
    tensors: dict[str, torch.Tensor]
    config: dict[str, Any]
    notes: tuple[str, ...] = ()


class Fields(dict[str, Any]):
    """The contents of a file by name; a name that is not there is an error with the file's path.

    The methods read a field of a configuration: what the file holds there, or ``default`` where it holds nothing.
    Raises KoalaBenchError where the field is missing and has no default, or holds another kind of value."""

    def __init__(self, path: Path, contents: Mapping[str, Any]) -> None:
        super().__init__(contents)
        self.path = path

    def __missing__(self, key: str) -> Any:
        raise KoalaBenchError(
            f"{self.path} has no '{key}'.", "Check that the file is of the expected kind and complete."
        )

    def whole(self, key: str, default: int = _MISSING, least: int = 1) -> int:
        """A whole number of at least ``least``, within the range of plausible sizes."""
        return int(self._read(key, default, Annotated[int, Field(ge=least, le=_LARGEST)]))

    def number(self, key: str, default: float = _MISSING) -> float:
        """A positive number that a float can hold."""
        return float(self._read(key, default, Annotated[float, Field(gt=0, lt=math.inf)]))

    def truth(self, key: str, default: bool = _MISSING) -> bool:
        """A boolean, not a value that is merely truthy or falsy."""
        return bool(self._read(key, default, bool))

    def text(self, key: str, default: str = _MISSING) -> str:
        return str(self._read(key, default, str))

    def wholes(self, key: str) -> list[int]:
        """A list of whole numbers; empty where it is missing or null."""
        return list(self._read(key, None, list[int] | None) or [])

    def part(self, key: str) -> Fields:
        """The fields of a nested object; none where it is missing or null."""
        return Fields(self.path, self._read(key, None, dict[str, Any] | None) or {})

    def given(self, key: str) -> bool:
        """Whether a field is there and not null, which leaves a value to the reader."""
        return self.get(key) is not None

    def disagreement(self, found: Mapping[str, int | str], where: str = "file") -> list[str]:
        """Fields that disagree with what was found elsewhere, a sentence each."""
        said: dict[str, Any] = {}
        for name, value in found.items():
            counts = isinstance(value, int) and not isinstance(value, bool)
            kind = Annotated[int, Field(ge=min(int(value), 1), le=_LARGEST)] if counts else type(value)
            said[name] = self._read(name, value, kind)
        return [
            f"{self.path.name} says {name} {said[name]}, the {where} has {value}."
            for name, value in found.items()
            if said[name] != value
        ]

    def _read(self, key: str, default: Any, kind: Any) -> Any:
        value = self[key] if default is _MISSING else self.get(key, default)
        try:
            return TypeAdapter(kind).validate_python(value, strict=True)
        except ValidationError as error:
            problem = f"{self.path}: {key} is {reprlib.repr(value)}, {first_problem(error)}."
            raise KoalaBenchError(problem, _AGAIN) from error


def first_of(folder: Path, *names: str) -> Path:
    """The first of some files that exists in a folder. Raises KoalaBenchError where there is no such folder, or none of
    the files."""
    found = next((folder / name for name in names if (folder / name).is_file()), None)
    if found is None:
        fault = f"{folder} holds no {' or '.join(names)}." if folder.is_dir() else f"There is no folder {folder}."
        raise KoalaBenchError(fault, "Give the folder of a downloaded checkpoint.")
    return found


def read_json(path: Path) -> Fields:
    """A JSON object; all objects within it are ``Fields`` too. Raises KoalaBenchError where the file cannot be read, or
    is no JSON object."""
    try:
        contents = json.loads(path.read_text(encoding="utf-8"), object_hook=lambda found: Fields(path, found))
    except OSError as error:
        raise cannot("read", path, error, _AGAIN) from error
    except (ValueError, RecursionError) as error:  # bad UTF-8, bad JSON, nested too deep
        raise KoalaBenchError(f"{path} is no JSON file: {error}.", _AGAIN) from error
    if not isinstance(contents, Fields):
        raise KoalaBenchError(f"{path} holds no JSON object.", _AGAIN)
    return contents


def read_config_of(folder: Path) -> Fields:
    """The ``config.json`` of a folder; no fields where there is none."""
    path = folder / "config.json"
    return read_json(path) if path.is_file() else Fields(path, {})


def read_tensors(path: Path) -> Fields:
    """All tensors of a ``.safetensors`` file, of a pickled state dict, or of the shards that an index names, on the
    CPU, as they are stored. Raises KoalaBenchError where the file cannot be read, or a pickle holds anything but
    tensors by name, all of them dense."""
    if path.name.endswith(INDEX):
        return _read_shards(path)
    try:
        # weights_only: a pickle may run any code, and these files come from strangers.
        contents = (
            load_file(path)
            if path.suffix == ".safetensors"
            else torch.load(path, map_location="cpu", weights_only=True)
        )
    except OSError as error:
        raise cannot("read", path, error, _AGAIN) from error
    except (SafetensorError, *DAMAGE) as error:
        fault = f"{path} is damaged or holds more than tensors ({type(error).__name__})."
        raise KoalaBenchError(fault, _AGAIN) from error
    if not isinstance(contents, dict) or not all(
        isinstance(name, str) and isinstance(tensor, torch.Tensor) for name, tensor in contents.items()
    ):
        raise KoalaBenchError(f"{path} holds more than tensors by name.", "Give a plain state dict.")
    dense = {
        name: each.layout == torch.strided and not each.is_nested and not each.is_meta
        for name, each in contents.items()
    }
    if other := sorted(name for name, is_dense in dense.items() if not is_dense):
        raise KoalaBenchError(
            f"{path} holds no dense tensor in {_some(other)}.",
            "Give dense tensors: neither sparse, nested nor without data.",
        )
    return Fields(path, contents)


def _read_shards(index: Path) -> Fields:
    names = read_json(index).part("weight_map")
    if not names or not all(isinstance(file, str) and Path(file).name == file for file in names.values()):
        raise KoalaBenchError(f"{index} names no files beside it.", _AGAIN)
    found: dict[str, torch.Tensor] = {}
    for file in sorted(set(names.values())):
        found |= read_tensors(index.with_name(file))
    if missing := sorted(names.keys() - found.keys()):
        raise KoalaBenchError(f"The shards of {index} miss {_some(missing)}.", "Download all of them again.")
    return Fields(index, found)


def numbers_in(tensors: Fields, pattern: re.Pattern[str]) -> list[tuple[int, ...]]:
    """The numbers in the names that have this form."""
    return [tuple(map(int, found.groups())) for name in tensors if (found := pattern.fullmatch(name))]


def count_of(tensors: Fields, what: str, numbers: Iterable[int]) -> int:
    """How many there are of something that keys number from 0 on; told before anything is made for each of them. Raises
    KoalaBenchError where there is a gap between the numbers."""
    found = set(numbers)
    if gap := set(range(len(found))) - found:
        raise KoalaBenchError(
            f"{tensors.path} has a {what} {max(found)}, but no {what} {min(gap)}.",
            "Give the official file, complete and with its own keys.",
        )
    return len(found)


def check_layout(
    tensors: Fields, wanted: Mapping[str, tuple[int, ...]], hint: str = "", no_weights: Container[str] = ()
) -> None:
    """Compare names and shapes with the expected ones.

    Args:
        no_weights: names of tensors that need not be of floating-point numbers.
        hint: a sentence to add to the error, for layouts that are known to be mistaken for this one.

    Raises:
        KoalaBenchError: something is missing, too many, of another shape or dtype, or not finite; all of it in one
            message.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    there = sorted(wanted.keys() & shapes.keys())
    weights = [name for name in there if name not in no_weights]
    floating = [name for name in weights if tensors[name].dtype in _WEIGHTS]
    odd = [f"{each} of {str(tensors[each].dtype).removeprefix('torch.')}" for each in weights if each not in floating]
    faults = {
        "misses {}": sorted(wanted.keys() - shapes.keys()),
        "has an unknown {}": sorted(shapes.keys() - wanted.keys()),
        "has {}": [
            f"{name} of shape {list(shapes[name])} instead of {list(wanted[name])}"
            for name in there
            if shapes[name] != wanted[name]
        ],
        "has {} instead of floating-point numbers of 16 to 64 bits": odd,
        # A shape that is wrong may also be one that no memory can hold, of a number that is repeated.
        "has values that are not finite in {}": [
            name for name in floating if shapes[name] == wanted[name] and not torch.isfinite(tensors[name]).all()
        ],
    }
    if said := [words.format(_some(names)) for words, names in faults.items() if names]:
        raise KoalaBenchError(
            f"{tensors.path} {'; '.join(said)}.",
            hint or "Give a checkpoint of the official layout that was made for this target.",
        )


def make_head(imported: Imported, spec: TargetSpec, **options: Any) -> Any:
    """Build the registered head of a checkpoint for a target, in evaluation mode, where and in what the target
    computes.

    Args:
        options: of the head, beside those of the checkpoint or instead of them.

    Raises:
        KoalaBenchError: the head is not installed, or the checkpoint was made for a target of other sizes.
    """
    if BUFFER in imported.tensors and spec.cut is not None:
        spec = spec.cut(imported.tensors[BUFFER])
    head = build_head_of(spec, imported.head, {**imported.options, **options})
    try:
        head.load_state_dict(imported.tensors)
    except RuntimeError as error:
        raise KoalaBenchError(
            f"The checkpoint does not fit the head '{imported.head}' of this target:"
            f" {str(error).splitlines()[-1].strip()}",
            "Use the target it was made for.",
        ) from error
    return head.to(device=spec.device, dtype=spec.dtype).eval()


def _some(names: list[str]) -> str:
    return ", ".join(names[:_NAMED]) + (f" and {len(names) - _NAMED} more" if len(names) > _NAMED else "")
