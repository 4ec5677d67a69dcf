"""Graph pass that inserts the kernels of ``koala_bench.engine.processor``: the last of ``lowering`` on the CPU.

A model that repeats its keys and values for each query head copies the whole cache at every step; here they are read
where they lie.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Graph, Node

from koala_bench.engine.graphs.nodes import calls, is_call, only_user, replace_node, value_of
from koala_bench.engine.processor import kernels

_aten = torch.ops.aten


def fuse(graph: Graph, constants: dict[str, Any]) -> None:
    """Rewrite a lowered graph in place where its operations match."""
    for node in calls(graph, _aten.scaled_dot_product_attention.default):
        _attend(graph, node)
    for node in calls(graph, _aten.silu.default):
        _gate(graph, node)


def _attend(graph: Graph, node: Any) -> None:
    """``kernels.attend`` for attention with an additive mask or none."""
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
    named = dict(zip(names, node.args, strict=False)) | node.kwargs
    query, key, value, mask = (named.get(name) for name in ("query", "key", "value", "attn_mask"))
    values = [value_of(each) for each in (query, key, value, mask) if each is not None]
    if any(each.dtype != torch.float32 or each.ndim != 4 for each in values):
        return
    batch, _, rows, width = values[0].shape
    fits = batch == 1 and isinstance(width, int) and width % kernels.lanes() == 0 and values[2].shape[3] == width
    if not fits or named.get("dropout_p") or named.get("is_causal"):
        return
    if mask is not None and value_of(mask).shape != (1, 1, rows, values[1].shape[2]):
        return
    scale = named.get("scale")
    with graph.inserting_before(node):
        arguments = (query, _unrepeated(key), _unrepeated(value), mask, width**-0.5 if scale is None else scale)
        replace_node(node, graph.call_function(kernels.attend, arguments))


def _unrepeated(node: Any) -> Any:
    """Keys or values [1, groups, keys, width] of which each head gets a copy, where they are repeated side by side."""
    expanded: Any = node.args[0] if is_call(node, _aten.reshape.default, _aten.view.default) else None
    if not is_call(expanded, _aten.expand.default):
        return node
    apart = expanded.args[0]
    if not is_call(apart, _aten.unsqueeze.default) or apart.args[1] not in (2, -3) or value_of(apart).ndim != 5:
        return node
    source, (batch, groups, times, keys, width) = apart.args[0], value_of(expanded).shape
    whole = value_of(node).shape == (batch, groups * times, keys, width)
    return source if whole and value_of(source).shape == (batch, groups, keys, width) else node


def _gate(graph: Graph, node: Any) -> None:
    """``kernels.gate`` for ``silu(a) * b`` of the two halves of one joined linear layer."""
    product = only_user(node, _aten.mul.Tensor)
    if product is None:
        return
    first, second = node.args[0], product.args[product.args[0] is node]
    if not (_is_part(first) and _is_part(second)) or value_of(node).dtype != torch.float32:
        return
    (whole, _, start, width), (other, _, after, size) = first.args, second.args
    if other is not whole or (start, after, size) != (0, width, width) or value_of(whole).shape[-1] != 2 * width:
        return
    if width % kernels.lanes() == 0:
        with graph.inserting_before(product):
            replace_node(product, graph.call_function(kernels.gate, (whole,)))


def _is_part(node: Any) -> bool:
    """Whether a node is a part along the last dimension, as joined layers are split."""
    return isinstance(node, Node) and (node.op, node.target, node.args[1:2]) == ("call_method", "narrow", (-1,))
