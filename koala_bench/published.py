"""Published values and the shape of a table: strict models of ``reproduce/*.toml``, and reading them."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Literal, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from koala_bench.errors import KoalaBenchError
from koala_bench.records import Run
from koala_bench.rendering import COLUMNS


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class TableSpec(_Strict):
    """What a table shows: ``reproduce/table*.toml``.

    Attributes:
        methods: rows of each target, in this order.
        questions: the question set of the paper's table.
        columns: names out of ``COLUMNS``.
    """

    methods: tuple[str, ...]
    questions: str
    columns: tuple[str, ...]


class Claim(_Strict):
    """A published range and where it stands."""

    low: float
    high: float
    source: str


class KoalaClaims(_Strict):
    """What KOALA claims over all its targets."""

    citation: str
    targets: tuple[str, ...]
    speedup_change_x: Claim
    speedup_change_percent: Claim


class PaperCell(_Strict):
    """KOALA's own numbers for one target and method."""

    target: str
    method: str
    speedup: float | Literal["unknown"]
    acceptance_length: float | Literal["unknown"]


class OwnClaim(_Strict):
    """What the authors of a head published for it, on MT-bench."""

    system: str
    target: str
    speedup: float | Literal["unknown"]
    temperature: str
    source: str


class Paper(_Strict):
    """Published values: ``reproduce/paper.toml``."""

    koala: KoalaClaims
    table1: tuple[PaperCell, ...]
    own_claims: tuple[OwnClaim, ...]


_Model = TypeVar("_Model", bound=_Strict)


def _read_toml(path: Path, model: type[_Model]) -> _Model:
    try:
        with open(path, "rb") as handle:
            return model.model_validate(tomllib.load(handle))
    except OSError as error:
        raise KoalaBenchError(f"Cannot read {path}: {error.strerror or error}.", "Name a file of the folder reproduce/.") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise KoalaBenchError(f"{path} is not TOML: {error}.", "Correct that line.") from error
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        raise KoalaBenchError(f"{path}: {place}: {first['msg']}.", "Correct that entry; reproduce/ of the repository has an example.") from error


def read_table_spec(path: Path) -> TableSpec:
    """Read a ``reproduce/table*.toml``.

    Raises:
        KoalaBenchError: no such file, not TOML, a misspelt key, or a column that does not exist.
    """
    spec = _read_toml(path, TableSpec)
    unknown = [name for name in spec.columns if name not in COLUMNS]
    if unknown:
        raise KoalaBenchError(f"{path}: unknown column '{unknown[0]}'.", f"The columns are {', '.join(COLUMNS)}.")
    return spec


def read_paper(path: Path) -> Paper:
    """Read ``reproduce/paper.toml``.

    Raises:
        KoalaBenchError: no such file, not TOML, a misspelt key, or a value that is neither a number nor "unknown".
    """
    return _read_toml(path, Paper)


def paper_names(run: Run) -> tuple[str, str]:
    """The names under which published values may list a run's target: its preset's and its own."""
    return run.header["preset"]["name"], run.header["target"]["name"]
