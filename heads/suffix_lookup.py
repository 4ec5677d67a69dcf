"""Suffix lookup: drafts what followed the longest suffix of the text that stood in it before, however long.

The suffix automaton of Blumer et al. (1985) grows with the text, a token in nearly constant time, as SAM decoding uses
it (Hu et al. 2024, arXiv 2411.10666); shorter suffixes, along its links, fill the further ranks of a tree.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from heads.common.continuations import Lookup
from koala_bench.heads import TargetSpec

_UPDATED = 64  # suffixes whose latest place is kept up to date at each token


class SuffixAutomaton:
    """All substrings of a growing text, and the longest suffix of it that stood in it before.

    State 0 is the empty string. Of each state: ``length`` of its longest string, ``link`` to the state of the longest
    suffix that is in another one, and ``end``, the place behind an occurrence of its strings, the latest but the text's
    own end.
    """

    def __init__(self) -> None:
        self.text: list[int] = []
        self._next: list[dict[int, int]] = [{}]
        self._length, self._link, self._end = [0], [-1], [0]
        self._last = 0
        self._state, self._matched = 0, 0  # the longest suffix that stood before: its state and its length

    def append(self, token: int) -> None:
        """Append a token to the text."""
        # What ends here so far has now been followed by something. Long chains are those of endless repetition.
        state = self._last
        for _ in range(_UPDATED):
            if not state:
                break
            self._end[state] = len(self.text)
            state = self._link[state]
        # The match first, among what stood before; then the token becomes part of it.
        while self._state and token not in self._next[self._state]:
            self._state = self._link[self._state]
            self._matched = self._length[self._state]
        if token in self._next[self._state]:
            self._state, self._matched = self._next[self._state][token], self._matched + 1
        self.text.append(token)
        self._grow(token)
        # The strings of a state that was divided just now belong to its copy if they are short enough.
        while self._state and self._length[self._link[self._state]] >= self._matched:
            self._state = self._link[self._state]

    def _new(self, length: int, link: int, end: int, following: dict[int, int]) -> int:
        self._length.append(length)
        self._link.append(link)
        self._end.append(end)
        self._next.append(following)
        return len(self._length) - 1

    def _grow(self, token: int) -> None:
        state = self._new(len(self.text), 0, len(self.text), {})
        before, self._last = self._last, state
        while before >= 0 and token not in self._next[before]:
            self._next[before][token] = state
            before = self._link[before]
        if before < 0:
            return
        after = self._next[before][token]
        if self._length[after] == self._length[before] + 1:
            self._link[state] = after
            return
        copy = self._new(self._length[before] + 1, self._link[after], self._end[after], dict(self._next[after]))
        self._link[after] = self._link[state] = copy
        while before >= 0 and self._next[before].get(token) == after:
            self._next[before][token] = copy
            before = self._link[before]

    def matches(self) -> list[tuple[int, int]]:
        """(length, place behind an occurrence) of the longest suffix that stood before, and of shorter ones that stood
        elsewhere too.
        """
        found, state, length = [], self._state, self._matched
        while state > 0:
            found.append((length, self._end[state]))
            state = self._link[state]
            length = self._length[state]
        return found


class SuffixLookup(Lookup):
    """Proposes what followed the longest suffix of prompt and answer that stood there before.

    Args:
        least: tokens of the shortest suffix that counts; a longer one is rarer and mostly right. SAM decoding asks a
            draft head where the match is shorter than 5.
    """

    def __init__(self, spec: TargetSpec, least: int = 1) -> None:
        super().__init__(spec, "least", least)
        self.least = least

    def forget(self) -> None:
        self._automaton = SuffixAutomaton()

    def append(self, token: int) -> None:
        self._automaton.append(token)

    def found(self) -> tuple[Sequence[int], Iterable[int]]:
        text, matches = self._automaton.text, self._automaton.matches()
        return text, (place for length, place in matches if length >= self.least)
