"""Helpers of the graph passes for reading and replacing nodes of a ``torch.fx`` graph."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.fx import Graph, Node


def writes(node: Node) -> bool:
    """Whether a node mutates its inputs, so that it must stay even if its result is unused."""
    if node.op in ("placeholder", "output"):
        return True
    if node.op == "call_method":
        return str(node.target).endswith("_")
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def calls(graph: Graph, *targets: Any) -> Iterator[Any]:
    """The nodes that call one of the targets, collected before any is rewritten."""
    yield from [node for node in graph.nodes if node.op == "call_function" and node.target in targets]


def is_call(node: Any, *targets: Any) -> bool:
    """Whether a node calls one of the targets."""
    return isinstance(node, Node) and node.op == "call_function" and node.target in targets


def value_of(node: Any) -> Any:
    """A node's result while tracing: a fake tensor, whose sizes may be symbolic."""
    return node.meta["val"]


def replace_node(old: Node, new: Node) -> None:
    """Replace a node by another."""
    new.meta.setdefault("val", old.meta.get("val"))
    old.replace_all_uses_with(new)
    old.graph.erase_node(old)


def constant(graph: Graph, constants: dict[str, Any], value: Any, name: str) -> Node:
    """A node for a new constant, at the graph's insertion point; its name starts with ``name``."""
    key = f"{name}_{len(constants)}"
    constants[key] = value
    node = graph.create_node("get_attr", key)
    node.meta["val"] = value
    return node


def only_user(node: Node, target: Any) -> Any:
    """The only user of a node, if it calls the target; else None."""
    users = list(node.users)
    return users[0] if len(users) == 1 and is_call(users[0], target) else None
