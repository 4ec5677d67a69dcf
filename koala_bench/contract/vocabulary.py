"""Check of draft vocabularies: a head that scores through the spec's output layer can be cut to fewer tokens, and be
trained on them if its loss supports it."""

from __future__ import annotations

import math
from typing import Any

import torch

from koala_bench.contract.bench import (
    PROMPT,
    Bench,
    BrokenError,
    NotApplicableError,
    answer,
    batch_of,
    drafts_along,
    random_ids,
    templates_of,
    train,
)
from koala_bench.decoding.loop import VANILLA_TREE, Vanilla, decode
from koala_bench.training.checkpoints import load_head, save_head, save_token_order
from koala_bench.training.loop import build_head
from koala_bench.tree import load_template

_DRAFTED = 60


def draft_vocabulary(bench: Bench) -> str:
    """A trained head cut to some tokens drafts only those and keeps the answer; one trained on them has a finite
    loss."""
    target = bench.target("float64")
    whole = bench.trained(bench.target()).eval()
    if not hasattr(whole, "loss"):
        raise NotApplicableError("it is not trained, and what it drafts is not scored by the target's output layer")
    order = torch.randperm(target.config.vocab_size, generator=torch.Generator().manual_seed(0))
    folder = bench.folder / "cut"
    save_head(folder, whole, bench.preset, target, {})
    save_token_order(folder, order)
    head = load_head(folder, target, _DRAFTED)[0]
    allowed = set(order[:_DRAFTED].tolist())
    template = next((each for each in templates_of(head.max_depth) if not each.dynamic), load_template("chain-1"))
    for _, tree in drafts_along(head, target, template, random_ids(1, 24)[0].tolist(), 12):
        if outside := [token for token in tree.tokens[1:].tolist() if token not in allowed]:
            raise BrokenError(
                f"token {outside[0]} is not of its draft vocabulary: score through spec.output, "
                "or hand the scores to spec.spread"
            )
    expected = decode(target, Vanilla(), VANILLA_TREE, PROMPT, 24, ()).tokens
    if answer(target, head, template, 24).tokens != expected:
        raise BrokenError("with a draft vocabulary the answer changes")
    target = bench.target()
    fresh: Any = build_head(target, bench.preset.model_copy(update={"draft_vocabulary": _DRAFTED}), 0, order)
    batch = batch_of(target, random_ids(2, 24), fresh.features)
    if not math.isfinite(float(fresh.loss(batch).total.detach())):
        return (
            "can be cut once trained; to be trained on the cut its loss needs spec.score, spec.labels,"
            " batch.soft_labels"
        )
    train(fresh, batch, 2)
    if not math.isfinite(float(fresh.loss(batch).total.detach())):
        raise BrokenError("trained on a draft vocabulary, its loss becomes infinite")
    return f"of {_DRAFTED} tokens, cut and trained"
