"""DFlash: its loss and its drafts are those of one block by itself, spelled out without caches."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F

from heads.common.drafting import KVCache
from heads.dflash import DFlash
from koala_bench.contract.bench import drafts_along, random_ids
from koala_bench.engine.target import Target
from koala_bench.heads import Committed
from koala_bench.tree import load_template
from tests.heads.test_eagle3 import norm, padded, shaken, turned


def make(target: Target, ids: torch.Tensor | None = None, **options: Any) -> DFlash:
    head: DFlash = shaken("dflash", target, ids, **options)
    return head


def guesses(head: DFlash, target: Target, committed: list[int], hidden: torch.Tensor, depth: int) -> torch.Tensor:
    """Scores [depth, vocab_size] of what follows a committed text, whose last token has no state yet: its block sees
    itself and all of the states [tokens - 1, features, 32].
    """
    weights = head.state_dict()
    context = norm(
        torch.stack([weights["fc.weight"] @ torch.cat(list(state[:3])) for state in hidden]),
        weights["hidden_norm.weight"],
    )
    x = torch.stack([target.embed(torch.tensor(committed[-1])), *[weights["mask_embedding"]] * head.max_depth])
    for index in range(len(head.layers)):
        own = {
            name.removeprefix(f"layers.{index}."): weight
            for name, weight in weights.items()
            if name.startswith(f"layers.{index}.")
        }
        read = torch.cat([context, norm(x, own["input_layernorm.weight"])])  # row r stands at position r
        q, k, v = ((read @ own[f"self_attn.{name}_proj.weight"].T).unflatten(-1, (-1, 8)) for name in "qkv")
        q, k = turned(q)[len(context) :], turned(k)
        k, v = (each.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for each in (k, v))
        share = torch.softmax(torch.einsum("qhd,khd->hqk", q, k) / math.sqrt(8), dim=-1)
        x = x + torch.einsum("hqk,khd->qhd", share, v).flatten(1) @ own["self_attn.o_proj.weight"].T
        normed = norm(x, own["post_attention_layernorm.weight"])
        gate, up, down = (own[f"mlp.{name}_proj.weight"].T for name in ("gate", "up", "down"))
        x = x + (F.silu(normed @ gate) * (normed @ up)) @ down
    return target.output(norm(x[1 : 1 + depth], weights["norm.weight"]))


@torch.inference_mode()
def test_with_static_shapes_the_scores_are_the_same(target64: Target) -> None:
    """As CUDA graphs ask: the number of rows is a tensor, and what is attended to is as wide as the cache."""
    head = make(target64, layers=2).eval()
    ids = random_ids(1, 12)
    hidden = target64.states(ids, head.features)[0]
    found = []
    for past in (7, torch.tensor(7)):
        cache = KVCache.of(head.shape, 2, 64, head.fc.weight)
        head._extend_cache(Committed(ids[0, 1:8], hidden[:7], 0), cache)
        found.append(head._score_depths(Committed(ids[0, 8:11], hidden[7:10], 7), replace(cache, past=past)))
    torch.testing.assert_close(found[0], found[1], rtol=1e-9, atol=1e-9)


def test_only_tokens_of_a_draft_vocabulary_are_drafted(target: Target) -> None:
    kept = torch.arange(20, 60)
    head = make(target, kept).eval()
    assert torch.isfinite(head.loss(padded(target, head)).total)
    for _, tree in drafts_along(head, target, load_template("2x2x1"), random_ids(1, 22)[0].tolist(), 10):
        assert set(tree.tokens[1:].tolist()) <= set(kept.tolist())
