"""Rewriting recorded operations into the kernels of ``koala_bench.engine.kernels``: the last step of
``koala_bench.engine.lowering`` on a GPU.

As there, nothing here knows a model. What surrounds a product of one row becomes part of it; an attention whose mask
says which nodes of a tree see which is made without the mask, and the rotation and the writing of rows before it are
one kernel.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Graph, Node

from koala_bench.engine import kernels
from koala_bench.engine.graph_nodes import calls, constant, is_call, only_user, replace_node, value_of, writes

_aten = torch.ops.aten
_LINEAR = (_aten.linear.default, torch._C._nn.linear)


def fuse(graph: Graph, constants: dict[str, Any]) -> None:
    """Rewrite a graph in place, as a step of ``koala_bench.engine.lowering.lower``."""
    for node in calls(graph, _aten.scaled_dot_product_attention.default):
        _attention(graph, constants, node)
    for node in calls(graph, *_LINEAR):
        _product(graph, constants, node)
    for node in calls(graph, _aten.mul.Tensor):
        _gate(graph, node)
    graph.eliminate_dead_code(is_impure_node=writes)  # a norm is to be read by what is left alone
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
    if (
        is_call(q, _aten.reshape.default, _aten.view.default)
        and _method(q.args[0], "narrow")
        and value_of(q.args[0]).shape[2] == 1
    ):
        q = q.args[0]  # queries of a group stood there as rows
    (batch, heads, rows, width), (_, kv_heads, *_) = value_of(q).shape, value_of(keys).shape
    if (
        not _half(q)
        or batch != 1
        or width not in kernels.WIDTHS
        or heads % kv_heads
        or value_of(hidden).shape[0] != rows
    ):
        return
    writers = [_writer(keys, reads_keys), _writer(values, reads_values)]
    rotation = _rotation(constants, q, keys, values, writers)
    with graph.inserting_before(node):
        if rotation is not None and rows == 1:
            arrived = _arrivals(graph, constants, heads)
            new = graph.call_function(kernels.attend_row, (*rotation, hidden, past, scale, arrived))
        else:
            turned = q
            if rotation is not None:
                turned = graph.call_function(kernels.rotate, rotation)
                turned.meta["val"] = value_of(q)
            new = graph.call_function(kernels.attend, (turned, keys, values, hidden, past, scale))
        if value_of(q).shape != shape:
            new = graph.call_method("reshape", (new, list(shape)))
    if rotation is not None:
        for writer in writers:
            graph.erase_node(writer)
    replace_node(node, new)


def _arrivals(graph: Graph, constants: dict[str, Any], heads: int) -> Node:
    """Counters for ``kernels.attend_row``, which runs once at a time."""
    device = next(
        value.device for value in constants.values() if isinstance(value, torch.Tensor) and value.is_floating_point()
    )
    return constant(graph, constants, torch.zeros(heads, dtype=torch.int32, device=device), "arrived")


def _rotation(constants: dict[str, Any], q: Any, keys: Any, values: Any, writers: list[Any]) -> tuple[Any, ...] | None:
    """The arguments of ``kernels.rotate``, if queries and keys are turned as one and rows are written nowhere but where
    they are attended to.
    """
    if None in writers:
        return None
    (_, place, numbers, k), (_, other, others, v) = (writer.args for writer in writers)
    if (
        (place, other) != (2, 2)
        or numbers is not others
        or not _method(q, "narrow")
        or not _method(k, "narrow")
        or len(k.users) > 1
        or len(q.users) > 1
    ):
        return None
    (whole, *first), (same, *second) = q.args, k.args
    heads, kv_heads = value_of(q).shape[1], value_of(keys).shape[1]
    if (
        whole is not same
        or first != [1, 0, heads]
        or second != [1, heads, kv_heads]
        or not is_call(whole, torch.addcmul)
    ):
        return None
    straight, rolled, sine = whole.args
    if (
        not is_call(straight, torch.mul)
        or not is_call(rolled, torch.roll)
        or straight.args[0] is not rolled.args[0]
        or rolled.args[2] != -1
    ):
        return None
    if any(size != 1 for each in (straight.args[1], sine) for size in value_of(each).shape[:-2]):
        return None  # angles that differ from head to head
    signed = not _signs(constants, sine, value_of(q).shape[-1])
    return (
        straight.args[0],
        v,
        straight.args[1],
        sine if signed else sine.args[0],
        signed,
        rolled.args[1],
        numbers,
        keys,
        values,
    )


def _signs(constants: dict[str, Any], sine: Any, width: int) -> bool:
    """Whether sines are others whose first half was made negative, which the kernels do themselves."""
    if not is_call(sine, torch.mul) or not isinstance(sine.args[1], Node) or sine.args[1].op != "get_attr":
        return False
    signs = constants[str(sine.args[1].target)]
    half = torch.ones(width // 2, dtype=signs.dtype, device=signs.device)
    return torch.equal(signs, torch.cat([-half, half]))


def _unrepeated(rows: Any, attention: Node) -> tuple[Any, Node]:
    """Keys or values as they lie in the cache, and the node that reads them: repeated once for each query of a group,
    or the attention itself.
    """
    spread: Any = (
        rows.args[0] if is_call(rows, _aten.reshape.default, _aten.view.default, _aten._unsafe_view.default) else None
    )
    apart: Any = spread.args[0] if is_call(spread, _aten.expand.default) else None
    if not is_call(apart, _aten.unsqueeze.default) or apart.args[1] != 2 or len(value_of(rows).shape) != 4:
        return rows, attention
    return apart.args[0], apart


def _writer(rows: Node, reader: Node) -> Any:
    """What writes into rows that are then attended to and asked for nothing else."""
    others = [user for user in rows.users if user is not reader]
    return (
        others[0]
        if len(others) == 1 and is_call(others[0], _aten.index_copy_.default) and others[0].args[0] is rows
        else None
    )


# ------------------------------------------------------------------------------ products


def _product(graph: Graph, constants: dict[str, Any], node: Any) -> None:
    """A product of one row by our kernel; of several an addition behind it becomes part of the library's."""
    x, weight, bias = (*node.args, None)[:3]
    if not _half(node) or value_of(x).dtype != value_of(node).dtype or weight.op != "get_attr":
        return
    one = all(size == 1 for size in value_of(node).shape[:-1])
    total = only_user(node, _aten.add.Tensor)
    residual = None if total is None or len(total.args) != 2 or total.kwargs else total.args[total.args[0] is node]
    if not isinstance(residual, Node) or (value_of(residual).shape, value_of(residual).dtype) != (
        value_of(node).shape,
        value_of(node).dtype,
    ):
        residual = None
    old = node if residual is None else total
    if residual is None and not one:
        return
    with graph.inserting_before(old):
        target = kernels.row_product if one else kernels.product_ if _spent(residual, old) else kernels.product
        replace_node(old, graph.call_function(target, (x, weight, bias, residual)))
    if old is not node:
        graph.erase_node(node)


def _spent(node: Any, last: Node) -> bool:
    """Whether a tensor was made in this pass for nobody who reads it after the last reader named: it may be written
    over.
    """
    made = is_call(node, kernels.product, kernels.product_, _aten.embedding.default, *_LINEAR) or (
        is_call(node, _aten.unsqueeze.default) and len(node.args[0].users) == 1 and is_call(node.args[0], *_LINEAR)
    )
    return (
        made
        and all(user is last or user < last for user in node.users)
        and not any(_looks(user) for user in node.users)
    )


def _looks(node: Node) -> bool:
    """Whether what a node gives may be the memory of what it is given."""
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
    if (
        not _half(node)
        or low.args != (whole, -1, 0, width)
        or up.args[1:] != (-1, width, width)
        or value_of(whole).shape[-1] != 2 * width
    ):
        return
    alone = set(whole.users) == {low, up} and all(len(each.users) == 1 for each in (low, up, silu))
    with graph.inserting_before(node):
        if alone and is_call(whole, kernels.row_product) and whole.args[2:] == (None, None):
            replace_node(node, graph.call_function(kernels.row_product, whole.args, {"gated": True}))
        else:
            replace_node(node, graph.call_function(kernels.gate, (whole,)))


def _norm(graph: Graph, node: Any) -> None:
    """A norm becomes part of the gated products of one row that read it, or a kernel of its own.

    Every program of a product makes the norm anew. Two rows of weights to each element of x pay for that; with one a
    kernel more is faster (measured on an H200, 12,288 rows of 4,096: 29 us, against 25 and 3).
    """
    x, shape, gain, eps = node.args
    if not _half(node) or len(shape) != 1 or value_of(gain).dtype not in kernels.DTYPES or not isinstance(eps, float):
        return
    if node.users and all(
        is_call(user, kernels.row_product) and user.args[0] is node and user.kwargs.get("gated") for user in node.users
    ):
        for user in list(node.users):
            user.args, user.kwargs = (x, *user.args[1:]), {**user.kwargs, "gain": gain, "eps": eps}
        return
    with graph.inserting_before(node):
        replace_node(node, graph.call_function(kernels.rms_norm, (x, gain, eps)))


def _topk(graph: Graph, node: Any) -> None:
    x, count, *rest = node.args
    width = value_of(x).shape[-1]
    if (
        rest not in ([], [-1])
        or node.kwargs
        or not isinstance(count, int)
        or not isinstance(width, int)
        or count > min(width, kernels.MOST_RANKS)
    ):
        return
    if value_of(x).dtype in (*kernels.DTYPES, torch.float32):
        with graph.inserting_before(node):
            replace_node(node, graph.call_function(kernels.topk, (x, count)))


def _pair(graph: Graph, node: Any) -> None:
    """Embeddings of some tokens beside states of others: what an autoregressive head reads."""
    parts, *rest = node.args
    if (
        len(parts) != 2
        or rest != [-1]
        or not is_call(parts[0], _aten.embedding.default)
        or len(parts[0].users) > 1
        or not _half(node)
    ):
        return
    weight, tokens = parts[0].args[:2]
    if value_of(tokens).ndim != 1 or value_of(parts[1]).ndim != 2 or value_of(weight).dtype != value_of(parts[1]).dtype:
        return
    tokens, places = _chosen(tokens)
    states, parents = _chosen(parts[1])
    with graph.inserting_before(node):
        replace_node(node, graph.call_function(kernels.paired, (weight, tokens, places, states, parents)))


def _chosen(node: Any) -> tuple[Any, Any]:
    """A tensor and which rows of it are wanted, None for all."""
    if is_call(node, _aten.index_select.default) and node.args[1] == 0:
        return node.args[0], node.args[2]
    return node, None
