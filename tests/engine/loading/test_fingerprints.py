"""One target is one, wherever its files lie and in whatever it is loaded; its weights are read for that once."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig, PretrainedConfig

import koala_bench.engine.loading.fingerprints as fingerprints
from koala_bench.engine.loading.fingerprints import computation_sha256, weight_files, weights_sha256
from koala_bench.engine.loading.targets import fingerprint, load_target
from koala_bench.testing import save_tiny_target, tiny_config, tiny_target
from tests.support.architectures import FAMILIES


def test_a_copy_and_the_hubs_snapshot_are_one_target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tiny_target(tmp_path / "a")
    copy = shutil.copytree(tmp_path / "a", tmp_path / "b")
    (copy / "consolidated.safetensors").write_bytes(b"the same again, as some repositories have it")
    assert fingerprint(load_target(str(copy), "cpu")) == fingerprint(target)

    def cached(name: str, file: str, revision: str | None) -> str | None:
        return str(copy / file) if name == "someone/model" else None

    monkeypatch.setattr(fingerprints, "try_to_load_from_cache", cached)
    folder = fingerprints.checkpoint_folder("someone/model", target.model.config)
    assert folder == copy and weights_sha256(folder, target.model) == fingerprint(target)["weights_sha256"]


def test_the_dtype_is_no_part_of_an_architecture_and_its_sizes_are(tmp_path: Path) -> None:
    save_tiny_target(tmp_path)
    half, other = (load_target(str(tmp_path), "cpu", dtype) for dtype in ("float16", "bfloat16"))
    assert computation_sha256(half.model.config) == computation_sha256(other.model.config)
    assert fingerprint(half)["weights_sha256"] == fingerprint(other)["weights_sha256"]
    assert computation_sha256(tiny_config()) != computation_sha256(tiny_config(rms_norm_eps=1e-3))
    scaled = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}
    assert computation_sha256(tiny_config()) != computation_sha256(tiny_config(rope_parameters=scaled))


def test_a_setting_that_a_version_adds_changes_no_architecture(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = FAMILIES["gemma3-multimodal"].config()
    before = computation_sha256(tiny_config()), computation_sha256(whole)
    real = PretrainedConfig.to_dict

    def with_more(self: PretrainedConfig) -> dict[str, Any]:
        found = real(self)
        rope = found.get("rope_parameters")
        return {**found, "added": 3, **({"rope_parameters": {**rope, "added": None}} if rope else {})}

    monkeypatch.setattr(PretrainedConfig, "to_dict", with_more)
    assert (computation_sha256(tiny_config()), computation_sha256(whole)) == before


def test_other_parts_of_a_whole_are_another_architecture() -> None:
    one, other = FAMILIES["gemma3-multimodal"].config(), FAMILIES["gemma3-multimodal"].config()
    other.text_config.rms_norm_eps = 1e-3
    assert computation_sha256(one) != computation_sha256(other)


def test_weights_are_hashed_once_a_process_and_again_when_they_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tiny_target(tmp_path)
    read: list[Path] = []
    real = fingerprints.sha256_of
    monkeypatch.setattr(fingerprints, "sha256_of", lambda path: read.append(path) or real(path))
    first = fingerprint(target)
    assert fingerprint(target) == first == fingerprint(load_target(str(tmp_path), "cpu")) and len(read) == 1
    save_tiny_target(tmp_path, seed=1)
    assert fingerprint(target)["weights_sha256"] != first["weights_sha256"] and len(read) == 2


@pytest.mark.parametrize("kind", ["model.safetensors", "pytorch_model.bin"])
def test_only_the_files_that_the_index_names_are_weights(tmp_path: Path, kind: str) -> None:
    shards = {"a": "2-of-2", "b": "1-of-2", "c": "2-of-2"}
    (tmp_path / f"{kind}.index.json").write_text(json.dumps({"weight_map": shards}))
    (tmp_path / "other.safetensors").touch()
    assert [path.name for path in weight_files(tmp_path)] == ["1-of-2", "2-of-2"]


def test_without_files_the_tensors_tell(tmp_path: Path) -> None:
    one, other = tiny_target(tmp_path / "a"), tiny_target(tmp_path / "b", seed=1)
    assert weights_sha256(None, one.model) == weights_sha256(None, one.model) != weights_sha256(None, other.model)


def test_a_configuration_that_needs_arguments_has_a_hash() -> None:
    class Strict(LlamaConfig):
        def __init__(self, hidden_size: int, **others: Any) -> None:
            super().__init__(hidden_size=hidden_size, **others)

    assert computation_sha256(Strict(64)) != computation_sha256(Strict(128))
