"""Targets in every dtype: heads train beside them in float32, are watched in theirs, and are stored as narrow."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from koala_bench.decoding.loop import VANILLA_TREE, Vanilla, decode
from koala_bench.dialogues.encoding import chat_template
from koala_bench.engine.devices import pick_device
from koala_bench.engine.loading.targets import load_target
from koala_bench.errors import KoalaBenchError
from koala_bench.training.checkpoints import load_head
from koala_bench.training.experiment import train_heads
from koala_bench.tree import load_template
from tests.support.small_runs import conversations, preset_for
from tests.training.test_training import weights

METHODS = ["medusa", "medusa+koala", "eagle", "eagle+koala"]


def train(target_folder: Path, data: Path, out: Path, dtype: str, *more: str) -> None:
    target = load_target(str(target_folder), "cpu", dtype)
    assert target.tokenizer is not None
    train_heads(
        preset_for(target_folder, data, "training.steps=4", *more),
        METHODS,
        target,
        chat_template("vicuna_v1.1", target.tokenizer),
        out,
    )


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_heads_are_trained_and_watched_beside_a_target_of_any_dtype(
    target_folder: Path, tmp_path: Path, dtype: str
) -> None:
    train(target_folder, conversations(tmp_path), tmp_path / "out", dtype)
    lines = [json.loads(line) for line in (tmp_path / "out" / "training.jsonl").read_text().splitlines()]
    assert {line["method"] for line in lines if line["kind"] == "held_out" and line["acceptance_length"] >= 1} == set(
        METHODS
    )
    target = load_target(str(target_folder), "cpu", dtype)
    stored = torch.float32 if dtype == "float64" else target.dtype
    for method in METHODS:
        assert {tensor.dtype for tensor in weights(tmp_path / "out" / method).values()} == {stored}
        head, _, _ = load_head(tmp_path / "out" / method, target)
        answer = decode(target, head, load_template("3x2"), [1, 70, 81, 82], 20, ())
        assert len(answer.tokens) == 20
        if dtype == "float64":
            assert answer.tokens == decode(target, Vanilla(), VANILLA_TREE, [1, 70, 81, 82], 20, ()).tokens


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_watching_a_head_does_not_change_it(target_folder: Path, tmp_path: Path, dtype: str) -> None:
    data = conversations(tmp_path)
    train(target_folder, data, tmp_path / "once", dtype)
    train(target_folder, data, tmp_path / "often", dtype, "training.held_out_evaluations=4")
    for method in METHODS:
        once, often = weights(tmp_path / "once" / method), weights(tmp_path / "often" / method)
        assert all(torch.equal(tensor, often[name]) for name, tensor in once.items())


@pytest.mark.parametrize("name", ["meta", "mps", "xpu"])
def test_devices_that_were_never_tried_are_refused(name: str) -> None:
    with pytest.raises(KoalaBenchError, match="--device auto, cpu, cuda"):
        pick_device(name)


def test_a_run_whose_probes_take_no_step_is_watched_all_the_same(target_folder: Path, tmp_path: Path) -> None:
    target = load_target(str(target_folder), "cpu", "float32")
    target.model.generation_config.eos_token_id = list(range(259))  # every answer ends with its first token
    assert target.tokenizer is not None
    preset = preset_for(target_folder, conversations(tmp_path), "training.steps=2")
    train_heads(preset, ["eagle"], target, chat_template("vicuna_v1.1", target.tokenizer), tmp_path / "out")
    lines = [json.loads(line) for line in (tmp_path / "out" / "training.jsonl").read_text().splitlines()]
    assert [line["acceptance_length"] for line in lines if line["kind"] == "held_out"] == [None]
