"""Measuring methods: every question is answered by all of them in turn, so that drift of the machine cancels.

Vanilla decoding is one of the methods and runs through the same loop, cache, dtype and stopping rule. The order of the
methods is drawn anew for every prompt. Every method is given the same prompts: the second turn shows vanilla's first
answer.
"""

from __future__ import annotations

import gc
import hashlib
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter

from koala_bench.common.draft_vocabulary import BUFFER
from koala_bench.common.process_group import Team, find_team
from koala_bench.common.progress import progress, say
from koala_bench.common.provenance import code_state
from koala_bench.decoding.acceptance import GREEDY, Rule, SpeculativeSampling, TypicalAcceptance
from koala_bench.decoding.hybrid import Hybrid
from koala_bench.decoding.loop import VANILLA_TREE, Decoded, Vanilla, capacity_for, decode, fits
from koala_bench.decoding.sampling import Sampling
from koala_bench.decoding.stops import without_end
from koala_bench.dialogues.encoding import ChatTemplate, encode_prompt
from koala_bench.dialogues.questions import Question, find_questions, questions_sha256, read_questions
from koala_bench.engine.cache import TreeCache
from koala_bench.engine.devices import machine
from koala_bench.engine.loading.targets import fingerprint
from koala_bench.engine.target import Target
from koala_bench.errors import KoalaBenchError
from koala_bench.evaluation.order import drawn_order
from koala_bench.evaluation.recording import RecordWriter, open_record
from koala_bench.evaluation.shards import merge_parts, place_for
from koala_bench.heads import DraftHead
from koala_bench.presets import EvaluationPreset, MethodPreset, Preset
from koala_bench.records.reading import Run, read_run
from koala_bench.records.schema import (
    SCHEMA,
    AcceptanceInfo,
    MeasureInfo,
    MethodInfo,
    RunHeader,
    TrainingInfo,
    TreeInfo,
    TurnLine,
    TypicalInfo,
)
from koala_bench.registry import OBJECTIVES, installed, load
from koala_bench.training.checkpoints import load_head, read_manifest
from koala_bench.training.experiment import VANILLA, first_head, free_head, methods_with_heads
from koala_bench.tree import Template, load_template

_CACHE_ROUNDING = 256  # rows; a cache that grows in steps serves many prompts


@dataclass(frozen=True)
class Method:
    """A method ready to decode."""

    name: str
    head: DraftHead
    template: Template
    info: MethodInfo


def _seen_from_here(place: Path) -> str:
    """A folder below the working one by its relative path, however it was named: where that one lies is this machine's
    business.
    """
    try:
        return str(place.absolute().relative_to(Path.cwd()))
    except ValueError:
        return str(place)


def load_methods(preset: Preset, names: Sequence[str], target: Target, heads: Path) -> list[Method]:
    """Load the trained head of every method, vanilla first.

    Raises:
        KoalaBenchError: a head is not trained, damaged or of another target, or cannot fill its tree.
    """
    nothing: MethodInfo = {
        "name": VANILLA,
        "head": None,
        "layers": 0,
        "adversarial": False,
        "parameters": 0,
        "tree": _tree(VANILLA_TREE),
        "checkpoint": None,
        "weights_sha256": None,
        "training": None,
        "typical": None,
        "lossless": True,
    }
    methods = [Method(VANILLA, Vanilla(), VANILLA_TREE, nothing)]
    prints = fingerprint(target)
    for name in methods_with_heads(preset, names):
        wanted = preset.method(name)
        template = load_template(wanted.tree)
        if (free := free_head(wanted, target)) is not None:
            method = _free_method(name, wanted, free, template, target, preset.evaluation)
            methods.append(_with_first(method, wanted, target))
            continue
        place = heads / preset.trained_as(name)
        head, config, weights = load_head(place, target, wanted.draft_vocabulary)
        drafted = getattr(head, BUFFER, None)
        trained_on, training = _training(place)
        if trained_on not in (None, prints["weights_sha256"]):
            say(
                f"The head in {place} was trained on other weights than those of {target.name}: its drafts will be"
                " worse than they could be."
            )
        template.check(depth=head.max_depth, candidates=target.config.vocab_size if drafted is None else len(drafted))
        info: MethodInfo = {
            "name": name,
            "head": config["head"],
            "layers": config["layers"],
            "adversarial": _learns(config["objective"]),
            "parameters": sum(p.numel() for p in head.parameters()),
            "tree": _tree(template, getattr(head, "dynamic", False)),
            "checkpoint": _seen_from_here(place),
            "weights_sha256": weights,
            "training": training,
            "typical": _typical(name, wanted, preset.evaluation),
            "lossless": wanted.typical is None,
        }
        if config["objective"] is not None:
            info["objective"] = config["objective"]
        if drafted is not None:
            info["draft_vocabulary"] = len(drafted)
        methods.append(_with_first(Method(name, head, template, info), wanted, target))
    return methods


def _learns(objective: str | None) -> bool:
    """Whether an objective has parameters that were trained against the head; of one that is not installed here we know
    no better.
    """
    if objective is None or (":" not in objective and objective not in installed(OBJECTIVES)):
        return objective is not None
    return bool(getattr(load(OBJECTIVES, objective), "learns", True))


def _with_first(method: Method, preset: MethodPreset, target: Target) -> Method:
    """The method with the head before its own that its preset names, if any."""
    first = first_head(preset, target)
    if first is None or preset.first is None:
        return method
    templates = load_template(preset.first.tree), method.template
    head = Hybrid(first, method.head, templates)
    tree: TreeInfo = {
        "name": " or ".join(template.name for template in templates),
        "nodes": head.template.nodes,
        "depth": max(template.depth for template in templates),
        "parents": None,
    }
    return replace(method, head=head, template=head.template, info={**method.info, "tree": tree})


def _free_method(
    name: str, preset: MethodPreset, head: DraftHead, template: Template, target: Target, evaluation: EvaluationPreset
) -> Method:
    """A method that has nothing to train, hence nothing to load."""
    template.check(depth=head.max_depth, candidates=target.config.vocab_size)
    info: MethodInfo = {
        "name": name, "head": preset.head, "layers": preset.layers, "adversarial": False, "parameters": getattr(head, "drafting_parameters", 0),
        "tree": _tree(template, getattr(head, "dynamic", False)),
        "checkpoint": None, "weights_sha256": None, "training": None,
        "typical": _typical(name, preset, evaluation), "lossless": preset.typical is None,
    }  # fmt: skip
    return Method(name, head, template, info)


def _tree(template: Template, dynamic: bool = False) -> TreeInfo:
    parents = None if dynamic or template.dynamic else list(template.shape.parents)
    return {"name": template.name, "nodes": template.nodes, "depth": template.depth, "parents": parents}


def _typical(name: str, preset: MethodPreset, evaluation: EvaluationPreset) -> TypicalInfo | None:
    if preset.typical is None:
        return None
    if evaluation.temperature == 0:
        raise KoalaBenchError(
            f"{name} accepts what is typical of a distribution, and temperature 0 has none.",
            "Give a --temperature such as 0.7.",
        )
    return {"threshold": preset.typical.threshold, "alpha": preset.typical.alpha}


def _acceptance(evaluation: EvaluationPreset) -> AcceptanceInfo:
    rule: Any = "speculative sampling" if evaluation.temperature else "greedy"
    return {"rule": rule, "temperature": evaluation.temperature, "top_k": evaluation.top_k, "top_p": evaluation.top_p}


def _training(folder: Path) -> tuple[str | None, TrainingInfo | None]:
    """Hash of the target that a head was trained on, and what a record keeps of its training; None for an imported
    head.

    Raises:
        KoalaBenchError: the manifest beside the head is damaged.
    """
    place = folder / "training.json"
    manifest = read_manifest(folder) if place.exists() else {}
    try:
        if manifest is None:
            raise ValueError("not a JSON object")
        weights: str | None = manifest["target"]["weights_sha256"] if "target" in manifest else None
        if "stream_sha256" not in manifest:
            return weights, None
        found = {name: manifest[name] for name in ("stream_sha256", "order_sha256", "steps", "tokens")}
        training = manifest["training"]
        found |= {name: training[name] for name in ("seed", "precision") if name in training}
        return weights, TypeAdapter(TrainingInfo).validate_python(found)
    except (ValueError, KeyError, TypeError) as error:  # pydantic's own is a ValueError
        raise KoalaBenchError(f"{place} is damaged.", "Train the head again.") from error


def select_questions(questions: Sequence[Question], per_category: int | None) -> list[Question]:
    """All questions, or the first few of each category in the order of the file."""
    taken: dict[str, int] = {}
    selected = []
    for question in questions:
        taken[question.category] = taken.get(question.category, 0) + 1
        if per_category is None or taken[question.category] <= per_category:
            selected.append(question)
    return selected


def _settled(
    preset: Preset, target: Target, template: ChatTemplate, methods: Sequence[MethodInfo]
) -> dict[str, str | int | None]:
    """What settings that are left open came to: those of the target on this machine, those of training in the heads."""
    wanted = preset.target
    found: dict[str, str | int | None] = {}
    if wanted.threads is None and target.device.type == "cpu":
        found["target.threads"] = torch.get_num_threads()
    came_to = {
        "device": str(target.device), "dtype": str(target.dtype).removeprefix("torch."), "engine": target.engine,
        "chat_template": template.name,
    }  # fmt: skip
    found |= {f"target.{key}": value for key, value in came_to.items() if getattr(wanted, key) == "auto"}
    if wanted.template_date is None and template.date is not None:
        found["target.template_date"] = template.date.isoformat()
    trained = {each["training"].get("precision") for each in methods if each["training"] is not None}
    if preset.training.precision == "auto" and len(trained) == 1:
        found["training.precision"] = trained.pop()
    return found


def _header(
    preset: Preset,
    name: str,
    target: Target,
    template: ChatTemplate,
    methods: Sequence[Method],
    questions: Sequence[Question],
    source: tuple[str, Path],
    command: Sequence[str],
    team: Team,
    process: int,
) -> RunHeader:
    prints = fingerprint(target)
    evaluation = preset.evaluation
    measure: MeasureInfo = {"warmup": evaluation.warmup, "repeats": evaluation.repeats, "order": "drawn"}
    if process > 1:
        measure["process"] = process
    if team.size > 1:
        measure["processes"] = team.size
    header: RunHeader = {
        "kind": "run",
        "schema": SCHEMA,
        "run_id": uuid.uuid4().hex,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": list(command),
        "preset": {
            "name": name,
            "sha256": preset.sha256,
            "resolved": preset.model_dump(mode="json"),
            "settled": _settled(preset, target, template, [method.info for method in methods]),
        },
        "target": {
            "name": target.name,
            "path": target.name,  # as it was asked for; where a bundled target lies is this machine's business
            "config_sha256": prints["config_sha256"],
            "weights_sha256": prints["weights_sha256"],
            "parameters": target.parameters,
            "layers": target.layers,
            "dtype": str(target.dtype).removeprefix("torch."),
            "device": target.device.type,
            "attention": preset.target.attention,
        },
        "methods": [method.info for method in methods],
        "acceptance": _acceptance(preset.evaluation),
        "questions": {"name": source[0], "sha256": questions_sha256(source[1]), "count": len(questions)},
        "chat_template": {"name": template.name, "sha256": template.sha256},
        "limits": {"max_new_tokens": preset.evaluation.max_new_tokens, "stop_ids": list(target.stop_ids)},
        "seed": evaluation.seed,
        "measure": measure,
        "environment": machine(target.device),
        "code": code_state(),
    }
    if target.engine == "graph":
        header["target"]["engine"] = "graph"
    if target.stop_texts:
        header["limits"]["stop_texts"] = list(target.stop_texts)
    if target.ignored:
        header["target"]["ignored_settings"] = dict(target.ignored)
    return header


class _Session:
    """What the turns of a run share: target, template, limits, and a cache that grows when a prompt needs it."""

    def __init__(
        self, preset: Preset, target: Target, template: ChatTemplate, methods: Sequence[Method], process: int
    ) -> None:
        self.target, self.template, self.process = target, template, process
        self.methods = {method.name: method for method in methods}
        self.limit, self.evaluation, self.seed = (
            preset.evaluation.max_new_tokens,
            preset.evaluation,
            preset.evaluation.seed,
        )
        self.widest = max(method.template.nodes for method in methods)
        self.cache: TreeCache | None = None

    def prompt(self, turns: Sequence[str]) -> list[int]:
        assert self.target.tokenizer is not None
        return encode_prompt(self.template, self.target.tokenizer, turns)

    def fits(self, prompt: Sequence[int]) -> bool:
        """Whether an answer to a prompt goes into the target's context and, if it has one, its window."""
        return fits(self.target, len(prompt), self.limit, self.widest)

    def rule(self, method: Method, question: int, turn: int, repeat: int) -> Rule:
        """How a method accepts; what it draws at random follows from the seed and the place alone, so that resuming
        changes nothing.
        """
        if self.evaluation.temperature == 0:
            return GREEDY
        if (typical := method.info["typical"]) is not None:
            return TypicalAcceptance(
                self.evaluation.temperature, **typical, top_k=self.evaluation.top_k, top_p=self.evaluation.top_p
            )
        drawn = hashlib.sha256(f"{self.seed} {method.name} {question} {turn} {repeat}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(drawn[:7], "little"))
        return SpeculativeSampling(
            Sampling(self.evaluation.temperature, self.evaluation.top_k, self.evaluation.top_p), generator
        )

    def answer(self, method: Method, prompt: Sequence[int], rule: Rule) -> Decoded:
        needed = capacity_for(len(prompt), self.limit, self.widest, self.target.max_positions)
        if self.cache is None or self.cache.capacity < needed:
            self.cache = self.target.new_cache(needed, _CACHE_ROUNDING)
        return decode(
            self.target, method.head, method.template, prompt, self.limit, self.target.stop_ids, self.cache, rule=rule
        )

    def text(self, tokens: Sequence[int]) -> str:
        assert self.target.tokenizer is not None
        text = str(self.target.tokenizer.decode(list(tokens), skip_special_tokens=True))
        return without_end(text, self.target.stop_texts).strip()

    def top2_gap(self, prompt: Sequence[int], tokens: Sequence[int]) -> float:
        """How far apart the target's two best next tokens are after ``tokens``, in logits."""
        ids = torch.tensor([*prompt, *tokens], device=self.target.device)
        logits, _ = self.target.prefill(ids, self.target.new_cache(len(ids)))
        best = logits.double().topk(2).values
        return float(best[0] - best[1])


def _unmeasured(method: str, question: Question, turn: int, repeat: int, prompt: Sequence[int] | None) -> TurnLine:
    """A turn line with its place filled in and nothing else."""
    return {
        "kind": "turn",
        "method": method,
        "question_id": question.question_id,
        "category": question.category,
        "turn": turn,
        "repeat": repeat,
        "prompt_tokens": len(prompt) if prompt is not None else None,
        "new_token_ids": None,
        "text": None,
        "stop": None,
        "accepted": None,
        "drafted_depth": None,
        "kept_node": None,
        "prefill_s": None,
        "draft_prefill_s": None,
        "decode_s": None,
        "draft_s": None,
        "verify_s": None,
        "distance": None,
        "first_difference": None,
        "error": None,
    }


def _line(
    session: _Session,
    method: Method,
    question: Question,
    turn: int,
    repeat: int,
    prompt: Sequence[int],
    answer: Decoded,
) -> TurnLine:
    return {
        **_unmeasured(method.name, question, turn, repeat, prompt),
        "new_token_ids": answer.tokens,
        "text": session.text(answer.tokens),
        "stop": answer.stop,
        "accepted": answer.accepted,
        "drafted_depth": answer.drafted_depth,
        "kept_node": answer.kept_node if method.info["tree"] and method.info["tree"]["parents"] is not None else None,
        "prefill_s": answer.prefill_s,
        "draft_prefill_s": answer.draft_prefill_s,
        "decode_s": answer.decode_s,
        "draft_s": answer.draft_s,
        "verify_s": answer.verify_s,
        "distance": sum(answer.distances) / len(answer.distances) if answer.distances else None,
    }


def _failure(
    method: str, question: Question, turn: int, repeat: int, prompt: Sequence[int] | None, error: Exception
) -> TurnLine:
    first = str(error).strip().splitlines()
    return {
        **_unmeasured(method, question, turn, repeat, prompt),
        "error": {"type": type(error).__name__, "message": first[0] if first else ""},
    }


def _try(
    session: _Session, method: Method, question: Question, turn: int, repeat: int, prompt: Sequence[int]
) -> TurnLine:
    """One answer, or the record of why there is none: a question too long or too large must not end the run."""
    try:
        known = session.target.recordings
        answer = session.answer(method, prompt, session.rule(method, question.question_id, turn, repeat))
        if (
            session.target.recordings > known
        ):  # making one takes longer than an answer, and is no part of it: the same answer again, from the same draws
            answer = session.answer(method, prompt, session.rule(method, question.question_id, turn, repeat))
        return _line(session, method, question, turn, repeat, prompt, answer)
    except (KoalaBenchError, RuntimeError) as error:  # torch reports a lack of memory as a RuntimeError
        session.cache = None
        return _failure(method.name, question, turn, repeat, prompt, error)


def _compare(session: _Session, line: TurnLine, vanilla: TurnLine, prompt: Sequence[int]) -> None:
    """Note where an answer leaves vanilla's."""
    mine, theirs = line["new_token_ids"], vanilla["new_token_ids"]
    if mine is None or theirs is None or mine == theirs:
        return
    position = next(
        (i for i, (a, b) in enumerate(zip(mine, theirs, strict=False)) if a != b), min(len(mine), len(theirs))
    )
    if position == min(len(mine), len(theirs)):
        return  # one answer ended where the other goes on: no two tokens to compare, and no gap that could explain it
    gap = session.top2_gap(prompt, theirs[:position])
    line["first_difference"] = {
        "position": position,
        "token": mine[position],
        "vanilla_token": theirs[position],
        "top2_gap": gap,
    }


def _ask(
    session: _Session,
    writer: RecordWriter,
    kept: dict[tuple[str, int, int, int], TurnLine],
    question: Question,
    repeat: int,
    advance: Any,
) -> None:
    """All turns of one question by all methods, except what the record has already."""
    answers: list[str] = []
    for number in range(len(question.turns)):
        prompt = session.prompt(question.asked(answers))
        key = (question.question_id, number, repeat)
        order = [session.methods[name] for name in drawn_order([*session.methods], session.seed, *key, session.process)]
        lines = {name: kept[(name, *key)] for name in (m.name for m in order) if (name, *key) in kept}
        fresh = [method for method in order if method.name not in lines]
        gc.collect()
        for method in fresh:
            lines[method.name] = _try(session, method, question, number, repeat, prompt)
            advance(1, method.name)
        vanilla = lines[VANILLA]
        for method in fresh:
            if method.name != VANILLA and session.evaluation.temperature == 0:  # draws are not expected to be equal
                _compare(session, lines[method.name], vanilla, prompt)
            writer.append(lines[method.name])
        if vanilla["text"] is None:
            reason = KoalaBenchError("Vanilla decoding gave no answer to the turn before.", "")
            for later in range(number + 1, len(question.turns)):
                for name in session.methods:
                    if (name, question.question_id, later, repeat) not in kept:
                        writer.append(_failure(name, question, later, repeat, None, reason))
                        advance(1)
            return
        answers.append(vanilla["text"])


@contextmanager
def _settled_memory() -> Iterator[None]:
    """Collecting garbage between turns need not look again at what is loaded by now: a quarter of a second each time."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


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
    source = find_questions(preset.evaluation.questions, data_dir)
    questions = select_questions(read_questions(source[1]), preset.evaluation.limit)
    team = find_team(target.device)
    ready = load_methods(preset, methods, target, heads)
    with target.computing():
        header = _header(preset, name, target, template, ready, questions, source, command, team, process)
    started = time.perf_counter()
    path = place_for(record, team, len(questions))
    own = questions if path == record else [questions[place] for place in team.own(len(questions))]
    total = sum(len(question.turns) for question in own) * len(ready) * preset.evaluation.repeats
    with target.computing(), open_record(path, header) as writer:
        if writer.finished:
            say(f"Reusing the finished record {path}.")
        else:
            if writer.done:
                say(f"Resuming {path}: {len(writer.done)} of {total} turns are there.")
            kept = (
                {(t["method"], t["question_id"], t["turn"], t["repeat"]): t for t in read_run(path).turns}
                if writer.done
                else {}
            )
            session = _Session(preset, target, template, ready, process)
            shared = f", {len(own)} of them in this process" if len(own) < len(questions) else ""
            say(f"Decoding {len(questions)} questions{shared} with {', '.join(method.name for method in ready)} ...")
            _warm_up(session, questions, preset.evaluation.warmup)
            with _settled_memory(), progress("decode", total, "turns", len(kept)) as advance:
                for repeat in range(preset.evaluation.repeats):
                    for question in own:
                        _ask(session, writer, kept, question, repeat, advance)
            writer.finish(time.perf_counter() - started)
    merge_parts(record, team, questions, started)
    run = read_run(record)
    _check_failures(run)
    return run


def _warm_up(session: _Session, questions: Sequence[Question], times: int) -> None:
    """Answer the first question that fits with every method; what fails there would fail everywhere.

    Raises:
        KoalaBenchError: a method fails, and not for want of memory, which a shorter prompt may need less of.
    """
    prompts = ((question, session.prompt(question.asked())) for question in questions)
    first = next(((question, prompt) for question, prompt in prompts if session.fits(prompt)), None)
    if first is None:
        return  # all turns will say why
    question, prompt = first
    for _ in range(times):
        for method in session.methods.values():
            error = _try(session, method, question, 0, 0, prompt)["error"]
            if error is not None and "memory" not in error["message"]:
                raise KoalaBenchError(f"{method.name} cannot answer: {error['message']}", "Nothing was measured.")


def _check_failures(run: Run) -> None:
    """Say how many turns failed.

    Raises:
        KoalaBenchError: all of a method did.
    """
    for name in (method["name"] for method in run.header["methods"]):
        turns = [turn for turn in run.turns if turn["method"] == name]
        errors = [turn["error"] for turn in turns if turn["error"] is not None]
        if not errors:
            continue
        if len(errors) == len(turns):
            raise KoalaBenchError(
                f"{name}: no turn of {len(turns)} succeeded: {errors[0]['message']}",
                f"The failures are in {run.path}; correct what they say and choose another --out.",
            )
        say(f"{name}: {len(errors)} of {len(turns)} turns failed, the first with: {errors[0]['message']}")
