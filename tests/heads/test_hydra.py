"""Hydra: its loss, drafts and cache equal a place-by-place computation from the paper's description."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from heads.hydra import Hydra
from heads.koala import Adversarial
from koala_bench.contract import check_head
from koala_bench.contract.bench import batch_of, drafts_along, optimiser_of, random_ids, train
from koala_bench.decoding.loop import VANILLA_TREE, Vanilla, decode
from koala_bench.engine.target import Target
from koala_bench.errors import KoalaBenchError
from koala_bench.heads import FeatureBatch
from koala_bench.presets import MethodPreset
from koala_bench.training.checkpoints import load_head, save_head
from koala_bench.training.held_out import HeldOut, held_out_acceptance
from koala_bench.tree import load_template
from tests.support.turns import turns

VARIANTS: list[dict[str, Any]] = [
    {},
    {"layers": 3},
    {"prefix": True, "labels": "target"},
    {"layers": 2, "prefix": True},
]
PROMPT = [1, 70, 81, 82, 90, 33]


def make(target: Target, **options: Any) -> Hydra:
    torch.manual_seed(0)
    head = Hydra(target.spec(), **options)
    with torch.no_grad():  # so that nothing is at its initial zero
        for parameter in head.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return head.to(target.dtype)


def padded(target: Target) -> FeatureBatch:
    """Two dialogues of different length, whose answers begin at different places."""
    ids = random_ids(2, 18)
    supervised = torch.zeros_like(ids, dtype=torch.bool)
    supervised[0, 5:18], supervised[1, 3:11] = True, True
    return FeatureBatch(ids, supervised, target.states(ids).clone(), 0, target.output, torch.tensor([18, 12]))


def state_at(head: Hydra, hidden: torch.Tensor) -> torch.Tensor:
    """What the heads read after the states [tokens, width] of a text: the last, or what the prefix layer makes of all
    of them.
    """
    return hidden[-1] if head.prefix is None else head.prefix(hidden[None])[0, -1]


def guess(head: Hydra, target: Target, state: torch.Tensor, tokens: list[int]) -> torch.Tensor:
    """Scores of what follows the root ``tokens[0]`` and the tokens drafted after it, spelled out."""
    weights = head.state_dict()
    own = f"heads.{len(tokens) - 1}."
    known = torch.cat([state, *(target.embed(torch.tensor(token)) for token in tokens)])

    def linear(name: str, x: torch.Tensor) -> torch.Tensor:
        return weights[f"{own}{name}.weight"] @ x + weights[f"{own}{name}.bias"]

    x = linear("first.residual", known) + torch.nn.functional.silu(linear("first.linear", known))
    for block in range(len(head.heads[0].blocks)):
        x = x + torch.nn.functional.silu(linear(f"blocks.{block}.linear", x))
    return linear("output", x)


@pytest.mark.parametrize("options", VARIANTS)
def test_the_loss_is_that_of_every_place_by_itself(target64: Target, options: dict[str, Any]) -> None:
    head, batch = make(target64, **options), padded(target64)
    expected = torch.zeros((), dtype=torch.float64)
    for depth in range(1, 5):
        losses = []
        for row, ids in enumerate(batch.ids.tolist()):
            for place in range(int(batch.lengths[row]) - depth - 1):
                if batch.supervised[row, place + depth + 1]:
                    state = state_at(head, batch.hidden[row, : place + 1, -1])
                    scores = guess(head, target64, state, ids[place + 1 : place + depth + 1])
                    wanted = torch.softmax(target64.output(batch.hidden[row, place + depth, -1]), dim=-1)
                    if options.get("labels") != "target":
                        wanted = torch.nn.functional.one_hot(torch.tensor(ids[place + depth + 1]), len(wanted)).double()
                    losses.append(-(wanted * torch.log_softmax(scores, dim=-1)).sum())
        expected += torch.stack(losses).mean()
    found = head.loss(batch)
    assert float(found.total.detach()) == pytest.approx(float(expected.detach()), rel=1e-6)
    assert [prediction.depth for prediction in found.predictions] == [1, 2, 3, 4]


@pytest.mark.parametrize("options", VARIANTS)
def test_every_parameter_gets_a_gradient(target: Target, options: dict[str, Any]) -> None:
    head = make(target, **options)
    head.loss(padded(target)).total.backward()
    assert [name for name, p in head.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []


def test_blocks_and_heads_are_distinct(target: Target) -> None:
    sizes = [sum(p.numel() for p in make(target, layers=layers).parameters()) for layers in (1, 2, 3)]
    assert sizes[2] - sizes[1] == sizes[1] - sizes[0] == 4 * (32 * 32 + 32)


@pytest.mark.parametrize("name", ["chain-4", "3x2x1", "dynamic-3x4x9"])
@pytest.mark.parametrize("options", VARIANTS[1:])
def test_drafts_follow_from_the_tokens_above_them(target64: Target, options: dict[str, Any], name: str) -> None:
    """Every node is among the best that the head says anew after the path to it, at its rank in a static tree."""
    head, template = make(target64, **options).eval(), load_template(name)
    ids = random_ids(1, 40)[0].tolist()
    states = target64.states(torch.tensor([ids]))[0, :, -1]
    for root, tree in drafts_along(head, target64, template, ids, 16):
        state = state_at(head, states[:root])
        for node in tree.shape.inner:
            path = [int(tree.tokens[above]) for above in tree.shape.path_to(node)]
            children = list(tree.shape.children[node])
            best = guess(head, target64, state, path).topk(len(children)).indices
            assert tree.tokens[children].tolist() == best.tolist()


@pytest.mark.parametrize("name", ["chain-4", "medusa/mc_sim_7b_63", "dynamic-3x4x20"])
@pytest.mark.parametrize("prefix", [False, True])
def test_decoding_is_lossless(target64: Target, prefix: bool, name: str) -> None:
    head = make(target64, layers=2, prefix=prefix).eval()
    expected = decode(target64, Vanilla(), VANILLA_TREE, PROMPT, 40, ()).tokens
    for _ in range(2):  # the second time the head must have forgotten the first
        assert decode(target64, head, load_template(name), PROMPT, 40, ()).tokens == expected


def test_a_tree_deeper_than_its_heads_is_refused(target: Target) -> None:
    for name in ("chain-3", "dynamic-2x4x9"):
        with pytest.raises(KoalaBenchError, match="drafts only 2"):
            make(target, heads=2).begin(load_template(name), 64)


@pytest.mark.parametrize("options", [{"heads": 0}, {"layers": 0}])
def test_counts_below_one_are_refused(target: Target, options: dict[str, Any]) -> None:
    with pytest.raises(KoalaBenchError, match=f"number of {next(iter(options))} is 0"):
        make(target, **options)


def test_unknown_labels_are_refused(target: Target) -> None:
    with pytest.raises(KoalaBenchError, match="labels are 'soft'"):
        make(target, labels="soft")


def test_siblings_come_from_its_pick_with_the_distributions(target: Target) -> None:
    head = make(target).eval()
    head.pick = lambda logits, count: (logits.topk(count, largest=False).indices, torch.softmax(logits, dim=-1))
    for _, tree in drafts_along(head, target, load_template("2x2"), random_ids(1, 12)[0].tolist(), 10):
        assert tree.proposals is not None and tree.proposals.shape == (3, 259)
        for row, node in enumerate(tree.shape.inner):
            assert (
                tree.tokens[list(tree.shape.children[node])].tolist()
                == tree.proposals[row].topk(2, largest=False).indices.tolist()
            )


@pytest.mark.parametrize("prefix", [False, True])
def test_the_adversarial_objective_trains_it_and_nothing_at_weight_zero(target: Target, prefix: bool) -> None:
    weights = []
    for weight in (None, 0.0, 0.5):
        head = make(target, prefix=prefix)
        optimiser = optimiser_of(head)
        objective = None if weight is None else Adversarial(target.spec(), weight=weight, start=0.0, ramp=0.0)
        for step in range(2):
            batch = replace(padded(target), seed=step)
            found = head.loss(batch)
            extra = None if objective is None else turns(objective, batch, found, 0.5)[0]
            optimiser.zero_grad(set_to_none=True)
            (found.total if extra is None else found.total + extra).backward()
            optimiser.step()
        weights.append(torch.cat([p.detach().flatten() for p in head.parameters()]))
    assert torch.equal(weights[0], weights[1])
    assert torch.isfinite(weights[2]).all() and not torch.equal(weights[0], weights[2])


def test_a_saved_head_comes_back(target: Target, tmp_path: Path) -> None:
    head = make(target, layers=2, heads=3, prefix=True).eval()
    preset = MethodPreset(head="heads.hydra:Hydra", layers=2, options={"heads": 3, "prefix": True}, tree="chain-3")
    save_head(tmp_path / "hydra", head, preset, target, {})
    loaded, _, _ = load_head(tmp_path / "hydra", target)
    saved = head.state_dict()
    assert saved.keys() == loaded.state_dict().keys()
    assert all(torch.equal(tensor, saved[name]) for name, tensor in loaded.state_dict().items())


def test_the_published_layout_has_a_place_for_every_tensor(target: Target) -> None:
    """The names that the module's text gives for those of ``hydra_lm_head.pt``, with their shapes."""
    shapes = {
        name: tuple(tensor.shape) for name, tensor in make(target, layers=2, heads=2, prefix=True).state_dict().items()
    }
    for head in range(2):
        sources = (head + 2) * 32
        assert (
            shapes[f"heads.{head}.first.linear.weight"]
            == shapes[f"heads.{head}.first.residual.weight"]
            == (32, sources)
        )
        assert shapes[f"heads.{head}.blocks.0.linear.weight"] == (32, 32)
        assert shapes[f"heads.{head}.output.weight"] == (259, 32) and shapes[f"heads.{head}.output.bias"] == (259,)
    assert shapes["prefix.norm.weight"] == shapes["prefix.layer.input_layernorm.weight"] == (32,)


@pytest.mark.parametrize("prefix", [False, True])
@pytest.mark.filterwarnings(
    "ignore:Mismatch dtype"
)  # torch on norms with float32 weights under autocast; the suite filters it too
def test_it_learns_a_text_by_heart(target: Target, prefix: bool) -> None:
    """In bfloat16 autocast, as the suite trains; the target's own answer then takes less than half as many steps as
    with a fresh head.

    What the loss predicts there is what it drafts, at every depth.
    """
    torch.manual_seed(0)
    head = Hydra(target.spec(), prefix=prefix)
    answer = decode(target, Vanilla(), VANILLA_TREE, PROMPT, 60, ()).tokens
    batch, optimiser = batch_of(target, torch.tensor([PROMPT + answer]), head.features), optimiser_of(head)
    fresh = len(decode(target, head.eval(), load_template("chain-4"), PROMPT, 60, ()).accepted)
    for step in range(40):
        with torch.autocast("cpu", torch.bfloat16):  # one a step: it keeps the casts of the weights until it ends
            train(head, batch, 1, optimiser, step)
    assert len(decode(target, head.eval(), load_template("chain-4"), PROMPT, 60, ()).accepted) < 0.5 * fresh
    found = held_out_acceptance(target, head, HeldOut([], [PROMPT]))
    assert (
        found["teacher_forced_rate_by_depth"] == found["decoded_rate_by_depth"]
        and len(found["decoded_rate_by_depth"]) == 4
    )


@pytest.mark.parametrize("options", [{}, pytest.param({"layers": 2, "prefix": True}, marks=pytest.mark.slow)])
def test_the_contract_is_kept(options: dict[str, Any]) -> None:
    assert [str(result) for result in check_head(Hydra, options) if result.outcome == "failed"] == []
