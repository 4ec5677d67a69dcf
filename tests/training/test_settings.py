"""Every setting of a training does what it says: rates, moments, decay, clipping, noise and batches by length."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch

from koala_bench.common.process_group import SINGLE_PROCESS
from koala_bench.dialogues.encoding import EncodedDialogue
from koala_bench.dialogues.streams import make_stream
from koala_bench.engine.target import Target
from koala_bench.presets import load_preset
from koala_bench.registry import HEADS, build
from koala_bench.training.loop import make_trainer, schedule
from koala_bench.training.step import train_step
from tests.heads.test_heads import batch_of
from tests.training.test_step import single


def test_the_rate_warms_up_linearly_and_falls_by_a_cosine_to_its_final_fraction() -> None:
    options = load_preset(
        "tiny", ["training.steps=110", "training.warmup_fraction=0.09", "training.final_rate_fraction=0.2"]
    ).training
    found = [schedule(step, options) for step in range(110)]
    assert found[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert found[10] == 1.0
    assert found[60] == pytest.approx(0.2 + 0.8 * 0.5)
    assert found[35] == pytest.approx(0.2 + 0.8 * 0.5 * (1 + math.sqrt(0.5)))
    assert found[109] == pytest.approx(0.2, abs=1e-3) and found[109] > 0.2
    assert all(later < before for before, later in pairwise(found[10:]))


def by_hand(weights: torch.Tensor, gradients: list[torch.Tensor], rate: float, options: Any) -> torch.Tensor:
    """AdamW with decoupled decay (Loshchilov and Hutter 2019), after gradients that were clipped to a norm."""
    first, second = torch.zeros_like(weights), torch.zeros_like(weights)
    (one, two), epsilon = options.betas, 1e-8
    for step, gradient in enumerate(gradients, 1):
        clipped = gradient * min(1.0, options.clip_norm / (float(gradient.norm()) + 1e-6))
        weights = weights * (1 - rate * options.weight_decay)
        first, second = one * first + (1 - one) * clipped, two * second + (1 - two) * clipped**2
        mean, square = first / (1 - one**step), second / (1 - two**step)
        weights = weights - rate * mean / (square.sqrt() + epsilon)
    return weights


def flat(tensors: Any) -> torch.Tensor:
    return torch.cat([tensor.detach().flatten().double() for tensor in tensors])


def test_an_update_is_adamw_with_the_settings_betas_decay_and_clipping(target: Target) -> None:
    options = load_preset(
        "tiny",
        [
            "training.betas=[0.5, 0.8]",
            "training.weight_decay=0.3",
            "training.clip_norm=0.05",
            "training.learning_rate=0.01",
            "training.steps=100",
        ],
    ).training
    trainer = make_trainer(target, "medusa", load_preset("tiny").method("medusa"), options)
    batch, before = batch_of(target), flat(trainer.head.parameters())
    gradients: list[torch.Tensor] = []
    for factor in (1.0, 1.0, 1.0):
        trainer.head.loss(batch).total.backward()
        gradients.append(flat(p.grad for p in trainer.head.parameters()))
        trainer.head.zero_grad(set_to_none=True)
        lines = train_step(single(), [trainer], [lambda: {(-1,): batch}], options, factor, 9, SINGLE_PROCESS)
        line = lines["medusa"]
        assert line is not None and line["gradient_norm"] == pytest.approx(float(gradients[-1].norm()), rel=1e-3)
        assert line["gradient_norm"] > options.clip_norm, "else nothing is clipped"
    torch.testing.assert_close(
        flat(trainer.head.parameters()), by_hand(before, gradients, 0.01, options), rtol=1e-4, atol=1e-5
    )


def test_a_step_takes_the_scheduled_part_of_the_rate(target: Target) -> None:
    moved = []
    for factor in (1.0, 0.25):
        preset = load_preset("tiny", ["training.learning_rate=0.01"])
        trainer = make_trainer(target, "medusa", preset.method("medusa"), preset.training)
        before, batch = flat(trainer.head.parameters()), batch_of(target)
        train_step(single(), [trainer], [lambda: {(-1,): batch}], preset.training, factor, 1, SINGLE_PROCESS)  # noqa: B023
        moved.append(float((flat(trainer.head.parameters()) - before).norm()))
    assert moved[1] == pytest.approx(0.25 * moved[0], rel=1e-2)


def test_eagles_noise_is_uniform_and_falls_with_a_rows_length(target: Target) -> None:
    head = build(HEADS, "eagle", target.spec(), {"noise": 0.3})
    batch, seen = replace(batch_of(target), lengths=torch.tensor([24, 12, 8])), []
    head.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[1]))
    for training in (True, False):
        head.train(training).loss(batch)
    noisy, plain = seen
    assert torch.equal(plain, batch.hidden[:, :-1, -1].float())
    for row, length in enumerate(batch.lengths.tolist()):
        share = (noisy - plain)[row] / (0.3 * 512 / length)
        assert 0.49 < share.max() <= 0.5 and -0.5 <= share.min() < -0.49
        assert abs(float(share.std()) - 1 / math.sqrt(12)) < 0.02


def test_dialogues_of_a_batch_are_of_similar_length_and_batches_come_mixed() -> None:
    lengths = np.random.default_rng(0).integers(10, 200, 400).tolist()
    talk = [EncodedDialogue([1] * n, [False] * 4 + [True] * (n - 4)) for n in lengths]
    stream = make_stream(talk, [str(i) for i in range(len(talk))], 1024, 256, seed=0)
    batches, covered = [], 0
    while covered < len(talk):
        batches.append(stream.batch(len(batches)))
        covered += len(batches[-1].samples)
    full = sum(batch.ids.numel() for batch in batches)
    assert 1 - sum(lengths) / full < 0.05, "padding"
    assert max(batch.ids.numel() for batch in batches) <= 1024
    longest = np.array([batch.ids.shape[1] for batch in batches])
    assert abs(np.corrcoef(np.arange(len(longest)), longest)[0, 1]) < 0.5, "short ones do not all come first"
