"""What a plan says of stored states: the disk that they take, and a training without the target's passes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from koala_bench.dialogues.encoding import chat_template
from koala_bench.engine.target import Target
from koala_bench.planning.calibration import Pace, hours_at
from koala_bench.planning.requirements import Needs, find_target, needs_of
from koala_bench.planning.stored import tokens_to_store
from koala_bench.presets import load_preset
from koala_bench.runs.states import write_training_states
from tests.support.commands import Koala, settings
from tests.support.small_runs import conversations, preset_for


def test_tokens_and_bytes_are_those_that_are_then_written(target: Target, target_folder: Path, tmp_path: Path) -> None:
    preset = preset_for(target_folder, conversations(tmp_path, 900))
    template = chat_template("vicuna_v1.1", target.tokenizer)  # type: ignore[arg-type]
    counted = tokens_to_store(preset, target, template)
    assert counted is not None
    write_training_states(preset, ["eagle3"], tmp_path / "states")
    manifest = json.loads((tmp_path / "states" / "states.json").read_text())
    needs = needs_of(preset, ["eagle3"], find_target(preset), 1)
    assert needs.state_bytes == 2 * len(manifest["layers"]) * manifest["hidden_size"] + 8
    stored = sum(path.stat().st_size for path in (tmp_path / "states").glob("*.bin"))
    assert counted == pytest.approx(stored / needs.state_bytes, rel=0.05)
    assert 0 < needs.ends_memory < needs.training_memory


def test_data_that_is_not_here_is_not_counted(target: Target, target_folder: Path, tmp_path: Path) -> None:
    template = chat_template("vicuna_v1.1", target.tokenizer)  # type: ignore[arg-type]
    assert tokens_to_store(preset_for(target_folder, tmp_path / "none.jsonl"), target, template) is None


def test_the_target_reads_stored_tokens_once() -> None:
    preset = load_preset("tiny", ["training.steps=100", "training.batch_tokens=1024"])
    needs, pace = Needs(10, (), 0, 0, 0, 0, 2000, 3600), Pace(0.5, 1.0, {"vanilla": 1.0})
    assert hours_at(pace, preset, needs).training == pytest.approx(100 * 1.5 / 3600)
    assert hours_at(pace, preset, needs, 20 * 1024).training == pytest.approx((100 + 20 * 0.5) / 3600)


def test_the_command_says_it_where_states_are_stored(koala: Koala, cli_folder: Path) -> None:
    command = [
        "plan", *settings(cli_folder), "--methods", "eagle", "--seconds", "1", "--out", str(cli_folder / "empty"),
    ]  # fmt: skip
    questions = ["--questions", str(cli_folder / "questions.jsonl")]
    assert "States:" not in koala(*command, *questions).out
    said = koala(*command, *questions, "--set", "training.stored_states=true").out
    assert "- States: " in said and "the target reads them once" in said
