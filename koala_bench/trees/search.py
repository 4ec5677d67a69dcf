"""The best draft tree of a given size, by dynamic programming or greedily.

The dynamic program is Sequoia's (Chen et al. 2024, arXiv 2402.12374), with acceptance probabilities by rank and depth.
The greedy search is Medusa's (Cai et al. 2024, arXiv 2401.10774): add the node most often accepted, one at a time.
"""

from __future__ import annotations

import heapq
from typing import Any

import numpy as np

from koala_bench.trees.rank_profile import RankProfile

Path = tuple[int, ...]
_Probabilities = np.ndarray[Any, np.dtype[np.float64]]


class BestTrees:
    """Trees with the most expected accepted tokens, for every number of nodes and depth, from one table.

    Args:
        probabilities: [depth, ranks], that a candidate is accepted given that its parent is.
        most: drafted nodes of the largest tree.
    """

    def __init__(self, probabilities: _Probabilities, most: int) -> None:
        self._p = probabilities
        self._depth, self._ranks = probabilities.shape
        self._most = most
        # By tree depth: [level][rank, count], the most accepted tokens of ``count`` descendants of a node at that level
        # in the subtrees of candidates ``rank`` and later, and how many of the nodes are in the subtree of ``rank``.
        self._tables: dict[int, tuple[list[_Probabilities], list[np.ndarray[Any, np.dtype[np.int64]]]]] = {}

    def best(self, nodes: int, depth: int) -> tuple[list[Path], float]:
        """Paths of the best tree of so many drafted nodes and levels at most, and its expected accepted tokens."""
        depth = min(depth, self._depth)
        values, taken = self._table(depth)
        paths: list[Path] = []

        def add_subtrees(path: Path, level: int, rank: int, count: int) -> None:
            while count and level < depth and rank < self._ranks:
                mine = int(taken[level][rank, count])
                if mine:
                    paths.append((*path, rank))
                    add_subtrees((*path, rank), level + 1, 0, mine - 1)
                count -= mine
                rank += 1

        add_subtrees((), 0, 0, nodes)
        return sorted(paths, key=lambda path: (len(path), path)), float(values[0][0, nodes])

    def _table(self, depth: int) -> tuple[list[_Probabilities], list[np.ndarray[Any, np.dtype[np.int64]]]]:
        if depth not in self._tables:
            most, ranks = self._most, self._ranks
            values = [np.zeros((ranks + 1, most + 1)) for _ in range(depth + 1)]
            taken = [np.zeros((ranks + 1, most + 1), dtype=np.int64) for _ in range(depth + 1)]
            for level in range(depth - 1, -1, -1):
                for rank in range(ranks - 1, -1, -1):
                    p, below, beside = self._p[level, rank], values[level + 1][0], values[level][rank + 1]
                    for count in range(1, most + 1):
                        # One node for this candidate, ``mine`` below it, the rest in the subtrees of later candidates.
                        worth = p * (1 + below[:count]) + beside[count - 1 :: -1][:count]
                        mine = int(worth.argmax())
                        skipped = beside[count]  # a later rank can be the likelier one where counts are few
                        values[level][rank, count] = max(worth[mine], skipped)
                        taken[level][rank, count] = mine + 1 if worth[mine] > skipped else 0
            self._tables[depth] = values, taken
        return self._tables[depth]


def greedy(profile: RankProfile, nodes: int, depth: int, widest: int) -> list[Path]:
    """The ``nodes`` nodes most often on the target's path, of at most ``depth`` levels and ``widest`` candidates.

    No node is more frequent than its parent, so the greedy choice is optimal for the counted positions.
    """
    paths: list[Path] = []
    frontier: list[tuple[float, int, Path]] = [(-profile.frequency((rank,)), 1, (rank,)) for rank in range(widest)]
    heapq.heapify(frontier)
    while frontier and len(paths) < nodes:
        frequency, length, path = heapq.heappop(frontier)
        if not frequency:
            break
        paths.append(path)
        if length < depth:
            for rank in range(widest):
                heapq.heappush(frontier, (-profile.frequency((*path, rank)), length + 1, (*path, rank)))
    return sorted(paths, key=lambda path: (len(path), path))
