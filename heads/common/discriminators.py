"""Discriminators of the adversarial objective: their inputs and networks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from heads.common.losses import slices
from koala_bench.heads import FeatureBatch, Prediction, TargetSpec

DISCRIMINATORS = ("feature", "embedding", "sequence")
DESCRIPTIONS = ("feature", "embedding")
_DEPTHS = 16  # deepest draft
_WINDOW = 4  # consecutive predictions of a next-token head in a sequence


def normalised(states: torch.Tensor) -> torch.Tensor:
    """States [..., width] with mean 0 and variance 1, so that their scale gives nothing away."""
    return F.layer_norm(states, states.shape[-1:])


@dataclass(frozen=True)
class DiscriminatorInputs:
    """One batch of discriminator inputs; all normalised, only ``fake`` carries a gradient.

    A description stands for a token: by the state that predicts what follows it (``feature``), or by the expected
    embedding under a distribution (``embedding``).

    Attributes:
        context: the target's state that the head drafted from, [rows, width].
        token: embedding of the last token known to the head before each description, [rows, width] or [rows, places,
            width].
        real, fake: the target's and the head's descriptions, of the same shape as ``token``.
        depth: drafting depth of the (first) description.
    """

    context: torch.Tensor
    token: torch.Tensor
    real: torch.Tensor
    fake: torch.Tensor
    depth: int


def _normalised(
    context: torch.Tensor, token: torch.Tensor, real: torch.Tensor, fake: torch.Tensor, depth: int
) -> DiscriminatorInputs:
    return DiscriminatorInputs(normalised(context), normalised(token), normalised(real), normalised(fake), depth)


class View:
    """Builds discriminator inputs from a head's predictions and the target's states.

    Args:
        kind: ``feature`` or ``embedding``: single tokens; ``sequence``: several at once.
        described: how the tokens of a sequence are described, ``feature`` or ``embedding``; ignored for single tokens.
    """

    def __init__(self, spec: TargetSpec, kind: str, described: str) -> None:
        self.kind = kind
        self.described = described if kind == "sequence" else kind
        self._embed, self._spec = spec.embed, spec
        self._tables: dict[torch.dtype, torch.Tensor] = {}

    def _table(self) -> torch.Tensor:
        """Embeddings of what is drafted [drafted, width], in the target's dtype."""
        vocabulary = self._spec.draft_vocabulary
        every = torch.arange(self._spec.vocab_size, device=self._spec.device)
        with torch.no_grad():
            return self._embed(every if vocabulary is None else vocabulary.ids)

    def __call__(self, batch: FeatureBatch, predictions: Sequence[Prediction]) -> list[DiscriminatorInputs]:
        """One item per depth, or one of all sequences; empty if no answer is long enough for a sequence."""
        if self.kind == "sequence":
            return self._runs(batch, sorted(predictions, key=lambda prediction: prediction.depth))
        hidden, ids = batch.hidden[:, :, -1].float().flatten(0, 1), batch.ids.flatten()
        inputs = []
        for each, (real, fake) in zip(predictions, self._describe(batch, predictions), strict=True):
            token = self._embed(ids[each.rows + each.depth]).float()
            inputs.append(_normalised(hidden[each.rows], token, real, fake, each.depth))
        return inputs

    def _describe(
        self, batch: FeatureBatch, predictions: Sequence[Prediction]
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """The target's and the head's descriptions for each prediction, each float32 [rows, width]."""
        hidden = batch.hidden[:, :, -1].float().flatten(0, 1)
        if self.described == "feature":
            return [(hidden[each.rows + each.depth], each.feature) for each in predictions]
        # Several depths predict the same position; the target's description of it is computed once.
        places, where = torch.unique(torch.cat([each.rows + each.depth for each in predictions]), return_inverse=True)
        probabilities = batch.soft_labels(self._spec).probabilities
        with torch.no_grad():
            pieces = slices(len(places), self._spec.drafted)
            dtype = predictions[0].drafted(slice(0, 1), self._spec).dtype
            real = torch.cat([self._expected(probabilities[places[rows]], dtype) for rows in pieces])
        reals = [real[part] for part in where.split([len(each.rows) for each in predictions])]
        return [(one, self._expected_of(each)) for one, each in zip(reals, predictions, strict=True)]

    def _expected_of(self, prediction: Prediction) -> torch.Tensor:
        """The head's expected embeddings [rows, width]."""

        def piece(rows: slice) -> torch.Tensor:
            logits = prediction.drafted(rows, self._spec)
            return self._expected(torch.softmax(logits.float(), dim=-1), logits.dtype)

        if isinstance(prediction.scored, torch.Tensor):
            return piece(slice(None))
        # Checkpointed: distributions of a large vocabulary are recomputed in the backward pass.
        pieces = slices(len(prediction.rows), self._spec.drafted)
        return torch.cat([checkpoint(piece, rows, use_reentrant=False) for rows in pieces])

    def _expected(self, probabilities: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Expected embeddings, float32 [rows, width]; multiplied in the dtype of the head's scores: a half precision
        under autocast.
        """
        if dtype not in self._tables:
            self._tables[dtype] = self._table().to(dtype)
        return (probabilities.to(dtype) @ self._tables[dtype]).float()

    def _runs(self, batch: FeatureBatch, predictions: Sequence[Prediction]) -> list[DiscriminatorInputs]:
        """Sequences: all depths drafted from one state, or consecutive predictions of a next-token head.

        The context is the first state only: the later ones would be the target's descriptions themselves. The token at
        each place is the last that the head knew: Medusa sees none of its drafts, EAGLE reads each.
        """
        tokens, size = batch.ids.shape[1], batch.ids.numel()
        order = []
        for each in predictions:
            places = each.rows.new_full((size,), -1)
            places[each.rows] = torch.arange(len(each.rows), device=places.device)
            order.append(places)
        descriptions = self._describe(batch, predictions)
        if len(predictions) > 1:
            index = torch.stack(order, dim=1)
            index = index[(index >= 0).all(dim=1)]
            real, fake = (
                torch.stack([of[side][index[:, place]] for place, of in enumerate(descriptions)], dim=1)
                for side in (0, 1)
            )
            rows = predictions[0].rows[index[:, :1]].expand_as(index)
        else:
            # Sequences do not overlap; their offset varies by step, so that no boundary is fixed.
            starts = torch.arange(size, device=batch.ids.device)
            column = starts % tokens
            starts = starts[((column + batch.seed % _WINDOW) % _WINDOW == 0) & (column + _WINDOW <= tokens)]
            index = order[0][starts[:, None] + torch.arange(_WINDOW, device=starts.device)]
            index = index[(index >= 0).all(dim=1)]
            real, fake = (side[index] for side in descriptions[0])
            rows = predictions[0].rows[index]
        if not len(index):
            return []
        hidden = batch.hidden[:, :, -1].float().flatten(0, 1)
        token = self._embed(batch.ids.flatten()[rows + 1]).float()
        return [_normalised(hidden[rows[:, 0]], token, real, fake, predictions[0].depth)]


class Discriminator(nn.Module):
    """MLP with one logit: does this description of the next token come from the target?"""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.into = nn.Linear(3 * width, hidden)
        self.depth = nn.Embedding(_DEPTHS, hidden)
        self.middle = nn.Linear(hidden, hidden)
        self.out = nn.Linear(hidden, 1)

    def forward(
        self, context: torch.Tensor, token: torch.Tensor, description: torch.Tensor, depth: int
    ) -> torch.Tensor:
        """Logits [rows] from three normalised tensors [rows, width]; positive means target."""
        x = F.leaky_relu(
            self.into(torch.cat([context, token, description], dim=-1)) + self.depth.weight[depth - 1], 0.2
        )
        logits: torch.Tensor = self.out(F.leaky_relu(self.middle(x), 0.2))[:, 0]
        return logits


class SequenceDiscriminator(nn.Module):
    """RNN with one logit for a sequence of descriptions: does this draft come from the target?

    The recurrence is written out, since cuDNN's kernels have no second derivative, which a gradient penalty needs. Its
    initial state is the context; the mean of its states goes through another hidden layer.
    """

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.first = nn.Linear(width, hidden)
        self.into = nn.Linear(2 * width, hidden)
        self.depth = nn.Embedding(_DEPTHS, hidden)
        self.again = nn.Linear(hidden, hidden, bias=False)
        self.middle = nn.Linear(hidden, hidden)
        self.out = nn.Linear(hidden, 1)

    def forward(
        self, context: torch.Tensor, token: torch.Tensor, description: torch.Tensor, depth: int
    ) -> torch.Tensor:
        """Logits [runs] from a context [runs, width] and tokens and descriptions [runs, places, width]; positive means
        target.
        """
        depths = self.depth.weight[depth - 1 : depth - 1 + token.shape[1]]
        inputs = self.into(torch.cat([token, description], dim=-1)) + depths
        state = torch.tanh(self.first(context))
        states = []
        for place in range(token.shape[1]):
            state = torch.tanh(inputs[:, place] + self.again(state))
            states.append(state)
        x = torch.stack(states).mean(dim=0)
        logits: torch.Tensor = self.out(F.leaky_relu(self.middle(x), 0.2))[:, 0]
        return logits


def make_discriminator(kind: str, width: int, hidden: int) -> nn.Module:
    """A fresh discriminator for a ``View`` of a kind; its weights come from the global random generator.

    Args:
        width: of the target's states.
        hidden: width of its two hidden layers.
    """
    return (SequenceDiscriminator if kind == "sequence" else Discriminator)(width, hidden)
