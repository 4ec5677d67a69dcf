"""Parts that several heads are built from: RMS norm, rotary positions, and a Llama decoder layer with its own rows.

The layer computes what Llama's does (Touvron et al. 2023), under the same parameter names, so that official
EAGLE checkpoints fit. It keeps no state: the caller owns the key and value rows.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


class RMSNorm(nn.Module):
    """Root mean square norm, computed in float32 as Llama does."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, (x.shape[-1],), self.weight, self.eps)


def rotary_table(positions: int, dim: int, base: float, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """Cosines and sines of rotary position embedding (Su et al. 2021), [2, positions, dim]."""
    frequencies = 1.0 / base ** (torch.arange(0, dim, 2, device=device, dtype=torch.float32) / dim)
    angles = torch.outer(torch.arange(positions, device=device, dtype=torch.float32), frequencies)
    angles = torch.cat([angles, angles], dim=-1)
    return torch.stack([angles.cos(), angles.sin()]).to(dtype)


def _rotate(x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * table[0] + torch.cat([-second, first], dim=-1) * table[1]


class Attention(nn.Module):
    """Grouped-query attention without biases.

    ``rows`` are the caller's buffers [2, batch, kv_heads, capacity, head_dim]; the new keys and values are written at
    ``start`` and everything up to their end is attended to, under ``mask``.
    """

    def __init__(self, width: int, heads: int, kv_heads: int, head_dim: int) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, head_dim
        self.q_proj = nn.Linear(width, heads * head_dim, bias=False)
        self.k_proj = nn.Linear(width, kv_heads * head_dim, bias=False)
        self.v_proj = nn.Linear(width, kv_heads * head_dim, bias=False)
        self.o_proj = nn.Linear(heads * head_dim, width, bias=False)

    def forward(self, x: torch.Tensor, table: torch.Tensor, rows: torch.Tensor | None = None, start: int = 0, mask: torch.Tensor | None = None) -> torch.Tensor:
        """x [batch, new, width]; table [2, new, head_dim]; mask [new, start + new] additive, or None for causal (or one row)."""
        batch, new, _ = x.shape
        q = _rotate(self.q_proj(x).view(batch, new, self.heads, self.head_dim).transpose(1, 2), table)
        k = _rotate(self.k_proj(x).view(batch, new, self.kv_heads, self.head_dim).transpose(1, 2), table)
        v = self.v_proj(x).view(batch, new, self.kv_heads, self.head_dim).transpose(1, 2)
        if rows is not None:
            rows[0, :, :, start : start + new] = k
            rows[1, :, :, start : start + new] = v
            k, v = rows[0, :, :, : start + new], rows[1, :, :, : start + new]
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None and new > 1, enable_gqa=self.heads != self.kv_heads)
        projected: torch.Tensor = self.o_proj(out.transpose(1, 2).reshape(batch, new, -1))
        return projected


class GatedMLP(nn.Module):
    """SwiGLU feed-forward layer (Shazeer 2020)."""

    def __init__(self, width: int, intermediate: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, intermediate, bias=False)
        self.up_proj = nn.Linear(width, intermediate, bias=False)
        self.down_proj = nn.Linear(intermediate, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        down: torch.Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return down


class DecoderLayer(nn.Module):
    """A Llama decoder layer; ``input_norm=False`` leaves out the norm before attention, as EAGLE's first layer does."""

    def __init__(self, width: int, heads: int, kv_heads: int, head_dim: int, intermediate: int, eps: float, input_norm: bool = True) -> None:
        super().__init__()
        self.self_attn = Attention(width, heads, kv_heads, head_dim)
        self.mlp = GatedMLP(width, intermediate)
        self.input_layernorm = RMSNorm(width, eps) if input_norm else None
        self.post_attention_layernorm = RMSNorm(width, eps)

    def forward(self, x: torch.Tensor, table: torch.Tensor, rows: torch.Tensor | None = None, start: int = 0, mask: torch.Tensor | None = None) -> torch.Tensor:
        """Same arguments as ``Attention``; returns [batch, new, width]."""
        normed = x if self.input_layernorm is None else self.input_layernorm(x)
        x = x + self.self_attn(normed, table, rows, start, mask)
        added: torch.Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return added
