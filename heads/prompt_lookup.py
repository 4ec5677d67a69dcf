"""Prompt lookup decoding (Saxena 2023, github.com/apoorvumang/prompt-lookup-decoding): drafts without a model.

Where the last few tokens stood in the text before, what followed there is proposed again. Ours looks in prompt and
answer alike, takes the longest match first and among equally long ones the latest, and fills a tree where the text went
on differently.
"""

from __future__ import annotations

from torch import nn

from heads.common.continuations import drafted
from koala_bench.errors import KoalaBenchError
from koala_bench.heads import Committed, TargetSpec
from koala_bench.tree import DraftTree, Template

_PLACES = 16  # continuations looked at; more than the ranks of any tree that pays


class PromptLookup(nn.Module):
    """Proposes what followed the last ``ngram`` or fewer tokens before.

    A step costs a few dictionary look-ups whatever the length of the text: every n-gram's places are kept as the text
    grows.

    Args:
        ngram: tokens of the longest match that is looked for (the original's usual 3).
    """

    features = (-1,)
    max_depth = 64
    dynamic = True
    usual_tree = "chain-7"  # what followed once mostly follows again: depth pays more than breadth

    def __init__(self, spec: TargetSpec, ngram: int = 3) -> None:
        super().__init__()
        if ngram < 1:
            raise KoalaBenchError(f"The head's ngram is {ngram}.", "It must be at least 1.")
        self.ngram, self._device = ngram, spec.device
        self._paths: tuple[tuple[int, ...], ...] | None = None

    def assisted(self, depth: int) -> dict[str, int]:
        """Arguments of transformers' ``generate`` for the same look-ups."""
        return {"prompt_lookup_num_tokens": depth, "max_matching_ngram_size": self.ngram}

    def begin(self, template: Template, capacity: int) -> None:
        """Forget the text."""
        template.check(depth=self.max_depth, candidates=_PLACES)
        self._paths = template.paths
        self._text: list[int] = []
        self._places: dict[tuple[int, ...], list[int]] = {}

    def prefill(self, new: Committed) -> None:
        """Note where every n-gram of a prompt stands."""
        text = self._text
        for token in new.tokens.tolist():
            text.append(token)
            for length in range(1, min(self.ngram, len(text)) + 1):
                self._places.setdefault(tuple(text[-length:]), []).append(len(text))

    def draft(self, new: Committed) -> DraftTree:
        """Read the committed tokens, then propose what followed the same n-gram before; else the root alone."""
        assert self._paths is not None, "begin() comes before draft()"
        self.prefill(new)
        text = self._text
        found: dict[int, None] = {}
        for length in range(min(self.ngram, len(text)), 0, -1):
            for place in self._places[tuple(text[-length:])][
                -2 : -_PLACES - 2 : -1
            ]:  # the last one is the text's own end
                found.setdefault(place)
        return drafted(text, list(found)[:_PLACES], self._paths, self._device)
