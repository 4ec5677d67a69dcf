"""Draft trees as the official code lays them out, compared with its recorded buffers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any

from koala_bench.interop.checkpoints import Fields
from koala_bench.parity.shared import Check, first_difference, judge
from koala_bench.tree import TreeShape, TreeTemplate

_TABLE_WIDTH = 10  # upstream's TOPK: candidates kept per head (Medusa) or per inner node (EAGLE)


def template_of(buffers: Fields, key: str) -> TreeTemplate:
    """The tree of recorded buffers; ``key`` is the field with its paths."""
    return TreeTemplate.of(str(buffers.get("tree", key)), buffers[key])


def leaf_rows(shape: TreeShape, sort: bool) -> list[list[int]]:
    """Leaf paths padded with -1, in upstream's order: Medusa lists the last leaf first, EAGLE sorts the rows."""
    paths = [list(path) for path in reversed(shape.leaf_paths)]
    if sort:
        paths.sort(key=lambda path: path + [shape.nodes] * (shape.nodes - len(path)))  # padding sorts last
    return _padded(paths)


def dynamic_rows(shape: TreeShape) -> list[list[int]]:
    """Leaf paths padded with -1 in the order of EAGLE-2, which is that of the leaves."""
    return _padded(shape.leaf_paths)


def _padded(paths: Sequence[Sequence[int]]) -> list[list[int]]:
    width = max(map(len, paths))
    return [[*path, *[-1] * (width - len(path))] for path in paths]


def _inner_nodes(shape: TreeShape) -> list[int]:
    return [node for node, below in enumerate(shape.children) if below]


def _draft_levels(template: TreeTemplate) -> list[dict[str, Any]]:
    """Upstream's buffers for drafting each level; indices count only parents of inner nodes (``utils_c.py``)."""
    shape = template.shape
    inner = _inner_nodes(shape)[1:]
    levels = []
    for depth in range(1, template.depth):
        level = [node for node in inner if shape.depths[node] == depth]
        seen = [node for node in inner if shape.depths[node] <= depth]
        parents = [list(group) for _, group in groupby(level, key=lambda node: shape.parents[node])]
        ranks_by_parent = [[template.paths[node - 1][-1] for node in group] for group in parents]
        levels.append({
            "attn_mask": shape.ancestors[level][:, seen].int().tolist(),
            "tree_indices": [rank + _TABLE_WIDTH * row for row, ranks in enumerate(ranks_by_parent) for rank in ranks],
            "position_ids": [0] * len(level),
            "repeat_nums": [len(group) for group in parents],
        })  # fmt: skip
    return levels


_MISDRAFTED = (
    "in this tree an inner node whose children are all leaves stands before one with inner children; upstream then"
    " drafts from the wrong parent"
)


def _misdrafted(template: TreeTemplate) -> bool:
    """Whether upstream numbers the parents of this tree wrongly: it counts only those with inner children."""
    shape = template.shape
    inner = _inner_nodes(shape)
    grows = [(shape.depths[node], any(child in inner for child in shape.children[node])) for node in inner]
    levels = [[flag for at, flag in grows if at == depth] for depth in range(1, template.depth - 1)]
    return any(level != sorted(level, reverse=True) for level in levels)


def excuse_misdrafted(checks: Sequence[Check], template: TreeTemplate) -> list[Check]:
    """Draft checks are excused where upstream's drafts are wrong; its text is still the target's own."""
    if not _misdrafted(template):
        return list(checks)
    return [
        replace(each, status="unsupported", detail=_MISDRAFTED)
        if each.status == "fail" and not each.name.endswith("generated_ids")
        else each
        for each in checks
    ]


def compare_buffers(
    part: str, buffers: Fields, template: TreeTemplate, names: dict[str, str], eagle_like: bool
) -> list[Check]:
    """Compare mask, indices, depths and leaf paths; ``names`` says how the recordings call mask and depths."""
    shape = template.shape
    tables = {node: row for row, node in enumerate(_inner_nodes(shape))}
    # A table of candidates for every inner node, or one for every head.
    rows = [tables[shape.parents[node]] if eagle_like else shape.depths[node] - 1 for node in range(1, shape.nodes)]
    ours: dict[str, Any] = {
        names["mask"]: shape.ancestors.int().tolist(),
        "tree_indices": [0, *(p[-1] + _TABLE_WIDTH * row + 1 for p, row in zip(template.paths, rows, strict=True))],
        names["depths"]: list(shape.depths),
        "retrieve_indices": leaf_rows(shape, eagle_like),
    }
    if eagle_like and "draft_levels" in buffers:
        ours["draft_levels"] = _draft_levels(template)
    faults = {
        name: [] if buffers[name] == value else [first_difference(name, value, buffers[name])]
        for name, value in ours.items()
    }
    return [judge(f"{part}/{name}", faults[name], f"{len(value)} rows are equal") for name, value in ours.items()]


def row_of(rows: Sequence[Sequence[int]], path: Sequence[int]) -> int:
    """The lowest row that begins with a path."""
    return next(index for index, row in enumerate(rows) if list(row[: len(path)]) == list(path))
