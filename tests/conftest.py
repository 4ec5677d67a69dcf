"""Fixtures that most tests share."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

# Without a GPU Triton interprets its kernels; it decides so when it is first imported, which the package may do.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from koala_bench.engine.target import Target
from koala_bench.testing import save_tiny_target, tiny_target
from koala_bench.training import held_out

pytest_plugins = ["tests.support.small_runs", "tests.support.commands"]

# The models of the tests are so small that a second thread only adds waiting.
torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _short_of_time() -> Iterator[None]:
    """Heads in training are watched on short answers; and what the tests have loaded is never searched for garbage."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(held_out, "ANSWER_TOKENS", 12)
        patch.setattr(gc, "unfreeze", lambda: None)
        gc.freeze()
        yield


@pytest.fixture(scope="session")
def target_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_target(tmp_path_factory.mktemp("target"))


@pytest.fixture(scope="session")
def target(tmp_path_factory: pytest.TempPathFactory) -> Target:
    return tiny_target(tmp_path_factory.mktemp("target32"))


@pytest.fixture(scope="session")
def target64(tmp_path_factory: pytest.TempPathFactory) -> Target:
    return tiny_target(tmp_path_factory.mktemp("target64"), dtype="float64")


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of public question files; tests that need it skip where there is none."""
    named = os.environ.get("KOALA_BENCH_DATA")
    if not named or not (Path(named) / "eval").is_dir():
        pytest.skip("KOALA_BENCH_DATA names no folder with question files")
    return Path(named)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    skip = pytest.mark.skip(reason="no CUDA device")
    for item in items:
        if item.get_closest_marker("cuda") and not torch.cuda.is_available():
            item.add_marker(skip)
