"""What a run takes, said beforehand: counts that are those of the real heads, what is missing and how to get it, and
hours that follow from steps.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch

import koala_bench.planning.calibration as calibration
import koala_bench.planning.requirements as requirements
from koala_bench.dialogues.encoding import chat_template
from koala_bench.engine.loading.targets import load_target
from koala_bench.engine.shapes import VICUNA, known_shape, llama
from koala_bench.engine.target import Target
from koala_bench.errors import KoalaBenchError
from koala_bench.planning.calibration import Limits, Pace, hours_at, least_hours, limits_of_named_gpu, measure_pace
from koala_bench.planning.requirements import (
    Needs,
    find_models,
    find_target,
    gibibytes,
    missing_conversations,
    missing_for,
    needs_of,
    turns_of,
)
from koala_bench.planning.stored import tokens_to_store
from koala_bench.presets import Preset, load_preset
from koala_bench.training.loop import make_trainer
from tests.support.bad_input.spoiling import no_hub
from tests.support.commands import EAGER, Koala
from tests.support.small_runs import conversations, preset_for, write_questions
from tests.training.test_training import run

METHODS = ["vanilla", "medusa", "medusa+koala", "eagle", "eagle2", "prompt_lookup"]


@pytest.fixture
def preset(target_folder: Path, tmp_path: Path) -> Preset:
    return preset_for(target_folder, conversations(tmp_path))


@pytest.fixture
def offline() -> Iterator[None]:
    with no_hub():
        yield


class _Hub(BaseHTTPRequestHandler):
    """Knows one data set of two files."""

    def do_GET(self) -> None:
        known = self.path.partition("?")[0] == "/api/datasets/someone/talks"
        files = [{"rfilename": "README.md", "size": 5}, {"rfilename": "talks.json", "size": 3 * 2**20}]
        body = json.dumps(
            {"id": "someone/talks", "siblings": files} if known else {"error": "Repository not found"}
        ).encode()
        self.send_response(200 if known else 404)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        if not known:
            self.send_header("X-Error-Code", "RepoNotFound")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A hub on this machine."""
    with ThreadingHTTPServer(("127.0.0.1", 0), _Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{server.server_address[1]}")
        yield
        server.shutdown()


def test_counts_are_those_of_the_real_heads(preset: Preset, target_folder: Path) -> None:
    target = load_target(str(target_folder), "cpu", "float32")
    needs = needs_of(preset, METHODS, find_target(preset), 4)
    assert needs.target_parameters == target.parameters
    assert [head.name for head in needs.heads] == METHODS[1:]
    for head in needs.heads[:3]:
        trainer = make_trainer(target, head.name, preset.method(head.name), preset.training)
        assert head.parameters == trainer.parameters and head.shares is None
        assert head.discriminator == (
            sum(p.numel() for p in trainer.objective.parameters()) if trainer.objective else 0
        )
    assert needs.heads[3].shares == "eagle" and needs.heads[4].parameters == 0
    trained = sum(head.parameters + head.discriminator for head in needs.heads[:3])
    assert needs.training_memory > target.parameters * 4 + trained * 16
    assert needs.training_tokens == 12 * 256 and needs.answer_tokens == 4 * preset.evaluation.max_new_tokens


def test_more_heads_take_more_memory_and_a_shared_one_takes_none(preset: Preset) -> None:
    place = find_target(preset)
    one, two, shared = (
        needs_of(preset, methods, place, 4) for methods in (["eagle"], ["eagle", "medusa"], ["eagle", "eagle2"])
    )
    assert two.training_memory > one.training_memory == shared.training_memory


def test_a_shared_head_alone_has_its_owner_trained_and_counted(preset: Preset) -> None:
    place = find_target(preset)
    alone, both = (
        needs_of(preset, ["vanilla", "eagle2"], place, 4),
        needs_of(preset, ["vanilla", "eagle", "eagle2"], place, 4),
    )
    assert [(head.name, head.shares) for head in alone.heads] == [("eagle", None), ("eagle2", "eagle")]
    assert alone.heads == both.heads
    assert alone.training_tokens == both.training_tokens > 0 and alone.training_memory == both.training_memory
    assert both.disk > alone.disk > 0.9 * both.disk, "only the records of one method differ"


def test_the_disk_holds_three_checkpoints_while_one_is_written(preset: Preset, tmp_path: Path) -> None:
    methods = ["medusa+koala", "eagle"]
    run(preset, methods, tmp_path)
    checkpoint = (tmp_path / "checkpoint.pt").stat().st_size
    heads = sum((tmp_path / name / "model.safetensors").stat().st_size for name in methods)
    needs = needs_of(preset, methods, find_target(preset), 0)  # no records
    assert needs.disk == pytest.approx(3 * checkpoint, rel=0.1)
    assert heads < checkpoint


def test_a_draft_model_is_counted_where_it_loads_weights(preset: Preset, target_folder: Path) -> None:
    draft = preset.method("draft_model").model_copy(update={"options": {"model": str(target_folder)}})
    preset = preset.model_copy(update={"methods": {**preset.methods, "draft_model": draft}})
    place, methods = find_target(preset), ["vanilla", "draft_model", "prompt_lookup"]
    models = find_models(preset, methods)
    assert list(models) == [str(target_folder)] and models[str(target_folder)].at_hand
    without, needs = needs_of(preset, methods[:1], place, 4), needs_of(preset, methods, place, 4, models)
    assert needs.models == {str(target_folder): needs.target_parameters}
    assert needs.decoding_memory == 2 * without.decoding_memory, "weights and cache, of the same shape here"
    assert (needs.download, needs.training_tokens, needs.training_memory) == (0, 0, without.training_memory)
    assert needs.heads[0].model == str(target_folder) and needs.heads[1].model is None


def test_a_draft_model_that_is_not_here_is_missing(offline: None, tmp_path: Path) -> None:
    preset = load_preset("vicuna-7b")
    methods = ["vanilla", "draft_model"]
    place, models = find_target(preset), find_models(preset, methods)
    needs = needs_of(preset, methods, place, None, models)
    assert needs.models["double7/vicuna-68m"] == pytest.approx(68e6, rel=0.01)
    assert needs.download == 2 * (needs.target_parameters + 68_030_208)
    found = missing_for(preset, place, needs, 160, tmp_path, models)
    assert any("the draft model double7/vicuna-68m, 130 MiB. The hub does not answer" in each for each in found)
    assert not any("conversations" in each for each in found), "nothing is trained"
    other = load_preset("vicuna-7b", ["methods.draft_model.options.model='someone/small'"])
    models = find_models(other, methods)
    needs = needs_of(other, methods, place, None, models)
    assert needs.models == {"someone/small": None}
    assert any(
        "someone/small, whose size nobody here knows" in each
        for each in missing_for(other, place, needs, 160, tmp_path, models)
    )


def test_a_folder_of_conversations_is_no_missing_file(tmp_path: Path) -> None:
    (tmp_path / "talks").mkdir()
    assert "has no .json" in str(missing_conversations(str(tmp_path / "talks"), "tiny"))
    conversations(tmp_path / "talks")
    assert missing_conversations(str(tmp_path / "talks"), "tiny") is None
    assert missing_conversations(str(tmp_path / "talks" / "conversations.jsonl"), "tiny") is None
    said = str(missing_conversations("none.json", "tiny"))
    assert all(
        form in said
        for form in ("none.json", "ShareGPT", "FastChat", "OpenAI", "Alpaca", ".gz", "folder", "koala-bench distill")
    )


def test_conversations_of_the_hub_have_to_be_downloaded(online: None) -> None:
    said = "The conversations hub:someone/talks, 3 MiB. The hub answers; they are downloaded at the first use."
    assert str(missing_conversations("hub:someone/talks", "tiny")).startswith(said)
    assert "has no file other.json" in str(missing_conversations("hub:someone/talks:other.json", "tiny"))
    assert "The hub refuses them (404" in str(missing_conversations("hub:someone/else", "tiny"))


def test_conversations_of_a_hub_that_does_not_answer_are_missing(
    offline: None, capfd: pytest.CaptureFixture[str]
) -> None:
    assert "The hub does not answer" in str(missing_conversations("hub:someone/talks", "tiny"))
    assert capfd.readouterr().err == ""


def test_a_target_that_the_hub_refuses_is_told_from_a_hub_that_is_not_there(online: None) -> None:
    place = find_target(load_preset("vicuna-7b"))
    assert place.reached and "the hub refuses it" in place.words and not place.at_hand


def test_the_papers_targets_are_known_without_a_hub(offline: None) -> None:
    preset = load_preset("vicuna-7b")
    place = find_target(preset)
    assert not place.at_hand and "the hub does not answer" in place.words
    needs = needs_of(preset, ["vanilla", "eagle"], place, None)
    assert needs.target_parameters == 6_738_415_616
    assert needs.heads[0].parameters == pytest.approx(0.24e9, rel=0.02)  # SafeAILab/EAGLE's README
    assert needs.download == 2 * needs.target_parameters
    assert (
        all(known_shape(f"lmsys/vicuna-{size}-v1.3") is not None for size in VICUNA)
        and known_shape("lmsys/vicuna-70b-v1.3") is None
    )
    assert [llama(size).num_hidden_layers for size in VICUNA] == [32, 40, 60]


@pytest.mark.parametrize("size", VICUNA)
def test_each_head_of_the_papers_presets_can_be_counted_before_anything_is_here(size: str, offline: None) -> None:
    preset = load_preset(f"vicuna-{size}")
    names = [name for name, method in preset.methods.items() if method.head != "draft_model"]
    needs = needs_of(preset, ["vanilla", *names], find_target(preset), None)
    assert {head.name for head in needs.heads} >= {"medusa+lk", "eagle+lk+layers", "hass", "p-eagle", "dflash"}


def test_a_target_that_nobody_knows_is_one_clear_error(offline: None) -> None:
    with pytest.raises(KoalaBenchError, match=r"someone/model is not on this machine"):
        find_target(load_preset("tiny", ["target.name='someone/model'"]))


def test_whatever_is_missing_is_named_with_its_remedy(
    offline: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("KOALA_BENCH_DATA", raising=False)
    monkeypatch.setattr(requirements.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(requirements.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 2**30})())
    preset = load_preset("vicuna-7b")
    needs = Needs(7 * 10**9, (), 40 * 2**30, 15 * 2**30, 14 * 2**30, 2**30, 1, 1)
    found = missing_for(preset, find_target(preset), needs, turns_of(preset, None), tmp_path / "not" / "there")
    assert len(found) == 5
    for words, place in (
        ("A CUDA device with at least 40.0 GiB", 0), ("13.0 GiB", 1), ("huggingface.co", 1), ("ShareGPT", 2),
        ("koala-bench data mt_bench", 3), ("15.0 GiB", 4)
    ):  # fmt: skip
        assert words in found[place]


def test_hours_follow_from_steps() -> None:
    preset = load_preset("tiny", ["training.steps=100", "training.micro_batches=2"])
    needs = Needs(10, (), 0, 0, 0, 0, 2000, 3600)
    pace = Pace(0.5, 1.3, {"vanilla": 1.0, "a": 2.0})
    hours = hours_at(pace, preset, needs)
    assert hours.training == pytest.approx(200 * 1.8 / 3600)
    assert hours.decoding == pytest.approx((1 + 2, 1 + 1))
    least = least_hours(Limits(40.0, 10.0), preset, ["vanilla", "a"], needs)
    assert least.training == pytest.approx(2000 * 20 / 10 / 3600)
    assert least.decoding == pytest.approx((1 * 2, 1 * 1.5))
    stored = least_hours(Limits(40.0, 10.0), preset, ["vanilla", "a"], needs, stored_tokens=500)
    assert stored.training == pytest.approx(500 * 20 / 10 / 3600)  # no head is trained here


def test_a_pace_has_every_method_and_every_trained_head_once(preset: Preset, target_folder: Path) -> None:
    pace = measure_pace(preset, METHODS, load_target(str(target_folder), "cpu", "float32"), seconds=0.1)
    assert list(pace.steps) == METHODS
    assert pace.target > 0 and pace.heads > 0 and all(spent > 0 for spent in pace.steps.values())


def test_a_training_step_is_timed_with_the_targets_distributions(
    preset: Preset, target_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are made anew each step, once for all heads of a vocabulary."""
    made: list[tuple[int, ...]] = []
    real = Target.output

    def output(self: Target, hidden: torch.Tensor) -> torch.Tensor:
        if hidden.ndim == 3 and torch.is_grad_enabled() is False:
            made.append(tuple(hidden.shape))
        return real(self, hidden)

    def three_times(device: torch.device, seconds: float, run: Callable[[], object]) -> float:
        for _ in range(3):
            run()
        return 1.0

    monkeypatch.setattr(Target, "output", output)
    monkeypatch.setattr(calibration, "_time", three_times)
    target = load_target(str(target_folder), "cpu", "float32")
    made.clear()
    settings = {"stored_states": False, "micro_batches": 1, "precision": "no"}
    preset = preset.model_copy(update={"training": preset.training.model_copy(update=settings)})
    calibration.training_pace(preset, ["eagle", "eagle+koala"], target, 0.1)
    assert len(made) == 3


@pytest.mark.parametrize(
    ("methods", "stored", "columns"),
    [
        (["medusa"], False, 0),
        (["medusa", "eagle", "eagle+koala"], False, 259),
        (["cut"], False, 64 + 259),
        (["cut"], True, 64),
        (["cut", "eagle"], True, 64 + 259),
    ],
)
def test_the_operations_of_a_step_count_each_distribution_once(
    preset: Preset, methods: list[str], stored: bool, columns: int
) -> None:
    cut = preset.method("eagle").model_copy(update={"draft_vocabulary": 64})
    training = preset.training.model_copy(update={"stored_states": stored})
    preset = preset.model_copy(update={"methods": {**preset.methods, "cut": cut}, "training": training})
    place = find_target(preset)
    assert needs_of(preset, methods, place, 4).label_flop == 2 * place.config.hidden_size * columns


def test_the_command(koala: Koala, target_folder: Path, tmp_path: Path) -> None:
    data, questions = conversations(tmp_path), write_questions(tmp_path / "q.jsonl", [("words", ["count 5", "and 6"])])
    common = [
        "--target", str(target_folder), "--seconds", "1", "--out", str(tmp_path / "out"), "--methods",
        "vanilla,eagle", *EAGER,
    ]  # fmt: skip
    done = koala("plan", *common, "--questions", str(questions), "--set", f"data.source={json.dumps(str(data))}")
    assert done.code == 0, done.err
    assert (
        "Nothing is missing" in done.out
        and "(2 turns)" in done.out
        and "From steps measured here, on cpu in float32" in done.out
    )
    assert not (tmp_path / "out").exists()
    done = koala("plan", *common, "--set", "data.source='none.json'")
    assert done.code == 1 and "none.json" in done.out


def test_without_the_gpu_it_asks_for_the_hours_are_those_of_a_named_one_and_say_so(
    koala: Koala, offline: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(requirements.torch.cuda, "is_available", lambda: False)
    before = time.perf_counter()
    done = koala(
        "plan", "--preset", "vicuna-7b", "--methods", "vanilla,eagle", "--seconds", "60", "--out", str(tmp_path / "out")
    )
    assert time.perf_counter() - before < 50, "nothing is measured"
    assert done.code == 1 and "Measuring" not in done.err
    assert "Not measured" in done.out and "one A100 80GB" in done.out and "40% of 312 TFLOP/s" in done.out
    preset = load_preset("vicuna-7b")
    needs = needs_of(preset, ["vanilla", "eagle"], find_target(preset), None)
    hours = least_hours(limits_of_named_gpu(requirements.dtype_of(preset)), preset, ["vanilla", "eagle"], needs)
    assert hours.training == pytest.approx(
        163.84e6 * (2 * 6.738e9 + 6 * needs.heads[0].parameters + 2 * 4096 * 32000) / (0.4 * 312e12) / 3600, rel=1e-3
    )
    assert f"{hours.training:,.1f} h of training" in done.out
    assert limits_of_named_gpu(requirements.torch.float32).flop_per_s == pytest.approx(0.4 * 19.5e12)


def test_a_method_whose_draft_model_is_not_here_is_left_out_of_the_measuring(
    koala: Koala, offline: None, target_folder: Path, tmp_path: Path
) -> None:
    questions = write_questions(tmp_path / "q.jsonl", [("words", ["count 5"])])
    done = koala(
        "plan", "--target", str(target_folder), "--seconds", "1", "--out", str(tmp_path / "out"), "--methods",
        "vanilla,prompt_lookup,draft_model",
        "--questions", str(questions), *EAGER, "--set", "methods.draft_model.options.model=someone/small",
    )  # fmt: skip
    assert done.code == 1, done.err
    assert (
        "Without draft_model, whose model is not here" in done.out
        and "The weights of the draft model someone/small" in done.out
    )


def test_sizes_are_said_as_people_say_them() -> None:
    assert [gibibytes(count) for count in (2**29, 3 * 2**30, 2**20)] == ["512 MiB", "3.0 GiB", "1 MiB"]


def test_a_damaged_file_is_not_taken_for_a_missing_one(preset: Preset, target_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "damaged.jsonl").write_text("{\n")
    evaluation = preset.evaluation.model_copy(update={"questions": str(tmp_path / "damaged.jsonl")})
    with pytest.raises(KoalaBenchError, match=r"damaged\.jsonl"):
        turns_of(preset.model_copy(update={"evaluation": evaluation}), None)
    target = load_target(str(target_folder), "cpu", "float32")
    data = preset.data.model_copy(update={"source": str(tmp_path / "damaged.jsonl")})
    assert target.tokenizer is not None
    with pytest.raises(KoalaBenchError, match=r"damaged\.jsonl"):
        tokens_to_store(
            preset.model_copy(update={"data": data}), target, chat_template("vicuna_v1.1", target.tokenizer)
        )
