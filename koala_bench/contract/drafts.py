"""Checks of a head's drafts and loss: trees, state, losslessness, and that both use the same positions."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import torch

from koala_bench.contract.bench import (
    CIRCLE,
    DEPTH,
    PROMPT,
    Bench,
    BrokenError,
    NotApplicableError,
    answer,
    apart,
    batch_of,
    circle_ids,
    drafts_along,
    needs_loss,
    optimiser_of,
    random_ids,
    templates_of,
    train,
)
from koala_bench.decoding.loop import VANILLA_TREE, Decoded, Vanilla, capacity_for, decode
from koala_bench.engine.target import Target
from koala_bench.heads import Committed, FeatureBatch, ReadingHead
from koala_bench.records.definitions import acceptance_rate_by_depth
from koala_bench.tree import ROOT_ONLY, DraftTree, Template, load_template

_LEARNT = 0.9  # of the drafts of an overfitted text that must be right, at each depth
_LOOKS = (25, 50, 100, 200)  # training steps on that text before it is drafted


def _problem(tree: Any, root: int, template: Template, vocabulary: int, dynamic: bool) -> str | None:
    if not isinstance(tree, DraftTree):
        return f"draft() returned {type(tree).__name__}, not a DraftTree"
    if tree.tokens.dtype != torch.int64:
        return f"the tokens are {tree.tokens.dtype}, not int64"
    tokens = tree.tokens.tolist()
    if tokens[0] != root:
        return f"the root is {tokens[0]}, the last committed token is {root}: it is new.tokens[-1]"
    if not all(0 <= token < vocabulary for token in tokens):
        outside = next(token for token in tokens if not 0 <= token < vocabulary)
        return f"token {outside} is not one of the vocabulary's {vocabulary}"
    if tree.shape == ROOT_ONLY:
        return None  # nothing to propose this time
    size = f"{tree.shape.nodes} nodes, {tree.shape.depth} deep"
    if dynamic and (tree.shape.nodes > template.nodes or tree.shape.depth > template.depth):
        return f"{size}: more than the template's {template.nodes} and {template.depth}"
    if not dynamic and tree.shape != template.shape:
        return f"{size}, parents {tree.shape.parents}; the template's are {template.shape.parents}"
    for parent, children in enumerate(tree.shape.children):
        if len({tokens[child] for child in children}) < len(children):
            return f"two children of node {parent} are the same token: the candidate of a node is the one of its rank"
    return None


def trees(bench: Bench) -> str:
    """Trees of several shapes: the template's, with the committed token as root and different tokens as siblings."""
    target, head = bench.ready()
    templates = templates_of(head.max_depth)
    ids = random_ids(1, 40)[0].tolist()
    for template in templates:
        drafted = 0
        for root, tree in drafts_along(head, target, template, ids, 16):
            dynamic = getattr(head, "dynamic", False)
            if problem := _problem(tree, ids[root], template, target.config.vocab_size, dynamic):
                raise BrokenError(f"with the template {template.name}: {problem}")
            drafted += tree.shape.nodes - 1
        if not drafted and hasattr(head, "loss"):
            raise BrokenError(f"with the template {template.name} it never drafts anything")
    return f"templates {', '.join(template.name for template in templates)}"


def forgetting(bench: Bench) -> str:
    """After ``begin`` the same sequence gets the same drafts, whatever was decoded in between."""
    target, head = bench.ready()
    template, other, *_ = reversed(templates_of(head.max_depth))
    runs = []
    for between in (None, template, other):
        if between is not None:
            answer(target, head, between, 30, random_ids(1, 20)[0].tolist())
        torch.manual_seed(0)  # a head that draws at random is the concern of another check
        runs.append(answer(target, head, template, 24).steps)
    if (step := apart(*runs)) is not None:
        raise BrokenError(
            f"drafts of a prompt depend on the sequence before it, from step {step + 1} on: begin() must reset all"
            " that draft() keeps"
        )
    return "drafts after begin() do not depend on the sequence before"


def lent_states(bench: Bench) -> str:
    """Drafts do not depend on ``hidden`` after the call: a CUDA graph's next pass overwrites it."""
    target, head = bench.ready()
    template = templates_of(head.max_depth)[0]
    ids = random_ids(1, 40)[0].tolist()
    drafts = []
    for overwritten in (False, True):
        torch.manual_seed(0)  # a head that draws at random is the concern of another check
        drafts.append([tree.tokens.tolist() for _, tree in drafts_along(head, target, template, ids, 16, overwritten)])
    if (step := apart(*drafts)) is not None:
        raise BrokenError(
            f"draft {step + 1} reads states of an earlier call, from a buffer that the target overwrites:"
            " clone what is kept of new.hidden"
        )
    return "states are not read after the call that they were given to"


def prompts(bench: Bench) -> str:
    """``prefill`` leads to the same drafts as ``draft`` with the whole prompt; and a head that reads more of a prompt
    than its last pair should have ``prefill``."""
    target, head = bench.ready()
    template = templates_of(head.max_depth)[-1]
    ids = 2 * random_ids(1, 20)[0].tolist()  # lookups find nothing in a text without repetition
    if isinstance(head, ReadingHead):
        runs = [
            [tree.tokens.tolist() for _, tree in drafts_along(head, target, template, ids, 30, reading=reading)]
            for reading in (True, False)
        ]
        if (step := apart(*runs)) is not None:
            raise BrokenError(
                f"drafts after prefill() differ from those of draft() with the whole prompt, from step {step + 1} on:"
                " prefill() must keep what draft() would, for all pairs of the prompt"
            )
        return "drafts after prefill() are those of draft() alone; reading the prompt is timed as a prefill"
    if _reads_a_prompt(head, target, template, ids):
        raise NotApplicableError(
            "it has no prefill() and its first draft depends on the whole prompt, so reading that counts as decoding:"
            " add prefill(new) to time it apart"
        )
    return "it has no prefill() and needs none: the first draft depends on the end of a prompt alone"


@torch.inference_mode()
def _reads_a_prompt(head: Any, target: Target, template: Template, ids: list[int]) -> bool:
    """Whether the first draft changes with the pairs of the prompt before the last."""
    tokens, hidden = torch.tensor(ids[1:]), target.states(torch.tensor([ids]), head.features)[0, :-1].clone()
    drafts = []
    for order in (torch.arange(len(tokens)), torch.tensor([*range(len(tokens) - 2, -1, -1), len(tokens) - 1])):
        torch.manual_seed(0)  # a head that draws at random is the concern of another check
        head.begin(template, capacity_for(len(ids), 1, template.nodes, target.max_positions))
        drafts.append(head.draft(Committed(tokens[order], hidden[order], 0)).tokens.tolist())
    return bool(drafts[0] != drafts[1])


def losslessness(bench: Bench) -> str:
    """In float64 the answer is the target's own, also at the end of its context."""
    target = bench.target("float64")
    head = bench.head(target)
    head.load_state_dict(bench.trained(bench.target()).state_dict())
    head.to(torch.float64).eval()
    prompts = [(PROMPT, 24), (random_ids(1, target.max_positions - 20)[0].tolist(), 40)]
    for prompt, tokens in prompts:
        expected = decode(target, Vanilla(), VANILLA_TREE, prompt, tokens, ()).tokens
        for template in templates_of(head.max_depth)[::3]:
            found = answer(target, head, template, tokens, prompt).tokens
            if (place := apart(found, expected)) is not None:
                raise BrokenError(
                    f"with the template {template.name} the answer leaves vanilla's at token {place}: the root is"
                    " new.tokens[-1], and inputs stay as they are"
                )
    return "answers equal vanilla's in float64"


def positions(bench: Bench) -> str:
    """A head that overfits a text drafts it correctly: loss() and draft() agree on positions."""
    target = bench.target("circle")
    head = bench.head(target)
    needs_loss(head)
    depth = min(head.max_depth, DEPTH)
    batch = batch_of(target, circle_ids(2, 64), head.features)
    optimiser = optimiser_of(head)
    prompt = circle_ids(1, 9)[0].tolist()
    template = load_template("x".join("22"[:depth]))
    levels = range(1, template.depth + 1)
    best = (0, *(1 + template.paths.index((0,) * level) for level in levels))  # the nodes of rank 0
    losses: list[float] = []
    for done, steps in zip((0, *_LOOKS), _LOOKS, strict=False):
        losses.append(train(head, batch, steps - done, optimiser, done))
        head.eval()
        chain = answer(target, head, load_template(f"chain-{depth}"), 50, prompt)
        # The last step of an answer is cut at its limit.
        rates = acceptance_rate_by_depth(chain.accepted[:-1], chain.drafted_depth[:-1])
        missing = None if len(rates) == depth else len(rates) + 1
        wrong = next((rate.depth for rate in rates if not rate.rate >= _LEARNT), missing)
        paths = Counter(step.path for step in answer(target, head, template, 50, prompt).steps[:-1])
        if wrong is None and paths[best] >= _LEARNT * paths.total():
            return f"{depth} tokens ahead are right after {steps} steps on a text to learn by heart"
    if wrong is not None:
        raise BrokenError(_misplaced(chain, wrong, losses))
    usual = paths.most_common(1)[0][0]
    raise BrokenError(
        f"chains are right, but in the tree {template.name} the accepted nodes are mostly {usual}, not {best}: the best"
        " guess belongs at rank 0"
    )


def _misplaced(chain: Decoded, depth: int, losses: list[float]) -> str:
    """The position that the tokens drafted at a depth fit; in the circle a token identifies its position."""
    slips: Counter[int | None] = Counter()
    for step, accepted in zip(chain.steps[:-1], chain.accepted, strict=False):
        if accepted >= depth - 1 and len(step.tree_tokens) > depth:
            root, token = step.tree_tokens[0], step.tree_tokens[depth]
            late = (CIRCLE.index(token) - CIRCLE.index(root) - depth) % len(CIRCLE) if token in CIRCLE else None
            slips[late - len(CIRCLE) if late is not None and late > len(CIRCLE) // 2 else late] += 1
    learnt = f"the loss on a text to learn by heart ends at {losses[-1]:.3g} (first look: {losses[0]:.3g})"
    if not slips:
        return f"nothing is drafted at depth {depth}; {learnt}"
    total = slips.total()
    slip, count = slips.most_common(1)[0]
    if slip and count > total / 2:
        places = f"{abs(slip)} place{'s' * (abs(slip) > 1)} {'later' if slip > 0 else 'earlier'}"
        return (
            f"{count} of {total} tokens drafted at depth {depth} belong {places}: compare the states and labels"
            " of loss() with what draft() reads (hidden[i] predicted tokens[i]);"
            f" {learnt}"
        )
    return (
        f"at depth {depth} only {slips[0]} of {total} drafts are right, and the others are no one place off: does"
        f" draft() read what loss() trains on? {learnt}"
    )


def predictions(bench: Bench) -> str:
    """Predictions in the loss are at the reported positions, carry gradients, and equal those of ``draft``."""
    target, head = bench.ready()
    needs_loss(head)
    ids = random_ids(2, 24, seed=1)
    tokens, vocabulary = ids.shape[1], target.config.vocab_size
    predictions = head.loss(batch_of(target, ids, head.features)).predictions
    if not predictions:
        raise NotApplicableError("the loss reports no predictions, so no objective can be added to the head")
    for each in predictions:
        count = len(each.rows)
        if each.feature.shape != (count, target.spec().hidden_size) or each.logits.shape != (count, vocabulary):
            raise BrokenError(
                f"at depth {each.depth} {count} rows come with features {tuple(each.feature.shape)} and logits"
                f" {tuple(each.logits.shape)}"
            )
        if not (each.feature.requires_grad and each.logits.requires_grad):
            raise BrokenError(
                f"at depth {each.depth} the feature or the logits carry no gradient, so an objective could not train"
                " the head"
            )
        if not ((each.rows >= 0) & (each.rows < ids.numel()) & (each.rows % tokens + each.depth < tokens)).all():
            raise BrokenError(
                f"rows of depth {each.depth} reach beyond their dialogue: rows + depth must still lie in it"
            )
    first = [each for each in predictions if each.depth == 1]
    said = {row: logits for each in first for row, logits in zip(each.rows.tolist(), each.logits.detach(), strict=True)}
    compared, different = 0, 0
    for row, text in enumerate(ids.tolist()):
        for root, tree in drafts_along(head, target, load_template("chain-1"), text, 10):
            logits = said.get(row * tokens + root - 1)
            if logits is not None and tree.shape.nodes > 1:
                compared += 1
                different += bool(logits.max() - logits[tree.tokens[1]] > 1e-4 * (logits.max() - logits.min()))
    if not compared:
        raise BrokenError(
            "no prediction of depth 1 stands where draft() would be asked: rows are the places of the states drafted"
            " from"
        )
    if different:
        raise BrokenError(
            f"draft() says another token than the loss at {different} of {compared} places: they read other states or"
            " tokens, or rows are shifted"
        )
    return f"depths {', '.join(str(each.depth) for each in predictions)}; draft() says the same at {compared} places"


def _rows(target: Target, features: tuple[int, ...], rows: list[torch.Tensor], width: int) -> FeatureBatch:
    """Dialogues padded to a width; ids and states of the padding are arbitrary and differ from width to width."""
    ids = random_ids(len(rows), width, seed=width)
    hidden = torch.randn(
        len(rows), width, len(features), target.spec().hidden_size, generator=torch.Generator().manual_seed(width)
    )
    lengths = torch.tensor([len(row) for row in rows])
    for index, row in enumerate(rows):
        ids[index, : len(row)] = row
        hidden[index, : len(row)] = target.states(row[None], features)[0]
    places = torch.arange(width)[None]
    return FeatureBatch(ids, (places >= 2) & (places < lengths[:, None]), hidden, 0, target.output, lengths)


def batches(bench: Bench) -> str:
    """The loss ignores padding and other rows; and a batch may have no prediction at some depth."""
    target, head = bench.ready()
    needs_loss(head)
    long, short = random_ids(1, 18)[0], random_ids(1, 11, seed=1)[0]
    plain, wide, swapped = (
        float(head.loss(_rows(target, head.features, rows, width)).total.detach())
        for rows, width in (([long, short], 18), ([long, short], 25), ([short, long], 18))
    )
    for loss, what in ((wide, "with more padding"), (swapped, "with its dialogues in another order")):
        if abs(loss - plain) > 1e-4 * abs(plain) + 1e-6:
            raise BrokenError(
                f"the loss of a batch is {plain:.6g}, {what} {loss:.6g}: a label or state is taken from behind a"
                " dialogue's end (batch.lengths)"
            )
    batch = _rows(target, head.features, [long, short], 18)
    for place in (2, 17):
        only = torch.zeros_like(batch.supervised)
        only[0, place] = True
        total = head.train().loss(replace(batch, supervised=only)).total
        if not torch.isfinite(total):
            raise BrokenError(
                f"the loss is {float(total.detach())} where only token {place} of {batch.ids.shape[1]} is supervised:"
                " divide by max(rows, 1)"
            )
        total.backward()
    return "neither padding nor order changes the loss, and answers of one token do not break it"
