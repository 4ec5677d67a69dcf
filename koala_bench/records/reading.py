"""Reading run records, the one file that tables, figures and gates are made from, and comparing their headers.

What is written is validated first, so that a reader can rely on it; a reader still checks every line, because
files get edited and disks fail.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from koala_bench.common.reading import complete_lines, read_bytes
from koala_bench.errors import KoalaBenchError
from koala_bench.records.schema import (
    READABLE,
    SCHEMA,
    Key,
    MethodInfo,
    RunHeader,
    TurnLine,
    depths_by_method,
    end_problem,
    header_problem,
    key_of,
    of_today,
    turn_problem,
)


def short_name(target: str) -> str:
    """What labels call a target: the last name of a file or folder, without .gguf; a model of the hub as it is."""
    last = target.replace("\\", "/").rstrip("/").rpartition("/")[2]
    if target.endswith(".gguf"):
        return last.removesuffix(".gguf")
    return last if target.startswith((".", "/", "~")) or "\\" in target else target


def short_names(targets: Iterable[str]) -> dict[str, str]:
    """What one table or figure calls each of its targets: by ``short_name``, and where others have the same one by as
    much more of its path as tells them apart.
    """
    found = {target: short_name(target) for target in targets}
    while alike := [target for target in found if list(found.values()).count(found[target]) > 1]:
        longer = {target: _one_folder_more(target, found[target]) for target in alike}
        if all(longer[target] == found[target] for target in alike):
            return {**found, **{target: target for target in alike}}
        found |= longer
    return found


def _one_folder_more(target: str, name: str) -> str:
    """A path's name with the folder above it, or the name itself where nothing is above."""
    whole = target.replace("\\", "/").rstrip("/")
    above = whole.removesuffix(".gguf").removesuffix(name).rstrip("/")
    folder = above.rpartition("/")[2]
    return f"{folder}/{name}" if above and name != whole else name


@dataclass(frozen=True)
class Run:
    """A record as read.

    Attributes:
        turns: its turn lines in the order of the file, failed ones included.
        finished: whether the end line is there.
    """

    path: Path
    header: RunHeader
    turns: list[TurnLine]
    finished: bool

    @property
    def methods(self) -> dict[str, MethodInfo]:
        """The methods by name, in the order of the header."""
        return {method["name"]: method for method in self.header["methods"]}

    @property
    def target(self) -> str:
        """The target's name for titles and labels, see ``short_name``."""
        return short_name(self.header["target"]["name"])

    @property
    def training_seed(self) -> int:
        """The seed that its heads were trained from; its own where it has no head that was trained here."""
        of_heads = (method["training"]["seed"] for method in self.header["methods"] if method["training"])
        return next(of_heads, self.header["seed"])

    @property
    def process(self) -> int:
        """Which of several processes made it that each made the same evaluation, from 1 on."""
        return self.header["measure"].get("process", 1)

    @property
    def heads(self) -> dict[str, str]:
        """Hash of the weights of every method that has some."""
        hashes = {method["name"]: method["weights_sha256"] for method in self.header["methods"]}
        return {name: weights for name, weights in hashes.items() if weights is not None}

    def turns_of(self, method: str) -> list[TurnLine]:
        """The turn lines of a method, failed ones included."""
        return [turn for turn in self.turns if turn["method"] == method]


# ---------------------------------------------------------------------------------------------- reading


_RESTORE = "Restore the record from a copy, or delete it and run the evaluation again."
_NAME_ONE = "Name the .jsonl file that an evaluation wrote."
_IS_IT_ONE = "Is it a run record? If so, restore it from a copy; else name the .jsonl file that an evaluation wrote."
_BEGINNING = re.compile(rb'\s*\{\s*"kind"\s*:\s*"run"')
BEGINNING_BYTES = 100


def begins_as_run(content: bytes) -> bool:
    """Whether the first ``BEGINNING_BYTES`` of a file are those of a run record, however damaged it is behind them."""
    return _BEGINNING.match(content) is not None


def _damaged(path: Path, line: int, problem: str) -> KoalaBenchError:
    return KoalaBenchError(f"{path}:{line}: {problem}.", _RESTORE)


def _checked_header(path: Path, header: dict[str, Any]) -> RunHeader:
    if header.get("kind") != "run":
        raise KoalaBenchError(f"{path} is not a run record: its first line is not a 'run' line.", _NAME_ONE)
    if header.get("schema") != SCHEMA:
        code = header.get("code")
        version = code.get("version") if isinstance(code, dict) else None
        other = f"Read it with koala-bench {version}, which wrote it, or run" if version else "Run"
        schemas = f"{', '.join(map(str, READABLE[:-1]))} and {SCHEMA}"
        raise KoalaBenchError(
            f"{path} has record schema {header.get('schema')}; this version reads schemas {schemas}.",
            f"{other} the evaluation again with this version.",
        )
    problem = header_problem(header)
    if problem:
        raise _damaged(path, 1, problem)
    return header  # type: ignore[return-value]


def parse(path: Path, content: bytes) -> tuple[Run, int]:
    """The record in ``content`` and the length of its complete lines in bytes."""
    # Nobody shall delete a file because it is named where a record is wanted.
    remedy = _RESTORE if begins_as_run(content[:BEGINNING_BYTES]) else _IS_IT_ONE
    objects, length = complete_lines(path, content, remedy)
    if not objects:
        raise KoalaBenchError(f"{path} is not a run record: it has no complete line.", _NAME_ONE)
    older = objects[0].get("schema") in READABLE[:-1]
    objects = [of_today(line) for line in objects] if older else objects
    header = _checked_header(path, objects[0])
    methods = depths_by_method(header)
    turns: list[TurnLine] = []
    seen: dict[Key, int] = {}
    finished = False
    line: Any
    for number, line in enumerate(objects[1:], 2):
        ends = line.get("kind") == "end"
        problem = (
            "a line after the end line" if finished else end_problem(line) if ends else turn_problem(line, methods)
        )
        if ends and not problem and line["turns"] != len(turns):
            problem = f"the end line counts {line['turns']} turns, but there are {len(turns)}"
        if not problem and not ends and (first := seen.setdefault(key_of(line), number)) != number:
            problem = f"the same method, question, turn and repeat as line {first}"
        if problem:
            raise _damaged(path, number, problem)
        finished = ends
        if not ends:
            turns.append(line)
    return Run(path, header, turns, finished), length


def read_run(path: Path) -> Run:
    """Read a record, finished or not; a half-written last line is left out.

    Raises:
        KoalaBenchError: no such file, no run record, another schema version, or a damaged line (named).
    """
    return parse(path, read_bytes(path, "run record", _NAME_ONE))[0]


def read_runs(paths: Sequence[Path]) -> list[Run]:
    """Read several records; see ``read_run``."""
    return [read_run(path) for path in paths]


# ---------------------------------------------------------------------------------------------- comparing headers

# What makes numbers comparable; the paths of files are left out because their hashes are in.
_EXPERIMENT = ("preset", "target", "methods", "acceptance", "questions", "chat_template", "limits", "seed", "measure")
_CIRCUMSTANCES = ("environment", "code")
_NOT_COMPARED = (
    "preset.resolved.",
    "preset.settled.",  # what it came to is compared where it matters: the target's dtype, the template's hash
    "target.path",
    "target.name",
    "measure.processes",
    "environment.platform",
    "environment.memory_bytes",
)
# The hash of a head's weights says more than both.
_NOT_COMPARED_OF_HEADS = (".checkpoint", ".training.precision")


def _flat(value: Any, place: str) -> dict[str, Any]:
    """The leaves of nested objects and lists by dotted place."""
    if not isinstance(value, dict | list):
        return {place: value}
    items = value.items() if isinstance(value, dict) else enumerate(value)
    return {name: leaf for key, inner in items for name, leaf in _flat(inner, f"{place}.{key}").items()}


def differences(first: RunHeader, second: RunHeader, *, circumstances: bool = True) -> dict[str, tuple[Any, Any]]:
    """Fields in which two runs are not comparable, e.g. ``limits.max_new_tokens``, and both values; None where absent.

    Args:
        circumstances: compare the machine, the versions and the code too, without which times do not compare.
    """
    names = _EXPERIMENT + (_CIRCUMSTANCES if circumstances else ())
    # The version of transformers and its defaults are part of every configuration; the weights' hash stays compared.
    versions = {each["environment"]["packages"].get("transformers") for each in (first, second)}
    skipped = (*_NOT_COMPARED, *(["target.config_sha256"] if len(versions) > 1 else []))
    left, right = (
        {place: leaf for name in names for place, leaf in _flat(header[name], name).items()}
        for header in cast(tuple[dict[str, Any], ...], (first, second))
    )
    return {
        place: (left.get(place), right.get(place))
        for place in left | right
        if ((place in left) != (place in right) or left[place] != right[place])
        and not place.startswith(skipped)
        and not place.endswith(_NOT_COMPARED_OF_HEADS)
    }
