"""LK and total variation: the formulas on small distributions, their gradients, and that they train any head."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from heads.common import losses
from heads.eagle import Eagle
from heads.medusa import Medusa
from heads.rejection import Rejection
from koala_bench.dialogues.encoding import chat_template
from koala_bench.engine.target import Target
from koala_bench.errors import KoalaBenchError
from koala_bench.evaluation.methods import load_methods
from koala_bench.heads import FeatureBatch, HeadLoss, Prediction
from koala_bench.presets import load_preset
from koala_bench.training.checkpoints import read_manifest, save_head
from koala_bench.training.experiment import train_heads
from tests.heads.test_heads import batch_of, make
from tests.support.small_runs import conversations, preset_for

P = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.1, 0.8]])
Q = torch.tensor([[0.2, 0.3, 0.5], [0.1, 0.2, 0.7]])
ACCEPTED = [0.2 + 0.3 + 0.2, 0.1 + 0.1 + 0.7]  # sum of the smaller probabilities
DIVERGENCE = float((P * (P / Q).log()).sum(dim=1).mean())


def term_of(kind: str, weight: float = 1.0, predictions: int = 1) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The term of a head that says Q where the target says P: rows 0 and 1 at depth 1, the target's rows 1 and 2."""
    states = torch.stack([P[0], P[0], P[1]]).log()[None, :, None]
    batch = FeatureBatch(
        torch.zeros(1, 3, dtype=torch.int64),
        torch.ones(1, 3, dtype=torch.bool),
        states,
        0,
        lambda x: x,
        torch.tensor([3]),
    )
    one = Prediction(1, torch.tensor([0, 1]), torch.zeros(2, 3), Q.log())
    found = HeadLoss(torch.zeros(()), {}, (one,) * predictions)
    objective: Any = Rejection(
        SimpleNamespace(drafted=3, draft_vocabulary=None, labels=lambda tokens: tokens), kind, weight
    )  # type: ignore[arg-type]
    value, logs = objective.term(batch, found, 0.0, None)
    return value, logs


@pytest.mark.parametrize(
    ("kind", "wanted"),
    [
        ("log", -sum(math.log(each) for each in ACCEPTED) / 2),
        ("variation", 1 - sum(ACCEPTED) / 2),
        (
            "hybrid",
            math.exp(-3 * sum(ACCEPTED) / 2) * DIVERGENCE
            + (1 - math.exp(-3 * sum(ACCEPTED) / 2)) * (1 - sum(ACCEPTED) / 2),
        ),
    ],
)
def test_the_formulas(kind: str, wanted: float) -> None:
    value, logs = term_of(kind)
    assert float(value) == pytest.approx(wanted, rel=1e-5)
    assert float(logs["expected_acceptance"]) == pytest.approx(sum(ACCEPTED) / 2, rel=1e-5)
    assert float(term_of(kind, weight=0.25, predictions=3)[0]) == pytest.approx(0.75 * wanted, rel=1e-5), "a sum"


@pytest.mark.parametrize("kind", ["log", "hybrid", "variation"])
@pytest.mark.parametrize("head", ["medusa", "eagle"])
def test_what_a_cut_vocabulary_lacks_is_rejected(target: Target, head: str, kind: str) -> None:
    ids = torch.arange(0, 259, 2)
    spec, batch = target.spec(ids), batch_of(target)
    module: Any = {"medusa": Medusa, "eagle": Eagle}[head](spec)
    found = module.loss(batch)
    value, logs = Rejection(spec, kind).term(batch, found, 0.0, None)  # type: ignore[arg-type]
    whole, wanted, accepted = batch.target_probabilities.flatten(0, 1), torch.zeros(()), []
    for each in found.predictions:
        p, q = whole[each.rows + each.depth], each.logits.softmax(-1)
        known = (p.argmax(-1) % 2 == 0).float()
        alpha = torch.minimum(p, q).sum(-1)  # q is zero where nothing is drafted
        accepted.append((alpha * known).mean())
        cut = p[:, ids] / p[:, ids].sum(-1, keepdim=True)
        divergence = ((cut * (cut / q[:, ids]).log()).sum(-1) * known).mean()
        apart = ((1 - alpha) * known).mean()
        share = torch.exp(-3 * accepted[-1])
        measure = {
            "log": (-alpha.log() * known).mean(),
            "variation": apart,
            "hybrid": share * divergence + (1 - share) * apart,
        }
        wanted = wanted + each.weight * measure[kind]
    assert value is not None
    torch.testing.assert_close(value, wanted, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(logs["expected_acceptance"], torch.stack(accepted).mean(), rtol=1e-4, atol=1e-6)


def test_with_stored_normalizers_a_cut_vocabulary_costs_no_whole_output_layer(target: Target) -> None:
    spec, batch = target.spec(torch.arange(0, 259, 2)), batch_of(target)
    wanted = batch.drafted_share(spec)
    assert 0 < float(wanted.min()) < float(wanted.max()) <= 1

    def refused(hidden: torch.Tensor) -> torch.Tensor:
        raise AssertionError("the whole output layer was asked")

    normalizers = target.output(batch.hidden[:, :, -1]).logsumexp(-1)
    likeliest = target.output(batch.hidden[:, :, -1]).argmax(-1)
    stored = replace(batch, output=refused, known_likeliest=likeliest, known_normalizers=normalizers)
    torch.testing.assert_close(stored.drafted_share(spec), wanted)


@pytest.mark.parametrize("kind", ["log", "hybrid", "variation"])
@pytest.mark.parametrize("head", ["medusa", "eagle"])
def test_following_the_gradient_raises_the_acceptance(target: Target, head: str, kind: str) -> None:
    module = make(target, head)
    objective = Rejection(target.spec(), kind)  # type: ignore[arg-type]
    optimiser = torch.optim.Adam(module.parameters(), lr=3e-3)
    batch, seen = batch_of(target), []
    for _ in range(12):
        value, logs = objective.term(batch, module.loss(batch), 0.0, None)  # type: ignore[arg-type]
        assert value is not None
        optimiser.zero_grad()
        value.backward()
        optimiser.step()
        seen.append(float(logs["expected_acceptance"]))
    assert seen[-1] > seen[0]


def test_pieces_of_a_large_vocabulary_give_the_same_term_and_gradients(
    target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for at_once in (1 << 24, 3 * 259):
        monkeypatch.setattr(losses, "_AT_ONCE", at_once)
        module, batch = make(target, "medusa"), batch_of(target)
        value, _ = Rejection(target.spec()).term(batch, module.loss(batch), 0.0, None)  # type: ignore[arg-type]
        assert value is not None
        value.backward()
        found.append([value.detach(), *(each.grad for each in module.parameters())])
    for whole, pieces in zip(*found, strict=True):
        torch.testing.assert_close(whole, pieces, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("head", ["medusa", "eagle"])
def test_it_replaces_the_token_losses_of_a_head_and_has_their_weights(target: Target, head: str) -> None:
    module, batch = make(target, head), batch_of(target)
    found = module.loss(batch)
    weights = {"medusa": 1.0, "eagle": 0.1}
    assert {each.weight for each in found.predictions} == {weights[head]}
    assert found.rest is not None
    kinds = [name for name in found.parts if name.startswith(("classification", "cross_entropy"))]
    tokens = weights[head] * sum(float(found.parts[name]) for name in kinds)
    assert float((found.total - found.rest).detach()) == pytest.approx(tokens, rel=1e-5)
    objective: Any = Rejection(target.spec(), "variation")
    value, _ = objective.term(batch, found, 0.0, None)
    own = torch.zeros(())
    for each in found.predictions:
        p = batch.target_probabilities.flatten(0, 1)[each.rows + each.depth]
        own = own + weights[head] * (1 - torch.minimum(p, each.logits.softmax(-1)).sum(-1)).mean()
    torch.testing.assert_close(value, own)


def test_training_follows_what_replaces_the_token_loss_and_no_longer_that(
    target: Target, target_folder: Path, tmp_path: Path
) -> None:
    """Two weights of the token loss, with the measure's weight in it the same: one and the same training."""
    assert target.tokenizer is not None
    of = 'head="eagle", tree="chain-3", objective="rejection"'
    methods = [
        f'methods."{name}"={{{of}, options={{classification_weight={own}}}, objective_options={{weight={weight}}}}}'
        for name, own, weight in (("eagle-1", 0.1, 1.0), ("eagle-2", 0.2, 0.5))
    ]
    settings = ["training.steps=4", "training.held_out_evaluations=1", *methods]
    preset = preset_for(target_folder, conversations(tmp_path), *settings)
    template = chat_template("vicuna_v1.1", target.tokenizer)
    train_heads(preset, ["eagle-1", "eagle-2"], replace(target), template, tmp_path / "out")
    one, other = (load_file(tmp_path / "out" / name / "model.safetensors") for name in ("eagle-1", "eagle-2"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_weight_zero_is_the_supervised_run_and_bad_values_are_told(target: Target) -> None:
    assert not Rejection(target.spec(), weight=0.0).active(0.5)
    for options in ({"kind": "kl"}, {"weight": -1.0}, {"weight": math.inf}):
        with pytest.raises(KoalaBenchError):
            Rejection(target.spec(), **options)  # type: ignore[arg-type]
    silent = HeadLoss(torch.zeros(()), {}, ())
    with pytest.raises(KoalaBenchError, match="no predictions"):
        Rejection(target.spec()).term(batch_of(target), silent, 0.0, None)  # type: ignore[arg-type]


def test_it_is_an_objective_of_any_trained_head(target: Target, target_folder: Path, tmp_path: Path) -> None:
    assert target.tokenizer is not None
    settings = ["training.steps=4", "training.micro_batches=2", "training.held_out_evaluations=1"]
    options = '{head="eagle", tree="chain-3", objective="rejection", objective_options={kind="hybrid", weight=0.5}}'
    preset = preset_for(target_folder, conversations(tmp_path), *settings, f'methods."eagle+lk"={options}')
    template = chat_template("vicuna_v1.1", target.tokenizer)
    train_heads(preset, ["eagle", "eagle+lk"], replace(target), template, tmp_path / "out")
    assert read_manifest(tmp_path / "out" / "eagle+lk") is not None
    assert "expected_acceptance" in (tmp_path / "out" / "training.jsonl").read_text()


def test_a_record_calls_it_by_its_name_and_not_adversarial(target: Target, tmp_path: Path) -> None:
    preset = load_preset("tiny")
    for name in ("eagle", "eagle+lk", "eagle+koala"):
        save_head(tmp_path / name, make(target, "eagle", preset.method(name).layers), preset.method(name), target, {})
    methods = load_methods(preset, ["eagle", "eagle+lk", "eagle+koala"], target, tmp_path)[1:]
    assert [method.info["adversarial"] for method in methods] == [False, False, True]
    assert [method.info.get("objective") for method in methods] == [None, "rejection", "koala"]
