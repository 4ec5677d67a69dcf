"""Training: one stream for all heads, exact resume, lambda = 0 changes nothing, errors that name the sample."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from heads.eagle import Eagle
from heads.medusa import Medusa
from koala_bench.dialogues.encoding import chat_template
from koala_bench.engine.loading.targets import load_target
from koala_bench.engine.target import Target
from koala_bench.errors import KoalaBenchError
from koala_bench.heads import FeatureBatch, HeadLoss
from koala_bench.presets import Preset
from koala_bench.testing import save_tiny_target, tiny_config
from koala_bench.training import loop as training
from koala_bench.training.checkpoints import load_head, read_manifest
from koala_bench.training.experiment import train_heads
from tests.support.interrupting import interrupt_at
from tests.support.small_runs import conversations, preset_for


def run(preset: Preset, methods: list[str], out: Path) -> None:
    target = load_target(preset.target.name, "cpu", "float32")
    assert target.tokenizer is not None
    train_heads(preset, methods, target, chat_template("vicuna_v1.1", target.tokenizer), out)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def equal(first: Path, second: Path) -> bool:
    one, two = weights(first), weights(second)
    return one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


def test_trainings_of_one_process_may_differ_in_precision(target_folder: Path, tmp_path: Path) -> None:
    data = conversations(tmp_path)
    for precision in ("no", "bf16", "no"):
        out = tmp_path / f"{precision}-{len(list(tmp_path.iterdir()))}"
        run(preset_for(target_folder, data, "training.steps=2", f"training.precision={precision}"), ["eagle"], out)
    plain, mixed, again = (
        sorted(tmp_path.glob("no-*"))[0],
        next(tmp_path.glob("bf16-*")),
        sorted(tmp_path.glob("no-*"))[1],
    )
    assert equal(plain / "eagle", again / "eagle") and not equal(plain / "eagle", mixed / "eagle")


def test_heads_learn_and_leave_the_target_alone(target_folder: Path, tmp_path: Path) -> None:
    preset = preset_for(target_folder, conversations(tmp_path), "training.steps=30")
    target = load_target(str(target_folder), "cpu", "float32")
    before = {name: tensor.clone() for name, tensor in target.model.state_dict().items()}
    assert target.tokenizer is not None
    train_heads(preset, ["medusa", "eagle"], target, chat_template("vicuna_v1.1", target.tokenizer), tmp_path / "out")
    assert all(torch.equal(tensor, before[name]) for name, tensor in target.model.state_dict().items())
    lines = [json.loads(line) for line in (tmp_path / "out" / "training.jsonl").read_text().splitlines()]
    for method in ("medusa", "eagle"):
        losses = [line["loss"] for line in lines if line["method"] == method and line["kind"] == "step"]
        assert losses[-1] < losses[0]
        held = [line for line in lines if line["method"] == method and line["kind"] == "held_out"]
        assert held[-1]["acceptance_length"] >= 1.0
        assert "top1_1" in held[-1]
        assert held[-1]["teacher_forced_rate_by_depth"] == held[-1]["decoded_rate_by_depth"]


def test_a_manifest_holds_the_hashes_of_what_went_in(target_folder: Path, tmp_path: Path) -> None:
    run(preset_for(target_folder, conversations(tmp_path), "training.steps=2"), ["eagle"], tmp_path / "out")
    manifest = read_manifest(tmp_path / "out" / "eagle")
    assert manifest is not None
    assert {"stream_sha256", "order_sha256", "chat_template"} <= manifest.keys()
    assert {"weights_sha256", "tokenizer_sha256", "config_sha256"} <= manifest["target"].keys()


def test_a_head_does_not_depend_on_which_others_train_beside_it(target_folder: Path, tmp_path: Path) -> None:
    preset = preset_for(target_folder, conversations(tmp_path))
    run(preset, ["eagle"], tmp_path / "alone")
    # medusa+koala looks at the target's distributions outside of autocast, eagle within.
    run(preset, ["medusa", "medusa+koala", "eagle+koala", "eagle"], tmp_path / "together")
    assert equal(tmp_path / "alone" / "eagle", tmp_path / "together" / "eagle")


def test_heads_that_read_different_layers_train_from_one_pass(
    target_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    preset = preset_for(target_folder, conversations(tmp_path), "training.steps=4")
    passes: list[int] = []
    real = Target.states
    monkeypatch.setattr(Target, "states", lambda *arguments, **options: passes.append(1) or real(*arguments, **options))
    load_target(preset.target.name, "cpu", "float32")
    look, counts = len(passes), []
    for methods, folder in ((["eagle"], "eagle"), (["eagle3"], "eagle3"), (["eagle3", "eagle"], "together")):
        passes.clear()
        run(preset, methods, tmp_path / folder)
        counts.append(len(passes))
    for method in ("eagle", "eagle3"):
        assert equal(tmp_path / method / method, tmp_path / "together" / method)
    assert counts[2] == counts[0] + counts[1] - 4 - look, (
        "each of the four steps has one pass for both, and so has the look at a loaded target"
    )


@pytest.mark.parametrize("head", ["medusa", "eagle"])
def test_lambda_zero_is_the_supervised_run_bit_for_bit(target_folder: Path, tmp_path: Path, head: str) -> None:
    data = conversations(tmp_path)
    name = f"{head}+koala"
    run(preset_for(target_folder, data, f'methods."{name}".objective_options.weight=0.0'), [name], tmp_path / "zero")
    supervised = preset_for(target_folder, data, f"methods.{head}.layers=2")
    run(supervised, [head], tmp_path / "supervised")
    run(preset_for(target_folder, data), [name], tmp_path / "adversarial")
    assert equal(tmp_path / "zero" / name, tmp_path / "supervised" / head)
    assert not equal(tmp_path / "zero" / name, tmp_path / "adversarial" / name)


def test_an_interrupted_run_ends_in_the_same_weights_and_log(
    target_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    preset = preset_for(target_folder, conversations(tmp_path))
    methods = ["medusa+koala", "eagle+koala"]
    run(preset, methods, tmp_path / "whole")

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_at(patch, training, "train_step", 8)  # after the checkpoint of step 4
        run(preset, methods, tmp_path / "broken")
    assert not (tmp_path / "broken" / "eagle+koala").exists()
    run(preset, methods, tmp_path / "broken")
    for method in methods:
        assert equal(tmp_path / "whole" / method, tmp_path / "broken" / method)
    assert (tmp_path / "whole" / "training.jsonl").read_text() == (tmp_path / "broken" / "training.jsonl").read_text()


def test_a_finished_run_is_reused(target_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    preset = preset_for(target_folder, conversations(tmp_path), "training.steps=2")
    run(preset, ["medusa", "eagle"], tmp_path / "out")
    stamp = (tmp_path / "out" / "eagle" / "model.safetensors").stat().st_mtime_ns
    run(preset, ["eagle"], tmp_path / "out")
    assert (tmp_path / "out" / "eagle" / "model.safetensors").stat().st_mtime_ns == stamp
    assert "Reusing the trained heads" in capsys.readouterr().err


def test_another_run_in_the_same_folder_is_refused_and_nothing_is_lost(target_folder: Path, tmp_path: Path) -> None:
    data = conversations(tmp_path)
    run(preset_for(target_folder, data, "training.steps=2"), ["eagle"], tmp_path / "out")
    before = weights(tmp_path / "out" / "eagle")
    with pytest.raises(KoalaBenchError, match="belongs to another run: its training differs"):
        run(preset_for(target_folder, data, "training.steps=3"), ["eagle"], tmp_path / "out")
    assert all(torch.equal(before[key], tensor) for key, tensor in weights(tmp_path / "out" / "eagle").items())


@pytest.mark.parametrize("damage", ["cut", "renamed"])
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(
    target_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    damage: str,
) -> None:
    preset = preset_for(target_folder, conversations(tmp_path), "training.steps=7", "training.checkpoint_every=2")
    run(preset, ["eagle"], tmp_path / "whole")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_at(patch, training, "train_step", 5)
        run(preset, ["eagle"], tmp_path / "out")
    checkpoint, before = tmp_path / "out" / "checkpoint.pt", tmp_path / "out" / "checkpoint.earlier.pt"
    if damage == "cut":
        checkpoint.write_bytes(checkpoint.read_bytes()[:1000])
    else:  # as a kill between two renames leaves it
        checkpoint.unlink()
    run(preset, ["eagle"], tmp_path / "out")
    assert "Resuming the training after step 2 of 7" in capsys.readouterr().err
    assert equal(tmp_path / "whole" / "eagle", tmp_path / "out" / "eagle")
    assert not before.exists()


def test_a_step_holds_the_distributions_of_one_micro_batch(
    target_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are the largest part of what a head asks for, and gradient accumulation is there to save memory."""
    preset = preset_for(target_folder, conversations(tmp_path), "training.steps=1", "training.micro_batches=4")
    held: list[int] = []
    batches: list[FeatureBatch] = []

    def watched(real: Any, head: Any, batch: FeatureBatch) -> HeadLoss:
        if head.training:
            batches.append(batch)
        found: HeadLoss = real(head, batch)
        held.append(
            sum(
                "target_probabilities" in whole.__dict__
                for whole in {id(each.whole or each): each.whole or each for each in batches}.values()
            )
        )
        return found

    for cls in (Eagle, Medusa):
        monkeypatch.setattr(cls, "loss", lambda head, batch, real=cls.loss: watched(real, head, batch))
    run(preset, ["eagle", "medusa+koala"], tmp_path / "out")
    assert len({id(batch.whole or batch) for batch in batches}) == 4
    assert max(held) == 1


def test_a_loss_that_is_not_finite_names_step_and_dialogues(
    target_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = training.features_of_each

    def spoilt(*arguments: Any, **options: Any) -> Any:
        batches = real(*arguments, **options)
        for batch in batches.values():
            batch.hidden[:] = float("nan")
        return batches

    monkeypatch.setattr(training, "features_of_each", spoilt)
    with pytest.raises(KoalaBenchError, match=r"not finite at step 1, on dialogues conversations\.jsonl:\d+"):
        run(preset_for(target_folder, conversations(tmp_path)), ["eagle"], tmp_path / "out")


def test_a_head_of_another_target_is_refused(target_folder: Path, tmp_path: Path) -> None:
    run(preset_for(target_folder, conversations(tmp_path), "training.steps=2"), ["eagle"], tmp_path / "out")
    other: Target = load_target(
        str(save_tiny_target(tmp_path / "other", tiny_config(hidden_size=64))), "cpu", "float32"
    )
    with pytest.raises(KoalaBenchError, match="for a target of width 32"):
        load_head(tmp_path / "out" / "eagle", other)
