"""The bundled heads: distinct layers, gradients everywhere, drafts that agree with the loss, memory that forgets."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from heads.eagle import Eagle
from heads.koala import Adversarial
from heads.medusa import Medusa
from koala_bench.decoding.loop import VANILLA_TREE, Vanilla, decode
from koala_bench.engine.target import Target
from koala_bench.errors import KoalaBenchError
from koala_bench.heads import Committed, DraftHead, FeatureBatch, TrainableHead
from koala_bench.tree import load_template
from tests.support.turns import turns


def batch_of(target: Target, seed: int = 0, rows: int = 3, tokens: int = 24) -> FeatureBatch:
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 259, (rows, tokens), generator=draw)
    supervised = torch.zeros(rows, tokens, dtype=torch.bool)
    supervised[:, 6:20] = True
    return FeatureBatch(ids, supervised, target.states(ids).clone(), seed, target.output, torch.full((rows,), tokens))


def make(target: Target, name: str, layers: int = 1, **options: Any) -> Any:
    torch.manual_seed(0)
    cls = {"medusa": Medusa, "eagle": Eagle}[name]
    return cls(target.spec(), layers=layers, **options)


@pytest.mark.parametrize("name", ["medusa", "eagle"])
def test_heads_fulfil_the_contract(target: Target, name: str) -> None:
    head = make(target, name)
    assert isinstance(head, DraftHead)
    assert isinstance(head, TrainableHead)


@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("name", ["medusa", "eagle"])
def test_every_layer_has_parameters_of_its_own_and_every_one_gets_a_gradient(
    target: Target, name: str, layers: int
) -> None:
    head = make(target, name, layers)
    # Medusa's blocks start at zero weights, so one step is needed before the gradient reaches all of them.
    optimiser = torch.optim.SGD(head.parameters(), lr=0.05)
    for _ in range(2):
        optimiser.zero_grad()
        head.loss(batch_of(target)).total.backward()
        optimiser.step()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in head.parameters())
    one = sum(p.numel() for p in make(target, name, 1).parameters())
    two = sum(p.numel() for p in make(target, name, 2).parameters())
    assert sum(p.numel() for p in head.parameters()) == one + (layers - 1) * (two - one)
    assert two > one


def test_the_blocks_of_a_medusa_head_are_not_one_block_twice(target: Target) -> None:
    head = make(target, "medusa", 2)
    head.loss(batch_of(target)).total.backward()
    gradient = head.block_weight.grad
    assert not torch.equal(gradient[0], gradient[1])


def test_a_fresh_medusa_head_guesses_what_the_target_predicts_next(target: Target) -> None:
    head = make(target, "medusa")
    assert torch.equal(head.output_weight[2], target.spec().output_weight)
    assert not head.block_weight.any()


@pytest.mark.parametrize("layers", [1, 2])
def test_eagle_drafts_what_its_training_pass_predicts(target64: Target, layers: int) -> None:
    head = make(target64, "eagle", layers).double().eval()
    ids = torch.randint(3, 259, (1, 30), generator=torch.Generator().manual_seed(1))
    states = target64.states(ids)[0]
    template = load_template("2x1")
    with torch.no_grad():
        whole = head(ids[:, 1:], states[None, :-1, 0])[0]
        head.begin(template, 64)
        # Fed in three pieces, as verification would: 20 positions, then 1, then 8.
        for start, stop in ((0, 20), (20, 21), (21, 29)):
            tree = head.draft(Committed(ids[0, start + 1 : stop + 1], states[start:stop], start))
            best = target64.output(whole[stop - 1]).topk(2).indices
            assert tree.tokens[0] == ids[0, stop]
            assert tree.tokens[1:3].tolist() == best.tolist()


def test_eagle_grows_a_level_from_its_own_guess(target64: Target) -> None:
    head = make(target64, "eagle", 2).double().eval()
    ids = torch.randint(3, 259, (1, 20), generator=torch.Generator().manual_seed(1))
    states = target64.states(ids)[0]
    with torch.no_grad():
        head.begin(load_template("eagle/mc_sim_7b_63"), 64)
        tree = head.draft(Committed(ids[0, 1:], states[:-1], 0))
        shape = tree.shape
        # The same along one path without a tree: guess a state, take it for true, guess on.
        leaf = shape.leaf_paths[0]
        pairs = list(states[:-1, 0])
        tokens = ids[0, 1:].tolist()
        for node in leaf[1:]:
            guessed = head(torch.tensor([tokens]), torch.stack(pairs)[None])[0, -1]
            assert int(tree.tokens[node]) in target64.output(guessed).topk(4).indices.tolist()
            pairs.append(guessed)
            tokens.append(int(tree.tokens[node]))


@pytest.mark.parametrize("tree", ["medusa/mc_sim_7b_63", "3x2x1", "chain-4"])
@pytest.mark.parametrize("name", ["medusa", "eagle"])
@pytest.mark.parametrize("layers", [1, 2])
def test_untrained_heads_are_lossless(target64: Target, name: str, layers: int, tree: str) -> None:
    head = make(target64, name, layers).double().eval()
    prompt = [1, 70, 81, 82, 90, 33]
    for _ in range(2):  # the second time the head must have forgotten the first
        answer = decode(target64, head, load_template(tree), prompt, 40, ())
        assert answer.tokens == decode(target64, Vanilla(), VANILLA_TREE, prompt, 40, ()).tokens


def test_begin_forgets_the_sequence(target64: Target) -> None:
    head = make(target64, "eagle").double().eval()
    template = load_template("3x2x1")
    first = decode(target64, head, template, [1, 70, 81], 30, (), trace=True)
    decode(target64, head, template, [1, 5, 6, 7, 8, 9, 10], 50, ())
    again = decode(target64, head, template, [1, 70, 81], 30, (), trace=True)
    assert first.steps == again.steps


def test_medusas_labels_can_be_the_targets_distribution(target: Target) -> None:
    head, batch = make(target, "medusa", labels="target"), batch_of(target)
    found = head.loss(batch)
    p, wanted = batch.target_probabilities.flatten(0, 1), 0.0
    for each in found.predictions:
        # Depth d is drafted from the state at a row and stands d + 1 behind it: the state d behind predicts it.
        wanted -= float((p[each.rows + each.depth] * each.logits.log_softmax(-1)).sum(-1).mean())
    assert float(found.total.detach()) == pytest.approx(wanted, rel=1e-5)
    assert float(make(target, "medusa").loss(batch).total.detach()) != pytest.approx(wanted, rel=1e-3)
    with pytest.raises(KoalaBenchError, match="labels are 'soft'"):
        make(target, "medusa", labels="soft")


def test_a_template_deeper_than_medusas_heads_is_refused(target: Target) -> None:
    with pytest.raises(KoalaBenchError, match="drafts only 2"):
        make(target, "medusa", heads=2).begin(load_template("medusa/mc_sim_7b_63"), 64)


def test_eagles_noise_depends_on_the_batch_alone(target: Target) -> None:
    head = make(target, "eagle").train()
    torch.manual_seed(1)
    first = head.loss(batch_of(target)).total
    torch.manual_seed(2)
    assert torch.equal(first, head.loss(batch_of(target)).total)
    assert not torch.equal(first, head.eval().loss(batch_of(target)).total)


@pytest.mark.parametrize("name", ["medusa", "eagle"])
def test_predictions_stand_where_the_loss_says(target: Target, name: str) -> None:
    head = make(target, name).eval()
    batch = batch_of(target)
    for prediction in head.loss(batch).predictions:
        ahead = prediction.rows + prediction.depth
        assert (ahead // batch.ids.shape[1] == prediction.rows // batch.ids.shape[1]).all(), (
            "a prediction must not cross into the next dialogue"
        )
        assert prediction.feature.shape == (len(prediction.rows), 32)
        assert prediction.logits.shape == (len(prediction.rows), 259)


@pytest.mark.parametrize("kind", ["feature", "embedding"])
@pytest.mark.parametrize("name", ["medusa", "eagle"])
@pytest.mark.parametrize("balanced", [False, True])
def test_the_discriminator_learns_and_its_gradient_reaches_the_head_alone(
    target: Target, name: str, kind: str, balanced: bool
) -> None:
    head = make(target, name).eval()
    objective = Adversarial(target.spec(), kind, weight=0.5, balanced=balanced, start=0.0, ramp=0.0, learning_rate=3e-3)
    accuracies = []
    for _ in range(30):
        found = head.loss(batch_of(target))
        term, logs = turns(objective, batch_of(target), found, 0.5)
        accuracies.append(float(logs["discriminator_accuracy"]))
    assert accuracies[-1] > 0.8
    assert term is not None
    for p in objective.parameters():
        p.grad = None
    head.zero_grad()
    term.backward()
    assert all(p.grad is None for p in objective.parameters())
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in head.parameters())


def test_a_balanced_weight_is_the_ratio_of_the_gradients(target: Target) -> None:
    head = make(target, "eagle").eval()
    objective = Adversarial(target.spec(), weight=0.25, balanced=True, start=0.0, ramp=0.0)
    found = head.loss(batch_of(target))
    term, _ = turns(objective, batch_of(target), found, 0.5)
    feature = found.predictions[0].feature
    ratio = [torch.autograd.grad(loss, feature, retain_graph=True)[0].norm() for loss in (term, found.total)]
    assert float(ratio[0] / ratio[1]) == pytest.approx(0.25, rel=1e-3)


def test_the_objective_sets_in_late_and_ramps_up(target: Target) -> None:
    head = make(target, "eagle").eval()
    objective = Adversarial(target.spec(), weight=0.4, start=0.5, ramp=0.2, learning_rate=1e-12)
    found = head.loss(batch_of(target))
    assert turns(objective, batch_of(target), found, 0.4)[0] is None
    full, half = (turns(objective, batch_of(target), found, progress)[0] for progress in (0.9, 0.6))
    assert float((half / full).detach()) == pytest.approx(0.5, rel=1e-4)


@pytest.mark.parametrize(
    ("options", "words"), [({"discriminator": "fature"}, "Unknown discriminator"), ({"weight": -1.0}, "negative")]
)
def test_wrong_objective_options_are_refused(target: Target, options: dict[str, Any], words: str) -> None:
    with pytest.raises(KoalaBenchError, match=words):
        Adversarial(target.spec(), **options)


def test_padding_changes_no_loss(target: Target) -> None:
    """A row's loss is the same alone and beside a longer one; upstream's last position of a row never counts."""
    draw = torch.Generator().manual_seed(5)
    ids = torch.randint(3, 259, (1, 16), generator=draw)
    supervised = torch.ones(1, 16, dtype=torch.bool)
    alone = FeatureBatch(ids, supervised, target.states(ids).clone(), 0, target.output, torch.tensor([16]))
    wide = torch.cat([ids, torch.zeros(1, 9, dtype=torch.int64)], dim=1)
    marked = torch.cat([supervised, torch.zeros(1, 9, dtype=torch.bool)], dim=1)
    padded = FeatureBatch(wide, marked, target.states(wide).clone(), 0, target.output, torch.tensor([16]))
    for name in ("medusa", "eagle"):
        head = make(target, name).eval()
        assert torch.allclose(head.loss(alone).total, head.loss(padded).total, atol=1e-5), name
