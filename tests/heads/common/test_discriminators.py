"""The adversarial objective's options: defaults that change nothing, gradients everywhere, exact resume, regularisers
that do what they say.
"""

from __future__ import annotations

import io
import itertools
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from heads.common.discriminators import DiscriminatorInputs, View, make_discriminator
from heads.koala import Adversarial
from koala_bench.dialogues.streams import TokenBatch
from koala_bench.engine.target import Target
from koala_bench.errors import KoalaBenchError
from koala_bench.heads import FeatureBatch, HeadLoss, Prediction, TargetSpec
from koala_bench.presets import load_preset
from koala_bench.testing import tiny_config, tiny_target
from koala_bench.training.features import features_of
from koala_bench.training.loop import build_head
from tests.heads.test_heads import batch_of, make
from tests.support.turns import turns

NOW: dict[str, Any] = {"start": 0.0, "ramp": 0.0}
# Every option away from its default at least once, with each thing that the discriminator may see.
VARIANTS: dict[str, dict[str, Any]] = {
    "feature": {},
    "embedding": {"discriminator": "embedding"},
    "sequence": {"discriminator": "sequence"},
    "sequence of embeddings": {"discriminator": "sequence", "described": "embedding"},
    "r1": {"r1": 2.0},
    "r1 on embeddings": {"discriminator": "embedding", "r1": 2.0},
    "r1 on a sequence": {"discriminator": "sequence", "r1": 0.5},
    "narrow": {"hidden": 16},
    "all": {"discriminator": "embedding", "balanced": True, "r1": 1.0, "hidden": 64},
}
variants = pytest.mark.parametrize("variant", VARIANTS)
heads = pytest.mark.parametrize("name", ["medusa", "eagle"])


class Before(nn.Module):
    """The objective as it was before it had any of these options, written down once more as the reference."""

    def __init__(self, spec: TargetSpec, kind: str, weight: float, balanced: bool) -> None:
        super().__init__()
        self.kind, self.weight, self.balanced, self.spec, width = kind, weight, balanced, spec, spec.hidden_size
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.into, self.depth = nn.Linear(3 * width, 256), nn.Embedding(16, 256)
            self.middle, self.out = nn.Linear(256, 256), nn.Linear(256, 1)
        self.optimiser = torch.optim.Adam(self.parameters(), lr=1e-4, betas=(0.5, 0.9))
        self.ratios: list[torch.Tensor] = []

    def judge(self, batch: FeatureBatch, p: Prediction, described: torch.Tensor) -> torch.Tensor:
        hidden = batch.hidden[:, :, -1].float().flatten(0, 1)
        token = self.spec.embed(batch.ids.flatten()[p.rows + p.depth]).float()
        x = torch.cat([F.layer_norm(part, (part.shape[-1],)) for part in (hidden[p.rows], token, described)], dim=-1)
        x = F.leaky_relu(self.into(x) + self.depth.weight[p.depth - 1], 0.2)
        return self.out(F.leaky_relu(self.middle(x), 0.2))[:, 0]

    def describe(self, batch: FeatureBatch, p: Prediction) -> tuple[torch.Tensor, torch.Tensor]:
        if self.kind == "feature":
            return batch.hidden[:, :, -1].float().flatten(0, 1)[p.rows + p.depth], p.feature
        dtype = p.logits.dtype
        table = self.spec.embed(torch.arange(self.spec.vocab_size)).to(dtype)
        real, fake = batch.target_probabilities.flatten(0, 1)[p.rows + p.depth], torch.softmax(p.logits.float(), dim=-1)
        return (real.to(dtype) @ table).float().detach(), (fake.to(dtype) @ table).float()

    def term(
        self, batch: FeatureBatch, found: HeadLoss, progress: float
    ) -> tuple[torch.Tensor | None, dict[str, torch.Tensor]]:
        if progress < 0.2:
            return None, {}
        pairs = [(p, *self.describe(batch, p)) for p in found.predictions if len(p.rows)]
        real = torch.cat([self.judge(batch, p, truth.detach()) for p, truth, _ in pairs])
        fake = torch.cat([self.judge(batch, p, guess.detach()) for p, _, guess in pairs])
        self.optimiser.zero_grad(set_to_none=True)
        (0.5 * (F.softplus(-real).mean() + F.softplus(fake).mean())).backward()
        self.optimiser.step()
        self.requires_grad_(False)
        adversarial = torch.stack([F.softplus(-self.judge(batch, p, guess)).mean() for p, _, guess in pairs]).mean()
        self.requires_grad_(True)
        scale: Any = self.weight * min(1.0, (progress - 0.2) / 0.1)
        if self.balanced:
            features = [p.feature for p, _, _ in pairs]
            norms = [
                sum(float(g.pow(2).sum()) for g in torch.autograd.grad(loss, features, retain_graph=True)) ** 0.5
                for loss in (adversarial, found.total)
            ]
            self.ratios.append(torch.tensor(norms[0] / max(norms[1], 1e-12)))
            scale = scale / self.ratios[(len(self.ratios) - 1) // 8 * 8].clamp(min=1e-6)  # every eighth counts
        return scale * adversarial, {}


def trained(
    target: Target, name: str, objective: Any, steps: range, head: Any = None, optimiser: Any = None, bf16: bool = False
) -> tuple[Any, Any]:
    """Train a head for some of ten steps, as the suite does."""
    head = head or make(target, name, 2)
    optimiser = optimiser or torch.optim.AdamW(head.parameters(), lr=1e-3)
    for step in steps:
        batch = batch_of(target, seed=step)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            found = head.loss(batch)
        extra = (
            None
            if objective is None
            else (objective.term if isinstance(objective, Before) else partial(turns, objective))(
                batch, found, step / 10
            )[0]
        )
        (found.total if extra is None else found.total + extra).backward()
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
    return head, optimiser


def same(one: nn.Module, two: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")
@pytest.mark.parametrize("name", ["hydra", "eagle3"])
@pytest.mark.parametrize("kind", ["embedding", "sequence"])
def test_a_large_vocabulary_is_scored_again_as_under_autocast(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch, name: str, kind: str
) -> None:
    """Logits made a piece at a time, after the loss and outside of its autocast, are those that the loss saw."""
    target = tiny_target(tmp_path_factory.mktemp("four"), tiny_config(num_hidden_layers=4))
    preset = load_preset("tiny").method(f"{name}+koala")
    found = []
    for at_once in (1 << 24, 5 * 259):
        monkeypatch.setattr("heads.common.losses._AT_ONCE", at_once)
        torch.manual_seed(0)
        head = build_head(target, preset, seed=0)
        with torch.no_grad():
            for each in head.parameters():
                each.add_(0.02 * torch.randn(each.shape))
        objective = Adversarial(target.spec(), kind, 0.3, described="embedding", **NOW)
        ids = torch.randint(3, 250, (2, 24), generator=torch.Generator().manual_seed(0))
        batch = features_of(
            target,
            TokenBatch(ids, torch.ones_like(ids, dtype=torch.bool), (0, 1), torch.tensor([24, 24])),
            head.features,
            seed=0,
        )
        with torch.autocast("cpu", torch.bfloat16):
            loss = head.loss(batch)
        extra, _ = turns(objective, batch, loss, 0.5)
        assert extra is not None
        (loss.total + extra).backward()
        found.append((extra.detach(), [each.grad.clone() for each in head.parameters() if each.grad is not None]))
    torch.testing.assert_close(found[1][0], found[0][0], rtol=2e-2, atol=2e-2)
    assert len(found[0][1]) == len(found[1][1]) > 0


def test_the_embedding_is_read_once_and_stays_in_its_dtype(target: Target) -> None:
    asked: list[int] = []

    def embed(ids: torch.Tensor) -> torch.Tensor:
        asked.append(ids.numel())
        return target.embed(ids)

    spec = replace(target.spec(), embed=embed)
    objective = Adversarial(spec, "embedding", 0.3, **NOW)
    for step in range(3):
        turns(objective, batch_of(target, seed=step), make(target, "medusa", 2).loss(batch_of(target, seed=step)), 0.5)
    assert asked.count(spec.vocab_size) == 1


# ---------------------------------------------------------------------------------------------- what must not change


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")  # as the training itself says
@heads
@pytest.mark.parametrize(
    ("kind", "balanced", "bf16"),
    [("feature", False, False), ("feature", True, True), ("embedding", False, True), ("embedding", True, False)],
)
def test_the_default_options_train_the_weights_of_before_bit_for_bit(
    target: Target, name: str, kind: str, balanced: bool, bf16: bool
) -> None:
    before, now = Before(target.spec(), kind, 0.3, balanced), Adversarial(target.spec(), kind, 0.3, balanced)
    steps = range(11)  # nine with the term: the second look at the gradients' ratio is at the last
    old, _ = trained(target, name, before, steps, bf16=bf16)
    new, _ = trained(target, name, now, steps, bf16=bf16)
    supervised, _ = trained(target, name, None, steps, bf16=bf16)
    assert same(old, new)
    assert same(before, now.discriminator)
    assert not same(supervised, new)


def test_a_head_whose_loss_does_not_go_through_its_reported_states_can_be_trained(target: Target) -> None:
    head, batch = make(target, "eagle"), batch_of(target)
    found = head.loss(batch)
    apart = HeadLoss(
        found.total,
        found.parts,
        tuple(Prediction(p.depth, p.rows, p.feature * 1.0, p.logits) for p in found.predictions),
    )
    extra, logs = turns(Adversarial(target.spec(), **NOW), batch, apart, 0.5)
    assert extra is not None and torch.isfinite(extra) and "gradient_ratio" not in logs
    with pytest.raises(KoalaBenchError, match="nothing to balance by"):
        turns(Adversarial(target.spec(), balanced=True, **NOW), batch, apart, 0.5)


@variants
def test_lambda_zero_is_the_supervised_run_bit_for_bit(target: Target, variant: str) -> None:
    silent, _ = trained(target, "eagle", Adversarial(target.spec(), weight=0.0, **VARIANTS[variant]), range(6))
    supervised, _ = trained(target, "eagle", None, range(6))
    assert same(silent, supervised)


@variants
def test_making_and_training_a_discriminator_leaves_the_global_random_numbers_alone(
    target: Target, variant: str
) -> None:
    torch.manual_seed(3)
    expected = torch.rand(4)
    head = make(target, "medusa")
    torch.manual_seed(3)
    objective = Adversarial(target.spec(), **VARIANTS[variant], **NOW)
    batch = batch_of(target)
    turns(objective, batch, head.loss(batch), 0.5)
    assert torch.equal(torch.rand(4), expected)


# ---------------------------------------------------------------------------------------------- every option


@heads
@variants
def test_gradients_reach_all_of_the_discriminator_in_its_turn_and_the_head_alone_in_its_own(
    target: Target, name: str, variant: str
) -> None:
    head = make(target, name)
    objective = Adversarial(target.spec(), weight=0.5, **VARIANTS[variant], **NOW)
    before = {key: p.detach().clone() for key, p in objective.named_parameters()}
    batch = batch_of(target)
    found = head.loss(batch)
    term, logs = turns(objective, batch, found, 0.1)
    for key, p in objective.named_parameters():
        assert p.grad is not None and p.grad.abs().sum() > 0, key
        assert not torch.equal(p, before[key]), key
        p.grad = None
    assert term is not None and term.requires_grad
    term.backward()
    assert all(p.grad is None for p in objective.parameters())
    reached = [p.grad for p in head.parameters() if p.grad is not None]
    assert sum(float(g.abs().sum()) for g in reached) > 0
    assert {"discriminator_loss", "discriminator_accuracy", "adversarial"} <= logs.keys()


@heads
@variants
def test_a_resumed_run_ends_in_the_same_weights(target: Target, name: str, variant: str) -> None:
    def objective() -> Adversarial:
        return Adversarial(target.spec(), weight=0.3, **{**VARIANTS[variant], "learning_rate": 1e-3})

    whole_objective = objective()
    whole, _ = trained(target, name, whole_objective, range(8))

    first = objective()
    head, optimiser = trained(target, name, first, range(5))
    file = io.BytesIO()
    torch.save({"head": head.state_dict(), "objective": first.state_dict(), "optimiser": optimiser.state_dict()}, file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    torch.manual_seed(99)
    again, head = objective(), make(target, name, 2)
    optimiser = torch.optim.AdamW(head.parameters(), lr=1e-3)
    again.load_state_dict(state["objective"])
    head.load_state_dict(state["head"])
    optimiser.load_state_dict(state["optimiser"])
    trained(target, name, again, range(5, 8), head, optimiser)
    assert same(whole, head)
    assert same(whole_objective, again)


@heads
def test_a_sequence_discriminator_learns_to_tell_a_fixed_head_from_the_target(target: Target, name: str) -> None:
    head = make(target, name).eval()
    objective = Adversarial(target.spec(), "sequence", weight=0.5, learning_rate=3e-3, **NOW)
    for _ in range(30):
        _, logs = turns(objective, batch_of(target), head.loss(batch_of(target)), 0.5)
    assert logs["discriminator_accuracy"] > 0.8


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"r1": -1.0}, "r1 is -1"), ({"weight": float("nan")}, "weight is nan"), ({"hidden": 0}, "hidden is 0"),
        ({"described": "token"}, "Unknown description 'token'"),
    ],
)  # fmt: skip
def test_wrong_options_are_one_clear_error(target: Target, options: dict[str, Any], words: str) -> None:
    with pytest.raises(KoalaBenchError, match=words):
        Adversarial(target.spec(), **options)


# ---------------------------------------------------------------------------------------------- sequences


def runs_of(target: Target, name: str, batch: FeatureBatch) -> list[DiscriminatorInputs]:
    found = make(target, name).eval().loss(batch)
    return View(target.spec(), "sequence", "feature")(batch, [p for p in found.predictions if len(p.rows)])


def test_a_medusa_sequence_is_every_depth_from_one_state_after_the_one_token_that_the_head_knew(target: Target) -> None:
    batch = batch_of(target)
    predictions = make(target, "medusa").eval().loss(batch).predictions
    (shown,) = runs_of(target, "medusa", batch)
    rows = [row for row in predictions[0].rows.tolist() if all(row in p.rows.tolist() for p in predictions)]
    assert shown.real.shape == shown.fake.shape == (len(rows), 4, 32) and rows
    hidden, ids = batch.hidden[:, :, -1].flatten(0, 1), batch.ids.flatten()
    for run, row in enumerate(rows):
        assert torch.equal(shown.context[run], F.layer_norm(hidden[row], (32,)))
        for place, p in enumerate(predictions):
            assert torch.equal(shown.token[run, place], F.layer_norm(target.embed(ids[row + 1]), (32,)))
            assert torch.equal(shown.real[run, place], F.layer_norm(hidden[row + p.depth], (32,)))
            assert torch.equal(shown.fake[run, place], F.layer_norm(p.feature[p.rows.tolist().index(row)], (32,)))


def test_an_eagle_sequence_is_a_run_of_neighbours_of_one_dialogue_and_hides_the_states_between(target: Target) -> None:
    batch = batch_of(target)
    (p,) = make(target, "eagle").eval().loss(batch).predictions
    (shown,) = runs_of(target, "eagle", batch)
    hidden, tokens = F.layer_norm(batch.hidden[:, :, -1].flatten(0, 1), (32,)), batch.ids.shape[1]
    found = []
    for run in range(len(shown.real)):
        row = int((hidden == shown.context[run]).all(dim=1).nonzero()[0, 0])
        found.append(row)
        assert row // tokens == (row + 4) // tokens
        assert {row, row + 1, row + 2, row + 3} <= set(p.rows.tolist())
        assert torch.equal(shown.real[run], hidden[row + 1 : row + 5])
        assert torch.equal(shown.token[run, 3], F.layer_norm(target.embed(batch.ids.flatten()[row + 4]), (32,)))
    assert all(b - a >= 4 for a, b in itertools.pairwise(found)), "runs do not overlap"
    assert len(found) >= len(p.rows) // 4 - 2 * len(batch.ids)


def test_where_runs_begin_moves_from_step_to_step_with_the_seed_of_the_batch(target: Target) -> None:
    contexts = []
    for seed in range(3):
        batch = batch_of(target)
        batch = FeatureBatch(batch.ids, batch.supervised, batch.hidden, seed, batch.output, batch.lengths)
        contexts.append(runs_of(target, "eagle", batch)[0].context[0])
    assert not any(torch.equal(contexts[a], contexts[b]) for a, b in ((0, 1), (0, 2), (1, 2)))


def test_answers_too_short_for_a_run_leave_the_supervised_loss_alone(target: Target) -> None:
    batch = batch_of(target)
    supervised = torch.zeros_like(batch.supervised)
    supervised[:, 10:12] = True
    batch = FeatureBatch(batch.ids, supervised, batch.hidden, 0, batch.output, batch.lengths)
    for name in ("eagle", "medusa"):
        found = make(target, name).loss(batch)
        assert sum(len(p.rows) for p in found.predictions) > 0
        assert turns(Adversarial(target.spec(), "sequence", **NOW), batch, found, 0.5) == (None, {})


def test_the_order_of_a_sequence_matters_to_its_judge() -> None:
    torch.manual_seed(0)
    judge = make_discriminator("sequence", 8, 16)
    context, token, described = torch.randn(5, 8), torch.randn(5, 1, 8).expand(5, 4, 8), torch.randn(5, 4, 8)
    assert not torch.allclose(judge(context, token, described, 1), judge(context, token, described.flip(1), 1))


# ---------------------------------------------------------------------------------------------- regularisers


def test_the_r1_penalty_is_the_squared_gradient_on_the_targets_descriptions(target: Target) -> None:
    batch = batch_of(target)
    objective = Adversarial(target.spec(), r1=2.0, **NOW)
    (shown,) = objective.view(batch, make(target, "eagle").eval().loss(batch).predictions)
    inputs = shown.real.detach().clone().requires_grad_()
    expected = 0.0
    for row in range(len(inputs)):  # one description at a time, as the formula is written
        logit = objective.discriminator(
            shown.context[row : row + 1], shown.token[row : row + 1], inputs[row : row + 1], 1
        )
        expected += float(torch.autograd.grad(logit[0], inputs)[0].pow(2).sum()) / len(inputs)
    _, logs = turns(objective, batch, make(target, "eagle").eval().loss(batch), 0.5)
    assert float(logs["gradient_penalty"]) == pytest.approx(expected, rel=1e-4)


def test_the_r1_penalty_flattens_the_discriminator(target: Target) -> None:
    head = make(target, "eagle").eval()
    last = {}
    for r1 in (1e-9, 10.0):
        objective = Adversarial(target.spec(), r1=r1, learning_rate=3e-3, **NOW)
        for _ in range(25):
            _, logs = turns(objective, batch_of(target), head.loss(batch_of(target)), 0.5)
        last[r1] = float(logs["gradient_penalty"])
    assert last[10.0] < last[1e-9] / 5
