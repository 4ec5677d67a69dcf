"""Curves of a training: what the log has goes to the service too, and a service that is not there is told at once."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker

import koala_bench.training.loop as training
from koala_bench.errors import KoalaBenchError
from koala_bench.training.experiment import load_preset_target, train_heads
from tests.support.small_runs import conversations, preset_for


class Kept(GeneralTracker):
    """Keeps what it is sent."""

    name = "kept"
    requires_logging_directory = False

    def __init__(self) -> None:
        super().__init__()
        self.sent: list[tuple[int, dict[str, float]]] = []
        self.finished = False

    @property
    def tracker(self) -> Kept:
        return self

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        pass

    def log(self, values: dict[str, float], step: int | None = None, **_: Any) -> None:
        assert step is not None
        self.sent.append((step, values))

    def finish(self) -> None:
        self.finished = True


def train(target_folder: Path, place: Path, log_with: str | None) -> list[dict[str, Any]]:
    preset = preset_for(target_folder, conversations(place), "training.steps=10")
    target, template = load_preset_target(preset)
    train_heads(preset, ["eagle"], target, template, place / "heads", log_with=log_with)
    return [json.loads(line) for line in (place / "heads" / "training.jsonl").read_text().splitlines()]


def test_the_service_gets_the_numbers_of_the_log(
    target_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = Kept()
    monkeypatch.setattr(training, "tracked_accelerator", lambda _, out, **o: Accelerator(log_with=kept, **o))
    monkeypatch.setitem(sys.modules, "wandb", pytest)  # anything that is there
    lines = train(target_folder, tmp_path, "wandb")
    assert kept.finished and [step for step, _ in kept.sent] == [line["step"] for line in lines]
    first, held_out = kept.sent[0][1], kept.sent[-1][1]
    assert first["eagle/loss"] == lines[0]["loss"]
    assert held_out["eagle/held_out/acceptance_length"] == lines[-1]["acceptance_length"]
    assert held_out["eagle/held_out/acceptance_rate_by_depth/1"] == lines[-1]["acceptance_rate_by_depth"][0]
    assert all(isinstance(value, (int, float)) for _, values in kept.sent for value in values.values())


def test_tensorboard_gets_a_file_beside_the_heads(target_folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    lines = train(target_folder, tmp_path, "tensorboard")
    events = EventAccumulator(str(tmp_path / "heads" / "tensorboard" / "koala-bench")).Reload()
    found = [(event.step, pytest.approx(event.value)) for event in events.Scalars("eagle/loss")]
    assert found == [(line["step"], line["loss"]) for line in lines if line["kind"] == "step"]


def test_heads_are_the_same_with_and_without(
    target_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", pytest)
    weights = []
    for name, log_with in (("with", "wandb"), ("without", None)):
        (tmp_path / name).mkdir()
        if log_with:
            kept = Kept()
            make = lambda _, out, kept=kept, **o: Accelerator(log_with=kept, **o)  # noqa: E731
            monkeypatch.setattr(training, "tracked_accelerator", make)
        else:
            monkeypatch.undo()
        train(target_folder, tmp_path / name, log_with)
        weights.append((tmp_path / name / "heads" / "eagle" / "model.safetensors").read_bytes())
        manifest = json.loads((tmp_path / name / "heads" / "eagle" / "training.json").read_text())
        assert "log_with" not in json.dumps(manifest)
    assert weights[0] == weights[1]


@pytest.mark.parametrize(("service", "words"), [("wandb", "not installed"), ("comet", "not known")])
def test_a_service_that_is_not_there_is_told_before_the_training(
    target_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, service: str, words: str
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(KoalaBenchError, match=words):
        train(target_folder, tmp_path, service)
    assert not (tmp_path / "heads").exists()


def test_a_service_that_refuses_is_one_clear_line(
    target_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuses(*_: object, **__: object) -> None:
        raise RuntimeError("no API key\nsee the manual")

    monkeypatch.setattr(Accelerator, "init_trackers", refuses)
    monkeypatch.setitem(sys.modules, "wandb", pytest)
    monkeypatch.setattr(training, "tracked_accelerator", lambda _, out, **o: Accelerator(**o))
    with pytest.raises(KoalaBenchError, match=r"wandb cannot begin: no API key\."):
        train(target_folder, tmp_path, "wandb")
