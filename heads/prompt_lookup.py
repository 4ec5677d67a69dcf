"""Prompt lookup decoding (Saxena 2023, github.com/apoorvumang/prompt-lookup-decoding): drafts without a model.

Where the last few tokens stood in the text before, what followed there is proposed again. Ours looks in prompt and
answer alike, takes the longest match first and among equally long ones the latest, and fills a tree where the text went
on differently.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from heads.common.continuations import PLACES, Lookup
from koala_bench.heads import TargetSpec


class PromptLookup(Lookup):
    """Proposes what followed the last ``ngram`` or fewer tokens before.

    A step costs a few dictionary look-ups whatever the length of the text: every n-gram's places are kept as the text
    grows.

    Args:
        ngram: tokens of the longest match that is looked for (the original's usual 3).
    """

    def __init__(self, spec: TargetSpec, ngram: int = 3) -> None:
        super().__init__(spec, "ngram", ngram)
        self.ngram = ngram

    def assisted(self, depth: int) -> dict[str, int]:
        """Arguments of transformers' ``generate`` for the same look-ups."""
        return {"prompt_lookup_num_tokens": depth, "max_matching_ngram_size": self.ngram}

    def forget(self) -> None:
        self._text: list[int] = []
        self._places: dict[tuple[int, ...], list[int]] = {}

    def append(self, token: int) -> None:
        self._text.append(token)
        for length in range(1, min(self.ngram, len(self._text)) + 1):
            self._places.setdefault(tuple(self._text[-length:]), []).append(len(self._text))

    def found(self) -> tuple[Sequence[int], Iterable[int]]:
        longest = range(min(self.ngram, len(self._text)), 0, -1)
        matches = (self._places[tuple(self._text[-length:])] for length in longest)
        # Of each the last place is the text's own end.
        return self._text, (place for each in matches for place in each[-2 : -PLACES - 2 : -1])
