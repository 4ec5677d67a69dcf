"""The best draft tree of a size: by dynamic programming over what a child of each rank and depth is worth, and
greedily.

The first is the dynamic program of Sequoia (Chen et al. 2024, arXiv 2402.12374), with probabilities that may differ by
depth; the second is how Medusa builds its trees (Cai et al. 2024, arXiv 2401.10774): node after node, always the
likeliest that can be hung on.
"""

from __future__ import annotations

import heapq
from typing import Any

import numpy as np

from koala_bench.trees.rank_profile import RankProfile

Path = tuple[int, ...]
_Probabilities = np.ndarray[Any, np.dtype[np.float64]]


class BestTrees:
    """Trees that get most tokens accepted, for every number of nodes and every depth, from one table.

    Args:
        probabilities: [depth, ranks], that a candidate is the true token where its parent is.
        most: drafted nodes of the largest tree.
    """

    def __init__(self, probabilities: _Probabilities, most: int) -> None:
        self._p = probabilities
        self._depth, self._ranks = probabilities.shape
        self._most = most
        # For trees of so many levels: [level][rank, count], what ``count`` nodes are worth at most that hang below a
        # node of that level on candidates from ``rank`` on, and how many of them belong to the candidate of that rank.
        self._tables: dict[int, tuple[list[_Probabilities], list[np.ndarray[Any, np.dtype[np.int64]]]]] = {}

    def best(self, nodes: int, depth: int) -> tuple[list[Path], float]:
        """The paths of the best tree of at most ``nodes`` drafted nodes and ``depth`` levels, and the tokens it gets
        accepted by these probabilities.
        """
        depth = min(depth, self._depth)
        values, taken = self._table(depth)
        paths: list[Path] = []

        def hang(path: Path, level: int, rank: int, count: int) -> None:
            while count and level < depth and rank < self._ranks:
                mine = int(taken[level][rank, count])
                if mine:
                    paths.append((*path, rank))
                    hang((*path, rank), level + 1, 0, mine - 1)
                count -= mine
                rank += 1

        hang((), 0, 0, nodes)
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
                        # ``mine`` nodes with this candidate at their top, the rest hang on the candidates behind it.
                        worth = p * (1 + below[:count]) + beside[count - 1 :: -1][:count]
                        mine = int(worth.argmax())
                        skipped = beside[count]  # few positions may have counted a later candidate more often
                        values[level][rank, count] = max(worth[mine], skipped)
                        taken[level][rank, count] = mine + 1 if worth[mine] > skipped else 0
            self._tables[depth] = values, taken
        return self._tables[depth]


def greedy(profile: RankProfile, nodes: int, depth: int, widest: int) -> list[Path]:
    """The tree of the ``nodes`` nodes that were most often on the true path, of at most ``depth`` levels and ``widest``
    candidates.

    No node is more often there than the one above it, so that taking the next most frequent one is the best for the
    counted positions.
    """
    paths: list[Path] = []
    waiting: list[tuple[float, int, Path]] = [(-profile.frequency((rank,)), 1, (rank,)) for rank in range(widest)]
    heapq.heapify(waiting)
    while waiting and len(paths) < nodes:
        frequency, length, path = heapq.heappop(waiting)
        if not frequency:
            break
        paths.append(path)
        if length < depth:
            for rank in range(widest):
                heapq.heappush(waiting, (-profile.frequency((*path, rank)), length + 1, (*path, rank)))
    return sorted(paths, key=lambda path: (len(path), path))
