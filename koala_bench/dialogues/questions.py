"""Question files in MT-bench's JSON-lines format: reading them strictly and finding them by name.

One JSON object a line with ``question_id``, ``category`` and ``turns`` (FastChat, llm_judge/data). The second
turn is asked after the answer to the first. A ``system`` prompt may stand beside them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from koala_bench.common.files import sha256_of
from koala_bench.dialogues.dialogue import Dialogue
from koala_bench.dialogues.downloads import DATA_DIR_VARIABLE, DATASETS, data_folder, did_you_mean, places_of
from koala_bench.errors import KoalaBenchError

BUNDLED = "bundled"
_FORMAT = 'One line of a question file: {"question_id": 81, "category": "writing", "turns": ["...", "..."]}.'


@dataclass(frozen=True)
class Question:
    """One question with its turns, in the order in which they are asked."""

    question_id: int
    category: str  # "all" where the file leaves it empty
    turns: tuple[str, ...]
    held_out: bool = False  # about an object that the bundled target never saw in training
    system: str | None = None

    def asked(self, answers: Sequence[str] = ()) -> Dialogue:
        """The conversation up to the question that is asked after ``answers``."""
        turns = [text for pair in zip(self.turns, answers, strict=False) for text in pair]
        return Dialogue([*turns, self.turns[len(answers)]], self.system)


# --------------------------------------------------------------------------------------------
# Reading


def _kind(value: object) -> str:
    """The name of a JSON value's type, as the format's own words have it."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true or false"
    return {str: "a text", int: "a whole number", float: "a number", list: "a list", dict: "an object"}[type(value)]


def _field(row: dict[str, Any], key: str, where: str) -> Any:
    if key not in row:
        raise KoalaBenchError(f"{where}: the key {key!r} is missing.", _FORMAT)
    return row[key]


def _turns(value: Any, where: str) -> tuple[str, ...]:
    if not isinstance(value, list):
        raise KoalaBenchError(f"{where}: 'turns' is {_kind(value)}, not a list of texts.", _FORMAT)
    if not value:
        raise KoalaBenchError(f"{where}: 'turns' is empty.", "Give at least one text, or remove the line.")
    for number, turn in enumerate(value, start=1):
        if not isinstance(turn, str):
            raise KoalaBenchError(f"{where}: turn {number} is {_kind(turn)}, not a text.", _FORMAT)
        if not turn.strip():
            raise KoalaBenchError(f"{where}: turn {number} is blank.", "Give it a text, or remove the line.")
        try:
            turn.encode("utf-8")
        except UnicodeEncodeError as error:
            # JSON can spell half of a surrogate pair, which no tokenizer takes.
            raise KoalaBenchError(
                f"{where}: turn {number} has a lone surrogate at character {error.start + 1}.",
                "Repair the text at its source.",
            ) from error
    return tuple(value)


def _question(line: str, where: str) -> Question:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise KoalaBenchError(
            f"{where}: not valid JSON ({error.msg} at character {error.pos + 1}).", _FORMAT
        ) from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits; brackets nested thousands deep
        raise KoalaBenchError(f"{where}: JSON that Python cannot read ({error}).", _FORMAT) from error
    if not isinstance(row, dict):
        raise KoalaBenchError(f"{where}: this is {_kind(row)}, not an object.", _FORMAT)
    question_id = _field(row, "question_id", where)
    if not isinstance(question_id, int) or isinstance(question_id, bool):
        raise KoalaBenchError(f"{where}: 'question_id' is {_kind(question_id)}, not a whole number.", _FORMAT)
    category = _field(row, "category", where)
    if not isinstance(category, str):
        raise KoalaBenchError(f"{where}: 'category' is {_kind(category)}, not a text.", 'Use "" for none.')
    held_out = row.get("held_out", False)
    if not isinstance(held_out, bool):
        raise KoalaBenchError(
            f"{where}: 'held_out' is {_kind(held_out)}, not true or false.", "Correct it or leave the key out."
        )
    system = row.get("system")
    if system is not None and not isinstance(system, str):
        raise KoalaBenchError(f"{where}: 'system' is {_kind(system)}, not a text.", "Correct it or leave the key out.")
    turns = _turns(_field(row, "turns", where), where)
    return Question(question_id, category.strip() or "all", turns, held_out, system.strip() or None if system else None)


def read_questions(path: Path) -> list[Question]:
    """Read a question file; other keys than those of ``Question`` (such as ``reference``) are ignored.

    Blank lines are skipped and an empty category becomes ``all``.

    Raises:
        KoalaBenchError: the file is missing, unreadable, not UTF-8 or without questions, or a line is not a
            question or repeats an id. The message names the file and the line.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError as error:
        raise KoalaBenchError(
            f"There is no question file {path}.", "Check the path, or use a name: `koala-bench data` lists them."
        ) from error
    except IsADirectoryError as error:
        inside = path / "question.jsonl"
        remedy = f"Use {inside}." if inside.is_file() else "Name the question file inside it."
        raise KoalaBenchError(f"{path} is a folder, not a question file.", remedy) from error
    except OSError as error:
        raise KoalaBenchError(f"Cannot read {path}: {error.strerror or error}.", "Check its permissions.") from error
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line_number = content.count(b"\n", 0, error.start) + 1
        raise KoalaBenchError(
            f"{path}, line {line_number}: not UTF-8 text.", "Unpack it if it is compressed, or save it as UTF-8."
        ) from error
    questions: list[Question] = []
    line_of: dict[int, int] = {}
    # Not splitlines(): a text may hold U+2028 and others that it takes for line ends.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        question = _question(line, f"{path}, line {number}")
        if question.question_id in line_of:
            raise KoalaBenchError(
                f"{path}, line {number}: the question_id {question.question_id} was used in line"
                f" {line_of[question.question_id]}.",
                "Give every question an id of its own.",
            )
        line_of[question.question_id] = number
        questions.append(question)
    if not questions:
        raise KoalaBenchError(f"{path} has no questions.", _FORMAT)
    return questions


# --------------------------------------------------------------------------------------------
# Finding


def bundled_questions() -> Path:
    """The project's own 80 questions about documented Python libraries."""
    return Path(str(resources.files("koala_bench") / "data" / "questions.jsonl"))


def names_in(data_dir: Path) -> list[str]:
    """The names under which a data folder holds question files."""
    names = {
        path.parent.name for pattern in ("eval/*/question.jsonl", "*/question.jsonl") for path in data_dir.glob(pattern)
    }
    return sorted(names | {path.stem for path in data_dir.glob("*.jsonl")})


def find_questions(name_or_path: str, data_dir: Path | None = None) -> tuple[str, Path]:
    """Find a question file by path or by name.

    Args:
        name_or_path: ``bundled`` for the project's own questions, a name such as ``mt_bench`` that is looked up in
            the data folder (``eval/<name>/question.jsonl``, ``<name>/question.jsonl``, ``<name>.jsonl``), or
            a path, which is what has a separator or ends in ``.jsonl``.
        data_dir: the data folder; without it the environment variable KOALA_BENCH_DATA names it.

    Returns the name to report and the path. The name of ``x/question.jsonl`` is ``x``.

    Raises:
        KoalaBenchError: the name is unknown, or no data folder is set to look it up in.
    """
    name = name_or_path
    if name == BUNDLED:
        return BUNDLED, bundled_questions()
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
        hint = did_you_mean(name, [BUNDLED, *public]) if name not in public else ""
        raise KoalaBenchError(
            f"The questions {name!r} are looked up in a data folder, and none is set.",
            f"{hint}Set --data-dir or {DATA_DIR_VARIABLE}, or use {BUNDLED!r}.",
        ) from error
    if not folder.is_dir():
        raise KoalaBenchError(f"There is no data folder {folder}.", f"Correct --data-dir or {DATA_DIR_VARIABLE}.")
    for place in places_of(name, folder):
        if name and place.is_file():
            return name, place
    available = [BUNDLED, *names_in(folder)]
    if name in public:
        raise KoalaBenchError(
            f"{folder} has no questions {name!r}.",
            f"Fetch them with `koala-bench data`, or put the file at {places_of(name, folder)[0]}. Available are:"
            f" {', '.join(available)}.",
        )
    raise KoalaBenchError(
        f"There are no questions {name!r} in {folder}.",
        f"{did_you_mean(name, [*available, *public])}Available are: {', '.join(available)}.",
    )


def questions_sha256(path: Path) -> str:
    """Hash of a question file's bytes, which a run record keeps.

    Raises:
        KoalaBenchError: the file cannot be read.
    """
    try:
        return sha256_of(path)
    except OSError as error:
        raise KoalaBenchError(
            f"Cannot read {path}: {error.strerror or error}.", "Check the path and its permissions."
        ) from error
