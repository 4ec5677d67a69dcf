"""A preallocated KV cache for many sequences of different lengths that all grow by one token a pass.

A new token is written after its row's committed ones, so setting a row's length shortens or restarts it: continuous
batching without copies. Plugs into any Hugging Face model through ``Cache``.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import AttentionInterface
from transformers.cache_utils import Cache, DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from koala_bench.engine.processor import kernels
from koala_bench.engine.target import Target

_STEP = 32  # widths of passes are multiples of this, for few distinct shapes
_ATTENTION = "koala_bench_rows"


class _Layer(DynamicLayer):
    """One layer's rows; ``update`` writes one token a row and returns what the longest row needs."""

    def __init__(self, owner: RowCache, index: int) -> None:
        super().__init__()
        self._owner, self._index = owner, index
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        owner = self._owner
        keys, values = owner.layer(self._index, key_states)
        count, _, new, _ = key_states.shape
        if new == 1:
            keys[owner.numbers[:count], :, owner.lengths[:count]] = key_states[:, :, 0]
            values[owner.numbers[:count], :, owner.lengths[:count]] = value_states[:, :, 0]
        else:  # a common prefix, read into the first row alone
            keys[:count, :, :new] = key_states
            values[:count, :, :new] = value_states
        return keys[:count, :, : owner.width], values[:count, :, : owner.width]

    def get_seq_length(self, *args: Any, **kwargs: Any) -> int:
        return self._owner.width - 1

    def get_mask_sizes(self, query_length: int | torch.Tensor, *args: Any, **kwargs: Any) -> tuple[int, int]:
        return self._owner.width, 0


class RowCache(Cache):
    """Keys and values of ``rows`` sequences of at most ``capacity`` tokens.

    Attributes:
        lengths: committed tokens of each row, int64 [rows]; the caller sets it.
        width: columns that the next pass sees, set by ``step``.
    """

    def __init__(self, target: Target, rows: int, capacity: int) -> None:
        self.rows, self.capacity = rows, -(-capacity // _STEP) * _STEP
        self.numbers = torch.arange(rows, device=target.device)
        self.lengths = torch.zeros(rows, dtype=torch.int64, device=target.device)
        self.width = 0
        self._target = target
        self._storage: torch.Tensor | None = None  # [layers, 2, rows, kv_heads, capacity, head_dim]
        super().__init__(layers=[_Layer(self, index) for index in range(target.layers)])

    def layer(self, index: int, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of a layer, each [rows, kv_heads, capacity, head_dim]; allocated when the first states
        ``like`` come."""
        if self._storage is None:
            # Zeros, not garbage: what is masked out enters a product with weight 0, and 0 * nan is nan.
            self._storage = like.new_zeros(len(self.layers), 2, self.rows, like.shape[1], self.capacity, like.shape[3])
        return self._storage[index, 0], self._storage[index, 1]

    def read_prefix(self, ids: list[int]) -> torch.Tensor:
        """Read tokens once that many rows begin with; returns their keys and values [layers, 2, kv_heads, tokens,
        head_dim]."""
        self.width = len(ids)
        where = torch.arange(len(ids), device=self._target.device)[None]
        tokens = torch.tensor([ids], device=self._target.device)
        self._target.decoder(input_ids=tokens, position_ids=where, past_key_values=self, use_cache=True)
        assert self._storage is not None
        return self._storage[:, :, 0, :, : len(ids)].clone()

    def begin(self, row: int, prefix: torch.Tensor) -> None:
        """Restart a row with a prefix that ``read_prefix`` returned."""
        assert self._storage is not None
        self._storage[:, :, row, :, : prefix.shape[3]] = prefix
        self.lengths[row] = prefix.shape[3]

    def move(self, source: int, row: int) -> None:
        """Overwrite a row with a copy of another."""
        assert self._storage is not None
        count = int(self.lengths[source])
        self._storage[:, :, row, :, :count] = self._storage[:, :, source, :, :count]
        self.lengths[row] = count

    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        """One more token for each of the first rows; their lengths grow by one.

        Args:
            tokens: int64 [count].
        Returns:
            logits [count, vocab_size] of what follows.
        """
        count, lengths = len(tokens), self.lengths[: len(tokens)]
        self.width = min(self.capacity, -(-(int(lengths.max()) + 1) // _STEP) * _STEP)
        dtype = self._target.dtype
        hidden = torch.arange(self.width, device=tokens.device) > lengths[:, None]
        mask = torch.zeros(count, 1, 1, self.width, dtype=dtype, device=tokens.device)
        mask.masked_fill_(hidden[:, None, None], torch.finfo(dtype).min)
        with _attention_of_rows(self._target):
            found = self._target.decoder(
                input_ids=tokens[:, None],
                attention_mask=mask,
                position_ids=lengths[:, None],
                past_key_values=self,
                use_cache=True,
            )
        lengths += 1
        return self._target.output(found.last_hidden_state[:, 0])


@contextmanager
def _attention_of_rows(target: Target) -> Iterator[None]:
    """Attention of a float32 model on the CPU that reads only the keys in use, row by row, a group of heads at once.

    torch's attention reads every row up to the longest one's length: at 64 rows half the time of a pass.
    """
    config = target.decoder.config
    before = config._attn_implementation
    serves = target.device.type == "cpu" and target.dtype == torch.float32 and before == "sdpa" and kernels.available()
    if serves:
        config._attn_implementation = _ATTENTION
    try:
        yield
    finally:
        if serves:
            config._attn_implementation = before


def _attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of one query a row, as transformers asks for it: query [rows, heads, 1, width], key and value [rows,
    groups, columns, width]; returns [rows, 1, heads, width]."""
    (rows, heads, queries, width), groups = query.shape, key.shape[1]
    more = any(kwargs.get(name) is not None for name in ("softcap", "s_aux", "position_bias"))
    if more or queries > 1 or attention_mask is None or width % kernels.lanes() or value.shape[3] != width:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    together = query.reshape(rows, groups, heads // groups, width)
    mask = attention_mask.expand(rows, 1, heads // groups, -1)
    found = kernels.attend(together, key, value, mask, width**-0.5 if scaling is None else scaling)
    return found.reshape(rows, 1, heads, width), None


AttentionInterface.register(_ATTENTION, _attend)


@contextmanager
def packed_layers(target: Target, rows: int) -> Iterator[None]:
    """Linear layers of a float32 target on the CPU in oneDNN's own layout for batches of so many rows, while this
    lasts.

    Packed once instead of at each product: 1.3 times the rate at 64 rows of SmolLM2-135M. It takes the weights' memory
    once more.
    """
    packs = target.device.type == "cpu" and target.dtype == torch.float32
    packs = packs and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    modules = [module for module in target.model.modules() if packs and type(module) is torch.nn.Linear]
    for module in modules:
        weight = torch.ops.mkldnn._reorder_linear_weight(module.weight.contiguous(), rows)
        module.forward = functools.partial(_packed, weight, module.bias)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for module in modules:
            del module.forward


def _packed(weight: torch.Tensor, bias: torch.Tensor | None, states: torch.Tensor) -> torch.Tensor:
    return torch.ops.mkldnn._linear_pointwise(states, weight, bias, "none", [], "")
