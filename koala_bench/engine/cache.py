"""A preallocated key-value cache for tree decoding: the nodes of a tree are written behind the settled rows, and
committing a path moves the few accepted rows into place. Nothing is reallocated while decoding.

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

# Trees whose masks are kept, the latest ones. A dynamic tree's shape hardly comes again and pushes out others; making
# one anew costs some 40 microseconds, which is nothing beside a pass of a target.
_SHAPES = 64
LENGTHS = 512  # rows that a pass of fixed shape may see are a multiple of this


class _Rows(DynamicLayer):
    """One layer's window on the shared storage; ``update`` writes behind the settled rows and returns views."""

    def __init__(self, owner: TreeCache, index: int) -> None:
        super().__init__()
        self.owner, self.index = owner, index

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

    def get_seq_length(self, *args: Any, **kwargs: Any) -> int:
        return self.owner.past

    def get_mask_sizes(self, query_length: int | torch.Tensor, *args: Any, **kwargs: Any) -> tuple[int, int]:
        # transformers 4.57 passes the positions, 5.x their number.
        new = query_length if isinstance(query_length, int) else int(query_length.shape[0])
        return self.owner.past + new, 0

    def get_max_length(self) -> int:
        return self.owner.capacity

    def get_max_cache_shape(self) -> int:
        return self.owner.capacity


class _Window(DynamicLayer):
    """One layer's rows during a single pass, cut out before it; ``update`` writes the new ones and returns all."""

    def __init__(
        self, keys: torch.Tensor, values: torch.Tensor, new_keys: torch.Tensor, new_values: torch.Tensor, past: int
    ) -> None:
        super().__init__()
        self.keys, self.values, self._new_keys, self._new_values, self._past = keys, values, new_keys, new_values, past
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self._new_keys.copy_(key_states)
        self._new_values.copy_(value_states)
        assert self.keys is not None and self.values is not None
        return self.keys, self.values

    def get_seq_length(self, *args: Any, **kwargs: Any) -> int:
        return self._past

    def get_mask_sizes(self, query_length: int | torch.Tensor, *args: Any, **kwargs: Any) -> tuple[int, int]:
        # A number that moves is none to isinstance; only transformers 4.57 passes positions.
        return self._past + (query_length.shape[0] if isinstance(query_length, torch.Tensor) else query_length), 0


class _Indexed(DynamicLayer):
    """One layer's rows during a single pass whose shapes do not depend on how many are settled; ``update`` returns all
    there are.
    """

    def __init__(self, rows: torch.Tensor, numbers: torch.Tensor) -> None:
        super().__init__()
        self._rows, self._numbers = rows, numbers
        self.keys, self.values = rows[0], rows[1]
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return written(self._rows, self._numbers, key_states, value_states)

    def get_seq_length(self, *args: Any, **kwargs: Any) -> int:
        return self._rows.shape[-2] - self._numbers.shape[0]

    def get_mask_sizes(self, query_length: int | torch.Tensor, *args: Any, **kwargs: Any) -> tuple[int, int]:
        return self._rows.shape[-2], 0


def written(
    rows: torch.Tensor, start: Any, keys: torch.Tensor, values: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Write new rows, and return those that are then to be attended to, keys and values.

    Args:
        rows: [2, batch, kv_heads, capacity, head_dim].
        start: number of the first new row, and those up to the last new one come back; or the numbers of the new rows
            as a tensor [new], and all rows come back, so that no shape depends on it.
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


def hiding(hidden: torch.Tensor, past: Any, capacity: int, dtype: torch.dtype) -> torch.Tensor:
    """Additive attention mask of new rows that see all settled ones.

    Args:
        hidden: bool [new, any], which of the rows from the first unsettled one on each new row must not see.
        past: number of settled rows; or that as a tensor [], and the mask is as wide as the cache, whatever its value.
        capacity: rows of the cache.

    Returns:
        [new, past + any], or [new, capacity] with everything behind those hidden.
    """
    if isinstance(past, torch.Tensor):
        return hide(hidden, past, capacity, dtype)
    return aligned(F.pad(hidden.to(dtype) * torch.finfo(dtype).min, (past, 0)))


def aligned(mask: torch.Tensor) -> torch.Tensor:
    """An additive mask as it is, or on CUDA a copy whose rows begin at multiples of 16 elements: fused attention faults
    on others in half precision.
    """
    if mask.device.type != "cuda":
        return mask
    width = mask.shape[-1]
    return mask.new_empty(*mask.shape[:-1], -(-width // 16) * 16)[..., :width].copy_(mask)


@torch.library.custom_op("koala_bench::hide", mutates_args=())
def hide(hidden: torch.Tensor, past: torch.Tensor, capacity: int, dtype: torch.dtype) -> torch.Tensor:
    """``hiding`` for a number of settled rows that is a tensor: one operation, so that a kernel that needs no mask
    finds what it stands for.
    """
    least = torch.finfo(dtype).min
    places = torch.arange(capacity, device=hidden.device) - past
    block = F.pad(hidden.to(dtype) * least, (0, 1), value=least)
    return block.index_select(1, places.clamp(0, hidden.shape[1])).masked_fill(places < 0, 0.0)


@hide.register_fake
def _(hidden: torch.Tensor, past: torch.Tensor, capacity: int, dtype: torch.dtype) -> torch.Tensor:
    return hidden.new_empty(hidden.shape[0], capacity, dtype=dtype)


def windows(storage: torch.Tensor, start: Any, new: int) -> Cache:
    """A cache for one pass over ``new`` nodes, without a state of its own, so that it can be recorded.

    Args:
        storage: of a ``TreeCache``, [layers, 2, kv_heads, capacity, head_dim]; the new rows are written there.
        start: number of settled rows, behind which they go; or the numbers of the new rows as a tensor [new], see
            ``written``: the pass then needs a mask as wide as the cache.
    """
    if isinstance(start, torch.Tensor):
        return Cache(layers=[_Indexed(rows, start) for rows in storage.unsqueeze(2).unbind(0)])
    every = storage.flatten(0, 1).unsqueeze(1)
    rows, added = every[:, :, :, : start + new].unbind(0), every[:, :, :, start : start + new].unbind(0)
    return Cache(
        layers=[_Window(rows[at], rows[at + 1], added[at], added[at + 1], start) for at in range(0, len(rows), 2)]
    )


class TreeCache(Cache):
    """Keys and values of one sequence, batch size 1.

    Attributes:
        past: number of settled rows. Rows behind it are scratch space for the tree under verification.
        capacity: number of rows there is room for.
    """

    def __init__(self, layers: int, capacity: int) -> None:
        self.past = 0
        self.capacity = capacity
        self._storage: torch.Tensor | None = None  # [layers, 2, kv_heads, capacity, head_dim]
        # One mask, wide enough for all settled rows there can be, takes on the part that depends on the tree when the
        # tree changes.
        self._wide = torch.empty(0, 0)
        self._blocks: dict[TreeShape, tuple[torch.Tensor, torch.Tensor]] = {}  # that part, and the depths
        self._shown: TreeShape | None = None
        self._mask = self._depths = self._wide
        super().__init__(layers=[_Rows(self, index) for index in range(layers)])

    def allocate(self, index: int, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Views of layer ``index`` on the storage, keys and values each [1, kv_heads, capacity, head_dim]."""
        _, heads, _, dim = keys.shape
        if self._storage is None:
            # Zeros, not garbage: a row that is masked out still enters the product with weight 0, and 0 * nan is nan.
            self._storage = torch.zeros(
                len(self.layers), 2, heads, self.capacity, dim, dtype=keys.dtype, device=keys.device
            )
        if keys.shape[0] != 1 or keys.shape != values.shape or self._storage.shape[2:] != (heads, self.capacity, dim):
            raise KoalaBenchError(
                "This target's attention layers differ in shape from one another.",
                "Only models with the same key and value heads in every layer can be decoded with trees.",
            )
        return self._storage[index, 0:1], self._storage[index, 1:2]

    @property
    def storage(self) -> torch.Tensor:
        """Keys and values of all layers [layers, 2, kv_heads, capacity, head_dim]; there once a prompt was read."""
        assert self._storage is not None, "prefill() comes first"
        return self._storage

    def begin(self) -> None:
        """Forget the sequence; the storage stays."""
        self.past = 0

    def commit(self, path: Sequence[int]) -> None:
        """Settle the rows of ``path``, node indices of the tree that was just verified, root first."""
        count = len(path)
        if path[-1] != count - 1:  # a path that is not simply the first nodes
            assert self._storage is not None
            rows = torch.tensor(path, device=self._storage.device) + self.past
            self._storage[:, :, :, self.past : self.past + count] = self._storage.index_select(3, rows)
        self.past += count

    def unseen(self, shape: TreeShape, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Which nodes of a tree each node does not attend to, bool [nodes, nodes], and the nodes' depths, int64 [1,
        nodes].
        """
        if shape not in self._blocks:
            if len(self._blocks) == _SHAPES:  # a head that draws its tree anew at each step must not fill the memory
                del self._blocks[next(iter(self._blocks))]
            self._blocks[shape] = (~shape.ancestors.to(device), torch.tensor([shape.depths], device=device))
        return self._blocks[shape]

    def tree_buffers(
        self, shape: TreeShape, dtype: torch.dtype, device: torch.device
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Attention mask and depths of a tree behind the settled rows.

        Returns:
            the additive mask [1, 1, nodes, past + nodes], a view on a buffer that holds until the next tree is asked
            for, and the depths, int64 [1, nodes]. Additive, because a boolean mask is silently wrong under eager
            attention.
        """
        if shape != self._shown:
            hidden, self._depths = self.unseen(shape, device)
            if len(self._wide) < shape.nodes:
                self._wide = torch.zeros(shape.nodes, self.capacity + shape.nodes, dtype=dtype, device=device)
            mask = self._wide[: shape.nodes, : self.capacity + shape.nodes]
            mask[:, self.capacity :] = torch.zeros_like(hidden, dtype=dtype).masked_fill_(
                hidden, torch.finfo(dtype).min
            )
            self._shown, self._mask = shape, mask[None, None]
        return self._mask[..., self.capacity - self.past :], self._depths

    def first_rows(self, count: int) -> torch.Tensor:
        """The storage up to row ``count`` or a little further, so that few different lengths come up."""
        return self.storage[:, :, :, : min(self.capacity, -(-count // LENGTHS) * LENGTHS)]
