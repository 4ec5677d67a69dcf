"""Reading files of JSON lines and TOML, and saying in one line what is wrong with them."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar, get_args, get_origin

from pydantic import BaseModel, ValidationError

from koala_bench.common.files import cannot
from koala_bench.common.suggestions import did_you_mean
from koala_bench.errors import KoalaBenchError

_Model = TypeVar("_Model", bound=BaseModel)


def first_problem(error: ValidationError, what: str = "field") -> str:
    """The first thing that pydantic found wrong, as ``place: problem``; ``what`` a name is that no one knows."""
    first = error.errors(include_url=False)[0]
    place = ".".join(map(str, first["loc"]))
    said = f"unknown {what}" if first["type"] == "extra_forbidden" else first["msg"].removeprefix("Value error, ")
    return f"{place}: {said}" if place else said


def nearest_known(error: ValidationError, model: type[BaseModel]) -> str:
    """``Did you mean ...? `` where the first thing wrong is an unknown name that is like a known one; else empty."""
    first = error.errors(include_url=False)[0]
    if first["type"] != "extra_forbidden":
        return ""
    *above, name = map(str, first["loc"])
    found = did_you_mean(name, _fields(model, above), "")
    return f"{found} " if found else ""


def _fields(model: type[BaseModel], place: Sequence[str]) -> list[str]:
    """The names that are known at a place below a model; of dictionaries, every key leads to their values."""
    kind: Any = model
    for name in place:
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            kind = kind.model_fields[name].annotation if name in kind.model_fields else None
        else:
            kind = next(iter(get_args(kind)[1:]), None) if get_origin(kind) is dict else None
        models = [each for each in get_args(kind) if isinstance(each, type) and issubclass(each, BaseModel)]
        if models and get_origin(kind) is not dict:  # such as one of several, or None
            kind = models[0]
    return list(kind.model_fields) if isinstance(kind, type) and issubclass(kind, BaseModel) else []


def read_toml(path: Path, what: str, model: type[_Model], remedy: str) -> _Model:
    """A TOML file as a model; ``what`` it is, such as ``grid``, and the remedy where there is no such file.

    Raises:
        KoalaBenchError: it is missing, no TOML, or an entry is unknown or of the wrong kind.
    """
    try:
        return model.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise cannot(f"read the {what}", path, error, remedy) from error
    except ValidationError as error:
        said, known = first_problem(error, "setting"), nearest_known(error, model)
        raise KoalaBenchError(f"The {what} {path}, {said}.", f"{known}Correct that entry.") from error
    except (ValueError, RecursionError) as error:  # no TOML, no text, thousands of digits or of brackets
        raise KoalaBenchError(f"The {what} {path} is not valid TOML: {error}.", "Mend the file.") from error


def read_bytes(path: Path, what: str, remedy: str) -> bytes:
    """The content of a file that should be there; ``what`` it is, such as ``run record``."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise cannot(f"read the {what}", path, error, remedy) from error


def read_text(path: Path, what: str, missing: str, folder: str) -> str:
    """A text file of a user, UTF-8 with or without a byte order mark.

    Args:
        what: the file is, such as ``question file``.
        missing, folder: remedies where there is no such file, or a folder.

    Raises:
        KoalaBenchError: it cannot be read, or is no UTF-8; names the line.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError as error:
        raise KoalaBenchError(f"There is no {what} {path}.", missing) from error
    except IsADirectoryError as error:
        raise KoalaBenchError(f"{path} is a folder, no {what}.", folder) from error
    except OSError as error:
        raise cannot("read", path, error, "Check its permissions.") from error
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        number = content.count(b"\n", 0, error.start) + 1
        raise KoalaBenchError(
            f"{path}, line {number}: not UTF-8 text.", "Unpack it if it is compressed, or save it as UTF-8."
        ) from error


def json_lines(path: Path, text: str, remedy: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """The objects of a text of JSON lines, each with the number of its line; blank lines are passed over. Raises
    KoalaBenchError where a line is no JSON object; names it."""

    def refuse(number: int, problem: str, error: Exception | None = None) -> NoReturn:
        raise KoalaBenchError(f"{path}, line {number}: {problem}.", remedy) from error

    # Not splitlines(): a text may hold U+2028 and others that it takes for line ends.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            refuse(number, f"not valid JSON ({error.msg} at character {error.pos + 1})", error)
        except (ValueError, RecursionError) as error:  # a number of thousands of digits; thousands of brackets
            refuse(number, f"JSON that Python cannot read ({error})", error)
        if not isinstance(value, dict):
            refuse(number, "a JSON value that is not an object")
        yield number, value


def object_in(path: Path) -> dict[str, Any] | None:
    """The JSON object that a file holds; None where there is none that can be read."""
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def encode_line(value: Mapping[str, Any]) -> bytes:
    """A JSON line as it stands in a file."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode() + b"\n"


def complete_lines(path: Path, content: bytes, remedy: str) -> tuple[list[dict[str, Any]], int]:
    """The JSON objects of the complete lines of a log that is appended to, and how many bytes of it they take.

    A process that is killed while it writes leaves a last line without its end or with part of its text; such a
    line is left out. The same anywhere else is damage.

    Raises:
        KoalaBenchError: another line is damaged; names it.
    """
    lines = content.split(b"\n")
    complete, length = lines[:-1], len(content) - len(lines[-1])
    objects: list[dict[str, Any]] = []
    for number, line in enumerate(complete, 1):
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:  # no JSON, no UTF-8, thousands of digits or of brackets
            if number == len(complete) and number > 1:
                return objects, length - len(line) - 1
            raise KoalaBenchError(f"{path}:{number}: not a line of JSON.", remedy) from error
        if not isinstance(value, dict):
            raise KoalaBenchError(f"{path}:{number}: not a JSON object.", remedy)
        objects.append(value)
    return objects, length
