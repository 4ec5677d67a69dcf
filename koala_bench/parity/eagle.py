"""Parity with EAGLE: outputs, drafted trees, decoding and losses."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from koala_bench.engine.target import Target
from koala_bench.heads import Committed, FeatureBatch
from koala_bench.interop.checkpoints import Fields, Imported, make_head
from koala_bench.interop.llama import FIXED_ROPE_BASE
from koala_bench.parity.decoding import decoded
from koala_bench.parity.shared import (
    LOSSES_RELATIVE,
    OUTPUTS_ABSOLUTE,
    Check,
    Drafter,
    Recordings,
    by_prompt,
    compare_norms,
    first_difference,
    gradients_of,
    judge,
    near,
    ok,
    predictions,
    prompt_numbers,
    skipped,
    states_of,
)
from koala_bench.parity.trees import compare_buffers, excuse_misdrafted, leaf_rows, template_of
from koala_bench.tree import DraftTree, DynamicTemplate, TreeTemplate


def _on_either_base(imported: Imported, run: Callable[[Imported], list[Check]]) -> list[Check]:
    """Run checks of an EAGLE draft whose configuration names a RoPE base; branch v1 ignores it, later code does not."""
    found = run(imported)
    if ok(found) or imported.options["rope_base"] == FIXED_ROPE_BASE:
        return found
    fixed = run(replace(imported, options={**imported.options, "rope_base": FIXED_ROPE_BASE}))
    said = f"; with RoPE base {FIXED_ROPE_BASE:.0f}, as branch v1 of upstream whatever the configuration says"
    return [replace(each, detail=each.detail + said) for each in fixed] if ok(fixed) else found


def eagle_tiny(recordings: Recordings, part: str) -> list[Check]:
    """Features and logits of the head, and the tree that it drafts after each prompt."""
    where = "medusa_tiny/target"
    if absent := recordings.absent(where, f"{part}/draft", f"{part}/expected.safetensors"):
        return skipped(part, absent)
    target, expected = recordings.target(where), recordings.tensors(f"{part}/expected.safetensors")
    template = _eagle_template(recordings, part)

    def run(imported: Imported) -> list[Check]:
        head = make_head(imported, target.spec())
        inputs = {
            i: (expected[f"prompt{i}.shifted_ids"], expected[f"prompt{i}.hidden_states"])
            for i in prompt_numbers(expected)
        }
        found = {i: predictions(head, target, *given)[0] for i, given in inputs.items()}
        states = {i: states_of(target, expected[f"prompt{i}.input_ids"]) for i in inputs}
        checks = [
            by_prompt(part, "hidden_states", states, expected),
            by_prompt(part, "out_features", {i: feature for i, (feature, _) in found.items()}, expected),
            by_prompt(part, "out_logits", {i: logits for i, (_, logits) in found.items()}, expected),
        ]
        if template is None:
            absent = "eagle_decode/buffers.json, which has the tree, is absent"
            return [*checks, *(Check(f"{part}/{name}", "skip", absent) for name in ("tree_tokens", "tree_topk"))]
        drafter = Drafter(target, head, template, leaf_rows(template.shape, sort=True))
        return [*checks, *excuse_misdrafted(_eagle_tree(part, drafter, template, expected), template)]

    return _on_either_base(recordings.eagle(f"{part}/draft", target), run)


def _eagle_template(recordings: Recordings, part: str) -> TreeTemplate | None:
    """The static tree, which is recorded once for both EAGLE parts."""
    paths = (f"{part}/buffers.json", "eagle_decode/buffers.json")
    path = next((path for path in paths if not recordings.absent(path)), None)
    return None if path is None else template_of(recordings.json(path), "tree_choices")


def _eagle_tree(part: str, drafter: Drafter, template: TreeTemplate, expected: Fields) -> list[Check]:
    """Tree tokens as drafted for decoding, and the candidate table of each inner node, computed path by path."""
    inner = [(), *(path for path in template.paths if any(other[:-1] == path for other in template.paths))]
    tokens_wrong: list[str] = []
    ranks_wrong: list[str] = []
    logits: list[tuple[str, torch.Tensor, torch.Tensor]] = []
    for i in prompt_numbers(expected):
        next_ids, hidden = expected[f"prompt{i}.shifted_ids"], expected[f"prompt{i}.hidden_states"]
        drafted = _draft(drafter, next_ids, hidden)
        wanted = expected[f"prompt{i}.tree_tokens"].tolist()
        if drafted != wanted:
            tokens_wrong.append(first_difference(f"prompt {i}", drafted, wanted))
        table_tokens, table_logits = expected[f"prompt{i}.tree_topk_tokens"], expected[f"prompt{i}.tree_topk_logits"]
        if len(table_tokens) != len(inner):
            ranks_wrong.append(
                f"prompt {i}: {len(table_tokens)} inner nodes are recorded, the tree '{template.name}' has {len(inner)}"
            )
            continue
        ours = _inner_logits(drafter, template, inner, drafted, next_ids, hidden)
        best = ours.topk(table_tokens.shape[1], dim=-1)
        logits.append((f"prompt {i}", ours.gather(1, table_tokens), table_logits))
        logits.append((f"prompt {i}, sorted", best.values, table_logits))
        # Candidates closer to each other than the outputs need to agree may change places.
        gap = (ours.gather(1, table_tokens) - best.values).abs()
        apart = (best.indices != table_tokens) & (gap > 2 * OUTPUTS_ABSOLUTE)
        if apart.any():
            row, rank = apart.nonzero()[0].tolist()
            ranks_wrong.append(
                f"prompt {i}: candidate {rank} of node {list(inner[row])} is {int(best.indices[row, rank])}, recorded"
                f" {int(table_tokens[row, rank])}"
            )
    count = len(prompt_numbers(expected))
    return [
        judge(f"{part}/tree_tokens", tokens_wrong, f"{count} trees of {template.nodes} tokens are equal"),
        judge(f"{part}/tree_topk_tokens", ranks_wrong, f"{count} tables of {len(inner)} inner nodes agree"),
        near(f"{part}/tree_topk_logits", logits),
    ]


def _draft(drafter: Drafter, next_ids: torch.Tensor, hidden: torch.Tensor) -> list[int]:
    """The tokens a head drafts after a prompt, root first."""
    drafter.head.begin(drafter.template, len(next_ids) + drafter.template.nodes)
    with torch.inference_mode():
        tree: DraftTree = drafter.head.draft(Committed(next_ids, hidden[:, None], 0))
    return tree.tokens.tolist()


def _inner_logits(
    drafter: Drafter,
    template: TreeTemplate,
    inner: Sequence[tuple[int, ...]],
    drafted: Sequence[int],
    next_ids: torch.Tensor,
    hidden: torch.Tensor,
) -> torch.Tensor:
    """Logits [inner nodes, vocab_size] for the children of each inner node, whose path is read as a sequence."""
    node = {path: index for index, path in enumerate([(), *template.paths])}
    features: dict[tuple[int, ...], torch.Tensor] = {}
    logits = []
    for path in inner:
        above = [path[:depth] for depth in range(len(path))]
        ids = torch.cat([next_ids, next_ids.new_tensor([drafted[node[each]] for each in [*above, path][1:]])])
        states = torch.cat([hidden, *(features[each][None] for each in above)])
        feature, said = predictions(drafter.head, drafter.target, ids, states)[0]
        features[path] = feature[-1]
        logits.append(said[-1])
    return torch.stack(logits)


def eagle_decode(recordings: Recordings, part: str) -> list[Check]:
    """Buffers of the tree and generation."""
    checks: list[Check] = []
    where = "medusa_decode/target"
    if absent := recordings.absent(f"{part}/buffers.json"):
        checks += skipped(part, absent)
    else:
        buffers = recordings.json(f"{part}/buffers.json")
        template = template_of(buffers, "tree_choices")
        names = {"mask": "tree_attn_mask", "depths": "tree_position_ids"}
        checks += compare_buffers(part, buffers, template, names, eagle_like=True)
        if absent := recordings.absent(where, f"{part}/draft", f"{part}/decode.json"):
            checks += skipped(f"{part}/decode", absent)
        else:
            target, recorded = recordings.target(where), recordings.json(f"{part}/decode.json")
            rows = leaf_rows(template.shape, sort=True)

            def run(imported: Imported) -> list[Check]:
                drafter = Drafter(target, make_head(imported, target.spec()), template, rows)
                return excuse_misdrafted(decoded(part, drafter, recorded), template)

            checks += _on_either_base(recordings.eagle(f"{part}/draft", target), run)
    return [*checks, *_dynamic_decode(recordings, part, f"{part}/decode_eagle2")]


def _dynamic_decode(recordings: Recordings, part: str, name: str) -> list[Check]:
    """Generation with the dynamic tree of EAGLE-2: the same weights, and a shape of its own at each step."""
    where = "medusa_decode/target"
    if absent := recordings.absent(where, f"{part}/draft", f"{name}.json"):
        return skipped(name, absent)
    target, recorded = recordings.target(where), recordings.json(f"{name}.json")
    # Upstream's total_token counts the root.
    template = DynamicTemplate.of(int(recorded["depth"]), int(recorded["top_k"]), int(recorded["total_token"]) - 1)

    def run(imported: Imported) -> list[Check]:
        return decoded(name, Drafter(target, make_head(imported, target.spec()), template, []), recorded)

    return _on_either_base(recordings.eagle(f"{part}/draft", target), run)


def eagle_losses(recordings: Recordings, name: str, target: Target, paths: Sequence[str]) -> list[Check]:
    """Losses and gradient norms of one batch, and the predicted states of upstream's own."""
    tensors, recorded = recordings.tensors(paths[2]), recordings.json(paths[3])
    items = sorted(int(found[1]) for key in tensors if (found := re.fullmatch(r"item(\d+)\.input_ids", key)))
    lengths = torch.tensor([len(tensors[f"item{i}.input_ids"]) for i in items])

    def padded(key: str) -> torch.Tensor:
        return torch.nn.utils.rnn.pad_sequence([tensors[f"item{i}.{key}"] for i in items], batch_first=True)

    mask, states = padded("loss_mask") != 0, padded("hidden_state")[:, :, None]
    raw = FeatureBatch(padded("input_ids"), mask, states, 0, target.output, lengths)
    weights = {
        "regression_weight": float(recorded.get("v_w", 1.0)),
        "classification_weight": float(recorded.get("p_w", 0.1)),
    }

    def run(imported: Imported) -> list[Check]:
        head = make_head(imported, target.spec(), noise=0.0, **weights)
        found = head.loss(raw)
        ours = {
            "vloss": found.parts["regression"],
            "ploss": found.parts["classification"],
            "loss": found.total.detach(),
        }
        losses = ((key, value, recorded[key]) for key, value in ours.items())
        norms = {key: float(each.norm()) for key, each in gradients_of(head, found.total).items()}
        checks = [
            near(f"{name}/loss", losses, LOSSES_RELATIVE, relative=True),
            compare_norms(f"{name}/gradients", norms, recorded["grad_l2_norms"]),
        ]
        if "num_unmasked_positions" in recorded:
            counted, wanted = len(found.predictions[0].rows), int(recorded["num_unmasked_positions"])
            said = f"{counted} positions are counted"
            faults = [] if counted == wanted else [f"{said}, recorded {wanted}"]
            checks.append(judge(f"{name}/counted_positions", faults, said))
        if "predict" in tensors:  # upstream's own shifted batch, at its real positions
            batch = [tensors[f"batch.{key}"] for key in ("input_ids", "hidden_states", "attention_mask")]
            pairs = []
            for row, (ids, hidden, real, theirs) in enumerate(zip(*batch, tensors["predict"], strict=True)):
                feature, _ = predictions(head, target, ids, hidden)[0]
                pairs.append((f"item {row}", feature[real != 0], theirs[real != 0]))
            checks.append(near(f"{name}/predict", pairs))
        return checks

    return _on_either_base(recordings.eagle(paths[1], target), run)
