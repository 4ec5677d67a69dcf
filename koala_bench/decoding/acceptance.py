"""Acceptance rules: which path of a verified tree is kept, and the token that the target itself adds.

Three rules. ``Greedy`` and ``SpeculativeSampling`` are lossless: the former gives the target's own most likely tokens,
the latter tokens distributed as the target's own samples. ``TypicalAcceptance`` is not: its tokens are likely ones, no
more.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch

from koala_bench.decoding.candidates import Pick, best
from koala_bench.decoding.sampling import Draws, Sampling
from koala_bench.engine.target import drafted_and_likeliest
from koala_bench.errors import KoalaBenchError
from koala_bench.tree import DraftTree

Row = npt.NDArray[np.float32] | npt.NDArray[np.float64]


class Accepted(NamedTuple):
    """The outcome of a verification.

    Attributes:
        path: node indices from the root to the deepest accepted node.
        tokens: tokens of the path without the root, then the bonus token; as many as the path has nodes.
        distances: for each of the tokens how far the rule is from the target, as the total variation in [0, 1] between
            what it settles there and the target's distribution; None for a lossless rule.
    """

    path: tuple[int, ...]
    tokens: list[int]
    distances: list[float] | None = None


class Rule(Protocol):
    """Decides what of a tree is kept. One object per answer; a rule that samples draws from a generator of its own.

    Attributes:
        pick: how a head is to take its candidates, see ``koala_bench.decoding.candidates``.
    """

    @property
    def pick(self) -> Pick: ...

    def accept(self, tree: DraftTree, logits: torch.Tensor) -> Accepted:
        """Judge a tree by the target's logits [nodes, vocab_size] at its nodes. At least the bonus token is settled."""
        ...


# ------------------------------------------------------------------------------------ greedy


def greedy(
    tree: DraftTree,
    logits: torch.Tensor,
    ask: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = drafted_and_likeliest,
) -> Accepted:
    """Follow the tree as long as a child carries the target's own most likely token.

    Walking from the root needs no padded candidate rows, so no padding can be mistaken for a token. Of siblings
    with the same token the first is followed. One read from the device.

    Args:
        logits: [nodes, vocab_size].
        ask: ``drafted_and_likeliest``, or a recording of it.
    """
    drafted, likeliest = ask(tree.tokens, logits).tolist()
    children = tree.shape.children
    path, node = [0], 0
    while True:
        wanted = likeliest[node]
        node = next((child for child in children[node] if drafted[child] == wanted), -1)
        if node < 0:
            return Accepted(tuple(path), [*(drafted[i] for i in path[1:]), wanted])
        path.append(node)


class Greedy:
    """``greedy`` as a rule: the target's most likely tokens, whatever is drafted."""

    pick: Pick = staticmethod(best)

    def __init__(self, ask: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = drafted_and_likeliest) -> None:
        self.ask = ask

    def accept(self, tree: DraftTree, logits: torch.Tensor) -> Accepted:
        return greedy(tree, logits, self.ask)


GREEDY = Greedy()


# ------------------------------------------------------------------------------------ speculative sampling


def chance(p: Row, q: Row | None, token: int) -> float:
    """Probability of accepting a proposed token: min(1, p(x) / q(x)).

    A token that was not drawn (``q`` is None), or that ``q`` cannot have given, was proposed for certain: q(x) = 1.

    Args:
        p, q: distributions [vocab_size] of the target, and of the proposal given the siblings before it.
    """
    if q is None or not q[token] > 0:
        return float(p[token])
    return min(1.0, float(p[token]) / float(q[token]))


def after_rejection(p: Row, q: Row | None, token: int) -> tuple[Row, Row | None]:
    """What target and proposal become for the next sibling: norm(max(p - q, 0)), and ``q`` without the token.

    Of a certain proposal that leaves ``p`` without the token.
    """
    if q is None or not q[token] > 0:
        left = p.copy()
        left[token] = 0
    else:
        left = np.maximum(p - q, 0)
        q = q.copy()
        q[token] = 0
        if (rest := q.sum()) > 0:
            q = q / rest
    total = left.sum()
    # Nothing is left only where p equals q up to rounding, and then a rejection is itself a matter of rounding.
    return (left / total if total > 0 else p), q


class SpeculativeSampling:
    """Samples from the target at a temperature; lossless for chains and trees.

    The rule of Leviathan et al. 2023 (arXiv 2211.17192) and Chen et al. 2023 (arXiv 2302.01318), in EAGLE's form for
    trees whose siblings are drawn without replacement (Li et al. 2024, arXiv 2401.15077): go down from the root, try
    the children in their order, take ``x`` with probability min(1, p(x) / q(x)); after a rejection p becomes norm(max(p
    - q, 0)) and q loses ``x``. Where no child is taken the bonus token is drawn from what p has become, at a leaf from
    p itself. p is always the processed distribution, at the leaf too, where EAGLE v1 forgot temperature, top-k and
    top-p.

    What holds: the settled tokens are distributed exactly as tokens sampled from the target one by one, up to rounding,
    if

    - in a tree with ``proposals`` the children of a node are the first tokens drawn there, in the order drawn: to leave
      one out, or to choose among them by what they are, as a dynamic tree that keeps the best would, spoils the
      chances. What was drawn for a depth may serve at several of its nodes;
    - a tree without ``proposals`` was made without looking at the random numbers of this rule. This covers the best
      candidates of EAGLE-2 and lookups: to accept ``x`` with probability p(x) and otherwise to go on with p without
      ``x`` is to draw from p, asking for the tokens one by one, and that is right for any list of tokens, repeated ones
      included.

    A step costs one read from the device, of the logits at all nodes and of the proposals: on a GPU a copy of 64 nodes
    of 32,000 tokens in half precision is 4 MB. Only the nodes on the path are processed then, on the CPU: with 4,096
    tokens some 20 us a node and 10 us a rejected sibling, with 32,000 tokens 100 and 50 us; top-p adds as much to a
    node.

    Args:
        generator: on the CPU; whoever seeds it determines all that is drawn, by the head's ``pick`` too.
    """

    def __init__(self, sampling: Sampling, generator: torch.Generator) -> None:
        self.sampling = sampling
        self.generator = generator
        self.pick: Pick = Draws(sampling, generator)

    def accept(self, tree: DraftTree, logits: torch.Tensor) -> Accepted:
        """Judge a tree; as many random numbers are drawn as it has nodes."""
        tokens, scores, proposals = _read(tree, logits)
        luck: list[float] = torch.rand(tree.shape.nodes, dtype=torch.float64, generator=self.generator).tolist()
        path, p = [0], self._target(scores[0])
        while below := tree.shape.children[path[-1]]:
            q = None if proposals is None else _normalised(proposals[tree.shape.inner.index(path[-1])])
            for child in below:
                if luck[child] < chance(p, q, tokens[child]):
                    path.append(child)
                    p = self._target(scores[child])
                    break
                p, q = after_rejection(p, q, tokens[child])
            else:
                break
        return Accepted(tuple(path), [*(tokens[node] for node in path[1:]), drawn(p, luck[0])])

    def _target(self, scores: torch.Tensor) -> Row:
        row: Row = self.sampling.probabilities(scores).numpy()
        return row


def drawn(p: Row, luck: float) -> int:
    """The token of a distribution that a number in [0, 1) points at; never one of probability 0."""
    ends = p.cumsum(dtype=np.float64)
    at = int(ends.searchsorted(luck * ends[-1], side="right"))
    return at if at < len(p) else int(p.nonzero()[0][-1])  # the product may round up to the very end


def _read(tree: DraftTree, logits: torch.Tensor) -> tuple[list[int], torch.Tensor, Row | None]:
    """Tokens, logits and proposals on the CPU, by one read from the device."""
    if tree.proposals is None:
        tokens, scores = on_cpu([tree.tokens, logits])
        return tokens.tolist(), scores, None
    tokens, scores, found = on_cpu([tree.tokens, logits, tree.proposals])
    rows: Row = (found if found.dtype == torch.float64 else found.float()).numpy()
    return tokens.tolist(), scores, rows


def _normalised(row: Row) -> Row:
    total = row.sum()
    return row / total if total > 0 else row


def on_cpu(tensors: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
    """Tensors of one device on the CPU, by one copy; the tensors themselves if they are there already."""
    if tensors[0].device.type == "cpu":
        return tensors
    return unpacked(packed(tensors).cpu(), tensors)


def packed(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """All bytes of some tensors in one, the widest numbers first so that each part starts at a multiple of its own
    width.
    """
    return torch.cat([each.contiguous().flatten().view(torch.uint8) for each in _by_width(tensors)])


def unpacked(block: torch.Tensor, like: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The tensors out of a block; ``like`` are tensors of the same dtypes and shapes."""
    pieces = block.split([each.numel() * each.element_size() for each in _by_width(like)])
    found = {
        id(each): piece.view(each.dtype).view(each.shape) for each, piece in zip(_by_width(like), pieces, strict=True)
    }
    return [found[id(each)] for each in like]


def _by_width(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    return sorted(tensors, key=lambda each: -each.element_size())


# ------------------------------------------------------------------------------------ typical acceptance


class TypicalAcceptance:
    """Keeps drafts that are typical of the target's distribution (Cai et al. 2024, Medusa, arXiv 2401.10774). NOT
    lossless.

    A token is accepted if its probability exceeds min(threshold, alpha * exp(-H)), with H the entropy of the target's
    distribution at the node above, at the temperature; the longest accepted path wins, of several the one with the
    largest sum of log-probabilities, of these the first. The bonus token, and with it every root, is the target's most
    likely token. Nothing is random: the settled text is neither greedy decoding's nor a sample, and how far each token
    is from a sample is told in ``Accepted.distances``: 1 - q(token), the total variation between settling the token for
    certain and drawing from q, the distribution that a lossless method samples from. Unlike what accepts, q is cut by
    top-k and top-p; Medusa knows neither.

    Equal to upstream's deterministic variant (``evaluate_posterior`` with ``fast=True``), whose 1e-5 inside the
    logarithm of the entropy is kept, except that padding of candidate paths cannot be accepted, because there is none.
    One read from the device.

    Args:
        temperature: of both distributions.
        threshold, alpha: upstream's ``posterior_threshold`` and ``posterior_alpha``, with the values of its
            ``medusa_generate``.
        top_k, top_p: of the distribution that distances are from, see ``Sampling``; they change no decision.

    Raises:
        KoalaBenchError: ``threshold`` or ``alpha`` is not a number above 0, or see ``Sampling``.
    """

    pick: Pick = staticmethod(best)

    def __init__(
        self, temperature: float, threshold: float = 0.09, alpha: float = 0.3, top_k: int = 0, top_p: float = 1.0
    ) -> None:
        self.accepting, self.sampled = Sampling(temperature), Sampling(temperature, top_k, top_p)
        for name, value in (("threshold", threshold), ("alpha", alpha)):
            if not 0 < value < math.inf:
                raise KoalaBenchError(
                    f"Typical acceptance with {name} {value}.",
                    "Give a number above 0; Medusa uses threshold 0.09 and alpha 0.3.",
                )
        self.threshold, self.alpha = threshold, alpha

    def accept(self, tree: DraftTree, logits: torch.Tensor) -> Accepted:
        """Judge a tree."""
        shape = tree.shape
        p = self.accepting.probabilities(logits)
        q = p if self.sampled == self.accepting else self.sampled.probabilities(logits)
        inner = (
            p if shape.nodes == 1 else p[list(shape.inner)]
        )  # a leaf accepts nothing, and logarithms are most of the work
        entropy = -torch.log(inner + 1e-5).mul_(inner).sum(-1)
        limit = torch.clamp(self.alpha * torch.exp(-entropy), max=self.threshold)
        place = {node: index for index, node in enumerate(shape.inner)}
        above = torch.tensor((0, *shape.parents[1:]), device=p.device)
        judge = torch.tensor([0, *(place[parent] for parent in shape.parents[1:])], device=p.device)
        share = p[above, tree.tokens]
        likeliest = p.max(-1).indices
        drawn_share, drawn_top = q[above, tree.tokens], q.gather(-1, likeliest[:, None])[:, 0]
        # float64 holds token ids exactly.
        parts = (tree.tokens, likeliest, share > limit[judge], share, drawn_share, drawn_top)
        read: list[list[float]] = torch.stack([each.double() for each in parts]).tolist()
        tokens, wanted, typical, chances, drawn_chances, drawn_tops = read
        sums: dict[int, float] = {0: 0.0}  # of the accepted nodes
        for node in range(1, shape.nodes):
            if typical[node] and shape.parents[node] in sums:
                sums[node] = sums[shape.parents[node]] + math.log(chances[node])
        end = max(sums, key=lambda node: (shape.depths[node], sums[node]))
        path = shape.path_to(end)
        settled = [*(int(tokens[node]) for node in path[1:]), int(wanted[end])]
        return Accepted(path, settled, [*(1 - drawn_chances[node] for node in path[1:]), 1 - drawn_tops[end]])
