"""KOALA's adversarial objective (Zhang et al. 2024, arXiv 2408.08146): the head against a discriminator.

The paper's text beyond its abstract was not at hand, so everything below "the head is the generator, a discriminator tells
its tokens from the target's, both are trained in turn beside the supervised loss" is this project's own choice.
The objective wraps any head that reports its predictions; K layers are an option of the heads themselves.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from koala_bench.errors import KoalaBenchError
from koala_bench.heads import FeatureBatch, HeadLoss, Prediction, TargetSpec

DISCRIMINATORS = ("feature", "embedding")


class Discriminator(nn.Module):
    """Two hidden layers that answer one logit: does this description of the next token come from the target?

    It sees the target's state where the head drafts from, the embedding of the last token before the drafted one, and the
    description. Each is normalised without learned scale, so that scale alone betrays nothing.
    """

    def __init__(self, width: int, hidden: int, depths: int) -> None:
        super().__init__()
        self.into = nn.Linear(3 * width, hidden)
        self.depth = nn.Embedding(depths, hidden)
        self.middle = nn.Linear(hidden, hidden)
        self.out = nn.Linear(hidden, 1)
        self.width = width

    def forward(self, context: torch.Tensor, token: torch.Tensor, described: torch.Tensor, depth: int) -> torch.Tensor:
        """Logits [rows] from three tensors [rows, width]; positive means target."""
        x = torch.cat([F.layer_norm(part, (self.width,)) for part in (context, token, described)], dim=-1)
        x = F.leaky_relu(self.into(x) + self.depth.weight[depth - 1], 0.2)
        logits: torch.Tensor = self.out(F.leaky_relu(self.middle(x), 0.2))[:, 0]
        return logits


class Adversarial(nn.Module):
    """Adds ``weight * softplus(-D(head))`` to a head's supervised loss (non-saturating, Goodfellow et al. 2014).

    Args:
        discriminator: what D sees of the next token: ``feature``, the target's next state against the head's; or
            ``embedding``, the expected embedding under the target's and the head's distribution.
        weight: lambda. Zero leaves the supervised run as it is, bit for bit.
        balanced: read ``weight`` as the wanted ratio of the adversarial to the supervised gradient's norm at the head's output.
        start, ramp: fractions of training after which the term sets in, and over which it grows to ``weight``.
        hidden: width of D's layers.
        learning_rate: D's own, for Adam with betas (0.5, 0.9).
        seed: of D's initial weights.
    """

    def __init__(
        self, spec: TargetSpec, discriminator: str = "feature", weight: float = 0.1, balanced: bool = False, start: float = 0.2, ramp: float = 0.1,
        hidden: int = 256, learning_rate: float = 1e-4, seed: int = 0, depths: int = 16,
    ) -> None:  # fmt: skip
        super().__init__()
        if discriminator not in DISCRIMINATORS:
            raise KoalaBenchError(f"Unknown discriminator '{discriminator}'.", f"Use one of {', '.join(DISCRIMINATORS)}.")
        if weight < 0:
            raise KoalaBenchError(f"The adversarial weight is {weight}.", "It must not be negative.")
        self.kind, self.weight, self.balanced, self.start, self.ramp = discriminator, weight, balanced, start, ramp
        # A generator of its own: the heads' random numbers must not depend on whether there is a discriminator.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.discriminator = Discriminator(spec.hidden_size, hidden, depths)
        self.discriminator.to(spec.device)
        self.optimiser = torch.optim.Adam(self.discriminator.parameters(), lr=learning_rate, betas=(0.5, 0.9))
        self._embed, self._vocab_size = spec.embed, spec.vocab_size

    def get_extra_state(self) -> dict[str, Any]:
        """The optimiser's state, so that ``state_dict`` is all there is to resume from."""
        return self.optimiser.state_dict()

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.optimiser.load_state_dict(state)

    def _described(self, batch: FeatureBatch, prediction: Prediction) -> tuple[torch.Tensor, torch.Tensor]:
        """The target's and the head's description of the token, each [rows, hidden_size]."""
        hidden = batch.hidden[:, :, -1].float().flatten(0, 1)
        if self.kind == "feature":
            return hidden[prediction.rows + prediction.depth], prediction.feature
        table = self._embed(torch.arange(self._vocab_size, device=hidden.device)).float()
        with torch.no_grad():
            real = batch.target_probabilities.flatten(0, 1)[prediction.rows + prediction.depth] @ table
        return real, torch.softmax(prediction.logits.float(), dim=-1) @ table

    def _judge(self, batch: FeatureBatch, prediction: Prediction, described: torch.Tensor) -> torch.Tensor:
        hidden = batch.hidden[:, :, -1].float().flatten(0, 1)
        token = self._embed(batch.ids.flatten()[prediction.rows + prediction.depth]).float()
        logits: torch.Tensor = self.discriminator(hidden[prediction.rows], token, described, prediction.depth)
        return logits

    def term(self, batch: FeatureBatch, found: HeadLoss, progress: float) -> tuple[torch.Tensor | None, dict[str, torch.Tensor]]:
        """Train the discriminator once, then judge the head.

        Args:
            progress: fraction of the training steps already done.
        Returns:
            what to add to the supervised loss, or None for nothing, and values for the log.
        """
        if self.weight == 0.0 or progress < self.start:
            return None, {}
        predictions = [p for p in found.predictions if len(p.rows)]
        if not predictions:
            raise KoalaBenchError("This head reports no predictions.", "Adversarial training needs HeadLoss.predictions; train the head without +koala.")
        described = [self._described(batch, prediction) for prediction in predictions]

        real = torch.cat([self._judge(batch, p, truth.detach()) for p, (truth, _) in zip(predictions, described, strict=True)])
        fake = torch.cat([self._judge(batch, p, guess.detach()) for p, (_, guess) in zip(predictions, described, strict=True)])
        loss = 0.5 * (F.softplus(-real).mean() + F.softplus(fake).mean())
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        self.optimiser.step()
        accuracy = 0.5 * ((real > 0).float().mean() + (fake <= 0).float().mean())

        self.discriminator.requires_grad_(False)
        adversarial = torch.stack([F.softplus(-self._judge(batch, p, guess)).mean() for p, (_, guess) in zip(predictions, described, strict=True)]).mean()
        self.discriminator.requires_grad_(True)
        logs = {"discriminator_loss": loss.detach(), "discriminator_accuracy": accuracy, "adversarial": adversarial.detach()}
        scale: float | torch.Tensor = self.weight * min(1.0, (progress - self.start) / self.ramp) if self.ramp else self.weight
        if self.balanced:
            ratio = self._gradient_ratio(found, adversarial, predictions)
            logs["gradient_ratio"] = ratio
            scale = scale / ratio.clamp(min=1e-6)
        return scale * adversarial, logs

    @staticmethod
    def _gradient_ratio(found: HeadLoss, adversarial: torch.Tensor, predictions: list[Prediction]) -> torch.Tensor:
        """Norm of the adversarial over that of the supervised gradient, at the head's predicted states."""
        features = [prediction.feature for prediction in predictions]
        norms = []
        for loss in (adversarial, found.total):
            gradients = torch.autograd.grad(loss, features, retain_graph=True)
            norms.append(math.sqrt(sum(float(g.pow(2).sum()) for g in gradients)))
        return torch.tensor(norms[0] / max(norms[1], 1e-12))
