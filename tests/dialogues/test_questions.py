"""Reading question files strictly, finding them by name or path, and the bundled 80 questions."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import koala_bench.pretraining.documentation as documentation
from koala_bench.dialogues.downloads import DATASETS, Dataset, places_of
from koala_bench.dialogues.questions import (
    BUNDLED,
    Question,
    bundled_questions,
    find_questions,
    questions_sha256,
    read_questions,
)
from koala_bench.errors import KoalaBenchError
from koala_bench.pretraining.documentation import PACKAGES, Entry, read_entries

GOOD = {"question_id": 81, "category": "writing", "turns": ["First.", "Second."]}


def _write(path: Path, *rows: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), encoding="utf-8"
    )
    return path


@pytest.fixture(autouse=True)
def _no_data_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KOALA_BENCH_DATA", raising=False)


# Reading


def test_reads_the_fields_and_ignores_others(tmp_path: Path) -> None:
    path = _write(
        tmp_path / "q.jsonl",
        {**GOOD, "reference": ["x"], "extra": 1},
        {"question_id": 5, "category": "", "turns": ["One."], "held_out": True},
    )
    assert read_questions(path) == [Question(81, "writing", ("First.", "Second.")), Question(5, "all", ("One.",), True)]


def test_accepts_blank_lines_a_missing_last_newline_windows_ends_and_a_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "q.jsonl"
    path.write_bytes(
        b"\xef\xbb\xbf" + json.dumps(GOOD).encode() + b"\r\n\r\n" + json.dumps({**GOOD, "question_id": 82}).encode()
    )
    assert [question.question_id for question in read_questions(path)] == [81, 82]


def test_a_text_may_hold_unicode_line_separators(tmp_path: Path) -> None:
    turn = "one\u2028two\u0085three"
    path = _write(tmp_path / "q.jsonl", json.dumps({**GOOD, "turns": [turn]}, ensure_ascii=False))
    assert read_questions(path)[0].turns == (turn,)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ('{"question_id": 1, ', "not valid JSON"),
        ("[" * 100_000, "cannot read"),
        ('{"question_id": ' + "9" * 5000 + "}", "cannot read"),
        ("[1]", "not an object"),
        ("null", "not an object"),
        ({"category": "a", "turns": ["x"]}, "question_id: "),
        ({**GOOD, "question_id": "81"}, "question_id: "),
        ({**GOOD, "question_id": True}, "question_id: "),
        ({**GOOD, "question_id": 81.5}, "question_id: "),
        ({"question_id": 1, "turns": ["x"]}, "category: "),
        ({**GOOD, "category": None}, "category: "),
        ({"question_id": 1, "category": "a"}, "turns: "),
        ({**GOOD, "turns": "First."}, "turns: "),
        ({**GOOD, "turns": []}, "turns: "),
        ({**GOOD, "turns": ["First.", 2]}, "turns.1: "),
        ({**GOOD, "turns": ["First.", {"text": "x"}]}, "turns.1: "),
        ({**GOOD, "turns": ["First.", " \n"]}, "turns.1: "),
        ({**GOOD, "turns": ["a\ud800b"]}, "turns.0: "),
        ({**GOOD, "held_out": "yes"}, "held_out: "),
        ({**GOOD, "question_id": 7}, "question_id 7 was used in line 1"),
    ],
)
def test_a_bad_line_is_refused_in_one_line_with_its_number(tmp_path: Path, line: object, says: str) -> None:
    path = _write(tmp_path / "q.jsonl", {**GOOD, "question_id": 7}, "", line)
    with pytest.raises(KoalaBenchError) as caught:
        read_questions(path)
    assert says in caught.value.message
    assert f"{path}, line 3" in caught.value.message
    assert caught.value.remedy
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "has no questions"),
        (b"\n \n", "has no questions"),
        (b"\x1f\x8b\x08\x00\xff", "line 1: not UTF-8"),
        (json.dumps(GOOD).encode() + b"\n\xe9\n", "line 2: not UTF-8"),
        (b"\x00" * 9, "not valid JSON"),
    ],
)
def test_a_file_that_is_not_questions_is_refused(tmp_path: Path, content: bytes, says: str) -> None:
    path = tmp_path / "q.jsonl"
    path.write_bytes(content)
    with pytest.raises(KoalaBenchError, match=re.escape(says)) as caught:
        read_questions(path)
    assert str(path) in caught.value.message


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(KoalaBenchError, match="no question file"):
        read_questions(tmp_path / "none.jsonl")
    _write(tmp_path / "mt_bench" / "question.jsonl", GOOD)
    with pytest.raises(KoalaBenchError, match="is a folder") as caught:
        read_questions(tmp_path / "mt_bench")
    assert str(tmp_path / "mt_bench" / "question.jsonl") in caught.value.remedy


# Finding


@pytest.mark.parametrize("place", ["eval/mine/question.jsonl", "mine/question.jsonl", "mine.jsonl"])
def test_a_name_is_found_in_the_three_places_of_a_data_folder(
    tmp_path: Path, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = _write(tmp_path / place, GOOD)
    assert find_questions("mine", tmp_path) == ("mine", path)
    monkeypatch.setenv("KOALA_BENCH_DATA", str(tmp_path))
    assert find_questions("mine", None) == ("mine", path)


def test_the_folder_eval_comes_first(tmp_path: Path) -> None:
    _write(tmp_path / "mine.jsonl", GOOD)
    path = _write(tmp_path / "eval" / "mine" / "question.jsonl", GOOD)
    assert find_questions("mine", tmp_path)[1] == path


def test_a_path_is_taken_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = _write(tmp_path / "mt_bench" / "question.jsonl", GOOD)
    assert find_questions(str(path)) == ("mt_bench", path)
    monkeypatch.chdir(path.parent)
    assert find_questions("question.jsonl") == ("mt_bench", Path("question.jsonl"))
    assert find_questions(str(_write(tmp_path / "own.jsonl", GOOD)))[0] == "own"
    with pytest.raises(KoalaBenchError, match="no question file"):
        find_questions("nowhere/q.jsonl")


def test_a_folder_of_that_name_in_the_working_directory_does_not_hide_the_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = _write(tmp_path / "data" / "eval" / "mt_bench" / "question.jsonl", GOOD)
    (tmp_path / "mt_bench").mkdir()
    monkeypatch.chdir(tmp_path)
    assert find_questions("mt_bench", tmp_path / "data") == ("mt_bench", path)


def test_without_a_data_folder_the_error_says_how_to_set_one() -> None:
    with pytest.raises(KoalaBenchError) as caught:
        find_questions("mt_bench")
    assert "--data-dir" in caught.value.remedy
    assert "KOALA_BENCH_DATA" in caught.value.remedy
    with pytest.raises(KoalaBenchError, match="Did you mean bundled"):
        find_questions("bundeld")


def test_an_unknown_name_is_answered_with_the_nearest_and_all_names(tmp_path: Path) -> None:
    _write(tmp_path / "eval" / "spec_bench" / "question.jsonl", GOOD)
    _write(tmp_path / "own.jsonl", GOOD)
    with pytest.raises(KoalaBenchError) as caught:
        find_questions("Spec-bench", tmp_path)
    assert "Did you mean spec_bench" in caught.value.remedy
    assert "bundled, chat, own, spec_bench" in caught.value.remedy
    with pytest.raises(KoalaBenchError, match="no questions ''"):
        find_questions("", tmp_path)


def test_a_public_name_that_is_absent_is_answered_with_where_to_put_it(tmp_path: Path) -> None:
    with pytest.raises(KoalaBenchError) as caught:
        find_questions("gsm8k", tmp_path)
    assert "koala-bench data" in caught.value.remedy
    assert str(tmp_path / "eval" / "gsm8k" / "question.jsonl") in caught.value.remedy


def test_a_missing_data_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(KoalaBenchError, match=r"no data folder .*absent"):
        find_questions("mt_bench", tmp_path / "absent")


def test_the_hash_is_that_of_the_bytes(tmp_path: Path) -> None:
    path = _write(tmp_path / "q.jsonl", GOOD)
    assert questions_sha256(path) == hashlib.sha256(path.read_bytes()).hexdigest()
    with pytest.raises(KoalaBenchError, match="Cannot read"):
        questions_sha256(tmp_path)


# The bundled questions


def _object_of(question: Question) -> tuple[str, str]:
    """The package and the name that the first turn asks about."""
    (name,) = re.findall(r"`([^`]+)`", question.turns[0])
    (package,) = set(re.findall(r"\w+", question.turns[0].replace(f"`{name}`", ""))) & set(PACKAGES)
    return package, name


def test_the_bundled_questions_are_eight_categories_of_ten_with_two_turns() -> None:
    name, path = find_questions(BUNDLED)
    questions = read_questions(path)
    assert (name, path) == ("bundled", bundled_questions())
    assert [question.question_id for question in questions] == list(range(1, 81))
    categories = ("description", "parameters", "returns", "examples", "source", "classes", "modules", "errors")
    assert Counter(question.category for question in questions) == dict.fromkeys(categories, 10)
    assert all(len(question.turns) == 2 for question in questions)
    assert sum(question.held_out for question in questions) >= 16


def test_every_bundled_question_names_another_object_and_its_package() -> None:
    objects = [_object_of(question) for question in read_questions(bundled_questions())]
    assert len(set(objects)) == 80
    assert len({package for package, _ in objects}) >= 12


def test_every_line_of_the_bundled_file_has_the_four_keys_in_order() -> None:
    for line in bundled_questions().read_text(encoding="utf-8").splitlines():
        assert list(json.loads(line)) == ["question_id", "category", "turns", "held_out"]


def test_the_bundled_questions_agree_with_the_corpus_on_what_is_held_out() -> None:
    for question in read_questions(bundled_questions()):
        assert Entry(*_object_of(question), "function", {}, "").held_out == question.held_out


@pytest.mark.exhaustive
def test_the_corpus_has_what_the_bundled_questions_ask_about(monkeypatch: pytest.MonkeyPatch) -> None:
    questions = {_object_of(question): question for question in read_questions(bundled_questions())}
    # Parsing all sources of these packages takes a minute; what defines none of the objects is passed over.
    names = {name.rpartition(".")[2] for _, name in questions}
    defined = re.compile(rf"(?:def|class) (?:{'|'.join(map(re.escape, names))})\b")
    every = documentation._python_files

    def some(root: Path) -> Iterator[Path]:
        for path in every(root):
            module = path.parent.name if path.name == "__init__.py" else path.stem
            if module in names or defined.search(path.read_text(encoding="utf-8", errors="ignore")):
                yield path

    monkeypatch.setattr(documentation, "_python_files", some)
    entries = {
        (entry.package, entry.name): entry for entry in read_entries(sorted({package for package, _ in questions}))[0]
    }
    assert [key for key in questions if key not in entries] == []


# The formats of other benchmarks

_ID = "0123456789abcdef0123456789abcdef"


@pytest.mark.parametrize(
    ("row", "category", "turns"),
    [
        ({"problem": "Find $x$.", "subject": "Algebra", "answer": "3", "unique_id": "a/1"}, "Algebra", ("Find $x$.",)),
        ({"question": "Find $m+n$.", "answer": "127"}, "all", ("Find $m+n$.",)),
        (
            {"text": "Write f.", "code": "...", "task_id": 601, "test_list": ["assert f(1)", "assert f(2)"]}, "all",
            ("Write f.\nYour code should pass these tests:\nassert f(1)\nassert f(2)",),
        ),
        ({"question_id": _ID, "category": "hard", "turns": [{"content": "Why?"}]}, "hard", ("Why?",)),
        ({"uid": "a", "category": "hard", "subcategory": "b", "prompt": "Why?"}, "hard", ("Why?",)),
        ({"question_id": _ID, "category": "coding", "turns": ["Why?", "And?"]}, "coding", ("Why?", "And?")),
        (
            {"question_id": _ID, "category": "coding", "messages": [
                {"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."},
                {"role": "user", "content": "And?"},
            ]}, "coding", ("Why?", "And?"),
        ),
    ],
)  # fmt: skip
def test_other_benchmarks_rows_are_read_and_numbered_by_line(
    tmp_path: Path, row: dict[str, Any], category: str, turns: tuple[str, ...]
) -> None:
    path = tmp_path / "other.jsonl"
    path.write_text("\n" + 2 * f"{json.dumps(row)}\n", encoding="utf-8")
    assert read_questions(path) == [Question(2, category, turns), Question(3, category, turns)]


def test_a_placeholder_is_refused_in_one_line_that_says_how_to_fill_it(tmp_path: Path) -> None:
    path = tmp_path / "speed.jsonl"
    text = "FULL BENCHMARK DATA SHOULD BE FETCHED FROM THE SOURCE USING SPECDEC_BENCH"
    path.write_text(json.dumps({"question_id": _ID, "category": "rag", "turns": [text]}), encoding="utf-8")
    with pytest.raises(KoalaBenchError, match="line 1: a placeholder") as caught:
        read_questions(path)
    assert "prepare_data.py" in caught.value.remedy and "\n" not in str(caught.value)


# Real files


_DATA = Path(os.environ.get("KOALA_BENCH_DATA", "/nonexistent"))


@pytest.mark.skipif(not (_DATA / "eval").is_dir(), reason="needs the data folder in KOALA_BENCH_DATA")
@pytest.mark.parametrize("dataset", DATASETS, ids=lambda dataset: dataset.name)
def test_the_public_files_are_read(dataset: Dataset) -> None:
    if not any(place.is_file() for place in places_of(dataset.name, _DATA)):
        pytest.skip(f"{dataset.name} is not in the data folder")
    questions = read_questions(find_questions(dataset.name, _DATA)[1])
    turns = {"mt_bench": 160, "spec_bench": 560}.get(dataset.name, dataset.rows)
    assert (len(questions), sum(len(question.turns) for question in questions)) == (dataset.rows, turns)
    assert all(question.category for question in questions)
