"""The target's states of dialogues on disk: one pass of the target serves every epoch, seed and variant.

A folder is of one target and grows: of a dialogue that is in it the states are never computed again, whatever data it
comes with. ``states.bin`` holds the states of all tokens, dialogue behind dialogue; ``likeliest.bin`` what the target
says next after each, ``normalizers.bin`` the logsumexp of its logits there; ``dialogues.txt`` the hash of each
dialogue's tokens and its first row; ``written-*.txt`` the hashes of those whose rows are there; ``states.json`` says of
what target. States are bfloat16 (float16 for a float16 target), 2 bytes per token, layer and dimension; likeliest
tokens are int32, normalizers float32, both of the states as rounded.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from koala_bench.common.files import doing, make_folder, write_text
from koala_bench.common.process_group import ProcessGroup
from koala_bench.common.progress import log_line, progress
from koala_bench.common.reading import object_in
from koala_bench.dialogues.encoding import EncodedDialogue
from koala_bench.dialogues.streams import TokenBatch, collate, groups_of
from koala_bench.engine.target import Target
from koala_bench.errors import KoalaBenchError

# Tokens of one pass, padding included: enough to fill two cores, and little beside the weights on a GPU.
_PASS_TOKENS = {"cpu": 2048, "cuda": 16384}
STATE_BYTES = 2  # of a dimension, in either dtype
_OUTPUT_BYTES = 4  # of a likeliest token, and of a normalizer
TOKEN_BYTES = 2 * _OUTPUT_BYTES  # of a token beside its states
_LOGIT_ROWS = 256  # rows of logits at a time, which are the widest there is
_VERSION = 4  # of the folder: 3 had no normalizers, 2 held the dialogues of one training, 1 had no likeliest tokens
_FILES = ("states.json", "states.bin", "likeliest.bin", "normalizers.bin", "dialogues.txt", "written-*.txt")
_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class StoredStates:
    """States of dialogues, memory-mapped.

    Attributes:
        layers: which hidden states, as ``DraftHead.features``, in ascending order with -1 last.
        starts: row of the first token of each dialogue, int64 [dialogues].
        rows: [tokens, layers, hidden_size], bfloat16 or float16, mapped from the file.
        likeliest, normalizers: the target's next token, int32 [tokens], and the logsumexp of its logits, float32
            [tokens], mapped from their files: to find them again would cost the whole output layer.
        sha256: of the dialogues' rows, for the manifest of what is trained on it.
    """

    layers: tuple[int, ...]
    starts: np.ndarray[Any, np.dtype[np.int64]]
    rows: torch.Tensor
    likeliest: torch.Tensor
    normalizers: torch.Tensor
    sha256: str

    def read(
        self, batch: TokenBatch, device: torch.device, dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The states of a batch [batch, tokens, layers, hidden_size], its likeliest next tokens, int64 [batch, tokens],
        and its normalizers, float32 [batch, tokens]; all zero on padding.
        """
        hidden = torch.zeros(*batch.ids.shape, *self.rows.shape[1:], dtype=self.rows.dtype)
        likeliest = torch.zeros(batch.ids.shape, dtype=torch.int64)
        normalizers = torch.zeros(batch.ids.shape, dtype=torch.float32)
        for row, (sample, count) in enumerate(zip(batch.samples, batch.lengths.tolist(), strict=True)):
            own = slice(self.starts[sample], self.starts[sample] + count)
            hidden[row, :count], likeliest[row, :count] = self.rows[own], self.likeliest[own]
            normalizers[row, :count] = self.normalizers[own]
        return hidden.to(device, dtype), likeliest.to(device), normalizers.to(device)


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
    fingerprint: dict[str, str],
    group: ProcessGroup,
) -> StoredStates:
    """Compute the states of those dialogues that the folder lacks; after a kill it goes on where it was.

    A dialogue is read once, in passes of dialogues of similar length, which the processes of the group share out.

    Args:
        max_tokens: a dialogue is cut there.
        layers: as ``layers_of`` returns them.
        fingerprint: hashes of the target. States of another one, an older version or fewer layers are deleted.

    Raises:
        KoalaBenchError: the disk has no room for them, or they cannot be written.
    """
    dtype = "float16" if target.dtype == torch.float16 else "bfloat16"
    manifest = {
        "target": fingerprint, "version": _VERSION, "layers": list(layers), "dtype": dtype,
        "hidden_size": int(target.spec().hidden_size),
    }  # fmt: skip
    cut = [_cut(dialogue, max_tokens) for dialogue in dialogues]
    if group.first:
        _make_room(folder, manifest, cut)
    group.wait()
    written = _written(folder)
    missing = sorted({each.sha256: at for at, each in enumerate(cut) if each.sha256 not in written}.values())
    group.wait()  # before anybody writes
    if missing:
        _compute(target, dialogues, max_tokens, missing, folder, group)
    group.wait()
    return open_states(dialogues, max_tokens, layers, folder, fingerprint)


def open_states(
    dialogues: Sequence[EncodedDialogue],
    max_tokens: int,
    layers: tuple[int, ...],
    folder: Path,
    fingerprint: dict[str, str],
) -> StoredStates:
    """Open states that were written before; arguments as for ``write_states``. Raises KoalaBenchError where there are
    none, or they are of another target or other dialogues."""
    found = read_states_manifest(folder)
    remedy = "Write them with the same preset, --methods and --set: koala-bench states."
    different = "manifest" if found is None else _difference(found, fingerprint, layers)
    if found is None or different is not None:
        raise KoalaBenchError(
            f"The states in {folder} are not those of this training: their {different} differs.", remedy
        )
    cut = [_cut(dialogue, max_tokens) for dialogue in dialogues]
    if lacking := {each.sha256 for each in cut} - _written(folder):
        raise KoalaBenchError(f"The states in {folder} lack {len(lacking):,} of {len(cut):,} dialogues.", remedy)
    states = _opened(folder, found, _places(folder), cut)
    digest = hashlib.sha256()
    for start, each in zip(states.starts.tolist(), cut, strict=True):
        digest.update(states.rows[start : start + each.tokens].view(torch.int16).numpy().data)
    return replace(states, sha256=digest.hexdigest())


def read_states_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of the states in a folder, or None if there are none."""
    return object_in(folder / "states.json")


def remove_states(folder: Path) -> None:
    """Delete stored states, and their folder if it is then empty. A missing folder is no error."""
    for name in _FILES:
        for path in folder.glob(name):
            path.unlink()
    with contextlib.suppress(OSError):
        folder.rmdir()


class _Cut(NamedTuple):
    """A dialogue cut to the length limit: hash and number of its tokens."""

    sha256: str
    tokens: int


def _cut(dialogue: EncodedDialogue, max_tokens: int) -> _Cut:
    ids = np.asarray(dialogue.ids[:max_tokens], dtype="<i4")
    return _Cut(hashlib.sha256(ids.tobytes()).hexdigest(), len(ids))


def _difference(found: dict[str, Any], fingerprint: dict[str, str], layers: tuple[int, ...]) -> str | None:
    """What makes stored states unusable here, in a word or two; None if they can be used."""
    if found.get("version") != _VERSION or found.get("target") != fingerprint:
        return "version" if found.get("version") != _VERSION else "target"
    return None if set(layers) <= set(found.get("layers", [])) else "choice of hidden states"


def _places(folder: Path) -> dict[str, tuple[int, int]]:
    """First row and number of rows of each dialogue, by its hash, in the order of their rows."""
    path = folder / "dialogues.txt"
    lines = path.read_text(encoding="ascii").splitlines() if path.exists() else []
    return {name: (int(start), int(count)) for name, start, count in (line.split() for line in lines)}


def _written(folder: Path) -> set[str]:
    """Hashes of the dialogues whose rows are there; a line that a kill has cut matches none."""
    return {line for log in folder.glob("written-*.txt") for line in log.read_text(encoding="ascii").split()}


def _compute(
    target: Target,
    dialogues: Sequence[EncodedDialogue],
    max_tokens: int,
    missing: Sequence[int],
    folder: Path,
    group: ProcessGroup,
) -> None:
    """Write the rows of dialogues, pass by pass; one is logged once its rows are written."""
    manifest, places = read_states_manifest(folder), _places(folder)
    assert manifest is not None
    cut = {at: _cut(dialogues[at], max_tokens) for at in missing}
    states = _opened(folder, manifest, places, [], writable=True)
    ordered = sorted(missing, key=lambda at: cut[at].tokens)
    passes = list(groups_of(ordered, lambda at: cut[at].tokens, _PASS_TOKENS[target.device.type]))
    own = group.own(len(passes))
    tokens_done = 0
    with (
        open(folder / f"written-{group.rank}.txt", "a", encoding="ascii") as log,
        progress("states", len(own), "passes") as advance,
    ):
        log.write("\n")  # behind a line that a kill has cut
        for number in own:
            batch = collate(dialogues, passes[number], max_tokens)
            computed = target.states(batch.ids.to(target.device), states.layers)
            for row, (sample, count) in enumerate(zip(batch.samples, batch.lengths.tolist(), strict=True)):
                start = places[cut[sample].sha256][0]
                part = slice(start, start + count)
                rounded = computed[row, :count].to(states.rows.dtype)
                states.rows[part] = rounded.cpu()
                for at, last in enumerate(rounded[:, -1].to(target.dtype).split(_LOGIT_ROWS)):
                    logits = target.output(last)
                    rows = slice(start + at * _LOGIT_ROWS, start + at * _LOGIT_ROWS + len(last))
                    states.likeliest[rows] = logits.argmax(-1).to("cpu", torch.int32)
                    states.normalizers[rows] = logits.float().logsumexp(-1).cpu()
            log.write("".join(f"{cut[sample].sha256}\n" for sample in batch.samples))
            log.flush()
            tokens_done += int(batch.lengths.sum())
            advance(1, f"{tokens_done:,} tokens")


def _make_room(folder: Path, manifest: dict[str, Any], cut: Sequence[_Cut]) -> None:
    """Give every new dialogue a place. States of another target or version, or of fewer layers, are deleted first."""
    found = read_states_manifest(folder)
    if found is None or _difference(found, manifest["target"], tuple(manifest["layers"])) is not None:
        remove_states(folder)
        make_folder(folder)
        found = manifest
    places = _places(folder)
    rows = _rows(places)
    if places:
        _check_sizes(folder, found, rows)
    for each in cut:
        if each.sha256 not in places:
            places[each.sha256] = (rows, each.tokens)
            rows += each.tokens
    sizes = _sizes(found, rows)
    own = sum((folder / name).stat().st_size for name in sizes if (folder / name).exists())
    more, free = sum(sizes.values()) - own, shutil.disk_usage(folder).free
    if more > free:
        raise KoalaBenchError(
            f"The target's states take {more / 1e9:.1f} GB, {folder} has {free / 1e9:.1f} GB free.",
            "Free space, choose another --out, lower data.limit, or set training.stored_states=false.",
        )
    written, wanted = _written(folder), dict(cut)  # the folder may have places of other data, which nobody asks for now
    lacking = sum(tokens for name, tokens in wanted.items() if name not in written)
    if lacking:
        total = sum(wanted.values())
        log_line(f"Computing the target's states of {lacking:,} of {total:,} tokens once, in {folder} ...")
    for name, size in sizes.items():
        with doing("write", folder / name, "Choose another --out."), open(folder / name, "ab") as handle:
            os.truncate(handle.fileno(), size)
    write_text(folder / "dialogues.txt", "".join(f"{name} {at} {count}\n" for name, (at, count) in places.items()))
    write_text(folder / "states.json", json.dumps(found, indent=2) + "\n")


def _rows(places: dict[str, tuple[int, int]]) -> int:
    return max((start + count for start, count in places.values()), default=0)


def _sizes(manifest: dict[str, Any], rows: int) -> dict[str, int]:
    """Expected bytes of each file."""
    states = STATE_BYTES * rows * len(manifest["layers"]) * manifest["hidden_size"]
    return {"states.bin": states, "likeliest.bin": _OUTPUT_BYTES * rows, "normalizers.bin": _OUTPUT_BYTES * rows}


def _opened(
    folder: Path,
    manifest: dict[str, Any],
    places: dict[str, tuple[int, int]],
    cut: Sequence[_Cut],
    writable: bool = False,
) -> StoredStates:
    total, layers = _rows(places), tuple(manifest["layers"])
    _check_sizes(folder, manifest, total)

    def mapped(name: str, size: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.from_file(str(folder / name), shared=writable, size=size, dtype=dtype)

    shape = (total, len(layers), int(manifest["hidden_size"]))
    rows = mapped("states.bin", math.prod(shape), _DTYPES[manifest["dtype"]]).view(shape)
    starts = np.array([places[each.sha256][0] for each in cut], dtype=np.int64)
    likeliest = mapped("likeliest.bin", total, torch.int32)
    return StoredStates(layers, starts, rows, likeliest, mapped("normalizers.bin", total, torch.float32), "")


def _check_sizes(folder: Path, manifest: dict[str, Any], rows: int) -> None:
    for name, size in _sizes(manifest, rows).items():
        if not (folder / name).is_file() or (folder / name).stat().st_size < size:
            raise KoalaBenchError(f"The states in {folder} are incomplete.", "Delete the folder to compute them again.")
