"""A preallocated KV cache for tree decoding: tree nodes are written after the committed rows, and committing a path
moves only the accepted rows. Nothing is reallocated while decoding.

It plugs into any Hugging Face model through the public ``Cache`` interface (tried with transformers 5.17 and 5.23).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from transformers.cache_utils import Cache, DynamicLayer

from koala_bench.errors import KoalaBenchError
from koala_bench.tree import TreeShape

# Tree masks kept, the latest ones. Shapes of dynamic trees rarely recur and evict others; a new mask costs some 40
# microseconds, nothing beside a pass of a target.
_MAX_TREE_MASKS = 64
ROW_BLOCK = 512  # a pass of static shape attends to a multiple of this many rows


class _Rows(DynamicLayer):
    """A layer with rows before those of a pass, whose number ``_before`` says; it may be symbolic."""

    _before: Any

    def get_seq_length(self, *args: Any, **kwargs: Any) -> int:
        return self._before

    def get_mask_sizes(self, query_length: int, *args: Any, **kwargs: Any) -> tuple[int, int]:
        return self._before + query_length, 0


class _Layer(_Rows):
    """One layer's views of the shared storage; ``update`` writes after the committed rows and returns views."""

    def __init__(self, owner: TreeCache, index: int) -> None:
        super().__init__()
        self.owner, self.index = owner, index

    @property
    def _before(self) -> int:
        return self.owner.past

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            self.keys, self.values = self.owner.allocate(self.index, key_states, value_states)
            self.is_initialized = True
        keys, values, past = self.keys, self.values, self.owner.past
        assert keys is not None and values is not None
        stop = past + key_states.shape[-2]
        keys[:, :, past:stop] = key_states
        values[:, :, past:stop] = value_states
        return keys[:, :, :stop], values[:, :, :stop]

    def get_max_length(self) -> int:
        return self.owner.capacity

    get_max_cache_shape = get_max_length  # its name in earlier versions


class _PassLayer(_Rows):
    """One layer's rows for a single pass, sliced before it; ``update`` writes the new rows and returns all."""

    def __init__(self, rows: Sequence[torch.Tensor], new: Sequence[torch.Tensor], before: Any) -> None:
        super().__init__()
        (self.keys, self.values), self._new, self._before = rows, new, before
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self._new[0].copy_(key_states)
        self._new[1].copy_(value_states)
        assert self.keys is not None and self.values is not None
        return self.keys, self.values


class _StaticPassLayer(_Rows):
    """One layer's rows for a single pass with static shapes; ``update`` returns all rows, whatever their number."""

    def __init__(self, rows: torch.Tensor, indices: torch.Tensor) -> None:
        super().__init__()
        self._rows, self._indices = rows, indices
        self.keys, self.values = rows[0], rows[1]
        self._before = rows.shape[-2] - indices.shape[0]
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return write_rows(self._rows, self._indices, key_states, value_states)


def write_rows(
    rows: torch.Tensor, start: Any, keys: torch.Tensor, values: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Write new keys and values; returns the keys and values to attend to.

    Args:
        rows: [2, batch, kv_heads, capacity, head_dim].
        start: index of the first new row; rows up to the last new one are returned. Or the indices of the new rows as a
            tensor [new]; all rows are returned, so that shapes are static.
        keys, values: [batch, kv_heads, new, head_dim].
    """
    if isinstance(start, torch.Tensor):
        rows[0].index_copy_(2, start, keys)
        rows[1].index_copy_(2, start, values)
        return rows[0], rows[1]
    stop = start + keys.shape[2]
    rows[0, :, :, start:stop] = keys
    rows[1, :, :, start:stop] = values
    return rows[0, :, :, :stop], rows[1, :, :, :stop]


def attention_mask(hidden: torch.Tensor, past: Any, capacity: int, dtype: torch.dtype) -> torch.Tensor:
    """Additive attention mask of new rows, which all attend to the committed rows.

    Args:
        hidden: bool [new, any], True where a new row must not attend; column 0 is the first row after the committed.
        past: number of committed rows; as a tensor [], the mask is as wide as the cache whatever its value.
        capacity: rows of the cache.

    Returns:
        [new, past + any], or [new, capacity] with all later columns masked.
    """
    if isinstance(past, torch.Tensor):
        return static_mask(hidden, past, capacity, dtype)
    return aligned_mask(F.pad(hidden.to(dtype) * torch.finfo(dtype).min, (past, 0)))


def aligned_mask(mask: torch.Tensor) -> torch.Tensor:
    """The mask; on CUDA a copy with row strides of multiples of 16, without which fused attention faults in half
    precision."""
    if mask.device.type != "cuda":
        return mask
    width = mask.shape[-1]
    return mask.new_empty(*mask.shape[:-1], -(-width // 16) * 16)[..., :width].copy_(mask)


@torch.library.custom_op("koala_bench::static_mask", mutates_args=())
def static_mask(hidden: torch.Tensor, past: torch.Tensor, capacity: int, dtype: torch.dtype) -> torch.Tensor:
    """``attention_mask`` with static shapes. One operator, so that a kernel which needs no mask can recognise it and
    read ``hidden`` instead."""
    masked = torch.finfo(dtype).min
    columns = torch.arange(capacity, device=hidden.device) - past
    block = F.pad(hidden.to(dtype) * masked, (0, 1), value=masked)
    return block.index_select(1, columns.clamp(0, hidden.shape[1])).masked_fill(columns < 0, 0.0)


@static_mask.register_fake
def _(hidden: torch.Tensor, past: torch.Tensor, capacity: int, dtype: torch.dtype) -> torch.Tensor:
    return hidden.new_empty(hidden.shape[0], capacity, dtype=dtype)


def pass_cache(storage: torch.Tensor, start: Any, new: int) -> Cache:
    """A stateless cache for one pass over ``new`` nodes, so that the pass can be traced.

    Args:
        storage: of a ``TreeCache``, [layers, 2, kv_heads, capacity, head_dim]; the new rows are written there.
        start: number of committed rows; or the indices of the new rows as a tensor [new], see ``write_rows``, when the
            pass needs a mask as wide as the cache.
    """
    if isinstance(start, torch.Tensor):
        return Cache(layers=[_StaticPassLayer(rows, start) for rows in storage.unsqueeze(2).unbind(0)])
    every = storage.flatten(0, 1).unsqueeze(1)  # keys and values of each layer in turn
    rows, added = every[:, :, :, : start + new].unbind(0), every[:, :, :, start : start + new].unbind(0)
    pairs = range(0, len(rows), 2)
    return Cache(layers=[_PassLayer(rows[i : i + 2], added[i : i + 2], start) for i in pairs])


class TreeCache(Cache):
    """Keys and values of one sequence, batch size 1.

    Attributes:
        past: number of committed rows. Rows after them are scratch space for the tree being verified.
        capacity: number of rows allocated.
    """

    def __init__(self, layers: int, capacity: int) -> None:
        self.past = 0
        self.capacity = capacity
        self._storage: torch.Tensor | None = None  # [layers, 2, kv_heads, capacity, head_dim]
        self._tree_masks: dict[TreeShape, tuple[torch.Tensor, torch.Tensor]] = {}  # and the nodes' depths
        # Preallocated mask; only the tree's block is rewritten when its shape changes.
        self._mask_buffer = torch.empty(0, 0)
        self._shape: TreeShape | None = None
        self._mask = self._depths = self._mask_buffer
        super().__init__(layers=[_Layer(self, index) for index in range(layers)])

    def allocate(self, index: int, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Views of layer ``index`` of the storage, keys and values each [1, kv_heads, capacity, head_dim]."""
        _, heads, _, dim = keys.shape
        if self._storage is None:
            # Zeros, not garbage: a masked row still enters the product with weight 0, and 0 * nan is nan.
            size = (len(self.layers), 2, heads, self.capacity, dim)
            self._storage = torch.zeros(size, dtype=keys.dtype, device=keys.device)
        if keys.shape[0] != 1 or keys.shape != values.shape or self._storage.shape[2:] != (heads, self.capacity, dim):
            raise KoalaBenchError(
                "This target's attention layers differ in shape from one another.",
                "Only models with the same key and value heads in every layer can be decoded with trees.",
            )
        return self._storage[index, 0:1], self._storage[index, 1:2]

    @property
    def storage(self) -> torch.Tensor:
        """Keys and values of all layers [layers, 2, kv_heads, capacity, head_dim]; exists after ``prefill``."""
        assert self._storage is not None, "prefill() comes first"
        return self._storage

    def begin(self) -> None:
        """Forget the sequence; the storage stays."""
        self.past = 0

    def commit(self, path: Sequence[int]) -> None:
        """Commit the rows of ``path``, node indices of the tree just verified, root first."""
        count = len(path)
        if path[-1] != count - 1:  # not simply the first nodes
            assert self._storage is not None
            rows = torch.tensor(path, device=self._storage.device) + self.past
            self._storage[:, :, :, self.past : self.past + count] = self._storage.index_select(3, rows)
        self.past += count

    def tree_mask(self, shape: TreeShape, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Tree mask, bool [nodes, nodes], True where a node must not attend, and node depths, int64 [1, nodes]."""
        if shape not in self._tree_masks:
            if len(self._tree_masks) == _MAX_TREE_MASKS:  # dynamic trees must not fill the memory
                del self._tree_masks[next(iter(self._tree_masks))]
            self._tree_masks[shape] = (~shape.ancestors.to(device), torch.tensor([shape.depths], device=device))
        return self._tree_masks[shape]

    def tree_buffers(
        self, shape: TreeShape, dtype: torch.dtype, device: torch.device
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Attention mask and depths of a tree after the committed rows.

        Returns:
            additive mask [1, 1, nodes, past + nodes], a view of a buffer that the next call overwrites, and the depths,
            int64 [1, nodes]. Additive, because a boolean mask is silently wrong under eager attention.
        """
        if shape != self._shape:
            hidden, self._depths = self.tree_mask(shape, device)
            if len(self._mask_buffer) < shape.nodes:
                self._mask_buffer = torch.zeros(shape.nodes, self.capacity + shape.nodes, dtype=dtype, device=device)
            mask = self._mask_buffer[: shape.nodes, : self.capacity + shape.nodes]
            block = torch.zeros_like(hidden, dtype=dtype)
            mask[:, self.capacity :] = block.masked_fill_(hidden, torch.finfo(dtype).min)
            self._shape, self._mask = shape, mask[None, None]
        return self._mask[..., self.capacity - self.past :], self._depths

    def first_rows(self, count: int) -> torch.Tensor:
        """The storage up to row ``count``, rounded up so that few distinct lengths occur."""
        return self.storage[:, :, :, : min(self.capacity, -(-count // ROW_BLOCK) * ROW_BLOCK)]
