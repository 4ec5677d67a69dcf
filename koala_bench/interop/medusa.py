"""Medusa heads in the files of others: the official ``medusa_lm_head.pt`` or ``.safetensors``, read and written, and
vLLM's.

Keys (upstream ``medusa/model/medusa_model.py``): ``{head}.{block}.linear.weight`` and ``.bias`` for each residual
block, then ``{head}.{blocks}.weight`` for the projection to the vocabulary.
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
from koala_bench.interop.repeats import Blocks, note_of_export, note_of_import

FILES = ("medusa_lm_head.safetensors", "medusa_lm_head.pt")

_BLOCK = re.compile(r"(\d{1,9})\.(\d{1,9})\.linear\.(?:weight|bias)", re.ASCII)
_OUTPUT = re.compile(r"(\d{1,9})\.(\d{1,9})\.weight", re.ASCII)


def _names(
    heads: int, layers: int, block: str = "{head}.{block}.linear.{part}", output: str = "{head}.{layers}.weight"
) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Each name of a layout: which of this project's stacked tensors it is a part of, and where in it."""
    names: dict[str, tuple[str, tuple[int, ...]]] = {}
    for head in range(heads):
        for at in range(layers):
            for part in ("weight", "bias"):
                names[block.format(head=head, block=at, part=part)] = f"block_{part}", (at, head)
        names[output.format(head=head, layers=layers)] = "output_weight", (head,)
    return names


def read(folder: Path, spec: TargetSpec) -> Imported:
    """Read a checkpoint strictly.

    The numbers of heads and blocks come from the keys: the configuration of the released Vicuna heads says 2 where the
    file has 5 (FasterDecoding/Medusa, a comment in ``medusa_model.py``). Raises KoalaBenchError where there
    is no such file, or keys or shapes are missing, too many or wrong, all named."""
    tensors = read_tensors(first_of(folder, *FILES))
    blocks, outputs = numbers_in(tensors, _BLOCK), numbers_in(tensors, _OUTPUT)
    if not outputs:
        hint = (
            "Heads that share the target's output layer (version 2 of upstream's trainer) are another network."
            if blocks
            else "Give the official medusa_lm_head file."
        )
        raise KoalaBenchError(f"{tensors.path} has no projection to the vocabulary for any head.", hint)
    heads = count_of(tensors, "head", (head for head, _ in [*blocks, *outputs]))
    count_of(tensors, "block", (place for _, place in [*blocks, *outputs]))
    layers = max(place for _, place in outputs)
    vocab, width = spec.vocab_size, spec.hidden_size
    shapes = {"block_weight": (width, width), "block_bias": (width,), "output_weight": (vocab, width)}
    names = _names(heads, layers)
    check_layout(tensors, {name: shapes[own] for name, (own, _) in names.items()})
    sizes = {"block_weight": (layers, heads), "block_bias": (layers, heads), "output_weight": (heads,)}
    imported = {own: torch.empty(*sizes[own], *shape) for own, shape in shapes.items()}
    for name, (own, place) in names.items():
        imported[own][place] = tensors[name].float()
    said = read_config_of(folder).disagreement({"medusa_num_heads": heads, "medusa_num_layers": layers})
    notes = (*note_of_import(blocks_of(imported)), *said)
    return Imported("medusa", {"heads": heads, "layers": layers}, imported, notes)


def to_official(head: Any, tensors: Mapping[str, torch.Tensor], target: Target) -> Exported:
    """The layout of the released heads, which ``read`` reads again. Raises KoalaBenchError where the heads share the
    target's output layer, which this layout cannot say."""
    layers, heads = tensors["block_weight"].shape[:2]
    if "output_weight" not in tensors:
        raise KoalaBenchError(
            "Heads without projections of their own have no official layout that is read again.", "Use --layout vllm."
        )
    named = {name: tensors[own][place] for name, (own, place) in _names(heads, layers).items()}
    config = {"medusa_num_heads": heads, "medusa_num_layers": layers, "base_model_name_or_path": target.name}
    return Exported("medusa_lm_head.pt", named, config, note_of_export(blocks_of(tensors)))


def to_vllm(head: Any, tensors: Mapping[str, torch.Tensor], target: Target) -> Exported:
    """What vLLM reads (``vllm/model_executor/models/medusa.py`` and ``transformers_utils/configs/medusa.py``), for its
    ``medusa`` method.

    Its block is a chain of linear layers, each with a residual of its own: K distinct layers are meant there.
    """
    layers, heads = tensors["block_weight"].shape[:2]
    names = _names(heads, layers, "blocks.{head}.layers.{block}.{part}", "lm_heads.{head}.weight")
    named = {name: tensors[own][place] for name, (own, place) in names.items() if own in tensors}
    shared = "output_weight" not in tensors
    if shared:  # its loader takes the first head's for all
        named["lm_heads.0.weight"] = target.spec().output_weight.detach().float().cpu()
    vocab, width = target.config.vocab_size, target.spec().hidden_size
    config = {
        "architectures": ["MedusaModel"], "model_type": "medusa", "hidden_size": width, "vocab_size": vocab,
        "truncated_vocab_size": vocab, "num_heads": heads, "num_hidden_layers": layers, "medusa_fc_bias": True,
        "original_lm_head": shared,
    }  # fmt: skip
    return Exported("model.safetensors", named, config, ("vLLM drafts a chain of best tokens with it, no tree.",))


def blocks_of(tensors: Mapping[str, torch.Tensor]) -> Blocks:
    """The blocks in the tensors of an ``Imported``."""
    weight, bias = tensors["block_weight"], tensors["block_bias"]
    layers, heads = weight.shape[:2]
    return [[(weight[block, head], bias[block, head]) for block in range(layers)] for head in range(heads)]
