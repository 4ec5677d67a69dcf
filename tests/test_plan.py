"""What a run takes, said beforehand: counts that are those of the real heads, what is missing and how to get it, and hours that follow from steps."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from test_cli import Koala, koala
from test_evaluation import write_questions
from test_training import conversations, preset_for

import koala_bench.requirements as requirements
from koala_bench.calibration import Limits, Pace, hours_at, least_hours, measure_pace
from koala_bench.errors import KoalaBenchError
from koala_bench.presets import Preset, load_preset
from koala_bench.requirements import Needs, find_target, gibibytes, missing_for, needs_of, turns_of
from koala_bench.shapes import VICUNA, known_shape, llama
from koala_bench.target import load_target
from koala_bench.training import make_arm

__all__ = ["koala"]

METHODS = ["vanilla", "medusa", "medusa+koala", "eagle", "eagle2", "prompt_lookup"]


@pytest.fixture
def preset(target_folder: Path, tmp_path: Path) -> Preset:
    return preset_for(target_folder, conversations(tmp_path))


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(*_: object, **__: object) -> None:
        raise OSError("no network")

    monkeypatch.setattr(requirements.AutoConfig, "from_pretrained", refuses)


def test_counts_are_those_of_the_real_heads(preset: Preset, target_folder: Path) -> None:
    target = load_target(str(target_folder), "cpu", "float32")
    needs = needs_of(preset, METHODS, find_target(preset), 4)
    assert needs.target_parameters == target.parameters
    assert [head.name for head in needs.heads] == METHODS[1:]
    for head in needs.heads[:3]:
        arm = make_arm(target, head.name, preset.method(head.name), preset.training)
        assert head.parameters == arm.parameters and head.shares is None
        assert head.judge == (sum(p.numel() for p in arm.objective.parameters()) if arm.objective else 0)
    assert needs.heads[3].shares == "eagle" and needs.heads[4].parameters == 0
    trained = sum(head.parameters + head.judge for head in needs.heads[:3])
    assert needs.training_memory > target.parameters * 4 + trained * 16
    assert needs.training_tokens == 12 * 256 and needs.answer_tokens == 4 * preset.evaluation.max_new_tokens


def test_more_heads_take_more_memory_and_a_shared_one_takes_none(preset: Preset) -> None:
    place = find_target(preset)
    one, two, shared = (needs_of(preset, methods, place, 4) for methods in (["eagle"], ["eagle", "medusa"], ["eagle", "eagle2"]))
    assert two.training_memory > one.training_memory == shared.training_memory


def test_the_papers_targets_are_known_without_a_hub(offline: None) -> None:
    preset = load_preset("vicuna-7b")
    place = find_target(preset)
    assert not place.at_hand and "the hub does not answer" in place.words
    needs = needs_of(preset, ["vanilla", "eagle"], place, None)
    assert needs.target_parameters == 6_738_415_616
    assert needs.heads[0].parameters == pytest.approx(0.24e9, rel=0.02)  # SafeAILab/EAGLE's README
    assert needs.download == 2 * needs.target_parameters
    assert all(known_shape(f"lmsys/vicuna-{size}-v1.3") is not None for size in VICUNA) and known_shape("lmsys/vicuna-70b-v1.3") is None
    assert [llama(size).num_hidden_layers for size in VICUNA] == [32, 40, 60]


def test_a_target_that_nobody_knows_is_one_clear_error(offline: None) -> None:
    with pytest.raises(KoalaBenchError, match=r"someone/model is not on this machine"):
        find_target(load_preset("tiny", ["target.name='someone/model'"]))


def test_whatever_is_missing_is_named_with_its_remedy(offline: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KOALA_BENCH_DATA", raising=False)
    monkeypatch.setattr(requirements.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(requirements.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 2**30})())
    preset = load_preset("vicuna-7b")
    needs = Needs(7 * 10**9, (), 40 * 2**30, 15 * 2**30, 14 * 2**30, 2**30, 1, 1)
    found = missing_for(preset, find_target(preset), needs, turns_of(preset, None), tmp_path / "not" / "there")
    assert len(found) == 5
    for words, place in (
        ("A CUDA device with at least 40.0 GiB", 0), ("14.0 GiB", 1), ("huggingface.co", 1), ("ShareGPT", 2), ("koala-bench data mt_bench", 3), ("15.0 GiB", 4)
    ):  # fmt: skip
        assert words in found[place]


def test_hours_follow_from_steps() -> None:
    preset = load_preset("tiny", ["training.steps=100", "training.micro_batches=2"])
    needs = Needs(10, (), 0, 0, 0, 0, 2000, 3600)
    pace = Pace(0.5, {"a": 1.0, "b": 0.3}, {"vanilla": 1.0, "a": 2.0})
    hours = hours_at(pace, preset, needs)
    assert hours.training == pytest.approx(200 * 1.8 / 3600)
    assert hours.decoding == pytest.approx((1 + 2, 1 + 1))
    least = least_hours(Limits(40.0, 10.0), preset, ["vanilla", "a"], needs)
    assert least.training == pytest.approx(2000 * 20 / 10 / 3600)
    assert least.decoding == pytest.approx((1 * 2, 1 * 1.5))


def test_a_pace_has_every_method_and_every_trained_head_once(preset: Preset, target_folder: Path) -> None:
    pace = measure_pace(preset, METHODS, load_target(str(target_folder), "cpu", "float32"), seconds=0.1)
    assert list(pace.steps) == METHODS and list(pace.heads) == ["medusa", "medusa+koala", "eagle"]
    assert pace.target > 0 and all(spent > 0 for spent in [*pace.heads.values(), *pace.steps.values()])


def test_the_command(koala: Koala, target_folder: Path, tmp_path: Path) -> None:
    data, questions = conversations(tmp_path), write_questions(tmp_path / "q.jsonl", [("words", ["count 5", "and 6"])])
    common = ["--target", str(target_folder), "--seconds", "1", "--out", str(tmp_path / "out"), "--methods", "vanilla,eagle"]
    done = koala("plan", *common, "--questions", str(questions), "--set", f"data.source={json.dumps(str(data))}")
    assert done.code == 0, done.err
    assert "Nothing is missing" in done.out and "(2 turns)" in done.out and "From steps measured here, on cpu in float32" in done.out
    assert not (tmp_path / "out").exists()
    done = koala("plan", *common, "--set", "data.source='none.json'")
    assert done.code == 1 and "none.json" in done.out


def test_sizes_are_said_as_people_say_them() -> None:
    assert [gibibytes(count) for count in (2**29, 3 * 2**30, 2**20)] == ["512 MiB", "3.0 GiB", "1 MiB"]
