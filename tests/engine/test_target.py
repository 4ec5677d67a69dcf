"""Fingerprints of targets: equal for equal weights, wherever they lie, and different for different ones; and the
threads that targets are decoded on.
"""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import pytest
import torch

from koala_bench.engine.devices import pick_threads
from koala_bench.engine.loading.targets import fingerprint, load_target
from koala_bench.engine.target import Target
from koala_bench.testing import save_tiny_target, tiny_config, tiny_target


def named(target: Target, name: str) -> Target:
    """The target as if it came from the hub, with no files at hand."""
    return dataclasses.replace(target, name=name)


def test_the_same_files_elsewhere_have_the_same_fingerprint(target_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(target_folder, tmp_path / "copy")
    first, second = (fingerprint(load_target(str(folder), "cpu")) for folder in (target_folder, tmp_path / "copy"))
    assert first == second
    assert first.keys() == {"config_sha256", "weights_sha256", "tokenizer_sha256"}
    assert all(len(value) == 64 for value in first.values())


def test_the_weights_are_the_files_whatever_dtype_they_are_loaded_in(target_folder: Path) -> None:
    single, double = (fingerprint(load_target(str(target_folder), "cpu", dtype)) for dtype in ("float32", "float64"))
    assert single["weights_sha256"] == double["weights_sha256"]


@pytest.mark.parametrize("local", [True, False])
def test_other_weights_have_another_fingerprint(target: Target, tmp_path: Path, local: bool) -> None:
    other = tiny_target(tmp_path / "other", seed=1)
    first, second = (fingerprint(each if local else named(each, "org/model")) for each in (target, other))
    assert first["weights_sha256"] != second["weights_sha256"]
    assert first["config_sha256"] == second["config_sha256"]


def test_one_changed_tensor_changes_the_fingerprint_without_files(tmp_path: Path) -> None:
    one = named(tiny_target(tmp_path / "one"), "org/model")
    before = fingerprint(one)
    with torch.no_grad():
        one.model.model.norm.weight[3] += 1e-3
    assert fingerprint(one)["weights_sha256"] != before["weights_sha256"]


def test_another_shape_has_another_fingerprint(target: Target, tmp_path: Path) -> None:
    other = tiny_target(tmp_path, tiny_config(rope_theta=5000.0))
    assert fingerprint(target)["config_sha256"] != fingerprint(other)["config_sha256"]


def test_another_tokenizer_has_another_fingerprint(target: Target) -> None:
    assert target.tokenizer is not None
    before = fingerprint(target)
    longer = type(target.tokenizer).from_pretrained(target.name)
    longer.add_tokens(["<new>"])
    after = fingerprint(dataclasses.replace(target, tokenizer=longer))
    assert {key for key in before if before[key] != after[key]} == {"tokenizer_sha256"}


def test_bare_weights_have_no_tokenizer_hash(tmp_path: Path) -> None:
    bare = load_target(str(save_tiny_target(tmp_path)), "cpu", tokenizer=False)
    assert fingerprint(bare).keys() == {"config_sha256", "weights_sha256"}


@pytest.mark.parametrize(
    ("wanted", "device", "weights", "threads"),
    [
        (None, "cpu", 28 << 20, 1),
        (None, "cpu", 640 << 20, None),
        (None, "cuda", 28 << 20, None),
        (3, "cpu", 28 << 20, 3),
        (1, "cpu", 640 << 20, 1),
    ],
)
def test_small_targets_are_decoded_on_one_thread(
    wanted: int | None, device: str, weights: int, threads: int | None
) -> None:
    assert pick_threads(wanted, torch.device(device), weights) == threads


def test_a_loaded_target_knows_its_threads_and_leaves_torchs_as_they_were(target_folder: Path) -> None:
    before = torch.get_num_threads()
    target = load_target(str(target_folder), "cpu", threads=before + 2)
    with target.computing():
        assert torch.get_num_threads() == before + 2
    assert torch.get_num_threads() == before
    assert load_target(str(target_folder), "cpu").threads == 1
