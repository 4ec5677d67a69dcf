"""The target's states of a training's dialogues on disk: one pass of the target serves every epoch, seed and variant.

A folder holds ``states.bin``, the states of all tokens dialogue by dialogue; ``likeliest.bin``, the target's next token
at each; and ``states.json``, which identifies target and data. States are bfloat16 (float16 for a float16 target): 2
bytes per token, layer and dimension. Likeliest tokens are int32.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from koala_bench.common.files import doing, make_folder, sha256_of, write_text
from koala_bench.common.process_group import ProcessGroup
from koala_bench.common.progress import log_line, progress
from koala_bench.common.reading import object_in
from koala_bench.dialogues.encoding import EncodedDialogue
from koala_bench.dialogues.streams import TokenBatch, collate, groups_of
from koala_bench.engine.target import Target
from koala_bench.errors import KoalaBenchError

# Tokens of one pass, padding included: enough to fill two cores, and little beside the weights on a GPU.
_PASS_TOKENS = {"cpu": 2048, "cuda": 16384}
_NAMES = {"stream_sha256": "training data", "held_out_sha256": "held-out data"}
STATE_BYTES = 2  # of a dimension, in either dtype
_TOKEN_BYTES = 4  # of a likeliest token
_VERSION = 2  # of the folder: 1 had no likeliest tokens
_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class StoredStates:
    """States of dialogues, memory-mapped.

    Attributes:
        layers: which hidden states, as ``DraftHead.features``, in ascending order with -1 last.
        starts: row of the first token of each dialogue and, last, the number of rows; int64 [dialogues + 1].
        rows: [tokens, layers, hidden_size], bfloat16 or float16, mapped from the file.
        likeliest: int32 [tokens], mapped from its file: to find it again would cost the whole output layer.
        sha256: of the states' file, for the manifest of what is trained on it.
    """

    layers: tuple[int, ...]
    starts: np.ndarray[Any, np.dtype[np.int64]]
    rows: torch.Tensor
    likeliest: torch.Tensor
    sha256: str

    def read(self, batch: TokenBatch, device: torch.device, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """The states of a batch [batch, tokens, layers, hidden_size] and its likeliest next tokens, int64 [batch,
        tokens]; both zero on padding.
        """
        hidden = torch.zeros(*batch.ids.shape, *self.rows.shape[1:], dtype=self.rows.dtype)
        likeliest = torch.zeros(batch.ids.shape, dtype=torch.int64)
        for row, (sample, count) in enumerate(zip(batch.samples, batch.lengths.tolist(), strict=True)):
            own = slice(self.starts[sample], self.starts[sample] + count)
            hidden[row, :count], likeliest[row, :count] = self.rows[own], self.likeliest[own]
        return hidden.to(device, dtype), likeliest.to(device)


def layers_of(features: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    """The hidden states that heads with these ``features`` need together, and the last one, for the target's own
    distribution.
    """
    return (*sorted({index for each in features for index in each} - {-1}), -1)


def write_states(
    target: Target,
    dialogues: Sequence[EncodedDialogue],
    max_tokens: int,
    layers: tuple[int, ...],
    folder: Path,
    identity: dict[str, Any],
    group: ProcessGroup,
) -> StoredStates:
    """Compute the states of all dialogues, or open the ones that are there; after a kill it goes on where it was.

    A dialogue is read once, in passes of dialogues of similar length, which the processes of the group share out.

    Args:
        max_tokens: a dialogue is cut there.
        layers: as ``layers_of`` returns them.
        identity: what the states depend on: target, dialogues, cut. States of another identity are computed anew.

    Raises:
        KoalaBenchError: the disk has no room for them, or they cannot be written.
    """
    dtype = "float16" if target.dtype == torch.float16 else "bfloat16"
    starts = _starts(dialogues, max_tokens)
    shape = [int(starts[-1]), len(layers), int(target.spec().hidden_size)]
    wanted = {**identity, "version": _VERSION, "layers": list(layers), "dtype": dtype, "shape": shape}
    found = read_states_manifest(folder)
    if found is not None and _difference(found, identity, layers, starts) is None:
        return _opened(folder, found, starts)
    if group.first:
        _make_room(folder, wanted)
    group.wait()
    _compute(target, dialogues, max_tokens, _opened(folder, wanted, starts, writable=True), folder, group)
    group.wait()
    if group.first:
        digest = sha256_of(folder / "states.bin")
        write_text(folder / "states.json", json.dumps({**wanted, "sha256": digest}, indent=2) + "\n")
        for log in folder.glob("passes-*.txt"):
            log.unlink()
    group.wait()
    return open_states(dialogues, max_tokens, layers, folder, identity)


def open_states(
    dialogues: Sequence[EncodedDialogue],
    max_tokens: int,
    layers: tuple[int, ...],
    folder: Path,
    identity: dict[str, Any],
) -> StoredStates:
    """Open states that were written before; arguments as for ``write_states``. Raises KoalaBenchError where there are
    none, or they are those of something else."""
    starts, found = _starts(dialogues, max_tokens), read_states_manifest(folder)
    different = "manifest" if found is None else _difference(found, identity, layers, starts)
    if found is None or different is not None:
        raise KoalaBenchError(
            f"The states in {folder} are not those of this training: their {different} differs.",
            "Write them with the same preset, --methods and --set: koala-bench states.",
        )
    return _opened(folder, found, starts)


def read_states_manifest(folder: Path) -> dict[str, Any] | None:
    """What the finished states in a folder are of, or None if there are none."""
    return object_in(folder / "states.json")


def _starts(dialogues: Sequence[EncodedDialogue], max_tokens: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    lengths = [min(len(dialogue.ids), max_tokens) for dialogue in dialogues]
    return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])


def _difference(
    found: dict[str, Any], identity: dict[str, Any], layers: tuple[int, ...], starts: np.ndarray[Any, Any]
) -> str | None:
    """In what stored states are not those that are wanted; None if they hold all that is."""
    for key, value in {**identity, "version": _VERSION}.items():
        if found.get(key) != value:
            return _NAMES.get(key, key)
    if not set(layers) <= set(found.get("layers", [])):
        return "choice of hidden states"
    shape = found.get("shape")
    rows_fit = isinstance(shape, list) and len(shape) == 3 and shape[:2] == [int(starts[-1]), len(found["layers"])]
    return None if rows_fit and found.get("dtype") in _DTYPES and "sha256" in found else "shape"


def remove_states(folder: Path) -> None:
    """Delete stored states; a folder that is not there is fine."""
    shutil.rmtree(folder, ignore_errors=True)


def _compute(
    target: Target, dialogues: Sequence[EncodedDialogue], max_tokens: int, states: StoredStates, folder: Path,
    group: ProcessGroup,
) -> None:  # fmt: skip
    """Fill the files, pass by pass; a pass is logged once its rows are written."""
    lengths = np.diff(states.starts)
    ordered = np.argsort(lengths, kind="stable").tolist()
    passes = list(groups_of(ordered, lengths.tolist().__getitem__, _PASS_TOKENS[target.device.type]))
    done = {int(line) for log in folder.glob("passes-*.txt") for line in log.read_text(encoding="ascii").split()}
    own = [number for number in group.own(len(passes)) if number not in done]
    tokens_done = 0
    with (
        open(folder / f"passes-{group.rank}.txt", "a", encoding="ascii") as log,
        progress("states", len(own), "passes") as advance,
    ):
        for number in own:
            batch = collate(dialogues, passes[number], max_tokens)
            computed = target.states(batch.ids.to(target.device), states.layers)
            for row, (sample, count) in enumerate(zip(batch.samples, batch.lengths.tolist(), strict=True)):
                part = slice(states.starts[sample], states.starts[sample] + count)
                states.rows[part] = computed[row, :count].to("cpu", states.rows.dtype)
                states.likeliest[part] = target.output(computed[row, :count, -1]).argmax(-1).to("cpu", torch.int32)
            log.write(f"{number}\n")
            log.flush()
            tokens_done += int(batch.lengths.sum())
            advance(1, f"{tokens_done:,} tokens")


def _make_room(folder: Path, wanted: dict[str, Any]) -> None:
    """Prepare the folder; whatever is there of another identity goes."""
    size = sum(_sizes(wanted).values())
    plan = folder / "plan.json"
    if object_in(plan) != wanted:
        remove_states(folder)
        make_folder(folder)
        free = shutil.disk_usage(folder).free
        if size > free:
            raise KoalaBenchError(
                f"The target's states take {size / 1e9:.1f} GB, {folder} has {free / 1e9:.1f} GB free.",
                "Free space, choose another --out, lower data.limit, or set training.stored_states=false.",
            )
        write_text(plan, json.dumps(wanted, indent=2) + "\n")
        log_line(f"Computing the target's states once, {size / 1e6:,.0f} MB in {folder} ...")
    else:
        log_line(f"Going on with the target's states in {folder}.")
    for name, size in _sizes(wanted).items():
        with doing("write", folder / name, "Choose another --out."), open(folder / name, "ab") as handle:
            os.truncate(handle.fileno(), size)


def _sizes(manifest: dict[str, Any]) -> dict[str, int]:
    """Bytes of each file."""
    rows, layers, width = manifest["shape"]
    return {"states.bin": STATE_BYTES * rows * layers * width, "likeliest.bin": _TOKEN_BYTES * rows}


def _opened(
    folder: Path, manifest: dict[str, Any], starts: np.ndarray[Any, np.dtype[np.int64]], writable: bool = False
) -> StoredStates:
    for name, size in _sizes(manifest).items():
        if not (folder / name).is_file() or (folder / name).stat().st_size != size:
            raise KoalaBenchError(f"The states in {folder} are incomplete.", "Delete the folder to compute them again.")

    def mapped(name: str, size: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.from_file(str(folder / name), shared=writable, size=size, dtype=dtype)

    rows = mapped("states.bin", math.prod(manifest["shape"]), _DTYPES[manifest["dtype"]]).view(manifest["shape"])
    likeliest = mapped("likeliest.bin", manifest["shape"][0], torch.int32)
    return StoredStates(tuple(manifest["layers"]), starts, rows, likeliest, manifest.get("sha256", ""))
