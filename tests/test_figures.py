"""Figure 1: what is drawn, and that the same record gives the same bytes."""

from __future__ import annotations

from pathlib import Path

import pytest
from matplotlib import rcParams
from test_records import make_header, write_run

from koala_bench.errors import KoalaBenchError
from koala_bench.figures import write_figure1
from koala_bench.records import read_run


def test_the_same_record_gives_the_same_bytes_whatever_style_is_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = read_run(write_run(tmp_path / "run.jsonl"))
    first = write_figure1([run], tmp_path / "one")
    assert [path.name for path in first] == ["figure1.pdf", "figure1.png"]
    monkeypatch.setitem(rcParams, "font.size", 20)
    second = write_figure1([run], tmp_path / "two")
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]
    assert rcParams["font.size"] == 20, "the user's style is as it was"
    assert first[0].read_bytes().startswith(b"%PDF")
    assert b"CreationDate" not in first[0].read_bytes()
    assert first[1].read_bytes().startswith(b"\x89PNG")


def test_methods_and_targets_are_drawn_as_asked(tmp_path: Path) -> None:
    runs = [read_run(write_run(tmp_path / f"{name}.jsonl", header=make_header(target=name))) for name in ("tiny", "vicuna-7b")]
    one = write_figure1(runs[:1], tmp_path / "one", methods=["vanilla", "eagle"])[1].read_bytes()
    two = write_figure1(runs, tmp_path / "two", methods=["vanilla", "eagle"])[1].read_bytes()
    width, heights = [int.from_bytes(png[16:20], "big") for png in (one, two)], [int.from_bytes(png[20:24], "big") for png in (one, two)]
    assert width[0] == width[1] == 1400  # 7 inches at 200 dots
    assert heights[1] == 2 * heights[0]


def test_one_question_is_drawn_without_intervals(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "run.jsonl", lambda turn: turn if turn["question_id"] == 81 else None))
    assert all(path.stat().st_size > 5000 for path in write_figure1([run], tmp_path))


def test_a_record_of_vanilla_alone_has_nothing_to_draw(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "run.jsonl", header=make_header(["vanilla"])))
    with pytest.raises(KoalaBenchError, match="no method beside vanilla"):
        write_figure1([run], tmp_path)
