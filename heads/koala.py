"""KOALA's adversarial objective (Zhang et al. 2024, arXiv 2408.08146): the head against a discriminator.

The paper's text beyond its abstract was not at hand, so everything below "the head is the generator, a discriminator
tells its tokens from the target's, both are trained in turn beside the supervised loss" is this project's own choice.
The objective wraps any head that reports its predictions; K layers are an option of the heads themselves.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from heads.common.discriminators import DESCRIPTIONS, DISCRIMINATORS, Shown, View, make_discriminator
from koala_bench.errors import KoalaBenchError
from koala_bench.heads import FeatureBatch, HeadLoss, TargetSpec

_RATIO_EVERY = 8  # steps between two looks at the gradients' norms, which cost two backward passes and change slowly


def _alone(measure: Callable[[], float | None]) -> float | None:
    return measure()


class Adversarial(nn.Module):
    """Adds ``weight * softplus(-D(head))`` to a head's supervised loss (non-saturating, Goodfellow et al. 2014).

    Args:
        discriminator: what D sees: ``feature``, the target's next state against the head's; ``embedding``, the expected
            embedding under the target's and the head's distribution; or ``sequence``, a run of descriptions judged as a
            whole: all depths drafted from one state, or four neighbouring predictions of a head that looks one token
            ahead.
        weight: lambda. Zero leaves the supervised run as it is, bit for bit.
        balanced: read ``weight`` as the wanted ratio of the adversarial to the supervised gradient's norm at the head's
            output, which is measured at every eighth step.
        start, ramp: fractions of training after which the term sets in, and over which it grows to ``weight``.
        hidden: width of D's two hidden layers.
        learning_rate: D's own, for Adam with betas (0.5, 0.9).
        described: what a ``sequence`` is made of, ``feature`` or ``embedding``.
        r1: gamma of the penalty gamma/2 |dD/dx|^2 on the target's descriptions (R1, Mescheder et al. 2018).

    Spectral normalisation, noise on descriptions, a falling rate and other numbers of hidden layers were tried and made no
    difference (results/sweeps-tiny).
    """

    def __init__(
        self, spec: TargetSpec, discriminator: str = "feature", weight: float = 0.1, balanced: bool = False, start: float = 0.2, ramp: float = 0.1,
        hidden: int = 256, learning_rate: float = 1e-4, described: str = "feature", r1: float = 0.0,
    ) -> None:  # fmt: skip
        super().__init__()
        choices = (("discriminator", discriminator, DISCRIMINATORS), ("description", described, DESCRIPTIONS))
        for what, value, known in choices:
            if value not in known:
                raise KoalaBenchError(f"Unknown {what} '{value}'.", f"Use one of {', '.join(known)}.")
        for name, amount in (("weight", weight), ("r1", r1)):
            if not 0 <= amount < math.inf:
                raise KoalaBenchError(f"The adversarial {name} is {amount}.", "It must be finite and not negative.")
        if hidden < 1:
            raise KoalaBenchError(f"The discriminator's width hidden is {hidden}.", "It must be at least 1.")
        self.weight, self.balanced, self.start, self.ramp = weight, balanced, start, ramp
        self.r1 = r1
        self.view = View(spec, discriminator, described)
        # A generator of its own: the heads' random numbers must not depend on whether there is a discriminator.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.discriminator = make_discriminator(discriminator, spec.hidden_size, hidden)
        self.discriminator.to(spec.device)
        self.optimiser = torch.optim.Adam(self.discriminator.parameters(), lr=learning_rate, betas=(0.5, 0.9))
        self._turns = 0  # steps so far
        self._begun = False  # whether this step's gradients have begun to gather
        self._due = False  # whether the next micro-batch is one to measure the ratio on
        self._ratio: float | None = None  # of the gradients' norms, when they were measured last
        self._seen: tuple[HeadLoss, Sequence[Shown]] | None = None

    def get_extra_state(self) -> dict[str, Any]:
        """The optimiser and counters, which ``state_dict`` then holds beside the discriminator's weights."""
        return {"optimiser": self.optimiser.state_dict(), "turns": self._turns, "ratio": self._ratio}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.optimiser.load_state_dict(state["optimiser"])
        self._turns, self._ratio = state["turns"], state["ratio"]

    def learn(
        self, batch: FeatureBatch, found: HeadLoss, progress: float, share: float = 1.0
    ) -> dict[str, torch.Tensor]:
        """Add to the discriminator's gradients what it has to learn from a micro-batch.

        Args:
            progress: fraction of the training steps already done.
            share: of the micro-batch in the step.
        Returns:
            values for the log.
        """
        if not self.active(progress):
            return {}
        if not self._begun:
            self.optimiser.zero_grad(set_to_none=True)
        self._begun = True
        shown = self._shown(batch, found)
        if not shown:
            return {}
        real_inputs = [each.real.detach().requires_grad_(self.r1 > 0) for each in shown]
        real = torch.cat([self._judge(each, inputs) for each, inputs in zip(shown, real_inputs, strict=True)])
        fake = torch.cat([self._judge(each, each.fake.detach()) for each in shown])
        loss = 0.5 * (F.softplus(-real).mean() + F.softplus(fake).mean())
        accuracy = 0.5 * ((real > 0).float().mean() + (fake <= 0).float().mean())
        logs = {"discriminator_loss": loss.detach(), "discriminator_accuracy": accuracy}
        if self.r1:
            gradients = torch.autograd.grad(real.sum(), real_inputs, create_graph=True)
            penalty = torch.cat([gradient.float().flatten(1).pow(2).sum(dim=1) for gradient in gradients]).mean()
            logs["gradient_penalty"] = penalty.detach()
            loss = loss + 0.5 * self.r1 * penalty
        (loss * share).backward()
        return logs

    def step(self, progress: float) -> None:
        """Move the discriminator once, by the gradients of all micro-batches of the step."""
        if not self.active(progress):
            return
        self.optimiser.step()
        self._begun = False
        self._due = self._turns % _RATIO_EVERY == 0
        self._turns += 1

    def term(
        self,
        batch: FeatureBatch,
        found: HeadLoss,
        progress: float,
        agree: Callable[[Callable[[], float | None]], float | None] = _alone,
    ) -> tuple[torch.Tensor | None, dict[str, torch.Tensor]]:
        """Let the discriminator, as it is after the step, judge the head on a micro-batch.

        Args:
            agree: makes one number of what several processes would measure, see ``koala_bench.common.process_group``.
        Returns:
            what to add to the supervised loss, or None for nothing, and values for the log.
        """
        if not self.active(progress):
            return None, {}
        shown = self._shown(batch, found)
        self._seen = None
        adversarial = None
        if shown:
            self.discriminator.requires_grad_(False)
            adversarial = torch.stack([F.softplus(-self._judge(each, each.fake)).mean() for each in shown]).mean()
            self.discriminator.requires_grad_(True)
        if self._due:
            judged = adversarial
            self._ratio = agree(lambda: self._ratio if judged is None else self._gradient_ratio(found, judged))
            self._due = False
        if adversarial is None:
            return None, {}
        logs = {"adversarial": adversarial.detach()}
        scale: float | torch.Tensor = (
            self.weight * min(1.0, (progress - self.start) / self.ramp) if self.ramp else self.weight
        )
        if self._ratio is not None:
            logs["gradient_ratio"] = torch.tensor(self._ratio)
        if self.balanced:
            if self._ratio is None:
                raise KoalaBenchError(
                    "This head's losses do not go through the states it reports, so there is nothing to balance by.",
                    "Set balanced=false.",
                )
            scale = scale / torch.tensor(self._ratio).clamp(min=1e-6)
        return scale * adversarial, logs

    def active(self, progress: float) -> bool:
        """Whether there is an adversarial term at this point of the training."""
        return self.weight > 0.0 and progress >= self.start

    def _shown(self, batch: FeatureBatch, found: HeadLoss) -> Sequence[Shown]:
        """What D sees of a micro-batch; kept between its turn and the head's where the same predictions serve both."""
        if self._seen is not None and self._seen[0] is found:
            return self._seen[1]
        predictions = [p for p in found.predictions if len(p.rows)]
        if not predictions:
            raise KoalaBenchError(
                "This head reports no predictions.",
                "Adversarial training needs HeadLoss.predictions; train the head without +koala.",
            )
        self._seen = found, self.view(batch, predictions)
        return self._seen[1]

    def _judge(self, shown: Shown, described: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.discriminator(shown.context, shown.token, described, shown.depth)
        return logits

    @staticmethod
    def _gradient_ratio(found: HeadLoss, adversarial: torch.Tensor) -> float | None:
        """Norm of the adversarial over that of the supervised gradient, at the head's predicted states; None if either
        does not reach them.
        """
        features = [
            prediction.feature
            for prediction in found.predictions
            if len(prediction.rows) and prediction.feature.requires_grad
        ]
        norms = []
        for loss in (adversarial, found.total):
            found_there = torch.autograd.grad(loss, features, retain_graph=True, allow_unused=True) if features else ()
            gradients = [gradient for gradient in found_there if gradient is not None]
            if not gradients:
                return None
            norms.append(math.sqrt(sum(float(gradient.pow(2).sum()) for gradient in gradients)))
        return norms[0] / max(norms[1], 1e-12)
