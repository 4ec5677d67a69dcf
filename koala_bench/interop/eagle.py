"""EAGLE-1 heads in the files of others: ``model.safetensors`` or ``pytorch_model.bin`` with a Llama-like
``config.json``, read and written.

Keys (upstream ``eagle/model/cnets.py`` of branch v1): ``embed_tokens.weight``, ``fc.weight``, ``fc.bias``,
``layers.*``. The names below ``fc`` and ``layers`` are those of this project's head; EAGLE-2 uses the same weights.
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
from koala_bench.interop.llama import Shapes, check_embedding, layer_fields, layer_options, layer_shapes, target_fields

FILES = (
    "model.safetensors", "pytorch_model.bin", "model.safetensors.index.json", "pytorch_model.bin.index.json",
)  # fmt: skip

OWN = "layers."  # what keys begin with that tell a file of these names from EAGLE-3's


def read(folder: Path, spec: TargetSpec, tensors: Fields | None = None) -> Imported:
    """Read a checkpoint strictly; its shape is its own, not the target's (the released 33B draft has fewer key heads).

    Args:
        spec: of the target to fit. The embedding must be a copy of the target's: it is dropped, since the head uses the
            target's own.
        tensors: of the folder's file, where they are read already.

    Raises:
        KoalaBenchError: a file or field is missing, the network is another, keys or shapes do not fit, all named, or
            the embedding is another model's.
    """
    tensors = tensors or read_tensors(first_of(folder, *FILES))
    config = read_json(first_of(folder, "config.json"))
    options = _options(config, tensors, spec.hidden_size)
    own = any(name.startswith(OWN) for name in tensors)
    hint = "" if own else "EAGLE-3 and other successors of EAGLE-1 and EAGLE-2 are other networks."
    check_layout(tensors, _shapes(options, spec.hidden_size, spec.vocab_size), hint)
    kept = {name: tensor.float() for name, tensor in tensors.items() if name != "embed_tokens.weight"}
    return Imported("eagle", options, kept, tuple(check_embedding(tensors, spec)))


def to_official(head: Any, tensors: Mapping[str, torch.Tensor], target: Target) -> Exported:
    """The layout of the released drafts, with a copy of the target's embedding; ``read`` reads it again."""
    every = torch.arange(target.config.vocab_size, device=target.device)
    config = {
        "architectures": ["LlamaForCausalLM"], "bias": "fc.bias" in tensors, "num_hidden_layers": len(head.layers),
        **layer_fields(head.shape), **target_fields(target),
    }  # fmt: skip
    named = {"embed_tokens.weight": target.spec().embed(every).detach().float().cpu(), **tensors}
    return Exported("pytorch_model.bin", named, config)


def to_vllm(head: Any, tensors: Mapping[str, torch.Tensor], target: Target) -> Exported:
    """What vLLM reads for its ``eagle`` method (``vllm/model_executor/models/llama_eagle.py``): the same names, but no
    bias. Raises KoalaBenchError where the head has a bias, which vLLM would leave out without a word."""
    if "fc.bias" in tensors and bool(tensors["fc.bias"].any()):
        raise KoalaBenchError(
            "vLLM's EAGLE has no fc.bias and would draft without the one of this head.",
            "Train the head with options = { bias = false } to export it there.",
        )
    made = to_official(head, {name: tensor for name, tensor in tensors.items() if name != "fc.bias"}, target)
    return Exported("model.safetensors", made.tensors, made.config, ("vLLM drafts a chain with it, no tree.",))


def _options(config: Fields, tensors: Fields, width: int) -> dict[str, Any]:
    # Upstream has a bias unless the configuration says otherwise; where it says nothing the file decides.
    bias = config.truth("bias", "fc.bias" in tensors)
    layers = config.whole("num_hidden_layers")
    if layers > len(tensors):  # each has several tensors
        raise KoalaBenchError(
            f"{config.path}: num_hidden_layers is {layers}, but {tensors.path} has {len(tensors)} tensors.",
            "Check that the file belongs to the checkpoint.",
        )
    return {"layers": layers, **layer_options(config, width, "EAGLE-1"), "bias": bias}


def _shapes(options: dict[str, Any], width: int, vocab: int) -> Shapes:
    shapes: Shapes = {"embed_tokens.weight": (vocab, width), "fc.weight": (width, 2 * width)}
    if options["bias"]:
        shapes["fc.bias"] = (width,)
    for layer in range(options["layers"]):
        own = layer_shapes(width, options["attention_heads"], options["kv_heads"], options["intermediate"])
        norms = ["post_attention_layernorm", *["input_layernorm"][: bool(layer)]]
        own |= {f"{name}.weight": (width,) for name in norms}
        shapes |= {f"layers.{layer}.{name}": shape for name, shape in own.items()}
    return shapes
