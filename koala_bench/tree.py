"""Draft trees: static shape, tokens, and derived data for attention and verification.

Node 0 is the root, the last token that is already committed; every other node comes after its parent. A chain is
a tree of width 1, and vanilla decoding is a tree of the root alone.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Any, ClassVar

import torch

from koala_bench.common.suggestions import did_you_mean
from koala_bench.errors import KoalaBenchError

_LONGEST_CHAIN = 64
_MOST_NODES = 4096
# Decimal digits of this script, and few: int() takes other scripts' too and refuses thousands.
_CHAIN = re.compile("chain-([1-9][0-9]?)")
_PRODUCT = re.compile("[1-9][0-9]{0,8}(x[1-9][0-9]{0,8})*")
_DYNAMIC = re.compile("dynamic-([1-9][0-9]{0,8})x([1-9][0-9]{0,8})x([1-9][0-9]{0,8})")
_WIDEST = 64  # nodes grown per level of a dynamic tree; each offers as many children


@dataclass(frozen=True)
class TreeShape:
    """The parent of each node.

    Attributes:
        parents: for each node the index of its parent; -1 for the root, which is node 0.
    """

    parents: tuple[int, ...]

    def __post_init__(self) -> None:
        if (
            not self.parents
            or self.parents[0] != -1
            or any(not 0 <= parent < node for node, parent in enumerate(self.parents[1:], start=1))
        ):
            raise ValueError(
                f"a draft tree starts with its root and lists parents before children, got parents {self.parents}"
            )

    @property
    def nodes(self) -> int:
        """Number of nodes, the root included."""
        return len(self.parents)

    @cached_property
    def depths(self) -> tuple[int, ...]:
        """Distance of each node from the root."""
        depths = [0]
        for parent in self.parents[1:]:
            depths.append(depths[parent] + 1)
        return tuple(depths)

    @property
    def depth(self) -> int:
        """Distance of the deepest node from the root."""
        return max(self.depths)

    @cached_property
    def children(self) -> tuple[tuple[int, ...], ...]:
        """For each node the indices of its children, in order."""
        children: list[list[int]] = [[] for _ in self.parents]
        for node, parent in enumerate(self.parents[1:], start=1):
            children[parent].append(node)
        return tuple(map(tuple, children))

    @cached_property
    def inner(self) -> tuple[int, ...]:
        """The nodes that have children, in order."""
        return tuple(node for node, below in enumerate(self.children) if below)

    def path_to(self, node: int) -> tuple[int, ...]:
        """Node indices from the root to ``node``, both included."""
        path = [node]
        while (node := self.parents[node]) >= 0:
            path.append(node)
        return tuple(reversed(path))

    @cached_property
    def leaf_paths(self) -> tuple[tuple[int, ...], ...]:
        """The path to every node without children, in the order of the leaves."""
        return tuple(self.path_to(node) for node, below in enumerate(self.children) if not below)

    @cached_property
    def ancestors(self) -> torch.Tensor:
        """Tree mask, bool [nodes, nodes]: whether the column's node is the row's node or an ancestor of it."""
        matrix = torch.eye(self.nodes, dtype=torch.bool)
        rows = matrix.numpy()  # shares its memory; faster on short rows, and dynamic trees need this at each step
        for node, parent in enumerate(self.parents[1:], start=1):
            rows[node] |= rows[parent]
        return matrix


ROOT_ONLY = TreeShape((-1,))


@dataclass(frozen=True)
class DraftTree:
    """The tokens a head proposes, with their tree.

    Attributes:
        tokens: token of each node, int64 [nodes], on the target's device; ``tokens[0]`` is the root.
        shape: the tree; a static template shares one shape among all steps.
        proposals: [inner nodes, vocab_size]; row ``i`` is the distribution that the children of node ``shape.inner[i]``
            were drawn from, one after the other without replacement, in the order of the siblings. None if the tokens
            were not sampled (best candidates, lookups): each is then proposed with certainty, q = 1, as in EAGLE-2.
    """

    tokens: torch.Tensor
    shape: TreeShape
    proposals: torch.Tensor | None = None

    def __post_init__(self) -> None:
        if self.tokens.shape != (self.shape.nodes,):
            raise ValueError(
                f"a tree of {self.shape.nodes} nodes needs as many tokens, got shape {tuple(self.tokens.shape)}"
            )
        if self.proposals is not None and len(self.proposals) != len(self.shape.inner):
            raise ValueError(
                f"a tree of {len(self.shape.inner)} inner nodes needs as many proposals, got {len(self.proposals)}"
            )


@dataclass(frozen=True)
class TreeTemplate:
    """A static tree as child-rank paths: (0, 1) is the second-best child of the best first guess.

    Attributes:
        name: how records and tables call it.
        paths: every drafted node, ordered by (depth, ranks); the root is implicit.
    """

    dynamic: ClassVar[bool] = False
    name: str
    paths: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, name: str, paths: Sequence[Sequence[int]]) -> TreeTemplate:
        """Order and check the paths of a template.

        Raises:
            KoalaBenchError: a path is empty, repeated, has a negative rank, or its parent is missing.
        """
        remedy = "List every node once as child ranks, parents included, e.g. [[0], [1], [0, 0]]."
        ordered = tuple(sorted((tuple(path) for path in paths), key=lambda path: (len(path), path)))
        known = set(ordered)
        if len(known) != len(ordered):
            raise KoalaBenchError(f"Tree '{name}' lists a node twice.", remedy)
        for path in ordered:
            if not path or any(not isinstance(rank, int) or rank < 0 for rank in path):
                raise KoalaBenchError(f"Tree '{name}': {list(path)} is not a path of child ranks.", remedy)
            if len(path) > 1 and path[:-1] not in known:
                raise KoalaBenchError(f"Tree '{name}': the parent of {list(path)} is missing.", remedy)
        return cls(name, ordered)

    @cached_property
    def shape(self) -> TreeShape:
        """The tree of the template, its nodes in the order of ``paths`` after the root."""
        index = {path: node for node, path in enumerate(self.paths, start=1)}
        index[()] = 0
        return TreeShape((-1, *(index[path[:-1]] for path in self.paths)))

    @property
    def nodes(self) -> int:
        """Number of nodes, the root included."""
        return len(self.paths) + 1

    @property
    def depth(self) -> int:
        """Length of the longest path: how many drafted tokens can be accepted in a step."""
        return max((len(path) for path in self.paths), default=0)

    @property
    def widest_rank(self) -> int:
        """Number of candidates a head must offer at a node."""
        return 1 + max((rank for path in self.paths for rank in path), default=-1)

    def check(self, *, depth: int, candidates: int) -> None:
        """Refuse a template that a head cannot fill.

        Raises:
            KoalaBenchError: it is deeper than the head drafts, or uses a rank beyond the vocabulary.
        """
        _check(self.name, self.depth, depth, self.widest_rank, candidates)


@dataclass(frozen=True)
class DynamicTemplate:
    """The size of a tree whose shape is chosen at each step, as in EAGLE-2 (Li et al. 2024, arXiv 2406.16858).

    Attributes:
        name: how records and tables call it, ``dynamic-DxKxN``.
        expansions: D, how often the best nodes of a level are grown after the first candidates (upstream ``depth``).
        width: K, nodes that are grown at each level, and candidates of each (upstream ``top_k``).
        drafted: N, nodes that are kept in the end, the root not counted (upstream ``total_token - 1``).
    """

    dynamic: ClassVar[bool] = True
    name: str
    expansions: int
    width: int
    drafted: int

    @classmethod
    def of(cls, expansions: int, width: int, drafted: int) -> DynamicTemplate:
        """Check the sizes and name the template after them.

        Raises:
            KoalaBenchError: one is below 1 or beyond what can be decoded, or more nodes are to be kept than are ever
                drafted.
        """
        name = f"dynamic-{expansions}x{width}x{drafted}"
        most = width + expansions * width * width
        if min(expansions, width, drafted) < 1:
            raise KoalaBenchError(f"Tree '{name}' has a size below 1.", _DYNAMIC_REMEDY)
        if expansions >= _LONGEST_CHAIN or width > _WIDEST:
            raise KoalaBenchError(
                f"Tree '{name}' grows {width} nodes {expansions} times; at most {_WIDEST} nodes can be grown"
                f" {_LONGEST_CHAIN - 1} times.",
                _DYNAMIC_REMEDY,
            )
        if drafted > most:
            raise KoalaBenchError(
                f"Tree '{name}' is to keep {drafted} nodes, but {width} candidates and {expansions} times"
                f" {width}x{width} are only {most}.",
                _DYNAMIC_REMEDY,
            )
        if drafted >= _MOST_NODES:
            raise KoalaBenchError(f"Tree '{name}' has more than {_MOST_NODES} nodes.", "Choose a smaller --tree.")
        return cls(name, expansions, width, drafted)

    @property
    def nodes(self) -> int:
        """Number of nodes of every tree, the root included."""
        return self.drafted + 1

    @property
    def depth(self) -> int:
        """Length of the longest path that a tree can have."""
        return self.expansions + 1

    @property
    def shape(self) -> TreeShape:
        """There is none before a draft.

        Raises:
            KoalaBenchError: always, since callers that need a shape support static templates only.
        """
        raise self._shapeless()

    @property
    def paths(self) -> tuple[tuple[int, ...], ...]:
        """There are none before a draft, see ``shape``."""
        raise self._shapeless()

    def _shapeless(self) -> KoalaBenchError:
        return KoalaBenchError(
            f"The tree '{self.name}' takes another shape at each step; a tree of one shape is needed here.",
            "Choose a static --tree such as chain-4 or 4x2x1.",
        )

    def check(self, *, depth: int, candidates: int) -> None:
        """Refuse a template that a head cannot fill.

        Raises:
            KoalaBenchError: it is deeper than the head drafts, or a node has more candidates than there are tokens.
        """
        _check(self.name, self.depth, depth, self.width, candidates)


Template = TreeTemplate | DynamicTemplate
_DYNAMIC_REMEDY = "Write dynamic-DxKxN: D expansions of the best K nodes, N nodes kept, such as dynamic-5x8x25."


def _check(name: str, depth: int, most_depth: int, candidates: int, most_candidates: int) -> None:
    if depth > most_depth:
        raise KoalaBenchError(
            f"Tree '{name}' is {depth} levels deep, the head drafts only {most_depth}.",
            "Choose a shallower --tree, or train the head with more heads.",
        )
    if candidates > most_candidates:
        raise KoalaBenchError(
            f"Tree '{name}' needs {candidates} candidates a node, there are only {most_candidates} tokens.",
            "Choose a narrower --tree.",
        )


def _bundled() -> dict[str, dict[str, Any]]:
    text = (resources.files("koala_bench") / "data" / "trees.json").read_text(encoding="utf-8")
    trees: dict[str, dict[str, Any]] = json.loads(text)
    return trees


def template_names() -> list[str]:
    """Names that ``load_template`` knows besides ``chain-N`` and files."""
    return sorted(_bundled())


def load_template(name: str) -> Template:
    """Find a template.

    Args:
        name: a bundled name such as ``medusa/mc_sim_7b_63``; ``chain-4``; ``4x2x1`` for the best 4, then the best
            2 of each, and so on (``3`` for the best 3 alone); ``dynamic-5x8x25`` for EAGLE-2's trees, see
            ``DynamicTemplate``; or a JSON file with a list of paths.

    Raises:
        KoalaBenchError: the name is unknown, its sizes cannot be drafted, or the file is not a list of paths.
    """
    bundled = _bundled()
    if name in bundled:
        return TreeTemplate.of(name, bundled[name]["paths"])
    if (found := _CHAIN.fullmatch(name)) and int(found[1]) <= _LONGEST_CHAIN:
        return TreeTemplate.of(name, [(0,) * depth for depth in range(1, int(found[1]) + 1)])
    if _PRODUCT.fullmatch(name):
        paths: list[tuple[int, ...]] = []
        level: list[tuple[int, ...]] = [()]
        for width in map(int, name.split("x")):
            if len(paths) + len(level) * width > _MOST_NODES:
                raise KoalaBenchError(f"Tree '{name}' has more than {_MOST_NODES} nodes.", "Choose a smaller --tree.")
            level = [(*path, rank) for path in level for rank in range(width)]
            paths += level
        return TreeTemplate.of(name, paths)
    if found := _DYNAMIC.fullmatch(name):
        return DynamicTemplate.of(int(found[1]), int(found[2]), int(found[3]))
    if name.startswith("dynamic"):
        raise KoalaBenchError(f"'{name}' is not the size of a dynamic tree.", _DYNAMIC_REMEDY)
    if name.endswith(".json"):
        try:
            paths_read = json.loads(Path(name).read_text(encoding="utf-8"))
            return TreeTemplate.of(Path(name).stem, [tuple(path) for path in paths_read])
        except OSError as error:
            raise KoalaBenchError(f"Cannot read the tree {name}: {error.strerror}.", "Check --tree.") from error
        except (ValueError, TypeError, RecursionError) as error:
            raise KoalaBenchError(
                f"{name} is not a list of child-rank paths.", "Write for example [[0], [1], [0, 0]]."
            ) from error
    usable = f"Use chain-N, WxWxW, dynamic-DxKxN, a .json file, or one of: {', '.join(sorted(bundled))}."
    raise KoalaBenchError(f"Unknown tree '{name}'.", did_you_mean(name, bundled, usable))
