"""Draft trees with the acceptance of every node, counted from a record and laid out for drawing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from koala_bench.records.reading import Run
from koala_bench.records.schema import node_depths

_ACROSS, _DOWN, _MARGIN = 96, 21, 16  # pixels between levels and between leaves, and around


@dataclass(frozen=True)
class Node:
    """A node of a drawn tree.

    Attributes:
        path: child ranks from the root, such as ``0.1``; ``root`` for the root.
        x, y: its place in pixels.
        parent: the place of its parent, None for the root.
        share: fraction of the steps whose accepted path goes through it.
        given_parent: the same among steps whose path goes through its parent; None if there was none.
        steps: number of steps that accepted it.
    """

    path: str
    x: int
    y: int
    parent: tuple[int, int] | None
    share: float
    given_parent: float | None
    steps: int


@dataclass(frozen=True)
class TreeDrawing:
    """A method's tree, ready to be drawn.

    Attributes:
        steps: that drafted it.
        width, height: pixels.
    """

    method: str
    name: str
    steps: int
    nodes: Sequence[Node]
    width: int
    height: int


def draw_trees(run: Run) -> list[TreeDrawing]:
    """The trees of a record's methods that draft and whose steps record the last accepted node."""
    found = []
    for name, method in run.methods.items():
        kept = [
            node
            for turn in run.turns_of(name)
            for node, depth in zip(turn["kept_node"] or [], turn["drafted_depth"] or [], strict=False)
            if depth  # a step without room for a draft does not count
        ]
        tree = method["tree"]
        if kept and tree is not None and tree["parents"] is not None:
            found.append(_drawing(name, tree["name"], tree["parents"], kept))
    return found


def _drawing(method: str, name: str, parents: Sequence[int], kept: Sequence[int]) -> TreeDrawing:
    through = [0] * len(parents)
    for node in kept:
        through[node] += 1
    for node in range(len(parents) - 1, 0, -1):  # parents come before children
        through[parents[node]] += through[node]
    children = [[child for child, parent in enumerate(parents) if parent == node] for node in range(len(parents))]
    rows, paths = _rows(children), [""] * len(parents)
    for node, below in enumerate(children):
        for rank, child in enumerate(below):
            paths[child] = f"{paths[node]}.{rank}".lstrip(".")
    depths = node_depths(parents)
    across, down = ([_MARGIN + _ACROSS * depth for depth in depths], [round(_MARGIN + _DOWN * row) for row in rows])
    places = list(zip(across, down, strict=True))
    nodes = [
        Node(
            paths[node] or "root", *places[node], places[parents[node]] if node else None, through[node] / len(kept),
            through[node] / through[parents[node]] if node and through[parents[node]] else None, through[node],
        )
        for node in range(len(parents))
    ]  # fmt: skip
    width, height = _ACROSS * (max(depths) + 1) + _MARGIN, round(_DOWN * max(rows)) + 2 * _MARGIN
    return TreeDrawing(method, name, len(kept), nodes, width, height)


def _rows(children: Sequence[Sequence[int]]) -> list[float]:
    """The row of each node: one per leaf, a parent midway between its children."""
    rows, leaves = [0.0] * len(children), 0
    order, stack = [], [0]
    while stack:
        order.append(node := stack.pop())
        stack += reversed(children[node])
    for node in order:
        if not children[node]:
            rows[node], leaves = float(leaves), leaves + 1
    for node in reversed(order):
        if children[node]:
            rows[node] = (rows[children[node][0]] + rows[children[node][-1]]) / 2
    return rows
