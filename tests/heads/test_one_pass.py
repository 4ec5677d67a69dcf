"""Heads that draft all depths in one pass (P-EAGLE, DFlash): loss, drafts, losslessness, recordings and contract."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from koala_bench.contract import check_head
from koala_bench.contract.bench import drafts_along, random_ids
from koala_bench.decoding.loop import VANILLA_TREE, Vanilla, decode
from koala_bench.engine.loading.targets import load_target
from koala_bench.engine.target import Target
from koala_bench.errors import KoalaBenchError
from koala_bench.tree import load_template
from tests.heads import test_dflash, test_p_eagle
from tests.heads.test_eagle3 import PROMPT, padded, shaken

GUESSES: dict[str, Any] = {
    "p_eagle": test_p_eagle.guesses,
    "dflash": test_dflash.guesses,
}  # spelled out, without caches
kinds = pytest.mark.parametrize("kind", GUESSES)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("p_eagle", {"decay": 0.8}),
        ("p_eagle", {"layers": 2, "depths": 3}),
        ("dflash", {}),
        ("dflash", {"layers": 2, "depths": 3, "decay": 1.0}),
    ],
)
def test_the_loss_is_that_of_every_draft_by_itself(target64: Target, kind: str, options: dict[str, Any]) -> None:
    head = shaken(kind, target64, **options)
    batch, depths = padded(target64, head), head.max_depth
    losses: list[list[float]] = [[] for _ in range(depths)]
    for row, ids in enumerate(batch.ids.tolist()):
        for place in range(int(batch.lengths[row]) - 1):
            scores = GUESSES[kind](head, target64, ids[: place + 2], batch.hidden[row, : place + 1], depths)
            for step in range(min(depths, int(batch.lengths[row]) - 1 - place)):
                if batch.supervised[row, place + step]:
                    wanted = torch.softmax(target64.output(batch.hidden[row, place + step + 1, -1]), dim=-1)
                    losses[step].append(-float((wanted * torch.log_softmax(scores[step], dim=-1)).sum()))
    expected = sum(head.decay**step * sum(each) / len(each) for step, each in enumerate(losses))
    found = head.loss(batch)
    assert float(found.total.detach()) == pytest.approx(expected, rel=1e-6)
    assert [prediction.depth for prediction in found.predictions] == list(range(1, depths + 1))


@kinds
@pytest.mark.parametrize("name", ["chain-4", "3x2x1", "dynamic-2x3x6"])
@pytest.mark.parametrize("layers", [1, 2])
def test_drafts_are_the_best_at_each_depth(target64: Target, kind: str, layers: int, name: str) -> None:
    """Each node has its rank among the head's fresh scores at its depth; tokens are committed in pieces."""
    head, template = shaken(kind, target64, layers=layers).eval(), load_template(name)
    ids = random_ids(1, 22)[0].tolist()
    states = target64.states(torch.tensor([ids]), head.features)[0]
    for root, tree in drafts_along(head, target64, template, ids, 10):
        said = GUESSES[kind](head, target64, ids[: root + 1], states[:root], template.depth)
        assert tree.tokens[0] == ids[root]
        for node in tree.shape.inner:
            children = list(tree.shape.children[node])
            best = said[tree.shape.depths[node]].topk(len(children)).indices
            assert tree.tokens[children].tolist() == best.tolist()


@kinds
@pytest.mark.parametrize("name", ["chain-4", "medusa/mc_sim_7b_63", "dynamic-3x4x20"])
@pytest.mark.parametrize("layers", [1, 4])
def test_decoding_is_lossless(target64: Target, kind: str, layers: int, name: str) -> None:
    head = shaken(kind, target64, layers=layers, depths=5).eval()
    expected = decode(target64, Vanilla(), VANILLA_TREE, PROMPT, 40, ()).tokens
    for tree in (name, "chain-2", name):  # the last time it must have forgotten the others, and their depth
        assert decode(target64, head, load_template(tree), PROMPT, 40, ()).tokens == expected


@pytest.mark.slow
@kinds
def test_recorded_drafts_are_the_same(target64: Target, kind: str) -> None:
    recorded = load_target(target64.name, "cpu", "float64", engine="graph")
    for name in ("3x2x1", "chain-2", "dynamic-2x3x6"):
        drafts = [
            decode(each, shaken(kind, each, layers=2).eval(), load_template(name), PROMPT, 30, (), trace=True).steps
            for each in (target64, recorded)
        ]
        assert drafts[0] == drafts[1]


@kinds
@pytest.mark.parametrize("layers", [1, 3])
def test_every_parameter_gets_a_gradient(target: Target, kind: str, layers: int) -> None:
    head = shaken(kind, target, layers=layers)
    head.loss(padded(target, head)).total.backward()
    assert [name for name, p in head.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []


@kinds
def test_counts_below_one_and_trees_deeper_than_it_learns_are_refused(target: Target, kind: str) -> None:
    for options in ({"depths": 0}, {"layers": 0}):
        with pytest.raises(KoalaBenchError, match=r"\b0\b"):
            shaken(kind, target, **options)
    with pytest.raises(KoalaBenchError, match="drafts only 3"):
        shaken(kind, target, depths=3).begin(load_template("chain-4"), 64)


@kinds
@pytest.mark.parametrize("options", [{}, pytest.param({"layers": 2}, marks=pytest.mark.slow)])
def test_the_contract_is_kept(kind: str, options: dict[str, Any]) -> None:
    assert [str(result) for result in check_head(kind, options) if result.outcome == "failed"] == []
