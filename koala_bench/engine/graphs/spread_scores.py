"""Graph pass that takes the top-k of a head's draft vocabulary, not of the target's.

A draft vocabulary spreads a head's scores over the target's tokens (``common.draft_vocabulary``) and gives the others
-inf, so that readers need not know it. Most readers only take the top k, which those others are never among.
"""

from __future__ import annotations

import math
import operator
from typing import Any

import torch
from torch.fx import Graph, Node

from koala_bench.engine.graphs.nodes import calls, is_call, replace_node, value_of

_aten = torch.ops.aten


def pick_before_spreading(graph: Graph, constants: dict[str, Any]) -> None:
    """``topk`` of spread scores, or of their log-probabilities, as the ids of a ``topk`` of the scores themselves."""
    for node in calls(graph, _aten.topk.default):
        scores, count, *more = node.args
        softmax = scores if is_call(scores, _aten.log_softmax.int) and scores.args[1] in (-1, _last(scores)) else None
        spread: Any = scores if softmax is None else softmax.args[0]
        if not _spreads(spread) or (more or [-1])[0] not in (-1, _last(scores)) or more[1:2] == [False]:
            continue
        ids, own = spread.args[2], spread.args[3]
        drafted = value_of(own).shape[-1]
        if not isinstance(drafted, int) or count > drafted:
            continue
        with graph.inserting_before(node):
            if softmax is not None:
                own = _like(scores, graph.call_function(scores.target, (own, *scores.args[1:]), scores.kwargs))
            top = _like(node, graph.call_function(node.target, (own, count, *more), node.kwargs))
        for part in list(node.users):
            if is_call(part, operator.getitem) and part.args[1] == 1:
                with graph.inserting_before(part):
                    places = _like(part, graph.call_function(operator.getitem, (top, 1)))
                    replace_node(part, graph.call_function(_aten.take.default, (ids, places)))
        replace_node(node, top)


def _spreads(node: Any) -> bool:
    """Whether scores are copied into a row of -inf, as ``DraftVocabulary.spread`` does."""
    if not is_call(node, _aten.index_copy.default) or node.args[1] not in (-1, _last(node)):
        return False
    blank, ids = node.args[0], node.args[2]
    impossible = is_call(blank, _aten.new_full.default) and blank.args[2] == -math.inf
    return impossible and isinstance(ids, Node) and ids.op == "get_attr"


def _last(node: Any) -> int:
    return int(value_of(node).ndim) - 1


def _like(old: Node, new: Node) -> Node:
    new.meta.setdefault("val", old.meta.get("val"))
    return new
