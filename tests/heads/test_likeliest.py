"""HASS's top-k loss: its formula at each forward, and from when on it is there."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from heads.eagle import Eagle
from heads.likeliest import Likeliest
from koala_bench.engine.target import Target
from koala_bench.errors import KoalaBenchError
from tests.heads.test_heads import batch_of, make


def test_it_is_the_cross_entropy_over_the_likeliest_tokens_summed_over_forwards(target: Target) -> None:
    torch.manual_seed(0)
    head, batch = Eagle(target.spec(), noise=0.0, forwards=3).to(target.dtype), batch_of(target)
    found = head.loss(batch)
    wanted = torch.zeros(())
    for prediction in found.predictions:
        p = batch.target_probabilities.flatten(0, 1)[prediction.rows + prediction.depth]
        products = p * torch.log_softmax(prediction.logits, dim=-1)
        likeliest = p >= p.sort(dim=-1, descending=True).values[:, 3:4]
        wanted = wanted - (products * likeliest).sum(-1).mean()
    objective: Any = Likeliest(target.spec(), count=4, weight=0.5)
    value, logs = objective.term(batch, found, 0.9, None)
    torch.testing.assert_close(value, 0.5 * wanted)
    torch.testing.assert_close(logs["of_likeliest"], wanted.detach() / 3)


def test_it_joins_near_the_end_of_training(target: Target) -> None:
    objective: Any = Likeliest(target.spec())
    assert [objective.active(progress) for progress in (0.0, 0.79, 0.8, 1.0)] == [False, False, True, True]
    assert not Likeliest(target.spec(), weight=0.0).active(0.9)
    value, _ = objective.term(batch := batch_of(target), make(target, "medusa").loss(batch), 0.9, None)
    assert value > 0, "any head that reports predictions can have it"


@pytest.mark.parametrize(
    ("options", "words"),
    [({"count": 0}, "0 likeliest"), ({"begins": 1.0}, "after 1.0"), ({"weight": -1.0}, "weight of the objective")],
)
def test_wrong_options_are_refused(target: Target, options: dict[str, Any], words: str) -> None:
    with pytest.raises(KoalaBenchError, match=words):
        Likeliest(target.spec(), **options)
