"""Parity with Medusa: outputs, decoding, greedy decisions and losses."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import torch

from koala_bench.decoding.acceptance import TypicalAcceptance, greedy
from koala_bench.engine.target import Target
from koala_bench.heads import FeatureBatch
from koala_bench.interop.checkpoints import Fields, Imported, make_head
from koala_bench.interop.medusa import blocks_of
from koala_bench.interop.repeats import tied_heads
from koala_bench.parity.decoding import decoded
from koala_bench.parity.shared import (
    LOSSES_RELATIVE,
    Check,
    Drafter,
    Recordings,
    by_prompt,
    compare_norms,
    gradients_of,
    judge,
    near,
    predictions,
    prompt_numbers,
    skipped,
    states_of,
)
from koala_bench.parity.trees import compare_buffers, leaf_rows, row_of, template_of
from koala_bench.tree import DraftTree, TreeShape, TreeTemplate


def medusa_tiny(recordings: Recordings, part: str) -> list[Check]:
    """Hidden states and logits of the target, and logits of every recorded kind of heads."""
    if absent := recordings.absent(f"{part}/target", f"{part}/expected.safetensors"):
        return skipped(part, absent)
    target, expected = recordings.target(f"{part}/target"), recordings.tensors(f"{part}/expected.safetensors")
    states = {i: states_of(target, expected[f"prompt{i}.input_ids"]) for i in prompt_numbers(expected)}
    checks = [
        by_prompt(part, "hidden_states", states, expected),
        by_prompt(part, "base_logits", {i: target.output(each) for i, each in states.items()}, expected),
    ]
    recorded = {found[1] for name in expected if (found := re.fullmatch(r"prompt\d+\.(.+)\.medusa_logits", name))}
    stored = {path.name.removeprefix("heads_") for path in (recordings.folder / part).glob("heads_*") if path.is_dir()}
    for kind in sorted(recorded | stored):
        name, folder = f"{part}/medusa_logits/{kind}", f"{part}/heads_{kind}"
        if absent := recordings.absent(folder):
            checks += skipped(name, absent)
            continue
        head = make_head(recordings.medusa(folder, target), target.spec())
        pairs = []
        for i, hidden in states.items():
            if (theirs := expected.get(f"prompt{i}.{kind}.medusa_logits")) is not None:
                ours = predictions(head, target, expected[f"prompt{i}.input_ids"], hidden)
                pairs.append((f"prompt {i}", torch.stack([logits for _, logits in ours]), theirs))
        checks.append(near(name, pairs))
    return checks


def medusa_decode(recordings: Recordings, part: str) -> list[Check]:
    """Buffers of the tree, generation and greedy decisions."""
    if absent := recordings.absent(f"{part}/buffers.json"):
        return skipped(part, absent)
    buffers = recordings.json(f"{part}/buffers.json")
    template = template_of(buffers, "medusa_choices")
    names = {"mask": "medusa_attn_mask", "depths": "medusa_position_ids"}
    checks = compare_buffers(part, buffers, template, names, eagle_like=False)
    rows = leaf_rows(template.shape, sort=False)
    if absent := recordings.absent(f"{part}/target", f"{part}/heads", f"{part}/decode.json"):
        checks += skipped(f"{part}/decode", absent)
    else:
        target = recordings.target(f"{part}/target")
        head = make_head(recordings.medusa(f"{part}/heads", target), target.spec())
        checks += decoded(part, Drafter(target, head, template, rows), recordings.json(f"{part}/decode.json"))
    if absent := recordings.absent(f"{part}/typical.json", f"{part}/typical.safetensors"):
        return [*checks, *skipped(f"{part}/typical", absent)]
    typical, logits = recordings.json(f"{part}/typical.json"), recordings.tensors(f"{part}/typical.safetensors")
    return [*checks, *_posterior(part, template, rows, typical, logits)]


def _posterior(
    part: str, template: TreeTemplate, rows: Sequence[Sequence[int]], recorded: Fields, tensors: Fields
) -> list[Check]:
    """Compare greedy and typical decisions on recorded logits.

    Where upstream accepted padding, ours must not: the greedy path then equals the recorded one up to the padding, and
    the typical path is not compared, since padding also influenced its choice.
    """
    rule = TypicalAcceptance(recorded["temperature"], recorded["posterior_threshold"], recorded["posterior_alpha"])
    plain: list[str] = []
    padded: list[str] = []
    typical: list[str] = []
    left_out: list[int] = []
    for entry in recorded["cases"]:
        case, wanted, where = entry["case"], entry["greedy"], f"case {entry['case']}"
        tokens, logits = tensors[f"case{case}.node_tokens"], tensors[f"case{case}.node_logits"]
        tree = DraftTree(tokens, template.shape)
        path = list(greedy(tree, logits).path)
        fault = _walk_fault(path, tokens.tolist(), logits.argmax(-1).tolist(), template.shape)
        if entry.get("padding_accepted", False):
            real = [node for node in wanted["path_nodes"] if node >= 0]
            fault = fault or ("" if path == real else f"path {path}, recorded {real} before the padding")
            padded += [f"{where}: {fault}"] if fault else []
            left_out.append(case)
            continue
        plain += [*_unlike(where, path, tokens, rows, wanted), *([f"{where}: {fault}"] if fault else [])]
        typical += _unlike(where, rule.accept(tree, logits).path, tokens, rows, entry["typical"])
    equal = f"{len(recorded['cases']) - len(left_out)} decisions are equal"
    checks = [judge(f"{part}/typical", typical, equal), judge(f"{part}/typical/greedy", plain, equal)]
    if left_out:
        cases = " and ".join(f"case {case}" for case in left_out)
        detail = f"not compared: {cases}, where upstream accepts padding as token 0"
        checks.append(Check(f"{part}/typical/padding_accepted", "skip", detail))
        detail = f"in {len(left_out)} cases upstream accepts padding; our paths end in the leaf before it"
        checks.append(judge(f"{part}/typical/greedy_without_padding", padded, detail))
    return checks


def _unlike(
    where: str, path: Sequence[int], tokens: torch.Tensor, rows: Sequence[Sequence[int]], wanted: Fields
) -> list[str]:
    """How a decision differs from the recorded one."""
    ours = {
        "path_nodes": list(path),
        "accept_length": len(path) - 1,
        "accepted_tokens": [int(tokens[node]) for node in path],
        "best_candidate": row_of(rows, path),
    }
    return [
        f"{where}: {name} {value}, recorded {wanted[name]}" for name, value in ours.items() if wanted[name] != value
    ]


def _walk_fault(path: Sequence[int], tokens: Sequence[int], best: Sequence[int], shape: TreeShape) -> str:
    """The fault of a greedily accepted path: a token that is not the target's, or one left out."""
    if path[0] != 0 or any(shape.parents[node] != above for above, node in pairwise(path)):
        return f"{list(path)} is no path from the root"
    if any(tokens[node] != best[above] for above, node in pairwise(path)):
        return f"path {list(path)} holds a token that is not the target's"
    if any(tokens[child] == best[path[-1]] for child in shape.children[path[-1]]):
        return f"path {list(path)} could go on"
    return ""


def medusa_losses(recordings: Recordings, name: str, target: Target, paths: Sequence[str]) -> list[Check]:
    """Losses, accuracies and gradient norms of one batch, with and without projections of the heads' own."""
    batch, recorded = recordings.tensors(paths[2]), recordings.json(paths[3])
    kinds = [kind for kind in recorded if kind == "per_head_linear" or kind.startswith("shared_lm_head")]
    absent = [] if "per_head_linear" in kinds else [Check(name, "skip", f"{paths[3]} has no per_head_linear")]
    ids, real = batch["input_ids"], batch["attention_mask"] != 0
    supervised = batch["labels"] != int(recorded.get("ignore_index", -100))
    if (real[:, 1:] & ~real[:, :-1]).any() or (batch["labels"] != ids)[supervised].any():
        fault = "labels that are not the text's own tokens, or padding on the left"
        return [*absent, Check(name, "unsupported", fault)]
    features = FeatureBatch(ids, supervised, states_of(target, ids)[:, :, None], 0, target.output, real.sum(1))
    imported = recordings.medusa(paths[1], target)
    # Upstream's version 2 keeps nothing but the blocks.
    blocks = {key: tensor for key, tensor in imported.tensors.items() if key != "output_weight"}
    shared = replace(imported, options={**imported.options, "own_output": False}, tensors=blocks)
    found = [
        _loss(f"{name}/{kind}", imported if kind == "per_head_linear" else shared, target, features, recorded[kind])
        for kind in kinds
    ]
    return [*absent, *(check for checks in found for check in checks)]


def _loss(name: str, imported: Imported, target: Target, batch: FeatureBatch, wanted: Fields) -> list[Check]:
    head = make_head(imported, target.spec())
    found = head.loss(batch)
    gradients = gradients_of(head, found.total)
    weight, bias = gradients["block_weight"], gradients["block_bias"]
    if tied := tied_heads(blocks_of(imported.tensors)):  # one shared block gets the gradients of all its uses
        for each in (weight, bias):
            each[:, tied] = each[:, tied].sum(0, keepdim=True).expand(len(each), *each[0, tied].shape)
    norms = {}
    for at in range(weight.shape[1]):
        for block in range(len(weight)):
            norms[f"{at}.{block}.linear.weight"] = float(weight[block, at].norm())
            norms[f"{at}.{block}.linear.bias"] = float(bias[block, at].norm())
        if "output_weight" in gradients:
            norms[f"{at}.{len(weight)}.weight"] = float(gradients["output_weight"][at].norm())
    losses = [("total", found.total.detach(), wanted["total_loss"])]
    losses += [
        (f"head {i}", found.parts[f"cross_entropy_{i}"], each) for i, each in enumerate(wanted["per_head_loss"], 1)
    ]
    shares = [(f"head {i}", found.parts[f"top1_{i}"], each) for i, each in enumerate(wanted["per_head_top1"], 1)]
    return [
        near(f"{name}/loss", losses, LOSSES_RELATIVE, relative=True),
        near(f"{name}/top1", shares, LOSSES_RELATIVE, relative=True),
        compare_norms(f"{name}/gradients", norms, wanted["grad_l2_norms"]),
    ]
