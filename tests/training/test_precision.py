"""The precision of a training that names none: decided once, kept with the heads, and never mixed up."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from koala_bench.dialogues.encoding import chat_template
from koala_bench.engine.target import Target
from koala_bench.presets import Preset
from koala_bench.testing import tiny_target
from koala_bench.training import loop as training
from koala_bench.training import precision
from koala_bench.training.experiment import heads_finished, train_heads
from koala_bench.training.precision import resolve, settle_precision
from tests.support.small_runs import conversations, preset_for

CPU = torch.device("cpu")


def machine(monkeypatch: pytest.MonkeyPatch, gain: float) -> None:
    """One whose products in bfloat16 are so many times as fast."""
    monkeypatch.setattr(precision, "_gain_on_cpu", lambda: gain)


def trained_in(out: Path, method: str = "eagle") -> str:
    manifest = json.loads((out / method / "training.json").read_text())
    found: str = manifest["training"]["precision"]
    return found


def test_what_is_named_is_taken_and_auto_is_what_is_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, 2.0)
    assert [resolve(name, CPU) for name in ("no", "bf16", "auto")] == ["no", "bf16", "bf16"]
    machine(monkeypatch, 1.05)
    assert resolve("auto", CPU) == "no", "what a step does besides eats up so little"


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="the setting is oneDNN's for x86")
def test_a_processor_without_bfloat16_instructions_trains_in_float32() -> None:
    ask = (
        "import torch; from koala_bench.training.precision import resolve; print(resolve('auto', torch.device('cpu')))"
    )
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX512_CORE_VNNI", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.strip() == "no"


class Runs:
    """Trainings of one small preset; ``steps`` counts those taken."""

    def __init__(self, target: Target, folder: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.target, self.folder, self.data, self.steps, self.stop_at = target, folder, data, 0, -1
        real = training.train_step

        def counted(*arguments: Any) -> Any:
            if self.steps == self.stop_at:
                raise KeyboardInterrupt
            self.steps += 1
            return real(*arguments)

        monkeypatch.setattr(training, "train_step", counted)

    def preset(self, name: str) -> Preset:
        return preset_for(
            self.folder, self.data, "training.steps=3", "training.checkpoint_every=1", f"training.precision={name}"
        )

    def __call__(self, out: Path, name: str = "auto") -> int:
        before = self.steps
        assert self.target.tokenizer is not None
        train_heads(self.preset(name), ["eagle"], self.target, chat_template("vicuna_v1.1", self.target.tokenizer), out)
        return self.steps - before


@pytest.fixture
def runs(target: Target, target_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Runs:
    return Runs(target, target_folder, conversations(tmp_path), monkeypatch)


def test_a_finished_head_serves_on_a_machine_that_would_decide_otherwise(
    runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    machine(monkeypatch, 2.0)
    assert runs(out) == 3 and trained_in(out) == "bf16"
    machine(monkeypatch, 0.5)
    assert runs(out) == 0 and runs(out, "bf16") == 0
    template = chat_template("vicuna_v1.1", runs.target.tokenizer)  # type: ignore[arg-type]
    assert heads_finished(runs.preset("auto"), ["eagle"], runs.target, template, out)
    assert not heads_finished(runs.preset("no"), ["eagle"], runs.target, template, out), "asked for in float32"


def test_an_interrupted_training_goes_on_in_its_own_precision(
    runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(monkeypatch, 2.0)
    runs.stop_at = 2
    with pytest.raises(KeyboardInterrupt):
        runs(tmp_path / "out")
    machine(monkeypatch, 0.5)
    runs.stop_at = -1
    assert runs(tmp_path / "out") == 1 and trained_in(tmp_path / "out") == "bf16"


def test_trainings_of_one_run_take_the_precision_of_the_first(
    runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(monkeypatch, 2.0)
    runs(tmp_path / "seed-0")
    machine(monkeypatch, 0.5)
    preset = runs.preset("auto")
    beside = settle_precision(preset, ["eagle"], tmp_path / "seed-1", CPU, [tmp_path / "seed-0"])
    alone = settle_precision(preset, ["eagle"], tmp_path / "seed-1", CPU)
    assert (beside.training.precision, alone.training.precision) == ("bf16", "no")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_head_is_stored_as_narrow_as_its_target(
    runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    machine(monkeypatch, 2.0)
    weights = runs.target.model.state_dict()
    monkeypatch.setattr(runs, "target", tiny_target(tmp_path / "target"))
    runs.target.model.load_state_dict({name: weight.to(dtype).float() for name, weight in weights.items()})
    runs(tmp_path / "out")
    stored = load_file(tmp_path / "out" / "eagle" / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values() if tensor.is_floating_point()} == {dtype}
