"""Speedups of decoding and of whole answers, from the seconds of each part: in every table, for older records too."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from koala_bench.errors import KoalaBenchError
from koala_bench.gate.comparison import compare_heads, verdict_table
from koala_bench.records.reading import Run, read_run
from koala_bench.records.schema import TurnLine
from koala_bench.records.summaries import sample, summarise
from koala_bench.results.making import make, sources_in
from tests.support.synthetic_run import make_header, write_run


def slow_readers(turn: TurnLine) -> TurnLine:
    """Every head reads the prompt for ten seconds."""
    return turn | {"draft_prefill_s": 10.0 if turn["method"] != "vanilla" else 0.0}  # type: ignore[return-value]


def test_the_reading_of_the_prompt_counts_for_whole_answers_alone(tmp_path: Path) -> None:
    run, slow = read_run(write_run(tmp_path / "a.jsonl")), read_run(write_run(tmp_path / "b.jsonl", slow_readers))
    before, after = ({each.name: each for each in summarise(each)} for each in (run, slow))
    for name in ("medusa", "eagle"):
        assert after[name].speedup == before[name].speedup
        assert after[name].whole_answer.value < 0.1 < 1.0 < before[name].whole_answer.value
    turns = {name: run.turns_of(name) for name in ("vanilla", "eagle")}
    rates = {
        name: sum(len(turn["new_token_ids"] or []) for turn in of)
        / sum((turn["prefill_s"] or 0) + (turn["draft_prefill_s"] or 0) + (turn["decode_s"] or 0) for turn in of)
        for name, of in turns.items()
    }
    assert before["eagle"].whole_answer.value == pytest.approx(rates["eagle"] / rates["vanilla"])
    assert before["vanilla"].whole_answer.value == 1.0


def aged(path: Path, schema: int) -> Path:
    """The record as an earlier version wrote it."""
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    lines[0]["schema"] = schema
    for line in lines[1:]:
        line.pop("draft_prefill_s", None)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def test_a_record_of_schema_4_has_the_heads_reading_in_its_decoding(tmp_path: Path) -> None:
    run = read_run(aged(write_run(tmp_path / "old.jsonl"), 4))
    assert {turn["draft_prefill_s"] for turn in run.turns} == {None}
    new = read_run(write_run(tmp_path / "new.jsonl"))
    assert [each.speedup for each in summarise(run)] == [each.speedup for each in summarise(new)]
    assert summarise(run)[1].whole_answer.value > summarise(new)[1].whole_answer.value


def test_tables_and_comparisons_show_both(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "records.jsonl"))
    whole = next(each for each in summarise(run) if each.name == "eagle").whole_answer
    shown = f"{whole.value:.2f} [{whole.low:.2f}, {whole.high:.2f}]"
    for name in ("table1", "table2", "leaderboard"):
        markdown, _, csv, *_ = make(name, sources_in(tmp_path), tmp_path)
        assert "Whole answer (x)" in markdown.read_text() and shown in markdown.read_text(), name
        assert "whole_answer_speedup,whole_answer_speedup_low" in csv.read_text().splitlines()[0]
    assert "Whole answer (x)" in verdict_table(run, compare_heads(run, ["eagle+koala"]))


# ---------------------------------------------------------------------------------------------- trainings


def of_seed(folder: Path, seed: int, weights: str, evaluation_seed: int = 0) -> Path:
    header: Any = make_header(["vanilla", "eagle", "eagle+layers", "eagle+adversarial", "eagle+koala"])
    header["seed"], header["run_id"] = evaluation_seed, f"run-{seed}-{evaluation_seed}"
    for method in header["methods"][1:]:
        method["weights_sha256"] = weights * 32
        method["training"] = {**method["training"], "seed": seed}
    return write_run(folder / f"seed-{seed}" / "records.jsonl", header=header)


def runs_of(*paths: Path) -> list[Run]:
    return [read_run(path) for path in paths]


@pytest.mark.parametrize(("seed", "evaluation_seed"), [(1, 0), (0, 1), (1, 1)])
def test_the_same_weights_are_one_training_whatever_the_seeds_say(
    tmp_path: Path, seed: int, evaluation_seed: int
) -> None:
    of_seed(tmp_path / "a", 0, "ab").rename(tmp_path / "records.jsonl")
    of_seed(tmp_path, seed, "ab", evaluation_seed)
    with pytest.raises(KoalaBenchError, match=r"are of the same trained head of eagle"):
        make("table3", sources_in(tmp_path), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_other_weights_of_the_same_training_seed_are_no_second_seed(tmp_path: Path) -> None:
    of_seed(tmp_path / "a", 0, "ab").rename(tmp_path / "records.jsonl")
    of_seed(tmp_path, 0, "cd", 1)
    with pytest.raises(KoalaBenchError, match="same target and training seed"):
        make("table3", sources_in(tmp_path), tmp_path / "out")


def test_trainings_are_pooled_by_their_weights_whatever_seed_evaluated_them(tmp_path: Path) -> None:
    runs = runs_of(of_seed(tmp_path, 0, "ab", 7), of_seed(tmp_path, 1, "cd", 7), of_seed(tmp_path, 2, "ef", 7))
    assert sample(runs).covers == {"questions": 8, "training seeds": 3}
    assert [run.training_seed for run in runs] == [0, 1, 2]
