"""One training step: updates every head from the same micro-batches, one of which is in memory at a time."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from koala_bench.common.process_group import ProcessGroup
from koala_bench.heads import FeatureBatch, HeadLoss
from koala_bench.presets import MethodPreset, TrainingPreset

LOG_EVERY = 10
Features = Mapping[tuple[int, ...], FeatureBatch]  # by what heads read, as ``features_of_each`` returns them


@dataclass
class HeadTrainer:
    """One head in training: weights, objective and optimiser.

    Attributes:
        name: of the method.
        head, objective: the trained head, and the term added to its supervised loss, if any.
        learning_rate: at the top of the schedule.
    """

    name: str
    preset: MethodPreset
    head: Any  # a TrainableHead that is an nn.Module
    objective: Any | None
    learning_rate: float
    optimiser: torch.optim.Optimizer

    @property
    def parameters(self) -> int:
        """Number of trained parameters of the head."""
        return sum(p.numel() for p in self.head.parameters() if p.requires_grad)


def train_step(
    accelerator: Accelerator,
    trainers: Sequence[HeadTrainer],
    micro_batches: Sequence[Callable[[], Features]],
    options: TrainingPreset,
    factor: float,
    step: int,
    group: ProcessGroup,
    timings: dict[str, float] | None = None,
) -> dict[str, dict[str, float] | None]:
    """One update of each head; returns what is logged of each, None where the loss or the gradient is not finite.

    A head whose objective is trained needs all micro-batches twice, with the objective's update in between. A single
    micro-batch is kept; several are computed again, so that memory does not grow with their number.

    Args:
        micro_batches: of this process; each is called at most twice and returns its features. The update sums over all
            processes.
        factor: on the learning rates.
        timings: seconds by head, added to.
    """
    updates = [_Update(accelerator, trainer, options, factor, step, group, len(micro_batches)) for trainer in trainers]

    def timed(update: _Update, run: Callable[[FeatureBatch], None], found: Features) -> None:
        before = time.perf_counter()
        run(found[update.trainer.head.features])
        if timings is not None:
            timings[update.trainer.name] = timings.get(update.trainer.name, 0.0) + time.perf_counter() - before

    if len(micro_batches) == 1:  # one head after the other, so that memory holds activations and gradients of one
        found, lines = micro_batches[0](), {}
        for update in updates:
            timed(update, update.from_one, found)
            lines[update.trainer.name] = update.finish()
        return lines
    learning = [update for update in updates if update.learns]
    for make in micro_batches:
        found = make()
        for update in updates:
            timed(update, update.add_objective_gradients if update.learns else update.add_head_gradients, found)
        _forget(found)
    for update in learning:
        update.step_objective()
    for make in micro_batches if learning else ():
        found = make()
        for update in learning:
            timed(update, update.add_head_gradients, found)
        _forget(found)
    return {update.trainer.name: update.finish() for update in updates}


def _forget(found: Features) -> None:
    # memory must not grow with the number of micro-batches, and distributions are cheap to compute again
    for batch in found.values():
        batch.forget()


class _Update:
    """One head's update: its objective's gradients, the objective's step, the head's gradients, the head's step.

    Call ``add_objective_gradients`` for each micro-batch and then ``step_objective``, if the objective is trained;
    ``add_head_gradients`` for each micro-batch; then ``finish``.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        trainer: HeadTrainer,
        options: TrainingPreset,
        factor: float,
        step: int,
        group: ProcessGroup,
        count: int,
    ) -> None:
        for param_group in trainer.optimiser.param_groups:
            param_group["lr"] = trainer.learning_rate * factor
        self.accelerator, self.trainer, self.options, self.step, self.group = accelerator, trainer, options, step, group
        self.share, self.done = 1.0 / options.micro_batches, step / options.steps
        objective = trainer.objective
        self.objective = objective if objective is not None and objective.active(self.done) else None
        self.learns = self.objective is not None and getattr(self.objective, "learns", True)
        self.alone = count == 1
        self.kept: HeadLoss | None = None
        self.learned: list[dict[str, torch.Tensor]] = []
        self.logs: list[dict[str, torch.Tensor]] = []

    def from_one(self, batch: FeatureBatch) -> None:
        """All but ``finish``, from the only micro-batch."""
        if self.learns:
            self.add_objective_gradients(batch)
            self.step_objective()
        self.add_head_gradients(batch)

    def add_objective_gradients(self, batch: FeatureBatch) -> None:
        """Add to the objective's own gradients."""
        assert self.objective is not None
        found = self._loss(batch)
        self.learned.append(self.objective.learn(batch, found, self.done, self.share))
        if self.alone:  # else each loss is computed again to save memory
            self.kept = found

    def step_objective(self) -> None:
        """Update the objective."""
        assert self.objective is not None
        self.group.sum_gradients(
            self.objective.parameters(), torch.zeros(0, device=next(self.trainer.head.parameters()).device)
        )
        self.objective.step(self.done)

    def add_head_gradients(self, batch: FeatureBatch) -> None:
        """Add to the head's gradients."""
        found = self.kept or self._loss(batch)
        extra, parts = (
            (None, {}) if self.objective is None else self.objective.term(batch, found, self.done, self.group.agree)
        )
        total = found.total
        if extra is not None:
            replaces = found.rest is not None and getattr(self.objective, "replaces", False)
            total = (found.rest if replaces else total) + extra
        self.accelerator.backward(total if self.share == 1.0 else total * self.share)
        of_objective = self.learned[len(self.logs)] if self.learns else {}
        self.logs.append({"loss": found.total.detach(), **found.parts, **of_objective, **parts})
        self.kept = None

    def finish(self) -> dict[str, float] | None:
        """Clip, update the head, and return what is logged."""
        trainer, options = self.trainer, self.options
        losses = self.share * torch.stack([each["loss"] for each in self.logs]).sum()[None]
        loss = self.group.sum_gradients(trainer.head.parameters(), losses)
        norm = nn.utils.clip_grad_norm_(trainer.head.parameters(), options.clip_norm)
        if not torch.isfinite(norm) or not torch.isfinite(loss):
            return None
        trainer.optimiser.step()
        trainer.optimiser.zero_grad(set_to_none=True)
        if (self.step + 1) % LOG_EVERY and self.step:
            return {}
        # The loss is that of the whole step; its parts are logged for this process's first micro-batch.
        values = {**self.logs[0], "loss": loss, "gradient_norm": norm}
        order = ["loss", "gradient_norm", *(name for name in values if name not in ("loss", "gradient_norm"))]
        return {name: round(float(values[name]), 5) for name in order}

    def _loss(self, batch: FeatureBatch) -> HeadLoss:
        with self.accelerator.autocast(), warnings.catch_warnings():
            # Norms keep float32 weights under autocast on purpose; torch warns that its fused kernel cannot have that.
            warnings.filterwarnings("ignore", message="Mismatch dtype between input and weight")
            found: HeadLoss = self.trainer.head.loss(batch)
        return found
