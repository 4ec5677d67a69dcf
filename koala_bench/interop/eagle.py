"""EAGLE-1 heads in the files of others: ``model.safetensors`` or ``pytorch_model.bin`` with a Llama-like ``config.json``, read and written.

Keys (upstream ``eagle/model/cnets.py`` of branch v1): ``embed_tokens.weight``, ``fc.weight``, ``fc.bias``, ``layers.*``. The names below
``fc`` and ``layers`` are those of this project's head; EAGLE-2 uses the same weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from koala_bench.errors import KoalaBenchError
from koala_bench.heads import TargetSpec
from koala_bench.interop.checkpoints import Exported, Fields, Imported, check_layout, first_of, read_json, read_tensors
from koala_bench.target import Target

FILES = ("model.safetensors", "pytorch_model.bin")

FIXED_ROPE_BASE = 10000.0  # what branch v1 always uses; later code reads rope_theta where the configuration has one


def read(folder: Path, spec: TargetSpec | None = None) -> Imported:
    """Read a checkpoint strictly; its shape is its own, not the target's (the released 33B draft has fewer key heads).

    Args:
        spec: of the target to fit. The embedding must then be a copy of the target's: it is dropped, since the head
            uses the target's own.

    Raises:
        KoalaBenchError: a file or field is missing, the network is another, keys or shapes do not fit, all named, or the
            embedding is another model's.
    """
    tensors = read_tensors(first_of(folder, *FILES))
    config = read_json(first_of(folder, "config.json"))
    options = _options(config, tensors)
    width = spec.hidden_size if spec is not None else int(config["hidden_size"])
    vocab = spec.vocab_size if spec is not None else int(config["vocab_size"])
    if width % options["attention_heads"] or options["attention_heads"] % options["kv_heads"]:
        raise KoalaBenchError(
            f"{config.path}: width {width} with {options['attention_heads']} query and {options['kv_heads']} key heads is no attention layer.",
            "Check that the file belongs to the checkpoint.",
        )
    if config.get("head_dim") not in {None, width // options["attention_heads"]}:
        raise KoalaBenchError(f"{config.path}: head_dim {config['head_dim']} is not the width by the number of heads.", "Upstream's EAGLE-1 knows no other.")
    known = "layers.0.self_attn.q_proj.weight" in tensors
    check_layout(
        tensors, _shapes(options, width, vocab), "" if known else "EAGLE-3 and other successors are other networks; only EAGLE-1 and EAGLE-2 weights are read."
    )
    notes = _check_embedding(tensors, spec) if spec is not None else ["The embedding was not compared with a target's."]
    return Imported("eagle", options, {name: tensor.float() for name, tensor in tensors.items() if name != "embed_tokens.weight"}, tuple(notes))


def to_official(head: Any, tensors: Mapping[str, torch.Tensor], target: Target) -> Exported:
    """The layout of the released drafts, with a copy of the target's embedding; ``read`` reads it again.

    Args:
        head: the built head.
        tensors: its weights as they are stored.
    """
    return Exported("pytorch_model.bin", _with_embedding(tensors, target), _config(head, tensors, target))


def to_vllm(head: Any, tensors: Mapping[str, torch.Tensor], target: Target) -> Exported:
    """What vLLM reads for its ``eagle`` method (``vllm/model_executor/models/llama_eagle.py``): the same names, but no bias.

    Raises:
        KoalaBenchError: the head has a bias, which vLLM would leave out without a word.
    """
    if "fc.bias" in tensors and bool(tensors["fc.bias"].any()):
        raise KoalaBenchError(
            "vLLM's EAGLE has no fc.bias and would draft without the one of this head.", "Train the head with options = { bias = false } to export it there."
        )
    kept = {name: tensor for name, tensor in _with_embedding(tensors, target).items() if name != "fc.bias"}
    return Exported("model.safetensors", kept, {**_config(head, tensors, target), "bias": False}, ("vLLM drafts a chain with it, no tree.",))


def _with_embedding(tensors: Mapping[str, torch.Tensor], target: Target) -> dict[str, torch.Tensor]:
    every = torch.arange(target.model.config.vocab_size, device=target.device)
    return {"embed_tokens.weight": target.spec().embed(every).detach().float().cpu(), **tensors}


def _config(head: Any, tensors: Mapping[str, torch.Tensor], target: Target) -> dict[str, Any]:
    shape, own = head.shape, target.model.config
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "bias": "fc.bias" in tensors,
        "hidden_size": shape.width, "intermediate_size": shape.intermediate, "num_attention_heads": shape.heads, "num_key_value_heads": shape.kv_heads,
        "num_hidden_layers": len(head.layers), "rms_norm_eps": shape.eps, "rope_theta": shape.rope_base, "vocab_size": own.vocab_size,
        "max_position_embeddings": target.max_positions, "bos_token_id": own.bos_token_id, "eos_token_id": own.eos_token_id, "tie_word_embeddings": False,
    }  # fmt: skip


def _options(config: Fields, tensors: Fields) -> dict[str, Any]:
    remedy = "Only EAGLE-1 drafts of the Llama kind with plain rotary positions are read."
    if (activation := config.get("hidden_act", "silu")) != "silu":
        raise KoalaBenchError(f"{config.path}: the activation is '{activation}'.", remedy)
    rotary = config.get("rope_parameters") or {}
    scaling = config.get("rope_scaling") or rotary
    if (kind := scaling.get("rope_type", scaling.get("type", "default"))) != "default":
        raise KoalaBenchError(f"{config.path}: the rotary positions are scaled ('{kind}').", remedy)
    query_heads = int(config["num_attention_heads"])
    return {
        "layers": int(config["num_hidden_layers"]),
        "attention_heads": query_heads,
        "kv_heads": int(config.get("num_key_value_heads") or query_heads),
        "intermediate": int(config["intermediate_size"]),
        "rope_base": float(config.get("rope_theta") or rotary.get("rope_theta") or FIXED_ROPE_BASE),
        "norm_eps": float(config.get("rms_norm_eps", 1e-6)),
        # Upstream has a bias unless the configuration says otherwise; where it says nothing the file decides.
        "bias": bool(config.get("bias", "fc.bias" in tensors)),
    }


def _shapes(options: dict[str, Any], width: int, vocab: int) -> dict[str, tuple[int, ...]]:
    keys, inner = width // options["attention_heads"] * options["kv_heads"], options["intermediate"]
    shapes: dict[str, tuple[int, ...]] = {"embed_tokens.weight": (vocab, width), "fc.weight": (width, 2 * width)}
    if options["bias"]:
        shapes["fc.bias"] = (width,)
    for layer in range(options["layers"]):
        own: dict[str, tuple[int, ...]] = {
            "self_attn.q_proj": (width, width), "self_attn.k_proj": (keys, width), "self_attn.v_proj": (keys, width), "self_attn.o_proj": (width, width),
            "mlp.gate_proj": (inner, width), "mlp.up_proj": (inner, width), "mlp.down_proj": (width, inner), "post_attention_layernorm": (width,),
        }  # fmt: skip
        if layer:
            own["input_layernorm"] = (width,)
        shapes |= {f"layers.{layer}.{name}.weight": shape for name, shape in own.items()}
    return shapes


def _check_embedding(tensors: Fields, spec: TargetSpec) -> list[str]:
    """Refuse another model's embedding; a copy in a coarser dtype is a copy."""
    own = spec.embed(torch.arange(spec.vocab_size, device=spec.device)).float().cpu()
    read_in = tensors["embed_tokens.weight"].float()
    # bfloat16, the coarsest dtype that weights are stored in, rounds to 2**-9 of a value; below 1e-6 float16 has no digits left.
    different = int((~torch.isclose(own, read_in, rtol=2**-7, atol=1e-6)).any(dim=1).sum())
    if different:
        raise KoalaBenchError(
            f"{tensors.path} was made for another target: its embedding differs in {different} of {spec.vocab_size} rows.", "Use the target it was trained for."
        )
    return ["The embedding is a copy of the target's and was dropped."]
