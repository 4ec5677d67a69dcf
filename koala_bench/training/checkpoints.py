"""Trained heads on disk: one folder with ``config.json``, ``model.safetensors`` and ``training.json``."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from koala_bench.common.draft_vocabulary import BUFFER, DraftVocabulary, checked_count, fault_of, first_of, fitted
from koala_bench.common.files import readable_as_others, replacing, sha256_of, write_text
from koala_bench.common.progress import log_line
from koala_bench.common.reading import object_in
from koala_bench.engine.target import Target
from koala_bench.errors import KoalaBenchError
from koala_bench.heads import TargetSpec
from koala_bench.presets import MethodPreset
from koala_bench.registry import HEADS, build

_WEIGHTS = "model.safetensors"
_TOKENS = "tokens.safetensors"
# Earlier versions wrote an architecture_sha256, which changed with the version of transformers and is not compared.
_OF_TARGET = ("weights_sha256", "tokenizer_sha256", "computation_sha256")
_BESIDE_TRAINING = ("checkpoint_every", "held_out_evaluations")
_NAMES = {"stream_sha256": "training data", "order_sha256": "order of the data", "chat_template": "chat template"}
# How torch refuses a file; which of these it is depends on where the damage is.
DAMAGE = (
    RuntimeError, pickle.UnpicklingError, EOFError, OSError, LookupError, ValueError, TypeError, AttributeError,
    AssertionError,
)  # fmt: skip


def save_head(
    folder: Path,
    head: nn.Module,
    preset: MethodPreset,
    target: Target,
    manifest: dict[str, Any],
    dtype: torch.dtype | None = None,
) -> None:
    """Write a head; the weights come last, so a folder with weights is complete.

    Args:
        dtype: of its floating-point tensors; as they are if None.
    """
    config = {
        "head": preset.head, "layers": preset.layers, "options": preset.options, "objective": preset.objective,
        "objective_options": preset.objective_options,
        **({} if preset.draft_vocabulary is None else {"draft_vocabulary": preset.draft_vocabulary}),
        "target": {
            "name": target.name, "hidden_size": target.spec().hidden_size, "vocab_size": target.config.vocab_size,
        },
    }  # fmt: skip
    write_text(folder / "config.json", json.dumps(config, indent=2) + "\n")
    write_text(folder / "training.json", json.dumps(manifest, indent=2) + "\n")
    save_weights(folder / _WEIGHTS, head, dtype)


def save_weights(path: Path, head: nn.Module, dtype: torch.dtype | None = None) -> None:
    """Write the tensors of a head atomically. Raises KoalaBenchError where the folder cannot be written, or the disk is
    full."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in head.state_dict().items()}
    write_tensors(path, tensors if dtype is None else in_dtype(tensors, dtype))


def in_dtype(tensors: dict[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The same with all floating-point tensors in a dtype."""
    return {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}


def write_tensors(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write tensors atomically, pickled where the name does not end in ``.safetensors``; ``metadata`` has a place there
    only. Raises KoalaBenchError where the folder cannot be written, or the disk is full."""
    with replacing(path) as temporary, _telling_of_a_full_disk():
        if path.suffix == ".safetensors":
            save_file(tensors, temporary, metadata)
            readable_as_others(temporary)
        else:
            torch.save(tensors, temporary)


@contextmanager
def _telling_of_a_full_disk() -> Iterator[None]:
    """The writers of safetensors and of torch raise errors of their own there."""
    try:
        yield
    except (SafetensorError, RuntimeError) as error:
        raise OSError(str(error)) from error


def identity_of(manifest: dict[str, Any]) -> dict[str, Any]:
    """What decides a head's weights, of a manifest: the content of the data and of the target, and the settings that
    change an update. Where files lie, how often a state is written and what is measured meanwhile are no part of it.
    """

    def part(name: str, counts: Callable[[str], bool]) -> dict[str, Any]:
        found = manifest.get(name)
        return {key: value for key, value in found.items() if counts(key)} if isinstance(found, dict) else {}

    return {
        "target": part("target", lambda name: name in _OF_TARGET),
        "training": part("training", lambda name: name not in _BESIDE_TRAINING),
        **{name: manifest.get(name) for name in ("chat_template", "stream_sha256", "order_sha256")},
    }


def first_difference(one: dict[str, Any], other: dict[str, Any]) -> str | None:
    """The first field in which two identities differ; None if they agree. A field of the target that only one of them
    has does not count: earlier versions recorded fewer.
    """
    for key, value in one.items():
        same = value == other[key]
        if key == "target":
            same = all(value[name] == other[key][name] for name in value.keys() & other[key].keys())
        if not same:
            return _NAMES.get(key, key)
    return None


def earlier(path: Path) -> Path:
    """Where the state before the last one is kept."""
    return path.with_name(f"{path.stem}.earlier{path.suffix}")


def read_state(path: Path, device: torch.device) -> dict[str, Any] | None:
    """The last good state of an interrupted training, or None if there is none yet; a damaged one is passed over for
    the one before it. Raises KoalaBenchError where whatever is there is damaged."""
    before = earlier(path)
    if not path.exists():  # a kill between two renames leaves the earlier one alone
        return _read_state(before, device) if before.exists() else None
    try:
        return _read_state(path, device)
    except KoalaBenchError as error:
        if not before.exists():
            raise
        state = _read_state(before, device)
        log_line(f"{error.message} Going on from the one before it, {before}.")
        return state


def state_identity(path: Path) -> dict[str, Any] | None:
    """The identity of an interrupted training, without its weights; None where there is none that can be read."""
    for place in (path, earlier(path)):
        try:
            return dict(_read_state(place, torch.device("meta"))["identity"])
        except KoalaBenchError:  # of a damaged one whoever resumes says more
            continue
    return None


def _read_state(path: Path, device: torch.device) -> dict[str, Any]:
    """A state as ``torch.save`` wrote it; only tensors and plain values are unpickled."""
    try:
        state: dict[str, Any] = torch.load(path, map_location=device, weights_only=True)
    except DAMAGE as error:
        raise KoalaBenchError(f"The checkpoint {path} is damaged.", "Delete it to start the training again.") from error
    if not isinstance(state, dict) or not isinstance(state.get("identity"), dict):
        raise KoalaBenchError(f"{path} is no checkpoint of a training.", "Delete it to start the training again.")
    return state


def write_state(path: Path, state: dict[str, Any]) -> None:
    """Write the state of a training atomically; the one that was there becomes the earlier one. Raises KoalaBenchError
    where the folder cannot be written, or the disk is full."""
    with replacing(path) as temporary:
        with _telling_of_a_full_disk():
            torch.save(state, temporary)
        if path.exists():
            path.replace(earlier(path))


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """What a finished head was trained with; None if there is no finished head, or with a logged line if the file is
    missing or damaged.
    """
    if not (folder / _WEIGHTS).exists():
        return None
    path = folder / "training.json"
    if (manifest := object_in(path)) is None:
        log_line(f"{path} is missing or damaged: nothing is known of how this head was trained.")
    return manifest


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of a head as they are stored. Raises KoalaBenchError where the file is missing or damaged."""
    try:
        return load_file(folder / _WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise KoalaBenchError(f"{folder / _WEIGHTS} is missing or damaged.", "Train the head again.") from error


def read_config(folder: Path) -> dict[str, Any]:
    """What a head was built from: its name, layers, options, objective and target. Raises KoalaBenchError where there
    is no such file, or it is damaged or of something else."""
    try:
        config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        kind, layers = config["head"], config["layers"]
        config |= {name: dict(config[name]) for name in ("target", "options")}
        if (
            not isinstance(kind, str)
            or type(layers) is not int
            or layers < 1
            or not isinstance(config["objective"], str | None)
        ):
            raise ValueError("a field of the wrong kind")
    except OSError as error:
        raise KoalaBenchError(
            f"There is no trained head in {folder}: {error.strerror}.", "Train it first: koala-bench train."
        ) from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise KoalaBenchError(f"{folder / 'config.json'} is damaged.", "Train the head again.") from error
    return config


def save_token_order(folder: Path, order: torch.Tensor) -> None:
    """Write beside a head in which order a draft vocabulary takes the tokens, int64 [vocab_size]; see
    ``draft_vocabulary.by_count``.
    """
    write_tensors(folder / _TOKENS, {"order": order.int()})


def _commonest(folder: Path, count: int) -> torch.Tensor:
    try:
        return first_of(load_file(folder / _TOKENS)["order"], count)
    except (OSError, SafetensorError, KeyError) as error:
        raise KoalaBenchError(
            f"{folder / _TOKENS} is missing or damaged, which says what tokens a cut of this head keeps.",
            "Train the head again.",
        ) from error


def build_head_of(spec: TargetSpec, kind: str, options: dict[str, Any], layers: int = 1) -> Any:
    """A fresh head by its installed name; one of a draft vocabulary keeps the ids as a buffer, so that they are saved
    and loaded with it. Raises KoalaBenchError where there is no such head or option."""
    head = build(HEADS, kind, spec, options if layers == 1 else {**options, "layers": layers})
    if spec.draft_vocabulary is not None and isinstance(head, nn.Module):
        head.register_buffer(BUFFER, spec.draft_vocabulary.ids)
    return head


def load_head(folder: Path, target: Target, drafted: int | None = None) -> tuple[Any, dict[str, Any], str]:
    """Read a head for a target.

    Args:
        drafted: cut a head of the whole vocabulary to so many tokens, the commonest of its training answers.

    Returns:
        the head in the target's dtype and on its device, its configuration, and the hash of its weights.

    Raises:
        KoalaBenchError: the folder or a file is missing or damaged, or the head was made for another target.
    """
    config = read_config(folder)
    wanted, kind, options, own = config["target"], config["head"], config["options"], target.spec()

    def unfit(problem: str) -> KoalaBenchError:
        fault = f"The weights in {folder} do not fit the head '{kind}': {problem}"
        return KoalaBenchError(fault, "Train the head again.")

    if (wanted.get("hidden_size"), wanted.get("vocab_size")) != (own.hidden_size, own.vocab_size):
        raise KoalaBenchError(
            f"The head in {folder} is for a target of width {wanted.get('hidden_size')} and {wanted.get('vocab_size')}"
            f" tokens, {target.name} has {own.hidden_size} and {own.vocab_size}.",
            "Use the target it was trained for, or train a head for this one.",
        )
    options.pop(BUFFER, None)  # of an EAGLE-3 head that was imported when this was an option of that head alone
    tensors = read_weights(folder)
    ids = tensors.get(BUFFER)
    if ids is not None and (fault := fault_of(ids, own.vocab_size)) is not None:
        raise unfit(fault)
    if ids is not None and drafted not in (None, len(ids)):
        raise KoalaBenchError(
            f"The head in {folder} drafts {len(ids):,} tokens and cannot be cut to {drafted:,}.",
            "Cut a head of the whole vocabulary.",
        )
    cut = None if ids is not None or drafted is None else _commonest(folder, checked_count(drafted, own.vocab_size))
    head = build_head_of(target.spec(cut if ids is None else ids), kind, options, config["layers"])
    try:
        head.load_state_dict(tensors if cut is None else fitted(tensors, head, DraftVocabulary(cut, own.vocab_size)))
    except RuntimeError as error:
        raise unfit(str(error).splitlines()[-1].strip()) from error
    head.to(device=target.device, dtype=target.dtype).eval()
    if any(not torch.isfinite(tensor).all() for tensor in tensors.values()):
        raise KoalaBenchError(f"The weights in {folder} are not finite.", "Train the head again.")
    return head, config, sha256_of(folder / _WEIGHTS)
