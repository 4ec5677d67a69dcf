"""Question files in JSON lines: reading them strictly and finding them by name.

MT-bench's format is one object a line with ``question_id``, ``category`` and ``turns`` (FastChat, llm_judge/data). The
second turn is asked after the answer to the first. A ``system`` prompt is optional. Rows of MATH500, AIME, MBPP,
Arena-Hard and SPEED-Bench are converted to it.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from koala_bench.common.files import cache_folder, doing, sha256_of
from koala_bench.common.progress import log_line
from koala_bench.common.reading import first_problem, json_lines, read_text
from koala_bench.common.suggestions import did_you_mean
from koala_bench.dialogues.downloads import DATA_DIR_VARIABLE, DATASETS, SPEED_BENCH, data_folder, fetch, places_of
from koala_bench.dialogues.turns import Dialogue
from koala_bench.errors import KoalaBenchError

BUNDLED = "bundled"
CHAT = "chat"
OR = "|"  # between names of which the first that is at hand, or can be had, is taken
_TEXTS = ("problem", "question", "prompt", "text")  # of MATH500, AIME, Arena-Hard 2 and MBPP
_HASH = re.compile("[0-9a-f]{32}")  # an id of Arena-Hard or SPEED-Bench
_PLACEHOLDER = "FULL BENCHMARK DATA SHOULD BE FETCHED"  # SPEED-Bench's, in place of others' texts
_FORMAT = 'One line of a question file: {"question_id": 81, "category": "writing", "turns": ["...", "..."]}.'


@dataclass(frozen=True)
class Question:
    """One question with its turns, in the order in which they are asked."""

    question_id: int
    category: str  # "all" where the file leaves it empty
    turns: tuple[str, ...]
    held_out: bool = False  # about an object that the bundled target never saw in training
    system: str | None = None

    def dialogue_after(self, answers: Sequence[str] = ()) -> Dialogue:
        """The conversation up to the question that is asked after ``answers``."""
        turns = [text for pair in zip(self.turns, answers, strict=False) for text in pair]
        return Dialogue([*turns, self.turns[len(answers)]], self.system)


class _Row(BaseModel):
    """One line of a question file, the keys that are read."""

    model_config = ConfigDict(strict=True)

    question_id: int
    category: str
    turns: Annotated[list[Annotated[str, Field(pattern=r"\S")]], Field(min_length=1)]
    held_out: bool = False
    system: str | None = None


def _as_mt_bench(number: int, values: dict[str, Any]) -> dict[str, Any]:
    """A row of one of the other formats as one of MT-bench's, numbered by its line; any other row as it is."""
    named, said, turns = values.get("question_id"), values.get("messages"), values.get("turns")
    if isinstance(said, list):  # of a SPEED-Bench that was prepared
        turns = [each.get("content") for each in said if isinstance(each, dict) and each.get("role") == "user"]
    elif "turns" not in values and (text := next((values[key] for key in _TEXTS if key in values), None)) is not None:
        tests = values.get("test_list")
        turns = ["\n".join([text, "Your code should pass these tests:", *tests]) if tests else text]
    elif not (isinstance(turns, list) and isinstance(named, str) and _HASH.fullmatch(named)):
        return values
    category = values.get("category") or values.get("subject") or ""
    # Arena-Hard's turns are objects.
    turns = [each.get("content") if isinstance(each, dict) else each for each in turns]
    return {"question_id": number, "category": category, "turns": turns}


def read_questions(path: Path) -> list[Question]:
    """Read a question file; other keys than those of ``Question`` (such as ``reference``) are ignored.

    Blank lines are skipped and an empty category becomes ``all``. If ids are missing or strings, questions are numbered
    by line. Raises KoalaBenchError where the file is missing, unreadable, not UTF-8 or without questions, or a line is
    not a question or repeats an id. The message names the file and the line."""
    inside = path / "question.jsonl"
    missing = "Check the path, or use a name: `koala-bench data` lists them."
    folder = f"Use {inside}." if inside.is_file() else "Name the question file inside it."
    text = read_text(path, "question file", missing, folder)
    questions: list[Question] = []
    line_of: dict[int, int] = {}
    for number, values in json_lines(path, text, _FORMAT):
        try:
            row = _Row.model_validate(_as_mt_bench(number, values))
        except ValidationError as error:
            raise KoalaBenchError(f"{path}, line {number}: {first_problem(error)}.", _FORMAT) from error
        if any(_PLACEHOLDER in turn for turn in row.turns):
            raise KoalaBenchError(f"{path}, line {number}: a placeholder stands for the question.", f"{SPEED_BENCH}.")
        if row.question_id in line_of:
            raise KoalaBenchError(
                f"{path}, line {number}: the question_id {row.question_id} was used in line"
                f" {line_of[row.question_id]}.",
                "Give every question an id of its own.",
            )
        line_of[row.question_id] = number
        category, system = row.category.strip() or "all", (row.system or "").strip() or None
        questions.append(Question(row.question_id, category, tuple(row.turns), row.held_out, system))
    if not questions:
        raise KoalaBenchError(f"{path} has no questions.", _FORMAT)
    return questions


def bundled_questions() -> Path:
    """The project's own 80 questions about documented Python libraries."""
    return Path(str(resources.files("koala_bench") / "data" / "questions.jsonl"))


def chat_questions() -> Path:
    """The project's own 80 questions to a chat model, two turns each, ten in each of MT-bench's eight categories."""
    return Path(str(resources.files("koala_bench") / "data" / "chat.jsonl"))


def names_in(data_dir: Path) -> list[str]:
    """The names under which a data folder holds question files."""
    names = {
        path.parent.name for pattern in ("eval/*/question.jsonl", "*/question.jsonl") for path in data_dir.glob(pattern)
    }
    return sorted(names | {path.stem for path in data_dir.glob("*.jsonl")})


def find_questions(name_or_path: str, data_dir: Path | None = None) -> tuple[str, Path]:
    """Find a question file by path or by name.

    Args:
        name_or_path: ``bundled`` or ``chat`` for the project's own questions, a name such as ``mt_bench`` that is
            looked up in the data folder (``eval/<name>/question.jsonl``, ``<name>/question.jsonl``, ``<name>.jsonl``),
            or a path, which is what has a separator or ends in ``.jsonl``. Of ``mt_bench|chat`` the first that can be
            had: a public file that is not there is downloaded, into the user's cache where no data folder is set.
        data_dir: the data folder; without it the environment variable KOALA_BENCH_DATA names it.

    Returns the name to report and the path. The name of ``x/question.jsonl`` is ``x``.

    Raises:
        KoalaBenchError: the name is unknown, or no data folder is set to look it up in.
    """
    name = name_or_path
    if OR in name:
        return _first_of(name.split(OR), data_dir)
    if name == BUNDLED:
        return BUNDLED, bundled_questions()
    if name == CHAT:
        return CHAT, chat_questions()
    path = Path(name)
    if name and (len(path.parts) != 1 or path.suffix == ".jsonl" or name in (".", "..") or path.is_file()):
        shown = path.resolve().parent.name if path.name == "question.jsonl" else path.stem
        if not path.exists():
            raise KoalaBenchError(
                f"There is no question file {path}.", "Check the path, or use a name: `koala-bench data` lists them."
            )
        return shown or path.name, path
    public = [dataset.name for dataset in DATASETS]
    try:
        folder = data_folder(data_dir)
    except KoalaBenchError as error:
        hint = did_you_mean(name.lower(), [BUNDLED, CHAT, *public], "") if name not in public else ""
        raise KoalaBenchError(
            f"The questions {name!r} are looked up in a data folder, and none is set.",
            f"{hint} Set --data-dir or {DATA_DIR_VARIABLE}, or use {BUNDLED!r}.",
        ) from error
    if not folder.is_dir():
        raise KoalaBenchError(f"There is no data folder {folder}.", f"Correct --data-dir or {DATA_DIR_VARIABLE}.")
    for place in places_of(name, folder):
        if name and place.is_file():
            return name, place
    available = [BUNDLED, CHAT, *names_in(folder)]
    hint = did_you_mean(name.lower(), [*available, *public], "")
    if name in public:
        hint = f"Fetch them with `koala-bench data`, or put the file at {places_of(name, folder)[0]}."
    known = f"{hint} Available are: {', '.join(available)}."
    raise KoalaBenchError(f"{folder} has no questions {name!r}.", known.lstrip())


def _first_of(names: Sequence[str], data_dir: Path | None) -> tuple[str, Path]:
    for name, following in pairwise(names):
        try:
            return find_questions(name, data_dir)
        except KoalaBenchError:
            if (place := _fetched(name, data_dir, following)) is not None:
                return name, place
    return find_questions(names[-1], data_dir)


@cache  # a run asks some times, a network that is not there answers slowly, and once is enough to say so
def _fetched(name: str, data_dir: Path | None, following: str) -> Path | None:
    """A public question file, downloaded; None, after one line, where it is none or cannot be had."""
    named = data_dir is not None or os.environ.get(DATA_DIR_VARIABLE)
    try:
        return fetch([name], data_dir if named else cache_folder() / "data")[0]
    except KoalaBenchError:
        log_line(f"The questions {name} are not here and cannot be downloaded: asking {following}.")
        return None


def questions_sha256(path: Path) -> str:
    """Hash of a question file's bytes, which a run record keeps. Raises KoalaBenchError where the file cannot be
    read."""
    with doing("read", path, "Check the path and its permissions."):
        return sha256_of(path)


def select_questions(questions: Sequence[Question], per_category: int | None) -> list[Question]:
    """All questions, or the first few of each category in the order of the file."""
    taken: Counter[str] = Counter()
    selected = []
    for question in questions:
        taken[question.category] += 1
        if per_category is None or taken[question.category] <= per_category:
            selected.append(question)
    return selected
