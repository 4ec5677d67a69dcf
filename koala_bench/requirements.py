"""What a preset needs before anything is downloaded or trained: parameters, memory, disk and tokens, and what is missing for it here."""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from huggingface_hub import try_to_load_from_cache
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoConfig, AutoModelForCausalLM

from koala_bench.conversations import BUNDLED
from koala_bench.errors import KoalaBenchError
from koala_bench.evaluation import select_questions
from koala_bench.experiment import VANILLA
from koala_bench.hub import HUB
from koala_bench.presets import Preset
from koala_bench.questions import find_questions, read_questions
from koala_bench.registry import HEADS, load
from koala_bench.shapes import known_shape
from koala_bench.target import Target, bundled_target, pick_dtype, pick_engine
from koala_bench.training import make_arm

_TRAINED_BYTES = 16  # a trained parameter in float32: itself, its gradient, Adam's two moments
_KEPT_BYTES = 4 + 12  # on disk: the finished head, and itself with both moments in the checkpoint
_STORED_BYTES = 2  # a parameter of a checkpoint on the hub, which is in half precision


@dataclass(frozen=True)
class Place:
    """Where a target's configuration and weights come from.

    Attributes:
        config: the Hugging Face configuration.
        at_hand: whether the weights are on this machine.
        words: where they are, or where the sizes come from.
    """

    config: Any
    at_hand: bool
    words: str


@dataclass(frozen=True)
class HeadNeeds:
    """Sizes of a method's head.

    Attributes:
        parameters, judge: number of trained parameters of the head and of its objective; 0 where there is nothing to train.
        shares: the method whose head it decodes with, or None.
    """

    name: str
    parameters: int
    judge: int
    shares: str | None


@dataclass(frozen=True)
class Needs:
    """Sizes of a whole run; bytes and counts of tokens.

    Attributes:
        training_memory: target, heads with gradients and moments, states and distributions of one micro-batch; not the activations.
        decoding_memory: target, heads and cache.
        download, disk: of the target if it is not here; of heads, checkpoint and records.
        training_tokens, answer_tokens: at most, all heads together see the former once; the latter are those of one method.
    """

    target_parameters: int
    heads: tuple[HeadNeeds, ...]
    training_memory: int
    decoding_memory: int
    download: int
    disk: int
    training_tokens: int
    answer_tokens: int


def find_target(preset: Preset) -> Place:
    """Look for a target without downloading its weights; of one on the hub only the configuration is asked for.

    Raises:
        KoalaBenchError: it is not here, the hub cannot be asked, and nobody knows its shape.
    """
    name, revision = preset.target.name, preset.target.revision
    folder = bundled_target(name) or Path(name).expanduser()
    if folder.is_dir():
        try:
            return Place(AutoConfig.from_pretrained(folder), True, "bundled" if bundled_target(name) else f"in {name}")
        except (OSError, ValueError) as error:
            raise KoalaBenchError(f"{name} holds no configuration that can be read.", "Check --target.") from error
    if os.sep in name and name.startswith((".", "/", "~")):
        raise KoalaBenchError(f"There is no folder {name}.", "Check --target.")
    try:
        cached = any(isinstance(try_to_load_from_cache(name, file, revision=revision), str) for file in ("model.safetensors.index.json", "model.safetensors"))
        return Place(AutoConfig.from_pretrained(name, revision=revision), cached, "in the hub's cache" if cached else "on the hub, to be downloaded")
    except (OSError, ValueError) as error:
        if (shape := known_shape(name)) is None:
            raise KoalaBenchError(
                f"{name} is not on this machine, and its configuration could not be read from the hub.",
                "Check --target, or give the path of a downloaded copy.",
            ) from error
        return Place(shape, False, "not on this machine, and the hub does not answer; its shape is known")


def needs_of(preset: Preset, methods: Sequence[str], place: Place, questions: int | None) -> Needs:
    """Sizes of a run, from models that have shapes and no weights.

    Args:
        questions: number of turns that are asked, or None if the question file is not here; then MT-bench's.

    Raises:
        KoalaBenchError: a mistake in the methods or their options.
    """
    names = [name for name in methods if name != VANILLA]
    config, device = place.config, torch.device("cpu")
    # Fake tensors have a shape and no memory. They cannot be moved, and there is nowhere to move them to.
    with FakeTensorMode(), patch.object(nn.Module, "to", lambda self, *_, **__: self):
        model = AutoModelForCausalLM.from_config(config)
        target = Target(preset.target.name, model, None, device, torch.float32, int(getattr(config, "max_position_embeddings", None) or 2048))
        parameters = target.parameters
        heads, features = [], 1
        for name in names:
            wanted = preset.method(name)
            if not hasattr(load(HEADS, wanted.head), "loss"):
                heads.append(HeadNeeds(name, 0, 0, None))
                continue
            owner = preset.trained_as(name)
            arm = make_arm(target, name, preset.method(owner), preset.training.model_copy(update={"precision": "no"}))
            judge = sum(p.numel() for p in arm.objective.parameters()) if arm.objective is not None else 0
            heads.append(HeadNeeds(name, arm.parameters, judge, owner if owner != name else None))
            features = max(features, len(arm.head.features))
    size = dtype_of(preset).itemsize
    trained = [head for head in heads if head.shares is None]
    weights = sum(head.parameters + head.judge for head in trained)
    tokens = preset.training.batch_tokens
    batch = tokens * (config.hidden_size * features * size + config.vocab_size * 4)
    rows = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    context = min(target.max_positions, preset.data.max_tokens + preset.evaluation.max_new_tokens)
    cache = 2 * config.num_hidden_layers * rows * head_dim * context * size
    # On the CPU recordings have the weights in layouts of their own, one for a single row and one for several.
    where = _decodes_on(preset)
    copies = 3 if where.type == "cpu" and pick_engine(preset.target.engine, where) == "graph" else 1
    asked = (160 if questions is None else questions) * preset.evaluation.repeats
    return Needs(
        target_parameters=parameters,
        heads=tuple(heads),
        training_memory=parameters * size + weights * _TRAINED_BYTES + batch,
        decoding_memory=(parameters + sum(head.parameters for head in trained)) * size * copies + cache,
        download=0 if place.at_hand else parameters * _STORED_BYTES,
        disk=weights * _KEPT_BYTES + asked * (len(names) + 1) * preset.evaluation.max_new_tokens * 16,
        training_tokens=preset.training.steps * tokens * preset.training.micro_batches if weights else 0,
        answer_tokens=asked * preset.evaluation.max_new_tokens,
    )


def dtype_of(preset: Preset) -> torch.dtype:
    """What the target computes in where the preset runs as it says: on a GPU it asks for, whether there is one here or not."""
    return pick_dtype(preset.target.dtype, _decodes_on(preset))


def _decodes_on(preset: Preset) -> torch.device:
    wanted = preset.target.device
    on_gpu = wanted.startswith("cuda") or (wanted == "auto" and torch.cuda.is_available())
    return torch.device("cuda" if on_gpu else "cpu")


def turns_of(preset: Preset, data_dir: Path | None) -> int | None:
    """Number of turns that are asked, or None where the question file is not here or cannot be read."""
    try:
        questions = read_questions(find_questions(preset.evaluation.questions, data_dir)[1])
    except KoalaBenchError:
        return None
    return sum(len(question.turns) for question in select_questions(questions, preset.evaluation.limit))


def missing_for(preset: Preset, place: Place, needs: Needs, turns: int | None, out: Path) -> list[str]:
    """What keeps the preset from running here, a sentence each with what to do about it."""
    found = []
    wanted = preset.target.device
    total = torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else 0
    need = max(needs.training_memory, needs.decoding_memory)
    if wanted.startswith("cuda") and not torch.cuda.is_available():
        found.append(f"A CUDA device with at least {gibibytes(need)}: there is none. Run it where there is one, or on a smaller target with --device cpu.")
    elif wanted.startswith(("cuda", "auto")) and 0 < total < need:
        found.append(f"Memory: it takes at least {gibibytes(need)}, the GPU has {gibibytes(total)}. Use fewer --methods at a time or a smaller target.")
    if wanted == "cpu" or (wanted == "auto" and not torch.cuda.is_available()):
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        if memory < need:
            found.append(f"Memory: it takes at least {gibibytes(need)}, this machine has {gibibytes(memory)}. Use a smaller target.")
    if not place.at_hand:
        offline = "the hub does not answer" in place.words
        how = "Allow access to huggingface.co, or give the path of a copy with --target" if offline else "It is downloaded at the first use"
        found.append(f"The weights of {preset.target.name}, {gibibytes(needs.download)}. {how}; set HF_TOKEN for a gated model.")
    source = preset.data.source
    if source not in (BUNDLED, "documentation") and not source.startswith(HUB) and not Path(source).is_file():
        found.append(
            f"The conversations {source}. Download a ShareGPT file, or let the target answer questions: koala-bench distill; then --set data.source=FILE."
        )
    if turns is None:
        found.append(f"The questions {preset.evaluation.questions}. Get them: koala-bench data {preset.evaluation.questions} --data-dir data.")
    there = next(parent for parent in (out, *out.resolve().parents) if parent.exists())
    free = shutil.disk_usage(there).free
    if free < needs.disk + needs.download:
        found.append(f"Disk: {gibibytes(needs.disk + needs.download)}, and {there} has {gibibytes(free)}. Free some, or choose another --out.")
    if preset.target.chat_template.startswith("vicuna") and importlib.util.find_spec("fastchat") is None:
        found.append("The package fschat, for the chat template. Install koala-bench with its dependencies.")
    return found


def gibibytes(count: float) -> str:
    """A number of bytes for a person."""
    return f"{count / 2**30:,.1f} GiB" if count >= 0.95 * 2**30 else f"{count / 2**20:,.0f} MiB"
