"""Layouts of other systems: how each head is exported, and which file belongs to which head."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from koala_bench.common.draft_vocabulary import BUFFER
from koala_bench.common.files import sha256_of, write_text
from koala_bench.common.progress import log_line
from koala_bench.engine.loading.targets import fingerprint
from koala_bench.engine.target import Target
from koala_bench.errors import KoalaBenchError
from koala_bench.heads import TargetSpec
from koala_bench.interop import eagle, eagle3, hydra, medusa
from koala_bench.interop.checkpoints import Exported, Imported, first_of, make_head, read_tensors
from koala_bench.presets import MethodPreset
from koala_bench.training.checkpoints import load_head, read_config, read_weights, save_head, write_tensors

# Head -> layout -> what writes it, given the built head, its tensors and its target.
_Writer = Callable[[Any, Mapping[str, torch.Tensor], Target], Exported]
WRITERS: Mapping[str, Mapping[str, _Writer]] = {
    "medusa": {"official": medusa.to_official, "vllm": medusa.to_vllm},
    "hydra": {"official": hydra.to_official},
    "eagle": {"official": eagle.to_official, "vllm": eagle.to_vllm},
    "eagle3": {"official": eagle3.to_official, "vllm": eagle3.to_vllm, "sglang": eagle3.to_sglang},
}
LAYOUTS = ("official", "vllm", "sglang")


def _read_eagle(folder: Path, spec: TargetSpec) -> Imported:
    """EAGLE-1 and EAGLE-3 use the same file names; their contents differ."""
    tensors = read_tensors(first_of(folder, *eagle.FILES))
    if eagle3.is_of_speculators(tensors):
        return eagle3.read(folder, spec, tensors)
    for kind in (eagle3, eagle):
        if any(name.startswith(kind.OWN) for name in tensors):
            return kind.read(folder, spec, tensors)
    raise KoalaBenchError(
        f"{tensors.path} is neither an EAGLE-1 nor an EAGLE-3 head: nothing in it is called {eagle.OWN}* or"
        f" {eagle3.OWN}*.",
        "Give the folder of a released head; other systems use other names.",
    )


# File -> its reader. In this order, since folders of Medusa and Hydra have a file with a name of their own.
_READERS: Mapping[str, Callable[..., Imported]] = {
    **dict.fromkeys(medusa.FILES, medusa.read),
    **dict.fromkeys(hydra.FILES, hydra.read),
    **dict.fromkeys(eagle.FILES, _read_eagle),
}
_TREES = {
    "medusa": "medusa/mc_sim_7b_63",
    "hydra": "medusa/mc_sim_7b_63",
    "eagle": "eagle/mc_sim_7b_63",
    "eagle3": "dynamic-7x10x59",
}


def import_head(folder: Path, target: Target, out: Path) -> Imported:
    """Read an official checkpoint strictly and write it as a head of this project, ``out/config.json`` and the rest.
    Raises KoalaBenchError where the folder holds no checkpoint that is known, it does not fit the target, or ``out``
    holds another head or another program's configuration."""
    file = next((name for name in _READERS if (folder / name).is_file()), None)
    if file is None:
        fault = f"{folder} holds none of {', '.join(_READERS)}." if folder.is_dir() else f"There is no folder {folder}."
        raise KoalaBenchError(fault, "Give the folder of a released Medusa, Hydra or EAGLE head.")
    if (out / "model.safetensors").exists():
        raise KoalaBenchError(f"{out} holds a head already.", "Choose another --out, or delete it.")
    if (out / "config.json").exists():  # a head of ours there is left by an interrupted import
        try:
            read_config(out)
        except KoalaBenchError as error:
            raise KoalaBenchError(
                f"{out / 'config.json'} is there already, and of no head of this project.",
                "Choose another --out, or delete it.",
            ) from error
    imported = _READERS[file](folder, target.spec())
    options, ids = dict(imported.options), imported.tensors.get(BUFFER)
    layers, drafted, kind = options.pop("layers"), None if ids is None else len(ids), imported.head
    preset = MethodPreset(head=kind, layers=layers, options=options, tree=_TREES[kind], draft_vocabulary=drafted)
    head = make_head(imported, target.spec()).float()
    head.load_state_dict(imported.tensors)  # again, since the target may compute in a lower precision than the file's
    source = {"file": file, "sha256": sha256_of(folder / file), "notes": list(imported.notes)}
    save_head(out, head, preset, target, {"target": fingerprint(target), "imported": source})
    return imported


def export_head(folder: Path, target: Target, layout: str, out: Path, dtype: torch.dtype | None) -> list[Path]:
    """Write a head of this project as another system reads it; returns the files.

    Args:
        layout: out of ``LAYOUTS``.
        dtype: of the tensors; as they are stored if None.

    Raises:
        KoalaBenchError: the head is missing or damaged or another target's, there is no such layout for it, the layout
            cannot hold it, or ``out`` holds files of these names.
    """
    head, config, _ = load_head(folder, target)
    writers = WRITERS.get(config["head"], {})
    if layout not in writers:
        one = f"Use --layout {' or '.join(writers)}." if writers else f"These can be exported: {', '.join(WRITERS)}."
        raise KoalaBenchError(f"There is no {layout} layout for the head '{config['head']}'.", one)
    made = writers[layout](head, read_weights(folder), target)
    paths = [out / made.file, out / "config.json"]
    for path in paths:
        if path.exists():
            raise KoalaBenchError(f"{path} is there already.", "Choose another --out, or delete it.")
    tensors = {
        name: (tensor.to(dtype) if dtype and tensor.is_floating_point() else tensor).contiguous()
        for name, tensor in made.tensors.items()
    }
    written = {**made.config, "torch_dtype": str(dtype or torch.float32).removeprefix("torch.")}
    try:
        write_tensors(paths[0], tensors, {"format": "pt"})
        write_text(paths[1], json.dumps(written, indent=2) + "\n")
    except BaseException:
        paths[0].unlink(missing_ok=True)  # a partial export would block the next one
        raise
    for note in made.notes:
        log_line(note)
    return paths
