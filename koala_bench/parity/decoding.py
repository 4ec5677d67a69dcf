"""Generation compared with the recorded one, step by step, and the ends of answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from koala_bench.decoding.loop import Decoded, decode
from koala_bench.heads import Committed
from koala_bench.interop.checkpoints import Fields
from koala_bench.parity.shared import Check, Drafter, first_difference, judge
from koala_bench.parity.trees import dynamic_rows, row_of
from koala_bench.tree import DraftTree, Template, TreeShape


class _Watched:
    """A head, with the shapes of all trees that it drafts."""

    def __init__(self, head: Any) -> None:
        self.head, self.features, self.max_depth = head, head.features, head.max_depth
        self.shapes: list[TreeShape] = []

    def begin(self, template: Template, capacity: int) -> None:
        self.head.begin(template, capacity)

    def draft(self, new: Committed) -> DraftTree:
        tree: DraftTree = self.head.draft(new)
        self.shapes.append(tree.shape)
        return tree


def _decode(drafter: Drafter, entry: Fields, stop_ids: Sequence[int], head: Any) -> Decoded:
    """Decode as far as the recording goes. Upstream keeps all of its last step, so the limit lies behind that."""
    limit = len(entry["generated_ids"]) + 2
    return decode(drafter.target, head, drafter.template, entry["prompt_ids"], limit, stop_ids, trace=True)


def decoded(part: str, drafter: Drafter, recorded: Fields) -> list[Check]:
    """Compare generation step by step, then the cases with an end-of-sequence token."""
    faults: dict[str, list[str]] = {"generated_ids": []}
    steps_seen, dynamic = 0, drafter.template.dynamic
    for i, entry in enumerate(recorded["prompts"]):
        count = len(entry["accept_lengths"])
        steps_seen += count
        # No stop ids: upstream ends after the step that holds one, which is where the recording ends.
        watched = _Watched(drafter.head)
        answer = _decode(drafter, entry, (), watched)
        steps, shapes = answer.steps[:count], watched.shapes[:count]
        ours: dict[str, list[Any]] = {
            "generated_ids": answer.tokens[: len(entry["generated_ids"])],
            "accept_lengths": [len(step.path) - 1 for step in steps],
        }
        theirs: dict[str, list[Any]] = {name: entry[name] for name in ours}
        if "steps" in entry:
            rows = [dynamic_rows(shape) if dynamic else drafter.rows for shape in shapes]
            computed: dict[str, list[Any]] = {
                "tree_tokens": [step.tree_tokens for step in steps],
                "path_nodes": [list(step.path) for step in steps],
                "accepted_tokens": [[step.tree_tokens[node] for node in step.path] for step in steps],
                "best_candidate": [row_of(table, step.path) for table, step in zip(rows, steps, strict=True)],
            }
            if dynamic:
                computed |= {
                    "tree_parents": [list(shape.parents) for shape in shapes],
                    "tree_position_ids": [list(shape.depths) for shape in shapes],
                    "retrieve_indices": rows,
                }
            ours |= computed
            theirs |= {name: [step[name] for step in entry["steps"]] for name in computed}
        for name, values in ours.items():
            fault = [] if values == theirs[name] else [first_difference(f"prompt {i}", values, theirs[name])]
            faults.setdefault(name, []).extend(fault)
    equal = f"{len(recorded['prompts'])} prompts, {steps_seen} steps are equal"
    checks = [judge(f"{part}/{name}", found, equal) for name, found in faults.items()]
    if "eos_cases" in recorded:
        cases = recorded["eos_cases"]
        ended = [fault for i, entry in enumerate(cases) for fault in _ended(f"case {i}", drafter, entry)]
        equal = f"{len(cases)} answers end at the same token, after the same steps; nothing is kept behind it"
        checks.append(judge(f"{part}/eos_cases", ended, equal))
    return checks


def _ended(where: str, drafter: Drafter, entry: Fields) -> list[str]:
    """Compare an answer that ends at a stop token. Upstream keeps tokens of the last step after it; ours cuts them."""
    given = entry["eos_token_id"]
    stops = list(given) if isinstance(given, list) else [] if given is None else [int(given)]
    generated = entry["generated_ids"]
    end = next((i for i, token in enumerate(generated) if token in stops), None)
    if end is None:
        return [f"{where}: the recorded answer does not hold its own stop token {stops}"]
    answer = _decode(drafter, entry, stops, drafter.head)
    # A step of upstream commits its root and the accepted drafts; one of ours the accepted drafts and the next root.
    accepted, before = [], 0
    for length in entry["accept_lengths"]:
        if before + length >= end:
            accepted += [end - before - 1] if end > before else []
            break
        accepted.append(length)
        before += length + 1
    if answer.tokens != generated[: end + 1]:
        return [first_difference(where, answer.tokens, generated[: end + 1])]
    if answer.stop != "eos":
        return [f"{where}: stopped for '{answer.stop}', not at the end-of-sequence token"]
    if answer.accepted != accepted:
        return [first_difference(f"{where}, accept lengths", answer.accepted, accepted)]
    return []
