"""Checks of a head as a module: members, trained parameters, saving, determinism, and that the target is unchanged."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from koala_bench.contract.bench import (
    Bench,
    BrokenError,
    answer,
    batch_of,
    listed,
    needs_loss,
    optimiser_of,
    random_ids,
    templates_of,
    train,
)
from koala_bench.heads import DraftHead, HeadLoss
from koala_bench.training.checkpoints import load_head, save_head
from koala_bench.tree import load_template


def form(bench: Bench) -> str:
    """The members that the harness needs, and at least one trained parameter."""
    head = bench.head(bench.target())
    module: nn.Module = head
    trained = [p.numel() for p in module.parameters() if p.requires_grad]
    if not isinstance(head, DraftHead):
        missing = [member for member in ("features", "max_depth", "begin", "draft") if not hasattr(head, member)]
        raise BrokenError(f"it has no {listed(missing)}: see DraftHead in koala_bench/heads.py")
    if (
        not isinstance(head.features, tuple)
        or head.features[-1:] != (-1,)
        or not all(type(index) is int for index in head.features)
    ):
        raise BrokenError(
            f"features is {head.features!r}: it is a tuple of indices of states that ends with -1, the last state"
        )
    if type(head.max_depth) is not int or head.max_depth < 1:
        raise BrokenError(
            f"max_depth is {head.max_depth!r}: it is a whole number, how many tokens ahead the head can draft"
        )
    if hasattr(head, "loss") and not trained:
        raise BrokenError(
            "it has a loss and no parameter to train: layers belong into attributes or an nn.ModuleList, not into a"
            " plain list"
        )
    return f"{sum(trained):,} trained parameters here, drafts {head.max_depth} deep"


def frozen_parts(bench: Bench) -> str:
    """The head neither trains nor saves parameters of the target."""
    target = bench.target()
    head = bench.head(target)
    theirs = {tensor.untyped_storage().data_ptr(): name for name, tensor in target.model.named_parameters()}
    shared = [
        f"{name} is the target's {theirs[place]}"
        for name, tensor in (*head.named_parameters(), *head.named_buffers())
        if tensor.numel() and (place := tensor.untyped_storage().data_ptr()) in theirs
    ]
    if shared:
        raise BrokenError(
            f"{listed(shared)}: call spec.embed and spec.output, or start from a clone of spec.output_weight"
        )
    return "embedding and output layer of the target are not part of the head"


def gradients(bench: Bench) -> str:
    """Every trained parameter gets a gradient; within three steps, since some weights start at zero."""
    target = bench.target()
    head = bench.head(target).train()
    needs_loss(head)
    batch = batch_of(target, random_ids(2, 24), head.features)
    optimiser = optimiser_of(head)
    waiting = {name for name, p in head.named_parameters() if p.requires_grad}
    count = len(waiting)
    for step in range(3):
        optimiser.zero_grad(set_to_none=True)
        found = head.loss(replace(batch, seed=step))
        scalars = [found.total, found.rest] if isinstance(found, HeadLoss) else [torch.empty(0)]
        if any(each is not None and (each.numel() != 1 or not torch.isfinite(each)) for each in scalars):
            raise BrokenError("loss() must return a HeadLoss with a finite scalar total, and such a rest if it has one")
        found.total.backward()
        waiting -= {name for name, p in head.named_parameters() if p.grad is not None and bool(p.grad.abs().sum() > 0)}
        optimiser.step()
    if waiting:
        raise BrokenError(
            f"no gradient reaches {listed(sorted(waiting))}: unused in loss(), or behind a detach() or an argmax;"
            " freeze what is not trained"
        )
    return f"all {count} trained tensors"


def target_unchanged(bench: Bench) -> str:
    """Training and drafting change no weight of the target; also if output layer and embedding are tied."""
    for kind in ("float32", "tied"):
        target = bench.target(kind)
        before = {name: tensor.clone() for name, tensor in target.model.state_dict().items()}
        head = bench.trained(target).eval()
        answer(target, head, load_template("chain-1"), 8)
        changed = [name for name, tensor in target.model.state_dict().items() if not torch.equal(tensor, before[name])]
        learning = [name for name, p in target.model.named_parameters() if p.requires_grad or p.grad is not None]
        if changed or learning:
            raise BrokenError(
                f"{listed(changed or learning)} of the target {'changed' if changed else 'is trained'}: the target is"
                " frozen, work on clones"
            )
    return "bit for bit, with tied and untied output layers"


def saving(bench: Bench) -> str:
    """A head that was saved and loaded is the same: weights bit for bit, drafts, and loss."""
    target, head = bench.ready()
    save_head(bench.folder / "saved", head, bench.preset, target, {})
    torch.manual_seed(12345)  # what is not saved is drawn anew
    loaded, _, _ = load_head(bench.folder / "saved", target)
    before, after = head.state_dict(), loaded.state_dict()
    different = [
        name
        for name in before.keys() | after.keys()
        if name not in before or name not in after or not torch.equal(before[name], after[name])
    ]
    if different:
        raise BrokenError(f"{listed(sorted(different))} differs after saving and loading")
    template = templates_of(head.max_depth)[-1]
    batch = batch_of(target, random_ids(2, 24), head.features)
    drafts, losses = [], []
    for each in (head, loaded):
        torch.manual_seed(0)  # a head that draws at random is the concern of another check
        drafts.append(answer(target, each, template, 24).steps)
        losses.append(float(each.loss(batch).total.detach()) if hasattr(head, "loss") else 0.0)
    if drafts[0] != drafts[1] or losses[0] != losses[1]:
        raise BrokenError(
            "a loaded head drafts or scores otherwise: something it depends on is neither parameter nor buffer, so"
            " state_dict() leaves it out"
        )
    return f"{len(before)} tensors come back bit for bit"


def determinism(bench: Bench) -> str:
    """The same seed gives the same weights, training and drafts, whatever the global generator does."""
    losses, weights, drafts = [], [], []
    for seed in (1, 2):
        target = bench.target()  # restored, in case the first head changed it
        torch.manual_seed(seed)
        head = bench.head(target)
        if hasattr(head, "loss"):
            losses.append(train(head, batch_of(target, random_ids(2, 24), head.features), 3))
        weights.append({name: tensor.clone() for name, tensor in head.state_dict().items()})
        drafts.append(answer(target, head.eval(), templates_of(head.max_depth)[-1], 24).steps)
    same = all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())
    if losses[:1] != losses[1:] or not same:
        raise BrokenError(
            "two trainings from one seed differ: draw noise from a generator seeded with batch.seed; dropout uses the"
            " global one"
        )
    if drafts[0] != drafts[1]:
        raise BrokenError("the same head drafts differently for the same prompt: draft() must not draw at random")
    return "weights, training and drafts repeat bit for bit"


def half_precision(bench: Bench) -> str:
    """Heads are trained in float32 and decode in the target's dtype."""
    target = bench.target("bfloat16")
    head = bench.trained(target)
    if not all(torch.isfinite(p).all() for p in head.parameters()):
        raise BrokenError(
            "the weights are not finite after three steps: compute the loss in float32, batch.hidden[...].float()"
        )
    head.to(target.dtype).eval()
    for template in templates_of(head.max_depth)[::3]:
        answer(target, head, template, 12)
    return "trains on and decodes with a bfloat16 target"
