"""The page of architectures says what the code does, of every family; and what else loading a target refuses."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from koala_bench.decoding.loop import VANILLA_TREE, Vanilla, decode
from koala_bench.engine.loading.outer_layers import load_outer_layers
from koala_bench.engine.loading.spread import load_spread
from koala_bench.engine.loading.targets import load_target
from koala_bench.errors import KoalaBenchError
from koala_bench.testing import save_tiny_target, tiny_target
from tests.decoding.test_decoding import PROMPT, vanilla
from tests.support.architectures import FAMILIES, PAGE, RECORDED_ALIKE, row


def listed() -> dict[str, str]:
    lines = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    return {line.split(" | ")[0].removeprefix("| "): line for line in lines if not line.startswith(("| Family", "| :"))}


def test_the_page_lists_every_family() -> None:
    assert list(listed()) == list(FAMILIES)
    assert "DIFFERENT" not in PAGE.read_text(encoding="utf-8")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_is_decoded_as_the_page_says(family: str, tmp_path: Path) -> None:
    engines = ("eager",) if family in RECORDED_ALIKE else ("eager", "graph")
    found = row(family, tmp_path, engines)
    assert "DIFFERENT" not in found
    if f"transformers {transformers.__version__}" in PAGE.read_text(encoding="utf-8"):
        assert listed()[family].startswith(found)


@pytest.mark.exhaustive
@pytest.mark.parametrize("family", sorted(RECORDED_ALIKE))
def test_a_family_like_another_one_is_recorded_as_the_page_says(family: str, tmp_path: Path) -> None:
    assert row(family, tmp_path) == listed()[family]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize(("family", "served"), [("llama", True), ("mpt", False)])
def test_branching_trees_are_told_apart_in_every_dtype(tmp_path: Path, family: str, served: bool, dtype: str) -> None:
    made = FAMILIES[family]
    if served:
        tiny_target(tmp_path, made.config(), dtype, attention=made.attention)
        return
    with pytest.raises(KoalaBenchError, match="counts rows instead of positions"):
        tiny_target(tmp_path, made.config(), dtype, attention=made.attention)


def test_answers_stop_short_of_where_rotary_factors_change(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tiny_target(tmp_path, FAMILIES["phi3-longrope"].config(), "float64")
    assert "more than 80 tokens" in capsys.readouterr().err
    prompt = [3 + (7 * place) % 250 for place in range(60)]
    assert len(vanilla(target, 19, prompt=prompt).tokens) == 19
    cache = target.new_cache(60, 256)
    assert cache.capacity == 256
    with pytest.raises(KoalaBenchError, match="more than 80 tokens"):
        decode(target, Vanilla(), VANILLA_TREE, prompt, 40, (), cache)


def test_soft_capped_attention_names_the_option_that_helps(tmp_path: Path) -> None:
    save_tiny_target(tmp_path, FAMILIES["gemma2"].config())
    for load in (load_target, load_spread, partial(load_outer_layers, known={})):
        with pytest.raises(KoalaBenchError, match=r"no attention 'sdpa' for .* Use --attention eager"):
            load(str(tmp_path), "cpu")
    target = load_target(str(tmp_path), "cpu", attention="eager")
    assert len(vanilla(target, 3).tokens) == 3


def test_a_quantised_target_is_refused_with_the_package_that_it_needs(tmp_path: Path) -> None:
    save_tiny_target(tmp_path)
    settings: dict[str, Any] = json.loads((tmp_path / "config.json").read_text())
    settings["quantization_config"] = {
        "quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm"
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(settings))
    with pytest.raises(KoalaBenchError, match="Install the package"):
        load_target(str(tmp_path), "cpu")


def test_a_mixture_of_experts_falls_back_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_tiny_target(tmp_path, FAMILIES["mixtral"].config())
    target = load_target(str(tmp_path), "cpu", "float32", engine="graph")
    assert target.engine == "eager"
    assert "engine eager" in capsys.readouterr().err
    with torch.inference_mode():
        assert len(vanilla(target, 8, prompt=PROMPT).tokens) == 8
