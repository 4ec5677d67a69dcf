"""Memory in training: losses of large vocabularies are made piece by piece, and layers computed again; both change no
gradient.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

import heads.common.losses
from heads.common.discriminators import View
from koala_bench.engine.target import Target
from koala_bench.heads import HeadLoss
from koala_bench.registry import HEADS, build
from tests.heads.test_heads import batch_of, make


def kept_bytes(head: Any, target: Target) -> tuple[int, HeadLoss]:
    """Bytes that a loss keeps for its gradients, each tensor counted once."""
    seen: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        seen[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        found = head.loss(batch_of(target))
    return sum(seen.values()), found


def gradients(head: Any, found: HeadLoss) -> list[torch.Tensor]:
    head.zero_grad(set_to_none=True)
    (
        found.total + sum(p.logits.float().logsumexp(-1).sum() for p in found.predictions)
    ).backward()  # as an objective might ask for them
    return [p.grad.clone() for p in head.parameters() if p.grad is not None]


@pytest.mark.parametrize("name", ["medusa", "eagle", "hydra"])
def test_a_loss_in_pieces_is_the_whole_loss(target: Target, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    head = build(HEADS, name, target.spec(), {}).train()
    whole_bytes, whole = kept_bytes(head, target)
    expected = gradients(head, whole)
    monkeypatch.setattr(heads.common.losses, "_AT_ONCE", 3 * 259)
    pieces_bytes, pieces = kept_bytes(head, target)
    torch.testing.assert_close(pieces.total, whole.total)
    for part, value in whole.parts.items():
        torch.testing.assert_close(pieces.parts[part], value)
    for one, other in zip(gradients(head, pieces), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    assert pieces_bytes < whole_bytes


def test_layers_that_are_computed_again_give_the_same_gradients(target: Target) -> None:
    plain, again = (make(target, "eagle", 3, checkpointing=on).train() for on in (False, True))
    again.load_state_dict(plain.state_dict())
    (more, first), (less, second) = kept_bytes(plain, target), kept_bytes(again, target)
    torch.testing.assert_close(first.total, second.total, rtol=0, atol=0)
    for one, other in zip(gradients(plain, first), gradients(again, second), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
    assert less < 0.7 * more


@pytest.mark.parametrize("name", ["medusa", "eagle"])
def test_a_discriminator_of_embeddings_is_shown_the_same_in_pieces(
    target: Target, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    head, view, batch = (
        build(HEADS, name, target.spec(), {}).train(),
        View(target.spec(), "embedding", "embedding"),
        batch_of(target),
    )
    found = []
    for at_once in (heads.common.losses._AT_ONCE, 3 * 259):
        monkeypatch.setattr(heads.common.losses, "_AT_ONCE", at_once)
        head.zero_grad(set_to_none=True)
        shown = view(batch, head.loss(batch).predictions)
        sum(each.fake.pow(3).sum() for each in shown).backward()  # type: ignore[union-attr]
        found.append(
            [
                *(side.detach() for each in shown for side in (each.real, each.fake)),
                *(p.grad.clone() for p in head.parameters() if p.grad is not None),
            ]
        )
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-3, atol=1e-4)
