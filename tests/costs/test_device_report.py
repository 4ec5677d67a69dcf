"""The device report: what it measures with random weights, what it asks of published speedups, and what it does with
what does not fit.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from koala_bench.costs import device_report
from koala_bench.costs.bandwidth import bandwidth
from koala_bench.costs.device import MethodCost, ModelCost, model_cost, random_model
from koala_bench.costs.device_report import published_speedups
from koala_bench.costs.scaling import StepCost
from koala_bench.engine import shapes
from koala_bench.presets import load_preset
from koala_bench.results.tables.published import read_paper
from tests.support.commands import Koala

CPU = torch.device("cpu")
PAPER = Path(__file__).parents[2] / "reproduce" / "paper.toml"


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a shape that any machine measures in seconds."""
    monkeypatch.setitem(shapes._LLAMA, "toy", (32, 2, 2, 64))
    for place in (shapes, device_report):
        monkeypatch.setattr(place, "SHAPES", ("toy", "33b"))
    return "toy"


def test_a_model_and_its_methods_are_measured(toy: str) -> None:
    target = random_model(toy, CPU, torch.float32)
    preset = load_preset("vicuna-7b")
    methods = {name: (preset.method(name), preset.method(name).tree) for name in ("medusa", "eagle+koala")}
    cost = model_cost(target, toy, methods, (1, 2, 64), tokens=4, rounds=2)
    assert [step.nodes for step in cost.steps] == [1, 2, 64]
    assert cost.parameters == target.parameters
    # All weights but the input embeddings', and keys and values of 2 layers behind 256 + 2 tokens.
    assert cost.bytes_per_token == 4 * (target.parameters - 32000 * 32 + 2 * 2 * 32 * 258)
    assert [(each.method, each.head, each.layers, each.nodes, each.depth) for each in cost.methods] == [
        ("medusa", "medusa", 1, 64, 4),
        ("eagle+koala", "eagle", 2, 26, 5),
    ]
    for each in cost.methods:
        assert each.step_s > each.draft_s + each.verify_s > 0
        assert each.break_even == each.step_s / each.vanilla_s
    one, many = cost.verification(1), cost.verification(64)
    assert one == 1 and many is not None and many > 0
    assert cost.verification(3) is None


def test_vanilla_is_measured_without_methods_too(toy: str) -> None:
    cost = model_cost(random_model(toy, CPU, torch.float32), toy, {}, (1,), tokens=3, rounds=1)
    assert cost.vanilla_s > 0
    assert cost.methods == ()


def test_a_copy_has_a_rate() -> None:
    found = bandwidth(CPU, 1 << 20)
    assert min(found.copied, found.read) > 1e6 and found.most == max(found.copied, found.read)


def test_what_published_speedups_are_of() -> None:
    def found(size: str, head: str, layers: int = 1, objective: str | None = None) -> list[float]:
        return published_speedups(
            read_paper(PAPER),
            size,
            MethodCost("its name", head, layers, objective, "chain-4", 5, 4, 1.0, 0.1, 0.8, 0.9),
        )

    assert found("7b", "eagle") == [2.90]
    assert found("13b", "medusa") == [2.33]  # Medusa-1's, not version 0.1's
    assert found("7b", "eagle", 2, "koala") == pytest.approx([2.90 + 0.24, 2.90 + 0.41])
    assert found("160m", "eagle") == found("7b", "hydra") == []
    assert (
        found("7b", "eagle", 2) == found("7b", "eagle", 1, "koala") == []
    )  # of either part alone nothing is published


def test_the_command_writes_what_it_measured_and_names_what_does_not_fit(
    koala: Koala, toy: str, tmp_path: Path
) -> None:
    options = (
        "--device",
        "cpu",
        "--paper",
        str(PAPER),
        "--out",
        str(tmp_path),
        "--tokens",
        "3",
        "--rounds",
        "1",
        "--methods",
        "vanilla,eagle",
    )
    result = koala("device-report", "--sizes", "toy,33b", "--engines", "eager", *options)
    assert result.code == 0, result.err
    text = (tmp_path / "device-report.md").read_text(encoding="utf-8")
    assert result.out == text
    assert "| 33b |  | not measured: A model of 33b needs 121.2 GiB," in text
    assert "| toy | eager | eagle | eagle/mc_sim_7b_63 | 26 |" in text
    content = json.loads((tmp_path / "device-report.json").read_text(encoding="utf-8"))
    assert [(each["size"], each["engine"]) for each in content["models"]] == [("toy", "eager")]
    assert {"python", "packages", "threads"} <= content["environment"].keys()
    assert (tmp_path / "figure-nodes.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--sizes", "8b"), "'8b' is no size"),
        (("--sizes", "33b"), "Nothing could be measured: A model of 33b needs"),
        (("--engines", "fast"), "'fast' is no engine"),
        (("--methods", "hawk"), "hawk"),
        (("--device", "cuda:99"), "no CUDA device"),
    ],
)
def test_mistakes_end_in_one_line(koala: Koala, toy: str, tmp_path: Path, options: tuple[str, ...], words: str) -> None:
    device = () if "--device" in options else ("--device", "cpu")
    result = koala("device-report", *device, *options, "--out", str(tmp_path / "out"), "--paper", str(PAPER))
    assert result.code == 2
    assert words in result.complaint


def test_ratios_are_of_one_node() -> None:
    steps = (StepCost(256, 1, 2.0, 0.1), StepCost(256, 8, 3.0, 0.2))
    assert ModelCost("7b", "graph", 1, 1, 2.0, steps, ()).verification(8) == 1.5
