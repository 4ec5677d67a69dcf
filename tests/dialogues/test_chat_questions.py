"""The project's own chat questions: of MT-bench's form and kinds, and what is asked where MT-bench cannot be had."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from koala_bench.dialogues import questions
from koala_bench.dialogues.distilling.questions import EvaluationText, evaluation_files, words_of
from koala_bench.dialogues.questions import CHAT, chat_questions, find_questions, read_questions
from koala_bench.errors import KoalaBenchError


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Path]:
    """Downloads fail; the folders that they would go to."""
    asked: list[Path] = []

    def fails(names: list[str], folder: Path) -> list[Path]:
        asked.append(folder)
        raise KoalaBenchError("no network", "")

    questions._fetched.cache_clear()
    monkeypatch.setattr(questions, "fetch", fails)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("KOALA_BENCH_DATA", raising=False)
    return asked


def test_there_are_ten_two_turn_questions_in_each_category_of_mt_bench() -> None:
    found = read_questions(chat_questions())
    assert {len(question.turns) for question in found} == {2}
    kinds = ("writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities")
    assert Counter(question.category for question in found) == dict.fromkeys(kinds, 10)
    assert len({" ".join(words_of(turn)) for question in found for turn in question.turns}) == 160


def test_none_of_them_is_of_a_public_file(data_dir: Path) -> None:
    public = EvaluationText(evaluation_files(data_dir))
    assert [turn for question in read_questions(chat_questions()) for turn in question.turns if public.has(turn)] == []


def test_mt_bench_is_asked_where_it_is_and_the_own_questions_elsewhere(
    tmp_path: Path, no_network: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert find_questions("mt_bench|chat") == (CHAT, chat_questions())
    assert no_network == [tmp_path / "koala-bench" / "data"]
    find_questions("mt_bench|chat")
    assert capsys.readouterr().err.count("mt_bench are not here and cannot be downloaded: asking chat") == 1
    place = tmp_path / "mine" / "eval" / "mt_bench" / "question.jsonl"
    place.parent.mkdir(parents=True)
    place.write_text("{}")
    assert find_questions("mt_bench|chat", tmp_path / "mine") == ("mt_bench", place)
    with pytest.raises(KoalaBenchError, match="'other'"):
        find_questions("none|other", tmp_path / "mine")


def test_what_was_downloaded_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path / "downloaded.jsonl"
    monkeypatch.setattr(questions, "fetch", lambda names, folder: [place])
    assert find_questions("mt_bench|chat") == ("mt_bench", place)
