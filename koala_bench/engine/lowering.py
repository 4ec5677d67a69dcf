"""Rewriting recorded operations into fewer and faster ones that compute the same: products packed and joined, norms and
rotations fused.

Every rewrite is an identity of real numbers; in floating point the order of some sums changes, as it does between one
kernel and another. Nothing here knows a model: what is not recognised stays as it was recorded.
"""

from __future__ import annotations

import importlib.util
import itertools
import operator
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Literal

import torch
from torch.fx import Graph, Node

from koala_bench.engine.graph_nodes import calls, constant, is_call, only_user, replace_node, value_of, writes

_aten = torch.ops.aten
_USUAL_ROWS = 8  # of a product with packed weights: a hint, any number works
# Elements of weights up to which oneDNN's layout costs more than it saves, on cores of AMD EPYC. That all numbers of
# rows agree on one keeps the weights once in memory and in the processor's cache.
_SMALL = 50_000
_MADE = frozenset({_aten.arange.default, _aten.ones.default})  # out of numbers alone
Layout = Literal["plain", "turned", "packed"]
# What only looks at a tensor in another way, or asks it for a size. Twice the same is once.
_VIEWS = frozenset({
    _aten.unsqueeze.default, _aten.select.int, _aten.slice.Tensor, _aten.transpose.int, _aten.view.default, _aten.sym_size.int, _aten.t.default,
})  # fmt: skip
_PURE = frozenset({_aten.add.Tensor, _aten.mul.Tensor, _aten.index_select.default})


class Layouts:
    """Weights in the layouts that products want, shared by all recordings: what several of them read should lie in a
    processor's cache once.

    Attributes:
        recordings: how many there are.
    """

    def __init__(self) -> None:
        self.recordings = 0
        self._known: dict[tuple[object, ...], tuple[tuple[torch.Tensor, ...], torch.Tensor]] = {}

    def count(self) -> None:
        """One recording more."""
        self.recordings += 1

    def of(self, weights: tuple[torch.Tensor, ...], layout: Layout) -> torch.Tensor:
        """Weights [rows of all, columns], one below the other.

        Args:
            layout: ``turned`` lies in memory column by column; ``packed`` is oneDNN's own, opaque.
        """
        key = (layout, *((id(weight), 0 if weight.is_inference() else weight._version) for weight in weights))
        if key not in self._known:
            with torch.inference_mode(False):  # an ordinary tensor, which a parameter can be a part of
                whole = torch.cat([weight.detach() for weight in weights]) if len(weights) > 1 else weights[0].detach()
            if len(weights) > 1 and not _on_processor(whole):
                # A GPU's memory may not hold a large model twice: the weights become parts of the whole.
                for weight, part in zip(weights, whole.split([len(weight) for weight in weights]), strict=True):
                    weight.data = part
            if layout == "turned":
                whole = whole.t().contiguous().t()
            elif layout == "packed":
                whole = torch.ops.mkldnn._reorder_linear_weight(whole.contiguous(), _USUAL_ROWS)
            self._known[key] = (weights, whole)  # with the weights, so that no other tensor takes their id
        return self._known[key][1]


def lower(graph: Graph, constants: dict[str, Any], layouts: Layouts) -> dict[str, Any]:
    """Rewrite a graph in place; returns the constants that it reads now, by name.

    Args:
        graph: of aten operations, as ``make_fx`` records them before dispatch, with ``meta["val"]``.
        constants: values of its ``get_attr`` nodes.
        layouts: shared with other graphs that read the same weights.
    """
    constants = dict(constants)
    layouts.count()
    lay_out = partial(_lay_out_products, layouts=layouts)
    steps: tuple[Callable[[Graph, dict[str, Any]], None], ...] = (
        _drop_modes, _share, _fold, _drop_idle, _share, _fuse_norms, _fuse_rotations, lay_out, _join_rotations, *_kernels(constants), _call_methods,
    )  # fmt: skip
    for step in steps:
        step(graph, constants)
        graph.eliminate_dead_code(is_impure_node=writes)
    graph.lint()
    used = {str(node.target) for node in graph.nodes if node.op == "get_attr"}
    return {name: value for name, value in constants.items() if name in used}


def _kernels(constants: dict[str, Any]) -> tuple[Callable[[Graph, dict[str, Any]], None], ...]:
    """The rewriting into kernels of our own, where they can be used: with Triton, on a GPU that it compiles for in both
    half precisions.
    """
    weights = [value for value in constants.values() if isinstance(value, torch.Tensor) and value.is_floating_point()]
    if not weights or any(map(_on_processor, weights)) or importlib.util.find_spec("triton") is None:
        return ()
    if weights[0].device.type == "cuda" and torch.cuda.get_device_capability(weights[0].device) < (8, 0):
        return ()
    from koala_bench.engine.fusing import fuse  # which needs Triton, which is not there without a GPU

    return (fuse,)


def _on_processor(weight: torch.Tensor) -> bool:
    return weight.device.type == "cpu"


def _constant_of(node: Any, constants: dict[str, Any]) -> torch.Tensor | None:
    return constants[str(node.target)] if isinstance(node, Node) and node.op == "get_attr" else None


# ------------------------------------------------------------------------------ what need not be done


def _drop_modes(graph: Graph, constants: dict[str, Any]) -> None:
    """Switches of autograd: replays run without it."""
    for node in calls(graph, torch._C._set_grad_enabled):
        graph.erase_node(node)


def _fold(graph: Graph, constants: dict[str, Any]) -> None:
    """Compute now what depends on constants and known numbers alone, but for what is written into later: it has to be
    made anew each time.
    """
    written = _written(graph)
    for node in list(graph.nodes):
        inputs: list[Any] = node.all_input_nodes
        if (
            node.op != "call_function"
            or not (inputs or node.target in _MADE)
            or writes(node)
            or any(each.op != "get_attr" for each in inputs)
        ):
            continue
        if node in written or torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
            continue
        known = {each: constants[str(each.target)] for each in inputs}
        arguments, named = torch.fx.node.map_arg((node.args, node.kwargs), known.__getitem__)
        value = node.target(*arguments, **named)
        if isinstance(value, (torch.Tensor, list, tuple)):
            with graph.inserting_before(node):
                replace_node(node, constant(graph, constants, value, "folded"))


def _drop_idle(graph: Graph, constants: dict[str, Any]) -> None:
    """Conversions to what a tensor is already, slices of the whole, products with one, sums with zero, dropout that is
    off.
    """
    for node in calls(
        graph,
        _aten.to.dtype,
        _aten.to.device,
        _aten.slice.Tensor,
        _aten.mul.Tensor,
        _aten.add.Tensor,
        _aten.dropout.default,
    ):
        source, rest = node.args[0], node.args[1:]
        if node.target is _aten.slice.Tensor:
            idle = rest[1:] == (0, sys.maxsize)
        elif node.target is _aten.mul.Tensor:
            idle = rest == (1.0,) and value_of(node).dtype == value_of(source).dtype
        elif node.target is _aten.add.Tensor:
            idle = rest == (0,) and not node.kwargs and _is_integer(source)
        elif node.target is _aten.dropout.default:
            idle = rest[1] is False
        else:
            idle = (value_of(node).dtype, value_of(node).device) == (value_of(source).dtype, value_of(source).device)
        if idle:
            node.replace_all_uses_with(source)
            graph.erase_node(node)


def _is_integer(node: Any) -> bool:
    return (
        isinstance(node, Node) and isinstance(value_of(node), torch.Tensor) and not value_of(node).is_floating_point()
    )


def _share(graph: Graph, constants: dict[str, Any]) -> None:
    """The same view of the same tensor, and the same sum or selection of tensors that nobody writes into, is made once."""
    seen: dict[Any, Node] = {}
    written = _written(graph)
    for node in calls(graph, *_VIEWS, *_PURE, *_MADE):
        if node.target not in _VIEWS and any(
            base in written for each in (node, *node.all_input_nodes) for base in _bases(each)
        ):
            continue
        key = (node.target, repr(node.args), repr(node.kwargs))  # a node's repr is its name, which is unique
        if key in seen:
            replace_node(node, seen[key])
        else:
            seen[key] = node


def _written(graph: Graph) -> set[Node]:
    """What some operation writes into, and what that may be a view of."""
    mutating = (node for node in graph.nodes if node.args and node.op not in ("placeholder", "output") and writes(node))
    return {base for node in mutating for base in _bases(node.args[0])}


def _bases(node: Any) -> Iterator[Node]:
    """What a tensor may be a view of, itself included."""
    while isinstance(node, Node):
        yield node
        node = node.args[0] if is_call(node, *_VIEWS, *_METHODS, operator.getitem) else None


# ------------------------------------------------------------------------------ norms and rotations


def _fuse_norms(graph: Graph, constants: dict[str, Any]) -> None:
    """``w * (x * rsqrt(mean(x ** 2) + eps))`` is the norm of a layer whose mean is zero: that of x and -x together,
    half of which is kept.

    PyTorch has one kernel for that norm on the CPU, and seven for the root mean square's. On a GPU it has one for this
    norm too.
    """
    for node in calls(graph, _aten.rms_norm.default):
        x, shape, weight, eps = (*node.args, None, None)[:4]
        if _constant_of(weight, constants) is not None and isinstance(eps, float) and len(shape) == 1:
            _norm(graph, constants, node, x, weight, eps)
    for root in calls(graph, _aten.rsqrt.default):
        raised = root.args[0]
        if not is_call(raised, _aten.add.Tensor) or not isinstance(raised.args[1], float):
            continue
        mean = raised.args[0]
        if (
            not is_call(mean, _aten.mean.dim)
            or mean.args[1] != [-1]
            or not is_call(mean.args[0], _aten.pow.Tensor_Scalar)
            or mean.args[0].args[1] != 2
        ):
            continue
        x = mean.args[0].args[0]
        scaled = only_user(root, _aten.mul.Tensor)
        if scaled is None or x not in scaled.args:
            continue
        # In half precision the square is taken of a copy in float32, and what is scaled is rounded before it is
        # weighed.
        rounded = only_user(scaled, _aten.to.dtype)
        inner = scaled if rounded is None else rounded
        outer = only_user(inner, _aten.mul.Tensor)
        weight = None if outer is None else outer.args[1] if outer.args[0] is inner else outer.args[0]
        if (
            rounded is not None
            and is_call(x, _aten.to.dtype)
            and value_of(x.args[0]).dtype.itemsize < value_of(x).dtype.itemsize
        ):
            x = x.args[0]
        if is_call(x, _aten.to.dtype) and value_of(x.args[0]).dtype.itemsize > value_of(x).dtype.itemsize:
            continue  # a float64 pass through a float32 norm: another kernel would round it in another way
        if outer is None or _constant_of(weight, constants) is None or value_of(outer).dtype != value_of(x).dtype:
            continue
        if value_of(weight).shape != value_of(x).shape[-1:]:
            continue
        _norm(graph, constants, outer, x, weight, raised.args[1])


def _norm(graph: Graph, constants: dict[str, Any], old: Any, x: Any, weight: Any, eps: float) -> None:
    """Put the norm of x in the place of a node."""
    scale = constants[weight.target].detach()
    if not _on_processor(scale):
        with graph.inserting_before(old):
            replace_node(old, graph.call_function(torch.rms_norm, (x, (len(scale),), weight, eps)))
        return
    with graph.inserting_before(old):
        signs = constant(
            graph, constants, torch.tensor([[1.0], [-1.0]], dtype=scale.dtype, device=scale.device), "mirror"
        )
        twice = constant(graph, constants, torch.stack([scale, scale]), "scale")
        mirrored = graph.call_function(torch.mul, (graph.call_method("unsqueeze", (x, -2)), signs))
        whole = graph.call_function(torch.layer_norm, (mirrored, (2, len(scale)), twice, None, eps))
        replace_node(old, graph.call_method("select", (whole, -2, 0)))


def _fuse_rotations(graph: Graph, constants: dict[str, Any]) -> None:
    """``x * cos + cat(-second half, first half) * sin`` is ``x * cos + roll(x, half) * signed sin``, and the sines are
    signed once.
    """
    signed: dict[Node, Node] = {}
    for turned in calls(graph, _aten.cat.default):
        parts = turned.args[0]
        if len(parts) != 2 or turned.args[1:] != (-1,) or not is_call(parts[0], _aten.neg.default):
            continue
        x, half = _halved(parts[1], parts[0].args[0])
        product = only_user(turned, _aten.mul.Tensor)
        total = None if product is None else only_user(product, _aten.add.Tensor)
        if x is None or product is None or total is None or len(total.args) != 2 or total.kwargs:
            continue
        sine, straight = product.args[product.args[0] is turned], total.args[total.args[0] is product]
        if (
            not isinstance(sine, Node)
            or not is_call(straight, _aten.mul.Tensor)
            or x not in straight.args
            or value_of(sine).shape[-1] != 2 * half
        ):
            continue
        if sine not in signed:
            with graph.inserting_after(sine):
                signs = constant(
                    graph, constants, torch.cat([-torch.ones(half), torch.ones(half)]).to(value_of(sine)), "signs"
                )
            with graph.inserting_after(signs):
                signed[sine] = graph.call_function(torch.mul, (sine, signs))
            signed[sine].meta["val"] = value_of(sine)
        with graph.inserting_before(total):
            rolled = graph.call_function(torch.roll, (x, half, -1))
            replace_node(total, graph.call_function(torch.addcmul, (straight, rolled, signed[sine])))


def _join_rotations(graph: Graph, constants: dict[str, Any]) -> None:
    """Queries and keys that are neighbours in a joined product and turn by the same angles are turned in one go, as if
    they were more heads.
    """
    before: dict[object, tuple[Any, int, Any]] = {}
    for total in calls(graph, torch.addcmul):
        straight, rolled, sine = total.args
        x = rolled.args[0]
        seen: Any = x.args[0] if is_call(x, _aten.transpose.int) and x.args[1:] == (1, 2) else None
        part: Any = (
            seen.args[0]
            if is_call(seen, _aten.view.default, _aten.reshape.default) and len(seen.args[1]) == 4
            else None
        )
        if (getattr(part, "op", None), getattr(part, "target", None)) != ("call_method", "narrow"):
            continue
        (whole, _, start, length), heads = part.args, value_of(x).shape[1]
        cosine, (rows, columns, _, width) = straight.args[straight.args[0] is x], seen.args[1]
        key = (whole, rows, columns, width, cosine, sine, rolled.args[1:])
        if key not in before or before[key][1] != start:
            before[key] = total, start + length, (start, heads)
            continue
        first, end, (start, others) = before.pop(key)
        with graph.inserting_before(first):
            both = graph.call_method("narrow", (whole, -1, start, end + length - start))
            turned = graph.call_method(
                "transpose", (graph.call_method("reshape", (both, [rows, columns, others + heads, width])), 1, 2)
            )
            straight = graph.call_function(torch.mul, (turned, cosine))
            joined = graph.call_function(
                torch.addcmul, (straight, graph.call_function(torch.roll, (turned, *rolled.args[1:])), sine)
            )
            parts = [
                graph.call_method("narrow", (joined, 1, at, count)) for at, count in ((0, others), (others, heads))
            ]
        replace_node(first, parts[0])
        replace_node(total, parts[1])


def _halved(first: Any, second: Any) -> tuple[Any, int]:
    """The tensor that these are the halves of along its last dimension, and half its size; None if they are not."""
    whole: Any = first.args[0] if isinstance(first, Node) and first.args else None
    if not isinstance(whole, Node) or not isinstance(second, Node) or second.args[0] is not whole:
        return None, 0
    if is_call(first, operator.getitem) and is_call(second, operator.getitem):  # of a chunk into two
        if (
            not is_call(whole, _aten.chunk.default)
            or whole.args[1:] != (2, -1)
            or (first.args[1], second.args[1]) != (0, 1)
        ):
            return None, 0
        return whole.args[0], value_of(whole.args[0]).shape[-1] // 2
    size, last = value_of(whole).shape[-1], value_of(whole).ndim - 1
    if (
        not is_call(first, _aten.slice.Tensor)
        or not is_call(second, _aten.slice.Tensor)
        or not isinstance(size, int)
        or size % 2
    ):
        return None, 0
    fits = first.args[1:] == (last, 0, size // 2) and second.args[1:] in (
        (last, size // 2, sys.maxsize),
        (last, size // 2, size),
    )
    return (whole, size // 2) if fits else (None, 0)


# ------------------------------------------------------------------------------ products


def _lay_out_products(graph: Graph, constants: dict[str, Any], layouts: Layouts) -> None:
    """Products with constant weights: those of one input in one, in the layout that is fastest for the number of rows.

    So queries, keys and values are one product, and so are gate and up. An addition behind a product becomes part of
    it.
    """
    groups: dict[object, list[Any]] = {}
    for node in calls(graph, _aten.linear.default):
        weight = _constant_of(node.args[1], constants)
        if weight is not None:
            groups.setdefault(node.args[0] if len(node.args) == 2 else node, []).append(node)
    for nodes in groups.values():
        if len(nodes) == 1:
            _lay_out(graph, constants, layouts, nodes[0], (constants[nodes[0].args[1].target],))
            continue
        weights = tuple(constants[node.args[1].target] for node in nodes)
        ends = list(itertools.accumulate(len(weight) for weight in weights))
        with graph.inserting_before(nodes[0]):
            whole = graph.call_function(_aten.linear.default, nodes[0].args)
            whole.meta["val"] = torch.cat([value_of(node) for node in nodes], dim=-1)
            parts = [
                graph.call_method("narrow", (whole, -1, end - len(each), len(each)))
                for end, each in zip(ends, weights, strict=True)
            ]
        for node, part in zip(nodes, parts, strict=True):
            replace_node(node, part)
        _lay_out(graph, constants, layouts, whole, weights)


def _layout(weights: tuple[torch.Tensor, ...], one_row: bool) -> Layout:
    """The layout that is fastest on the processors tried; elsewhere the libraries pick by themselves."""
    if not _on_processor(weights[0]):
        return "plain"
    packs = (
        weights[0].dtype == torch.float32
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )
    if packs and sum(weight.numel() for weight in weights) > _SMALL:
        return "packed"
    return "turned" if packs or one_row else "plain"


def _lay_out(
    graph: Graph, constants: dict[str, Any], layouts: Layouts, node: Any, weights: tuple[torch.Tensor, ...]
) -> None:
    x, bias, shape = node.args[0], node.args[2] if len(node.args) > 2 else None, value_of(node).shape
    kind = _layout(weights, one_row=all(size == 1 for size in shape[:-1]))
    if kind == "plain" and len(weights) == 1:
        return
    total = only_user(node, _aten.add.Tensor) if kind == "packed" else None
    other = None if total is None or len(total.args) != 2 or total.kwargs else total.args[total.args[0] is node]
    if (
        total is not None
        and isinstance(other, Node)
        and (value_of(other).shape, value_of(other).dtype) == (shape, weights[0].dtype)
    ):
        with graph.inserting_before(total):
            weight = constant(graph, constants, layouts.of(weights, kind), kind)
            replace_node(
                total, graph.call_function(torch.ops.mkldnn._linear_pointwise.binary, (x, other, weight, bias, "add"))
            )
        graph.erase_node(node)
        return
    with graph.inserting_before(node):
        weight = constant(graph, constants, layouts.of(weights, kind), kind)
        if kind == "packed":
            replace_node(
                node, graph.call_function(torch.ops.mkldnn._linear_pointwise.default, (x, weight, bias, "none", [], ""))
            )
        else:
            replace_node(node, graph.call_function(torch._C._nn.linear, (x, weight, bias)))


# ------------------------------------------------------------------------------ calls


_METHODS = {
    _aten.view.default: "reshape",  # a part of a joined product is no longer contiguous
    _aten.reshape.default: "reshape",
    _aten.transpose.int: "transpose",
    _aten.unsqueeze.default: "unsqueeze",
    _aten.select.int: "select",
    _aten.copy_.default: "copy_",
    _aten.flatten.using_ints: "flatten",
    _aten.unbind.int: "unbind",
    _aten.expand.default: "expand",
}  # fmt: skip
_FUNCTIONS = {
    _aten.mul.Tensor: torch.mul, _aten.add.Tensor: torch.add, _aten.silu.default: torch._C._nn.silu, _aten.cat.default: torch.cat,
    _aten.cos.default: torch.cos, _aten.sin.default: torch.sin, _aten.stack.default: torch.stack, _aten.linear.default: torch._C._nn.linear,
    _aten.scaled_dot_product_attention.default: torch._C._nn.scaled_dot_product_attention, _aten.embedding.default: torch.embedding,
    _aten.topk.default: torch.topk, _aten.index_select.default: torch.index_select, _aten.pad.default: torch._C._nn.pad,
}  # fmt: skip


def _call_methods(graph: Graph, constants: dict[str, Any]) -> None:
    """Call plain functions and methods: through an operator's overload every call costs a microsecond or two more."""
    for node in calls(graph, *_METHODS, *_FUNCTIONS, _aten.slice.Tensor):
        if node.target in _METHODS and not node.kwargs:
            with graph.inserting_before(node):
                replace_node(node, graph.call_method(_METHODS[node.target], node.args))
        elif node.target is _aten.slice.Tensor and len(node.args) == 4:
            source, dimension, start, stop = node.args
            size = value_of(node).shape[dimension]
            known = isinstance(size, int) and isinstance(start, int) and start >= 0
            if not known and not isinstance(stop, Node):
                continue
            with graph.inserting_before(node):
                length = size if known else stop if start == 0 else graph.call_function(operator.sub, (stop, start))
                replace_node(node, graph.call_method("narrow", (source, dimension, start, length)))
        elif node.target in _FUNCTIONS:
            node.target = _FUNCTIONS[node.target]
