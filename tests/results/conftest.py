"""Fixtures of Table 1: its recipe, the published values and a synthetic record."""

from __future__ import annotations

from pathlib import Path

import pytest

from koala_bench.common.bundled import RECIPES
from koala_bench.records.reading import Run, read_run
from koala_bench.results.tables.published import Paper, TableSpec, read_paper, read_table_spec
from tests.support.synthetic_run import write_run


@pytest.fixture
def spec() -> TableSpec:
    return read_table_spec(RECIPES / "table1.toml")


@pytest.fixture
def paper() -> Paper:
    return read_paper(RECIPES / "paper.toml")


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return read_run(write_run(tmp_path / "run.jsonl"))
