"""How long a recipe takes, said in its first line: it grows with the work, and counts only what is left."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from transformers import MistralConfig

import koala_bench.runs.reproduce as reproducing
from koala_bench.errors import KoalaBenchError
from koala_bench.presets import Preset
from koala_bench.results.recipes import Plan, plan
from koala_bench.runs.forecast import Forecast, forecast
from koala_bench.testing import save_tiny_target, tiny_config
from koala_bench.training.experiment import load_preset_target
from tests.support.commands import Koala, decoding, settings
from tests.support.small_runs import conversations, preset_for, write_questions

METHODS = ["vanilla", "medusa", "eagle"]


@pytest.fixture
def preset(target_folder: Path, tmp_path: Path) -> Preset:
    questions = write_questions(tmp_path / "questions.jsonl", [("a", ["count 5", "and 6"]), ("b", ["spell it"])])
    asked = (f"evaluation.questions='{questions}'", "evaluation.max_new_tokens=8", 'target.engine="eager"')
    return preset_for(target_folder, conversations(tmp_path), *asked)


def planned(preset: Preset, folder: Path, methods: list[str] = METHODS) -> Plan:
    return plan("table1", preset, "tiny", folder, None, methods=methods, questions_given=True, seeds=False)


def test_more_work_takes_longer(preset: Preset, tmp_path: Path) -> None:
    target, template = load_preset_target(preset)
    few = forecast(planned(preset, tmp_path), target, template, None, False, 0.2)
    longer = preset.model_copy(update={"training": preset.training.model_copy(update={"steps": 120_000})})
    many = preset.model_copy(update={"evaluation": preset.evaluation.model_copy(update={"repeats": 10_000})})
    assert few.training_s > 0 and few.decoding_s > 0
    assert forecast(planned(longer, tmp_path), target, template, None, False, 0.2).training_s > 100 * few.training_s
    assert forecast(planned(many, tmp_path), target, template, None, False, 0.2).decoding_s > 100 * few.decoding_s


def test_what_needs_no_training_is_decoded_only(preset: Preset, tmp_path: Path) -> None:
    target, template = load_preset_target(preset)
    found = forecast(planned(preset, tmp_path, ["vanilla", "prompt_lookup"]), target, template, None, False, 0.1)
    assert found.training_s == 0 < found.decoding_s


def test_questions_that_do_not_fit_the_target_are_passed_over(preset: Preset, tmp_path: Path) -> None:
    window = MistralConfig(**{**tiny_config().to_dict(), "sliding_window": 300, "model_type": "mistral"})
    save_tiny_target(tmp_path / "window", window)
    asked = write_questions(tmp_path / "long.jsonl", [("a", ["x" * 200]), ("b", ["x" * 20])])
    evaluation = preset.evaluation.model_copy(update={"questions": str(asked)})
    target = preset.target.model_copy(update={"name": str(tmp_path / "window")})
    preset = preset.model_copy(update={"evaluation": evaluation, "target": target})
    loaded, template = load_preset_target(preset)
    assert forecast(planned(preset, tmp_path, ["vanilla", "prompt_lookup"]), loaded, template, None, 0.1).decoding_s > 0


def test_processes_share_the_work(preset: Preset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target, template = load_preset_target(preset)
    alone = forecast(planned(preset, tmp_path), target, template, None, False, 0.1)
    monkeypatch.setenv("WORLD_SIZE", "1000")
    assert forecast(planned(preset, tmp_path), target, template, None, False, 0.1).total_s < alone.total_s / 50


def test_evaluations_in_fresh_processes_are_counted(
    koala: Koala, cli_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted: list[Path] = []

    def count(planned: Plan, *_: object) -> Forecast:
        counted.extend(job.record for job in planned.jobs)
        raise KoalaBenchError("That is enough.", "")

    monkeypatch.setattr(reproducing, "forecast", count)
    koala(
        "reproduce", "table1", *settings(cli_folder), *decoding(cli_folder), "--processes", "3", "--out", str(tmp_path)
    )
    assert len(set(counted)) == 3


def expectation(said: str) -> str:
    """The line on how long it takes; only what the target itself has to say comes before it."""
    return next(line for line in said.splitlines() if "about" in line or "nothing is left" in line)


def test_the_first_line_says_how_long_and_the_end_that_nothing_is_left(
    koala: Koala, cli_folder: Path, finished_run: Path, tmp_path: Path
) -> None:
    shutil.copytree(finished_run, tmp_path / "run")
    command = ["reproduce", "table1", *settings(cli_folder), *decoding(cli_folder), "--out", str(tmp_path / "run")]
    assert "nothing is left to train or to decode" in koala(*command).err
    record = tmp_path / "run" / "records.jsonl"
    record.write_text("".join(record.read_text().splitlines(keepends=True)[:9]))
    first = expectation(koala(*command).err)
    assert "of decoding" in first and "of training" not in first
    shutil.rmtree(tmp_path / "run")
    first = expectation(koala(*command).err)
    assert "of training" in first and "of decoding" in first and "about" in first


@pytest.mark.parametrize(("seconds", "named"), [(1300.0, True), (1100.0, False)])
def test_quick_is_named_where_it_takes_more_than_20_minutes(
    koala: Koala, cli_folder: Path, finished_run: Path, monkeypatch: pytest.MonkeyPatch, seconds: float, named: bool
) -> None:
    monkeypatch.setattr(reproducing, "forecast", lambda *_: Forecast(seconds, 0.0))
    command = ["reproduce", "table1", *settings(cli_folder), *decoding(cli_folder), "--out", str(finished_run)]
    assert ("--quick" in koala(*command).err) == named
