"""Run records: the one file that tables, figures and gates are made from.

A record is an append-only JSON-lines file: a ``run`` line that says what was measured, where and with which
code; a ``turn`` line per method, question, turn and repeat; an ``end`` line once everything is there. What is
written is validated first, so that a reader can rely on it; a reader still checks every line, because files
get edited and disks fail. The fields below are the file format: change one, and ``SCHEMA`` goes up by one.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Annotated, Any, Literal, Self

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError, with_config
from typing_extensions import TypedDict  # pydantic needs this one below Python 3.12

from koala_bench.errors import KoalaBenchError
from koala_bench.files import write_text

SCHEMA = 1

_STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
_Count = Annotated[int, Field(ge=0)]
_Seconds = Annotated[float, Field(ge=0)]

# (method, question_id, turn, repeat): a record holds each at most once.
Key = tuple[str, int, int, int]


@with_config(_STRICT)
class PresetInfo(TypedDict):
    """The settings of the run; ``sha256`` is the hash of what ``resolved`` says."""

    name: str
    sha256: str
    resolved: dict[str, Any]


@with_config(_STRICT)
class TargetInfo(TypedDict):
    """The frozen model. ``path`` is where it lay, and is not part of its identity; the hashes are."""

    name: str
    path: str
    config_sha256: str
    weights_sha256: str | None
    parameters: _Count
    layers: _Count
    dtype: str
    device: str
    attention: str


@with_config(_STRICT)
class TreeInfo(TypedDict):
    """A draft tree. ``nodes`` counts the root, ``depth`` is that of the deepest node (the root's is 0)."""

    name: str
    nodes: _Count
    depth: _Count


@with_config(_STRICT)
class MethodInfo(TypedDict):
    """A decoding method. ``vanilla`` has no head, no layers and a tree of the root alone."""

    name: str
    head: str | None
    layers: _Count
    adversarial: bool
    parameters: _Count  # trainable ones
    tree: TreeInfo | None
    checkpoint: str | None
    weights_sha256: str | None
    lossless: bool


@with_config(_STRICT)
class AcceptanceInfo(TypedDict):
    """The rule that decides which drafted tokens stay."""

    rule: str
    temperature: Annotated[float, Field(ge=0)]


@with_config(_STRICT)
class QuestionsInfo(TypedDict):
    """The question file."""

    name: str
    sha256: str
    count: _Count


@with_config(_STRICT)
class ChatTemplateInfo(TypedDict):
    """How turns became prompts."""

    name: str
    sha256: str


@with_config(_STRICT)
class LimitsInfo(TypedDict):
    """Where decoding stops."""

    max_new_tokens: Annotated[int, Field(ge=1)]
    stop_ids: list[int]


@with_config(_STRICT)
class MeasureInfo(TypedDict):
    """How often everything was run."""

    warmup: _Count
    repeats: Annotated[int, Field(ge=1)]


@with_config(_STRICT)
class Environment(TypedDict):
    """The machine and the versions of what determines tokens and times. Null means not installed or not known."""

    python: str
    platform: str
    cpu: str
    cores: _Count
    threads: _Count
    memory_bytes: _Count | None
    packages: dict[str, str | None]
    gpu: str | None
    driver: str | None


@with_config(_STRICT)
class CodeState(TypedDict):
    """The code that ran. ``commit`` and ``dirty`` are null where the package is not a checkout."""

    version: str | None
    commit: str | None
    dirty: bool | None


@with_config(_STRICT)
class RunHeader(TypedDict):
    """The first line of a record."""

    kind: Literal["run"]
    schema: int
    run_id: str
    created: str  # ISO 8601, UTC
    command: list[str]
    preset: PresetInfo
    target: TargetInfo
    methods: Annotated[list[MethodInfo], Field(min_length=1)]
    acceptance: AcceptanceInfo
    questions: QuestionsInfo
    chat_template: ChatTemplateInfo
    limits: LimitsInfo
    seed: int
    measure: MeasureInfo
    environment: Environment
    code: CodeState


@with_config(_STRICT)
class FirstDifference(TypedDict):
    """Where an answer leaves vanilla's: 0-based position, both tokens, the target's top-2 logit gap there."""

    position: _Count
    token: int
    vanilla_token: int
    top2_gap: float


@with_config(_STRICT)
class ErrorInfo(TypedDict):
    """Why a turn has no numbers."""

    type: str
    message: str


@with_config(_STRICT)
class TurnLine(TypedDict):
    """One answer of one method. A failed turn has ``error`` and nulls in place of everything measured.

    ``accepted[i]`` counts the draft tokens that step i settled, after cutting at the end of sequence and at the
    limit; a step settles one token more, the target's own. The steps together settle all of ``new_token_ids``, or
    all but the first where the prefill's token is no step's.
    ``drafted_depth[i]`` is the deepest draft level offered at that step. ``decode_s`` is the whole decode loop;
    ``draft_s`` and ``verify_s`` are the seconds of drafting and of the target's passes, null if the parts were not timed.
    """

    kind: Literal["turn"]
    method: str
    question_id: int
    category: str
    turn: _Count
    repeat: _Count
    prompt_tokens: _Count | None
    new_token_ids: Annotated[list[_Count], Field(min_length=1)] | None
    text: str | None
    stop: Literal["eos", "limit", "context"] | None
    accepted: list[_Count] | None
    drafted_depth: list[_Count] | None
    prefill_s: _Seconds | None
    decode_s: _Seconds | None
    draft_s: _Seconds | None
    verify_s: _Seconds | None
    first_difference: FirstDifference | None
    error: ErrorInfo | None


@with_config(_STRICT)
class EndLine(TypedDict):
    """The last line of a finished record. ``wall_s`` is that of the process that finished it."""

    kind: Literal["end"]
    status: Literal["finished"]
    turns: _Count
    wall_s: _Seconds


_HEADER = TypeAdapter(RunHeader)
_TURN = TypeAdapter(TurnLine)
_END = TypeAdapter(EndLine)

_MEASURED = ("new_token_ids", "text", "stop", "accepted", "drafted_depth", "prefill_s", "decode_s")
_MEASURED_SOMETIMES = ("draft_s", "verify_s", "first_difference")


@dataclass(frozen=True)
class Run:
    """A record as read.

    Attributes:
        path: the file.
        header: its first line.
        turns: its turn lines in the order of the file, failed ones included.
        finished: whether the end line is there.
    """

    path: Path
    header: RunHeader
    turns: list[TurnLine]
    finished: bool

    @property
    def methods(self) -> dict[str, MethodInfo]:
        """The methods by name, in the order of the header."""
        return {method["name"]: method for method in self.header["methods"]}

    def turns_of(self, method: str) -> list[TurnLine]:
        """The turn lines of a method, failed ones included."""
        return [turn for turn in self.turns if turn["method"] == method]


def key_of(turn: TurnLine) -> Key:
    """What identifies a turn within a record."""
    return turn["method"], turn["question_id"], turn["turn"], turn["repeat"]


# ---------------------------------------------------------------------------------------------- validation


def _complaint(error: ValidationError) -> str:
    first = error.errors(include_url=False)[0]
    place = ".".join(str(part) for part in first["loc"])
    return f"{place}: {first['msg']}" if place else first["msg"]


def _header_problem(header: Mapping[str, Any]) -> str | None:
    try:
        _HEADER.validate_python(header)
    except ValidationError as error:
        return _complaint(error)
    names = [method["name"] for method in header["methods"]]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        return f"methods: '{repeated[0]}' is listed twice"
    try:
        created = datetime.fromisoformat(header["created"])
    except ValueError:
        return "created: not an ISO 8601 time"
    return None if created.tzinfo else "created: has no time zone"


def _turn_problem(turn: Mapping[str, Any], methods: Mapping[str, object]) -> str | None:
    try:
        _TURN.validate_python(turn)
    except ValidationError as error:
        return _complaint(error)
    if turn["method"] not in methods:
        return f"method: '{turn['method']}' is not among the run's methods"
    if turn["error"] is not None:
        present = [name for name in (*_MEASURED, *_MEASURED_SOMETIMES) if turn[name] is not None]
        return f"{present[0]}: a failed turn has no numbers" if present else None
    missing = [name for name in ("prompt_tokens", *_MEASURED) if turn[name] is None]
    if missing:
        return f"{missing[0]}: is null, but the turn did not fail"
    accepted, offered, tokens = turn["accepted"], turn["drafted_depth"], len(turn["new_token_ids"])
    settled = sum(accepted) + len(accepted)
    if len(accepted) != len(offered):
        return f"drafted_depth: {len(offered)} steps, but accepted has {len(accepted)}"
    if tokens - settled not in (0, 1):
        return f"accepted: {len(accepted)} steps settle {settled} tokens, but new_token_ids has {tokens}"
    if any(count > depth for count, depth in zip(accepted, offered, strict=True)):
        return "accepted: more tokens than the draft was deep"
    if (turn["draft_s"] is None) != (turn["verify_s"] is None):
        return "draft_s, verify_s: one is null and the other is not"
    return None


# ---------------------------------------------------------------------------------------------- reading


def _damaged(path: Path, line: int, problem: str) -> KoalaBenchError:
    return KoalaBenchError(f"{path}:{line}: {problem}.", "Restore the record from a copy, or delete it and run the evaluation again.")


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise KoalaBenchError(f"Cannot read the run record {path}: {error.strerror or error}.", "Name the .jsonl file that an evaluation wrote.") from error


def _complete_lines(path: Path, content: bytes) -> tuple[list[dict[str, Any]], int]:
    """The JSON objects of the complete lines, and how many bytes of the file they take.

    A process that is killed while it writes leaves a last line without its end or with part of its text; such a
    line is left out. The same anywhere else is damage.
    """
    lines = content.split(b"\n")
    complete, length = lines[:-1], len(content) - len(lines[-1])
    objects: list[dict[str, Any]] = []
    for number, line in enumerate(complete, 1):
        try:
            value = json.loads(line)
        except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
            if number == len(complete) and number > 1:
                return objects, length - len(line) - 1
            raise _damaged(path, number, "not a line of JSON") from error
        if not isinstance(value, dict):
            raise _damaged(path, number, "not a JSON object")
        objects.append(value)
    return objects, length


def _checked_header(path: Path, header: dict[str, Any]) -> RunHeader:
    if header.get("kind") != "run":
        raise KoalaBenchError(f"{path} is not a run record: its first line is not a 'run' line.", "Name the .jsonl file that an evaluation wrote.")
    if header.get("schema") != SCHEMA:
        code = header.get("code")
        version = code.get("version") if isinstance(code, dict) else None
        raise KoalaBenchError(
            f"{path} has record schema {header.get('schema')}; this version reads schema {SCHEMA}.",
            f"Read it with koala-bench {version}, which wrote it, or run the evaluation again." if version else "Run the evaluation again with this version.",
        )
    problem = _header_problem(header)
    if problem:
        raise _damaged(path, 1, problem)
    return header  # type: ignore[return-value]


def _parse(path: Path, content: bytes) -> tuple[Run, int]:
    """The record in ``content`` and the length of its complete lines in bytes."""
    objects, length = _complete_lines(path, content)
    if not objects:
        raise KoalaBenchError(f"{path} is not a run record: it has no complete line.", "Name the .jsonl file that an evaluation wrote.")
    header = _checked_header(path, objects[0])
    methods = {method["name"]: None for method in header["methods"]}
    turns: list[TurnLine] = []
    seen: dict[Key, int] = {}
    finished = False
    for number, line in enumerate(objects[1:], 2):
        if finished:
            raise _damaged(path, number, "a line after the end line")
        if line.get("kind") == "end":
            try:
                _END.validate_python(line)
            except ValidationError as error:
                raise _damaged(path, number, _complaint(error)) from error
            if line["turns"] != len(turns):
                raise _damaged(path, number, f"the end line counts {line['turns']} turns, but there are {len(turns)}")
            finished = True
            continue
        problem = _turn_problem(line, methods)
        if problem:
            raise _damaged(path, number, problem)
        turn: TurnLine = line  # type: ignore[assignment]
        key = key_of(turn)
        if key in seen:
            raise _damaged(path, number, f"the same method, question, turn and repeat as line {seen[key]}")
        seen[key] = number
        turns.append(turn)
    return Run(path, header, turns, finished), length


def read_run(path: Path) -> Run:
    """Read a record, finished or not; a half-written last line is left out.

    Raises:
        KoalaBenchError: no such file, no run record, another schema version, or a damaged line (named).
    """
    return _parse(path, _read_bytes(path))[0]


def read_runs(paths: Sequence[Path]) -> list[Run]:
    """Read several records; see ``read_run``."""
    return [read_run(path) for path in paths]


# ---------------------------------------------------------------------------------------------- comparing headers

# What makes numbers comparable; the paths of files are left out because their hashes are in.
_EXPERIMENT = ("preset", "target", "methods", "acceptance", "questions", "chat_template", "limits", "seed", "measure")
_CIRCUMSTANCES = ("environment", "code")
_NOT_COMPARED = ("preset.resolved.", "target.path", "environment.platform", "environment.memory_bytes")


def _flat(value: Any, place: str) -> dict[str, Any]:
    if isinstance(value, dict):
        return {name: leaf for key, inner in value.items() for name, leaf in _flat(inner, f"{place}.{key}").items()}
    if isinstance(value, list):
        return {name: leaf for index, inner in enumerate(value) for name, leaf in _flat(inner, f"{place}.{index}").items()}
    return {place: value}


def differences(first: RunHeader, second: RunHeader, *, circumstances: bool = True) -> list[str]:
    """Names of the fields in which two runs are not comparable, e.g. ``limits.max_new_tokens``.

    Args:
        circumstances: compare the machine, the versions and the code too, without which times do not compare.
    """
    names = _EXPERIMENT + (_CIRCUMSTANCES if circumstances else ())
    left: dict[str, Any] = {}
    right: dict[str, Any] = {}
    for name in names:
        left |= _flat(first[name], name)  # type: ignore[literal-required]
        right |= _flat(second[name], name)  # type: ignore[literal-required]
    different = [place for place in left | right if (place in left) != (place in right) or left[place] != right[place]]
    return [place for place in different if not place.startswith(_NOT_COMPARED) and not place.endswith(".checkpoint")]


# ---------------------------------------------------------------------------------------------- writing


def _line(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode() + b"\n"


class RecordWriter:
    """Appends to one record; made by ``open_record``. Use it as a context manager.

    Attributes:
        header: the header in the file, which after a resume is that of the first start.
        done: keys of the turns that are there, failed ones included.
        finished: whether the end line is there; then nothing more can be written.
        resumed: whether the file was there before.
    """

    def __init__(self, run: Run, handle: FileIO, resumed: bool) -> None:
        self.path = run.path
        self.header = run.header
        self.done: set[Key] = {key_of(turn) for turn in run.turns}
        self.finished = run.finished
        self.resumed = resumed
        self._handle = handle
        self._methods = run.methods

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._handle.close()

    def append(self, turn: TurnLine) -> None:
        """Write one turn; it is with the operating system when this returns.

        Raises:
            ValueError: the turn does not have the form of a record, is there already, or the record is finished.
            KoalaBenchError: the disk is full.
        """
        problem = _turn_problem(turn, self._methods)
        if problem:
            raise ValueError(f"not a turn line: {problem}")
        if self.finished or key_of(turn) in self.done:
            raise ValueError(f"{key_of(turn)}: " + ("the record is finished" if self.finished else "is in the record already"))
        self._write(turn)
        self.done.add(key_of(turn))

    def finish(self, wall_s: float) -> None:
        """Write the end line. ``wall_s`` is the time this process took, in seconds."""
        if self.finished:
            raise ValueError("the record is finished already")
        end: EndLine = {"kind": "end", "status": "finished", "turns": len(self.done), "wall_s": wall_s}
        self._write(_END.validate_python(end))
        os.fsync(self._handle.fileno())
        self.finished = True

    def _write(self, line: Mapping[str, Any]) -> None:
        start = os.fstat(self._handle.fileno()).st_size
        try:
            # Unbuffered, in one call as a rule: a kill leaves at most one half-written line, the last.
            content = memoryview(_line(line))
            while content:
                content = content[self._handle.write(content) :]
        except OSError as error:
            self._handle.truncate(start)
            reason = error.strerror or error
            raise KoalaBenchError(f"Cannot write {self.path}: {reason}.", "Free space and start again; it goes on after the last complete turn.") from error


def open_record(path: Path, header: RunHeader) -> RecordWriter:
    """Start a record, or go on with the one that is there.

    A half-written last line of an interrupted run is cut off. An unfinished record is continued only by the same
    experiment on the same machine with the same code, since its times are compared with one another; a finished
    one is handed back for reuse if the experiment is the same.

    Args:
        header: what is about to run; written if the file is new, else compared with the one there.

    Raises:
        ValueError: the header does not have the form of a record.
        KoalaBenchError: the file cannot be written, is damaged, or belongs to another run (the fields are named).
    """
    problem = _header_problem(header)
    if problem or header["schema"] != SCHEMA:
        raise ValueError(f"not a run line: {problem or 'schema'}")
    content = _read_bytes(path) if path.exists() else b""
    # Without one line end not even the header was completed, so there is nothing to go on with.
    resumed = b"\n" in content
    if not resumed:
        write_text(path, _line(header).decode())
        run, length = Run(path, header, [], False), None
    else:
        run, length = _parse(path, content)
        different = differences(run.header, header, circumstances=not run.finished)
        if different:
            more = f" and {len(different) - 3} more" if len(different) > 3 else ""
            raise KoalaBenchError(
                f"{path} holds another run; they differ in {', '.join(different[:3])}{more}.",
                "Choose another folder with --out, or delete the record to start over.",
            )
    try:
        handle = FileIO(path, "a")
        if length is not None and length < len(content):
            # Truncation is one system call: the file has either its old length or the new one.
            handle.truncate(length)
    except OSError as error:
        raise KoalaBenchError(f"Cannot write {path}: {error.strerror or error}.", "Make the file writable or choose another folder with --out.") from error
    return RecordWriter(run, handle, resumed)


# ---------------------------------------------------------------------------------------------- provenance

# What determines tokens and times; the libraries that only draw tables and figures are not of interest here.
_PACKAGES = ("torch", "transformers", "tokenizers", "accelerate", "safetensors", "numpy", "fschat")


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass  # not Linux
    return platform.processor() or platform.machine()


def environment(threads: int, gpu: str | None = None, driver: str | None = None) -> Environment:
    """Describe this machine and the installed versions, without importing any of the packages.

    Args:
        threads: threads that the target computes with (``torch.get_num_threads()``).
        gpu, driver: names of the device and its driver, if there is one; the caller asks torch.
    """
    known = os.sysconf_names if hasattr(os, "sysconf_names") else {}
    has_memory = "SC_PAGE_SIZE" in known and "SC_PHYS_PAGES" in known
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 0,
        "threads": threads,
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if has_memory else None,
        "packages": {name: _version(name) for name in _PACKAGES},
        "gpu": gpu,
        "driver": driver,
    }


def code_state(package_dir: Path) -> CodeState:
    """Version, commit and whether tracked files differ from it, for the checkout that ``package_dir`` is part of.

    ``commit`` and ``dirty`` are null if the package is installed elsewhere, even below some other project's
    checkout (a virtual environment often is), and if git is missing.
    """
    # Git's own variables would point it at another repository, e.g. while a commit hook runs.
    variables = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}

    def git(*arguments: str) -> str | None:
        try:
            answer = subprocess.run(["git", "-C", str(package_dir), *arguments], capture_output=True, text=True, env=variables, check=False)
        except OSError:
            return None
        return answer.stdout.strip() if answer.returncode == 0 else None

    version = _version("koala-bench")
    commit = git("rev-parse", "HEAD") if git("ls-files", "--error-unmatch", "__init__.py") is not None else None
    changes = git("status", "--porcelain", "--untracked-files=no") if commit else None
    return {"version": version, "commit": commit, "dirty": None if changes is None else changes != ""}


# ---------------------------------------------------------------------------------------------- FastChat answers


def write_fastchat_answers(run: Run, folder: Path) -> list[Path]:
    """Write the answers as FastChat's tools read them, one ``<target>-<method>.jsonl`` per method.

    A repeat is a choice. Beside FastChat's fields a choice has those that Medusa (``idxs``, the 0-based index of
    the last step; ``new_tokens``; ``wall_time``, prefill and decode in seconds) and Spec-Bench
    (``decoding_steps``, ``accept_lengths``: tokens per step over all turns) read. Choices with a failed or a
    missing turn are left out. Ids and time stamps follow from the record, so writing again gives the same bytes.

    Returns:
        The files written.
    """
    header = run.header
    created = datetime.fromisoformat(header["created"]).timestamp()
    # Every method is asked the same turns, so the longest conversation seen is the whole one.
    asked: dict[int, int] = {}
    for turn in run.turns:
        asked[turn["question_id"]] = max(asked.get(turn["question_id"], 0), turn["turn"] + 1)
    written = []
    for method in run.methods:
        model_id = f"{header['target']['name'].rpartition('/')[2]}-{method}"
        answers: dict[int, dict[int, list[TurnLine]]] = {}
        categories: dict[int, str] = {}
        for turn in sorted(run.turns_of(method), key=key_of):
            if turn["error"] is None:
                answers.setdefault(turn["question_id"], {}).setdefault(turn["repeat"], []).append(turn)
                categories[turn["question_id"]] = turn["category"]
        lines = []
        for question, repeats in answers.items():
            choices = [_choice(repeat, turns) for repeat, turns in repeats.items() if len(turns) == asked[question]]
            if choices:
                answer = {
                    "question_id": question,
                    "category": categories[question],
                    "answer_id": uuid.uuid5(uuid.NAMESPACE_URL, f"koala-bench/{header['run_id']}/{method}/{question}").hex,
                    "model_id": model_id,
                    "choices": choices,
                    "tstamp": created,
                }
                lines.append(json.dumps(answer, ensure_ascii=False) + "\n")
        path = folder / f"{model_id}.jsonl"
        write_text(path, "".join(lines))
        written.append(path)
    return written


def _choice(repeat: int, turns: list[TurnLine]) -> dict[str, Any]:
    steps = [len(turn["accepted"] or []) for turn in turns]
    return {
        "index": repeat,
        "turns": [turn["text"] for turn in turns],
        "idxs": [count - 1 for count in steps],
        "decoding_steps": steps,
        "new_tokens": [len(turn["new_token_ids"] or []) for turn in turns],
        "wall_time": [(turn["prefill_s"] or 0.0) + (turn["decode_s"] or 0.0) for turn in turns],
        "accept_lengths": [accepted + 1 for turn in turns for accepted in turn["accepted"] or []],
    }
