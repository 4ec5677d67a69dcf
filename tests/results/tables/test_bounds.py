"""Bounds under a table, in `analyse` and in figures: what they say is what records say."""

from __future__ import annotations

from pathlib import Path

import pytest

from koala_bench.common.bundled import RECIPES
from koala_bench.records.reading import read_run
from koala_bench.records.schema import TurnLine
from koala_bench.records.statistics import Interval
from koala_bench.records.summaries import sample, summarise
from koala_bench.results.figures.cost import cost_curves, has_cost_curves, head_with_layers
from koala_bench.results.making import make_table
from koala_bench.results.report.where import in_blocks, lengths_by_category, lengths_by_position
from koala_bench.results.tables.bounds import ACCEPTED, ORACLE, trace_bounds
from koala_bench.results.tables.rendering import Grid
from tests.support.markdown import table_under
from tests.support.synthetic_run import PATTERNS, TOKENS, make_header, write_run


def test_every_method_stands_under_table_1_with_its_oracle(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "run.jsonl"))
    page = make_table([run], tmp_path, RECIPES / "table1.toml")[0].read_text(encoding="utf-8")
    rows = {row["Method"]: row for row in table_under(page, ORACLE)}
    assert list(rows) == [name for name in PATTERNS if name != "vanilla"]
    for summary in summarise(run)[1:]:
        row = rows[summary.name]
        assert float(row["Speedup (x)"]) == pytest.approx(summary.speedup.value, abs=0.006)
        assert float(row["τ"]) / float(row["Break-even length"]) == pytest.approx(summary.speedup.value, rel=0.02)
        assert float(row["Oracle (x)"]) > float(row["Speedup (x)"])
        assert float(row["Oracle, free drafts (x)"]) == pytest.approx(float(row["Oracle (x)"]) / 0.8, rel=0.01)
    accepted = {row["Method"]: row for row in table_under(page, ACCEPTED)}["eagle"]
    shares = [float(share) for share in accepted["Accepting 0 / 1 / 2 / … (%)"].split(" / ")]
    assert sum(shares) == pytest.approx(100, abs=0.3) and len(shares) == 4
    given, jointly = ([float(rate) for rate in accepted[name].split(" / ")] for name in list(accepted)[-2:])
    assert jointly[0] == given[0] and jointly[1] == pytest.approx(given[0] * given[1], abs=0.02)


def test_a_file_of_answers_is_bounded_by_its_longest_step() -> None:
    """Steps of 1, 2 and 4 tokens; twice vanilla's speed at 7/3 tokens a step."""
    length, twice, none = (Interval(value, value, value) for value in (7 / 3, 2.0, 1.0))
    found = trace_bounds(
        [("1", length, twice, (2 / 3, 1 / 3, 1 / 3)), ("2", None, None, (0.5,)), ("3", none, none, ())]
    )
    assert found.rows == [["1", "1.17", "3.43", "33.3 / 33.3 / 0.0 / 33.3"], ["2", "–", "–", "50.0 / 50.0"]]


def test_a_curve_of_costs_is_of_heads_with_other_layers_alone(tmp_path: Path) -> None:
    heads = ["eagle", "p-eagle"]
    names = ["eagle@2", "eagle+layers", "p-eagle", "eagle+koala", "eagle+lk+layers", "eagle2", "hass"]
    assert [head_with_layers(name, heads) for name in names] == ["eagle", "eagle", "p-eagle", *[None] * 4]
    run = read_run(write_run(tmp_path / "run.jsonl", header=make_header(["vanilla", "eagle", "eagle@3"])))
    assert has_cost_curves([run], heads)
    ((_, head, points),) = cost_curves([run], heads)
    assert (head, [point[0] for point in points]) == ("eagle", [1, 3])
    assert all(point[1] == pytest.approx(point[3] / 4) for point in points)  # drafting is a fifth of a step


def test_lengths_are_shown_by_category_and_position(tmp_path: Path) -> None:
    def dull(turn: TurnLine) -> TurnLine:
        """Of one category nothing is accepted."""
        if turn["category"] != "writing" or turn["method"] == "vanilla":
            return turn
        return {**turn, "accepted": [0] * TOKENS, "drafted_depth": [4] * TOKENS}

    chosen = sample([read_run(write_run(tmp_path / "run.jsonl", dull))])
    grid = lengths_by_category(chosen)
    assert (grid.headings, [row[0] for row in grid.rows]) == (["Category", *[*PATTERNS][1:]], ["writing", "coding"])
    writing, coding = (row[1:] for row in grid.rows)
    assert set(writing) == {"1.00 [1.00, 1.00]"} and all(float(cell.split()[0]) > 1.2 for cell in coding)
    wide = Grid(["Category", *map(str, range(15))], [["writing", *map(str, range(15))]], [False, *[True] * 15])
    assert [part.headings[0] for part in in_blocks(wide)] == ["Category"] * 2
    assert [len(part.headings) for part in in_blocks(wide)] == [9, 8] and in_blocks(grid) == [grid]
    assert [cell for part in in_blocks(wide) for cell in part.rows[0][1:]] == wide.headings[1:]
    by_position = lengths_by_position(chosen)
    assert by_position.headings == ["Tokens before", *[*PATTERNS][1:]]
    assert [row[0] for row in by_position.rows] == ["0–15", "16–31", "32–63"]
    means = [chosen.value(chosen.length(name)) for name in [*PATTERNS][1:]]
    for column, mean in enumerate(means, 1):
        lengths = [float(row[column]) for row in by_position.rows]
        assert min(lengths) - 0.01 <= mean <= max(lengths) + 0.01
