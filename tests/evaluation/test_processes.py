"""The same evaluation in several fresh processes: each is a new interpreter, and their records are pooled."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from koala_bench.errors import KoalaBenchError
from koala_bench.evaluation.processes import in_fresh_process, record_of_process, refuse_launched
from koala_bench.records.reading import read_run
from koala_bench.records.schema import TurnLine
from koala_bench.records.summaries import evaluations, sample, summaries_of, summarise
from koala_bench.results.making import make, sources_in
from tests.support.commands import Koala
from tests.support.synthetic_run import make_header, write_run


def test_a_fresh_process_is_another_one_and_its_complaint_arrives_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    assert len({os.getpid(), in_fresh_process(os.getpid), in_fresh_process(os.getpid)}) == 3
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(KoalaBenchError) as caught:
        in_fresh_process(refuse_launched)
    assert (caught.value.message, caught.value.remedy) == (
        "--processes starts processes itself.",
        "Leave the launcher out.",
    )
    with pytest.raises(KoalaBenchError, match="ended with exit code"):
        in_fresh_process(os.abort)


def of_process(record: Path, process: int, slower: float = 1.0, seed: int = 0) -> Path:
    """A record of a process in which everything but vanilla decoding is so much slower."""
    header = make_header()
    header["seed"] = seed
    header["run_id"] = f"tiny-{process}-{seed}"
    if process > 1:
        header["measure"]["process"] = process

    def change(turn: TurnLine) -> TurnLine:
        factor = slower if turn["method"] != "vanilla" else 1.0
        return turn | {"decode_s": factor * (turn["decode_s"] or 0.0)}  # type: ignore[return-value]

    return write_run(record_of_process(record, process), change, header=header)


def test_processes_are_pooled_and_widen_the_interval(tmp_path: Path) -> None:
    runs = [read_run(of_process(tmp_path / "records.jsonl", process, 1.0 + 0.05 * process)) for process in (1, 2, 3)]
    assert evaluations(runs[::-1]) == [tuple(runs)]
    assert sample(runs).covers == {"questions": 8, "processes": 3} and sample(runs[:1]).covers == {"questions": 8}
    (_, *alone), (_, *pooled) = summarise(runs[1]), summaries_of(sample(runs))
    for one, all_three in zip(alone, pooled, strict=True):
        assert all_three.speedup.value == pytest.approx(one.speedup.value, rel=0.01)
        wide, narrow = all_three.speedup, one.speedup
        assert wide.high - wide.low > 2 * (narrow.high - narrow.low)
        assert all_three.acceptance_length.value == one.acceptance_length.value


def test_another_seed_or_the_same_process_again_is_another_evaluation(tmp_path: Path) -> None:
    first = read_run(of_process(tmp_path / "a" / "records.jsonl", 1))
    again = read_run(of_process(tmp_path / "b" / "records.jsonl", 1))
    other = read_run(of_process(tmp_path / "c" / "records.jsonl", 2, seed=1))
    assert evaluations([first, again, other]) == [(first,), (again,), (other,)]


def test_the_table_of_a_folder_pools_its_processes_and_says_what_its_intervals_cover(tmp_path: Path) -> None:
    alone = make("table1", sources_in(of_process(tmp_path / "one" / "records.jsonl", 1).parent), tmp_path / "one")
    assert "over 8 questions" in alone[0].read_text()
    for process in (1, 2):
        of_process(tmp_path / "two" / "records.jsonl", process, 1.0 + 0.1 * process)
    sources = sources_in(tmp_path / "two")
    assert [path.parent.name for path in sources.of("table1")] == ["two", "process-2"]
    text = make("table1", sources, tmp_path / "two")[0].read_text()
    assert "over 2 processes and 8 questions" in text
    assert text.count("| eagle ") == alone[0].read_text().count("| eagle ")


def test_a_launcher_and_fresh_processes_are_one_too_many(koala: Koala, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    result = koala("reproduce", "table1", "--processes", "2")
    assert result.code == 2 and "--processes" in result.complaint
