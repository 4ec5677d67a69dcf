"""Acceptance rules: which path of a verified tree is accepted, and the bonus token.

``Greedy`` and ``SpeculativeSampling`` are lossless: greedy gives the target's most likely tokens, speculative sampling
tokens distributed as the target's samples. ``TypicalAcceptance`` is lossy.
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
        distances: total variation in [0, 1] between the rule's and the target's distribution of each token; None for a
            lossless rule.
    """

    path: tuple[int, ...]
    tokens: list[int]
    distances: list[float] | None = None


class Rule(Protocol):
    """Decides which path of a tree is accepted. One object per answer; a sampling rule has its own random generator.

    Attributes:
        pick: how a head selects its candidates, see ``koala_bench.decoding.candidates``.
    """

    @property
    def pick(self) -> Pick: ...

    def accept(self, tree: DraftTree, logits: torch.Tensor) -> Accepted:
        """Verify a tree by the target's logits [nodes, vocab_size]. At least the bonus token is accepted."""
        ...


# ------------------------------------------------------------------------------------ greedy


def greedy(
    tree: DraftTree,
    logits: torch.Tensor,
    read: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = drafted_and_likeliest,
) -> Accepted:
    """Descend the tree while a child is the target's most likely token; of siblings with equal tokens, into the first.

    Without padded candidate paths no padding can be mistaken for a token. One read from the device.

    Args:
        logits: [nodes, vocab_size].
        read: ``drafted_and_likeliest``, or a trace of it.
    """
    drafted, likeliest = read(tree.tokens, logits).tolist()
    children = tree.shape.children
    path, node = [0], 0
    while True:
        wanted = likeliest[node]
        node = next((child for child in children[node] if drafted[child] == wanted), -1)
        if node < 0:
            return Accepted(tuple(path), [*(drafted[i] for i in path[1:]), wanted])
        path.append(node)


class Greedy:
    """``greedy`` as a rule: always the target's most likely tokens."""

    pick: Pick = staticmethod(best)

    def __init__(self, read: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = drafted_and_likeliest) -> None:
        self.read = read

    def accept(self, tree: DraftTree, logits: torch.Tensor) -> Accepted:
        return greedy(tree, logits, self.read)


GREEDY = Greedy()


# ------------------------------------------------------------------------------------ speculative sampling


def chance(p: Row, q: Row | None, token: int) -> float:
    """Probability of accepting a proposed token: min(1, p(x) / q(x)).

    A token that was not sampled (``q`` is None), or to which ``q`` gives no probability, was certain: q(x) = 1.

    Args:
        p, q: distributions [vocab_size] of the target, and of the proposal given the siblings before it.
    """
    if q is None or not q[token] > 0:
        return float(p[token])
    return min(1.0, float(p[token]) / float(q[token]))


def after_rejection(p: Row, q: Row | None, token: int) -> tuple[Row, Row | None]:
    """Target and proposal for the next sibling: norm(max(p - q, 0)), and ``q`` without the token.

    After a certain proposal the target is ``p`` without the token.
    """
    if q is None or not q[token] > 0:
        residual = p.copy()
        residual[token] = 0
    else:
        residual = np.maximum(p - q, 0)
        q = q.copy()
        q[token] = 0
        if (rest := q.sum()) > 0:
            q = q / rest
    total = residual.sum()
    # It is 0 only if p equals q up to rounding, when the rejection itself was due to rounding.
    return (residual / total if total > 0 else p), q


class SpeculativeSampling:
    """Samples from the target at a temperature; lossless for chains and trees.

    The rule of Leviathan et al. 2023 (arXiv 2211.17192) and Chen et al. 2023 (arXiv 2302.01318), in EAGLE's form for
    trees whose siblings are drawn without replacement (Li et al. 2024, arXiv 2401.15077): go down from the root, try
    the children in their order, take ``x`` with probability min(1, p(x) / q(x)); after a rejection p becomes norm(max(p
    - q, 0)) and q loses ``x``. Where no child is taken the bonus token is drawn from what p has become, at a leaf from
    p itself. p is always the processed distribution, at the leaf too, where EAGLE v1 forgot temperature, top-k and
    top-p.

    The tokens are distributed exactly as the target's samples, up to rounding, if

    - in a tree with ``proposals`` the children of a node are the first tokens drawn there, in the order drawn. Leaving
      one out or selecting among them, as a dynamic tree does, would bias the result. The draws for a depth may serve
      several nodes of it;
    - a tree without ``proposals`` does not depend on this rule's random numbers. This covers EAGLE-2's trees and
      lookups: accepting ``x`` with probability p(x), and else going on with p without ``x``, is sampling from p, for
      any list of tokens, repeated ones included.

    A step costs one read from the device, of all logits and proposals: 4 MB for 64 nodes of 32,000 tokens in half
    precision. Only the nodes of the path are processed, on the CPU: some 20 us a node and 10 us a rejected sibling with
    4,096 tokens, 100 and 50 us with 32,000; top-p doubles a node's.

    Args:
        generator: on the CPU; its seed determines all samples, those of the head's ``pick`` included.
    """

    def __init__(self, sampling: Sampling, generator: torch.Generator) -> None:
        self.sampling = sampling
        self.generator = generator
        self.pick: Pick = Draws(sampling, generator)

    def accept(self, tree: DraftTree, logits: torch.Tensor) -> Accepted:
        """Verify a tree, with one random number per node."""
        tokens, scores, proposals = _read(tree, logits)
        luck: list[float] = torch.rand(tree.shape.nodes, dtype=torch.float64, generator=self.generator).tolist()

        def target(row: torch.Tensor) -> Row:
            found: Row = self.sampling.probabilities(row).numpy()
            return found

        path, p = [0], target(scores[0])
        while below := tree.shape.children[path[-1]]:
            q = None if proposals is None else proposals[tree.shape.inner.index(path[-1])]
            if q is not None and (total := q.sum()) > 0:
                q = q / total
            for child in below:
                if luck[child] < chance(p, q, tokens[child]):
                    path.append(child)
                    p = target(scores[child])
                    break
                p, q = after_rejection(p, q, tokens[child])
            else:
                break
        return Accepted(tuple(path), [*(tokens[node] for node in path[1:]), drawn(p, luck[0])])


def drawn(p: Row, luck: float) -> int:
    """Inverse-CDF sampling: the token for a uniform number in [0, 1); never one of probability 0."""
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


def on_cpu(tensors: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
    """Copies on the CPU of tensors of one device, in one transfer; the tensors themselves if already there."""
    if tensors[0].device.type == "cpu":
        return tensors
    return unpacked(packed(tensors).cpu(), tensors)


def packed(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """The bytes of several tensors in one, widest dtypes first, so that each part is aligned."""
    return torch.cat([each.contiguous().flatten().view(torch.uint8) for each in _by_width(tensors)])


def unpacked(block: torch.Tensor, like: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The inverse of ``packed``; ``like`` are tensors of the same dtypes and shapes."""
    pieces = block.split([each.numel() * each.element_size() for each in _by_width(like)])
    pairs = zip(_by_width(like), pieces, strict=True)
    views = {id(each): piece.view(each.dtype).view(each.shape) for each, piece in pairs}
    return [views[id(each)] for each in like]


def _by_width(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    return sorted(tensors, key=lambda each: -each.element_size())


# ------------------------------------------------------------------------------------ typical acceptance


class TypicalAcceptance:
    """Keeps drafts that are typical of the target's distribution (Cai et al. 2024, Medusa, arXiv 2401.10774). NOT
    lossless.

    A token is accepted if its probability exceeds min(threshold, alpha * exp(-H)), with H the entropy of the target's
    distribution at its parent, at the temperature. The longest accepted path wins; of several the one with the largest
    sum of log-probabilities, then the first. The bonus token is the target's most likely token. Nothing is random: the
    text is neither greedy decoding's nor a sample. ``Accepted.distances`` says how far each token is from a sample:
    1 - q(token), the total variation between that token with certainty and q, the distribution that a lossless method
    samples from. Only q is cut by top-k and top-p, which Medusa lacks.

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
                remedy = "Give a number above 0; Medusa uses threshold 0.09 and alpha 0.3."
                raise KoalaBenchError(f"Typical acceptance with {name} {value}.", remedy)
        self.threshold, self.alpha = threshold, alpha

    def accept(self, tree: DraftTree, logits: torch.Tensor) -> Accepted:
        """Verify a tree."""
        shape = tree.shape
        p = self.accepting.probabilities(logits)
        q = p if self.sampled == self.accepting else self.sampled.probabilities(logits)
        inner = p if shape.nodes == 1 else p[list(shape.inner)]  # leaves have no children to judge; logarithms are slow
        entropy = -torch.log(inner + 1e-5).mul_(inner).sum(-1)
        limit = torch.clamp(self.alpha * torch.exp(-entropy), max=self.threshold)
        inner_index = {node: index for index, node in enumerate(shape.inner)}
        parents = torch.tensor((0, *shape.parents[1:]), device=p.device)
        inner_parents = torch.tensor([0, *(inner_index[parent] for parent in shape.parents[1:])], device=p.device)
        token_p = p[parents, tree.tokens]
        likeliest = p.max(-1).indices
        token_q, likeliest_q = q[parents, tree.tokens], q.gather(-1, likeliest[:, None])[:, 0]
        # float64 holds token ids exactly.
        parts = (tree.tokens, likeliest, token_p > limit[inner_parents], token_p, token_q, likeliest_q)
        on_host: list[list[float]] = torch.stack([each.double() for each in parts]).tolist()
        tokens, bonus, typical, p_of, q_of, bonus_q = on_host
        sums: dict[int, float] = {0: 0.0}  # of the accepted nodes
        for node in range(1, shape.nodes):
            if typical[node] and shape.parents[node] in sums:
                sums[node] = sums[shape.parents[node]] + math.log(p_of[node])
        end = max(sums, key=lambda node: (shape.depths[node], sums[node]))
        path = shape.path_to(end)
        accepted = [*(int(tokens[node]) for node in path[1:]), int(bonus[end])]
        return Accepted(path, accepted, [*(1 - q_of[node] for node in path[1:]), 1 - bonus_q[end]])
