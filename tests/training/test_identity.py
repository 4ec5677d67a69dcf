"""When a finished head is reused, a training resumed, and when not: the content decides, not where it lies."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import koala_bench.training.experiment as experiment
from koala_bench.dialogues.encoding import chat_template
from koala_bench.engine.target import Target
from koala_bench.errors import KoalaBenchError
from koala_bench.training.experiment import train_heads
from tests.training.test_training import conversations, preset_for


@pytest.fixture
def made(tmp_path: Path, target: Target, target_folder: Path) -> Any:
    """A finished head, and what to call to start again with other data and settings: whether it was reused."""
    data, out = conversations(tmp_path), tmp_path / "out"

    def start(source: Path, *settings: str) -> str:
        preset = preset_for(target_folder, source, "training.steps=2", *settings)
        assert target.tokenizer is not None
        train_heads(preset, ["eagle"], target, chat_template("vicuna_v1.1", target.tokenizer), out)
        return (out / "eagle" / "training.json").read_text()

    first = start(data)
    return data, out, start, first


@pytest.mark.parametrize(
    "settings",
    [("data.probes=1",), ("data.held_out=3",), ("training.checkpoint_every=1", "training.held_out_evaluations=2")],
)
def test_what_changes_no_weight_changes_nothing(made: Any, tmp_path: Path, settings: tuple[str, ...]) -> None:
    data, _, start, first = made
    moved = shutil.copy(data, tmp_path / "moved.jsonl")
    assert start(moved, *settings) == first


def test_the_same_dialogues_in_another_file_are_the_same(made: Any, tmp_path: Path) -> None:
    data, _, start, first = made
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    (tmp_path / "array.json").write_text(json.dumps(rows))
    assert start(tmp_path / "array.json") == first
    assert start(data, "data.limit=100000") == first


def test_a_training_file_that_changed_is_another_training(made: Any, capsys: pytest.CaptureFixture[str]) -> None:
    data, out, start, first = made
    data.write_text(data.read_text().replace("count", "number"))
    capsys.readouterr()
    with pytest.raises(KoalaBenchError, match=r"belongs to another run: its training data differs"):
        start(data)
    assert "Reusing" not in capsys.readouterr().err
    assert (out / "eagle" / "training.json").read_text() == first
    for path in out.glob("checkpoint*"):
        path.unlink()
    assert start(data) != first


def test_a_head_of_an_earlier_version_that_read_rows_otherwise_is_not_taken_by_its_file(
    made: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, _, start, first = made
    monkeypatch.setattr(experiment, "_READING", 0)
    read: list[str] = []
    real = experiment.read_conversations
    monkeypatch.setattr(experiment, "read_conversations", lambda *args: read.append(args[0]) or real(*args))
    assert start(data) == first and len(read) == 1


def test_a_head_of_an_earlier_version_is_known_by_its_weights_and_tokenizer(made: Any) -> None:
    data, out, start, first = made
    manifest = json.loads(first)
    del manifest["target"]["computation_sha256"]
    manifest["target"]["architecture_sha256"] = "of the version of transformers that it was trained with"
    (out / "eagle" / "training.json").write_text(json.dumps(manifest))
    assert json.loads(start(data)) == manifest
    manifest["target"]["computation_sha256"] = "another one"
    (out / "eagle" / "training.json").write_text(json.dumps(manifest))
    assert json.loads(start(data)) == json.loads(first), "trained again"


def test_an_interrupted_training_goes_on_wherever_its_data_lies(made: Any, tmp_path: Path) -> None:
    data, out, start, first = made
    shutil.rmtree(out / "eagle")
    start(shutil.move(data, tmp_path / "moved.jsonl"), "training.checkpoint_every=7", "data.probes=1")
    assert json.loads(first)["stream_sha256"] in (out / "eagle" / "training.json").read_text()
    with pytest.raises(KoalaBenchError, match="its training differs"):
        start(tmp_path / "moved.jsonl", "training.clip_norm=0.5")
