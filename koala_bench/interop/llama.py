"""What official drafts have in common that are made of Llama layers: fields of their configuration, shapes of a layer,
a copied embedding."""

from __future__ import annotations

from typing import Any

import torch

from koala_bench.engine.target import Target
from koala_bench.errors import KoalaBenchError
from koala_bench.heads import TargetSpec
from koala_bench.interop.checkpoints import Fields

Shapes = dict[str, tuple[int, ...]]

# What EAGLE's branch v1 always uses; later code reads rope_theta where the configuration has one.
FIXED_ROPE_BASE = 10000.0
# Rotary scalings that do not depend on the length of the text: required and optional parameters.
_SCALINGS = {
    "linear": (("factor",), ()),
    "llama3": (("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"), ()),
    "yarn": (("factor",), ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim")),
}


def layer_options(config: Fields, width: int, what: str, own_shape: bool = False) -> dict[str, Any]:
    """Options for the shape of a layer, as EAGLE's heads take them.

    Args:
        what: the kind of draft, for errors.
        own_shape: whether its layers may have attention heads of any width and stretched positions.

    Raises:
        KoalaBenchError: a field is missing, or says what the layers of these heads do not compute.
    """
    remedy = f"Only {what} drafts of the Llama kind with plain rotary positions are read."
    if (activation := config.text("hidden_act", "silu")) != "silu":
        raise KoalaBenchError(f"{config.path}: the activation is '{activation}'.", remedy)
    rotary = config.part("rope_parameters")
    scaling = config.part("rope_scaling") or rotary
    kind = scaling.text("rope_type" if "rope_type" in scaling else "type", "default")
    if kind != "default" and not (own_shape and kind in _SCALINGS):
        raise KoalaBenchError(f"{config.path}: the rotary positions are scaled ('{kind}').", remedy)
    query_heads = config.whole("num_attention_heads")
    key_heads = config.whole("num_key_value_heads") if config.given("num_key_value_heads") else query_heads
    based = next((fields for fields in (config, rotary) if fields.given("rope_theta")), None)
    head_width = config.whole("head_dim") if own_shape and config.given("head_dim") else 0
    divides = head_width or width % query_heads == 0
    # Rotary positions turn pairs of numbers: a head is an even number of them wide.
    if not divides or (head_width or width // query_heads) % 2 or query_heads % key_heads:
        raise KoalaBenchError(
            f"{config.path}: width {width} with {query_heads} query and {key_heads} key heads is no attention layer.",
            "Check that the file belongs to the checkpoint.",
        )
    if not own_shape and config.given("head_dim") and config.whole("head_dim") != width // query_heads:
        raise KoalaBenchError(
            f"{config.path}: head_dim {config['head_dim']} is not the width by the number of heads.",
            f"No other {what} draft is read.",
        )
    for name in ("partial_rotary_factor", "sliding_window"):
        if own_shape and config.given(name) and config[name] != 1:
            raise KoalaBenchError(f"{config.path}: {name} is {config[name]}.", remedy)
    other: dict[str, Any] = {"head_dim": head_width} if head_width and head_width * query_heads != width else {}
    if kind != "default":
        other |= {"rope_scaling": _scaling(kind, scaling, config)}
    return {
        **other,
        "attention_heads": query_heads,
        "kv_heads": key_heads,
        "intermediate": config.whole("intermediate_size"),
        "rope_base": FIXED_ROPE_BASE if based is None else based.number("rope_theta"),
        "norm_eps": config.number("rms_norm_eps", 1e-6),
    }


def _scaling(kind: str, fields: Fields, config: Fields) -> dict[str, Any]:
    """The stretch of the positions as ``LayerShape`` takes it, each number checked."""
    needed, free = _SCALINGS[kind]
    found: dict[str, Any] = {"rope_type": kind, **{name: fields.number(name) for name in needed}}
    found |= {name: fields.number(name) for name in free if fields.given(name)}
    if kind == "yarn":
        own = fields.given("original_max_position_embeddings")
        found["original_max_position_embeddings"] = (
            fields.whole("original_max_position_embeddings") if own else config.whole("max_position_embeddings")
        )
        found |= {"truncate": fields.truth("truncate")} if fields.given("truncate") else {}
    return found


def layer_fields(shape: Any) -> dict[str, Any]:
    """The fields of a configuration that ``layer_options`` reads, of a head's ``LayerShape``."""
    return {
        "hidden_act": "silu", "hidden_size": shape.width, "intermediate_size": shape.intermediate,
        "num_attention_heads": shape.heads, "num_key_value_heads": shape.kv_heads, "rms_norm_eps": shape.eps,
        "rope_theta": shape.rope_base,
        **({"head_dim": shape.head_dim} if shape.head_width or shape.head_dim * shape.heads != shape.width else {}),
        **({"rope_scaling": dict(shape.rope_scaling)} if shape.rope_scaling else {}),
    }  # fmt: skip


def target_fields(target: Target) -> dict[str, Any]:
    """The fields of a draft's configuration that are its target's."""
    own = target.config
    return {
        "model_type": "llama", "vocab_size": own.vocab_size, "max_position_embeddings": target.max_positions,
        "bos_token_id": own.bos_token_id,
        "eos_token_id": own.eos_token_id, "tie_word_embeddings": False,
    }  # fmt: skip


def layer_shapes(
    width: int, query_heads: int, key_heads: int, intermediate: int, sources: int = 1, head_width: int | None = None
) -> Shapes:
    """Tensors of attention and feed-forward part, without norms; the attention reads ``sources`` vectors of the layer's
    width."""
    own = head_width or width // query_heads
    keys, queries = own * key_heads, own * query_heads
    return {
        "self_attn.q_proj.weight": (queries, sources * width), "self_attn.k_proj.weight": (keys, sources * width),
        "self_attn.v_proj.weight": (keys, sources * width), "self_attn.o_proj.weight": (width, queries),
        "mlp.gate_proj.weight": (intermediate, width), "mlp.up_proj.weight": (intermediate, width),
        "mlp.down_proj.weight": (width, intermediate),
    }  # fmt: skip


def check_embedding(tensors: Fields, spec: TargetSpec) -> list[str]:
    """Refuse another model's ``embed_tokens.weight``; a copy in a coarser dtype is a copy."""
    own = spec.embed(torch.arange(spec.vocab_size, device=spec.device)).float().cpu()
    read_in = tensors["embed_tokens.weight"].float()
    # bfloat16, the coarsest dtype that weights are stored in, rounds to 2**-9 of a value; below 1e-6 float16 has no
    # digits left.
    different = int((~torch.isclose(own, read_in, rtol=2**-7, atol=1e-6)).any(dim=1).sum())
    if different:
        raise KoalaBenchError(
            f"{tensors.path} was made for another target: its embedding differs in {different} of {spec.vocab_size}"
            " rows.",
            "Use the target it was trained for.",
        )
    return ["The embedding is a copy of the target's and was dropped."]
