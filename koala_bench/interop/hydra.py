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
    Imported,
    check_layout,
    count_of,
    first_of,
    numbers_in,
    read_config_of,
    read_tensors,
)
from koala_bench.interop.llama import layer_shapes
from koala_bench.interop.repeats import Blocks, note_of_export, note_of_import

FILES = ("hydra_lm_head.pt",)

_BLOCK = re.compile(r"hydra_mlp\.(\d{1,3})\.(\d{1,3})\.(?:linear|res_connection)\.(?:weight|bias)", re.ASCII)
_OUTPUT = re.compile(r"hydra_lm_head\.(\d{1,3})\.(?:1\.)?(?:weight|bias)", re.ASCII)
_PREFIX = "prefix_embeding_layer."
# Upstream's prefix is a whole model that is given states: its embedding is saved but never read.
_UNREAD = f"{_PREFIX}embed_tokens.weight"
_BEHIND = " behind the first"


def _layout(
    heads: int, layers: int, prefix: bool, dropout: bool, spec: TargetSpec
) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Each of this project's names: upstream's, and the tensor's shape."""
    width, step = spec.hidden_size, 2 if dropout else 1
    found: dict[str, tuple[str, tuple[int, ...]]] = {}

    def linear(own: str, theirs: str, rows: int, columns: int) -> None:
        found[f"{own}.weight"] = f"{theirs}.weight", (rows, columns)
        found[f"{own}.bias"] = f"{theirs}.bias", (rows,)

    for head in range(heads):
        own, theirs = f"heads.{head}", f"hydra_mlp.{head}"
        linear(f"{own}.first.linear", f"{theirs}.{step - 1}.linear", width, (head + 2) * width)
        linear(f"{own}.first.residual", f"{theirs}.{step - 1}.res_connection", width, (head + 2) * width)
        for block in range(layers - 1):
            linear(f"{own}.blocks.{block}.linear", f"{theirs}.{step * (block + 2) - 1}.linear", width, width)
        linear(f"{own}.output", f"hydra_lm_head.{head}{'.1' * dropout}", spec.vocab_size, width)
    if prefix:
        config, queries = spec.config, spec.config.num_attention_heads
        keys = getattr(config, "num_key_value_heads", None) or queries
        shapes: dict[str, tuple[int, ...]] = layer_shapes(width, queries, keys, config.intermediate_size)
        shapes |= {f"{name}.weight": (width,) for name in ("input_layernorm", "post_attention_layernorm")}
        found["prefix.norm.weight"] = f"{_PREFIX}norm.weight", (width,)
        found |= {f"prefix.layer.{name}": (f"{_PREFIX}layers.0.{name}", shape) for name, shape in shapes.items()}
    return found


def _config(heads: int, layers: int, prefix: bool) -> dict[str, Any]:
    kind = "prefix-mlp" if prefix else "mlp"
    return {"hydra_num_heads": heads, "hydra_num_layers": layers, "hydra_head_arch": kind, "grounded_heads": True}


def read(folder: Path, spec: TargetSpec) -> Imported:
    """Read a checkpoint strictly; the numbers of heads and layers, the prefix and the places of dropouts come from the
    keys. Raises KoalaBenchError where no such file, keys and shapes that are missing, too many or wrong, all named, or
    heads of another network."""
    tensors = read_tensors(first_of(folder, *FILES))
    blocks, outputs = numbers_in(tensors, _BLOCK), numbers_in(tensors, _OUTPUT)
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
    heads = count_of(tensors, "head", (head for head, *_ in [*blocks, *outputs]))
    dropout = all(place for _, place in blocks)
    layers = count_of(tensors, "block", (place // 2 if dropout else place for _, place in blocks))
    prefix = any(name.startswith(_PREFIX) for name in tensors)
    layout = _layout(heads, layers, prefix, dropout, spec)
    unread = {_UNREAD: (spec.vocab_size, spec.hidden_size)} if _UNREAD in tensors else {}
    check_layout(tensors, dict(layout.values()) | unread)
    imported = {own: tensors[name].float() for own, (name, _) in layout.items()}
    config = read_config_of(folder)
    if offset := config.whole("hidden_state_offset", 0, least=0):
        raise KoalaBenchError(
            f"{config.path}: hidden_state_offset is {offset}: the heads read an earlier state than the target's last.",
            "Only heads over the last state are read.",
        )
    notes = note_of_import(_blocks_of(imported, heads, layers), _BEHIND)
    notes += config.disagreement(_config(heads, layers, prefix))
    if unread:
        notes.append(f"{_UNREAD} is never read, by upstream neither, and was dropped.")
    return Imported("hydra", {"heads": heads, "layers": layers, "prefix": prefix}, imported, tuple(notes))


def to_official(head: Any, tensors: Mapping[str, torch.Tensor], target: Target) -> Exported:
    """The layout of the released heads, with places for dropouts where there is a prefix layer; ``read`` reads it
    again."""
    heads, layers, prefix = len(head.heads), 1 + len(head.heads[0].blocks), head.prefix is not None
    layout = _layout(heads, layers, prefix, dropout=prefix, spec=target.spec())
    named = {name: tensors[own] for own, (name, _) in layout.items()}
    more = {"hidden_state_offset": 0, "base_model_name_or_path": target.name}
    note = note_of_export(_blocks_of(tensors, heads, layers), _BEHIND)
    return Exported(FILES[0], named, _config(heads, layers, prefix) | more, note)


def _blocks_of(tensors: Mapping[str, torch.Tensor], heads: int, layers: int) -> Blocks:
    """The blocks behind the first of each head."""
    at = "heads.{}.blocks.{}.linear.{}".format
    return [
        [(tensors[at(head, block, "weight")], tensors[at(head, block, "bias")]) for block in range(layers - 1)]
        for head in range(heads)
    ]
