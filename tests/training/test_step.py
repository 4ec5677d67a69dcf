"""A step of several micro-batches: one is held at a time, and the update is that of all of them."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from koala_bench.common.process_group import SINGLE_PROCESS
from koala_bench.dialogues.encoding import EncodedDialogue
from koala_bench.dialogues.streams import Stream, make_stream
from koala_bench.engine.target import Target
from koala_bench.presets import load_preset
from koala_bench.training.features import features_of_each, in_host_memory
from koala_bench.training.loop import make_trainer
from koala_bench.training.step import Features, HeadTrainer, train_step

METHODS = ["medusa", "eagle+koala", "eagle3"]
COUNT = 4


def single() -> Accelerator:
    """Of single precision, whatever this process trained in before."""
    AcceleratorState._reset_state()
    return Accelerator(cpu=True, mixed_precision="no")


def stream() -> Stream:
    draw = torch.Generator().manual_seed(0)
    talk = [
        EncodedDialogue(torch.randint(259, (20,), generator=draw).tolist(), [False] * 4 + [True] * 16)
        for _ in range(12)
    ]
    return make_stream(talk, [str(i) for i in range(len(talk))], 64, 24, seed=0)


def one_step(target: Target, made: Callable[[int, list[HeadTrainer]], Features]) -> list[torch.Tensor]:
    """Weights of all heads and discriminators after a step in which everything takes part."""
    preset = load_preset("tiny", ["training.precision=no", "training.steps=10", f"training.micro_batches={COUNT}"])
    trainers = [make_trainer(target, name, preset.method(name), preset.training) for name in METHODS]
    makers = [lambda index=index: made(index, trainers) for index in range(COUNT)]
    lines = train_step(single(), trainers, makers, preset.training, 1.0, 9, SINGLE_PROCESS)
    assert all(line is not None and line["loss"] > 0 for line in lines.values())
    modules = [
        *(trainer.head for trainer in trainers),
        *(trainer.objective for trainer in trainers if trainer.objective is not None),
    ]
    return [parameter.detach().clone() for module in modules for parameter in module.parameters()]


def test_one_micro_batch_is_in_memory_at_a_time_and_the_update_is_that_of_all(target: Target) -> None:
    batches = stream()
    seen: list[weakref.ref[torch.Tensor]] = []

    def fresh(index: int, trainers: list[HeadTrainer]) -> Features:
        made = features_of_each(
            target, batches.batch(index), [trainer.head.features for trainer in trainers], seed=index
        )
        whole = next(iter(made.values())).whole
        assert whole is not None
        seen.append(weakref.ref(whole.hidden))
        assert sum(each() is not None for each in seen) <= 2, "the one that is made, and the one before it at most"
        return made

    held: dict[int, Any] = {}

    def kept(index: int, trainers: list[HeadTrainer]) -> Features:
        if index not in held:
            held[index] = features_of_each(
                target, batches.batch(index), [trainer.head.features for trainer in trainers], index
            )
        features: Features = held[index]
        return features

    one, other = one_step(target, fresh), one_step(target, kept)
    assert len(seen) == 2 * COUNT, "an objective that learns asks twice"
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_states_that_waited_elsewhere_come_back_as_they_were(target: Target) -> None:
    made = features_of_each(target, stream().batch(0), [(-1,), (1, -1)], seed=0)
    back = in_host_memory(in_host_memory(made), back_to=target.device)
    for features, batch in made.items():
        assert torch.equal(back[features].hidden, batch.hidden)
        assert torch.equal(back[features].target_probabilities, batch.target_probabilities)
    assert back[(-1,)].whole is back[(1, -1)].whole is not None


@pytest.mark.parametrize("method", ["medusa", "eagle+koala"])
def test_equal_micro_batches_make_the_step_of_one(target: Target, method: str) -> None:
    found = features_of_each(target, stream().batch(0), [(-1,)], seed=0)
    weights = []
    for count in (1, 2):
        preset = load_preset("tiny", ["training.precision=no", "training.steps=10", f"training.micro_batches={count}"])
        trainer = make_trainer(target, method, preset.method(method), preset.training)
        train_step(single(), [trainer], [lambda: found] * count, preset.training, 1e-2, 9, SINGLE_PROCESS)
        weights.append([parameter.detach() for parameter in trainer.head.parameters()])
    for one, two in zip(*weights, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-6)
