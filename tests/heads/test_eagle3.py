"""EAGLE-3: its loss, its drafts and what it keeps are the same as computed anew, place by place, without caches or
unrolling.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from heads.eagle3 import Eagle3, fused_layers
from heads.koala import Adversarial
from koala_bench.contract import check_head
from koala_bench.contract.bench import batch_of, drafts_along, optimiser_of, random_ids, train
from koala_bench.decoding.loop import VANILLA_TREE, Vanilla, decode
from koala_bench.decoding.sampling import Draws, Sampling
from koala_bench.engine.target import Target
from koala_bench.errors import KoalaBenchError
from koala_bench.heads import FeatureBatch
from koala_bench.presets import MethodPreset
from koala_bench.testing import tiny_config, tiny_target
from koala_bench.training.checkpoints import build_head_of, load_head, save_head
from koala_bench.training.held_out import HeldOut, held_out_acceptance
from koala_bench.tree import load_template
from tests.support.turns import turns

PROMPT = [1, 70, 81, 82, 90, 33]
Pairs = list[tuple[torch.Tensor, torch.Tensor]]


@pytest.fixture(scope="session")
def deep64(tmp_path_factory: pytest.TempPathFactory) -> Target:
    """A target with enough layers for upstream's three, and with as many key heads as query heads."""
    return tiny_target(
        tmp_path_factory.mktemp("deep"), tiny_config(num_hidden_layers=7, num_key_value_heads=4), dtype="float64"
    )


def shaken(kind: str, target: Target, ids: torch.Tensor | None = None, **options: Any) -> Any:
    """A head with weights of which none stays as it starts: norms that are not one, layers that change much of what
    passes them.
    """
    torch.manual_seed(0)
    head = build_head_of(target.spec(ids), kind, options)
    with torch.no_grad():
        for name, parameter in head.named_parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
            if "_proj" in name:
                parameter.mul_(3)
    return head.to(target.dtype)


def make(target: Target, ids: torch.Tensor | None = None, **options: Any) -> Eagle3:
    head: Eagle3 = shaken("eagle3", target, ids, **options)
    return head


def padded(target: Target, head: Eagle3) -> FeatureBatch:
    """Two dialogues of different length, whose answers begin at different places."""
    ids = random_ids(2, 14)
    supervised = torch.zeros_like(ids, dtype=torch.bool)
    supervised[0, 5:14], supervised[1, 3:9] = True, True
    return FeatureBatch(
        ids, supervised, target.states(ids, head.features).clone(), 0, target.output, torch.tensor([14, 10])
    )


# ------------------------------------------------------------------------------ the head, spelled out


def norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x / (x.pow(2).mean(dim=-1, keepdim=True) + 1e-6).sqrt() * weight


def turned(x: torch.Tensor) -> torch.Tensor:
    """Rotary positions as turns in the complex plane; x [rows, heads, dim], row r at position r."""
    half = x.shape[-1] // 2
    angles = torch.tensor(
        [[r * 10000.0 ** (-j / half) for j in range(half)] for r in range(len(x))], dtype=torch.float64
    )
    z = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones_like(angles), angles)[:, None]
    return torch.cat([z.real, z.imag], dim=-1)


def layer(weights: dict[str, torch.Tensor], own: str, x: torch.Tensor, heads_read: torch.Tensor) -> torch.Tensor:
    """One decoder layer on rows x [rows, 32]; attention reads ``heads_read``."""
    q, k, v = (
        (heads_read @ weights[f"{own}.self_attn.{name}_proj.weight"].T).unflatten(-1, (-1, 8))
        for name in ("q", "k", "v")
    )  # [rows, heads, 8]
    q, k = turned(q), turned(k)
    attended = torch.zeros_like(q)
    for row in range(len(x)):
        for head in range(q.shape[1]):
            shared = head * k.shape[1] // q.shape[1]
            weight = torch.softmax(k[: row + 1, shared] @ q[row, head] / math.sqrt(8), dim=0)
            attended[row, head] = weight @ v[: row + 1, shared]
    x = x + attended.flatten(1) @ weights[f"{own}.self_attn.o_proj.weight"].T
    normed = norm(x, weights[f"{own}.post_attention_layernorm.weight"])
    gate, up, down = (weights[f"{own}.mlp.{name}_proj.weight"].T for name in ("gate", "up", "down"))
    return x + (F.silu(normed @ gate) * (normed @ up)) @ down


def last_state(head: Eagle3, pairs: Pairs) -> torch.Tensor:
    """What comes out behind pairs of a token's embedding and the state before it, all read at once."""
    weights = head.state_dict()
    embedded, x = (torch.stack(part) for part in zip(*pairs, strict=True))
    read = torch.cat(
        [norm(embedded, weights["midlayer.input_layernorm.weight"]), norm(x, weights["midlayer.hidden_norm.weight"])],
        dim=-1,
    )
    x = layer(weights, "midlayer", x, read)
    for index in range(len(head.layers)):
        x = layer(weights, f"layers.{index}", x, norm(x, weights[f"layers.{index}.input_layernorm.weight"]))
    return x[-1]


def guess(head: Eagle3, target: Target, committed: list[int], hidden: torch.Tensor, drafted: list[int]) -> torch.Tensor:
    """Scores of what follows the drafted tokens behind a committed text, whose last token has no state yet; hidden
    [tokens - 1, features, 32].
    """
    weights = head.state_dict()
    pairs = [
        (target.embed(torch.tensor(token)), weights["fc.weight"] @ torch.cat(list(state[:3])))
        for token, state in zip(committed[1:], hidden, strict=True)
    ]
    for token in drafted:
        pairs.append((target.embed(torch.tensor(token)), last_state(head, pairs)))
    return weights["lm_head.weight"] @ norm(last_state(head, pairs), weights["norm.weight"])


# ------------------------------------------------------------------------------ tests


@pytest.mark.parametrize(
    ("layers", "read"),
    [
        (32, (2, 16, 29, -1)),
        (40, (2, 20, 37, -1)),
        (7, (2, 3, 4, -1)),
        (4, (1, 2, -1)),
        (2, (0, 1, -1)),
        (1, (0, 0, -1)),
    ],
)
def test_it_reads_upstreams_layers_where_there_are_as_many(layers: int, read: tuple[int, ...]) -> None:
    assert fused_layers(layers) == read


@pytest.mark.parametrize("options", [{}, {"layers": 2, "steps": 3}])
@pytest.mark.parametrize("kind", ["target64", "deep64"])
def test_the_loss_is_that_of_every_place_by_itself(
    kind: str, options: dict[str, Any], request: pytest.FixtureRequest
) -> None:
    target: Target = request.getfixturevalue(kind)
    head = make(target, **options)
    batch = padded(target, head)
    expected = 0.0
    for step in range(head.steps):
        losses = []
        for row, ids in enumerate(batch.ids.tolist()):
            for place in range(int(batch.lengths[row]) - 1 - step):
                if batch.supervised[row, place + step]:
                    scores = guess(
                        head,
                        target,
                        ids[: place + 2],
                        batch.hidden[row, : place + 1],
                        ids[place + 2 : place + 2 + step],
                    )
                    wanted = torch.softmax(target.output(batch.hidden[row, place + step + 1, -1]), dim=-1)
                    losses.append(-float((wanted * torch.log_softmax(scores, dim=-1)).sum()))
        expected += 0.8**step * sum(losses) / len(losses)
    found = head.loss(batch)
    assert float(found.total.detach()) == pytest.approx(expected, rel=1e-6)
    assert [prediction.depth for prediction in found.predictions] == list(range(1, head.steps + 1))


@pytest.mark.parametrize("layers", [1, 3])
def test_every_parameter_gets_a_gradient(target: Target, layers: int) -> None:
    head = make(target, layers=layers)
    head.loss(padded(target, head)).total.backward()
    assert [name for name, p in head.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []


@pytest.mark.parametrize("name", ["chain-4", "3x2x1", "dynamic-3x4x9"])
@pytest.mark.parametrize(("kind", "layers"), [("target64", 1), ("target64", 2), ("deep64", 1)])
def test_drafts_follow_from_its_own_states_above_them(
    kind: str, layers: int, name: str, request: pytest.FixtureRequest
) -> None:
    """Every node is among the best that the head says anew after the path to it, at its rank in a static tree."""
    target: Target = request.getfixturevalue(kind)
    head, template = make(target, layers=layers).eval(), load_template(name)
    ids = random_ids(1, 22)[0].tolist()
    states = target.states(torch.tensor([ids]), head.features)[0]
    for root, tree in drafts_along(head, target, template, ids, 10):
        for node in tree.shape.inner:
            path = [int(tree.tokens[above]) for above in tree.shape.path_to(node)]
            children = list(tree.shape.children[node])
            best = guess(head, target, ids[: root + 1], states[:root], path[1:]).topk(len(children)).indices
            assert tree.tokens[children].tolist() == best.tolist()


@pytest.mark.parametrize("name", ["chain-6", "medusa/mc_sim_7b_63", "dynamic-3x4x20"])
@pytest.mark.parametrize("layers", [1, 2])
def test_decoding_is_lossless(target64: Target, layers: int, name: str) -> None:
    head = make(target64, layers=layers).eval()
    expected = decode(target64, Vanilla(), VANILLA_TREE, PROMPT, 40, ()).tokens
    for _ in range(2):  # the second time the head must have forgotten the first
        assert decode(target64, head, load_template(name), PROMPT, 40, ()).tokens == expected


def of_some_tokens(target: Target, count: int = 60, **options: Any) -> Eagle3:
    """A head that drafts ``count`` tokens of all over the vocabulary, in no order."""
    ids = torch.randperm(259, generator=torch.Generator().manual_seed(1))[:count]
    return make(target, ids, **options)


@pytest.mark.parametrize("name", ["chain-4", "3x2x1", "dynamic-3x4x9"])
def test_a_smaller_vocabulary_drafts_its_best_tokens_by_the_targets_ids(target64: Target, name: str) -> None:
    head, template = of_some_tokens(target64).eval(), load_template(name)
    ids = random_ids(1, 22)[0].tolist()
    states = target64.states(torch.tensor([ids]), head.features)[0]
    for root, tree in drafts_along(head, target64, template, ids, 10):
        for node in tree.shape.inner:
            path = [int(tree.tokens[above]) for above in tree.shape.path_to(node)]
            children = list(tree.shape.children[node])
            best = guess(head, target64, ids[: root + 1], states[:root], path[1:]).topk(len(children)).indices
            assert tree.tokens[children].tolist() == head.draft_vocabulary[best].tolist()


@pytest.mark.parametrize("name", ["chain-6", "medusa/mc_sim_7b_63", "dynamic-3x4x20"])
def test_decoding_with_a_smaller_vocabulary_is_lossless(target64: Target, name: str) -> None:
    expected = decode(target64, Vanilla(), VANILLA_TREE, PROMPT, 40, ()).tokens
    assert decode(target64, of_some_tokens(target64).eval(), load_template(name), PROMPT, 40, ()).tokens == expected


def test_what_is_never_drafted_is_never_drawn(target: Target) -> None:
    """The rule that samples is told so: its distributions hold nothing there, all of it elsewhere."""
    head = of_some_tokens(target, 5).eval()
    head.pick = Draws(Sampling(1.0), torch.Generator().manual_seed(0))
    others = torch.ones(259, dtype=torch.bool).index_fill(0, head.draft_vocabulary, False)
    for _, tree in drafts_along(head, target, load_template("5x2"), random_ids(1, 12)[0].tolist(), 8):
        assert tree.proposals is not None and not tree.proposals[:, others].any()
        torch.testing.assert_close(tree.proposals.sum(-1), torch.ones(len(tree.proposals)))
        assert set(tree.tokens[1:].tolist()) <= set(head.draft_vocabulary.tolist())
    with pytest.raises(KoalaBenchError, match="5"):
        head.begin(load_template("6x1"), 64)


def test_a_smaller_vocabulary_learns_the_targets_distribution_within_it(target64: Target) -> None:
    head = of_some_tokens(target64, steps=2)
    batch, ids = padded(target64, head), head.draft_vocabulary
    expected, known = 0.0, 0
    for step in range(2):
        losses = []
        for row, text in enumerate(batch.ids.tolist()):
            for place in range(int(batch.lengths[row]) - 1 - step):
                if batch.supervised[row, place + step]:
                    scores = guess(
                        head,
                        target64,
                        text[: place + 2],
                        batch.hidden[row, : place + 1],
                        text[place + 2 : place + 2 + step],
                    )
                    wanted = target64.output(batch.hidden[row, place + step + 1, -1])
                    inside = int(wanted.argmax()) in ids.tolist()
                    known += inside
                    losses.append(
                        -float((torch.softmax(wanted[ids], dim=-1) * torch.log_softmax(scores, dim=-1)).sum())
                        if inside
                        else 0.0
                    )
        expected += 0.8**step * sum(losses) / len(losses)
    assert 0 < known < sum(int(prediction.rows.numel()) for prediction in head.loss(batch).predictions)
    assert float(head.loss(batch).total.detach()) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("at_once", [1 << 24, 300])
def test_what_a_smaller_vocabulary_predicts_is_of_all_tokens(
    target: Target, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether the scores are kept or made when they are asked for; an objective over expected embeddings learns from
    them.
    """
    monkeypatch.setattr("heads.common.losses._AT_ONCE", at_once)
    head = of_some_tokens(target, steps=2)
    batch = padded(target, head)
    found = head.loss(batch)
    for prediction in found.predictions:
        assert isinstance(prediction.scored, torch.Tensor) == (at_once > 300)
        drafted = torch.isfinite(prediction.logits)
        assert prediction.logits.shape == (len(prediction.rows), 259)
        assert torch.equal(drafted, torch.zeros_like(drafted).index_fill(1, head.draft_vocabulary, True))
        torch.testing.assert_close(prediction.logits[:, head.draft_vocabulary], head.lm_head(prediction.feature))
    extra = turns(
        Adversarial(head._spec, discriminator="embedding", weight=0.5, start=0.0, ramp=0.0), batch, found, 0.5
    )[0]
    assert extra is not None
    extra.backward()
    assert (
        all(p.grad is None or torch.isfinite(p.grad).all() for p in head.parameters())
        and head.lm_head.weight.grad.abs().sum() > 0
    )


def test_a_saved_head_remembers_what_it_can_draft(target: Target, tmp_path: Path) -> None:
    head = of_some_tokens(target).eval()
    save_head(
        tmp_path / "eagle3",
        head,
        MethodPreset(head="heads.eagle3:Eagle3", draft_vocabulary=60, tree="chain-3"),
        target,
        {},
    )
    loaded, _, _ = load_head(tmp_path / "eagle3", target)
    assert torch.equal(loaded.draft_vocabulary, head.draft_vocabulary)


@pytest.mark.parametrize("options", [{"steps": 0}, {"layers": 0}])
def test_counts_below_one_are_refused(target: Target, options: dict[str, Any]) -> None:
    with pytest.raises(KoalaBenchError, match=f"number of {next(iter(options))} is 0"):
        make(target, **options)


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


def test_the_adversarial_objective_trains_it_and_nothing_at_weight_zero(target: Target) -> None:
    weights = []
    for weight in (None, 0.0, 0.5):
        head = make(target)
        optimiser = optimiser_of(head)
        objective = None if weight is None else Adversarial(target.spec(), weight=weight, start=0.0, ramp=0.0)
        for step in range(2):
            batch = replace(padded(target, head), seed=step)
            found = head.loss(batch)
            extra = None if objective is None else turns(objective, batch, found, 0.5)[0]
            optimiser.zero_grad(set_to_none=True)
            (found.total if extra is None else found.total + extra).backward()
            optimiser.step()
        weights.append(torch.cat([p.detach().flatten() for p in head.parameters()]))
    assert torch.equal(weights[0], weights[1])
    assert torch.isfinite(weights[2]).all() and not torch.equal(weights[0], weights[2])


def test_more_steps_than_tokens_count_nothing(target: Target) -> None:
    head = make(target, steps=9)
    ids = random_ids(1, 6)
    found = head.loss(batch_of(target, ids, head.features))
    assert torch.isfinite(found.total)
    assert [len(prediction.rows) for prediction in found.predictions] == [3, 3, 3, 2, 1, 0, 0, 0, 0]


def test_a_saved_head_comes_back(target: Target, tmp_path: Path) -> None:
    head = make(target, layers=2, steps=2).eval()
    preset = MethodPreset(head="heads.eagle3:Eagle3", layers=2, options={"steps": 2}, tree="chain-3")
    save_head(tmp_path / "eagle3", head, preset, target, {})
    loaded, _, _ = load_head(tmp_path / "eagle3", target)
    saved = head.state_dict()
    assert saved.keys() == loaded.state_dict().keys()
    assert all(torch.equal(tensor, saved[name]) for name, tensor in loaded.state_dict().items())
    assert (loaded.steps, loaded.features) == (2, head.features)


def test_its_tensors_have_the_published_names(target: Target) -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in make(target).state_dict().items()}
    sizes = {"q": (32, 64), "k": (16, 64), "v": (16, 64), "o": (32, 32)}
    assert shapes == {
        "fc.weight": (32, 96), "norm.weight": (32,), "lm_head.weight": (259, 32),
        **{f"midlayer.self_attn.{name}_proj.weight": shape for name, shape in sizes.items()},
        "midlayer.mlp.gate_proj.weight": (64, 32),
        "midlayer.mlp.up_proj.weight": (64, 32),
        "midlayer.mlp.down_proj.weight": (32, 64),
        **{f"midlayer.{name}.weight": (32,) for name in ("hidden_norm", "input_layernorm", "post_attention_layernorm")},
    }  # fmt: skip


@pytest.mark.filterwarnings(
    "ignore:Mismatch dtype"
)  # torch on norms with float32 weights under autocast; the suite filters it too
def test_it_learns_a_text_by_heart(target: Target) -> None:
    """In bfloat16 autocast, as the suite trains; the target's own answer then takes less than half as many steps as
    with a fresh head.

    What the loss predicts there is what it drafts, at every depth.
    """
    torch.manual_seed(0)
    head = Eagle3(target.spec())
    answer = decode(target, Vanilla(), VANILLA_TREE, PROMPT, 60, ()).tokens
    batch, optimiser = batch_of(target, torch.tensor([PROMPT + answer]), head.features), optimiser_of(head)
    fresh = len(decode(target, head.eval(), load_template("chain-4"), PROMPT, 60, ()).accepted)
    for step in range(60):
        with torch.autocast("cpu", torch.bfloat16):  # one a step: it keeps the casts of the weights until it ends
            train(head, batch, 1, optimiser, step)
    assert len(decode(target, head.eval(), load_template("chain-4"), PROMPT, 60, ()).accepted) < 0.5 * fresh
    found = held_out_acceptance(target, head, HeldOut([], [PROMPT]))
    assert (
        found["teacher_forced_rate_by_depth"] == found["decoded_rate_by_depth"]
        and len(found["decoded_rate_by_depth"]) == 4
    )


@pytest.mark.parametrize("options", [{}, pytest.param({"layers": 2}, marks=pytest.mark.slow)])
def test_the_contract_is_kept(options: dict[str, Any]) -> None:
    assert [str(result) for result in check_head(Eagle3, options) if result.outcome == "failed"] == []
