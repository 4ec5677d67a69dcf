"""The training stream: dialogues cut, batched by tokens, in an order that depends on the seed and the step alone."""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from koala_bench.dialogues.encoding import EncodedDialogue
from koala_bench.errors import KoalaBenchError

_SHORTEST = 8  # tokens; anything shorter has nothing to draft


@dataclass(frozen=True)
class TokenBatch:
    """Dialogues padded on the right.

    Attributes:
        ids: int64 [batch, tokens].
        supervised: bool [batch, tokens].
        samples: index of each row's dialogue in the stream.
        lengths: number of real tokens of each row, int64 [batch].
    """

    ids: torch.Tensor
    supervised: torch.Tensor
    samples: tuple[int, ...]
    lengths: torch.Tensor


@dataclass(frozen=True)
class Stream:
    """Encoded dialogues, each at most ``max_tokens`` long, served in batches of about ``batch_tokens``.

    Neighbours in a batch have similar lengths, so little is padding; which dialogues share a batch, and the order of
    the batches, is drawn anew each epoch. Batch ``step`` is a function of the seed and ``step``, which makes resuming
    exact.
    """

    dialogues: Sequence[EncodedDialogue]
    batch_tokens: int
    max_tokens: int
    seed: int
    # First step of each epoch, as far as they are known; the batches of the epoch that was read last.
    _starts: list[int] = field(default_factory=lambda: [0], repr=False)
    _epochs: dict[int, list[tuple[int, ...]]] = field(default_factory=dict, repr=False)

    def _length(self, index: int) -> int:
        return min(len(self.dialogues[index].ids), self.max_tokens)

    def _epoch(self, epoch: int) -> list[tuple[int, ...]]:
        if epoch not in self._epochs:
            draw = np.random.default_rng([self.seed, epoch])
            order = draw.permutation(len(self.dialogues))
            batches: list[tuple[int, ...]] = []
            for start in range(0, len(order), 1024):  # sorting within pieces keeps lengths mixed over time
                piece = sorted(order[start : start + 1024].tolist(), key=self._length)
                batches += groups_of(piece, self._length, self.batch_tokens)
            self._epochs.clear()
            self._epochs[epoch] = [batches[i] for i in draw.permutation(len(batches))]
        return self._epochs[epoch]

    def samples(self, step: int) -> tuple[int, ...]:
        """Indices of the dialogues of batch ``step``."""
        while step >= self._starts[-1]:
            self._starts.append(self._starts[-1] + len(self._epoch(len(self._starts) - 1)))
        epoch = bisect_right(self._starts, step) - 1
        return self._epoch(epoch)[step - self._starts[epoch]]

    def batch(self, step: int) -> TokenBatch:
        """Batch number ``step``, counted from 0 over all epochs."""
        return collate(self.dialogues, self.samples(step), self.max_tokens)

    def order_sha256(self, steps: int) -> str:
        """Hash of which dialogues come in which batch over a run."""
        digest = hashlib.sha256()
        for step in range(steps):
            digest.update(np.asarray([-1, *self.samples(step)], dtype="<i8").tobytes())
        return digest.hexdigest()

    @property
    def sha256(self) -> str:
        """Hash of all token ids and masks, as they are cut."""
        digest = hashlib.sha256()
        for dialogue in self.dialogues:
            digest.update(np.asarray([-1, *dialogue.ids[: self.max_tokens]], dtype="<i4").tobytes())
            digest.update(bytes(dialogue.supervised[: self.max_tokens]))
        return digest.hexdigest()


def groups_of(ordered: Iterable[int], length: Callable[[int], int], tokens: int) -> Iterator[tuple[int, ...]]:
    """Dialogues in ascending order of their lengths as groups of about ``tokens`` each, padding included."""
    group: list[int] = []
    for index in ordered:
        if group and length(index) * (len(group) + 1) > tokens:
            yield tuple(group)
            group = []
        group.append(index)
    if group:
        yield tuple(group)


def collate(dialogues: Sequence[EncodedDialogue], samples: Sequence[int], max_tokens: int) -> TokenBatch:
    """Pad dialogues to the longest of them."""
    lengths = torch.tensor([min(len(dialogues[i].ids), max_tokens) for i in samples])
    ids = torch.zeros(len(samples), int(lengths.max()), dtype=torch.int64)
    supervised = torch.zeros(ids.shape, dtype=torch.bool)
    for row, (index, count) in enumerate(zip(samples, lengths.tolist(), strict=True)):
        ids[row, :count] = torch.from_numpy(np.asarray(dialogues[index].ids[:count], dtype=np.int64))
        supervised[row, :count] = torch.from_numpy(np.asarray(dialogues[index].supervised[:count], dtype=bool))
    return TokenBatch(ids, supervised, tuple(samples), lengths)


def make_stream(
    dialogues: Sequence[EncodedDialogue], names: Sequence[str], batch_tokens: int, max_tokens: int, seed: int
) -> Stream:
    """Check the dialogues and make a stream of them.

    Args:
        names: what to call each dialogue in an error.

    Raises:
        KoalaBenchError: there is none, or one has no answer token left after cutting.
    """
    if not dialogues:
        raise KoalaBenchError("There is no dialogue to train on.", "Check --set data.source.")
    if max_tokens > batch_tokens:
        raise KoalaBenchError(
            f"data.max_tokens is {max_tokens}, a batch holds only {batch_tokens}.", "Raise --set training.batch_tokens."
        )
    for name, dialogue in zip(names, dialogues, strict=True):
        if len(dialogue.ids) < _SHORTEST or not any(dialogue.supervised[: max_tokens - 1]):
            raise KoalaBenchError(
                f"Dialogue {name} has no answer token within its first {max_tokens} tokens.",
                "Remove it, or raise --set data.max_tokens.",
            )
    return Stream(dialogues, batch_tokens, max_tokens, seed)
