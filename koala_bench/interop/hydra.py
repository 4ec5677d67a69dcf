"""Hydra heads in the file of others: the official ``hydra_lm_head.pt``, read and written; not compared with what the
official code computes.

Keys (upstream ``hydra/model/hydra_heads/mlp_head.py`` and ``prefix_mlp_head.py``): ``hydra_mlp.{head}.{place}.linear``
for each block, with ``.res_connection`` beside it for the first, and ``hydra_lm_head.{head}`` for the projection to the
vocabulary. Upstream's heads behind a prefix layer have a dropout before each of these, which takes a place: blocks are
at 1, 3, 5, ... and projections at 1. The prefix layer is ``prefix_embeding_layer.layers.0`` and ``.norm``, of the
target's shape.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from koala_bench.engine.target import Target
from koala_bench.errors import KoalaBenchError
from koala_bench.heads import TargetSpec
from koala_bench.interop.checkpoints import (
    Exported,
    Fields,
    Imported,
    check_layout,
    count_of,
    first_of,
    read_json,
    read_tensors,
)
from koala_bench.interop.llama import Shapes, layer_shapes

FILES = ("hydra_lm_head.pt",)

_BLOCK = re.compile(r"hydra_mlp\.(\d{1,3})\.(\d{1,3})\.(?:linear|res_connection)\.(?:weight|bias)", re.ASCII)
_OUTPUT = re.compile(r"hydra_lm_head\.(\d{1,3})\.(?:1\.)?(?:weight|bias)", re.ASCII)
_PARTS = ("weight", "bias")
_NORMS = ("input_layernorm.weight", "post_attention_layernorm.weight")
_PREFIX = "prefix_embeding_layer."
# The prefix is a whole model of one layer upstream, which is handed states: what would embed ids is saved and never
# read.
_UNREAD = f"{_PREFIX}embed_tokens.weight"


def read(folder: Path, spec: TargetSpec) -> Imported:
    """Read a checkpoint strictly; the numbers of heads and layers, the prefix and the places of dropouts come from the
    keys.

    Raises:
        KoalaBenchError: no such file, keys and shapes that are missing, too many or wrong, all named, or heads of
            another network.
    """
    tensors = read_tensors(first_of(folder, *FILES))
    blocks = [tuple(map(int, found.groups())) for name in tensors if (found := _BLOCK.fullmatch(name))]
    outputs = [int(found[1]) for name in tensors if (found := _OUTPUT.fullmatch(name))]
    if not blocks:
        raise KoalaBenchError(
            f"{tensors.path} has no hydra_mlp.0.0.linear.weight or hydra_mlp.0.1.linear.weight.",
            "Give the official hydra_lm_head.pt of heads of the kind mlp or prefix-mlp; the kinds cross-attn and"
            " eagle-attn are other networks.",
        )
    if not any(".res_connection." in name for name in tensors):
        raise KoalaBenchError(
            f"{tensors.path} has no res_connection in any hydra_mlp: its heads do not read drafted tokens.",
            "Give heads that were trained with grounded_heads; the others are Medusa's network.",
        )
    heads = count_of(tensors, "head", [*(head for head, _ in blocks), *outputs])
    dropout = all(place for _, place in blocks)
    layers = count_of(tensors, "block", (place // 2 if dropout else place for _, place in blocks))
    prefix = any(name.startswith(_PREFIX) for name in tensors)
    names = _names(heads, layers, prefix, dropout)
    own_shapes = _shapes(heads, layers, prefix, spec)
    shapes = {names[own]: shape for own, shape in own_shapes.items()}
    unread = {_UNREAD: (spec.vocab_size, spec.hidden_size)} if _UNREAD in tensors else {}
    check_layout(tensors, shapes | unread)
    imported = {own: tensors[name].float() for own, name in names.items()}
    notes = [*_tying(imported, heads, layers), *_disagreement(folder, heads, layers, prefix)]
    if unread:
        notes.append(f"{_UNREAD} is never read, by upstream neither, and was dropped.")
    return Imported("hydra", {"heads": heads, "layers": layers, "prefix": prefix}, imported, tuple(notes))


def to_official(head: Any, tensors: Mapping[str, torch.Tensor], target: Target) -> Exported:
    """The layout of the released heads, with places for dropouts where there is a prefix layer; ``read`` reads it
    again.

    Args:
        head: the built head.
        tensors: its weights as they are stored.
    """
    heads, layers, prefix = len(head.heads), 1 + len(head.heads[0].blocks), head.prefix is not None
    named = {name: tensors[own] for own, name in _names(heads, layers, prefix, dropout=prefix).items()}
    config = {
        "hydra_num_heads": heads, "hydra_num_layers": layers, "hydra_head_arch": _kind(prefix), "grounded_heads": True, "hidden_state_offset": 0,
        "base_model_name_or_path": target.name,
    }  # fmt: skip
    tied = tied_heads(tensors, heads, layers)
    distinct = [head for head in range(heads) if head not in tied] if layers > 2 else []
    which = (
        f"the distinct ones of heads {', '.join(map(str, distinct))}" if tied else f"these {layers - 1} distinct ones"
    )
    note = f"Upstream's model applies one block {layers - 1} times behind the first: its own loader cannot use {which}."
    return Exported(FILES[0], named, config, (note,) if distinct else ())


def tied_heads(tensors: Mapping[str, torch.Tensor], heads: int, layers: int) -> list[int]:
    """Heads with several blocks behind the first that are all equal: upstream repeats one module.

    Args:
        tensors: by the names of this project.
    """

    def same(head: int, block: int) -> bool:
        return all(
            torch.equal(
                tensors[f"heads.{head}.blocks.0.linear.{part}"], tensors[f"heads.{head}.blocks.{block}.linear.{part}"]
            )
            for part in _PARTS
        )

    return [head for head in range(heads) if layers > 2 and all(same(head, block) for block in range(1, layers - 1))]


def _names(heads: int, layers: int, prefix: bool, dropout: bool) -> dict[str, str]:
    """Upstream's name of each tensor of this project's head."""
    names = {}
    step = 2 if dropout else 1
    for head in range(heads):
        own, theirs = f"heads.{head}", f"hydra_mlp.{head}"
        for part in _PARTS:
            names[f"{own}.first.linear.{part}"] = f"{theirs}.{step - 1}.linear.{part}"
            names[f"{own}.first.residual.{part}"] = f"{theirs}.{step - 1}.res_connection.{part}"
            for block in range(layers - 1):
                names[f"{own}.blocks.{block}.linear.{part}"] = f"{theirs}.{step * (block + 2) - 1}.linear.{part}"
            names[f"{own}.output.{part}"] = (
                f"hydra_lm_head.{head}.1.{part}" if dropout else f"hydra_lm_head.{head}.{part}"
            )
    if prefix:
        names["prefix.norm.weight"] = f"{_PREFIX}norm.weight"
        names |= {f"prefix.layer.{name}": f"{_PREFIX}layers.0.{name}" for name in (*layer_shapes(1, 1, 1, 1), *_NORMS)}
    return names


def _shapes(heads: int, layers: int, prefix: bool, spec: TargetSpec) -> Shapes:
    """Of this project's tensors."""
    width, vocab = spec.hidden_size, spec.vocab_size
    shapes: Shapes = {}
    for head in range(heads):
        sources = (head + 2) * width
        for part in ("linear", "residual"):
            shapes |= {
                f"heads.{head}.first.{part}.weight": (width, sources),
                f"heads.{head}.first.{part}.bias": (width,),
            }
        for block in range(layers - 1):
            shapes |= {
                f"heads.{head}.blocks.{block}.linear.weight": (width, width),
                f"heads.{head}.blocks.{block}.linear.bias": (width,),
            }
        shapes |= {f"heads.{head}.output.weight": (vocab, width), f"heads.{head}.output.bias": (vocab,)}
    if prefix:
        config = spec.config
        query_heads = config.num_attention_heads
        own = layer_shapes(
            width, query_heads, getattr(config, "num_key_value_heads", None) or query_heads, config.intermediate_size
        )
        shapes |= {f"prefix.layer.{name}": shape for name, shape in (own | dict.fromkeys(_NORMS, (width,))).items()}
        shapes["prefix.norm.weight"] = (width,)
    return shapes


def _kind(prefix: bool) -> str:
    return "prefix-mlp" if prefix else "mlp"


def _tying(tensors: Mapping[str, torch.Tensor], heads: int, layers: int) -> list[str]:
    if layers < 3:
        return []
    what, tied = f"The {layers - 1} residual blocks behind the first", tied_heads(tensors, heads, layers)
    if len(tied) == heads:
        return [f"{what} of every head are identical copies: upstream applies one block {layers - 1} times."]
    if tied:
        return [f"{what} are identical copies in heads {', '.join(map(str, tied))} and distinct in the others."]
    return [f"{what} of every head are distinct."]


def _disagreement(folder: Path, heads: int, layers: int, prefix: bool) -> list[str]:
    """What the configuration says otherwise than the file.

    Raises:
        KoalaBenchError: it says that the heads read an earlier state than the last, which no key can tell.
    """
    if not (folder / "config.json").is_file():
        return []
    config: Fields = read_json(folder / "config.json")
    if offset := config.whole("hidden_state_offset", 0, least=0):
        raise KoalaBenchError(
            f"{config.path}: hidden_state_offset is {offset}: the heads read an earlier state than the target's last.",
            "Only heads over the last state are read.",
        )
    found = {
        "hydra_num_heads": heads,
        "hydra_num_layers": layers,
        "hydra_head_arch": _kind(prefix),
        "grounded_heads": True,
    }
    stated = {
        "hydra_num_heads": config.whole("hydra_num_heads", heads), "hydra_num_layers": config.whole("hydra_num_layers", layers),
        "hydra_head_arch": config.text("hydra_head_arch", _kind(prefix)), "grounded_heads": config.truth("grounded_heads", True),
    }  # fmt: skip
    other = [name for name, value in found.items() if stated[name] != value]
    if not other:
        return []
    said, has = ", ".join(f"{name} {stated[name]}" for name in other), ", ".join(str(found[name]) for name in other)
    return [f"config.json says {said}; the file has {has}."]
