"""P-EAGLE: its loss and its drafts are those of one pass under the mask of the paper, spelled out place by place."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from heads.eagle3 import Eagle3
from heads.p_eagle import PEagle
from heads.rejection import Rejection
from koala_bench.contract.bench import optimiser_of, random_ids
from koala_bench.decoding.loop import VANILLA_TREE, Vanilla, decode
from koala_bench.engine.target import Target
from koala_bench.heads import FeatureBatch
from koala_bench.tree import load_template
from tests.heads.test_eagle3 import PROMPT, layer, norm, shaken

Pairs = list[tuple[torch.Tensor, torch.Tensor]]


def make(target: Target, **options: Any) -> PEagle:
    head: PEagle = shaken("p_eagle", target, **options)
    return head


def guesses(head: PEagle, target: Target, committed: list[int], hidden: torch.Tensor, depth: int) -> torch.Tensor:
    """Scores [depth, vocab_size] of what follows a committed text, whose last token has no state yet: a causal pass
    over its pairs and ``depth - 1`` places of which nothing is known; hidden [tokens - 1, features, 32].
    """
    weights = head.state_dict()
    pairs: Pairs = [
        (target.embed(torch.tensor(token)), weights["fc.weight"] @ torch.cat(list(state[:3])))
        for token, state in zip(committed[1:], hidden, strict=True)
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
