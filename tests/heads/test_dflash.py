"""DFlash: its loss and its drafts are those of one block by itself, spelled out without caches."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from heads.common.drafting import KVCache
from heads.dflash import DFlash
from koala_bench.contract import check_head
from koala_bench.contract.bench import drafts_along, random_ids
from koala_bench.decoding.loop import VANILLA_TREE, Vanilla, decode
from koala_bench.engine.loading.targets import load_target
from koala_bench.engine.target import Target
from koala_bench.errors import KoalaBenchError
from koala_bench.heads import Committed
from koala_bench.tree import load_template
from tests.heads.test_eagle3 import PROMPT, norm, padded, turned


def make(target: Target, ids: torch.Tensor | None = None, **options: Any) -> DFlash:
    torch.manual_seed(0)
    head = DFlash(target.spec(ids), **options)
    with torch.no_grad():  # norms whose weights are not one, and layers that change much of what passes them
        for name, parameter in head.named_parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
            if "_proj" in name:
                parameter.mul_(3)
    return head.to(target.dtype)


def guesses(head: DFlash, target: Target, settled: list[int], hidden: torch.Tensor) -> torch.Tensor:
    """Scores [depths, vocab_size] of what follows a settled text, whose last token has no state yet: its block sees
    itself and all of the states [tokens - 1, features, 32].
    """
    weights = head.state_dict()
    context = norm(
        torch.stack([weights["fc.weight"] @ torch.cat(list(state[:3])) for state in hidden]),
        weights["hidden_norm.weight"],
    )
    x = torch.stack([target.embed(torch.tensor(settled[-1])), *[weights["mask_embedding"]] * head.max_depth])
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
    return target.output(norm(x[1:], weights["norm.weight"]))


@pytest.mark.parametrize("options", [{}, {"layers": 2, "depths": 3, "decay": 1.0}])
def test_the_loss_is_that_of_every_draft_by_itself(target64: Target, options: dict[str, Any]) -> None:
    head = make(target64, **options)
    batch = padded(target64, head)
    losses: list[list[float]] = [[] for _ in range(head.max_depth)]
    for row, ids in enumerate(batch.ids.tolist()):
        for place in range(int(batch.lengths[row]) - 1):
            scores = guesses(head, target64, ids[: place + 2], batch.hidden[row, : place + 1])
            for step in range(min(head.max_depth, int(batch.lengths[row]) - 1 - place)):
                if batch.supervised[row, place + step]:
                    wanted = torch.softmax(target64.output(batch.hidden[row, place + step + 1, -1]), dim=-1)
                    losses[step].append(-float((wanted * torch.log_softmax(scores[step], dim=-1)).sum()))
    expected = sum(head.decay**step * sum(each) / len(each) for step, each in enumerate(losses))
    found = head.loss(batch)
    assert float(found.total.detach()) == pytest.approx(expected, rel=1e-6)
    assert [prediction.depth for prediction in found.predictions] == list(range(1, head.max_depth + 1))


@pytest.mark.parametrize("name", ["chain-4", "3x2x1", "dynamic-2x3x6"])
@pytest.mark.parametrize("layers", [1, 2])
def test_drafts_are_the_best_at_each_depth(target64: Target, layers: int, name: str) -> None:
    """Every node is the one of its rank among what the head says anew at its depth; settled in pieces, as decoding does."""
    head, template = make(target64, layers=layers).eval(), load_template(name)
    ids = random_ids(1, 22)[0].tolist()
    states = target64.states(torch.tensor([ids]), head.features)[0]
    for root, tree in drafts_along(head, target64, template, ids, 10):
        said = guesses(head, target64, ids[: root + 1], states[:root])
        assert tree.tokens[0] == ids[root]
        for node in tree.shape.inner:
            children = list(tree.shape.children[node])
            best = said[tree.shape.depths[node]].topk(len(children)).indices
            assert tree.tokens[children].tolist() == best.tolist()


@pytest.mark.parametrize("name", ["chain-4", "medusa/mc_sim_7b_63", "dynamic-3x4x20"])
@pytest.mark.parametrize("layers", [1, 4])
def test_decoding_is_lossless(target64: Target, layers: int, name: str) -> None:
    head = make(target64, layers=layers, depths=5).eval()
    expected = decode(target64, Vanilla(), VANILLA_TREE, PROMPT, 40, ()).tokens
    for tree in (name, "chain-2", name):
        assert decode(target64, head, load_template(tree), PROMPT, 40, ()).tokens == expected


@pytest.mark.slow
def test_recorded_drafts_are_the_same(target64: Target) -> None:
    recorded = load_target(target64.name, "cpu", "float64", engine="graph")
    for name in ("3x2x1", "chain-2", "dynamic-2x3x6"):
        drafts = [
            decode(target, make(target, layers=2).eval(), load_template(name), PROMPT, 30, (), trace=True).steps
            for target in (target64, recorded)
        ]
        assert drafts[0] == drafts[1]


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


@pytest.mark.parametrize("layers", [1, 3])
def test_every_parameter_gets_a_gradient(target: Target, layers: int) -> None:
    head = make(target, layers=layers)
    head.loss(padded(target, head)).total.backward()
    assert [name for name, p in head.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []


@pytest.mark.parametrize("options", [{"depths": 0}, {"layers": 0}])
def test_counts_below_one_are_refused(target: Target, options: dict[str, Any]) -> None:
    with pytest.raises(KoalaBenchError, match=" 0 "):
        make(target, **options)


def test_a_tree_deeper_than_its_block_is_refused(target: Target) -> None:
    with pytest.raises(KoalaBenchError, match="drafts only 3"):
        make(target, depths=3).begin(load_template("chain-4"), 64)


@pytest.mark.parametrize("options", [{}, pytest.param({"layers": 2}, marks=pytest.mark.slow)])
def test_the_contract_is_kept(options: dict[str, Any]) -> None:
    assert [str(result) for result in check_head("dflash", options) if result.outcome == "failed"] == []
