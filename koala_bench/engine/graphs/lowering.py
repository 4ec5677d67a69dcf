"""Graph passes over traces: joined and laid out linear layers, fused norms and rotary embeddings, fewer operations.

Every rewrite is an identity of real numbers; in floating point only the order of some sums changes. Patterns are
matched on aten operations, whatever the model; what does not match stays as traced.
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

from koala_bench.engine.graphs import cpu_kernels
from koala_bench.engine.graphs.nodes import calls, constant, is_call, only_user, replace_node, value_of, writes
from koala_bench.engine.graphs.spread_scores import pick_before_spreading
from koala_bench.engine.processor import kernels

_aten = torch.ops.aten
_ROWS_HINT = 8  # batch size that prepacking assumes; any number works
# Weights of up to so many elements are slower in oneDNN's layout (measured on AMD EPYC). One layout for all batch sizes
# keeps a single copy of the weights in memory and in the processor's cache.
_PACK_ABOVE = 50_000
_FACTORIES = frozenset({_aten.arange.default, _aten.ones.default})
Layout = Literal["plain", "column_major", "packed", "blocks"]
# Views and sizes, which common subexpression elimination may merge always; pure operations unless inputs are mutated.
_VIEWS = frozenset({
    _aten.unsqueeze.default, _aten.select.int, _aten.slice.Tensor, _aten.transpose.int, _aten.view.default,
    _aten.sym_size.int, _aten.t.default,
})  # fmt: skip
_PURE = frozenset({_aten.add.Tensor, _aten.mul.Tensor, _aten.index_select.default})


class Layouts:
    """Weights in the layouts that linear layers read, shared by all traces, so that the processor caches them once.

    Attributes:
        recordings: number of traces and captures.
    """

    def __init__(self) -> None:
        self.recordings = 0
        self._known: dict[tuple[object, ...], tuple[tuple[torch.Tensor, ...], torch.Tensor]] = {}

    def count(self) -> None:
        """Count one more trace or capture."""
        self.recordings += 1

    def of(self, weights: tuple[torch.Tensor, ...], layout: Layout) -> torch.Tensor:
        """Weights concatenated to [all rows, columns].

        Args:
            layout: ``packed`` is oneDNN's own, opaque; ``blocks`` is that of ``koala_bench.engine.processor``.
        """
        key = (layout, *((id(weight), 0 if weight.is_inference() else weight._version) for weight in weights))
        if key not in self._known:
            with torch.inference_mode(False):  # an ordinary tensor, of which a parameter can be a view
                whole = torch.cat([weight.detach() for weight in weights]) if len(weights) > 1 else weights[0].detach()
            if len(weights) > 1 and not _on_processor(whole):
                # GPU memory may not hold a large model twice: the weights become views of the whole.
                for weight, part in zip(weights, whole.split([len(weight) for weight in weights]), strict=True):
                    weight.data = part
            if layout == "column_major":
                whole = whole.t().contiguous().t()
            elif layout == "packed":
                whole = torch.ops.mkldnn._reorder_linear_weight(whole.contiguous(), _ROWS_HINT)
            elif layout == "blocks":
                whole = kernels.in_blocks(whole)
            self._known[key] = (weights, whole)  # keeps the weights alive, so that their ids are not reused
        return self._known[key][1]


def lower(graph: Graph, constants: dict[str, Any], layouts: Layouts) -> dict[str, Any]:
    """Rewrite a graph in place; returns the constants that it reads afterwards, by name.

    Args:
        graph: of aten operations, as ``make_fx`` traces them before dispatch, with ``meta["val"]``.
        constants: values of its ``get_attr`` nodes.
        layouts: shared with other graphs that read the same weights.
    """
    constants = dict(constants)
    layouts.count()
    lay_out = partial(_lay_out_products, layouts=layouts)
    steps: tuple[Callable[[Graph, dict[str, Any]], None], ...] = (
        _drop_grad_modes, _merge_duplicates, _fold_constants, _drop_no_ops, _merge_duplicates, _fuse_norms,
        _fuse_rotations, pick_before_spreading, lay_out, _join_rotations, *_kernels(constants), _call_methods,
    )  # fmt: skip
    for step in steps:
        step(graph, constants)
        graph.eliminate_dead_code(is_impure_node=writes)
    graph.lint()
    used = {str(node.target) for node in graph.nodes if node.op == "get_attr"}
    return {name: value for name, value in constants.items() if name in used}


def _kernels(constants: dict[str, Any]) -> tuple[Callable[[Graph, dict[str, Any]], None], ...]:
    """The pass that inserts our own kernels: C on the CPU, Triton where it is installed and the GPU has both half
    precisions."""
    weights = [value for value in constants.values() if isinstance(value, torch.Tensor) and value.is_floating_point()]
    if weights and all(map(_on_processor, weights)) and kernels.available():
        return (cpu_kernels.fuse,)
    if not weights or any(map(_on_processor, weights)) or importlib.util.find_spec("triton") is None:
        return ()
    if weights[0].device.type == "cuda" and torch.cuda.get_device_capability(weights[0].device) < (8, 0):
        return ()
    from koala_bench.engine.graphs.gpu_kernels import fuse  # needs Triton

    return (fuse,)


def _on_processor(weight: torch.Tensor) -> bool:
    return weight.device.type == "cpu"


def _constant_of(node: Any, constants: dict[str, Any]) -> torch.Tensor | None:
    return constants[str(node.target)] if isinstance(node, Node) and node.op == "get_attr" else None


# ------------------------------------------------------------------------------ redundant operations


def _drop_grad_modes(graph: Graph, constants: dict[str, Any]) -> None:
    """Remove autograd switches: replays run without autograd."""
    for node in calls(graph, torch._C._set_grad_enabled):
        graph.erase_node(node)


def _fold_constants(graph: Graph, constants: dict[str, Any]) -> None:
    """Constant folding, except for tensors that are written into later."""
    written = _written(graph)
    for node in list(graph.nodes):
        inputs: list[Any] = node.all_input_nodes
        if node.op != "call_function" or writes(node) or not (inputs or node.target in _FACTORIES):
            continue
        if (
            any(each.op != "get_attr" for each in inputs)
            or node in written
            or torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
        ):
            continue
        known = {each: constants[str(each.target)] for each in inputs}
        arguments, named = torch.fx.node.map_arg((node.args, node.kwargs), known.__getitem__)
        value = node.target(*arguments, **named)
        if isinstance(value, (torch.Tensor, list, tuple)):
            with graph.inserting_before(node):
                replace_node(node, constant(graph, constants, value, "folded"))


def _drop_no_ops(graph: Graph, constants: dict[str, Any]) -> None:
    """Remove conversions to the same dtype, full slices, ``* 1``, ``+ 0`` and dropout that is off."""
    arithmetic = (_aten.mul.Tensor, _aten.add.Tensor)
    for node in calls(graph, _aten.to.dtype, _aten.to.device, _aten.slice.Tensor, *arithmetic, _aten.dropout.default):
        source, rest = node.args[0], node.args[1:]
        if node.target is _aten.slice.Tensor:
            no_op = rest[1:] == (0, sys.maxsize)
        elif node.target is _aten.mul.Tensor:
            no_op = rest == (1.0,) and value_of(node).dtype == value_of(source).dtype
        elif node.target is _aten.add.Tensor:
            no_op = rest == (0,) and not node.kwargs and _is_integer(source)
        elif node.target is _aten.dropout.default:
            no_op = rest[1] is False
        else:
            no_op = (value_of(node).dtype, value_of(node).device) == (value_of(source).dtype, value_of(source).device)
        if no_op:
            node.replace_all_uses_with(source)
            graph.erase_node(node)


def _is_integer(node: Any) -> bool:
    value = value_of(node) if isinstance(node, Node) else None
    return isinstance(value, torch.Tensor) and not value.is_floating_point()


def _merge_duplicates(graph: Graph, constants: dict[str, Any]) -> None:
    """Common subexpression elimination: of views, and of pure operations on tensors that are never written into."""
    seen: dict[Any, Node] = {}
    written = _written(graph)
    for node in calls(graph, *_VIEWS, *_PURE, *_FACTORIES):
        tensors = () if node.target in _VIEWS else (node, *node.all_input_nodes)
        if any(base in written for each in tensors for base in _bases(each)):
            continue
        key = (node.target, repr(node.args), repr(node.kwargs))  # a node's repr is its name, which is unique
        if key in seen:
            replace_node(node, seen[key])
        else:
            seen[key] = node


def _written(graph: Graph) -> set[Node]:
    """Tensors that some operation writes into, and those they may be views of."""
    mutating = (node for node in graph.nodes if node.args and node.op not in ("placeholder", "output") and writes(node))
    return {base for node in mutating for base in _bases(node.args[0])}


def _bases(node: Any) -> Iterator[Node]:
    """The tensors that this one may be a view of, itself included."""
    while isinstance(node, Node):
        yield node
        node = node.args[0] if is_call(node, *_VIEWS, *_METHODS, operator.getitem) else None


# ------------------------------------------------------------------------------ norms and rotations


def _fuse_norms(graph: Graph, constants: dict[str, Any]) -> None:
    """RMS norm, ``w * (x * rsqrt(mean(x ** 2) + eps))``, as one kernel.

    On the CPU one of our own in float32, else the layer norm of [x, -x], whose mean is zero, half of which is kept:
    PyTorch has one kernel for layer norms there and seven for RMS norms. On a GPU ``torch.rms_norm``.
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
        if not is_call(mean, _aten.mean.dim) or mean.args[1] != [-1]:
            continue
        square = mean.args[0]
        if not is_call(square, _aten.pow.Tensor_Scalar) or square.args[1] != 2:
            continue
        x = square.args[0]
        scaled = only_user(root, _aten.mul.Tensor)
        if scaled is None or x not in scaled.args:
            continue
        # In half precision x is a float32 copy, and the scaled result is rounded before it is multiplied by the weight.
        rounded = only_user(scaled, _aten.to.dtype)
        inner = scaled if rounded is None else rounded
        outer = only_user(inner, _aten.mul.Tensor)
        weight = None if outer is None else outer.args[1] if outer.args[0] is inner else outer.args[0]
        if rounded is not None and _is_cast(x, operator.lt):
            x = x.args[0]
        if _is_cast(x, operator.gt):
            continue  # a float32 norm of a float64 pass: another kernel would round it differently
        if outer is None or _constant_of(weight, constants) is None or value_of(outer).dtype != value_of(x).dtype:
            continue
        if value_of(weight).shape != value_of(x).shape[-1:]:
            continue
        _norm(graph, constants, outer, x, weight, raised.args[1])


def _is_cast(node: Any, compare: Callable[[int, int], bool]) -> bool:
    """Whether a node converts from a dtype whose size compares so with its own."""
    if not is_call(node, _aten.to.dtype):
        return False
    return compare(value_of(node.args[0]).dtype.itemsize, value_of(node).dtype.itemsize)


def _norm(graph: Graph, constants: dict[str, Any], old: Any, x: Any, weight: Any, eps: float) -> None:
    """Replace a node by the RMS norm of x."""
    scale = constants[weight.target].detach()
    if not _on_processor(scale):
        with graph.inserting_before(old):
            replace_node(old, graph.call_function(torch.rms_norm, (x, (len(scale),), weight, eps)))
        return
    if (value_of(x).dtype, scale.dtype) == (torch.float32, torch.float32) and kernels.available():
        with graph.inserting_before(old):
            replace_node(old, graph.call_function(kernels.rms_norm, (x, weight, eps)))
        return
    with graph.inserting_before(old):
        signs = constant(graph, constants, scale.new_tensor([[1.0], [-1.0]]), "mirror")
        twice = constant(graph, constants, torch.stack([scale, scale]), "scale")
        mirrored = graph.call_function(torch.mul, (graph.call_method("unsqueeze", (x, -2)), signs))
        whole = graph.call_function(torch.layer_norm, (mirrored, (2, len(scale)), twice, None, eps))
        replace_node(old, graph.call_method("select", (whole, -2, 0)))


def _fuse_rotations(graph: Graph, constants: dict[str, Any]) -> None:
    """Rotary embedding: ``x * cos + cat(-second half, first half) * sin`` becomes ``x * cos + roll(x, half) * sin'``,
    with the signs in sin', made once."""
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
    """Rotate queries and keys of one joined linear layer together, as if they were more heads."""
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
    """The tensor whose halves along the last dimension these are, and their size; None if they are not."""
    whole: Any = first.args[0] if isinstance(first, Node) and first.args else None
    if not isinstance(whole, Node) or not isinstance(second, Node) or second.args[0] is not whole:
        return None, 0
    if is_call(first, operator.getitem) and is_call(second, operator.getitem):  # of a chunk into two
        halves = is_call(whole, _aten.chunk.default) and whole.args[1:] == (2, -1)
        if not halves or (first.args[1], second.args[1]) != (0, 1):
            return None, 0
        return whole.args[0], value_of(whole.args[0]).shape[-1] // 2
    size, last = value_of(whole).shape[-1], value_of(whole).ndim - 1
    slices = is_call(first, _aten.slice.Tensor) and is_call(second, _aten.slice.Tensor)
    if not slices or not isinstance(size, int) or size % 2:
        return None, 0
    half = size // 2
    ends = ((last, half, sys.maxsize), (last, half, size))
    return (whole, half) if first.args[1:] == (last, 0, half) and second.args[1:] in ends else (None, 0)


# ------------------------------------------------------------------------------ linear layers


def _lay_out_products(graph: Graph, constants: dict[str, Any], layouts: Layouts) -> None:
    """Join linear layers of the same input (queries, keys and values; gate and up), each in the fastest weight layout.

    An addition after a linear layer is fused into it.
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
    """The fastest layout on the CPUs tried; on GPUs the libraries choose."""
    if not _on_processor(weights[0]):
        return "plain"
    if weights[0].dtype == torch.float32 and kernels.available():
        return "blocks"
    packs = (
        weights[0].dtype == torch.float32
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )
    if packs and sum(weight.numel() for weight in weights) > _PACK_ABOVE:
        return "packed"
    return "column_major" if packs or one_row else "plain"


def _lay_out(
    graph: Graph, constants: dict[str, Any], layouts: Layouts, node: Any, weights: tuple[torch.Tensor, ...]
) -> None:
    x, bias, shape = node.args[0], node.args[2] if len(node.args) > 2 else None, value_of(node).shape
    kind = _layout(weights, one_row=all(size == 1 for size in shape[:-1]))
    if kind == "plain" and len(weights) == 1:
        return
    total = only_user(node, _aten.add.Tensor) if kind in ("blocks", "packed") else None
    other = None if total is None or len(total.args) != 2 or total.kwargs else total.args[total.args[0] is node]
    alike = isinstance(other, Node) and (value_of(other).shape, value_of(other).dtype) == (shape, weights[0].dtype)
    added, last = (other, total) if total is not None and alike else (None, node)
    with graph.inserting_before(last):
        weight = constant(graph, constants, layouts.of(weights, kind), kind)
        if kind == "blocks":
            new = graph.call_function(kernels.linear, (x, weight, bias, added, sum(map(len, weights))))
        elif kind != "packed":
            new = graph.call_function(torch._C._nn.linear, (x, weight, bias))
        elif added is None:
            new = graph.call_function(torch.ops.mkldnn._linear_pointwise.default, (x, weight, bias, "none", [], ""))
        else:
            new = graph.call_function(torch.ops.mkldnn._linear_pointwise.binary, (x, added, weight, bias, "add"))
        replace_node(last, new)
    if last is not node:
        graph.erase_node(node)


# ------------------------------------------------------------------------------ calls


_METHODS = {
    _aten.view.default: "reshape",  # a slice of a joined output is not contiguous
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
    _aten.mul.Tensor: torch.mul, _aten.add.Tensor: torch.add, _aten.silu.default: torch._C._nn.silu,
    _aten.cat.default: torch.cat, _aten.cos.default: torch.cos, _aten.sin.default: torch.sin,
    _aten.stack.default: torch.stack, _aten.linear.default: torch._C._nn.linear,
    _aten.embedding.default: torch.embedding,
    _aten.scaled_dot_product_attention.default: torch._C._nn.scaled_dot_product_attention,
    _aten.topk.default: torch.topk, _aten.take.default: torch.take,
    _aten.index_select.default: torch.index_select, _aten.pad.default: torch._C._nn.pad,
}  # fmt: skip


def _call_methods(graph: Graph, constants: dict[str, Any]) -> None:
    """Call plain functions and methods: an operator overload costs a microsecond or two more per call."""
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
