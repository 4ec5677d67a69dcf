"""Measuring methods: every question is answered by all of them in turn, so that drift of the machine cancels.

Vanilla decoding is one of the methods and runs through the same loop, cache, dtype and stopping rule. The order of the
methods is drawn anew for every prompt. Every method is given the same prompts: the second turn shows vanilla's first
answer.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from koala_bench.common.process_group import find_process_group
from koala_bench.common.progress import log_line, progress
from koala_bench.dialogues.encoding import ChatTemplate
from koala_bench.dialogues.questions import Question, find_questions, read_questions, select_questions
from koala_bench.engine.target import Target
from koala_bench.errors import KoalaBenchError
from koala_bench.evaluation.answering import Place, Session, failure
from koala_bench.evaluation.header import header_of
from koala_bench.evaluation.methods import load_methods
from koala_bench.evaluation.order import drawn_order
from koala_bench.evaluation.recording import RecordWriter, open_record
from koala_bench.evaluation.shards import merge_parts, place_for
from koala_bench.presets import Preset
from koala_bench.records.reading import Run, read_run
from koala_bench.records.schema import Key, TurnLine, key_of, with_other_template
from koala_bench.training.experiment import VANILLA


def evaluate(
    preset: Preset,
    name: str,
    methods: Sequence[str],
    target: Target,
    template: ChatTemplate,
    heads: Path,
    record: Path,
    data_dir: Path | None,
    command: Sequence[str],
    process: int = 1,
) -> Run:
    """Decode the preset's questions with all methods into one record; a finished record is reused, a partial one
    continued.

    Processes that were started together share the questions out; their times are of one machine's GPUs side by side.

    Args:
        name: of the preset, for the record.
        heads: folder with one trained head per method.
        record: the JSON-lines file.
        process: which of several fresh processes that make this evaluation, from 1 on.

    Raises:
        KoalaBenchError: questions, heads or the record are missing, damaged or of another run.
    """
    wanted = preset.evaluation
    source = find_questions(wanted.questions, data_dir)
    questions = select_questions(read_questions(source[1]), wanted.limit)
    group = find_process_group(target.device)
    ready = load_methods(preset, methods, target, heads)
    if foreign := with_other_template([method.info for method in ready], template.sha256):
        log_line(
            f"Trained with another chat template than this evaluation's, so they draft worse: {', '.join(foreign)}."
        )
    with target.computing():
        counted = (*source, len(questions))
        header = header_of(preset, name, target, template, ready, counted, command, process, group.size)
    started = time.perf_counter()
    path = place_for(record, group, len(questions))
    own = questions if path == record else [questions[place] for place in group.own(len(questions))]
    total = sum(len(question.turns) for question in own) * len(ready) * wanted.repeats
    with target.computing(), open_record(path, header) as writer:
        if writer.finished:
            log_line(f"Reusing the finished record {path}.")
        else:
            kept = {key_of(turn): turn for turn in read_run(path).turns} if writer.done else {}
            if kept:
                log_line(f"Resuming {path}: {len(kept)} of {total} turns are there.")
            session = Session(preset, target, template, ready, process)
            shared = f", {len(own)} of them in this process" if len(own) < len(questions) else ""
            log_line(f"Decoding {len(questions)} questions{shared} with {', '.join(session.methods)} ...")
            _warm_up(session, questions)
            with _frozen_garbage(), progress("decode", total, "turns", len(kept)) as advance:
                for repeat in range(wanted.repeats):
                    for question in own:
                        _answer_question(session, writer, kept, question, repeat, advance)
            writer.finish(time.perf_counter() - started)
    merge_parts(record, group, questions, started)
    run = read_run(record)
    _check_failures(run)
    return run


def _answer_question(
    session: Session,
    writer: RecordWriter,
    kept: dict[Key, TurnLine],
    question: Question,
    repeat: int,
    advance: Callable[..., None],
) -> None:
    """All turns of one question by all methods, except what the record has already."""
    answers: list[str] = []
    for number in range(len(question.turns)):
        place = Place(question, number, repeat)
        prompt = session.prompt(question.dialogue_after(answers))
        order = drawn_order([*session.methods], session.evaluation.seed, *place.key, session.process)
        lines = {name: kept[name, *place.key] for name in order if (name, *place.key) in kept}
        fresh = [name for name in order if name not in lines]
        gc.collect()
        for name in fresh:
            lines[name] = session.answer(session.methods[name], place, prompt)
            advance(1, name)
        vanilla = lines[VANILLA]
        for name in fresh:
            if name != VANILLA and session.evaluation.temperature == 0:  # draws are not expected to be equal
                session.compare(lines[name], vanilla, prompt)
            writer.append(lines[name])
        if vanilla["text"] is None:
            reason = KoalaBenchError("Vanilla decoding gave no answer to the turn before.", "")
            for later in (Place(question, turn, repeat) for turn in range(number + 1, len(question.turns))):
                for name in session.methods:
                    if (name, *later.key) not in kept:
                        writer.append(failure(name, later, None, reason))
                        advance(1)
            return
        answers.append(vanilla["text"])


@contextmanager
def _frozen_garbage() -> Iterator[None]:
    """Collections between turns skip what is loaded by now, which would take a quarter of a second each time."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _warm_up(session: Session, questions: Sequence[Question]) -> None:
    """Answer the first question that fits with every method; what fails there would fail everywhere. Raises
    KoalaBenchError where a method fails, and not for want of memory, which a shorter prompt may need less of."""
    prompts = ((question, session.prompt(question.dialogue_after())) for question in questions)
    first = next(((question, prompt) for question, prompt in prompts if session.fits(prompt)), None)
    if first is None:
        return  # all turns will say why
    question, prompt = first
    for _ in range(session.evaluation.warmup):
        for method in session.methods.values():
            error = session.answer(method, Place(question, 0, 0), prompt)["error"]
            if error is not None and "memory" not in error["message"]:
                raise KoalaBenchError(f"{method.name} cannot answer: {error['message']}", "Nothing was measured.")


def _check_failures(run: Run) -> None:
    """Say how many turns failed. Raises KoalaBenchError where all of a method did."""
    for name in run.methods:
        turns = run.turns_of(name)
        errors = [turn["error"] for turn in turns if turn["error"] is not None]
        if errors and len(errors) == len(turns):
            raise KoalaBenchError(
                f"{name}: no turn of {len(turns)} succeeded: {errors[0]['message']}",
                f"The failures are in {run.path}; correct what they say and choose another --out.",
            )
        if errors:
            log_line(f"{name}: {len(errors)} of {len(turns)} turns failed, the first with: {errors[0]['message']}")
