"""Held-out evaluation of a head in training: its loss, and its acceptance on held-out answers.

Acceptance is measured twice over the same steps of the same answers. Decoded: the head drafts, the target verifies.
Teacher-forced: the head reads the finished answer as in training, and its predictions are compared with what follows.
The two agree wherever the loss predicts from true states: at every depth of Medusa's heads, at the first of EAGLE's. A
gap means another template, shifted features or a faulty cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from koala_bench.decoding.loop import Decoded, decode, fits
from koala_bench.dialogues.encoding import EncodedDialogue
from koala_bench.dialogues.streams import TokenBatch
from koala_bench.engine.target import Target
from koala_bench.records.definitions import acceptance_length, acceptance_rate_by_depth
from koala_bench.training.features import features_of
from koala_bench.training.states import StoredStates
from koala_bench.tree import load_template

_DEPTH = 4  # acceptance is measured with chains this deep, whatever tree the method decodes with
ANSWER_TOKENS = 64


@dataclass(frozen=True)
class HeldOut:
    """Held-out data of a training.

    Attributes:
        batches: for the loss; their samples are numbered after those of the training stream.
        prompts: decoded for the acceptance length.
        dialogues, sha256: the dialogues of the batches, and their hash.
    """

    batches: Sequence[TokenBatch]
    prompts: Sequence[Sequence[int]]
    dialogues: Sequence[EncodedDialogue] = ()
    sha256: str = ""


def can_probe(target: Target, prompt: Sequence[int]) -> bool:
    """Whether an answer to a held-out prompt fits in the target's context."""
    return fits(target, len(prompt), ANSWER_TOKENS, _DEPTH + 1)


@torch.no_grad()
def held_out_losses(
    target: Target, head: Any, held_out: HeldOut, stored: StoredStates | None = None
) -> dict[str, float]:
    """Mean of each part of a head's loss over the held-out batches, from stored states if given."""
    head.eval()
    sums: dict[str, float] = {}
    for batch in held_out.batches:
        found = head.loss(features_of(target, batch, head.features, seed=0, stored=stored))
        for key, value in {"loss": found.total, **found.parts}.items():
            sums[key] = sums.get(key, 0.0) + float(value) / len(held_out.batches)
    head.train()
    return {key: round(value, 5) for key, value in sums.items()}


def held_out_acceptance(target: Target, head: Any, held_out: HeldOut) -> dict[str, Any]:
    """Acceptance of a head over held-out prompts, drafting chains of four, or as deep as it can.

    Returns:
        ``acceptance_length`` and ``acceptance_rate_by_depth`` of all steps as decoded; ``teacher_forced_rate_by_depth``
        and ``decoded_rate_by_depth`` of those steps whose predictions the loss reports, depth by depth; a rate without
        a trial is null.
    """
    template = load_template(f"chain-{min(_DEPTH, head.max_depth)}")
    # Decodes in the target's dtype, then restores the weights bit for bit into the optimiser's own tensors.
    trained = {name: tensor.clone() for name, tensor in head.state_dict().items()}
    head.eval().to(target.dtype)
    answers = [decode(target, head, template, prompt, ANSWER_TOKENS, target.stop_ids) for prompt in held_out.prompts]
    head.float().load_state_dict(trained)
    accepted = [count for answer in answers for count in answer.accepted]
    rates = acceptance_rate_by_depth(accepted, [depth for answer in answers for depth in answer.drafted_depth])
    hits = [_hits(target, head, prompt, answer) for prompt, answer in zip(held_out.prompts, answers, strict=True)]
    head.train()
    forced, decoded = agreement([step for answer in hits for step in answer])
    # No step at all if every prompt was too long, or every answer a single token.
    return {
        "acceptance_length": round(acceptance_length(accepted), 4) if accepted else None,
        "acceptance_rate_by_depth": [round(found.rate, 4) if found.trials else None for found in rates],
        "teacher_forced_rate_by_depth": forced,
        "decoded_rate_by_depth": decoded,
    }


@torch.no_grad()
def _hits(target: Target, head: Any, prompt: Sequence[int], answer: Decoded) -> list[tuple[list[bool], int]]:
    """For each step of an answer: whether the loss's prediction at each depth is the next token, and how many drafts
    were accepted.

    The last step is left out, since the end of the answer cuts it.
    """
    ids = torch.tensor([[*prompt, *answer.tokens]])
    whole = TokenBatch(ids, torch.ones_like(ids, dtype=torch.bool), (0,), torch.tensor([ids.shape[1]]))
    predictions = head.loss(features_of(target, whole, head.features, seed=0)).predictions
    right: list[dict[int, bool]] = []  # by depth: for each row drafted from, whether the best guess is right
    for each in sorted(predictions, key=lambda prediction: prediction.depth):
        ahead = each.rows.cpu() + each.depth + 1
        inside = ahead < ids.shape[1]
        rows, guesses = each.rows.cpu()[inside].tolist(), each.logits.argmax(dim=-1).cpu()[inside]
        right.append(dict(zip(rows, (guesses == ids[0, ahead[inside]]).tolist(), strict=True)))
    steps = []
    root = len(prompt)
    for count in answer.accepted[:-1]:
        covered = []
        for depth in right:
            if root - 1 not in depth:
                break
            covered.append(depth[root - 1])
        steps.append((covered, count))
        root += count + 1
    return steps


def agreement(steps: Sequence[tuple[Sequence[bool], int]]) -> tuple[list[float | None], list[float | None]]:
    """Conditional acceptance rates by depth, teacher-forced and decoded, over the steps with a prediction at that
    depth.

    Args:
        steps: for each whether the prediction at each depth is right, and the number of drafts accepted when decoding.
    """
    forced: list[float | None] = []
    decoded: list[float | None] = []
    for depth in range(1, 1 + max((len(hits) for hits, _ in steps), default=0)):
        covered = [(hits, count) for hits, count in steps if len(hits) >= depth]
        trials = [hits[depth - 1] for hits, _ in covered if all(hits[: depth - 1])]
        offered = [count >= depth for _, count in covered if count >= depth - 1]
        forced.append(round(sum(trials) / len(trials), 4) if trials else None)
        decoded.append(round(sum(offered) / len(offered), 4) if offered else None)
    return forced, decoded
