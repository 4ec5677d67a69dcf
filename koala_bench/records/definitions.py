"""Acceptance length and acceptance rates as each project defines them, all from the same per-step records.

One decoding, many numbers: what counts as a step, whether the target's own (bonus) token and the prefill's token
are in, and what is averaged over differ from project to project. Here are all of them, so that a number can be
compared with one published elsewhere.

A record's step commits its accepted drafts and one bonus token. The first token of an answer comes from the
prefill and belongs to no step. Medusa's and EAGLE's loops count the other way round: a step commits its root
(for the first step the prefill's token) and its accepted drafts, and the last bonus token is dropped. Root and
bonus are one token per step either way, so the counts per step are the same. Two things remain different in their
files: nothing is cut at the end of an answer (of Spec-Bench's methods, EAGLE and PLD are cut, Medusa and Hydra are
not), and an end token that is the bonus takes them one step more.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_Counts = NDArray[np.int64]


@dataclass(frozen=True)
class DepthRate:
    """How often the draft was right at one depth, of the steps that count as its trials.

    Attributes:
        depth: 1 for the children of the root.
        accepted: steps that committed a node at this depth.
        trials: given its parent: steps that committed a node one level up and were offered this depth;
            unconditional: steps that drafted.
    """

    depth: int
    accepted: int
    trials: int

    @property
    def rate(self) -> float:
        """accepted / trials; NaN without a trial."""
        return self.accepted / self.trials if self.trials else math.nan


@dataclass(frozen=True)
class Steps:
    """The steps of one answer.

    Attributes:
        question_id: which question it answers; its other turns and repeats have the same.
        accepted: draft tokens that each step accepted, [steps].
        drafted_depth: the deepest level that each step was offered, [steps]; None if that was not recorded.
        prefill_tokens: tokens of the answer that no step committed: 1 for the prefill's, 0 where it is not recorded.
    """

    question_id: int
    accepted: tuple[int, ...]
    drafted_depth: tuple[int, ...] | None
    prefill_tokens: int


# ---------------------------------------------------------------------------------------------- rates by depth


def acceptance_length(accepted: Sequence[int]) -> float:
    """Tokens per verification step (tau), bonus token included: vanilla decoding has 1.

    This is Spec-Bench's "#Mean accepted tokens" (the mean of its ``accept_lengths``) and the acceptance length in
    EAGLE's text (SafeAILab/EAGLE#195). For other definitions see ``LENGTH_DEFINITIONS``.
    """
    if not accepted:
        raise ValueError("no step")
    return sum(accepted) / len(accepted) + 1.0


def acceptance_rate_by_depth(accepted: Sequence[int], drafted_depth: Sequence[int]) -> list[DepthRate]:
    """P(depth d accepted | depth d - 1 accepted and depth d offered), for d = 1 .. the deepest one offered.

    Conditional on the parent, like EAGLE's n-alpha (EAGLE-1, utils_alpha.py and alpha.py), and the same for a chain.
    In a tree n-alpha tries depth d only where the chosen path goes on; a record knows the tree's depth, not whether
    the accepted node had children, so a leaf above that depth is a trial here and none there.
    """
    committed, offered = _of_steps(accepted, drafted_depth)
    return [
        DepthRate(d, int((committed >= d).sum()), int(((committed >= d - 1) & (offered >= d)).sum()))
        for d in range(1, int(offered.max(initial=0)) + 1)
    ]


def unconditional_rate_by_depth(accepted: Sequence[int], drafted_depth: Sequence[int]) -> list[DepthRate]:
    """P(depth d accepted) over all steps that drafted, for d = 1 .. the deepest one offered.

    speculators' accepted at position i / drafts (scripts/evaluate/perf_utils.py). It is the product of the conditional
    rates up to d if every step offers the same depth.
    """
    committed, offered = _of_steps(accepted, drafted_depth)
    depths, drafts = range(1, int(offered.max(initial=0)) + 1), int((offered > 0).sum())
    return [DepthRate(depth, int((committed >= depth).sum()), drafts) for depth in depths]


def repeated_share(answers: Sequence[Sequence[int]], length: int = 8) -> float | None:
    """Share of ``length``-grams of tokens that repeat an earlier one of the same answer; None without one that long.

    Small targets loop, and loops are what lookups and heads draft most easily.
    """
    repeated = total = 0
    for answer in answers:
        runs = [tuple(answer[first : first + length]) for first in range(len(answer) - length + 1)]
        total += len(runs)
        repeated += len(runs) - len(set(runs))
    return repeated / total if total else None


def _of_steps(accepted: Sequence[int], drafted_depth: Sequence[int]) -> tuple[_Counts, _Counts]:
    committed, offered = np.asarray(accepted, dtype=np.int64), np.asarray(drafted_depth, dtype=np.int64)
    if committed.shape != offered.shape:
        raise ValueError(f"{committed.size} steps in accepted, {offered.size} in drafted_depth")
    return committed, offered


# ---------------------------------------------------------------------------------------------- lengths


@dataclass(frozen=True)
class LengthDefinition:
    """One way to say how many tokens a step is worth.

    Attributes:
        meaning: the formula, in one line; the prefill's token is left out where it does not say otherwise.
        source: who counts so, and where.
        value: of the answers of one method, in tokens per step; NaN where it does not exist.
    """

    meaning: str
    source: str
    value: Callable[[Sequence[Steps]], float]


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else math.nan


def _accepted(answers: Sequence[Steps]) -> list[int]:
    return [count for answer in answers for count in answer.accepted]


def _committed(answers: Sequence[Steps]) -> int:
    return sum(_accepted(answers)) + len(_accepted(answers))


def _recorded(answers: Sequence[Steps]) -> tuple[list[int], list[int]]:
    """Accepted and offered depth of the steps whose offered depth was recorded."""
    known = [answer for answer in answers if answer.drafted_depth is not None]
    return _accepted(known), [depth for answer in known for depth in answer.drafted_depth or ()]


def _tokens_per_step(answers: Sequence[Steps]) -> float:
    return _ratio(_committed(answers), len(_accepted(answers)))


def _drafts_per_step(answers: Sequence[Steps]) -> float:
    return _ratio(sum(_accepted(answers)), len(_accepted(answers)))


def _medusa(answers: Sequence[Steps]) -> float:
    # An answer without a step has idxs -1 in a file of ours; Medusa's loop always makes one step.
    stepped = [answer for answer in answers if answer.accepted]
    return _ratio(_committed(stepped), len(_accepted(stepped)) - len(stepped))


def _completion_per_verification(answers: Sequence[Steps]) -> float:
    return _ratio(_committed(answers) + sum(answer.prefill_tokens for answer in answers), len(_accepted(answers)))


def _per_draft(answers: Sequence[Steps]) -> float:
    accepted, offered = _recorded(answers)
    return 1.0 + _ratio(sum(accepted), sum(depth > 0 for depth in offered))


def _from_rates(answers: Sequence[Steps]) -> float:
    rates = [each.rate for each in acceptance_rate_by_depth(*_recorded(answers)) if each.trials]
    return float(np.cumprod(rates).sum()) if rates else math.nan


def _mean_over_questions(answers: Sequence[Steps]) -> float:
    questions: dict[int, list[Steps]] = {}
    for answer in answers:
        questions.setdefault(answer.question_id, []).append(answer)
    lengths = [_tokens_per_step(each) for each in questions.values() if _accepted(each)]
    return _ratio(math.fsum(lengths), len(lengths))


LENGTH_DEFINITIONS: Mapping[str, LengthDefinition] = {
    "tokens per step": LengthDefinition(
        "tokens that the steps committed / steps, both totalled",
        "this project's tables; tokens/step and block efficiency elsewhere; Medusa's new_tokens / (idxs + 1)",
        _tokens_per_step,
    ),
    "drafts per step": LengthDefinition(
        "accepted drafts / steps, both totalled", "the question whether the +1 is in (EAGLE#147)", _drafts_per_step
    ),
    "EAGLE": LengthDefinition(
        "accepted drafts per drafting-verification cycle + 1, averaged over cycles",
        "EAGLE#195, #146, #132; of Medusa too (EAGLE#147)",
        lambda answers: _drafts_per_step(answers) + 1.0,
    ),
    "Spec-Bench": LengthDefinition(
        "mean of accept_lengths, the tokens appended per step, over the steps of all turns and questions",
        "#Mean accepted tokens of Spec-Bench's evaluation/eval.py and speed.py",
        _tokens_per_step,
    ),
    "Medusa, new_tokens / idxs": LengthDefinition(
        "tokens of the steps / (steps - 1), both totalled: idxs is the last step's index and counts from 0",
        "what users compute from Medusa's and EAGLE's answer files (EAGLE#153, #235); too large by one step per turn",
        _medusa,
    ),
    "SpecForge benchmark": LengthDefinition(
        "completion_tokens / spec_verify_ct: all new tokens, the prefill's too, / steps",
        "SpecForge benchmarks/benchmarker/utils.py; that the server's completion_tokens hold the prefill's is inferred",
        _completion_per_verification,
    ),
    "speculators, NeMo Automodel": LengthDefinition(
        "1 + accepted drafts / drafts: a step that was offered nothing is no draft",
        "speculators scripts/evaluate/perf_utils.py (Prometheus counters of vLLM); NeMo Automodel PR #2912",
        _per_draft,
    ),
    "SpecForge evaluator": LengthDefinition(
        "simulated_acc_len: a1 + a1 a2 + ..., from the rates by depth given the parent",
        "SpecForge specforge/eval/evaluator.py, whose rates are of teacher forcing; here of the decoding",
        _from_rates,
    ),
    "mean over questions": LengthDefinition(
        "tokens per step of each question, averaged over questions: a short answer counts like a long one",
        "the mean of ratios, where 'tokens per step' is the ratio of totals",
        _mean_over_questions,
    ),
}


def lengths_by_definition(answers: Sequence[Steps]) -> dict[str, float]:
    """The acceptance length of one method by every definition, in the order of ``LENGTH_DEFINITIONS``."""
    return {name: definition.value(answers) for name, definition in LENGTH_DEFINITIONS.items()}
