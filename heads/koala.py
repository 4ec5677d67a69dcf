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

from heads.common.discriminators import DESCRIPTIONS, DISCRIMINATORS, DiscriminatorInputs, View, make_discriminator
from koala_bench.common.moving import moved
from koala_bench.errors import KoalaBenchError
from koala_bench.heads import FeatureBatch, HeadLoss, TargetSpec

_RATIO_EVERY = 8  # steps between measurements of the gradient norms, which cost two backward passes


def _alone(measure: Callable[[], float | None]) -> float | None:
    return measure()


class Adversarial(nn.Module):
    """Adds ``weight * softplus(-D(head))`` to a head's supervised loss (non-saturating, Goodfellow et al. 2014).

    Args:
        discriminator: input of D: ``feature``, the target's next state or the head's; ``embedding``, the expected
            embedding under either distribution; or ``sequence``, several descriptions at once: all depths drafted from
            one state, or four consecutive predictions of a next-token head.
        weight: lambda. Zero equals the supervised run, bit for bit.
        balanced: ``weight`` is the ratio of the adversarial to the supervised gradient norm at the head's output, which
            is measured every eighth step.
        start, ramp: fractions of training after which the term begins, and over which it rises to ``weight``.
        hidden: width of D's two hidden layers.
        learning_rate: D's own, for Adam with betas (0.5, 0.9).
        described: elements of a ``sequence``, ``feature`` or ``embedding``.
        r1: gamma of the penalty gamma/2 |dD/dx|^2 on the target's descriptions (R1, Mescheder et al. 2018).

    Spectral normalisation, noise on descriptions, a falling rate and other numbers of hidden layers were tried and made
    no difference (results/sweeps-tiny).
    """

    def __init__(
        self, spec: TargetSpec, discriminator: str = "feature", weight: float = 0.1, balanced: bool = False,
        start: float = 0.2, ramp: float = 0.1, hidden: int = 256, learning_rate: float = 1e-4,
        described: str = "feature", r1: float = 0.0,
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
        self.soft_labels = self.view.described != "feature"
        # A forked generator: the heads' random numbers must not depend on the discriminator.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.discriminator = make_discriminator(discriminator, spec.hidden_size, hidden)
        moved(self.discriminator, spec.device)
        self.optimiser = torch.optim.Adam(self.discriminator.parameters(), lr=learning_rate, betas=(0.5, 0.9))
        self._turns = 0  # steps taken
        self._begun = False  # whether gradients of this step were accumulated
        self._due = False  # whether to measure the ratio on the next micro-batch
        self._ratio: float | None = None  # latest ratio of gradient norms
        self._seen: tuple[HeadLoss, Sequence[DiscriminatorInputs]] | None = None

    def get_extra_state(self) -> dict[str, Any]:
        """Optimiser and counters, which ``state_dict`` holds besides the discriminator's weights."""
        return {"optimiser": self.optimiser.state_dict(), "turns": self._turns, "ratio": self._ratio}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.optimiser.load_state_dict(state["optimiser"])
        self._turns, self._ratio = state["turns"], state["ratio"]

    def learn(
        self, batch: FeatureBatch, found: HeadLoss, progress: float, share: float = 1.0
    ) -> dict[str, torch.Tensor]:
        """Accumulate the discriminator's gradients on a micro-batch; see ``Objective``."""
        if not self.active(progress):
            return {}
        if not self._begun:
            self.optimiser.zero_grad(set_to_none=True)
        self._begun = True
        inputs = self._inputs(batch, found)
        if not inputs:
            return {}
        real_descriptions = [each.real.detach().requires_grad_(self.r1 > 0) for each in inputs]
        real = torch.cat([self._logits(each, real) for each, real in zip(inputs, real_descriptions, strict=True)])
        fake = torch.cat([self._logits(each, each.fake.detach()) for each in inputs])
        loss = 0.5 * (F.softplus(-real).mean() + F.softplus(fake).mean())
        accuracy = 0.5 * ((real > 0).float().mean() + (fake <= 0).float().mean())
        logs = {"discriminator_loss": loss.detach(), "discriminator_accuracy": accuracy}
        if self.r1:
            gradients = torch.autograd.grad(real.sum(), real_descriptions, create_graph=True)
            penalty = torch.cat([gradient.float().flatten(1).pow(2).sum(dim=1) for gradient in gradients]).mean()
            logs["gradient_penalty"] = penalty.detach()
            loss = loss + 0.5 * self.r1 * penalty
        (loss * share).backward()
        return logs

    def step(self, progress: float) -> None:
        """One optimiser step of the discriminator, by the gradients of all micro-batches."""
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
        """The head's adversarial loss on a micro-batch, from the discriminator after its step; see ``Objective``."""
        if not self.active(progress):
            return None, {}
        inputs = self._inputs(batch, found)
        self._seen = None
        adversarial = None
        if inputs:
            self.discriminator.requires_grad_(False)
            adversarial = torch.stack([F.softplus(-self._logits(each, each.fake)).mean() for each in inputs]).mean()
            self.discriminator.requires_grad_(True)
        if self._due:
            loss = adversarial
            self._ratio = agree(lambda: self._ratio if loss is None else self._gradient_ratio(found, loss))
            self._due = False
        if adversarial is None:
            return None, {}
        logs = {"adversarial": adversarial.detach()}
        ramp = min(1.0, (progress - self.start) / self.ramp) if self.ramp else 1.0
        scale: float | torch.Tensor = self.weight * ramp
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

    def _inputs(self, batch: FeatureBatch, found: HeadLoss) -> Sequence[DiscriminatorInputs]:
        """D's inputs from a micro-batch; cached between D's turn and the head's if both use the same predictions."""
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

    def _logits(self, inputs: DiscriminatorInputs, description: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.discriminator(inputs.context, inputs.token, description, inputs.depth)
        return logits

    @staticmethod
    def _gradient_ratio(found: HeadLoss, adversarial: torch.Tensor) -> float | None:
        """Norm of the adversarial over that of the supervised gradient, at the head's predicted states; None if either
        does not reach them.
        """
        features = [each.feature for each in found.predictions if len(each.rows) and each.feature.requires_grad]
        norms = []
        for loss in (adversarial, found.total):
            every = torch.autograd.grad(loss, features, retain_graph=True, allow_unused=True) if features else ()
            gradients = [gradient for gradient in every if gradient is not None]
            if not gradients:
                return None
            norms.append(math.sqrt(sum(float(gradient.pow(2).sum()) for gradient in gradients)))
        return norms[0] / max(norms[1], 1e-12)
