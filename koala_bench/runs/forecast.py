"""How long a recipe will take here, from seconds of measuring its own steps; what is done already is not counted."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from koala_bench.common.progress import in_time
from koala_bench.decoding.loop import VANILLA_TREE, Vanilla, capacity_for, decode, fits
from koala_bench.dialogues.encoding import ChatTemplate, encode_prompt
from koala_bench.dialogues.questions import Question, find_questions, read_questions, select_questions
from koala_bench.engine.target import Target
from koala_bench.planning.calibration import training_pace
from koala_bench.planning.stored import tokens_to_store
from koala_bench.presets import EvaluationPreset
from koala_bench.results.recipes import Job, Plan
from koala_bench.training.experiment import heads_finished, trained_methods

_PROBE = 32  # tokens of the first answer, from which follows how many whole ones there is time for
LONG_S = 20 * 60.0


@dataclass(frozen=True)
class Forecast:
    """Seconds that are left to do; reading data and weights, tables and figures are not counted."""

    training_s: float
    decoding_s: float

    @property
    def total_s(self) -> float:
        """Of the whole run."""
        return self.training_s + self.decoding_s

    def __str__(self) -> str:
        if not self.total_s:
            return "nothing is left to train or to decode"
        parts = [
            f"{in_time(seconds)} of {what}"
            for seconds, what in ((self.training_s, "training"), (self.decoding_s, "decoding"))
            if seconds
        ]
        total = "" if len(parts) == 1 else f"about {in_time(self.total_s)} here, "
        return f"{total}{'about ' if not total else ''}{' and '.join(parts)}"


def forecast(
    planned: Plan, target: Target, template: ChatTemplate, data_dir: Path | None, trained: bool, seconds: float = 4.0
) -> Forecast:
    """Measure for some seconds, and multiply with what is left of the plan.

    A training step is measured with fresh heads. Of decoding only vanilla answers are, since nobody knows yet how many
    drafts will be accepted: each method is taken to be as fast as vanilla decoding. Processes that were started
    together share the work.

    Args:
        trained: whether the heads are, so that no training is counted.
        seconds: to spend, about; one step of everything is taken in any case.

    Raises:
        KoalaBenchError: a mistake in the methods, their options or the questions.
    """
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    training = storing = 0.0
    paces: dict[str, tuple[float, float]] = {}
    for heads, (preset, methods) in () if trained else planned.trainings.items():
        names = trained_methods(preset, methods, target)
        if heads_finished(preset, methods, target, template, heads):
            continue
        left = preset.training.steps - _steps_done(heads)
        key = json.dumps([names, {name: preset.method(name).model_dump(mode="json") for name in names}], sort_keys=True)
        if key not in paces:  # other seeds have the same pace
            paces[key] = training_pace(preset, names, target, seconds / 2)
        of_target, of_heads = paces[key]
        batches = left * preset.training.micro_batches
        training += batches * of_heads
        if not preset.training.stored_states:
            training += batches * of_target
        elif not storing:  # one reading of all dialogues serves all trainings
            tokens = tokens_to_store(preset, target, template) or preset.training.batch_tokens * batches
            storing = of_target * tokens / preset.training.batch_tokens
    decoding = sum(_decoding(job, target, template, data_dir, seconds / 2 / len(planned.jobs)) for job in planned.jobs)
    return Forecast((training + storing) / processes, decoding / processes)


def _steps_done(heads: Path) -> int:
    """Steps after which an interrupted training goes on: not more than its log has."""
    log = heads / "training.jsonl"
    if not (heads / "checkpoint.pt").is_file() or not log.is_file():
        return 0
    steps = [int(each) for each in _values(log, "step")]
    return max(steps, default=0)


def _values(path: Path, key: str) -> list[Any]:
    """A key's values in a file of JSON lines; a line that does not have it, or is cut, is passed over."""
    found = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            found.append(json.loads(line)[key])
        except (ValueError, KeyError, TypeError):
            continue
    return found


def _decoding(job: Job, target: Target, template: ChatTemplate, data_dir: Path | None, seconds: float) -> float:
    """Seconds of the answers of a job that are not in its record yet."""
    wanted = job.preset.evaluation
    questions = select_questions(read_questions(find_questions(wanted.questions, data_dir)[1]), wanted.limit)
    answers = len(job.methods) * wanted.repeats * sum(len(question.turns) for question in questions)
    kinds = _values(job.record, "kind") if job.record.is_file() else []
    left = 0 if "end" in kinds else max(0, answers - kinds.count("turn"))
    return left * _answer_s(questions, wanted, target, template, seconds) if left else 0.0


def _answer_s(
    questions: Sequence[Question], wanted: EvaluationPreset, target: Target, template: ChatTemplate, seconds: float
) -> float:
    """Seconds of one vanilla answer: the mean over as many questions, spread evenly, as there is time for.

    What there is no time to decode to its end is taken to reach the length limit.
    """
    assert target.tokenizer is not None
    stop = time.perf_counter() + seconds
    spread = sorted(
        range(len(questions)), key=lambda place: (place * 0.618034) % 1
    )  # golden ratio: evenly, at any number
    found: list[float] = []
    step_s = prefill_s = 0.0
    with target.computing():
        for place in spread:
            prompt = encode_prompt(template, target.tokenizer, questions[place].dialogue_after())
            room = min(wanted.max_new_tokens, target.max_positions - len(prompt) - 1)
            if room < 1:
                continue
            time_for = int(max(stop - time.perf_counter(), 0) / step_s) if step_s else 0
            limit = min(room, max(_PROBE, time_for))
            if not fits(target, len(prompt), room, 1):
                continue
            rows = capacity_for(len(prompt), limit, 1, target.max_positions)
            for _ in range(1 if step_s else 2):  # the first answer of all records or warms up
                answer = decode(target, Vanilla(), VANILLA_TREE, prompt, limit, target.stop_ids, target.new_cache(rows))
            steps = max(len(answer.accepted), 1)
            step_s, prefill_s = answer.decode_s / steps, answer.prefill_s
            whole = len(answer.tokens) < limit or limit == room
            found.append(prefill_s + (answer.decode_s if whole else step_s * room))
            if time.perf_counter() >= stop:
                break
    return sum(found) / len(found) if found else 0.0
