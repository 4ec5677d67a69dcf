"""EAGLE-3 heads in the files of others, by the names of EAGLE-1's files; read and written, not compared with what the
official code computes.

Keys (upstream ``eagle/model/cnets.py``): ``fc``, ``midlayer.*``, ``norm`` and ``lm_head``, which this project's head
has too. A draft vocabulary smaller than the target's comes with ``d2t``, for each drafted token how far its id in the
target is behind its place, and with ``t2d``, which of the target's tokens can be drafted. Official files hold no
embedding, for it is the target's.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

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
_OTHER_NETWORKS = (
    "norm_before_residual",
    "norm_output",
    "fc_norm",
)  # fields of later variants, which change what the same tensors mean


def read(folder: Path, spec: TargetSpec) -> Imported:
    """Read a checkpoint strictly; the draft vocabulary comes from the tensors, the shape of the layer from the
    configuration.

    Raises:
        KoalaBenchError: a file or field is missing, the network is another, keys or shapes do not fit, all named, the
            maps between the vocabularies contradict themselves or each other, or the embedding is another model's.
    """
    return fit(read_tensors(first_of(folder, *FILES)), folder, spec)


def fit(tensors: Fields, folder: Path, spec: TargetSpec) -> Imported:
    """The same with the tensors of the folder's file already read."""
    config = read_json(first_of(folder, "config.json"))
    options = layer_options(config, spec.hidden_size, "EAGLE-3")
    if other := [name for name in _OTHER_NETWORKS if config.given(name) and config.truth(name)]:
        raise KoalaBenchError(
            f"{config.path}: {other[0]} is set.",
            "Only heads of EAGLE-3 as published are read; later variants are other networks.",
        )
    rows = (
        tensors["lm_head.weight"].shape[0]
        if "lm_head.weight" in tensors and tensors["lm_head.weight"].ndim
        else spec.vocab_size
    )
    drafted = max(1, min(rows, spec.vocab_size))
    check_layout(
        tensors,
        _shapes(tensors, options, drafted, spec),
        (
            ""
            if any(name.startswith(OWN) for name in tensors)
            else "EAGLE-1 and other relatives of EAGLE-3 are other networks."
        ),
        no_weights=("d2t", "t2d"),
    )
    ids = _draft_vocabulary(tensors, drafted, spec.vocab_size)
    imported = {
        name: tensor.float() for name, tensor in tensors.items() if name not in ("d2t", "t2d", "embed_tokens.weight")
    }
    if ids is not None:
        options["draft_vocabulary"], imported["draft_vocabulary"] = drafted, ids
    notes = _disagreement(config, drafted, spec)
    if "embed_tokens.weight" in tensors:
        notes += check_embedding(tensors, spec)
    return Imported("eagle3", {"layers": 1, **options}, imported, tuple(notes))


def to_official(head: Any, tensors: Mapping[str, torch.Tensor], target: Target) -> Exported:
    """The layout of the released heads, without an embedding; ``read`` reads it again.

    Args:
        head: the built head.
        tensors: its weights as they are stored.

    Raises:
        KoalaBenchError: the head has several layers.
    """
    if len(head.layers):
        raise KoalaBenchError(
            f"The official layout of EAGLE-3 has no place for {1 + len(head.layers)} layers.",
            "Only heads of one layer can be exported: train with layers = 1.",
        )
    named = {name: tensor for name, tensor in tensors.items() if name != "draft_vocabulary"}
    drafted = named["lm_head.weight"].shape[0]
    if "draft_vocabulary" in tensors:
        ids = tensors["draft_vocabulary"]
        named["d2t"] = ids - torch.arange(drafted)
        named["t2d"] = torch.zeros(target.config.vocab_size, dtype=torch.bool).index_fill(0, ids, True)
    config = {
        "architectures": ["LlamaForCausalLMEagle3"], "num_hidden_layers": 1, "draft_vocab_size": drafted, **layer_fields(head.shape), **target_fields(target),
    }  # fmt: skip
    return Exported("pytorch_model.bin", named, config)


def _shapes(tensors: Fields, options: dict[str, Any], drafted: int, spec: TargetSpec) -> Shapes:
    width, vocab = spec.hidden_size, spec.vocab_size
    own = layer_shapes(width, options["attention_heads"], options["kv_heads"], options["intermediate"], sources=2)
    own |= {f"{name}.weight": (width,) for name in _LAYERNORMS}
    shapes: Shapes = {"fc.weight": (width, 3 * width), "norm.weight": (width,), "lm_head.weight": (drafted, width)}
    shapes |= {f"midlayer.{name}": shape for name, shape in own.items()}
    optional = {"d2t": (drafted,), "t2d": (vocab,), "embed_tokens.weight": (vocab, width)}
    return shapes | {
        name: shape for name, shape in optional.items() if name in tensors or (name == "d2t" and drafted < vocab)
    }


def _draft_vocabulary(tensors: Fields, drafted: int, vocab: int) -> torch.Tensor | None:
    """Ids [drafted] of the target's tokens that the rows of the output layer are for; None where they are all, in their
    order.
    """
    places = torch.arange(drafted)
    ids = places
    if "d2t" in tensors:
        if tensors["d2t"].dtype not in (torch.int64, torch.int32):
            raise KoalaBenchError(f"{tensors.path}: d2t is of {tensors['d2t'].dtype}, no whole numbers.", _REMEDY)
        ids = places + tensors["d2t"].long()
        outside = int(((ids < 0) | (ids >= vocab)).sum())
        if outside or len(ids.unique()) < drafted:
            fault = (
                f"{outside} of {drafted} drafted tokens to ids outside of the target's {vocab}"
                if outside
                else "several drafted tokens to one id"
            )
            raise KoalaBenchError(f"{tensors.path}: d2t maps {fault}.", _REMEDY)
    every = drafted == vocab and torch.equal(ids, places)
    if "t2d" in tensors:
        if tensors["t2d"].dtype != torch.bool:
            raise KoalaBenchError(f"{tensors.path}: t2d is of {tensors['t2d'].dtype}, not of bool.", _REMEDY)
        known = torch.zeros(vocab, dtype=torch.bool).index_fill(0, ids, True)
        different = int((known != tensors["t2d"]).sum())
        # Upstream makes the buffer of nothing but False, and does not fill it where the vocabularies are the same.
        if different and not (every and not tensors["t2d"].any()):
            raise KoalaBenchError(f"{tensors.path}: t2d and d2t disagree about {different} of {vocab} tokens.", _REMEDY)
    return None if every else ids


def _disagreement(config: Fields, drafted: int, spec: TargetSpec) -> list[str]:
    """What the configuration says otherwise than file and target, a sentence each."""
    found = {
        "draft_vocab_size": (drafted, "file"),
        "num_hidden_layers": (1, "file"),
        "vocab_size": (spec.vocab_size, "target"),
    }
    given = {name: config.whole(name) for name in found if config.given(name)}
    notes = [
        f"config.json says {name} {given[name]}, the {where} has {value}."
        for name, (value, where) in found.items()
        if given.get(name, value) != value
    ]
    layers = config.part("eagle_config").wholes(_LAYERS_READ) or config.wholes(_LAYERS_READ)
    if layers:
        notes.append(
            f"config.json names the target's layers {', '.join(map(str, layers))} to be read; the head reads those of"
            " upstream's code."
        )
    return notes
