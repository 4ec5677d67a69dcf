"""Shared by token losses: logits of a large vocabulary are computed a slice of rows at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from koala_bench.heads import FeatureBatch, HeadLoss, Prediction, TargetSpec

Score = Callable[[torch.Tensor], torch.Tensor]
Judge = Callable[[torch.Tensor, slice], tuple[torch.Tensor, torch.Tensor]]
Scored = torch.Tensor | Callable[[slice], torch.Tensor]

# Logits held at a time: 64 MiB in float32, a few times that with what a loss needs of them. 2,048 tokens of a
# vocabulary of 32,000 are four times as many.
_AT_ONCE = 1 << 24


def slices(rows: int, vocabulary: int) -> list[slice]:
    """All rows, in pieces whose logits can be held at a time; one piece at least."""
    size = max(1, _AT_ONCE // vocabulary)
    return [slice(first, first + size) for first in range(0, max(rows, 1), size)]


def scored_in_pieces(
    score: Score, states: torch.Tensor, vocabulary: int, judge: Judge
) -> tuple[torch.Tensor, torch.Tensor, Scored]:
    """Compute and reduce the logits of states [rows, width]; large ones slice by slice, each again in the backward
    pass.

    Args:
        score: states [n, width] -> logits [n, vocab_size].
        judge: from the logits of a slice of the rows, two sums over them, of which the first has gradients.

    Returns:
        both sums over all rows, and the logits or what computes those of a slice of the rows, for ``Prediction``.
    """
    if len(pieces := slices(len(states), vocabulary)) == 1:
        logits = score(states)
        return *judge(logits, slice(None)), logits

    def piece(part: torch.Tensor, rows: slice) -> tuple[torch.Tensor, torch.Tensor]:
        return judge(score(part), rows)

    again = _current_autocast(states.device.type)
    sums = [checkpoint(piece, states[rows], rows, use_reentrant=False) for rows in pieces]
    loss, right = (torch.stack(each).sum() for each in zip(*sums, strict=True))

    def scored(rows: slice) -> torch.Tensor:
        with again():
            return score(states[rows])

    return loss, right, scored


def _current_autocast(device: str) -> Callable[[], torch.autocast]:
    """Makes the present autocast again, to compute logits in later from states that came out of it."""
    enabled, dtype = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
    return lambda: torch.autocast(device, dtype, enabled)


class DepthPredictions(NamedTuple):
    """A head's predictions at one depth, with their labels.

    Attributes:
        rows: flat indices of the places predicted from, see ``Prediction``.
        feature: what the head predicts from, [rows, width].
        score: from features to logits over the draft vocabulary, as in ``scored_in_pieces``.
        labels: token ids [rows], or distributions [rows, drafted].
        likeliest: token ids [rows], with which the top-1 prediction is compared; a row of -1 has no gradient, but
            counts in the mean.
        weight: of this depth's loss.
    """

    rows: torch.Tensor
    feature: torch.Tensor
    score: Score
    labels: torch.Tensor
    likeliest: torch.Tensor
    weight: float = 1.0


def loss_of(depths: Iterable[DepthPredictions], spec: TargetSpec, dtype: torch.dtype) -> HeadLoss:
    """Sum over depths 1, 2, ... of the cross-entropy, mean over a depth's rows, computed in ``dtype``; the parts also
    tell the share of rows whose top-1 prediction is right. Both are zero if answers are too short for any row.
    """
    total = torch.zeros((), dtype=dtype, device=spec.device)
    parts: dict[str, torch.Tensor] = {}
    predictions = []
    for depth, guess in enumerate(depths, start=1):
        loss, right, scored = scored_in_pieces(
            guess.score, guess.feature, spec.drafted, partial(_cross_entropy, guess, dtype)
        )
        count = max(len(guess.rows), 1)
        total = total + guess.weight * (loss / count)
        parts |= {f"cross_entropy_{depth}": (loss / count).detach(), f"top1_{depth}": right / count}
        predictions.append(Prediction(depth, guess.rows, guess.feature, scored, spec.draft_vocabulary, guess.weight))
    return HeadLoss(total, parts, tuple(predictions), rest=torch.zeros_like(total))


def _cross_entropy(
    guess: DepthPredictions, dtype: torch.dtype, logits: torch.Tensor, rows: slice
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum over a slice of the rows, and how many top-1 predictions are right."""
    scores = logits.to(dtype)  # once: under autocast loss and argmax want it, and argmax is slow in half precision
    labels, likeliest = guess.labels[rows], guess.likeliest[rows]
    labels = labels if labels.ndim == 1 else labels.to(dtype)
    losses = F.cross_entropy(scores, labels, reduction="none", ignore_index=-1)
    return (losses * (likeliest >= 0)).sum(), (scores.detach().argmax(-1) == likeliest).sum()


def rows_before(supervised: torch.Tensor, ahead: int) -> torch.Tensor:
    """Flat indices int64 [rows] of the places ``ahead`` tokens before one of an answer; ``supervised`` is bool [batch,
    tokens].
    """
    wanted = torch.zeros_like(supervised)
    wanted[:, :-ahead] = supervised[:, ahead:]
    return wanted.flatten().nonzero()[:, 0]


def loss_by_depth(
    outs: Sequence[torch.Tensor], batch: FeatureBatch, spec: TargetSpec, norm: Score, score: Score, decay: float,
    dtype: torch.dtype,
) -> HeadLoss:  # fmt: skip
    """Cross-entropy against the target's distribution at each depth, weighted by powers of ``decay``; see
    ``Eagle3.loss`` for which predictions count.

    Args:
        outs: by depth, what the layers make of each place but the last, [batch, tokens - 1, width].
        norm, score: what turns those into features, and features [rows, width] into logits [rows, drafted].
        dtype: that losses are computed in.
    """
    tokens = batch.ids.shape[1]
    # Behind a row's last token stands padding, which has no state worth predicting from.
    counted = batch.supervised[:, :-1] & (torch.arange(1, tokens, device=batch.ids.device) < batch.lengths[:, None])
    soft = batch.soft_labels(spec)

    def guesses() -> Iterator[DepthPredictions]:
        for step, out in enumerate(outs):
            row, place = counted[:, step:].nonzero(as_tuple=True)
            rows = row * tokens + place
            wanted, likeliest = soft.probabilities[rows + step + 1], soft.likeliest[rows + step + 1]
            yield DepthPredictions(rows, norm(out[row, place]), score, wanted, likeliest, decay**step)

    return loss_of(guesses(), spec, dtype)
