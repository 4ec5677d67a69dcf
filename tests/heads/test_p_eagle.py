"""P-EAGLE: its loss and its drafts are those of one pass under the mask of the paper, spelled out place by place."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from heads.eagle3 import Eagle3
from heads.p_eagle import PEagle
from heads.rejection import Rejection
from koala_bench.contract import check_head
from koala_bench.contract.bench import drafts_along, optimiser_of, random_ids
from koala_bench.decoding.loop import VANILLA_TREE, Vanilla, decode
from koala_bench.engine.loading.targets import load_target
from koala_bench.engine.target import Target
from koala_bench.errors import KoalaBenchError
from koala_bench.heads import FeatureBatch
from koala_bench.tree import load_template
from tests.heads.test_eagle3 import PROMPT, layer, norm, padded

Pairs = list[tuple[torch.Tensor, torch.Tensor]]


def make(target: Target, **options: Any) -> PEagle:
    torch.manual_seed(0)
    head = PEagle(target.spec(), **options)
    with torch.no_grad():  # norms whose weights are not one, and layers that change much of what passes them
        for name, parameter in head.named_parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
            if "_proj" in name:
                parameter.mul_(3)
    return head.to(target.dtype)


def guesses(head: PEagle, target: Target, settled: list[int], hidden: torch.Tensor, depth: int) -> torch.Tensor:
    """Scores [depth, vocab_size] of what follows a settled text, whose last token has no state yet: a causal pass over
    its pairs and ``depth - 1`` places of which nothing is known; hidden [tokens - 1, features, 32].
    """
    weights = head.state_dict()
    pairs: Pairs = [
        (target.embed(torch.tensor(token)), weights["fc.weight"] @ torch.cat(list(state[:3])))
        for token, state in zip(settled[1:], hidden, strict=True)
    ]
    pairs += [(weights["mask_embedding"], weights["mask_state"])] * (depth - 1)
    embedded, x = (torch.stack(part) for part in zip(*pairs, strict=True))
    read = torch.cat(
        [norm(embedded, weights["midlayer.input_layernorm.weight"]), norm(x, weights["midlayer.hidden_norm.weight"])],
        dim=-1,
    )
    x = layer(weights, "midlayer", x, read)
    for index in range(len(head.layers)):
        x = layer(weights, f"layers.{index}", x, norm(x, weights[f"layers.{index}.input_layernorm.weight"]))
    return norm(x[-depth:], weights["norm.weight"]) @ weights["lm_head.weight"].T


@pytest.mark.parametrize("options", [{"decay": 0.8}, {"layers": 2, "depths": 3}])
def test_the_loss_is_that_of_every_draft_by_itself(target64: Target, options: dict[str, Any]) -> None:
    head = make(target64, **options)
    batch = padded(target64, head)
    expected = 0.0
    losses: list[list[float]] = [[] for _ in range(head.steps)]
    for row, ids in enumerate(batch.ids.tolist()):
        for place in range(int(batch.lengths[row]) - 1):
            scores = guesses(head, target64, ids[: place + 2], batch.hidden[row, : place + 1], head.steps)
            for step in range(min(head.steps, int(batch.lengths[row]) - 1 - place)):
                if batch.supervised[row, place + step]:
                    wanted = torch.softmax(target64.output(batch.hidden[row, place + step + 1, -1]), dim=-1)
                    losses[step].append(-float((wanted * torch.log_softmax(scores[step], dim=-1)).sum()))
    expected = sum(head.decay**step * sum(each) / len(each) for step, each in enumerate(losses))
    found = head.loss(batch)
    assert float(found.total.detach()) == pytest.approx(expected, rel=1e-6)
    assert [prediction.depth for prediction in found.predictions] == list(range(1, head.steps + 1))


def test_training_is_one_pass_under_the_papers_mask(target64: Target) -> None:
    """All places at all depths in a single sequence, of which each sees the pairs up to the one it drafts from, and the
    masked places of its own draft before it.
    """
    head = make(target64, layers=2, depths=3)
    ids = random_ids(1, 9)
    hidden = target64.states(ids, head.features)[:, :-1].clone()
    found = head(ids[:, 1:], hidden)
    tokens = hidden.shape[1]
    anchor, depth = torch.arange(tokens).repeat(3), torch.arange(3).repeat_interleave(tokens)
    seen = ((depth == 0) & (anchor <= anchor[:, None])) | ((anchor == anchor[:, None]) & (depth <= depth[:, None]))
    mask = torch.zeros(seen.shape, dtype=torch.float64).masked_fill_(~seen, -torch.inf)[None, None]
    table = head.shape.rotary(tokens + 3, hidden)[:, anchor + depth]
    masked = 2 * tokens
    embedded = torch.cat([target64.embed(ids[0, 1:]), head.mask_embedding.expand(masked, -1)])[None]
    state = torch.cat([head._fused(hidden)[0], head.mask_state.expand(masked, -1)])[None]
    x = head.midlayer(embedded, state, table, mask=mask)
    for each in head.layers:
        x = each(x, table, mask=mask)
    torch.testing.assert_close(torch.cat(found, dim=1), x, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["chain-4", "3x2x1", "dynamic-2x3x6"])
@pytest.mark.parametrize("layers", [1, 2])
def test_drafts_are_the_best_at_each_depth(target64: Target, layers: int, name: str) -> None:
    """Every node is the one of its rank among what the head says anew at its depth; settled in pieces, as decoding does."""
    head, template = make(target64, layers=layers).eval(), load_template(name)
    ids = random_ids(1, 22)[0].tolist()
    states = target64.states(torch.tensor([ids]), head.features)[0]
    for root, tree in drafts_along(head, target64, template, ids, 10):
        said = guesses(head, target64, ids[: root + 1], states[:root], template.depth)
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
    for tree in (name, "chain-2", name):  # the last time it must have forgotten the others, and their depth
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


@pytest.mark.parametrize("layers", [1, 3])
def test_every_parameter_gets_a_gradient(target: Target, layers: int) -> None:
    head = make(target, layers=layers)
    head.loss(padded(target, head)).total.backward()
    assert [name for name, p in head.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []


def test_it_is_eagle3_with_two_vectors_more(target: Target) -> None:
    own, theirs = make(target, layers=2).state_dict(), Eagle3(target.spec(), layers=2).state_dict()
    assert own.keys() - theirs.keys() == {"mask_state", "mask_embedding"} and theirs.keys() <= own.keys()


def test_it_learns_a_text_that_it_drafts_at_once(target: Target) -> None:
    """With the objective that lowers rejection, which needs what the loss reports alone."""
    torch.manual_seed(0)
    head = PEagle(target.spec())
    answer = decode(target, Vanilla(), VANILLA_TREE, PROMPT, 60, ()).tokens
    ids = torch.tensor([PROMPT + answer])
    supervised = torch.ones_like(ids, dtype=torch.bool)
    batch = FeatureBatch(
        ids, supervised, target.states(ids, head.features).clone(), 0, target.output, torch.tensor([ids.shape[1]])
    )
    objective, optimiser = Rejection(target.spec()), optimiser_of(head)
    fresh = len(decode(target, head.eval(), load_template("chain-4"), PROMPT, 60, ()).accepted)
    for step in range(60):
        optimiser.zero_grad(set_to_none=True)
        now = replace(batch, seed=step)
        found = head.loss(now)
        extra, _ = objective.term(now, found, 0.5, lambda measure: measure())
        assert extra is not None
        (found.total + extra).backward()
        optimiser.step()
    assert len(decode(target, head.eval(), load_template("chain-4"), PROMPT, 60, ()).accepted) < 0.5 * fresh


@pytest.mark.parametrize(("options", "words"), [({"depths": 0}, "depths is 0"), ({"layers": 0}, "layers is 0")])
def test_counts_below_one_are_refused(target: Target, options: dict[str, Any], words: str) -> None:
    with pytest.raises(KoalaBenchError, match=words):
        make(target, **options)


def test_a_tree_deeper_than_it_learns_is_refused(target: Target) -> None:
    with pytest.raises(KoalaBenchError, match="drafts only 3"):
        make(target, depths=3).begin(load_template("chain-4"), 64)


@pytest.mark.parametrize("options", [{}, pytest.param({"layers": 2}, marks=pytest.mark.slow)])
def test_the_contract_is_kept(options: dict[str, Any]) -> None:
    assert [str(result) for result in check_head("p_eagle", options) if result.outcome == "failed"] == []
