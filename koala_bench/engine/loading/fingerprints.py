"""Hashes that identify a target's weights, whatever their path; each file is hashed once in a process."""

from __future__ import annotations

import hashlib
import json
from functools import lru_cache
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from huggingface_hub import try_to_load_from_cache

from koala_bench.common.files import sha256_of

# Fields of a configuration that depend on how and from where a model was loaded.
_OF_LOADING = ("dtype", "torch_dtype", "transformers_version", "_name_or_path", "_attn_implementation", "use_cache")
_of_tensors: WeakKeyDictionary[Any, tuple[int, str]] = WeakKeyDictionary()


def checkpoint_folder(name: str, config: Any) -> Path | None:
    """Where a checkpoint lies on this machine: a folder of that name, or the snapshot of it in the hub's cache."""
    if Path(name).is_dir():
        return Path(name)
    try:
        found = try_to_load_from_cache(name, "config.json", revision=getattr(config, "_commit_hash", None))
    except ValueError:  # no name of a model
        return None
    return Path(found).parent if isinstance(found, str) else None


def weight_files(folder: Path) -> list[Path]:
    """The files of a checkpoint that weights are loaded from; a full copy of the repository has others besides."""
    for whole in ("model.safetensors", "pytorch_model.bin"):
        index = folder / f"{whole}.index.json"
        if index.is_file():
            shards = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
            return [folder / name for name in sorted(set(shards))]
        if (folder / whole).is_file():
            return [folder / whole]
    return sorted(folder.glob("*.safetensors"))


def weights_sha256(folder: Path | None, model: Any) -> str:
    """Hash of the weights' files, otherwise of a sample of each tensor."""
    files = weight_files(folder) if folder is not None else []
    if files:
        return hashlib.sha256("".join(hash_of_file(path) for path in files).encode()).hexdigest()
    tensors = sorted(model.state_dict().items())
    changes = sum(tensor._version for _, tensor in tensors)  # counted by torch: how often each was written into
    if model not in _of_tensors or _of_tensors[model][0] != changes:
        digest = hashlib.sha256()
        for name, tensor in tensors:
            digest.update(name.encode())
            digest.update(tensor.detach().flatten()[:: max(1, tensor.numel() // 4096)].float().cpu().numpy().tobytes())
        _of_tensors[model] = changes, digest.hexdigest()
    return _of_tensors[model][1]


def computation_sha256(config: Any) -> str:
    """Hash of a configuration's values that are not its class's defaults, without fields that depend on loading: the
    same in float16 and in bfloat16, and in a version of transformers whose configurations have more settings.
    """
    return hashlib.sha256(json.dumps(_own_settings(config), sort_keys=True).encode()).hexdigest()


def _own_settings(config: Any) -> dict[str, Any]:
    found = _other_values(json.loads(config.to_json_string(use_diff=False)), _defaults(type(config)))
    parts = {name: getattr(config, name, None) for name in getattr(config, "sub_configs", {})}
    parts = {name: _own_settings(part) for name, part in parts.items() if hasattr(part, "to_json_string")}
    return {**found, **parts, "model_type": config.model_type}


def _defaults(kind: Any) -> dict[str, Any]:
    """The values of a configuration's class; none where it cannot be made without arguments."""
    if getattr(kind, "has_no_defaults_at_init", False):
        return {}
    try:
        usual = kind()
    except (TypeError, ValueError):
        return {}
    return dict(json.loads(usual.to_json_string(use_diff=False)))


def _other_values(values: dict[str, Any], default: dict[str, Any]) -> dict[str, Any]:
    """The values that are not the default ones, nor null where there is no default."""
    found = {}
    for key, value in values.items():
        usual = default.get(key)
        if key not in _OF_LOADING and value != usual:
            inner = usual if isinstance(usual, dict) else {}
            found[key] = _other_values(value, inner) if isinstance(value, dict) else value
    return found


def hash_of_file(path: Path) -> str:
    """SHA-256 of a file, read once in a process as long as it does not change."""
    state = path.stat()
    return _hashed(path, state.st_size, state.st_mtime_ns)


@lru_cache(maxsize=256)
def _hashed(path: Path, size: int, changed: int) -> str:
    """The hash of a file that has this size and was last changed then; weights of 26 GB take a minute each time."""
    return sha256_of(path)
