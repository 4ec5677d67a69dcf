"""Graph pass that inserts the kernels of ``koala_bench.engine.kernels``: the last of ``lowering`` on a GPU.

Matrix-vector products are fused with the norm before and the bias, residual and gate after them. Tree attention reads
the boolean tree mask instead of an additive one; the rotary embedding and the KV cache write before it are one kernel.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Graph, Node

from koala_bench.engine import kernels
from koala_bench.engine.graphs.nodes import calls, constant, is_call, only_user, replace_node, value_of, writes

_aten = torch.ops.aten
_LINEAR = (_aten.linear.default, torch._C._nn.linear)


def fuse(graph: Graph, constants: dict[str, Any]) -> None:
    """Rewrite a graph in place, as a pass of ``lowering.lower``."""
    for node in calls(graph, _aten.scaled_dot_product_attention.default):
        _attention(graph, constants, node)
    for node in calls(graph, *_LINEAR):
        _product(graph, constants, node)
    for node in calls(graph, _aten.mul.Tensor):
        _gate(graph, node)
    graph.eliminate_dead_code(is_impure_node=writes)  # so that norms have live users only
    for node in calls(graph, torch.rms_norm):
        _norm(graph, node)
    for node in calls(graph, _aten.topk.default):
        _topk(graph, node)
    for node in calls(graph, _aten.cat.default):
        _pair(graph, node)


def _half(node: Any) -> bool:
    return value_of(node).dtype in kernels.DTYPES


def _method(node: Any, name: str) -> bool:
    return isinstance(node, Node) and node.op == "call_method" and node.target == name


# ------------------------------------------------------------------------------ attention


def _attention(graph: Graph, constants: dict[str, Any], node: Any) -> None:
    q, keys, values, mask, *rest = (*node.args, None)[: max(4, len(node.args))]
    options = dict(node.kwargs)
    scale = options.pop("scale", None)
    options.pop("enable_gqa", None)
    while is_call(mask, _aten.unsqueeze.default):
        mask = mask.args[0]
    if options or any(rest) or not is_call(mask, torch.ops.koala_bench.static_mask.default):
        return
    hidden, past = mask.args[:2]
    (keys, reads_keys), (values, reads_values) = _unrepeated(keys, node), _unrepeated(values, node)
    shape = value_of(q).shape
    viewed = q.args[0] if is_call(q, _aten.reshape.default, _aten.view.default) else None
    if _method(viewed, "narrow") and value_of(viewed).shape[2] == 1:
        q = viewed  # the queries of a group as rows
    (batch, heads, rows, width), (_, kv_heads, *_) = value_of(q).shape, value_of(keys).shape
    if not _half(q) or batch != 1 or width not in kernels.WIDTHS or heads % kv_heads:
        return
    if value_of(hidden).shape[0] != rows:
        return
    writers = [_writer(keys, reads_keys), _writer(values, reads_values)]
    rotation = _rotation(constants, q, keys, values, writers)
    with graph.inserting_before(node):
        if rotation is not None and rows == 1:
            arrived = _arrivals(graph, constants, heads)
            new = graph.call_function(kernels.attend_row, (*rotation, hidden, past, scale, arrived))
        else:
            rotated = q
            if rotation is not None:
                rotated = graph.call_function(kernels.rotate, rotation)
                rotated.meta["val"] = value_of(q)
            new = graph.call_function(kernels.attend, (rotated, keys, values, hidden, past, scale))
        if value_of(q).shape != shape:
            new = graph.call_method("reshape", (new, list(shape)))
    if rotation is not None:
        for writer in writers:
            graph.erase_node(writer)
    replace_node(node, new)


def _arrivals(graph: Graph, constants: dict[str, Any], heads: int) -> Node:
    """Arrival counters for ``kernels.attend_row``, whose calls do not overlap."""
    weights = (each for each in constants.values() if isinstance(each, torch.Tensor) and each.is_floating_point())
    zeros = torch.zeros(heads, dtype=torch.int32, device=next(weights).device)
    return constant(graph, constants, zeros, "arrived")


def _rotation(constants: dict[str, Any], q: Any, keys: Any, values: Any, writers: list[Any]) -> tuple[Any, ...] | None:
    """The arguments of ``kernels.rotate``, if queries and keys are rotated together and only the attention reads the
    written rows."""
    if None in writers:
        return None
    (_, place, numbers, k), (_, other, others, v) = (writer.args for writer in writers)
    if (place, other) != (2, 2) or numbers is not others:
        return None
    if any(not _method(each, "narrow") or len(each.users) > 1 for each in (q, k)):
        return None
    (whole, *first), (same, *second) = q.args, k.args
    heads, kv_heads = value_of(q).shape[1], value_of(keys).shape[1]
    if whole is not same or not is_call(whole, torch.addcmul):
        return None
    if first != [1, 0, heads] or second != [1, heads, kv_heads]:
        return None
    straight, rolled, sine = whole.args
    if not is_call(straight, torch.mul) or not is_call(rolled, torch.roll):
        return None
    if straight.args[0] is not rolled.args[0] or rolled.args[2] != -1:
        return None
    if any(size != 1 for each in (straight.args[1], sine) for size in value_of(each).shape[:-2]):
        return None  # angles that differ from head to head
    signed = not _signs(constants, sine, value_of(q).shape[-1])
    x, cosine = straight.args
    return x, v, cosine, sine if signed else sine.args[0], signed, rolled.args[1], numbers, keys, values


def _signs(constants: dict[str, Any], sine: Any, width: int) -> bool:
    """Whether the first half of the sines was negated by a product with signs, which the kernels do themselves."""
    if not is_call(sine, torch.mul) or not isinstance(sine.args[1], Node) or sine.args[1].op != "get_attr":
        return False
    signs = constants[str(sine.args[1].target)]
    half = torch.ones(width // 2, dtype=signs.dtype, device=signs.device)
    return torch.equal(signs, torch.cat([-half, half]))


def _unrepeated(rows: Any, attention: Node) -> tuple[Any, Node]:
    """Keys or values in the cache before they are repeated for grouped queries, and the node that reads them."""
    reshapes = (_aten.reshape.default, _aten.view.default, _aten._unsafe_view.default)
    expanded: Any = rows.args[0] if is_call(rows, *reshapes) else None
    unsqueezed: Any = expanded.args[0] if is_call(expanded, _aten.expand.default) else None
    if not is_call(unsqueezed, _aten.unsqueeze.default) or unsqueezed.args[1] != 2 or len(value_of(rows).shape) != 4:
        return rows, attention
    return unsqueezed.args[0], unsqueezed


def _writer(rows: Node, reader: Node) -> Any:
    """The node that writes the new rows, if it is the only user of the rows besides their reader; else None."""
    others = [user for user in rows.users if user is not reader]
    alone = len(others) == 1 and is_call(others[0], _aten.index_copy_.default) and others[0].args[0] is rows
    return others[0] if alone else None


# ------------------------------------------------------------------------------ linear layers


def _product(graph: Graph, constants: dict[str, Any], node: Any) -> None:
    """Matrix-vector products use our kernel; products of several rows use the library's with the addition fused."""
    x, weight, bias = (*node.args, None)[:3]
    if not _half(node) or value_of(x).dtype != value_of(node).dtype or weight.op != "get_attr":
        return
    one = all(size == 1 for size in value_of(node).shape[:-1])
    total = only_user(node, _aten.add.Tensor)
    residual = None if total is None or len(total.args) != 2 or total.kwargs else total.args[total.args[0] is node]
    if not isinstance(residual, Node) or _kind(residual) != _kind(node):
        residual = None
    old = node if residual is None else total
    if residual is None and not one:
        return
    with graph.inserting_before(old):
        target = kernels.row_product if one else kernels.product_ if _reusable(residual, old) else kernels.product
        replace_node(old, graph.call_function(target, (x, weight, bias, residual)))
    if old is not node:
        graph.erase_node(node)


def _kind(node: Node) -> tuple[Any, torch.dtype]:
    return value_of(node).shape, value_of(node).dtype


def _reusable(node: Any, last: Node) -> bool:
    """Whether a tensor was made in this graph and has no reader after ``last``, so that it may be overwritten."""
    made = is_call(node, kernels.product, kernels.product_, _aten.embedding.default, *_LINEAR) or (
        is_call(node, _aten.unsqueeze.default) and len(node.args[0].users) == 1 and is_call(node.args[0], *_LINEAR)
    )
    return made and all((user is last or user < last) and not _may_alias(user) for user in node.users)


def _may_alias(node: Node) -> bool:
    """Whether a node's result may share memory with its input."""
    return not is_call(node, _aten.add.Tensor, torch.rms_norm, *_LINEAR)


def _gate(graph: Graph, node: Any) -> None:
    """SiLU of one half of a product times its other half."""
    silu, up = node.args
    if not is_call(silu, _aten.silu.default):
        silu, up = up, silu
    if not is_call(silu, _aten.silu.default) or not _method(up, "narrow") or not _method(silu.args[0], "narrow"):
        return
    low = silu.args[0]
    whole, width = up.args[0], value_of(node).shape[-1]
    if low.args != (whole, -1, 0, width) or up.args[1:] != (-1, width, width):
        return
    if not _half(node) or value_of(whole).shape[-1] != 2 * width:
        return
    alone = set(whole.users) == {low, up} and all(len(each.users) == 1 for each in (low, up, silu))
    with graph.inserting_before(node):
        if alone and is_call(whole, kernels.row_product) and whole.args[2:] == (None, None):
            replace_node(node, graph.call_function(kernels.row_product, whole.args, {"gated": True}))
        else:
            replace_node(node, graph.call_function(kernels.gate, (whole,)))


def _norm(graph: Graph, node: Any) -> None:
    """Fuse a norm into the gated matrix-vector products that read it, or use a kernel of its own.

    Every program of a product computes the norm again. That pays with two weight rows per element of x; with one a
    separate kernel is faster (H200, 12,288 rows of 4,096: 29 us fused, 25 and 3 us apart).
    """
    x, shape, gain, eps = node.args
    if not _half(node) or len(shape) != 1 or value_of(gain).dtype not in kernels.DTYPES or not isinstance(eps, float):
        return
    users = list(node.users)
    gated = [user for user in users if is_call(user, kernels.row_product) and user.kwargs.get("gated")]
    if users and len(gated) == len(users) and all(user.args[0] is node for user in users):
        for user in users:
            user.args, user.kwargs = (x, *user.args[1:]), {**user.kwargs, "gain": gain, "eps": eps}
        return
    with graph.inserting_before(node):
        replace_node(node, graph.call_function(kernels.rms_norm, (x, gain, eps)))


def _topk(graph: Graph, node: Any) -> None:
    x, count, *rest = node.args
    width = value_of(x).shape[-1]
    if rest not in ([], [-1]) or node.kwargs or not isinstance(count, int) or not isinstance(width, int):
        return
    if count > min(width, kernels.MOST_RANKS):
        return
    if value_of(x).dtype in (*kernels.DTYPES, torch.float32):
        with graph.inserting_before(node):
            replace_node(node, graph.call_function(kernels.topk, (x, count)))


def _pair(graph: Graph, node: Any) -> None:
    """Concatenation of token embeddings and hidden states, the input of an autoregressive head."""
    parts, *rest = node.args
    if len(parts) != 2 or rest != [-1] or not _half(node):
        return
    if not is_call(parts[0], _aten.embedding.default) or len(parts[0].users) > 1:
        return
    weight, tokens = parts[0].args[:2]
    if value_of(tokens).ndim != 1 or value_of(parts[1]).ndim != 2 or value_of(weight).dtype != value_of(parts[1]).dtype:
        return
    tokens, places = _selected(tokens)
    states, parents = _selected(parts[1])
    with graph.inserting_before(node):
        replace_node(node, graph.call_function(kernels.paired, (weight, tokens, places, states, parents)))


def _selected(node: Any) -> tuple[Any, Any]:
    """A tensor and the indices of the selected rows, None for all."""
    if is_call(node, _aten.index_select.default) and node.args[1] == 0:
        return node.args[0], node.args[2]
    return node, None
