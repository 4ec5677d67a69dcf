"""Official Medusa checkpoints: ``medusa_lm_head.pt`` or ``.safetensors``, the heads without the target.

Keys (upstream ``medusa/model/medusa_model.py``): ``{head}.{block}.linear.weight`` and ``.bias`` for each residual block, then
``{head}.{blocks}.weight`` for the projection to the vocabulary.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import torch

from koala_bench.errors import KoalaBenchError
from koala_bench.heads import TargetSpec
from koala_bench.interop.checkpoints import Fields, Imported, check_layout, first_of, read_json, read_tensors

FILES = ("medusa_lm_head.safetensors", "medusa_lm_head.pt")

_BLOCK = re.compile(r"(\d+)\.(\d+)\.linear\.(?:weight|bias)")
_OUTPUT = re.compile(r"(\d+)\.(\d+)\.weight")


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
    heads = 1 + max(head for head, _ in [*blocks, *outputs])
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
        return torch.stack([torch.stack([tensors[f"{head}.{block}.linear.{name}"].float() for head in range(heads)]) for block in range(layers)])

    imported = {
        # No block at all leaves nothing to stack, only the shape of it.
        "block_weight": stacked("weight") if layers else torch.empty(0, heads, width, width),
        "block_bias": stacked("bias") if layers else torch.empty(0, heads, width),
        "output_weight": torch.stack([tensors[f"{head}.{layers}.weight"].float() for head in range(heads)]),
    }
    return Imported("medusa", {"heads": heads, "layers": layers}, imported, (*_tying(imported), *_disagreement(folder, heads, layers)))


def tied_heads(tensors: dict[str, torch.Tensor]) -> list[int]:
    """Heads with several blocks that are all equal: upstream builds ``[ResBlock(...)] * K``, one module K times.

    Args:
        tensors: of an ``Imported`` Medusa checkpoint.
    """
    weight, bias = tensors["block_weight"], tensors["block_bias"]
    layers, heads = weight.shape[:2]
    return [
        head
        for head in range(heads)
        if layers > 1 and all(torch.equal(each[0, head], each[block, head]) for each in (weight, bias) for block in range(1, layers))
    ]


def _sizes(tensors: Fields, layers: int, spec: TargetSpec | None) -> tuple[int, int]:
    if spec is not None:
        return spec.vocab_size, spec.hidden_size
    outputs: Sequence[torch.Tensor] = [tensor for name, tensor in sorted(tensors.items()) if _OUTPUT.fullmatch(name) and tensor.ndim == 2]
    if not outputs:
        raise KoalaBenchError(f"{tensors.path}: the projections are no matrices.", "Give the official medusa_lm_head file.")
    return int(outputs[0].shape[0]), int(outputs[0].shape[1])


def _tying(tensors: dict[str, torch.Tensor]) -> list[str]:
    layers, heads = tensors["block_weight"].shape[:2]
    tied = tied_heads(tensors)
    if layers < 2:
        return []
    if len(tied) == heads:
        return [f"The {layers} residual blocks of every head are identical copies: upstream applies one block {layers} times."]
    if tied:
        return [f"The {layers} residual blocks are identical copies in heads {', '.join(map(str, tied))} and distinct in the others."]
    return [f"The {layers} residual blocks of every head are distinct."]


def _disagreement(folder: Path, heads: int, layers: int) -> list[str]:
    if not (folder / "config.json").is_file():
        return []
    config = read_json(folder / "config.json")
    said = (config.get("medusa_num_heads", heads), config.get("medusa_num_layers", layers))
    return [] if said == (heads, layers) else [f"config.json says {said[0]} heads of {said[1]} blocks, the file has {heads} of {layers}."]
