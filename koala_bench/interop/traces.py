"""Reading answer files of FastChat, Medusa, EAGLE and Spec-Bench, ours too, and run records, as one kind of trace.

What the files of other projects hold, and their pitfalls:

- Medusa and EAGLE: ``idxs`` is the 0-based index of a turn's last step, so the turn took ``idxs + 1`` (Medusa,
  llm_judge/gen_model_answer_medusa.py); ``new_tokens`` counts what the last step made beyond the end of the answer.
- EAGLE's baseline script never counts ``new_tokens`` and writes 0 (eagle/evaluation/gen_baseline_answer_llama2chat.py);
  it makes one token a step, so ``idxs + 1`` counts them. It ends at 512 steps, where EAGLE goes on to about 1,024
  tokens.
- Spec-Bench (evaluation/eval.py): ``decoding_steps`` counts from 1; ``accept_lengths`` has the tokens of each step, the
  bonus token among them, for all turns of a question one after the other.
- ``wall_time`` is seconds of a turn, prefill included (Medusa's ``*_inf_only.py`` scripts leave it out; the file does
    not say).
- All of them answer the first question a few times before the clock starts, so no warm-up is in the file.
- A turn that raised an error is recorded as "ERROR" with the numbers of the turn before, even of the question before.
- The scripts append: a second run into the same file answers its questions twice, until ``reorg_answer_file`` drops
    one.
- Our own answer files: ``new_tokens`` may count one token more than ``accept_lengths``, the prefill's; -1 in ``idxs``
    is no step.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, NotRequired

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError, with_config
from typing_extensions import TypedDict

from koala_bench.common.reading import first_problem, json_lines, read_text
from koala_bench.errors import KoalaBenchError
from koala_bench.records.reading import read_run
from koala_bench.records.schema import answer_s

PREFILL_AND_DECODING = "prefill and decoding"
DECODING = "decoding"
_ERROR = "ERROR"
_MEASURED = ("idxs", "decoding_steps", "new_tokens", "wall_time", "accept_lengths")
_FORMAT = 'An answer is a line {"question_id": 81, "model_id": "...", "choices": [{"turns": ["..."], ...}]}.'


@dataclass(frozen=True)
class AnsweredTurn:
    """One answer; None if the file lacks the number, or the turn failed.

    Attributes:
        question_id, turn, repeat: its place; turn and repeat count from 0.
        tokens: new tokens produced in the seconds.
        steps: verification steps.
        committed: tokens that the steps committed; not always all of ``tokens``.
        seconds: see ``Trace.clock``.
        lengths: the committed tokens of each step, [steps].
        whole: tokens and seconds of the whole answer, the prefills of target and head included.
    """

    question_id: int
    turn: int
    repeat: int
    category: str | None
    text: str | None
    failed: bool
    tokens: int | None = None
    steps: int | None = None
    committed: int | None = None
    seconds: float | None = None
    lengths: tuple[int, ...] | None = None
    whole: tuple[int, float] | None = None

    @property
    def place(self) -> tuple[int, int]:
        """(question_id, turn)."""
        return self.question_id, self.turn


@dataclass(frozen=True)
class Trace:
    """The answers of one system from one file.

    Attributes:
        system: the file's ``model_id``, or target and method of a record.
        form: the format, and the fields by which it was recognised.
        length_is: how the acceptance length is defined here; None if the file has no steps.
        clock: what the seconds cover, ``PREFILL_AND_DECODING`` or ``DECODING``; None if the file has none.
        remarks: peculiarities of the file, one sentence each.
    """

    path: Path
    system: str
    form: str
    length_is: str | None
    clock: str | None
    turns: tuple[AnsweredTurn, ...]
    remarks: tuple[str, ...] = ()


def vanilla_stem(system: str) -> str | None:
    """What stands before the word vanilla, base or baseline in the name of a system; None without such a word."""
    found = re.search(r"(?<![a-z0-9])(vanilla|baseline|base)(?![a-z0-9])", system.lower())
    return system[: found.start()] if found else None


def is_vanilla(trace: Trace) -> bool:
    """Whether a trace is of vanilla decoding: its name says so, and no turn has more tokens than steps."""
    counts = ((turn.committed, turn.steps) for turn in trace.turns)
    more = any(committed is not None and steps is not None and committed > steps for committed, steps in counts)
    return vanilla_stem(trace.system) is not None and not more


def with_categories(trace: Trace, categories: Mapping[int, str]) -> Trace:
    """The trace with the categories of a question file in those turns that have none."""
    turns = (replace(turn, category=turn.category or categories.get(turn.question_id)) for turn in trace.turns)
    return replace(trace, turns=tuple(turns))


def read_traces(path: Path, vanilla: bool = False) -> list[Trace]:
    """Read an answer file, which gives one trace, or a run record, which gives one per method.

    Args:
        vanilla: the file is known to be of vanilla decoding, whatever its name.

    Raises:
        KoalaBenchError: the file is missing, unreadable, empty, not UTF-8 or of another kind, or a line is wrong.
            The message names the file and the line.
    """
    content = read_text(path, "answer file", "Check the path.", "Name the .jsonl files inside it.")
    rows: list[tuple[int, dict[str, Any]]] = []
    for number, row in json_lines(path, content, "If a run was cut off while it wrote this line, remove it."):
        rows.append((number, row))
        if len(rows) == 1 and row.get("kind") in ("run", "turn", "end"):
            return _record(path)
    if not rows:
        raise KoalaBenchError(f"{path} has no answers: it is empty.", _FORMAT)
    return [_answers(path, rows, vanilla)]


def read_all(
    files: Sequence[Path], baseline: Path | None = None, categories: Mapping[int, str] | None = None
) -> tuple[list[Trace], Trace | None]:
    """The traces of several files, and that of the baseline, which comes first if it is none of them.

    Args:
        baseline: file of vanilla decoding.
        categories: by question id, for traces that have none of their own.

    Raises:
        KoalaBenchError: a file is named twice, the baseline has no vanilla decoding, or see ``read_traces``.
    """
    seen: set[Path] = set()
    for path in files:
        if path.resolve() in seen:
            raise KoalaBenchError(f"{path} is named twice.", "Name each file once.")
        seen.add(path.resolve())
    apart = [baseline] if baseline is not None and baseline.resolve() not in seen else []
    traces, chosen = [], None
    for path in [*apart, *files]:
        named = baseline is not None and path.resolve() == baseline.resolve()
        found = [with_categories(trace, categories or {}) for trace in read_traces(path, vanilla=named)]
        if named:
            fit = found if len(found) == 1 else [trace for trace in found if is_vanilla(trace)]
            if len(fit) != 1:
                raise KoalaBenchError(f"The record {path} has no vanilla decoding.", "Name another --baseline.")
            chosen = fit[0]
        traces += [chosen] if path in apart and chosen is not None else found
    return traces, chosen


# ---------------------------------------------------------------------------------------------- lines


def _bad(path: Path, number: int, problem: str, remedy: str = _FORMAT) -> KoalaBenchError:
    return KoalaBenchError(f"{path}, line {number}: {problem}.", remedy)


_STRICT = ConfigDict(extra="ignore", strict=True, allow_inf_nan=False)
_Count = Annotated[int, Field(ge=0)]


@with_config(_STRICT)
class _Choice(TypedDict):
    turns: Annotated[list[str], Field(min_length=1)]
    idxs: NotRequired[list[Annotated[int, Field(ge=-1)]]]
    decoding_steps: NotRequired[list[_Count]]
    new_tokens: NotRequired[list[_Count]]
    wall_time: NotRequired[list[Annotated[float, Field(ge=0)]]]
    accept_lengths: NotRequired[list[_Count]]


@with_config(_STRICT)
class _Answer(TypedDict):
    question_id: int
    model_id: Annotated[str, Field(min_length=1)]
    choices: Annotated[list[_Choice], Field(min_length=1)]
    category: NotRequired[str | None]
    tstamp: NotRequired[float]


_ANSWER = TypeAdapter(_Answer)


def _answer(path: Path, number: int, row: dict[str, Any]) -> _Answer:
    """The line as an answer, with each list as long as it has to be."""
    if "choices" not in row and "turns" in row:
        remedy = "Name the file of answers, which has 'choices'; --questions takes the questions."
        raise _bad(path, number, "a question, not an answer", remedy)
    if "choices" not in row:
        fault = f"unknown format: there are no 'choices' (fields: {', '.join(list(row)[:5]) or 'none'})"
        raise _bad(path, number, fault, "Name answers of FastChat's format, or a run record.")
    try:
        answer = _ANSWER.validate_python(row)
    except ValidationError as error:
        raise _bad(path, number, first_problem(error)) from error
    for choice in answer["choices"]:
        values, turns = dict(choice), len(choice["turns"])
        for name in _MEASURED[:-1]:
            if name in values and len(values[name]) != turns:  # type: ignore[arg-type]
                fault = f"'{name}' has {len(values[name])} numbers for {turns} turns"  # type: ignore[arg-type]
                raise _bad(path, number, fault, "It has one a turn.")
        if "idxs" in choice and choice.get("decoding_steps", _by_index(choice)) != _by_index(choice):
            raise _bad(path, number, "'decoding_steps' is not idxs + 1", "Remove the field that is wrong.")
    return answer


# ---------------------------------------------------------------------------------------------- answer files


def _form(fields: Collection[str]) -> str:
    if {"idxs", "decoding_steps"} <= set(fields):
        name = "koala-bench's answers"
    elif "decoding_steps" in fields or "accept_lengths" in fields:
        name = "Spec-Bench"
    else:
        name = "Medusa or EAGLE" if "idxs" in fields else "FastChat"
    return f"{name} ({', '.join(fields) or 'turns alone'})"


def _fields_of(choice: _Choice) -> list[str]:
    return [name for name in _MEASURED if name in choice]


def _checked(path: Path, rows: list[tuple[int, dict[str, Any]]]) -> list[_Answer]:
    """The answers: of one model, each question once, all with the same fields, and each with a positive time."""
    answers: list[_Answer] = []
    line_of: dict[int, int] = {}
    timeless: KoalaBenchError | None = None
    for number, row in rows:
        answer = _answer(path, number, row)
        question, first = answer["question_id"], answers[0] if answers else answer
        if question in line_of:
            remedy = "Keep one of the two; a second run into the same file is appended to the first."
            raise _bad(path, number, f"question {question} was answered in line {line_of[question]} already", remedy)
        line_of[question] = number
        if answer["model_id"] != first["model_id"]:
            fault = f"of model '{answer['model_id']}', but line {rows[0][0]} is of '{first['model_id']}'"
            raise _bad(path, number, fault, "Split the file by model.")
        for choice in answer["choices"]:
            if different := set(_fields_of(choice)) ^ set(_fields_of(first["choices"][0])):
                fault = f"'{min(different)}' is in some answers and not in others"
                raise _bad(path, number, fault, "Split the file: its answers are of two formats.")
            if timeless is None and 0 in (times := choice.get("wall_time", [])):
                fault = f"'wall_time' of turn {times.index(0) + 1} is 0"
                timeless = _bad(path, number, fault, "No answer takes no time; remove the line.")
        answers.append(answer)
    if timeless is not None and any(any(choice["wall_time"]) for each in answers for choice in each["choices"]):
        raise timeless
    return answers


def _answers(path: Path, rows: list[tuple[int, dict[str, Any]]], vanilla: bool) -> Trace:
    answers = _checked(path, rows)
    choices = [choice for answer in answers for choice in answer["choices"]]
    fields, system = _fields_of(choices[0]), " ".join(answers[0]["model_id"].split())
    remarks: list[str] = []

    has_steps = "idxs" in fields or "decoding_steps" in fields
    steps_are = "decoding_steps" if "decoding_steps" in fields else "(idxs + 1)"
    # Upstream's scripts leave 0 where they do not count.
    has_tokens = "new_tokens" in fields and any(any(choice["new_tokens"]) for choice in choices)
    has_times = "wall_time" in fields and any(any(choice["wall_time"]) for choice in choices)
    has_lengths = has_steps and "accept_lengths" in fields
    misfits = sum(sum(_steps(choice)) != len(choice["accept_lengths"]) for choice in choices) if has_lengths else 0
    has_lengths = has_lengths and not misfits
    one_a_step = has_steps and not has_tokens and not has_lengths and (vanilla or vanilla_stem(system) is not None)
    if misfits:
        remarks.append(
            f"accept_lengths has another number of steps than decoding_steps in {misfits} of {len(choices)} answers and"
            " is not used."
        )
    if "new_tokens" in fields and not has_tokens:
        counted = f"vanilla decoding makes one token a step, so {steps_are.strip('()')} counts them"
        said = counted if one_a_step else "the tokens are not known"
        remarks.append(f"new_tokens is 0 throughout (not filled): {said}.")
    if "wall_time" in fields and not has_times:
        remarks.append("wall_time is 0 throughout (not filled).")

    turns: list[AnsweredTurn] = []
    recorded_tokens = recorded_steps = 0  # failed turns included
    for answer in answers:
        for repeat, choice in enumerate(answer["choices"]):
            start = 0
            for index, (text, count) in enumerate(zip(choice["turns"], _steps(choice), strict=True)):
                steps = count if has_steps else None
                lengths = tuple(choice["accept_lengths"][start : start + count]) if has_lengths else None
                start += count
                tokens = choice["new_tokens"][index] if has_tokens else steps if one_a_step else None
                committed = tokens if lengths is None else sum(lengths)
                recorded_tokens, recorded_steps = recorded_tokens + (committed or 0), recorded_steps + (steps or 0)
                seconds = choice["wall_time"][index] if has_times else None
                place = (answer["question_id"], index, repeat, answer.get("category") or None)
                whole = None if tokens is None or seconds is None else (tokens, seconds)
                one = AnsweredTurn(*place, text, False, tokens, steps, committed, seconds, lengths, whole)
                turns.append(one if text != _ERROR else AnsweredTurn(*place, None, True))
    if failed := sum(turn.failed for turn in turns):
        a_step = recorded_tokens / recorded_steps if recorded_tokens and recorded_steps else None
        with_them = f"; with them the file has {a_step:.3f} tokens a step" if a_step else ""
        repeated = " with the numbers of the turn before" if fields else ""
        remarks.append(
            f"{failed} of {len(turns)} turns failed (recorded as {_ERROR}{repeated}) and"
            f" {'is' if failed == 1 else 'are'} left out{with_them}."
        )
    # Parts of a run that are days apart may be from different machines.
    stamps = [answer["tstamp"] for answer in answers if "tstamp" in answer]
    taken, span = sum(turn.seconds or 0.0 for turn in turns), max(stamps, default=0.0) - min(stamps, default=0.0)
    if taken and span >= max(10 * taken, 86_400):
        remarks.append(
            f"The answers were not written in one sitting: their time stamps span {span / 86_400:.0f} days, the answers"
            f" took {taken / 3600:.1f} hours."
        )
    length_is = "1 by definition, vanilla decoding" if one_a_step else None
    if not one_a_step and has_steps and (has_lengths or has_tokens):
        length_is = "mean of accept_lengths" if has_lengths else f"new_tokens / {steps_are}"
    clock = PREFILL_AND_DECODING if has_times else None
    return Trace(path, system, _form(fields), length_is, clock, tuple(turns), tuple(remarks))


def _by_index(choice: _Choice) -> list[int]:
    """Steps of each turn from the index of its last one; zeros where there is none."""
    return [index + 1 for index in choice.get("idxs", [-1] * len(choice["turns"]))]


def _steps(choice: _Choice) -> list[int]:
    return choice["decoding_steps"] if "decoding_steps" in choice else _by_index(choice)


# ---------------------------------------------------------------------------------------------- run records


def _record(path: Path) -> list[Trace]:
    run = read_run(path)
    target = run.header["target"]["name"].rpartition("/")[2]
    remarks = () if run.finished else ("The run is not finished.",)
    form = "koala-bench's run record (accepted, decode_s, prefill_s)"
    traces = []
    for method in run.methods:
        turns = []
        for turn in run.turns_of(method):
            place = (turn["question_id"], turn["turn"], turn["repeat"], turn["category"], turn["text"])
            if turn["accepted"] is None or turn["new_token_ids"] is None:
                turns.append(AnsweredTurn(*place, True))
                continue
            lengths = tuple(count + 1 for count in turn["accepted"])
            whole = len(turn["new_token_ids"]), answer_s(turn)
            # A prefill token that belongs to no step is left out: decode_s does not include it.
            tokens, steps = sum(lengths), len(lengths)
            turns.append(AnsweredTurn(*place, False, tokens, steps, tokens, turn["decode_s"], lengths, whole))
        traces.append(Trace(path, f"{target}-{method}", form, "mean of accepted + 1", DECODING, tuple(turns), remarks))
    return traces
