"""Building blocks of heads: RMS norm, rotary embedding, and Llama decoder layers with a KV cache.

The layers compute what Llama's do (Touvron et al. 2023), under the same parameter names, so that official
EAGLE checkpoints fit. They are stateless: the caller owns the KV cache.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from koala_bench.engine.cache import write_rows
from koala_bench.heads import TargetSpec

# Keys and values [batch, kv_heads, tokens, head_dim] of one layer at each step of an unrolled pass; step 0 is of the
# target's states.
Unrolled = list[tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True)
class LayerShape:
    """Sizes of a target's decoder layers, for heads whose layers are of the same shape.

    Attributes:
        head_width: of one attention head; width / heads if None.
        rope_scaling: transformers' ``rope_scaling`` parameters; none if None.
    """

    width: int
    heads: int
    kv_heads: int
    intermediate: int
    eps: float
    rope_base: float
    head_width: int | None = None
    rope_scaling: Mapping[str, Any] | None = None

    @classmethod
    def of(
        cls, spec: TargetSpec, heads: int | None = None, kv_heads: int | None = None, intermediate: int | None = None,
        eps: float | None = None, base: float | None = None,
    ) -> LayerShape:  # fmt: skip
        """From a target's configuration, except for given sizes; the width is that of its last hidden states.

        Without a known name for the feed-forward width it is four times the hidden size.
        """
        config = spec.config
        heads = heads or config.num_attention_heads
        kv_heads = kv_heads or getattr(config, "num_key_value_heads", None) or heads
        eps = eps or float(getattr(config, "rms_norm_eps", 1e-6))
        named = (getattr(config, name, None) for name in ("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size"))
        inner = intermediate or next((size for size in named if isinstance(size, int)), 4 * spec.hidden_size)
        return cls(spec.hidden_size, heads, kv_heads, inner, eps, base or rope_base(config))

    @property
    def head_dim(self) -> int:
        """Width of an attention head; rounded up to an even number, since rotary embedding needs two halves."""
        width = self.width // self.heads
        return self.head_width or width + width % 2

    def rotary(self, positions: int, like: torch.Tensor) -> torch.Tensor:
        """Cosines and sines for these layers, [2, positions, head_dim], in the dtype and on the device of ``like``."""
        table = rotary_table(positions, self.head_dim, self.rope_base, like.device, torch.float32, self.rope_scaling)
        return table.to(like.dtype)


def rope_base(config: Any) -> float:
    """RoPE base of a target, under any version of transformers."""
    parameters = getattr(config, "rope_parameters", None) or {}
    return float(parameters.get("rope_theta") or getattr(config, "rope_theta", None) or 10000.0)


class RMSNorm(nn.Module):
    """Root mean square norm, computed in float32 as Llama does."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, (x.shape[-1],), self.weight, self.eps)


def rotary_table(
    positions: int, dim: int, base: float, device: torch.device, dtype: torch.dtype,
    scaling: Mapping[str, Any] | None = None,
) -> torch.Tensor:  # fmt: skip
    """Cosines and sines of rotary embedding (Su et al. 2021), [2, positions, dim], scaled as in transformers."""
    frequencies, factor = 1.0 / base ** (torch.arange(0, dim, 2, device=device, dtype=torch.float32) / dim), 1.0
    if scaling is not None:
        config = LlamaConfig(
            hidden_size=dim, num_attention_heads=1, head_dim=dim, rope_parameters={**scaling, "rope_theta": base}
        )
        frequencies, factor = ROPE_INIT_FUNCTIONS[scaling["rope_type"]](config, device)
    angles = torch.outer(torch.arange(positions, device=device, dtype=torch.float32), frequencies)
    angles = torch.cat([angles, angles], dim=-1)
    return (torch.stack([angles.cos(), angles.sin()]) * factor).to(dtype)


def _rotate(x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * table[0] + torch.cat([-second, first], dim=-1) * table[1]


class Attention(nn.Module):
    """Grouped-query attention without biases.

    ``rows`` are the caller's buffers [2, batch, kv_heads, capacity, head_dim]. New keys and values are written at
    ``start``, and all rows up to them are attended to under ``mask``. If ``start`` is a tensor [new] of row indices,
    the mask covers all rows. The input is the concatenation of ``sources`` vectors of the layer's width.
    """

    def __init__(self, shape: LayerShape, sources: int = 1) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = shape.heads, shape.kv_heads, shape.head_dim
        width, queries, keys = sources * shape.width, self.heads * self.head_dim, self.kv_heads * self.head_dim
        self.q_proj = nn.Linear(width, queries, bias=False)
        self.k_proj = nn.Linear(width, keys, bias=False)
        self.v_proj = nn.Linear(width, keys, bias=False)
        self.o_proj = nn.Linear(queries, shape.width, bias=False)

    def queries(self, x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        """Queries of x [batch, new, sources * width], rotated by the table, [batch, heads, new, head_dim]."""
        return _rotate(self.q_proj(x).view(*x.shape[:2], self.heads, self.head_dim).transpose(1, 2), table)

    def keys_values(self, x: torch.Tensor, table: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Rotated keys, and values, each [batch, kv_heads, new, head_dim]."""
        size = *x.shape[:2], self.kv_heads, self.head_dim
        keys = _rotate(self.k_proj(x).view(size).transpose(1, 2), table)
        return keys, self.v_proj(x).view(size).transpose(1, 2)

    def forward(
        self, x: torch.Tensor, table: torch.Tensor, rows: torch.Tensor | None = None, start: Any = 0,
        mask: torch.Tensor | None = None, steps: Unrolled | None = None, context: torch.Tensor | None = None,
    ) -> torch.Tensor:  # fmt: skip
        """Attend from x to the cache and to x itself.

        Args:
            x: [batch, new, sources * width].
            table: [2, new, head_dim], with a context [2, any + new, head_dim].
            mask: additive, one column per attended row; None for causal attention, or for a single row.
            steps: earlier steps of an unrolled pass over the same tokens; this step's keys and values are appended. A
                token attends causally to step 0 and only to itself in later steps.
            context: [batch, any, sources * width], right before x: attended to, and attending to nothing.
        """
        new = x.shape[1]
        q = self.queries(x, table if context is None else table[:, -new:])
        k, v = self.keys_values(x if context is None else torch.cat([context, x], dim=1), table)
        if steps is not None:
            steps.append((k, v))
        if rows is not None:
            k, v = write_rows(rows, start, k, v)
        if steps is not None and len(steps) > 1:
            out = attend_unrolled(q, steps)
        else:
            causal, grouped = mask is None and bool(new > 1), self.heads != self.kv_heads
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=grouped)
        return self.joined(out)

    def joined(self, attended: torch.Tensor) -> torch.Tensor:
        """Concatenate attention heads: [batch, heads, new, head_dim] to [batch, new, width]."""
        projected: torch.Tensor = self.o_proj(attended.transpose(1, 2).flatten(2))
        return projected


def attend_unrolled(q: torch.Tensor, steps: Unrolled) -> torch.Tensor:
    """Attention of EAGLE-3's training-time test (upstream ``traineagle3/cnets.py``), [batch, heads, tokens, head_dim].

    Each token attends to the target's states up to its own position, then to its own drafts.
    """
    (first_k, first_v), later = steps[0], steps[1:]
    groups = q.shape[1] // first_k.shape[1]
    q = q.unflatten(1, (-1, groups)) * q.shape[-1] ** -0.5  # [batch, kv_heads, groups, tokens, head_dim]
    tokens = q.shape[3]
    true = q @ first_k[:, :, None].transpose(-1, -2)
    true = true.masked_fill(torch.ones(tokens, tokens, dtype=torch.bool, device=q.device).triu(1), float("-inf"))
    own = [(q * k[:, :, None]).sum(-1, keepdim=True) for k, _ in later]
    weights = torch.softmax(torch.cat([true, *own], dim=-1), dim=-1).to(first_v.dtype)
    out = weights[..., :tokens] @ first_v[:, :, None]
    for index, (_, v) in enumerate(later):
        out = out + weights[..., tokens + index, None] * v[:, :, None]
    return out.flatten(1, 2)


class GatedMLP(nn.Module):
    """SwiGLU feed-forward layer (Shazeer 2020)."""

    def __init__(self, shape: LayerShape) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(shape.width, shape.intermediate, bias=False)
        self.up_proj = nn.Linear(shape.width, shape.intermediate, bias=False)
        self.down_proj = nn.Linear(shape.intermediate, shape.width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        down: torch.Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return down


class DecoderLayer(nn.Module):
    """A Llama decoder layer; ``input_norm=False`` leaves out the norm before attention, as EAGLE's first layer does."""

    def __init__(self, shape: LayerShape, input_norm: bool = True) -> None:
        super().__init__()
        self.self_attn = Attention(shape)
        self.mlp = GatedMLP(shape)
        self.input_layernorm = RMSNorm(shape.width, shape.eps) if input_norm else None
        self.post_attention_layernorm = RMSNorm(shape.width, shape.eps)

    def forward(
        self, x: torch.Tensor, table: torch.Tensor, rows: torch.Tensor | None = None, start: Any = 0,
        mask: torch.Tensor | None = None, steps: Unrolled | None = None, context: torch.Tensor | None = None,
    ) -> torch.Tensor:  # fmt: skip
        """Same arguments as ``Attention``, of which the context goes there as it is; returns [batch, new, width]."""
        normed = x if self.input_layernorm is None else self.input_layernorm(x)
        return self.after(x, self.self_attn(normed, table, rows, start, mask, steps, context))

    def after(self, x: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        """The layer after attention, from the layer's input and attention's output, each [batch, new, width]."""
        x = x + attended
        added: torch.Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return added


class PairLayer(nn.Module):
    """EAGLE-3's first layer: attention over concatenated token embeddings and hidden states, each with its own norm.

    Only the hidden state enters the residual path; with ``norm_before_residual`` after its norm.
    """

    def __init__(self, shape: LayerShape, norm_before_residual: bool) -> None:
        super().__init__()
        self.norm_before_residual = norm_before_residual
        self.self_attn = Attention(shape, sources=2)
        self.mlp = GatedMLP(shape)
        self.hidden_norm = RMSNorm(shape.width, shape.eps)
        self.input_layernorm = RMSNorm(shape.width, shape.eps)  # upstream's name: of the embedding
        self.post_attention_layernorm = RMSNorm(shape.width, shape.eps)

    def forward(
        self, embedded: torch.Tensor, x: torch.Tensor, table: torch.Tensor, rows: torch.Tensor | None = None,
        start: Any = 0, mask: torch.Tensor | None = None, steps: Unrolled | None = None,
    ) -> torch.Tensor:  # fmt: skip
        """Embeddings and states, each [batch, new, width], and the arguments of ``Attention``; returns [batch, new,
        width].
        """
        normed = self.hidden_norm(x)
        pair = torch.cat([self.input_layernorm(embedded), normed], dim=-1)
        x = (normed if self.norm_before_residual else x) + self.self_attn(pair, table, rows, start, mask, steps)
        added: torch.Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return added
