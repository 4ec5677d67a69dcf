"""Losslessness audit: every answer that differs from vanilla's is a numerical tie or a defect.

Greedy decoding with a draft head must give the target's greedy tokens. A tree pass and a one-token pass sum in
different orders, so in float32 and below two tokens whose logits are closer than the rounding error can swap. That is
not guessed from a gap: the target recomputes the position in its working precision and in float64, and their difference
is the rounding error there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from koala_bench.dialogues.encoding import ChatTemplate, encode_prompt
from koala_bench.dialogues.questions import Question
from koala_bench.engine.target import Target
from koala_bench.records.reading import Run
from koala_bench.records.schema import Place, TurnLine, place_of
from koala_bench.records.summaries import VANILLA, Difference, first_difference
from koala_bench.results.tables.rendering import Note, grid_of
from koala_bench.results.tables.rendering import to_markdown as markdown_page

# Two passes contribute error, and a tree pass is not the one whose error is measured.
TIE_FACTOR = 4.0


@dataclass(frozen=True)
class JudgedDifference:
    """A difference, the target's logits at its position, and the verdict.

    Attributes:
        gap: difference of the target's two largest logits there, in the working precision.
        exact_gap: the same in float64.
        between: float64 logit of vanilla's token minus that of the method's; NaN where an answer had ended.
        rounding: largest error of a logit there in the working precision; for float64 estimated from float32's.
    """

    method: str
    difference: Difference
    gap: float
    exact_gap: float
    between: float
    rounding: float
    verdict: Literal["numerical tie", "defect"]


@dataclass(frozen=True)
class Count:
    """Answers of one method on one task: compared, equal to vanilla's, ties, defects, and failed turns."""

    method: str
    compared: int
    equal: int
    ties: int
    defects: int
    failed: int


@dataclass(frozen=True)
class Audit:
    """Result of the audit of one run."""

    task: str
    dtype: str
    counts: tuple[Count, ...]
    differences: tuple[JudgedDifference, ...]

    @property
    def defects(self) -> int:
        """Number of defects over all methods."""
        return sum(count.defects for count in self.counts)


def _next_logits(target: Target, ids: Sequence[int]) -> torch.Tensor:
    """Logits of the token after ``ids``, float64, shape [vocab_size]."""
    logits, _ = target.prefill(torch.tensor(list(ids), device=target.device), target.new_cache(len(ids)))
    return logits.double().cpu()


def judge(
    method: str, difference: Difference, context: Sequence[int], target: Target, lower: Target | None, exact: Target
) -> JudgedDifference:
    """Judge one difference.

    Args:
        context: the prompt and the tokens that both answers share.
        target: the target in the precision of the run.
        lower: the target in float32 if the run is in float64, to extrapolate the rounding error from; else None.
        exact: the target in float64.
    """
    working, reference = _next_logits(target, context), _next_logits(exact, context)
    if lower is None:
        rounding = float((working - reference).abs().max())
    else:
        scale = torch.finfo(torch.float64).eps / torch.finfo(lower.dtype).eps
        rounding = float((_next_logits(lower, context) - reference).abs().max()) * scale
    (first, second), exact_best = working.topk(2).values.tolist(), reference.topk(2)
    ended = difference.token is None or difference.vanilla_token is None
    between = float("nan") if ended else float(reference[difference.vanilla_token] - reference[difference.token])
    # Only the two best tokens can change places, and only if their exact logits are within the error of both passes.
    tie = (
        not ended
        and {difference.token, difference.vanilla_token} == set(exact_best.indices.tolist())
        and abs(between) <= TIE_FACTOR * rounding
    )
    exact_gap = float(exact_best.values[0] - exact_best.values[1])
    return JudgedDifference(
        method, difference, first - second, exact_gap, between, rounding, "numerical tie" if tie else "defect"
    )


def audit(
    run: Run,
    questions: Iterable[Question],
    template: ChatTemplate,
    target: Target,
    in_precision: Callable[[str], Target],
    methods: Sequence[str] | None = None,
) -> Audit:
    """Compare every answer of a run with vanilla's and judge the differences.

    Args:
        run: a record that holds vanilla.
        questions: of the run, to rebuild the prompts.
        target: the target in the precision of the run.
        in_precision: loads the same target in another precision; called only if there is a difference to judge.
        methods: methods to audit, all by default; lossy ones are skipped.
    """
    by_id = {question.question_id: question for question in questions}
    vanilla = {place_of(turn): turn for turn in run.turns_of(VANILLA)}
    exact = lower = None
    counts, differences = [], []
    for name in methods if methods is not None else run.methods:
        if name == VANILLA or not run.methods[name]["lossless"]:
            continue
        verdicts: list[str] = []
        failed = 0
        for turn in run.turns_of(name):
            key = place_of(turn)
            base = vanilla.get(key)
            if turn["error"] is not None or base is None or base["error"] is not None:
                failed += 1
                continue
            difference = first_difference(turn, base)
            if difference is None:
                verdicts.append("equal")
                continue
            if exact is None:
                exact = target if target.dtype == torch.float64 else in_precision("float64")
                lower = in_precision("float32") if target.dtype == torch.float64 else None
            prompt = _prompt(by_id[key[0]], vanilla, key, template, target)
            context = [*prompt, *(base["new_token_ids"] or [])[: difference.position]]
            differences.append(judge(name, difference, context, target, lower, exact))
            verdicts.append(differences[-1].verdict)
        equal, ties, defects = (verdicts.count(verdict) for verdict in ("equal", "numerical tie", "defect"))
        counts.append(Count(name, len(verdicts), equal, ties, defects, failed))
    return Audit(run.header["questions"]["name"], run.header["target"]["dtype"], tuple(counts), tuple(differences))


def _prompt(
    question: Question, vanilla: Mapping[Place, TurnLine], key: Place, template: ChatTemplate, target: Target
) -> list[int]:
    """The prompt of a turn as in the evaluation: the questions up to it, with vanilla's answers to the earlier ones."""
    question_id, turn, repeat = key
    answers = [vanilla[question_id, earlier, repeat]["text"] or "" for earlier in range(turn)]
    assert target.tokenizer is not None
    return encode_prompt(template, target.tokenizer, question.dialogue_after(answers))


# ---------------------------------------------------------------------------------------------- in words

_LEGEND = (
    "A difference is a numerical tie if the two tokens are the target's two best in float64 and their float64 logits"
    f" are at most {TIE_FACTOR:g} times the rounding error apart, which is the largest difference there between the"
    " logits in the run's precision and in float64. All else is a defect."
)
_COUNTS = {"compared": "answers", "equal": "equal to vanilla's", "ties": "numerical ties", "defects": "defects"}
_COUNTS["failed"] = "failed turns"


def to_markdown(audits: Sequence[Audit]) -> str:
    """The counts per task, precision and method, and every difference with its numbers."""
    every = [(each, count) for each in audits for count in each.counts]
    rows = [
        {"task": each.task, "precision": each.dtype, "method": count.method}
        | {heading: str(getattr(count, name)) for name, heading in _COUNTS.items()}
        for each, count in every
    ]
    totals = {heading: str(sum(getattr(count, name) for _, count in every)) for name, heading in _COUNTS.items()}
    rows.append({"task": "**all**", "precision": "", "method": "", **totals})
    differences = [
        {
            "task": each.task,
            "precision": each.dtype,
            "method": one.method,
            "question": str(one.difference.question_id),
            "turn": str(one.difference.turn),
            "position": str(one.difference.position),
            "token": "end" if one.difference.token is None else str(one.difference.token),
            "vanilla's": "end" if one.difference.vanilla_token is None else str(one.difference.vanilla_token),
            "gap": f"{one.gap:.2e}",
            "gap in float64": f"{one.exact_gap:.2e}",
            "rounding": f"{one.rounding:.2e}",
            "verdict": one.verdict,
        }
        for each in audits
        for one in each.differences
    ]
    left = ("task", "precision", "method", "verdict")
    further = [("Differences", grid_of(differences, left))] if differences else []
    return markdown_page(grid_of(rows, left), "Losslessness audit", [Note("Verdicts", (_LEGEND,))], further)
