"""What a preset needs before anything is downloaded or trained: parameters, memory, disk, tokens; what is missing."""

from __future__ import annotations

import importlib.util
import inspect
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoConfig, AutoModelForCausalLM

from koala_bench.common.hub_errors import HUB_ERRORS, first_line
from koala_bench.common.machine import memory_bytes
from koala_bench.dialogues.conversations import BUNDLED, bundled_answers, files_of
from koala_bench.dialogues.hub import HUB, ask_hub, dialogues_at_hand, dialogues_on_hub
from koala_bench.dialogues.questions import find_questions, read_questions, select_questions
from koala_bench.engine.devices import pick_dtype, pick_engine
from koala_bench.engine.loading.gguf import gguf_config, gguf_file
from koala_bench.engine.loading.targets import bundled_target
from koala_bench.engine.shapes import known_shape
from koala_bench.engine.target import Target
from koala_bench.errors import KoalaBenchError
from koala_bench.presets import MethodPreset, Preset
from koala_bench.registry import HEADS, load
from koala_bench.training.experiment import VANILLA
from koala_bench.training.loop import make_trainer
from koala_bench.training.states import STATE_BYTES, TOKEN_BYTES, layers_of

_TRAINED_BYTES = 16  # a trained parameter in float32: itself, its gradient, Adam's two moments
# On disk at most: three checkpoints of itself with both moments, for while one is written the last and the one before
# it are there. The finished heads come when the third is gone, and take less.
_KEPT_BYTES = 3 * 12
_WEIGHT_FILES = [f"{file}{end}" for file in ("model.safetensors", "pytorch_model.bin") for end in (".index.json", "")]
_STORED_BYTES = 2  # a parameter of a checkpoint on the hub, which is in half precision


@dataclass(frozen=True)
class Place:
    """Where a model's configuration and weights come from.

    Attributes:
        config: the Hugging Face configuration; None of a draft model whose shape nobody knows.
        at_hand: whether the weights are on this machine.
        words: where they are, or where the sizes come from.
        reached, refusal: what the hub says, as far as it was asked; see ``HubAnswer``.
    """

    config: Any
    at_hand: bool
    words: str
    reached: bool = True
    refusal: str | None = None


@dataclass(frozen=True)
class HeadNeeds:
    """Sizes of a method's head.

    Attributes:
        parameters, discriminator: number of trained parameters of the head and of its objective; 0 if none.
        shares: the method whose head it decodes with, or None. That one is listed too, even if it is not run itself.
        model: what it drafts with and does not train, or None.
    """

    name: str
    parameters: int
    discriminator: int
    shares: str | None
    model: str | None = None


@dataclass(frozen=True)
class Needs:
    """Sizes of a whole run; bytes and counts of tokens.

    Attributes:
        training_memory: target, heads with gradients and moments, states of a step, distributions of one micro-batch;
            not the activations.
        decoding_memory: target, heads, draft models and caches.
        download, disk: of the target and draft models that are not here; of heads, checkpoints and records.
        training_tokens, answer_tokens: at most, all heads together see the former once; the latter are those of one
            method.
        models: number of parameters of each draft model, by name; None where nobody knows its shape.
        ends_memory: as ``training_memory``, of a training from stored states, with only the target's embedding and
            output layer in memory.
        label_flop: operations of the target's distributions over one token, which heads are taught by; see
            ``FeatureBatch.soft_labels``.
        state_bytes: of the target's stored states of one token, as all heads read them; see ``training.states``.
    """

    target_parameters: int
    heads: tuple[HeadNeeds, ...]
    training_memory: int
    decoding_memory: int
    download: int
    disk: int
    training_tokens: int
    answer_tokens: int
    models: Mapping[str, int | None] = field(default_factory=dict)
    state_bytes: int = 0
    ends_memory: int = 0
    label_flop: int = 0


def find_target(preset: Preset) -> Place:
    """Look for a target without downloading its weights; of one on the hub only the configuration is asked for."""
    found = _find(preset.target.name, preset.target.revision, "Check --target")
    if found.config is None:
        raise KoalaBenchError(
            f"{preset.target.name} is not on this machine, and its configuration could not be read from the hub.",
            "Check --target, or give the path of a downloaded copy.",
        )
    return found


def find_models(preset: Preset, methods: Sequence[str]) -> dict[str, Place]:
    """Look for the models that methods draft with, in the same way; by name."""
    found: dict[str, Place] = {}
    for name in methods:
        if name != VANILLA and (model := _drafts_with(preset.method(name))) is not None and model[0] not in found:
            found[model[0]] = _find(*model, f"Check the option 'model' of {name}")
    return found


def _drafts_with(method: MethodPreset) -> tuple[str, str | None] | None:
    """Name and revision of the model whose weights a method's head loads, if it loads one."""
    cls = load(HEADS, method.head)
    if (option := getattr(cls, "model_option", None)) is None:
        return None
    usual = inspect.signature(cls).parameters[option].default
    name, revision = method.options.get(option, usual), method.options.get("revision")
    return (name, revision) if isinstance(name, str) else None


def _find(name: str, revision: str | None, check: str) -> Place:
    if (packed := None if bundled_target(name) else gguf_file(name)) is not None:
        return Place(gguf_config(packed), True, f"in {name}")
    folder = bundled_target(name) or Path(name).expanduser()
    if folder.is_dir():
        try:
            return Place(AutoConfig.from_pretrained(folder), True, "bundled" if bundled_target(name) else f"in {name}")
        except (OSError, ValueError) as error:
            raise KoalaBenchError(f"{name} holds no configuration that can be read.", f"{check}.") from error
    if os.sep in name and name.startswith((".", "/", "~")):
        raise KoalaBenchError(f"There is no folder {name}.", f"{check}.")
    try:
        config = AutoConfig.from_pretrained(name, revision=revision, local_files_only=True)
        if any(isinstance(try_to_load_from_cache(name, file, revision=revision), str) for file in _WEIGHT_FILES):
            return Place(config, True, "in the hub's cache")
    except (OSError, ValueError):
        config = None
    answer = ask_hub(name, "model", revision)
    if answer.refusal is None:
        try:
            config = config or AutoConfig.from_pretrained(name, revision=revision)
            return Place(config, False, "on the hub, to be downloaded")
        except HUB_ERRORS as error:
            answer = replace(answer, refusal=first_line(error))
    shape = config or known_shape(name)
    what = f"the hub refuses it ({answer.refusal})" if answer.reached else "the hub does not answer"
    words = f"not on this machine, and {what}{'; its shape is known' if shape is not None else ''}"
    return Place(shape, False, words, answer.reached, answer.refusal)


def needs_of(
    preset: Preset,
    methods: Sequence[str],
    place: Place,
    questions: int | None,
    models: Mapping[str, Place] | None = None,
) -> Needs:
    """Sizes of a run, from models that have shapes and no weights.

    Args:
        questions: number of turns that are asked, or None if the question file is not here; then MT-bench's.
    """
    names = [name for name in methods if name != VANILLA]
    # A method that decodes with another's head has that one trained.
    owners = {name: preset.trained_as(name) for name in names}
    listed = dict.fromkeys(
        each for name in names for each in ((name,) if owners[name] in names else (owners[name], name))
    )
    config, device = place.config, torch.device("cpu")
    context = int(getattr(config, "max_position_embeddings", None) or 2048)
    with FakeTensorMode():  # tensors with a shape and no memory
        model = AutoModelForCausalLM.from_config(config)
        target = Target(preset.target.name, model, None, device, torch.float32, context)
        parameters = target.parameters
        outer = [model.get_input_embeddings(), model.get_output_embeddings()]
        ends = sum({id(p): p.numel() for module in outer for p in module.parameters()}.values())
        drafting = {
            name: None if each.config is None else AutoModelForCausalLM.from_config(each.config).num_parameters()
            for name, each in (models or {}).items()
        }
        heads, read, labelled = [], [(-1,)], set()
        for name in listed:
            wanted, owner = preset.method(name), preset.trained_as(name)
            if not hasattr(load(HEADS, wanted.head), "loss"):
                loaded = _drafts_with(wanted)
                heads.append(HeadNeeds(name, 0, 0, owner if owner != name else None, loaded[0] if loaded else None))
                continue
            trainer = make_trainer(
                target, name, preset.method(owner), preset.training.model_copy(update={"precision": "no"})
            )
            discriminator = (
                sum(p.numel() for p in trainer.objective.parameters()) if trainer.objective is not None else 0
            )
            heads.append(HeadNeeds(name, trainer.parameters, discriminator, owner if owner != name else None))
            read.append(trainer.head.features)
            if any(getattr(part, "soft_labels", False) for part in (trainer.head, trainer.objective)):
                labelled.add(preset.method(owner).draft_vocabulary or target.config.vocab_size)
        width = int(target.spec().hidden_size)
    size = dtype_of(preset).itemsize
    trained = [head for head in heads if head.shares is None]
    weights = sum(head.parameters + head.discriminator for head in trained)
    tokens = preset.training.batch_tokens
    if labelled and not preset.training.stored_states:
        labelled.add(target.config.vocab_size)  # the target's likeliest token is sought among all
    # Of a step the states and the distributions of one micro-batch are held.
    batch = tokens * (width * len(layers_of(read)) * size + config.vocab_size * 4)
    shapes = [config, *(each.config for each in (models or {}).values() if each.config is not None)]
    rows = min(target.longest, preset.data.max_tokens + preset.evaluation.max_new_tokens)
    cache = sum(map(_row_of, shapes)) * rows * size
    loaded_weights = sum(count or 0 for count in drafting.values())
    absent = sum(drafting[name] or 0 for name, each in (models or {}).items() if not each.at_hand)
    # On the CPU recordings have the weights in layouts of their own: one in float32, else one for a single row and one
    # for several.
    where = _decodes_on(preset)
    recorded = where.type == "cpu" and pick_engine(preset.target.engine, where) == "graph"
    copies = (2 if dtype_of(preset) == torch.float32 else 3) if recorded else 1
    answers = (160 if questions is None else questions) * preset.evaluation.repeats
    return Needs(
        target_parameters=parameters,
        heads=tuple(heads),
        training_memory=parameters * size + weights * _TRAINED_BYTES + batch,
        decoding_memory=(parameters + loaded_weights + sum(head.parameters for head in trained)) * size * copies
        + cache,
        download=((0 if place.at_hand else parameters) + absent) * _STORED_BYTES,
        disk=weights * _KEPT_BYTES + answers * (len(names) + 1) * preset.evaluation.max_new_tokens * 16,
        training_tokens=preset.training.steps * tokens * preset.training.micro_batches if weights else 0,
        answer_tokens=answers * preset.evaluation.max_new_tokens,
        models=drafting,
        ends_memory=ends * size + weights * _TRAINED_BYTES + batch,
        state_bytes=STATE_BYTES * len(layers_of(read)) * width + TOKEN_BYTES,
        label_flop=2 * width * sum(labelled),
    )


def _row_of(config: Any) -> int:
    """Numbers that a cache keeps of one token."""
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(2 * config.num_hidden_layers * heads * head_dim)


def dtype_of(preset: Preset) -> torch.dtype:
    """The target's dtype where the preset runs as it says, whether there is such a device here or not."""
    return pick_dtype(preset.target.dtype, _decodes_on(preset))


def _decodes_on(preset: Preset) -> torch.device:
    wanted = preset.target.device
    on_gpu = wanted.startswith("cuda") or (wanted == "auto" and torch.cuda.is_available())
    return torch.device("cuda" if on_gpu else "cpu")


def turns_of(preset: Preset, data_dir: Path | None) -> int | None:
    """Number of turns that are asked, or None where the question file is not here.

    Raises:
        KoalaBenchError: the file is damaged.
    """
    try:
        path = find_questions(preset.evaluation.questions, data_dir)[1]
    except KoalaBenchError:
        return None
    questions = select_questions(read_questions(path), preset.evaluation.limit)
    return sum(len(question.turns) for question in questions)


def missing_for(
    preset: Preset, place: Place, needs: Needs, turns: int | None, out: Path, models: Mapping[str, Place] | None = None
) -> list[str]:
    """What keeps the preset from running here, a sentence each with what to do about it."""
    found = []
    wanted, on_gpu = preset.target.device, torch.cuda.is_available()
    need = max(needs.training_memory, needs.decoding_memory)
    least = f"Memory: it takes at least {gibibytes(need)}"
    if wanted.startswith("cuda") and not on_gpu:
        found.append(
            f"A CUDA device with at least {gibibytes(need)}: there is none. Run it where there is one, or on a smaller"
            " target with --device cpu."
        )
    elif wanted == "cpu" or not on_gpu:
        memory = memory_bytes()
        if memory is not None and memory < need:
            found.append(f"{least}, this machine has {gibibytes(memory)}. Use a smaller target.")
    elif (total := torch.cuda.get_device_properties(0).total_memory) < need:
        found.append(f"{least}, the GPU has {gibibytes(total)}. Use fewer --methods at a time or a smaller target.")
    if not place.at_hand:
        size = gibibytes(needs.target_parameters * _STORED_BYTES)
        how = _how(place.reached, place.refusal, "give the path of a copy with --target")
        found.append(f"The weights of {preset.target.name}, {size}. {how}")
    for name, each in (models or {}).items():
        if not each.at_hand:
            count = needs.models.get(name)
            size = gibibytes(count * _STORED_BYTES) if count else "whose size nobody here knows"
            how = _how(each.reached, each.refusal, "give the path of a copy with the option model of its method")
            found.append(f"The weights of the draft model {name}, {size}. {how}")
    if needs.training_tokens and (lacking := missing_conversations(preset.data.source, preset.target.name)) is not None:
        found.append(lacking)
    if turns is None:
        name = preset.evaluation.questions
        found.append(f"The questions {name}. Get them: koala-bench data {name} --data-dir data.")
    there = next(parent for parent in (out, *out.resolve().parents) if parent.exists())
    if (free := shutil.disk_usage(there).free) < (wanted_space := needs.disk + needs.download):
        found.append(
            f"Disk: {gibibytes(wanted_space)}, and {there} has {gibibytes(free)}. Free some, or choose another --out."
        )
    if preset.target.chat_template.startswith("vicuna") and importlib.util.find_spec("fastchat") is None:
        found.append("The package fschat, for the chat template. Install koala-bench with its dependencies.")
    return found


def _how(reached: bool, refusal: str | None, otherwise: str) -> str:
    """How to come by what is not here but perhaps on the hub, by what that says."""
    if not reached:
        return f"The hub does not answer: allow access to huggingface.co, or {otherwise}."
    if refusal is not None:
        return f"The hub refuses them ({refusal}): check the name, set HF_TOKEN for gated ones, or {otherwise}."
    return "The hub answers; they are downloaded at the first use. Set HF_TOKEN for gated ones."


def missing_conversations(source: str, target: str) -> str | None:
    """What is missing of the conversations to train on, with what to do about it, or None if they are here."""
    if bundled_answers(source) is not None:
        if source != BUNDLED or bundled_target(target) is not None:
            return None
        return (
            f"Conversations: the bundled answers are those of the bundled target, not of {target}. Name a file with"
            " --set data.source=FILE, or let the target answer questions: koala-bench distill."
        )
    if not source.startswith(HUB):
        try:
            if all(path.is_file() for path in files_of(Path(source))):
                return None
        except KoalaBenchError as error:
            return f"Conversations: {error}"
        return (
            f"The conversations {source}. Download some in the form of ShareGPT, FastChat, OpenAI's messages or Alpaca"
            " (.json or .jsonl, also .gz, .parquet, or a folder of these), or let the target answer questions:"
            " koala-bench distill; then --set data.source=FILE."
        )
    if dialogues_at_hand(source):
        return None
    try:
        answer, size = dialogues_on_hub(source)
    except KoalaBenchError as error:
        return f"The conversations {source}. {error}"
    how = _how(answer.reached, answer.refusal, "fetch the file elsewhere and give --set data.source=FILE")
    return f"The conversations {source}{f', {gibibytes(size)}' if size else ''}. {how}"


def gibibytes(count: float) -> str:
    """A number of bytes for a person."""
    return f"{count / 2**30:,.1f} GiB" if count >= 0.95 * 2**30 else f"{count / 2**20:,.0f} MiB"
