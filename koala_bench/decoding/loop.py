"""The decoding loop: draft, verify, accept, commit. Vanilla decoding is the same loop with a tree of the root alone."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from koala_bench.decoding.acceptance import GREEDY, Greedy, Rule
from koala_bench.decoding.stops import end_of_text
from koala_bench.engine.cache import TreeCache
from koala_bench.engine.loading.token_ids import refuse_unknown_ids
from koala_bench.engine.target import Target
from koala_bench.engine.timing import Stopwatch, synchronise, without_collection
from koala_bench.errors import KoalaBenchError
from koala_bench.heads import Committed, DraftHead, ObservingHead, read_prompt
from koala_bench.tree import ROOT_ONLY, DraftTree, Template, TreeTemplate

Stop = Literal["eos", "limit", "context"]
VANILLA_TREE = TreeTemplate("root", ())


class Vanilla:
    """Drafts nothing: every step commits the one token that the target adds."""

    features: tuple[int, ...] = (-1,)
    max_depth = 0

    def begin(self, template: Template, capacity: int) -> None:
        """Nothing to forget."""

    def draft(self, new: Committed) -> DraftTree:
        """The root alone."""
        return DraftTree(new.tokens[-1:], ROOT_ONLY)


@dataclass(frozen=True)
class Step:
    """One verification, for parity checks and profiles.

    Attributes:
        tree_tokens: token of each node.
        path: accepted nodes, root first.
    """

    tree_tokens: list[int]
    path: tuple[int, ...]


@dataclass(frozen=True)
class Decoded:
    """What one answer took.

    Attributes:
        tokens: new token ids, the end-of-sequence token included. The first comes from the prefill, each step adds
            its accepted drafts and one bonus token: ``len(tokens) == 1 + sum(accepted) + len(accepted)``.
        distances: of each token how far the rule is from the target there, see ``Accepted``; None for a lossless rule.
        stop: ``eos``, ``limit`` (of new tokens) or ``context`` (of the target).
        accepted: drafted tokens kept at each step, after cutting at the end of the answer.
        drafted_depth: how deep the tree of each step was.
        kept_node: the node at which each step's accepted path ends, after the same cutting; 0 is the root.
        prefill_s: seconds up to the first token.
        draft_prefill_s: seconds of the head's own reading of the prompt, see ``ReadingHead``; 0 where it has none, or
            the answer ends with its first token.
        decode_s: seconds of what follows.
        parts_s: seconds of the parts of ``decode_s``: ``draft``; ``verify``, the target's passes; ``accept``, which
            paths to keep; ``commit``, their rows in the cache; ``rest``, the answer's own bookkeeping.
        steps: trees and paths, only where asked for.
    """

    tokens: list[int]
    stop: Stop
    accepted: list[int]
    drafted_depth: list[int]
    kept_node: list[int]
    prefill_s: float
    draft_prefill_s: float
    decode_s: float
    parts_s: dict[str, float]
    steps: list[Step]
    distances: list[float] | None = None

    @property
    def draft_s(self) -> float:
        """Seconds of drafting."""
        return self.parts_s.get("draft", 0.0)

    @property
    def verify_s(self) -> float:
        """Seconds of the target's passes."""
        return self.parts_s.get("verify", 0.0)


def capacity_for(prompt_tokens: int, max_new_tokens: int, tree_nodes: int, max_positions: int) -> int:
    """Rows that a cache needs for an answer: committed tokens and one tree."""
    return min(prompt_tokens + max_new_tokens, max_positions) + tree_nodes


def fits(target: Target, prompt_tokens: int, max_new_tokens: int, tree_nodes: int) -> bool:
    """Whether an answer fits into the target's context and, if the model computes differently in longer sequences,
    stays short of that.
    """
    needed = capacity_for(prompt_tokens, max_new_tokens, tree_nodes, target.max_positions)
    return prompt_tokens < target.max_positions and (target.limit is None or needed <= target.limit.rows)


def cut(committed: Sequence[int], room: int, stops: frozenset[int]) -> tuple[int, Stop | None]:
    """How many of a step's tokens belong to an answer that has room for ``room`` more, and whether they end it."""
    keep = next((i + 1 for i, token in enumerate(committed) if token in stops), len(committed))
    stop: Stop | None = "eos" if committed[keep - 1] in stops else None
    if keep >= room and not (stop and keep == room):
        return room, "limit"
    return keep, stop


@without_collection()
@torch.inference_mode()
def decode(
    target: Target,
    head: DraftHead,
    template: Template,
    prompt: Sequence[int],
    max_new_tokens: int,
    stop_ids: Sequence[int],
    cache: TreeCache | None = None,
    trace: bool = False,
    rule: Rule = GREEDY,
) -> Decoded:
    """Answer a prompt; with a lossless rule as the target alone would, whatever the head proposes.

    The answer ends at a token of ``stop_ids``, where one of the target's ``stop_texts`` is complete, or at a limit.

    A head with an attribute ``pick`` is set to take its candidates as the rule wants them.

    Args:
        cache: one to reuse, with room for ``capacity_for(...)`` rows; a new one if None.
        trace: keep every tree and path.
        rule: which drafted tokens stay, and how the target's own are chosen; greedily if not given.

    Raises:
        KoalaBenchError: the prompt is empty, has a token that the target does not know, or leaves no room in the
            target's context.
    """
    if not prompt:
        raise KoalaBenchError("The prompt is empty.", "Give at least one token.")
    refuse_unknown_ids(target.name, target.tokenizer, prompt, target.config.vocab_size, "The prompt")
    if len(prompt) >= target.max_positions:
        raise KoalaBenchError(
            f"The prompt has {len(prompt)} tokens, {target.name} has a context of {target.max_positions}.",
            "Use shorter prompts or a target with a longer context.",
        )
    if max_new_tokens < 1:
        raise KoalaBenchError(f"--max-new-tokens is {max_new_tokens}.", "It must be at least 1.")
    capacity = capacity_for(len(prompt), max_new_tokens, template.nodes, target.max_positions)
    target.check_rows(capacity)
    if cache is None or cache.capacity < capacity:
        cache = target.new_cache(capacity)
    stops = frozenset(stop_ids)
    ids = torch.tensor(prompt, device=target.device)

    synchronise(target.device)
    started = time.perf_counter()
    if hasattr(head, "pick"):
        head.pick = rule.pick
    head.begin(template, capacity)
    logits, hidden = target.prefill(ids, cache, head.features)
    # A prompt is a tree of its last token alone.
    _, (bonus,), distances = rule.accept(DraftTree(ids[-1:], ROOT_ONLY), logits[None])
    if rule is GREEDY:
        rule = Greedy(target.greedy_read)
    said = end_of_text(target.tokenizer, [bonus], 1, target.stop_texts) is not None
    synchronise(target.device)
    first_token = time.perf_counter()

    tokens = [bonus]
    accepted: list[int] = []
    drafted_depth: list[int] = []
    kept_node: list[int] = []
    steps: list[Step] = []
    new = Committed(torch.cat([ids[1:], ids.new_tensor([bonus])]), hidden, 0, ids[:1])
    stop: Stop | None = "eos" if said or bonus in stops else "limit" if max_new_tokens == 1 else None
    if not stop:
        new = read_prompt(head, new)
        synchronise(target.device)
    ready = time.perf_counter()
    observing = head if isinstance(head, ObservingHead) else None
    watch = Stopwatch(target.device)
    while not stop:
        room = target.max_positions - cache.past  # positions that are still free, the root's included
        if room < 1:
            stop = "context"
            break
        tree = head.draft(new)
        if tree.shape.depth >= room:
            tree = DraftTree(tree.tokens[:1], ROOT_ONLY)
        watch.mark("draft")
        logits, hidden = target.verify(tree, cache, head.features)
        watch.mark("verify")
        path, committed, apart = rule.accept(tree, logits)
        watch.mark("accept", waited=True)
        past = cache.past
        cache.commit(path)
        watch.mark("commit", waited=True)
        if trace:
            steps.append(Step(tree.tokens.tolist(), path))

        keep, stop = cut(committed, max_new_tokens - len(tokens), stops)
        tokens += committed[:keep]
        if (ended := end_of_text(target.tokenizer, tokens, keep, target.stop_texts)) is not None:
            keep, stop = keep - (len(tokens) - ended), "eos"
            del tokens[ended:]
        if distances is not None and apart is not None:
            distances += apart[:keep]
        accepted.append(keep - 1)
        drafted_depth.append(tree.shape.depth)
        kept_node.append(path[keep - 1])
        rows = slice(0, len(path)) if path[-1] == len(path) - 1 else list(path)
        new = Committed(ids.new_tensor(committed), hidden[rows], past)
        watch.mark("rest")
        if observing is not None and not stop:  # until the next mark, which is that of a draft
            observing.observe(tree, logits)
    seconds = watch.seconds()
    return Decoded(
        tokens, stop, accepted, drafted_depth, kept_node, first_token - started, ready - first_token,
        time.perf_counter() - ready, seconds, steps, distances,
    )  # fmt: skip
