"""Running commands as a shell would: the fixture ``koala``, options that make a command small, and a finished run."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest

from koala_bench.cli import app, main
from koala_bench.runs import forecast, reproduce
from koala_bench.testing import save_tiny_target
from tests.support.small_runs import conversations, write_questions


@dataclass
class Result:
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def complaint(self) -> str:
        """The one line that a mistake ends in."""
        found = [line for line in self.err.splitlines() if line.startswith("koala-bench: ")]
        assert len(found) == 1, self.err
        assert self.err.splitlines()[-1] == found[0]
        return found[0]


Koala = Callable[..., Result]

# Recording the passes of a tiny target takes ten times as long as all that a test decodes with them.
EAGER = ("--set", "target.engine=eager")


def forecast_quickly(patch: pytest.MonkeyPatch) -> None:
    """A recipe measures for a moment how long it will take, and not for the usual four seconds."""
    patch.setattr(reproduce, "forecast", partial(forecast.forecast, seconds=0.05))


@pytest.fixture
def koala(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Koala:
    """Runs the entry point as a shell would; only a traceback passes through."""
    monkeypatch.delenv("KOALA_BENCH_DATA", raising=False)
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    forecast_quickly(monkeypatch)

    def run(*arguments: str) -> Result:
        monkeypatch.setattr(sys, "argv", ["/somewhere/bin/koala-bench", *arguments])
        capsys.readouterr()
        code: int | str | None = 0
        try:
            main()
        except SystemExit as end:
            code = end.code
        captured = capsys.readouterr()
        return Result(int(code or 0), captured.out, captured.err)

    return run


def settings(folder: Path) -> list[str]:
    """Options that make a command small: a random target, made-up data, two steps."""
    values = [
        "data.max_tokens=192", "data.probes=1", "training.batch_tokens=256", "training.steps=2",
        "training.held_out_evaluations=1",
    ]  # fmt: skip
    source = f"data.source={folder / 'conversations.jsonl'}"
    return [
        "--target", str(folder / "target"), "--device", "cpu",
        *(part for value in [source, *values] for part in ("--set", value)), *EAGER,
    ]  # fmt: skip


def decoding(folder: Path) -> list[str]:
    return ["--questions", str(folder / "questions.jsonl"), "--max-new-tokens", "6", "--set", "evaluation.warmup=0"]


@pytest.fixture(scope="session")
def cli_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A target, conversations and questions, and an empty folder."""
    place = tmp_path_factory.mktemp("cli")
    save_tiny_target(place / "target")
    conversations(place)
    write_questions(place / "questions.jsonl", [("a", ["count 5", "and 6"]), ("b", ["spell it", "again"])])
    (place / "empty").mkdir()
    return place


@pytest.fixture(scope="session")
def finished_run(cli_folder: Path) -> Path:
    """A finished run of ``reproduce table1``."""
    command = [
        "koala-bench", "reproduce", "table1", *settings(cli_folder), *decoding(cli_folder), "--out",
        str(cli_folder / "done"),
    ]  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", command)
        forecast_quickly(patch)
        app(standalone_mode=False)
    return cli_folder / "done"
