"""Checks at load time that a target's tree passes equal its sequential passes.

A model that derives positions from the order of its rows, or ignores the mask, would silently decode branching trees
wrongly.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from koala_bench.common.hub_errors import first_line
from koala_bench.engine.cache import TreeCache
from koala_bench.engine.target import Target
from koala_bench.errors import KoalaBenchError
from koala_bench.tree import ROOT_ONLY, DraftTree, TreeShape

Verify = Callable[[DraftTree, TreeCache], tuple[torch.Tensor, torch.Tensor]]

_PROMPT = 8  # tokens
# The root's first children stand between it and the last path, so that a row's number is far from its position.
_ASIDE = 20
_BRANCHING = TreeShape((-1, *[0] * _ASIDE, 0, _ASIDE + 1, _ASIDE + 2))
_PATH = [0, _ASIDE + 1, _ASIDE + 2, _ASIDE + 3]
_CHAIN = TreeShape((-1, 0, 1, 2))
# What a tree may be apart: so many roundings of the largest logit, or a part of it where models compute in float32
# whatever they are asked for, and so many times what a chain is apart.
_ROUNDINGS, _PART, _CHAINS = 4, 1e-4, 8
_CHAIN_APART = {torch.float64: 1e-4, torch.float32: 1e-2, torch.bfloat16: 0.3, torch.float16: 0.1}
_REMEDY = (
    "Use a target that takes positions from position_ids and honours a 4-D mask, such as Llama, Vicuna, Qwen or"
    " Mistral."
)


def check_trees(target: Target, verify: Verify, room: int) -> None:
    """Compare a branching tree and a chain with one pass over the same tokens without cache and mask.

    Takes five short passes. Compared is the median over the nodes of the tree's last path: an expert router that
    rounding changes at one node is no defect.

    Args:
        verify: the decoding pass, not recorded.
        room: rows up to which tree passes are exact, see ``koala_bench.engine.limits``.

    Raises:
        KoalaBenchError: they differ by more than rounding, or the model cannot run a tree.
    """
    prompt = min(_PROMPT, room - _BRANCHING.nodes)
    if prompt < 1:
        return  # no tree fits at all, and ``new_cache`` says so
    vocabulary = target.config.vocab_size
    ids = ((torch.arange(prompt + len(_PATH), device=target.device) + 1) * 7919) % vocabulary
    aside = ((torch.arange(_ASIDE, device=target.device) + 1) * 104729) % vocabulary
    path = ids[prompt:]
    try:
        with torch.inference_mode():
            truth = target.output(target.states(ids[None])[0, prompt:, -1])
            cache = target.new_cache(prompt + _BRANCHING.nodes)
            target.prefill(ids[:prompt], cache)
            alone = verify(DraftTree(path[:1], ROOT_ONLY), cache)[0]
            chain = verify(DraftTree(path, _CHAIN), cache)[0]
            tree = verify(DraftTree(torch.cat([path[:1], aside, path[1:]]), _BRANCHING), cache)[0][_PATH]
    except (KoalaBenchError, torch.cuda.OutOfMemoryError):
        raise
    except Exception as error:  # a model may do whatever it likes with a mask that it does not expect
        raise KoalaBenchError(f"{target.name} cannot verify a draft tree: {first_line(error)}", _REMEDY) from error
    scale = float(truth.double().abs().max())
    rounding = max(_ROUNDINGS * torch.finfo(target.dtype).eps, _PART) * scale
    in_chain = max(_apart(chain[1:], truth[1:]), _apart(alone, truth[:1]))
    if not in_chain <= _CHAIN_APART[target.dtype] * max(scale, 1e-6):
        raise KoalaBenchError(
            f"{target.name} gives other logits token by token than at once, by {in_chain:.1e} of {scale:.1e}.", _REMEDY
        )
    in_tree = _apart(tree[1:], truth[1:])
    if not in_tree <= rounding + _CHAINS * in_chain:
        raise KoalaBenchError(
            f"{target.name} gives other logits in a branching tree than token by token, by {in_tree:.1e} of"
            f" {scale:.1e}: it counts rows instead of positions.",
            _REMEDY,
        )


def _apart(found: torch.Tensor, truth: torch.Tensor) -> float:
    """Median over the rows of the largest difference."""
    return float((found.double() - truth.double()).abs().amax(dim=-1).median())
