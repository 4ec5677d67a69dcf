"""Exports trained heads for distribution: in half precision, without local paths, with a model card."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from koala_bench.common.draft_vocabulary import BUFFER
from koala_bench.common.files import make_folder, write_text
from koala_bench.errors import KoalaBenchError
from koala_bench.training.checkpoints import in_dtype, read_config, read_manifest, read_weights, write_tensors

_CARD = """# {method}, a draft head for {target}

- Head `{head}` with {layers} layer{s}{objective}, options {options}; {parameters:,} parameters, \
stored in {dtype}{vocabulary}.
- Trained with koala-bench for {steps:,} steps, {tokens:,} tokens (prompts included) of `{source}` (stream {stream}), \
seed {seed}; all of it is in
  `training.json`.
- It learned from the target whose hashes `training.json` names; for other weights it drafts worse. \
What it drafts is verified, so
  it changes speed and not answers.
- Use it: `koala-bench evaluate --preset PRESET --methods vanilla,{method} --heads FOLDER`, \
FOLDER being the one that holds this
  folder.
"""


def ship_head(source: Path, out: Path, dtype: torch.dtype | None) -> list[Path]:
    """Copy a trained head; returns the files written.

    Args:
        dtype: of its floating-point tensors; as they are stored if None.

    Raises:
        KoalaBenchError: the head is missing or damaged, or the folder cannot be written.
    """
    config, manifest, tensors = read_config(source), read_manifest(source), read_weights(source)
    if manifest is None:
        raise KoalaBenchError(f"{source / 'training.json'} is missing or damaged.", "Train the head again.")
    kept = tensors if dtype is None else in_dtype(tensors, dtype)
    texts = {
        "config.json": json.dumps(config, indent=2) + "\n",
        "training.json": json.dumps(manifest, indent=2) + "\n",
        "README.md": _card(source.name, config, manifest, kept),
    }
    make_folder(out)
    for name, text in texts.items():
        write_text(out / name, text)
    write_tensors(out / "model.safetensors", kept)  # last: a folder with weights is complete
    return [out / name for name in (*texts, "model.safetensors")]


def _card(method: str, config: dict[str, Any], manifest: dict[str, Any], tensors: dict[str, torch.Tensor]) -> str:
    floats = {name: tensor for name, tensor in tensors.items() if tensor.is_floating_point()}
    drafted = len(tensors[BUFFER]) if BUFFER in tensors else None
    return _CARD.format(
        method=method,
        target=config["target"]["name"],
        head=config["head"],
        layers=config["layers"],
        s="" if config["layers"] == 1 else "s",
        objective=f" and the objective `{config['objective']}` {config['objective_options']}"
        if config.get("objective")
        else "",
        options=config["options"] or "as they are by default",
        parameters=sum(tensor.numel() for tensor in floats.values()),
        dtype=str(next(iter(floats.values())).dtype).removeprefix("torch."),
        vocabulary=f"; it drafts {drafted:,} tokens" if drafted else "",
        steps=manifest.get("steps", 0),
        tokens=manifest.get("tokens", 0),
        source=manifest.get("data", {}).get("source", "unknown"),
        stream=str(manifest.get("stream_sha256", "unknown"))[:12],
        seed=manifest.get("training", {}).get("seed", "unknown"),
    )
