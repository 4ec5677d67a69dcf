"""Table 3: the parts of KOALA against numbers worked out by hand, over one and several training seeds, and the verdict
in words.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.support.synthetic_run import make_header, write_run

from koala_bench.records import statistics
from koala_bench.results.tables.ablation import Effect, effects, verdict_lines
from koala_bench.errors import KoalaBenchError
from koala_bench.results.tables.published import Paper, TableSpec, read_paper, read_table_spec
from koala_bench.records.reading import Run, read_run
from koala_bench.records.schema import TurnLine
from koala_bench.records.statistics import Interval
from koala_bench.records.summaries import sample, summaries_of
from koala_bench.results.tables.building import write_table

REPRODUCE = Path(__file__).parents[2] / "reproduce"
METHODS = ["vanilla", "eagle", "eagle+layers", "eagle+adversarial", "eagle+koala"]


@pytest.fixture
def spec() -> TableSpec:
    return read_table_spec(REPRODUCE / "table3.toml")


@pytest.fixture
def paper() -> Paper:
    return read_paper(REPRODUCE / "paper.toml")


def of_seed(
    folder: Path,
    seed: int,
    change: Callable[[TurnLine], TurnLine | None] = lambda turn: turn,
    methods: list[str] | None = None,
) -> Run:
    header = make_header(methods or METHODS)
    header["seed"], header["run_id"] = seed, f"run-{seed}"
    for method in header["methods"]:
        if method["head"] is not None:
            method["weights_sha256"] = f"{seed:02x}" * 32
    return read_run(write_run(folder / f"{seed}.jsonl", change, header=header))


def slower(factor: float) -> Callable[[TurnLine], TurnLine]:
    """A training seed whose layered heads happen to need more time."""
    return lambda turn: turn | {
        "decode_s": (turn["decode_s"] or 0) * (factor if turn["method"] == "eagle+layers" else 1.0)
    }


def test_every_part_is_measured_alone_and_on_top_of_the_other(tmp_path: Path) -> None:
    chosen = sample([of_seed(tmp_path, 0)])
    rows = effects(chosen, summaries_of(chosen))["eagle"]
    assert [(each.method, each.against, each.added, each.alone) for each in rows] == [
        ("eagle+layers", "eagle", "the layers", True),
        ("eagle+adversarial", "eagle", "the adversarial term", True),
        ("eagle+koala", "eagle", None, True),
        ("eagle+koala", "eagle+adversarial", "the layers", False),
        ("eagle+koala", "eagle+layers", "the adversarial term", False),
    ]
    lengths = {name: chosen.value(chosen.length(name)) for name in METHODS}
    for each in rows:
        assert each.length.value == pytest.approx(100 * (lengths[each.method] / lengths[each.against] - 1))


def test_seeds_are_pooled_and_their_spread_widens_the_interval(tmp_path: Path) -> None:
    alike = [of_seed(tmp_path / "alike", seed) for seed in (0, 1, 2)]
    apart = [of_seed(tmp_path / "apart", seed, slower(1 + 0.1 * seed)) for seed in (0, 1, 2)]
    found = {}
    for name, runs in (("alike", alike), ("apart", apart)):
        chosen = sample(runs)
        assert chosen.questions == 8
        (summary,) = [each for each in summaries_of(chosen) if each.name == "eagle+layers"]
        assert summary.counted == 3 * 16
        assert summary.questions == 8
        found[name] = summary
    one = next(each for each in summaries_of(sample(alike[:1])) if each.name == "eagle+layers")
    assert found["alike"].speedup.value == pytest.approx(one.speedup.value)
    assert found["alike"].acceptance_length.value == pytest.approx(one.acceptance_length.value)
    width = {name: summary.speedup.high - summary.speedup.low for name, summary in found.items()}
    assert width["apart"] > 3 * width["alike"]
    # Total tokens per total second of the three seeds over vanilla's of the three.
    totals = [sample([run]).totals for run in apart]
    rates = [
        sum(each[name].tokens.sum() for each in totals) / sum(each[name].seconds.sum() for each in totals)
        for name in ("eagle+layers", "vanilla")
    ]
    assert found["apart"].speedup.value == pytest.approx(rates[0] / rates[1])


def effect(added: str | None, alone: bool, length: Interval, speed: Interval) -> Effect:
    return Effect("eagle+x", "eagle", added, alone, length, speed)  # type: ignore[arg-type]


UP, DOWN, FLAT, NONE = (
    Interval(2.0, 1.0, 3.0),
    Interval(-2.0, -3.0, -1.0),
    Interval(0.0, -1.0, 1.0),
    Interval(2.0, math.nan, math.nan),
)


@pytest.mark.parametrize(
    ("layers", "adversarial", "both", "words"),
    [
        ((UP, UP), (FLAT, FLAT), UP, "the layers help, alone and on top of the adversarial term; the adversarial term makes no difference beyond the "
         "interval, alone and on top of the layers; both together help."),
        ((UP, DOWN), (DOWN, FLAT), FLAT, "the layers help alone and harm on top of the adversarial term; the adversarial term harms alone and makes no "
         "difference beyond the interval on top of the layers; both together make no difference beyond the interval."),
        ((NONE, NONE), (UP, UP), DOWN, "the layers make no difference beyond the interval, alone and on top of the adversarial term; the adversarial term "
         "helps, alone and on top of the layers; both together harm."),
    ],
)  # fmt: skip
def test_the_verdict_follows_from_the_intervals(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    layers: tuple[Interval, Interval],
    adversarial: tuple[Interval, Interval],
    both: Interval,
    words: str,
) -> None:
    rows = [
        effect("the layers", True, layers[0], FLAT),
        effect("the adversarial term", True, adversarial[0], FLAT),
        effect(None, True, both, FLAT),
    ]
    rows += [effect("the layers", False, layers[1], FLAT), effect("the adversarial term", False, adversarial[1], FLAT)]
    monkeypatch.setattr("koala_bench.results.tables.ablation.effects", lambda *_: {"eagle": rows})
    chosen = sample([of_seed(tmp_path, 0)], ["vanilla", "eagle"])
    lines = verdict_lines(chosen, summaries_of(chosen))
    assert lines[0].startswith(
        f"eagle on tiny. Acceptance length: {words} Speed: the layers make no difference beyond the interval, alone and"
        " on top"
    )
    assert lines[-1] == statistics.caution(10)


def test_a_record_without_some_parts_says_what_there_is(tmp_path: Path) -> None:
    chosen = sample([of_seed(tmp_path, 0, methods=["vanilla", "eagle", "eagle+layers"])])
    lines = verdict_lines(chosen, summaries_of(chosen))
    assert lines[0].startswith("eagle on tiny. Acceptance length: the layers help alone. Speed: ")
    assert len(lines) == 3
    bare = sample([of_seed(tmp_path / "bare", 0, methods=["vanilla", "eagle"])])
    assert verdict_lines(bare, summaries_of(bare)) == []


def test_table_3_has_the_verdict_the_seeds_and_the_papers_unknown_cells(
    tmp_path: Path, spec: TableSpec, paper: Paper
) -> None:
    runs = [of_seed(tmp_path, seed) for seed in (0, 1, 2)]
    markdown, latex, table = (path.read_text(encoding="utf-8") for path in write_table(runs, tmp_path, spec, paper))
    assert "# Table 3: What the parts of KOALA are worth" in markdown
    assert [row["method"] for row in csv.DictReader(io.StringIO(table))] == METHODS
    assert (
        "**What each part is worth**" in markdown and "- eagle on tiny. Acceptance length: the layers help" in markdown
    )
    assert "over 3 training seeds and the questions, crossed" in markdown
    assert markdown.count("How tiny, seed ") == 3
    assert "The record of tiny, seed 0 has no medusa, medusa+layers, medusa+adversarial, medusa+koala." in markdown
    assert (
        "| Medusa | vicuna-13b | Spec-Bench | A100 80GB | 1.80 | 2.39 | hemingkx/Spec-Bench Leaderboard.md |"
        in markdown
    )
    assert "trained from one seed" not in markdown
    assert latex.isascii() and latex.count(r"\begin{tabular}") == latex.count(r"\end{tabular}") == 2
    again = write_table([read_run(run.path) for run in runs], tmp_path / "again", spec, paper)
    assert [path.read_bytes() for path in again] == [(tmp_path / path.name).read_bytes() for path in again]


def test_one_seed_is_said_to_be_one(tmp_path: Path, spec: TableSpec, paper: Paper) -> None:
    text = write_table([of_seed(tmp_path, 4)], tmp_path, spec, paper)[0].read_text(encoding="utf-8")
    assert "The heads of tiny were trained from one seed, 4" in text
    assert "training seeds and the questions, crossed" not in text


def test_the_papers_cells_stand_beside_the_measured_ones(tmp_path: Path, spec: TableSpec, paper: Paper) -> None:
    run = read_run(write_run(tmp_path / "v.jsonl", header=make_header(METHODS, target="vicuna-7b")))
    cells = tuple(
        c.model_copy(update={"speedup": 2.5}) if (c.target, c.method) == ("vicuna-7b", "eagle+layers") else c
        for c in paper.table3
    )
    text = write_table([run], tmp_path, spec, paper.model_copy(update={"table3": cells}))[0].read_text(encoding="utf-8")
    rows = [line for line in text.splitlines() if line.startswith("| vicuna-7b | eagle")]
    assert [line.split(" | ")[-1] for line in rows] == ["unknown |", "2.50; unknown |", "unknown |", "unknown |"]
    assert (
        "| Medusa | vicuna-13b" not in text
    ), "other targets' published rows are left out where the record's own are known"


def test_records_that_are_no_seeds_of_one_experiment_are_refused(tmp_path: Path, spec: TableSpec, paper: Paper) -> None:
    first = of_seed(tmp_path, 0)
    header = make_header(METHODS)
    header["seed"] = 1
    header["methods"][2]["tree"] = {"name": "2x1", "nodes": 5, "depth": 2, "parents": None}
    with pytest.raises(KoalaBenchError, match=r"differ in the tree of eagle\+layers"):
        write_table([first, read_run(write_run(tmp_path / "tree.jsonl", header=header))], tmp_path, spec, paper)
    with pytest.raises(KoalaBenchError, match="same target and training seed"):
        write_table([first, first], tmp_path, spec, paper)
    fewer = of_seed(tmp_path, 2, methods=METHODS[:-1])
    with pytest.raises(KoalaBenchError, match=r"their methods \(eagle\+koala\)"):
        write_table([first, fewer], tmp_path, spec, paper)
    longer = make_header(METHODS)
    longer["seed"] = 3
    for method in longer["methods"][1:]:
        assert method["training"]
        method["training"]["steps"] = 1200
    with pytest.raises(KoalaBenchError, match="the training steps of eagle"):
        write_table([first, read_run(write_run(tmp_path / "longer.jsonl", header=longer))], tmp_path, spec, paper)
