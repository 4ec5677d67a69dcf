"""Configurations of the papers' targets and of a small one, without weights or a hub."""

from __future__ import annotations

import re
from typing import Any

from transformers import LlamaConfig

# Width, layers, attention heads: Touvron et al. 2023 (arXiv 2302.13971), Table 2; width of the feed-forward layers: the
# released config.json. That of 160m: the configuration of JackFram/llama-160m (Miao et al. 2023, arXiv 2305.09781),
# small enough for any machine.
_LLAMA = {
    "160m": (768, 12, 12, 3072),
    "7b": (4096, 32, 32, 11008),
    "13b": (5120, 40, 40, 13824),
    "33b": (6656, 60, 52, 17920),
}
SHAPES = tuple(_LLAMA)
# Of the draft model that Spec-Bench takes for Vicuna, which is a tuned JackFram/llama-68m (also of arXiv 2305.09781).
_DRAFTS = {"double7/vicuna-68m": (768, 2, 12, 3072)}
VICUNA = ("7b", "13b", "33b")


def llama(size: str) -> LlamaConfig:
    """Configuration of a size out of ``SHAPES``; those of ``VICUNA`` are Vicuna 1.3's."""
    return _config(_LLAMA[size])


def _config(shape: tuple[int, int, int, int]) -> LlamaConfig:
    width, layers, heads, inner = shape
    return LlamaConfig(
        vocab_size=32000, hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=heads, intermediate_size=inner, max_position_embeddings=2048,
    )  # fmt: skip


def known_shape(name: str) -> Any | None:
    """The configuration behind a hub id if it is one of the papers' targets or their draft model, else None."""
    if name in _DRAFTS:
        return _config(_DRAFTS[name])
    found = re.fullmatch(r"lmsys/vicuna-(\d+b)-v1\.3", name)
    return llama(found.group(1)) if found and found.group(1) in VICUNA else None
