"""Medusa heads in the files of others: the official ``medusa_lm_head.pt`` or ``.safetensors``, read and written, and
vLLM's.

Keys (upstream ``medusa/model/medusa_model.py``): ``{head}.{block}.linear.weight`` and ``.bias`` for each residual
block, then ``{head}.{blocks}.weight`` for the projection to the vocabulary.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
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

FILES = ("medusa_lm_head.safetensors", "medusa_lm_head.pt")

_BLOCK = re.compile(r"(\d{1,9})\.(\d{1,9})\.linear\.(?:weight|bias)", re.ASCII)
_OUTPUT = re.compile(r"(\d{1,9})\.(\d{1,9})\.weight", re.ASCII)


def read(folder: Path, spec: TargetSpec | None = None) -> Imported:
    """Read a checkpoint strictly.

    The numbers of heads and blocks come from the keys: the configuration of the released Vicuna heads says 2 where the
    file has 5 (FasterDecoding/Medusa, a comment in ``medusa_model.py``).

    Args:
        spec: of the target to fit; without it the tensors are only compared with each other.

    Raises:
        KoalaBenchError: no such file, or keys and shapes that are missing, too many or wrong, all named.
    """
    tensors = read_tensors(first_of(folder, *FILES))
    blocks = [tuple(map(int, found.groups())) for name in tensors if (found := _BLOCK.fullmatch(name))]
    outputs = [tuple(map(int, found.groups())) for name in tensors if (found := _OUTPUT.fullmatch(name))]
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
    vocab, width = _sizes(tensors, layers, spec)
    shapes: dict[str, tuple[int, ...]] = {}
    for head in range(heads):
        for block in range(layers):
            shapes[f"{head}.{block}.linear.weight"] = (width, width)
            shapes[f"{head}.{block}.linear.bias"] = (width,)
        shapes[f"{head}.{layers}.weight"] = (vocab, width)
    check_layout(tensors, shapes)

    def stacked(name: str) -> torch.Tensor:
        return torch.stack(
            [
                torch.stack([tensors[f"{head}.{block}.linear.{name}"].float() for head in range(heads)])
                for block in range(layers)
            ]
        )

    imported = {
        # No block at all leaves nothing to stack, only the shape of it.
        "block_weight": stacked("weight") if layers else torch.empty(0, heads, width, width),
        "block_bias": stacked("bias") if layers else torch.empty(0, heads, width),
        "output_weight": torch.stack([tensors[f"{head}.{layers}.weight"].float() for head in range(heads)]),
    }
    return Imported(
        "medusa",
        {"heads": heads, "layers": layers},
        imported,
        (*_tying(imported), *_disagreement(folder, heads, layers)),
    )


def to_official(head: Any, tensors: Mapping[str, torch.Tensor], target: Target) -> Exported:
    """The layout of the released heads, which ``read`` reads again.

    Args:
        head: the built head.
        tensors: its weights as they are stored.

    Raises:
        KoalaBenchError: the heads share the target's output layer, which this layout cannot say.
    """
    weight, bias = tensors["block_weight"], tensors["block_bias"]
    layers, heads = weight.shape[:2]
    if "output_weight" not in tensors:
        raise KoalaBenchError(
            "Heads without projections of their own have no official layout that is read again.", "Use --layout vllm."
        )
    named = {}
    for each in range(heads):
        for block in range(layers):
            named[f"{each}.{block}.linear.weight"] = weight[block, each]
            named[f"{each}.{block}.linear.bias"] = bias[block, each]
        named[f"{each}.{layers}.weight"] = tensors["output_weight"][each]
    config = {"medusa_num_heads": heads, "medusa_num_layers": layers, "base_model_name_or_path": target.name}
    tied = tied_heads(tensors)
    distinct = [each for each in range(heads) if each not in tied] if layers > 1 else []
    which = f"the distinct ones of heads {', '.join(map(str, distinct))}" if tied else f"these {layers} distinct ones"
    note = f"Upstream's model applies one block {layers} times: its own loader cannot use {which}."
    return Exported("medusa_lm_head.pt", named, config, (note,) if distinct else ())


def to_vllm(head: Any, tensors: Mapping[str, torch.Tensor], target: Target) -> Exported:
    """What vLLM reads (``vllm/model_executor/models/medusa.py`` and ``transformers_utils/configs/medusa.py``), for its
    ``medusa`` method.

    Its block is a chain of linear layers, each with a residual of its own: K distinct layers are meant there.
    """
    weight, bias = tensors["block_weight"], tensors["block_bias"]
    layers, heads = weight.shape[:2]
    named = {}
    for each in range(heads):
        for block in range(layers):
            named[f"blocks.{each}.layers.{block}.weight"] = weight[block, each]
            named[f"blocks.{each}.layers.{block}.bias"] = bias[block, each]
    shared = "output_weight" not in tensors
    if shared:  # its loader takes the first head's for all
        named["lm_heads.0.weight"] = target.spec().output_weight.detach().float().cpu()
    else:
        named |= {f"lm_heads.{each}.weight": tensors["output_weight"][each] for each in range(heads)}
    vocab, width = target.config.vocab_size, target.spec().hidden_size
    config = {
        "architectures": ["MedusaModel"], "model_type": "medusa", "hidden_size": width, "vocab_size": vocab, "truncated_vocab_size": vocab,
        "num_heads": heads, "num_hidden_layers": layers, "medusa_fc_bias": True, "original_lm_head": shared,
    }  # fmt: skip
    return Exported("model.safetensors", named, config, ("vLLM drafts a chain of best tokens with it, no tree.",))


def tied_heads(tensors: Mapping[str, torch.Tensor]) -> list[int]:
    """Heads with several blocks that are all equal: upstream builds ``[ResBlock(...)] * K``, one module K times.

    Args:
        tensors: of an ``Imported`` Medusa checkpoint.
    """
    weight, bias = tensors["block_weight"], tensors["block_bias"]
    layers, heads = weight.shape[:2]
    return [
        head
        for head in range(heads)
        if layers > 1
        and all(torch.equal(each[0, head], each[block, head]) for each in (weight, bias) for block in range(1, layers))
    ]


def _sizes(tensors: Fields, layers: int, spec: TargetSpec | None) -> tuple[int, int]:
    if spec is not None:
        return spec.vocab_size, spec.hidden_size
    outputs: Sequence[torch.Tensor] = [
        tensor for name, tensor in sorted(tensors.items()) if _OUTPUT.fullmatch(name) and tensor.ndim == 2
    ]
    if not outputs:
        raise KoalaBenchError(
            f"{tensors.path}: the projections are no matrices.", "Give the official medusa_lm_head file."
        )
    return int(outputs[0].shape[0]), int(outputs[0].shape[1])


def _tying(tensors: dict[str, torch.Tensor]) -> list[str]:
    layers, heads = tensors["block_weight"].shape[:2]
    tied = tied_heads(tensors)
    if layers < 2:
        return []
    if len(tied) == heads:
        return [
            f"The {layers} residual blocks of every head are identical copies: upstream applies one block {layers}"
            " times."
        ]
    if tied:
        return [
            f"The {layers} residual blocks are identical copies in heads {', '.join(map(str, tied))} and distinct in"
            " the others."
        ]
    return [f"The {layers} residual blocks of every head are distinct."]


def _disagreement(folder: Path, heads: int, layers: int) -> list[str]:
    if not (folder / "config.json").is_file():
        return []
    config = read_json(folder / "config.json")
    said = (config.whole("medusa_num_heads", heads), config.whole("medusa_num_layers", layers, least=0))
    return (
        []
        if said == (heads, layers)
        else [f"config.json says {said[0]} heads of {said[1]} blocks, the file has {heads} of {layers}."]
    )
