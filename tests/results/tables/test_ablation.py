"""Table 3: the parts of KOALA against numbers worked out by hand, over one and several training seeds."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable
from pathlib import Path

import pytest

from koala_bench.errors import KoalaBenchError
from koala_bench.records.reading import Run, read_run
from koala_bench.records.schema import RunHeader, TurnLine
from koala_bench.records.statistics import Interval
from koala_bench.records.summaries import sample, summaries_of
from koala_bench.results.tables.ablation import Effect, effects, effects_grid
from koala_bench.results.tables.building import write_table
from koala_bench.results.tables.published import Paper, TableSpec, read_table_spec
from tests.support.markdown import table_rows, table_under
from tests.support.synthetic_run import make_header, write_run

REPRODUCE = Path(__file__).parents[3] / "reproduce"
METHODS = ["vanilla", "eagle", "eagle+layers", "eagle+adversarial", "eagle+koala"]


@pytest.fixture
def spec() -> TableSpec:
    return read_table_spec(REPRODUCE / "table3.toml")


def of_seed(
    folder: Path,
    seed: int,
    change: Callable[[TurnLine], TurnLine | None] = lambda turn: turn,
    methods: list[str] | None = None,
) -> Run:
    header = make_header(methods or METHODS)
    header["run_id"] = f"run-{seed}"
    _train(header, seed)
    return read_run(write_run(folder / f"{seed}.jsonl", change, header=header))


def _train(header: RunHeader, seed: int) -> None:
    """Heads of another training."""
    for method in header["methods"]:
        if method["training"] is not None:
            method["weights_sha256"] = f"{seed:02x}" * 32
            method["training"]["seed"] = seed


def slower(factor: float) -> Callable[[TurnLine], TurnLine]:
    """A training seed whose layered heads happen to need more time."""
    return lambda turn: (
        turn | {"decode_s": (turn["decode_s"] or 0) * (factor if turn["method"] == "eagle+layers" else 1.0)}
    )


def test_every_part_is_measured_alone_and_on_top_of_the_other(tmp_path: Path) -> None:
    chosen = sample([of_seed(tmp_path, 0)])
    rows = effects(chosen, summaries_of(chosen))
    assert [(each.method, each.against, each.added) for each in rows] == [
        ("eagle+layers", "eagle", "2 layers"),
        ("eagle+adversarial", "eagle", "adversarial term"),
        ("eagle+koala", "eagle", "both"),
        ("eagle+koala", "eagle+adversarial", "2 layers"),
        ("eagle+koala", "eagle+layers", "adversarial term"),
    ]
    lengths = {name: chosen.value(chosen.length(name)) for name in METHODS}
    for each in rows:
        assert each.length.value == pytest.approx(lengths[each.method] - lengths[each.against])
        assert each.length_percent.value == pytest.approx(100 * (lengths[each.method] / lengths[each.against] - 1))


def test_layers_are_weighed_on_equal_draft_vocabularies(tmp_path: Path) -> None:
    header = make_header(["vanilla", "eagle", "eagle+layers", "eagle+vocab8k", "eagle+layers+vocab8k"])
    for method in header["methods"]:
        if method["name"].endswith("vocab8k"):
            method.update(draft_vocabulary=8192, layers=2 if "layers" in method["name"] else 1)
    chosen = sample([read_run(write_run(tmp_path / "run.jsonl", header=header))])
    assert [(each.method, each.against, each.added) for each in effects(chosen, summaries_of(chosen))] == [
        ("eagle+layers", "eagle", "2 layers"),
        ("eagle+layers+vocab8k", "eagle+vocab8k", "2 layers"),
    ]


def test_the_layers_of_a_cut_head_with_another_objective_are_a_part(tmp_path: Path) -> None:
    header = make_header(["vanilla", "eagle", "eagle+lk+vocab8k", "eagle+lk+layers+vocab8k"])
    for method in header["methods"][2:]:
        method.update(draft_vocabulary=8192, objective="rejection", layers=2 if "layers" in method["name"] else 1)
    chosen = sample([read_run(write_run(tmp_path / "run.jsonl", header=header))])
    (only,) = effects(chosen, summaries_of(chosen))
    assert (only.method, only.against, only.added) == ("eagle+lk+layers+vocab8k", "eagle+lk+vocab8k", "2 layers")


def test_another_objective_is_a_part_of_its_own(tmp_path: Path) -> None:
    """Two layers and LK beside EAGLE alone: what they change is the change of no single part. Forms of an objective,
    and a head with other options besides, are told apart."""
    names = ["vanilla", "eagle", "eagle+layers", "eagle+adversarial", "eagle+lk", "eagle+lk+layers", "eagle+tv", "hass"]
    header = make_header(names)
    for method in header["methods"]:
        if "+lk" in method["name"] or method["name"] in ("eagle+tv", "hass"):
            method["objective"] = "likeliest" if method["name"] == "hass" else "rejection"
        if method["name"] == "hass":
            method["head"] = "eagle"
    chosen = sample([read_run(write_run(tmp_path / "run.jsonl", header=header))])
    rows = effects(chosen, summaries_of(chosen))
    assert [(each.method, each.against, each.added) for each in rows] == [
        ("eagle+layers", "eagle", "2 layers"),
        ("eagle+adversarial", "eagle", "adversarial term"),
        ("eagle+lk", "eagle", "lk"),
        ("eagle+lk+layers", "eagle", "both"),
        ("eagle+lk+layers", "eagle+lk", "2 layers"),
        ("eagle+lk+layers", "eagle+layers", "lk"),
        ("eagle+tv", "eagle", "tv"),
        ("hass", "eagle", "hass"),
    ]
    only = [each for each in summaries_of(chosen) if each.name in ("vanilla", "eagle", "eagle+lk+layers")]
    assert [each.added for each in effects(chosen, only)] == ["both"]


def test_each_number_of_layers_is_a_part_also_of_a_method_not_called_like_its_head(
    tmp_path: Path, paper: Paper
) -> None:
    header = make_header(["vanilla", "eagle", "eagle+layers", "eagle@4", "eagle2", "eagle2@3"])
    for method in header["methods"]:
        if method["name"].startswith("eagle2"):
            method["head"] = "eagle_two"
    runs = [read_run(write_run(tmp_path / "run.jsonl", header=header))]
    chosen = sample(runs)
    rows = effects(chosen, summaries_of(chosen))
    assert [(each.method, each.against, each.added) for each in rows] == [
        ("eagle+layers", "eagle", "2 layers"),
        ("eagle@4", "eagle", "4 layers"),
        ("eagle2@3", "eagle2", "3 layers"),
    ]
    write_table(runs, tmp_path, read_table_spec(REPRODUCE / "table-layers.toml"), paper)
    assert {path.name for path in tmp_path.glob("table*")} == {f"table-layers.{kind}" for kind in ("md", "tex", "csv")}


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


def test_changes_are_marked_where_the_whole_interval_lies_on_one_side_of_zero() -> None:
    up, down = Interval(2.0, 1.0, 3.0), Interval(-2.0, -3.0, -1.0)
    flat, none = Interval(0.0, -1.0, 1.0), Interval(2.0, math.nan, math.nan)
    table = effects_grid([("tiny", [Effect("eagle+layers", "eagle", "layers", up, down, flat, none)])])
    changes = ["+2.000 [+1.000, +3.000]", "-2.0 [-3.0, -1.0]", "+0.000 [-1.000, +1.000]", "+2.0"]
    assert table.rows == [["tiny", "eagle+layers", "eagle", "layers", *changes]]
    assert table.best == {(0, 4), (0, 5)}


def test_a_record_without_some_parts_has_the_effects_there_are(tmp_path: Path) -> None:
    chosen = sample([of_seed(tmp_path, 0, methods=["vanilla", "eagle", "eagle+layers"])])
    assert [each.method for each in effects(chosen, summaries_of(chosen))] == ["eagle+layers"]
    bare = sample([of_seed(tmp_path / "bare", 0, methods=["vanilla", "eagle"])])
    assert effects(bare, summaries_of(bare)) == []


def test_table_3_has_the_verdict_the_seeds_and_the_papers_unknown_cells(
    tmp_path: Path, spec: TableSpec, paper: Paper
) -> None:
    runs = [of_seed(tmp_path, seed) for seed in (0, 1, 2)]
    markdown, latex, table = (path.read_text(encoding="utf-8") for path in write_table(runs, tmp_path, spec, paper))
    assert markdown.startswith("# Table 3: what the parts of KOALA are worth, tiny on bundled\n")
    assert [row["method"] for row in csv.DictReader(io.StringIO(table))] == METHODS
    parts = table_under(markdown, "What each part is worth")
    assert [(row["Method"], row["Against"]) for row in parts][:2] == [
        ("eagle+layers", "eagle"),
        ("eagle+adversarial", "eagle"),
    ]
    assert parts[0]["Change of τ"].startswith("**+")
    assert "over 3 training seeds and 8 questions, crossed" in markdown
    assert [f"- Training seed (tiny, seed {seed}): {seed}." in markdown for seed in (0, 1, 2)] == [True] * 3
    assert "Not in the record: medusa, medusa+layers, medusa+adversarial, medusa+koala." in markdown
    row = ["Medusa", "vicuna-13b", "Spec-Bench", "A100 80GB", "1.80", "2.39", "hemingkx/Spec-Bench Leaderboard.md"]
    assert row in table_rows(markdown)
    assert latex.isascii() and latex.count(r"\begin{tabular}") == latex.count(r"\end{tabular}") == 1
    again = write_table([read_run(run.path) for run in runs], tmp_path / "again", spec, paper)
    assert [path.read_bytes() for path in again] == [(tmp_path / path.name).read_bytes() for path in again]


def test_one_seed_is_said_to_be_one(tmp_path: Path, spec: TableSpec, paper: Paper) -> None:
    text = write_table([of_seed(tmp_path, 4)], tmp_path, spec, paper)[0].read_text(encoding="utf-8")
    assert "- Training seed: 4." in text and "crossed" not in text


def test_the_papers_cells_stand_beside_the_measured_ones(tmp_path: Path, spec: TableSpec, paper: Paper) -> None:
    run = read_run(write_run(tmp_path / "v.jsonl", header=make_header(METHODS, target="vicuna-7b")))
    cells = tuple(
        c.model_copy(update={"speedup": 2.5}) if (c.target, c.method) == ("vicuna-7b", "eagle+layers") else c
        for c in paper.table3
    )
    text = write_table([run], tmp_path, spec, paper.model_copy(update={"table3": cells}))[0].read_text(encoding="utf-8")
    rows = table_under(text, "More of each method")
    assert [row["Paper: speedup; τ"] for row in rows[1:]] == ["unknown", "2.50; unknown", "unknown", "unknown"]
    assert not [row for row in table_rows(text) if row[:2] == ["Medusa", "vicuna-13b"]]  # another target's


def test_records_that_are_no_seeds_of_one_experiment_are_refused(tmp_path: Path, spec: TableSpec, paper: Paper) -> None:
    first = of_seed(tmp_path, 0)
    header = make_header(METHODS)
    _train(header, 1)
    header["methods"][2]["tree"] = {"name": "2x1", "nodes": 5, "depth": 2, "parents": None}
    with pytest.raises(KoalaBenchError, match=r"differ in the tree of eagle\+layers"):
        write_table([first, read_run(write_run(tmp_path / "tree.jsonl", header=header))], tmp_path, spec, paper)
    with pytest.raises(KoalaBenchError, match="same trained head of eagle"):
        write_table([first, first], tmp_path, spec, paper)
    fewer = of_seed(tmp_path, 2, methods=METHODS[:-1])
    with pytest.raises(KoalaBenchError, match=r"their methods \(eagle\+koala\)"):
        write_table([first, fewer], tmp_path, spec, paper)
    longer = make_header(METHODS)
    _train(longer, 3)
    for method in longer["methods"][1:]:
        assert method["training"]
        method["training"]["steps"] = 1200
    with pytest.raises(KoalaBenchError, match="the training steps of eagle"):
        write_table([first, read_run(write_run(tmp_path / "longer.jsonl", header=longer))], tmp_path, spec, paper)
