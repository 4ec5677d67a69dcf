"""EAGLE-3 heads in the files of others, by the names of EAGLE-1's files; read and written, not compared with what the
official code computes.

Keys (upstream ``eagle/model/cnets.py``): ``fc``, ``midlayer.*``, ``norm`` and ``lm_head``, which this project's head
has too. A draft vocabulary smaller than the target's comes with ``d2t``, for each drafted token how far its id in the
target is behind its place, and with ``t2d``, which of the target's tokens can be drafted. Official files hold no
embedding, for it is the target's. Files of the speculators library call the layer ``layers.0``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from koala_bench.common.draft_vocabulary import BUFFER
from koala_bench.engine.target import Target
from koala_bench.errors import KoalaBenchError
from koala_bench.heads import TargetSpec
from koala_bench.interop.checkpoints import Exported, Fields, Imported, check_layout, first_of, read_json, read_tensors
from koala_bench.interop.eagle import FILES
from koala_bench.interop.llama import Shapes, check_embedding, layer_fields, layer_options, layer_shapes, target_fields

OWN = "midlayer."  # what keys begin with that tell a file of these names from EAGLE-1's

_REMEDY = "Give a checkpoint of the official layout that was made for this target."
_LAYERNORMS = ("hidden_norm", "input_layernorm", "post_attention_layernorm")
_LAYERS_READ = "eagle_aux_hidden_state_layer_ids"
_OTHER_NETWORKS = ("norm_output", "fc_norm", "norm_before_fc")  # later variants: the same tensors mean something else
_LINEAR = (
    *(f"self_attn.{name}_proj" for name in ("q", "k", "v", "o")),
    *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
)  # fmt: skip
_THEIRS = "layers.0."  # the layer in the layout of the speculators library, whose configuration has it in a field
_LAYER = "transformer_layer_config"
_OF_SERVERS = "eagle_config"
_FUSED = 3
_MAPS = ("d2t", "t2d")


def read(folder: Path, spec: TargetSpec, tensors: Fields | None = None) -> Imported:
    """Read a checkpoint strictly; the draft vocabulary comes from the tensors, the shape of the layer from the
    configuration.

    Args:
        tensors: of the folder's file, where they are read already.

    Raises:
        KoalaBenchError: a file or field is missing, the network is another, keys or shapes do not fit, all named, the
            maps between the vocabularies contradict themselves or each other, or the embedding is another model's.
    """
    tensors = tensors or read_tensors(first_of(folder, *FILES))
    config = read_json(first_of(folder, "config.json"))
    nested = config.given(_LAYER)  # in the layout of speculators
    layer = config.part(_LAYER) if nested else config
    tensors = Fields(tensors.path, {_official(name): tensor for name, tensor in tensors.items()})
    for name, fields in (("hidden_size", layer), ("target_hidden_size", config)):
        if fields.given(name) and fields.whole(name) != spec.hidden_size:
            raise KoalaBenchError(
                f"{config.path}: {name} is {fields[name]}, the target's is {spec.hidden_size}.",
                "Only heads of the target's width are read.",
            )
    if other := [name for name in _OTHER_NETWORKS if config.given(name) and config.truth(name)]:
        raise KoalaBenchError(
            f"{config.path}: {other[0]} is set.",
            "Only heads of EAGLE-3 as published are read; later variants are other networks.",
        )
    if not config.part(_OF_SERVERS).truth("use_aux_hidden_state", True):
        raise KoalaBenchError(
            f"{config.path}: use_aux_hidden_state is false.",
            "Only heads that read three layers of the target are read.",
        )
    options = layer_options(layer, spec.hidden_size, "EAGLE-3", own_shape=True)
    options |= _variant(config, tensors, nested, spec)
    output = tensors.get("lm_head.weight")
    drafted = spec.vocab_size if output is None or not output.ndim else max(1, min(len(output), spec.vocab_size))
    own = any(name.startswith(OWN) for name in tensors)
    hint = "" if own else "EAGLE-1 and other relatives of EAGLE-3 are other networks."
    check_layout(tensors, _shapes(tensors, options, drafted, spec), hint, no_weights=_MAPS)
    ids = _draft_vocabulary(tensors, drafted, spec.vocab_size)
    left_out = (*_MAPS, "embed_tokens.weight")
    imported = {name: tensor.float() for name, tensor in tensors.items() if name not in left_out}
    notes = []
    for said, own_config, value, where in (
        ("draft_vocab_size", config, drafted, "file"),
        ("num_hidden_layers", layer, 1, "file"),
        ("vocab_size", layer, spec.vocab_size, "target"),
    ):
        notes += own_config.disagreement({said: value}, where) if own_config.given(said) else []
    if "embed_tokens.weight" in tensors:
        notes += check_embedding(tensors, spec)
    return Imported("eagle3", {"layers": 1, **options}, imported | ({} if ids is None else {BUFFER: ids}), tuple(notes))


def is_of_speculators(names: Iterable[str]) -> bool:
    """Whether a file has the names of the speculators library, where the layer is called as EAGLE-1's are."""
    return f"{_THEIRS}hidden_norm.weight" in names


def _official(name: str) -> str:
    return OWN + name.removeprefix(_THEIRS) if name.startswith(_THEIRS) else name


def _variant(config: Fields, tensors: Fields, nested: bool, spec: TargetSpec) -> dict[str, Any]:
    """Options that tell one network under the same names from another: the residual path, biases, and layers read."""
    found: dict[str, Any] = {}
    # What a head of speculators does where it says nothing changed with their versions.
    if config.truth("norm_before_residual") if nested else config.truth("norm_before_residual", False):
        found["norm_before_residual"] = True
    linear = ("fc", *(f"{OWN}{name}" for name in _LINEAR))
    if biases := [name for name in linear if f"{name}.bias" in tensors]:
        found["biases"] = biases
    # Servers number the same states in two ways: speculators and vLLM by the layer that reads a state, SGLang by the
    # layer that computes it.
    ids = [each + 1 for each in config.part(_OF_SERVERS).wholes(_LAYERS_READ)] or config.wholes(_LAYERS_READ)
    if ids and (len(ids) != _FUSED or not all(0 <= each < spec.layers for each in ids)):
        raise KoalaBenchError(
            f"{config.path}: {_LAYERS_READ} names the inputs of the target's layers {', '.join(map(str, ids))}.",
            f"Only heads that read {_FUSED} of the inputs of its layers 0 to {spec.layers - 1} are read.",
        )
    return {**found, "layer_ids": ids} if ids else found


def to_official(head: Any, tensors: Mapping[str, torch.Tensor], target: Target) -> Exported:
    """The layout of the released heads, without an embedding; ``read`` reads it again. Raises KoalaBenchError where the
    head has several layers, or is a variant that upstream's code does not know."""
    if len(head.layers):
        raise KoalaBenchError(
            f"The official layout of EAGLE-3 has no place for {1 + len(head.layers)} layers.",
            "Only heads of one layer can be exported: train with layers = 1.",
        )
    if other := _variants(head):
        raise KoalaBenchError(
            f"The official layout of EAGLE-3 has no place for {other[0]}.", "Export it with --layout vllm or sglang."
        )
    named, config = _tensors(tensors, target, always_mapped=False), _config(head, tensors, target)
    return Exported("pytorch_model.bin", named, config)


def to_vllm(head: Any, tensors: Mapping[str, torch.Tensor], target: Target) -> Exported:
    """What vLLM reads for its ``eagle3`` method (``vllm/model_executor/models/llama_eagle3.py``); ``read`` reads it
    too. Raises KoalaBenchError where the head has several layers or a bias, or reads the target's last state."""
    _check_for_servers(head, "vLLM", ())
    config = _config(head, tensors, target) | {_LAYERS_READ: list(head.features[:_FUSED])}
    config["norm_before_residual"] = head.midlayer.norm_before_residual
    note = 'vLLM drafts a chain with it, no tree: --speculative-config \'{"method": "eagle3", "model": ...}\'.'
    return Exported("model.safetensors", _tensors(tensors, target, always_mapped=True), config, (note,))


def to_sglang(head: Any, tensors: Mapping[str, torch.Tensor], target: Target) -> Exported:
    """What SGLang reads for its algorithm ``EAGLE3`` (``sglang/srt/models/llama_eagle3.py``); ``read`` reads it too.
    Raises KoalaBenchError where the head has several layers, a bias or ``norm_before_residual``, or reads the target's
    last state or embedding."""
    _check_for_servers(head, "SGLang", ("norm_before_residual",))
    ids = [each - 1 for each in head.features[:_FUSED]]  # counted by the layer that makes a state
    config = _config(head, tensors, target) | {_OF_SERVERS: {_LAYERS_READ: ids, "use_aux_hidden_state": True}}
    note = "Start SGLang with --speculative-algorithm EAGLE3 --speculative-draft-model-path FOLDER."
    return Exported("model.safetensors", _tensors(tensors, target, always_mapped=True), config, (note,))


def _variants(head: Any) -> list[str]:
    """What of a head is not as upstream's code has it, by the names of its options."""
    found = ["norm_before_residual"] if head.midlayer.norm_before_residual else []
    found += ["biases"] if any(name.endswith(".bias") for name, _ in head.named_parameters()) else []
    return found + (["layer_ids"] if head.own_layers else [])


def _check_for_servers(head: Any, server: str, refused: Sequence[str]) -> None:
    several = [f"{1 + len(head.layers)} layers"] if len(head.layers) else []
    if other := [*several, *(name for name in _variants(head) if name in ("biases", *refused))]:
        raise KoalaBenchError(
            f"{server}'s EAGLE-3 has no place for {other[0]}.",
            "Only heads of one layer without them are exported there.",
        )
    if min(head.features[:_FUSED]) < (1 if refused else 0):
        raise KoalaBenchError(
            f"{server} hands a draft no such state of the target as this head reads (its features are"
            f" {', '.join(map(str, head.features[:_FUSED]))}).",
            "Train it for a target of 7 layers or more, or with options = { layer_ids = [...] }.",
        )


def _tensors(tensors: Mapping[str, torch.Tensor], target: Target, always_mapped: bool) -> dict[str, torch.Tensor]:
    """Under the official names, with the maps between the vocabularies if they differ or the reader requires them."""
    named = {name: tensor for name, tensor in tensors.items() if name != BUFFER}
    drafted = named["lm_head.weight"].shape[0]
    if BUFFER in tensors or always_mapped:
        ids = tensors.get(BUFFER, torch.arange(drafted))
        named["d2t"] = ids - torch.arange(drafted)
        named["t2d"] = torch.zeros(target.config.vocab_size, dtype=torch.bool).index_fill(0, ids, True)
    return named


def _config(head: Any, tensors: Mapping[str, torch.Tensor], target: Target) -> dict[str, Any]:
    drafted = tensors["lm_head.weight"].shape[0]
    return {
        "architectures": ["LlamaForCausalLMEagle3"], "num_hidden_layers": 1, "draft_vocab_size": drafted,
        **layer_fields(head.shape), **target_fields(target),
    }  # fmt: skip


def _shapes(tensors: Fields, options: dict[str, Any], drafted: int, spec: TargetSpec) -> Shapes:
    width, vocab = spec.hidden_size, spec.vocab_size
    heads, keys, inner = options["attention_heads"], options["kv_heads"], options["intermediate"]
    own = layer_shapes(width, heads, keys, inner, sources=2, head_width=options.get("head_dim"))
    own |= {f"{name}.weight": (width,) for name in _LAYERNORMS}
    shapes: Shapes = {"fc.weight": (width, 3 * width), "norm.weight": (width,), "lm_head.weight": (drafted, width)}
    shapes |= {f"midlayer.{name}": shape for name, shape in own.items()}
    shapes |= {f"{name}.bias": shapes[f"{name}.weight"][:1] for name in options.get("biases", ())}
    optional = {"d2t": (drafted,), "t2d": (vocab,), "embed_tokens.weight": (vocab, width)}
    return shapes | {
        name: shape for name, shape in optional.items() if name in tensors or (name == "d2t" and drafted < vocab)
    }


def _draft_vocabulary(tensors: Fields, drafted: int, vocab: int) -> torch.Tensor | None:
    """Ids [drafted] of the tokens that the rows of the output layer are for; None where they are all in their order."""

    def refuse(fault: str) -> KoalaBenchError:
        return KoalaBenchError(f"{tensors.path}: {fault}.", _REMEDY)

    ids = places = torch.arange(drafted)
    if (behind := tensors.get("d2t")) is not None:
        if behind.dtype not in (torch.int64, torch.int32):
            raise refuse(f"d2t is of {behind.dtype}, no whole numbers")
        ids = places + behind.long()
        if outside := int(((ids < 0) | (ids >= vocab)).sum()):
            raise refuse(f"d2t maps {outside} of {drafted} drafted tokens to ids outside of the target's {vocab}")
        if len(ids.unique()) < drafted:
            raise refuse("d2t maps several drafted tokens to one id")
    every = drafted == vocab and torch.equal(ids, places)
    if (known := tensors.get("t2d")) is not None:
        if known.dtype != torch.bool:
            raise refuse(f"t2d is of {known.dtype}, not of bool")
        different = int((torch.zeros(vocab, dtype=torch.bool).index_fill(0, ids, True) != known).sum())
        # Upstream makes the buffer of nothing but False, and does not fill it where the vocabularies are the same.
        if different and not (every and not known.any()):
            raise refuse(f"t2d and d2t disagree about {different} of {vocab} tokens")
    return None if every else ids
