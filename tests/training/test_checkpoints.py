"""Trained heads on disk: they come back as they were, and every kind of damage is one clear error."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from koala_bench.engine.target import Target
from koala_bench.errors import KoalaBenchError
from koala_bench.presets import MethodPreset
from koala_bench.training.checkpoints import load_head, read_manifest, save_head, save_token_order
from koala_bench.training.loop import build_head

PRESET = MethodPreset(head="medusa", layers=2, options={"heads": 3}, objective="koala", tree="chain-2")


@pytest.fixture
def folder(target: Target, tmp_path: Path) -> Path:
    save_head(tmp_path / "head", build_head(target, PRESET, seed=4), PRESET, target, {"steps": 5, "method": "mine"})
    return tmp_path / "head"


def test_a_head_comes_back_as_it_was(target: Target, folder: Path) -> None:
    head, config, weights = load_head(folder, target)
    expected = build_head(target, PRESET, seed=4).state_dict()
    assert head.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in head.state_dict().items())
    assert (config["head"], config["layers"], config["options"], config["objective"]) == (
        "medusa",
        2,
        {"heads": 3},
        "koala",
    )
    assert len(weights) == 64
    assert (head.max_depth, head.training) == (3, False)
    assert read_manifest(folder) == {"steps": 5, "method": "mine"}


@pytest.mark.skipif(os.name == "nt", reason="Windows has no umask")
@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
def test_who_may_read_a_head_is_what_the_umask_says(target: Target, tmp_path: Path, umask: int, mode: int) -> None:
    before = os.umask(umask)
    try:
        save_head(tmp_path / "head", build_head(target, PRESET, seed=4), PRESET, target, {})
        save_token_order(tmp_path / "head", torch.arange(3))
    finally:
        os.umask(before)
    files = list((tmp_path / "head").iterdir())
    assert len(files) == 4 and {file.stat().st_mode & 0o777 for file in files} == {mode}


def test_a_head_takes_the_targets_dtype(target64: Target, folder: Path) -> None:
    assert {tensor.dtype for tensor in load_head(folder, target64)[0].state_dict().values()} == {torch.float64}


def test_a_head_without_weights_is_not_finished(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    assert read_manifest(folder) is None
    assert read_manifest(folder / "nowhere") is None


@pytest.mark.parametrize("content", ["", "{", "[]", "5", "\xff"])
def test_a_damaged_manifest_is_none_and_said_to_be(
    folder: Path, content: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "training.json").write_text(content, encoding="latin-1")
    assert read_manifest(folder) is None
    assert f"{folder / 'training.json'} is missing or damaged" in capsys.readouterr().err


@pytest.mark.parametrize("missing", ["head", "layers", "options", "target"])
def test_a_configuration_that_lacks_something_is_damaged(target: Target, folder: Path, missing: str) -> None:
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    del config[missing]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(KoalaBenchError, match=r"config\.json is damaged"):
        load_head(folder, target)


@pytest.mark.parametrize("content", ["[]", "5", "null", '{"target": 5, "head": "medusa", "layers": 1, "options": {}}'])
def test_a_configuration_that_is_none_is_damaged(target: Target, folder: Path, content: str) -> None:
    (folder / "config.json").write_text(content)
    with pytest.raises(KoalaBenchError, match=r"config\.json is damaged"):
        load_head(folder, target)


def test_weights_of_another_shape_or_not_finite_are_refused(target: Target, folder: Path) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    first = next(iter(tensors))
    save_file({**tensors, first: torch.full_like(tensors[first], torch.inf)}, path)
    with pytest.raises(KoalaBenchError, match="not finite"):
        load_head(folder, target)
    save_file({**tensors, first: torch.zeros(3)}, path)
    with pytest.raises(KoalaBenchError, match="do not fit the head 'medusa'"):
        load_head(folder, target)
    save_file({name: tensor for name, tensor in tensors.items() if name != first}, path)
    with pytest.raises(KoalaBenchError, match="do not fit the head 'medusa'"):
        load_head(folder, target)
