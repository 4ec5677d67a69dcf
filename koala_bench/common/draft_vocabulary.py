"""Draft vocabularies: heads that score only the commonest of a target's tokens (FR-Spec, arXiv 2502.14856; VocabTrim,
arXiv 2506.22694).

A small target's output layer is a large part of it, and a head goes through it at each drafted depth. The cut lies in
``TargetSpec``: a head built from the spec of a cut vocabulary has an output layer of fewer rows and need not know it.
What is verified is the whole vocabulary.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import nn

from koala_bench.errors import KoalaBenchError

BUFFER = "draft_vocabulary"  # of the module, by which a head keeps its ids and its file holds them


@dataclass(frozen=True, eq=False)
class DraftVocabulary:
    """The tokens that a head can draft.

    Attributes:
        ids: of the target's tokens, int64 [drafted], each once.
        vocab_size: of the target.
    """

    ids: torch.Tensor
    vocab_size: int

    def __len__(self) -> int:
        return len(self.ids)

    def spread(self, scores: torch.Tensor) -> torch.Tensor:
        """Scores [..., drafted] among all tokens of the target [..., vocab_size]; what cannot be drafted
        gets -inf."""
        return scores.new_full((*scores.shape[:-1], self.vocab_size), -torch.inf).index_copy(-1, self.ids, scores)

    def places(self, tokens: torch.Tensor) -> torch.Tensor:
        """Index of each of the target's tokens [...] in the draft vocabulary; -1, which a loss ignores, if absent."""
        return self._place_of.to(tokens.device)[tokens]

    @cached_property
    def sha256(self) -> str:
        """Hash of the ids: heads of equal vocabularies share what is computed for one of them."""
        return hashlib.sha256(self.ids.cpu().numpy().tobytes()).hexdigest()

    @cached_property
    def _place_of(self) -> torch.Tensor:
        places = self.ids.new_full((self.vocab_size,), -1)
        places[self.ids] = torch.arange(len(self.ids), device=self.ids.device)
        return places


def checked_count(count: object, vocab_size: int) -> int:
    """The number of tokens of a draft vocabulary. Raises KoalaBenchError unless it is a whole number from 1 to the
    target's."""
    if type(count) is not int or not 1 <= count <= vocab_size:
        raise KoalaBenchError(
            f"draft_vocabulary is {count!r}.", f"It must be a number of tokens from 1 to the target's {vocab_size}."
        )
    return count


def fault_of(ids: torch.Tensor, vocab_size: int) -> str | None:
    """Why ids are not a valid draft vocabulary; None if they are."""
    if ids.dtype not in (torch.int64, torch.int32):
        return f"draft_vocabulary is of {ids.dtype}, no whole numbers."
    if ids.ndim != 1 or not len(ids):
        return "draft_vocabulary is no list of ids."
    if outside := int(((ids < 0) | (ids >= vocab_size)).sum()):
        return f"draft_vocabulary holds {outside} ids outside of the target's {vocab_size} tokens."
    return "draft_vocabulary holds an id more than once." if len(ids.unique()) < len(ids) else None


def by_count(answers: Iterable[Sequence[int]], vocab_size: int, special: Iterable[int]) -> torch.Tensor:
    """All tokens of a target in the order in which a draft vocabulary takes them, int64 [vocab_size].

    Special tokens come first, the others by how often they stand in the answers, of equals the lower id.
    """
    counts = torch.zeros(vocab_size, dtype=torch.int64)
    for answer in answers:
        counts += torch.bincount(torch.as_tensor(list(answer), dtype=torch.int64), minlength=vocab_size)
    if wanted := sorted({token for token in special if 0 <= token < vocab_size}):
        counts[wanted] = torch.iinfo(torch.int64).max
    return counts.argsort(descending=True, stable=True)


def first_of(order: torch.Tensor, count: int) -> torch.Tensor:
    """The ids of a draft vocabulary of ``count`` tokens, ascending."""
    return order[:count].long().sort().values


def fitted(tensors: dict[str, torch.Tensor], head: nn.Module, vocabulary: DraftVocabulary) -> dict[str, torch.Tensor]:
    """A head's tensors cut to a draft vocabulary: of what has a row for each token, those rows."""
    own, ids = head.state_dict(), vocabulary.ids.cpu()
    change = (vocabulary.vocab_size, len(ids))

    def cut(name: str, tensor: torch.Tensor) -> torch.Tensor:
        for at, sizes in enumerate(zip(tensor.shape, own[name].shape, strict=False) if name in own else ()):
            if sizes == change and sizes[0] != sizes[1]:
                tensor = tensor.index_select(at, ids)
        return tensor

    return {BUFFER: ids, **{name: cut(name, tensor) for name, tensor in tensors.items()}}
