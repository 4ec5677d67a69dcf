"""HASS: the loss of several forwards is that of every place by itself, drafting along the text from its own states."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from heads.eagle import Eagle
from koala_bench.contract import check_head
from koala_bench.engine.target import Target
from koala_bench.errors import KoalaBenchError
from koala_bench.heads import FeatureBatch
from tests.heads.test_eagle3 import padded


def make(target: Target, **options: Any) -> Eagle:
    torch.manual_seed(0)
    head = Eagle(target.spec(), noise=0.0, **options)
    with torch.no_grad():
        for name, parameter in head.named_parameters():
            if "_proj" in name:
                parameter.mul_(3)
    return head.to(target.dtype)


def drafted(head: Eagle, ids: list[int], states: torch.Tensor, place: int, step: int) -> torch.Tensor:
    """The state predicted by the pass ``step`` of a draft from ``place``: each pass reads the whole sequence anew, true
    states up to ``place`` and its own behind it; states [tokens, 32].
    """
    read = list(states[: place + 1])
    for ahead in range(step + 1):
        # The pair at each position is its state and the token after it. Plain causal passes, nothing kept.
        out = head(torch.tensor([ids[1 : place + 2 + ahead]]), torch.stack(read)[None])[0, -1]
        read.append(out.detach())
    return out


@pytest.mark.parametrize("options", [{"forwards": 3}, {"forwards": 2, "layers": 2}, {"forwards": 1}])
def test_the_loss_and_its_gradient_are_those_of_every_place_by_itself(target: Target, options: dict[str, Any]) -> None:
    head = make(target, **options)
    batch = padded(target, head)
    total = torch.zeros(())
    for step in range(head.forwards):
        losses = []
        for row, ids in enumerate(batch.ids.tolist()):
            states = batch.hidden[row, :, -1]
            for place in range(int(batch.lengths[row]) - 1 - step):
                if batch.supervised[row, place + step]:
                    state = drafted(head, ids, states, place, step)
                    wanted = torch.softmax(target.output(states[place + step + 1]), dim=-1)
                    scores = wanted * torch.log_softmax(target.output(state), dim=-1)
                    losses.append(F.smooth_l1_loss(state, states[place + step + 1]) - 0.1 * scores.sum())
        total = total + torch.stack(losses).mean()
    expected = torch.autograd.grad(total, list(head.parameters()))
    found = head.loss(batch)
    assert float(found.total.detach()) == pytest.approx(float(total.detach()), rel=1e-4)
    assert [prediction.depth for prediction in found.predictions] == list(range(1, head.forwards + 1))
    for own, other in zip(torch.autograd.grad(found.total, list(head.parameters())), expected, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-3, atol=1e-3 * float(other.abs().max()))


def test_what_it_predicts_at_each_forward_is_what_it_drafts(target64: Target) -> None:
    """The states of the passes are those that a chain along the text is grown from."""
    head = make(target64, forwards=3, layers=2)
    ids = torch.randint(3, 259, (1, 12), generator=torch.Generator().manual_seed(0))
    states = target64.states(ids)[:, :-1, 0]
    with torch.no_grad():
        for step, out in enumerate(head.unrolled(ids[:, 1:], states)):
            for place in range(11 - step):
                expected = drafted(head, ids[0].tolist(), states[0], place, step)
                torch.testing.assert_close(out[0, place], expected, rtol=1e-9, atol=1e-9)


def test_the_first_forward_is_eagles_bit_for_bit(target: Target) -> None:
    head = make(target)
    batch = padded(target, head)
    predicted = head(batch.ids[:, 1:], batch.hidden[:, :-1, -1])
    assert torch.equal(head.unrolled(batch.ids[:, 1:], batch.hidden[:, :-1, -1])[0], predicted)


def test_more_forwards_than_tokens_count_nothing(target: Target) -> None:
    head = make(target, forwards=6)
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    supervised = torch.ones_like(ids, dtype=torch.bool)
    batch = FeatureBatch(ids, supervised, target.states(ids).clone(), 0, target.output, torch.tensor([5]))
    found = head.loss(batch)
    found.total.backward()
    assert torch.isfinite(found.total)
    assert [len(prediction.rows) for prediction in found.predictions] == [4, 3, 2, 1, 0, 0]


@pytest.mark.parametrize(
    ("options", "words"),
    [({"forwards": 0}, "forwards is 0"), ({"forwards": 2, "checkpointing": True}, "checkpointing")],
)
def test_wrong_options_are_refused(target: Target, options: dict[str, Any], words: str) -> None:
    with pytest.raises(KoalaBenchError, match=words):
        make(target, **options)


def test_the_contract_is_kept() -> None:
    assert [str(result) for result in check_head("eagle", {"forwards": 3}) if result.outcome == "failed"] == []
